"""The flag aggregator: the subspace that the directions of most rows share, and the mean of the rows within it.

    N rows, M dimensions of the subspace

Ring: pure.
"""

from __future__ import annotations

import numpy as np

from mycel.security.aggregators.small import Array, eigen, product, times, total

_STEPS = 5
# A row shorter than this share of the median has a direction of noise, and would need a weight over Decision's limit.
_SHORT = 1.0 / 256.0


def flag(gram_NN: Array, f: int) -> Array:
    """z = 1/n Y Y' sum_i t_i u_i: directions u_i = x_i/|x_i|, lengths t_i = min(|x_i|, median length), Y of m columns.

    Y maximises the rows' agreement v_i = |Y' u_i|^2 by reweighted SVDs: weights 1/sqrt(1 - v_i); m = (n + 1) // 2.
    Hamidi et al., 2023; their code drops the lengths, and without the bound on them one row could be any part of z.
    """
    n = len(gram_NN)
    length_N = np.sqrt(np.maximum(np.diagonal(gram_NN), 0.0))
    limit = float(np.sort(length_N)[(n - 1) // 2])
    long_N = length_N > _SHORT * limit
    if limit == 0.0 or not long_N.any():
        return np.zeros(n)
    inverse_N = np.where(long_N, 1.0 / np.where(long_N, length_N, 1.0), 0.0)
    cosine_NN = gram_NN * inverse_N[:, None] * inverse_N[None, :]
    weights_N = np.ones(n)
    for _ in range(_STEPS):
        root_N = np.sqrt(weights_N)
        value_N, vector_NN = eigen(cosine_NN * root_N[:, None] * root_N[None, :])
        m = int(np.sum(value_N[: (n + 1) // 2] > 1e-9 * value_N[0]))
        # Y = U' basis_NM in terms of the directions.
        basis_NM = root_N[:, None] * vector_NN[:, :m] / np.sqrt(value_N[:m])
        inside_NM = product(cosine_NN, basis_NM)
        agreement_N = np.minimum(total(inside_NM * inside_NM), 1.0)
        weights_N = 1.0 / np.sqrt(np.maximum(1.0 - agreement_N, 1e-6))
    pull_N = times(cosine_NN, np.minimum(length_N, limit) * long_N) / n
    inside_M = total(np.ascontiguousarray((basis_NM * pull_N[:, None]).T))
    return times(basis_NM, inside_M) * inverse_N
