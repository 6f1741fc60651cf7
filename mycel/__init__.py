"""Mycel: large language models on a network of small machines. This file is the public Python API and nothing else.

    import mycel

    with mycel.connect("mycel1:...") as model:
        for piece in model.generate("The for statement is used to", max_new_tokens=50):
            print(piece.text, end="")

In trio, `async with mycel.connect_trio(invite) as model` gives the same model with async verbs.

    with mycel.averager(tensors) as group:
        print(group.invite)
        mean = group.average(tensors).tensors

brings the tensors of several trainers together; the others come with `mycel.averager(tensors, invite)`.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from mycel._version import __version__
from mycel.protocols.errors import (
    ConfigError,
    MycelError,
    PeerError,
    PeerRefused,
    PeerTimeout,
    PeerUnreachable,
    RouteUnavailable,
)
from mycel.protocols.messages import SamplingParams

if TYPE_CHECKING:
    from collections.abc import Mapping
    from contextlib import AbstractAsyncContextManager

    from torch import Tensor

    from mycel.node.averaging import SyncAverager
    from mycel.node.client import Model
    from mycel.node.sync_client import SyncModel

__all__ = [
    "ConfigError",
    "MycelError",
    "PeerError",
    "PeerRefused",
    "PeerTimeout",
    "PeerUnreachable",
    "RouteUnavailable",
    "SamplingParams",
    "__version__",
    "averager",
    "connect",
    "connect_trio",
]


def connect(invite: str, *, cache_dir: Path | None = None) -> SyncModel:
    """Connect to a swarm, as a context manager or until `close()`; the network runs in a thread of its own.

    The tokenizer is fetched from peers and kept in `cache_dir`, or only while connected. Raises ConfigError for an
    invite that cannot be used and PeerUnreachable if none of its peers answers.
    """
    from mycel.node.sync_client import SyncModel

    return SyncModel(invite, cache_dir)


def connect_trio(invite: str, *, cache_dir: Path | None = None) -> AbstractAsyncContextManager[Model]:
    """`connect` for trio programs: an async context manager that gives a Model. Raises the same errors."""
    from mycel.node.client import connect as connect_client

    return connect_client(invite, cache_dir=cache_dir)


def averager(tensors: Mapping[str, Tensor], invite: str = "", **options: Any) -> SyncAverager:
    """A member of a group that averages tensors like these: of the invite's group, or of a new one.

    `options` are those of `SyncAverager.create` and `join` (mycel/node/averaging); for trio programs `Averager` is
    there. Raises ConfigError for an invite to a group whose tensors are others, and names the difference.
    """
    from mycel.node.averaging import SyncAverager

    return SyncAverager.join(invite, tensors, **options) if invite else SyncAverager.create(tensors, **options)
