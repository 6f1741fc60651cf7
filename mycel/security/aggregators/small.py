"""Arithmetic on n x n matrices whose bits follow from its inputs alone, on any machine.

BLAS and LAPACK sum in an order that depends on the processor and on the number of threads, and a decision that differs
in one bit is taken for a lie. So everything here is elementwise or summed one after the other, in float64. n is small.

    N rows, K of them in a subset, S subsets

Ring: pure.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]

# S^(2^10): of two eigenvalues 1 % apart the lesser is suppressed by exp(-10); nearer ones serve the rules as well.
_SQUARINGS = 10
# Parallel Jacobi converges quadratically; this is more than 256 rows need.
_SWEEPS = 14


def total(values: Array) -> Array:
    """The sums over the last axis, in order."""
    # add.reduce sums pairwise, in blocks that follow the processor's vectors; accumulate cannot.
    return np.asarray(np.add.accumulate(values, axis=-1)[..., -1])


def times(matrix: Array, vector: Array) -> Array:
    """matrix @ vector."""
    return total(matrix * vector[..., None, :])


def product(left: Array, right: Array) -> Array:
    """left @ right, in stacks of matrices too."""
    out = left[..., :, 0, None] * right[..., 0, None, :]
    for k in range(1, left.shape[-1]):
        out += left[..., :, k, None] * right[..., k, None, :]
    return out


def distances(gram_NN: Array) -> Array:
    """The squared distances between rows: d2_ij = G_ii + G_jj - 2 G_ij."""
    squares_N = np.diagonal(gram_NN)
    d2_NN = np.maximum(squares_N[:, None] + squares_N[None, :] - 2.0 * gram_NN, 0.0)
    np.fill_diagonal(d2_NN, 0.0)
    return d2_NN


def centred(gram_NN: Array, weights_N: Array) -> Array:
    """The Gram matrix about the weighted mean of the rows; the weights sum to 1."""
    to_mean_N = times(gram_NN, weights_N)
    return gram_NN - to_mean_N[:, None] - to_mean_N[None, :] + total(to_mean_N * weights_N)


def top_eigen(matrix: Array) -> tuple[Array, Array]:
    """The largest eigenvalue of a positive semidefinite matrix and its vector (of each in a stack), by squaring."""
    size = matrix.shape[-1]
    scale = np.max(np.diagonal(matrix, axis1=-2, axis2=-1), axis=-1)
    power = matrix / np.where(scale > 0.0, scale, 1.0)[..., None, None]
    for _ in range(_SQUARINGS):
        power = product(power, power)
        trace = total(np.ascontiguousarray(np.diagonal(power, axis1=-2, axis2=-1)))
        power = power / np.where(trace > 0.0, trace, 1.0)[..., None, None]
    best = np.argmax(np.diagonal(power, axis1=-2, axis2=-1), axis=-1)
    vector = np.take_along_axis(power, np.broadcast_to(best[..., None, None], (*best.shape, size, 1)), axis=-1)[..., 0]
    vector = vector / np.maximum(np.sqrt(total(vector * vector)), 1e-300)[..., None]
    return total(times(matrix, vector) * vector), vector


def eigen(matrix: Array) -> tuple[Array, Array]:
    """All eigenvalues of a symmetric matrix, the largest first, and their vectors as columns.

    Jacobi's method, Brent and Luk's order: n - 1 times n/2 disjoint rotations at once (Golub and Van Loan, 8.5).

    >>> eigen(np.array([[2.0, 1.0], [1.0, 2.0]]))[0].tolist()
    [3.0, 1.0]
    """
    n = len(matrix)
    a, vectors = matrix.copy(), np.eye(n)
    for _ in range(_SWEEPS):
        for p, q in _rounds(n):
            cosine, sine = _rotations(a[p, p], a[q, q], a[p, q])
            for target in (a.T, a, vectors.T):  # the columns of a, its rows, the columns of the vectors
                rows_p, rows_q = target[p].copy(), target[q].copy()
                target[p] = cosine[:, None] * rows_p - sine[:, None] * rows_q
                target[q] = sine[:, None] * rows_p + cosine[:, None] * rows_q
        off = a - np.diag(np.diagonal(a))
        if np.max(np.abs(off), initial=0.0) <= 2.0**-44 * np.max(np.abs(a), initial=0.0):
            break
    values = np.diagonal(a)
    order = np.argsort(-values, kind="stable")
    return values[order], vectors[:, order]


def _rotations(pp: Array, qq: Array, pq: Array) -> tuple[Array, Array]:
    """Cosines and sines that take away the entries `pq`."""
    safe = np.where(pq == 0.0, 1.0, pq)
    theta = (qq - pp) / (2.0 * safe)
    # Past 1e150 the square overflows, and the tangent is 1 / (2 theta) = 0 to all digits.
    theta = np.clip(theta, -1e150, 1e150)
    tangent = np.where(theta >= 0.0, 1.0, -1.0) / (np.abs(theta) + np.sqrt(theta * theta + 1.0))
    tangent = np.where(pq == 0.0, 0.0, tangent)
    cosine = 1.0 / np.sqrt(tangent * tangent + 1.0)
    return cosine, tangent * cosine


def _rounds(n: int) -> list[tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]]:
    """All pairs of n indices, in rounds of disjoint ones, as a tournament of n players is drawn."""
    players: list[int] = list(range(n + n % 2))  # with an odd n, who meets the last one pauses
    rounds = []
    for _ in range(len(players) - 1):
        half = len(players) // 2
        pairs = [(min(i, j), max(i, j)) for i, j in zip(players[:half], reversed(players[half:]), strict=True)]
        pairs = [(i, j) for i, j in pairs if j < n]
        if pairs:
            rounds.append((np.array([i for i, _ in pairs]), np.array([j for _, j in pairs])))
        players = [players[0], players[-1], *players[1:-1]]
    return rounds
