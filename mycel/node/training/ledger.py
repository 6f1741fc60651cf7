"""What this peer has counted at the present version: which microbatches, the sum of their gradients, their losses.

Changed and read by jobs on the compute thread alone (`counted` may be read anywhere): so a sum is never read while a
gradient is being added to it. It does not decide what may be counted.

Ring: algorithms.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from mycel.swarm.training.lattice import GradientSum


@dataclass(eq=False, slots=True)
class Ledger:
    """For one stage of `n_elements` parameters. A number is in `counted` exactly if its gradient is in the sum."""

    n_elements: int
    version: int = 0
    counted: int = 0
    sum: GradientSum = field(init=False)
    losses: dict[int, float] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        self.sum = GradientSum(self.n_elements)

    def count(self, version: int, number: int, grad_P: Tensor, loss: float) -> bool:
        """Whether the gradient came in: not a second time, and not for another version. ValueError as in the sum."""
        bit = 1 << number
        if version != self.version or self.counted & bit:
            return False
        self.sum.add(grad_P)
        self.losses[number] = loss
        self.counted |= bit
        return True

    def uncount(self, version: int, number: int, grad_P: Tensor) -> bool:
        """Take a gradient back, computed again to the same bits; whether it was in. ValueError as in the sum."""
        bit = 1 << number
        if version != self.version or not self.counted & bit:
            return False
        self.sum.subtract(grad_P)  # first: a bad gradient raises, and then nothing has changed
        self.counted &= ~bit
        del self.losses[number]
        return True

    def partial(self, version: int, counted: int, start: int, count: int) -> Tensor | None:
        """A copy of a slice of the sum (int64 [count]), if it is that of exactly `counted`."""
        if version != self.version or counted != self.counted:
            return None
        return self.sum.sum_P[start : start + count].clone()

    def advance(self, version: int) -> None:
        """Begin another step with nothing counted."""
        self.version, self.counted = version, 0
        self.losses.clear()
        self.sum.clear()
