"""A group's shared state as the rest of the node takes it: given to newcomers, copied for checkpoints, kept on disk.

Ring: shell.
"""

from __future__ import annotations

import hashlib
import struct
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from mycel.node.blobs import atomic_write, disk_errors
from mycel.protocols.errors import ConfigError, RemoteProtocolError
from mycel.swarm.methods.outer import SharedState

__all__ = ["SharedHolder", "WeightsHolder", "load_shared", "save_shared"]

_HEADER = struct.Struct("<8sQ32s")  # magic, round, SHA-256 of the rest
_MAGIC = b"mycelSS1"


@dataclass(eq=False, slots=True)
class SharedHolder:
    """A `StateHolder` over the shared state: newcomers fetch its snapshot, and ask for it by the group's round.

    `version` is the round that the state is after. Who changes the state changes it in the same job: what was copied
    between the two would be given out as the state after another round.
    """

    shared: SharedState
    version: int = 0

    @property
    def size_bytes(self) -> int:
        return self.shared.size_bytes

    def apply(self, sum_P: Tensor, scale: float) -> None:
        raise AssertionError("a shared state moves by certificates alone")

    def params_digest(self) -> bytes:
        """Of the whole state: peers that share the parameters but not the momentum would part at the next round."""
        return self.shared.digest()

    def snapshot(self) -> memoryview:
        return memoryview(self.shared.snapshot())

    def load(self, data: memoryview, version: int) -> None:
        raise AssertionError("a state that was fetched is loaded by who fetched it")


@dataclass(frozen=True, slots=True)
class WeightsHolder:
    """A `StateHolder` over the parameters alone, as the model's checkpoint has them; `version` counts inner steps."""

    shared: SharedState
    version: int

    @property
    def size_bytes(self) -> int:
        return 4 * self.shared.n_elements

    def apply(self, sum_P: Tensor, scale: float) -> None:
        raise AssertionError("a shared state moves by certificates alone")

    def params_digest(self) -> bytes:
        return hashlib.sha256(_bytes_of(self.shared.theta_P)).digest()

    def snapshot(self) -> memoryview:
        return _bytes_of(self.shared.theta_P.clone())

    def load(self, data: memoryview, version: int) -> None:
        raise AssertionError("a run goes on from its shared state, not from the weights alone")


def save_shared(path: Path, number: int, snapshot: bytes) -> None:
    """Write the state after round `number` over the one before, whole or not at all. Raises ConfigError."""
    with disk_errors("write", path):
        path.parent.mkdir(parents=True, exist_ok=True)
        atomic_write(path, _HEADER.pack(_MAGIC, number, hashlib.sha256(snapshot).digest()) + snapshot)


def load_shared(path: Path, shared: SharedState) -> int | None:
    """Make `shared` what `save_shared` wrote; the round that it is after, or None if nothing was written yet.

    Raises ConfigError for a file that is not one, or is of another model.
    """
    if not path.exists():
        return None
    with disk_errors("read", path):
        data = path.read_bytes()
    try:
        magic, number, digest = _HEADER.unpack(data[: _HEADER.size])
        body = memoryview(data)[_HEADER.size :]
        if magic != _MAGIC or hashlib.sha256(body).digest() != digest:
            raise ConfigError(f"{path} is damaged: remove it, and the node fetches the state from its peers")
        shared.load(body)
    except (struct.error, RemoteProtocolError) as error:
        raise ConfigError(f"{path} is no state of this run ({error}): remove it") from None
    return int(number)


def _bytes_of(theta_P: Tensor) -> memoryview:
    return theta_P.view(torch.uint8).numpy().data
