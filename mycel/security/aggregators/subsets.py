"""Rules that try every subset of n - f rows; for small groups.

    N rows, S subsets of K = n - f rows

Ring: pure.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from itertools import combinations, islice

import numpy as np
import numpy.typing as npt

from mycel.security.aggregators.small import Array, centred, distances, top_eigen, total

# So many subsets take less than a second. 16 rows with 4 liars make 1,820, 20 with 5 liars 15,504.
MAX_SUBSETS = {"mda": 20_000, "smea": 5_000}
_AT_ONCE = 500


def n_subsets(n_rows: int, f: int) -> int:
    """How many subsets of n - f rows there are."""
    return math.comb(n_rows, f)


def mda(gram_NN: Array, f: int) -> Array:
    """Minimum diameter averaging: the mean of the n - f rows whose largest distance is least.

    El Mhamdi et al., 2018. Many subsets share a largest distance: of them, the one with the least sum of distances.
    """
    d2_NN = distances(gram_NN)

    def spread(subset_SK: npt.NDArray[np.int64]) -> tuple[Array, Array]:
        d2_SKK = d2_NN[subset_SK[:, :, None], subset_SK[:, None, :]]
        return np.max(d2_SKK, axis=(1, 2)), total(total(d2_SKK))

    return _best(len(gram_NN), f, spread)


def smea(gram_NN: Array, f: int) -> Array:
    """Smallest maximum eigenvalue averaging: the mean of the n - f rows whose covariance has the least top eigenvalue.

    Allouah et al., 2023; the best known bound.
    """

    def spread(subset_SK: npt.NDArray[np.int64]) -> tuple[Array, Array]:
        gram_SKK = gram_NN[subset_SK[:, :, None], subset_SK[:, None, :]]
        k = subset_SK.shape[1]
        about_SKK = np.stack([centred(one_KK, np.full(k, 1.0 / k)) for one_KK in gram_SKK])
        value_S, _ = top_eigen(about_SKK)
        return value_S, total(np.ascontiguousarray(np.diagonal(about_SKK, axis1=1, axis2=2)))

    return _best(len(gram_NN), f, spread)


def _best(n: int, f: int, spread: Callable[[npt.NDArray[np.int64]], tuple[Array, Array]]) -> Array:
    best: tuple[float, float] = (math.inf, math.inf)
    chosen = np.arange(n - f)
    for subset_SK in _subsets(n, f):
        first_S, second_S = spread(subset_SK)
        s = int(np.lexsort((second_S, first_S))[0])
        if (first_S[s], second_S[s]) < best:
            best, chosen = (float(first_S[s]), float(second_S[s])), subset_SK[s]
    weights_N = np.zeros(n)
    weights_N[chosen] = 1.0 / (n - f)
    return weights_N


def _subsets(n: int, f: int) -> Iterator[npt.NDArray[np.int64]]:
    every = combinations(range(n), n - f)
    while some := list(islice(every, _AT_ONCE)):
        yield np.array(some, dtype=np.int64)
