"""Sparse rows: at an index that few rows touch, a liar must not be the only voice.

    N rows, P parameters of a shard, C columns of a chunk

The mean over those who touch an index, as sparse codecs usually take it, hands an attacker every index that no honest
peer picked, at full weight.

Ring: algorithms.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mycel.security.aggregators.decision import UNIT


@dataclass(frozen=True, slots=True)
class Touch:
    """At which indices how many rows are enough, and how large one entry may be where they are not."""

    f: int
    # The largest entry of the median row: an entry that counts alone may be this large.
    limit: float

    @staticmethod
    def of(rows: Sequence[Tensor], n_liars: int) -> Touch:
        """For these rows of a shard, of which `n_liars` may be false."""
        tops = sorted(float(torch.maximum(row.amax(), row.amin().neg())) if len(row) else 0.0 for row in rows)
        return Touch(min(n_liars, (len(rows) - 1) // 2), tops[(len(rows) - 1) // 2])

    def rule(self, name: str, part: Sequence[Tensor]) -> Tensor:
        """A coordinate rule among the rows that touch a column, times their share of all rows; float64 [C]."""
        n, f = len(part), self.f
        block_NC = torch.stack(list(part))
        # Infinity: those that do not touch are sorted last, and never added.
        sorted_NC = torch.where(block_NC == 0.0, torch.inf, block_NC).sort(dim=0).values.double()
        count_C = (block_NC != 0.0).sum(dim=0)
        if name == "median":
            low_C, high_C = (count_C - 1).clamp_(min=0) // 2, (count_C // 2).clamp_(max=n - 1)
            value_C = (_at(sorted_NC, low_C) + _at(sorted_NC, high_C)) * 0.5
        elif name == "trimmed-mean":
            value_C = _window_mean(sorted_NC, torch.full_like(count_C, f), count_C - 2 * f)
        else:
            low_C, high_C = (count_C - 1).clamp_(min=0) // 2, (count_C // 2).clamp_(max=n - 1)
            median_C = (_at(sorted_NC, low_C) + _at(sorted_NC, high_C)) * 0.5
            width_C, start_C = count_C - f, torch.zeros_like(count_C)
            for s in range(f):
                won_C = _at(sorted_NC, (s + width_C).clamp_(0, n - 1))
                start_C += (won_C - median_C < median_C - sorted_NC[s]).long()
            value_C = _window_mean(sorted_NC, start_C, width_C)
        # Where too few touch, the value means nothing (nor need it be finite), and `few_touched` sets another.
        return value_C.mul_(count_C).div_(n)


def few_touched(part: Sequence[Tensor], weights: Sequence[int], touch: Touch, sum_C: Tensor) -> None:
    """Sets `sum_C` anew where fewer than 2f + 1 rows are not zero: each counts 1/n at most, of all n."""
    few_C = sum((row_C != 0.0).to(torch.int16) for row_C in part) < 2 * touch.f + 1
    assert isinstance(few_C, Tensor)
    share = UNIT // len(part)
    spread_C = torch.zeros_like(sum_C)
    for row_C, weight in zip(part, weights or [share] * len(part), strict=True):
        spread_C.add_(row_C.clamp(-touch.limit, touch.limit), alpha=max(-share, min(weight, share)))
    torch.where(few_C, spread_C.mul_(1.0 / UNIT), sum_C, out=sum_C)


def _at(sorted_NC: Tensor, rank_C: Tensor) -> Tensor:
    return sorted_NC.gather(0, rank_C[None, :])[0]


def _window_mean(sorted_NC: Tensor, start_C: Tensor, width_C: Tensor) -> Tensor:
    """The mean of `width` values in order from `start`."""
    sum_C = torch.zeros_like(sorted_NC[0])
    for rank, row_C in enumerate(sorted_NC):
        sum_C.add_(torch.where((start_C <= rank) & (rank < start_C + width_C), row_C, 0.0))
    return sum_C.div_(width_C.clamp(min=1))
