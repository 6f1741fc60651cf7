"""The port of all update codecs: a vector to few bytes, and bytes of a peer back to a vector.

A `Codec` knows no contributor. Its `decode` is the same function everywhere: for equal bytes it gives equal bits on
every machine, as it uses nothing but elementwise IEEE operations, and sums of integers that are exact in any order. An
`Encoder` is one contributor's, and keeps what belongs to it: what was not sent yet, a momentum, a warm start.

Legend: P elements of the flat vector.

Ring: algorithms.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from mycel.protocols.errors import LocalProtocolError, RemoteProtocolError
from mycel.swarm.codecs.layout import Layout

__all__ = ["Codec", "Encoder", "PlainEncoder", "Turn", "check_decoded", "check_vector"]

_LARGEST = torch.finfo(torch.float32).max


class Encoder(Protocol):
    """One contributor's side: `encode`, then `settle`, then the next vector."""

    def encode(self, x_P: Tensor, seed: bytes) -> bytes:
        """The body for float32 `x_P`, a function of this encoder's state, `x_P` and `seed` alone; `x_P` stays as it is.

        Raises ValueError for another shape or dtype, and for values that are not finite: then nothing has changed.
        """
        ...

    def settle(self, accepted: bool) -> None:
        """Whether the swarm took the last body. What it did not get is carried on if the codec feeds errors back."""
        ...


class Codec(Protocol):
    """How vectors become bodies; two codecs of one name are the same."""

    @property
    def name(self) -> str:
        """The canonical spec, which `make_codec` takes."""
        ...

    @property
    def layered(self) -> bool:
        """Whether the shapes of the layout matter, not the number of elements alone."""
        ...

    @property
    def repeatable(self) -> bool:
        """Whether a fresh encoder, too, makes the same bytes of the same vector on every machine.

        What several aggregators encode and sign needs this; contributions do not.
        """
        ...

    def encoder(self, layout: Layout) -> Encoder:
        """A new contributor's encoder, with nothing carried over."""
        ...

    def decode(self, body: bytes | memoryview, layout: Layout) -> Tensor:
        """The float32 [P] vector, all finite.

        Raises RemoteProtocolError for bytes that are no body. The layout and `len(body)` bound time and memory.
        """
        ...

    def max_bytes(self, layout: Layout) -> int:
        """The longest body of this codec; a reader refuses a longer one unread."""
        ...


class Turn:
    """That `encode` and `settle` take turns; anything else is our own mistake, and would lose or double an update."""

    def __init__(self) -> None:
        self._open = False

    def check_settled(self) -> None:
        if self._open:
            raise LocalProtocolError("an update was encoded before the last one was settled")

    def encoded(self) -> None:
        self._open = True

    def settled(self) -> None:
        if not self._open:
            raise LocalProtocolError("an update was settled that was never encoded")
        self._open = False


class PlainEncoder:
    """The encoder of a codec without memory: what is lost is lost."""

    def __init__(self, pack: Callable[[Tensor, bytes], bytes], layout: Layout) -> None:
        self._pack = pack
        self._layout = layout
        self._turn = Turn()

    def encode(self, x_P: Tensor, seed: bytes) -> bytes:
        self._turn.check_settled()
        body = self._pack(check_vector(x_P, self._layout), seed)
        self._turn.encoded()
        return body

    def settle(self, accepted: bool) -> None:
        self._turn.settled()


def check_vector(x_P: Tensor, layout: Layout) -> Tensor:
    """`x_P` on the CPU without its history. Raises ValueError unless it is float32 [P] and finite."""
    if x_P.dtype != torch.float32 or x_P.shape != (layout.n_elements,):
        raise ValueError(f"an update of {list(x_P.shape)} {x_P.dtype}, not [{layout.n_elements}] float32")
    x_P = x_P.detach().to("cpu").contiguous()
    if not _finite(x_P):
        raise ValueError("an update is not finite")
    return x_P


def check_decoded(x_P: Tensor) -> Tensor:
    """`x_P`, which came out of a peer's bytes. Raises RemoteProtocolError if it is not finite."""
    if not _finite(x_P):
        raise RemoteProtocolError("an update decodes to numbers that are not finite")
    return x_P


def _finite(x_P: Tensor) -> bool:
    # Vectorised, where isfinite().all() takes fifteen times as long; NaN comes out as NaN, and fails.
    least, most = torch.aminmax(x_P)
    return float(least) >= -_LARGEST and float(most) <= _LARGEST
