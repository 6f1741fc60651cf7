"""What a peer's own training is to its part in a group: steps, or gradients, of samples that follow from a beacon.

Legend: P parameters.

Ring: algorithms (signatures only).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

__all__ = ["Work", "Worked"]


@dataclass(frozen=True, slots=True)
class Worked:
    """What a peer has done: inner steps made, the mean loss of a target token in them, and how long it took."""

    n_steps: int
    loss: float
    seconds: float

    def __add__(self, other: Worked) -> Worked:
        n_steps = self.n_steps + other.n_steps
        loss = (self.loss * self.n_steps + other.loss * other.n_steps) / max(n_steps, 1)
        return Worked(n_steps, loss, self.seconds + other.seconds)


class Work(Protocol):
    """Inner steps on real text in life, on a few numbers in a simulation. One call at a time."""

    async def start(self, params_P: Tensor, version: int) -> None:
        """Go on from these parameters. `version` steps are behind the run, which is what the learning rate goes by."""
        ...

    async def steps(self, beacon: bytes, first: int, count: int) -> tuple[Tensor, Worked]:
        """Make steps [first, first + count) of those that follow from this beacon; a copy of the parameters then."""
        ...

    async def gradients(self, beacon: bytes, first: int, count: int) -> tuple[Tensor, Worked]:
        """The sum of the gradients [P] of these steps' batches; the parameters stay as they are."""
        ...

    async def forget(self) -> None:
        """Let go of the optimizer's moments: they are spoiled."""
        ...
