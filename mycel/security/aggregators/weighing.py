"""Rules that give each row one weight, from the Gram matrix of the rows about a centre c alone.

    N rows; f liars at most; z = c + sum_i w_i (x_i - c); what the weights leave over of 1 stays at the centre

Every rule is a function (gram_NN, f) -> weights_N. Distances to z need no rows either:
|x_i - z|^2 = G_ii - 2 (G w)_i + w' G w.

Ring: pure.
"""

from __future__ import annotations

import numpy as np

from mycel.security.aggregators.small import Array, centred, distances, times, top_eigen, total

_CLIP_STEPS = 3
_WEISZFELD_STEPS = 400
_WEISZFELD_PRECISION = 2.0**-26


def mean(gram_NN: Array, f: int) -> Array:
    """w_i = 1/n. One liar moves it anywhere."""
    return np.full(len(gram_NN), 1.0 / len(gram_NN))


def krum(gram_NN: Array, f: int) -> Array:
    """The one row with the least sum of squared distances to its n - f - 1 nearest.

    Blanchard et al., 2017; kappa <= 6 (1 + f/(n - 2f)) as in Allouah et al., 2023.

    >>> krum(np.diag([1.0, 1.0, 4.0]), 1).tolist()
    [1.0, 0.0, 0.0]
    """
    weights_N = np.zeros(len(gram_NN))
    weights_N[krum_order(gram_NN, f)[0]] = 1.0
    return weights_N


def multi_krum(gram_NN: Array, f: int) -> Array:
    """The mean of the n - f rows with the best scores of Krum."""
    n = len(gram_NN)
    weights_N = np.zeros(n)
    weights_N[krum_order(gram_NN, f)[: n - f]] = 1.0 / (n - f)
    return weights_N


def krum_order(gram_NN: Array, f: int) -> list[int]:
    """The rows by Krum's score, the best first."""
    d2_NN = np.sort(distances(gram_NN), axis=1)
    score_N = total(d2_NN[:, : len(d2_NN) - f])
    # Of two rows that are each other's nearest the scores may be the same: all distances tell them apart.
    return [int(i) for i in np.lexsort((total(d2_NN), score_N))]


def geometric_median(gram_NN: Array, f: int) -> Array:
    """argmin_z sum_i |x_i - z|, by Weiszfeld's iteration: w_i ~ 1 / max(nu, |x_i - z|).

    Pillutla et al., 2022 (RFA); kappa <= 4 (1 + f/(n - 2f))^2. nu is a millionth of the median distance.
    """
    n = len(gram_NN)
    near_NN = np.sort(np.sqrt(distances(gram_NN)), axis=1)
    medoid = int(np.argmin(total(near_NN[:, : n - f])))
    length_N = np.sqrt(distances(gram_NN)[medoid])
    scale = float(np.sort(length_N)[n // 2])
    if scale == 0.0:  # most rows are the same one, and so it is the median
        same_N = (length_N == 0.0).astype(np.float64)
        return np.asarray(same_N / total(same_N))
    # About the medoid: a row far away costs no digits. From the mean of its nearest: a start on a row would stick.
    about_NN = centred(gram_NN, np.eye(n)[medoid])
    near_N = (length_N <= near_NN[medoid, n - f - 1]).astype(np.float64)
    weights_N = near_N / total(near_N)
    for _ in range(_WEISZFELD_STEPS):
        inverse_N = 1.0 / np.maximum(_lengths(about_NN, weights_N), 1e-6 * scale)
        before_N, weights_N = weights_N, inverse_N / total(inverse_N)
        if np.max(np.abs(weights_N - before_N)) < _WEISZFELD_PRECISION:
            break
    return np.asarray(weights_N)


def centered_clip(gram_NN: Array, f: int) -> Array:
    """v <- v + 1/n sum_i (x_i - v) min(1, tau / |x_i - v|), three times from the centre; tau is the median distance.

    Karimireddy et al., 2021. The centre should be the last aggregate: this rule moves from it by tau at most a step.
    """
    n = len(gram_NN)
    weights_N = np.zeros(n)
    for _ in range(_CLIP_STEPS):
        length_N = _lengths(gram_NN, weights_N)
        scale_N = clip_scales(length_N, float(np.sort(length_N)[(n - 1) // 2]))
        weights_N = weights_N * (1.0 - total(scale_N) / n) + scale_N / n
    return weights_N


def caf(gram_NN: Array, f: int) -> Array:
    """Covariance-bound agnostic filter: the weighted mean whose covariance has the least top eigenvalue, of those met
    while rows that stick out along the top eigenvector lose weight: c_i <- c_i (1 - tau_i / max tau), down to n - 2f.

    Allouah et al., 2025; tau_i = <x_i - mu, v>^2. It needs no bound on the covariance.
    """
    n = len(gram_NN)
    c_N = np.ones(n)
    best_N, least = c_N / n, np.inf
    while f > 0 and total(c_N) > n - 2 * f:
        about_NN = centred(gram_NN, c_N / total(c_N))
        root_N = np.sqrt(c_N)
        value, vector_N = top_eigen(about_NN * root_N[:, None] * root_N[None, :])
        value /= total(c_N)
        if value < least:
            best_N, least = c_N / total(c_N), float(value)
        # A row that is out already, and far away, must not set the scale: the others would lose next to nothing.
        out_N = times(about_NN, root_N * vector_N)
        tau_N = np.where(c_N > 0.0, out_N * out_N, 0.0)
        if not np.max(tau_N) > 0.0:  # all that are left are the same
            break
        c_N = np.where(tau_N == np.max(tau_N), 0.0, c_N * (1.0 - tau_N / np.max(tau_N)))
    return best_N


def clip_scales(length_N: Array, limit: float) -> Array:
    """By how much vectors of these lengths are shortened to be no longer than `limit`."""
    return np.where(length_N > limit, limit / np.where(length_N > 0.0, length_N, 1.0), 1.0)


def _lengths(gram_NN: Array, weights_N: Array) -> Array:
    """|x_i - z| for each row."""
    to_z_N = times(gram_NN, weights_N)
    return np.sqrt(np.maximum(np.diagonal(gram_NN) - 2.0 * to_z_N + total(to_z_N * weights_N), 0.0))
