"""Gradients summed on an integer lattice: exact in any order, by whomever, and taken back exactly.

    sum = sum_k round(g_k * 2^44)   in int64

Floating-point sums depend on their order, so two peers that lost and recomputed different microbatches would step to
different parameters. On the lattice the sum of a step's microbatches is one number, whoever computed which of them.
2^-44 is 5.7e-14: for an element of 1e-7 half a millionth of it, less than float32 rounds where gradients matter; the
range is +-2^19 before anything overflows (docs/decisions/0010).

Ring: algorithms.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mycel.protocols.errors import RemoteProtocolError

__all__ = ["SCALE_BITS", "GradientSum", "check_partial", "to_float"]

SCALE_BITS = 44
# An element of one microbatch's gradient beyond this is an explosion, and MAX_MICROBATCHES of them still fit.
_MAX_ELEMENT = 32.0
_PIECE = 1 << 20  # elements converted at a time: a temporary copy in int64 would double the memory


class GradientSum:
    """The sum of flat float32 gradients [P] on the lattice."""

    def __init__(self, n_elements: int) -> None:
        self.sum_P = torch.zeros(n_elements, dtype=torch.int64)

    def add(self, grad_P: Tensor) -> None:
        """Raises ValueError, and adds nothing, for a gradient that is not finite or beyond +-32 anywhere."""
        self._accumulate(grad_P, 1)

    def subtract(self, grad_P: Tensor) -> None:
        """Takes back what was added, bit for bit."""
        self._accumulate(grad_P, -1)

    def clear(self) -> None:
        self.sum_P.zero_()

    def _accumulate(self, grad_P: Tensor, sign: int) -> None:
        if grad_P.shape != self.sum_P.shape or grad_P.dtype != torch.float32:
            raise ValueError(f"a gradient of {list(self.sum_P.shape)} float32 is needed")
        if grad_P.numel():
            least, most = torch.aminmax(grad_P)
            if not (float(least) >= -_MAX_ELEMENT and float(most) <= _MAX_ELEMENT):  # also false for NaN
                raise ValueError("the gradient is not finite, or has exploded")
        for start in range(0, grad_P.numel(), _PIECE):
            part = (grad_P[start : start + _PIECE] * float(1 << SCALE_BITS)).round_().to(torch.int64)
            self.sum_P[start : start + _PIECE].add_(part, alpha=sign)


def check_partial(partial_P: Tensor, count: int, n_numbers: int, peer: str) -> Tensor:
    """A peer's sum of `n_numbers` gradients. Raises RemoteProtocolError for another dtype, size or range."""
    if partial_P.dtype != torch.int64 or partial_P.shape != (count,):
        raise RemoteProtocolError(f"a partial sum of {list(partial_P.shape)} {partial_P.dtype}", peer)
    limit = n_numbers * int(_MAX_ELEMENT) << SCALE_BITS
    if count:
        least, most = torch.aminmax(partial_P)
        if not (int(least) >= -limit and int(most) <= limit):
            raise RemoteProtocolError(f"no {n_numbers} gradients have such a sum", peer)
    return partial_P


def to_float(sum_P: Tensor) -> Tensor:
    """Lattice -> float32, rounded once: not by way of float64, which would round sums beyond +-512 a first time."""
    return sum_P.to(torch.float32).mul_(1.0 / (1 << SCALE_BITS))
