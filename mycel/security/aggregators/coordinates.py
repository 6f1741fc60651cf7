"""Rules decided at each coordinate by itself: coordinate median, trimmed mean, mean around the median.

    N rows, C columns of a chunk

Ring: algorithms.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

# Elements of a block of float32: 1 MiB.
SCRATCH_ELEMENTS = 1 << 18
# Up to here a network of minima and maxima is faster than numpy's sort of the transposed block.
_MAX_NETWORK = 24


def coordinate_rule(name: str, block_NC: Tensor, f: int) -> Tensor:
    """The rule `name` at each column of a block of finite float32, which it may overwrite; float64 [C].

    median: kappa <= 4 (1 + f/(n - 2f))^2. trimmed-mean: without the f least and the f greatest, kappa <= 6f/(n - 2f)
    (1 + f/(n - 2f)) (Yin et al., 2018; bounds of Allouah et al., 2023). meamed: the mean of the n - f values nearest to
    the median (Xie et al., 2018).

    >>> coordinate_rule("trimmed-mean", torch.tensor([[1.0], [2.0], [3.0], [1e30]]), 1).tolist()
    [2.5]
    """
    n = len(block_NC)
    if name == "median":
        low, high = (n - 1) // 2, n // 2
        sorted_NC = sort_rows(block_NC, low, high + 1)
        return sorted_NC[low].double().add_(sorted_NC[high]).mul_(0.5)
    if name == "trimmed-mean":
        sorted_NC = sort_rows(block_NC, f, n - f)
        return _sum(sorted_NC[f : n - f]).div_(n - 2 * f)
    assert name == "meamed", name
    return _meamed(sort_rows(block_NC, 0, n), f)


def sort_rows(block_NC: Tensor, first: int, last: int) -> Sequence[Tensor]:
    """Rows of which those from `first` to before `last` hold the values of their rank; overwrites the block."""
    n = len(block_NC)
    if n > _MAX_NETWORK:
        sorted_CN = torch.from_numpy(np.sort(block_NC.T.contiguous().numpy(), axis=1))
        return list(sorted_CN.T.contiguous())
    rows = list(block_NC)
    spare = torch.empty_like(rows[0])
    for i, j in _network(n, first, last):
        torch.minimum(rows[i], rows[j], out=spare)
        torch.maximum(rows[i], rows[j], out=rows[j])
        rows[i], spare = spare, rows[i]
    return rows


@lru_cache(maxsize=256)
def _network(n: int, first: int, last: int) -> tuple[tuple[int, int], ...]:
    """Batcher's odd-even merge sort of n, without the comparisons that no rank in [first, last) depends on."""
    pairs: list[tuple[int, int]] = []
    p = 1
    while p < n:
        k = p
        while k >= 1:
            for j in range(k % p, n - k, 2 * k):
                merged = range(j, min(j + k, n - k))
                pairs.extend((i, i + k) for i in merged if i // (2 * p) == (i + k) // (2 * p))
            k //= 2
        p *= 2
    wanted = set(range(first, last))
    kept = []
    for i, j in reversed(pairs):
        if i in wanted or j in wanted:
            wanted |= {i, j}
            kept.append((i, j))
    return tuple(reversed(kept))


def _sum(rows: Sequence[Tensor]) -> Tensor:
    sum_C = rows[0].double()
    for row_C in rows[1:]:
        sum_C.add_(row_C)
    return sum_C


def _meamed(sorted_NC: Sequence[Tensor], f: int) -> Tensor:
    """The n - f values nearest to the median are neighbours in the order: which window, and its mean."""
    n = len(sorted_NC)
    median_C = sorted_NC[(n - 1) // 2].double().add_(sorted_NC[n // 2]).mul_(0.5)
    start_C = torch.zeros(len(median_C), dtype=torch.int16)
    for s in range(f):
        # The window goes on to the right while the value that it wins is nearer than the one that it loses.
        start_C += (sorted_NC[s + n - f] - median_C < median_C - sorted_NC[s]).to(torch.int16)
    sum_C = torch.zeros_like(median_C)
    for rank, row_C in enumerate(sorted_NC):
        # Added only where it belongs: taking a row of 1e30 off again would leave nothing of the others.
        inside_C = (start_C <= rank) & (rank < start_C + (n - f))
        sum_C.add_(torch.where(inside_C, row_C, 0.0))
    return sum_C.div_(n - f)
