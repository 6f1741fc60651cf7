"""The sums of a stage's gradients as one peer has them: of the present step in parts, of the last ones whole.

Ring: algorithms.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from mycel.protocols.training import Reduced
from mycel.swarm.training.actions import Range
from mycel.swarm.training.step import uncovered

__all__ = ["FinalSum", "SumTable", "digest", "sum_of_squares"]

# The sums of so many steps are kept for those who come later.
KEPT_SUMS = 2
_SQUARES_AT_A_TIME = 1 << 15  # torch shares out longer sums among threads, and then their order is not ours


@dataclass(frozen=True, eq=False, slots=True)
class FinalSum:
    """What a step applies, or has applied: with `scale`, then. `own_tied`: the stage's own share of the tied table."""

    sum_P: Tensor  # noqa: N815 - its shape
    own_tied: Tensor | None
    reduced: Reduced
    scale: float = 0.0


@dataclass(eq=False, slots=True)
class SumTable:
    """The stage's sums, as far as they are here: of the present step in parts, of the last ones whole.

    Written once, element by element, and never changed: slices may be read while others are written.
    """

    n_elements: int
    tied: tuple[int, int] | None
    version: int = 0
    covered: tuple[Range, ...] = ()
    loss: float | None = None
    finals: dict[int, FinalSum] = field(default_factory=dict)
    _own_P: Tensor | None = None  # noqa: N815

    def advance(self, version: int) -> None:
        """Begin another step; of the last ones only so many are kept."""
        self.version, self.covered, self.loss, self._own_P = version, (), None, None
        self._drop(version - KEPT_SUMS)

    def restart(self, version: int) -> None:
        """Begin with a state that came from elsewhere, with no sums."""
        self.finals.clear()
        self.advance(version)

    @property
    def reduced(self) -> tuple[Reduced, ...]:
        return tuple(self.finals[version].reduced for version in sorted(self.finals))[-KEPT_SUMS:]

    def own_sum(self) -> Tensor:
        """The stage's own sum; what `covered` says is there."""
        if self._own_P is None:
            self._drop(self.version - KEPT_SUMS + 1)
            self._own_P = torch.zeros(self.n_elements, dtype=torch.float32)
        return self._own_P

    def write(self, start: int, values_N: Tensor) -> None:
        """Elements from `start` on; what is there already stays."""
        end = start + len(values_N)
        for low, high in uncovered(self.covered, start, end):
            self.own_sum()[low:high] = values_N[low - start : high - start]
        self.covered = _merged((*self.covered, (start, end)))

    def finish(self, final: FinalSum) -> None:
        self.finals[final.reduced.version] = final
        self._drop(final.reduced.version - KEPT_SUMS + 1)
        self._own_P = None
        self.covered = ()

    def made(self, version: int, scale: float) -> None:
        """The step is made."""
        final = self.finals[version]
        self.finals[version] = FinalSum(final.sum_P, final.own_tied, final.reduced, scale)

    def slice(self, version: int, start: int, end: int, *, tied: bool) -> Tensor | None:
        """A view of elements [start, end), if all of them are here."""
        final = self.finals.get(version)
        if final is None:
            is_here = not tied and version == self.version and not uncovered(self.covered, start, end)
            return self.own_sum()[start:end] if is_here else None
        if tied or self.tied is None or final.own_tied is None:
            return final.sum_P[start:end]
        low, high = max(start, self.tied[0]), min(end, self.tied[1])
        if low >= high:
            return final.sum_P[start:end]
        part = final.sum_P[start:end].clone()
        part[low - start : high - start] = final.own_tied[low - self.tied[0] : high - self.tied[0]]
        return part

    def loss_of(self, version: int) -> float:
        final = self.finals.get(version)
        return final.reduced.loss if final is not None else (self.loss or 0.0)

    def _drop(self, oldest: int) -> None:
        for version in [v for v in self.finals if v < oldest]:
            del self.finals[version]


def _merged(ranges: Iterable[Range]) -> tuple[Range, ...]:
    merged: list[Range] = []
    for start, end in sorted(ranges):
        if merged and start <= merged[-1][1]:
            merged[-1] = merged[-1][0], max(end, merged[-1][1])
        else:
            merged.append((start, end))
    return tuple(merged)


def digest(sum_P: Tensor) -> bytes:
    """SHA-256 of its bytes."""
    return hashlib.sha256(sum_P.numpy().data).digest()


def sum_of_squares(sum_P: Tensor, leave_out: tuple[int, int] | None) -> float:
    """In float64, the same to the last bit whatever the number of threads. sum_of_squares([1, 2], None) == 5.0"""
    whole = len(sum_P)
    low, high = leave_out or (whole, whole)
    starts = (
        (start, end) for first, end in ((0, low), (high, whole)) for start in range(first, end, _SQUARES_AT_A_TIME)
    )
    parts = (sum_P[start : min(start + _SQUARES_AT_A_TIME, end)] for start, end in starts)
    return math.fsum(float(part.double().square_().sum()) for part in parts)
