"""Rules that need what a peer alone has, its own gradient or its own test data: for what it does by itself.

No two peers agree on their results, so they serve where each mixes for itself, not where one result is certified.

    N peers' rows, P parameters, L classes

Ring: algorithms.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mycel.security.aggregators.gram import check_rows, chunks, finite_rows

if TYPE_CHECKING:
    from random import Random

_COLUMNS = 1 << 16


def own_cosine(rows: Sequence[Tensor], own: Tensor) -> Tensor:
    """sum_i w_i x_i |own| / |x_i| / sum_i w_i with w_i = max(0, cos(x_i, own)); zeros if no row agrees with own.

    FLTrust (Cao et al., 2021) with the peer's own gradient for a root. It needs no bound on the liars, and data that is
    the same for all: on Dirichlet(0.3) shards it fails.

    >>> own_cosine([torch.tensor([2.0, 0.0]), torch.tensor([-1.0, 0.0])], torch.tensor([1.0, 0.0])).tolist()
    [1.0, 0.0]
    """
    check_rows(rows, own)
    good = [row for row, finite in zip(rows, finite_rows(rows), strict=True) if finite]
    length = math.sqrt(_dot(own, own))
    shares = []
    for row in good:
        row_length = math.sqrt(_dot(row, row))
        cosine = _dot(row, own) / (row_length * length) if row_length and length else 0.0
        shares.append((max(0.0, cosine), length / row_length if row_length else 0.0))
    whole = sum(weight for weight, _ in shares)
    return _weighted(good, [weight / whole * scale if whole else 0.0 for weight, scale in shares], len(own))


def monna(rows: Sequence[Tensor], own: Tensor, n_liars: int) -> Tensor:
    """The mean of own and the n - f - 1 rows nearest to it, n counting own (Farhadkhani et al., 2023)."""
    n_near = len(rows) - n_liars
    near = nearest(squared_distances(rows, own), max(0, n_near))
    return _weighted([own, *(rows[i] for i in near)], [1.0 / (len(near) + 1)] * (len(near) + 1), len(own))


def squared_distances(rows: Sequence[Tensor], own: Tensor) -> list[float]:
    """|x_i - own|^2; infinite for a row that is not finite."""
    check_rows(rows, own)
    result = []
    for row, finite in zip(rows, finite_rows(rows), strict=True):
        d2 = 0.0
        for start, end in chunks(len(own), _COLUMNS) if finite else ():
            apart = row[start:end].double() - own[start:end]
            d2 += float(torch.dot(apart, apart))
        result.append(d2 if finite else math.inf)
    return result


def nearest(d2: Sequence[float], n_near: int) -> list[int]:
    """The indices of the `n_near` least distances, the nearest first; never one that is infinite."""
    return [i for i in sorted(range(len(d2)), key=lambda i: d2[i]) if d2[i] < math.inf][:n_near]


# -------------------------------------------------------------------------------------------------------------- Bristle


def bristle_candidates(
    d2: Sequence[float],
    recent_d2: Sequence[float],
    rng: Random,
    *,
    n_near: int = 20,
    n_random: int = 5,
    n_compared: int = 20,
) -> list[int]:
    """Bristle's first filter, distance: the `n_near` models nearest to mine, and `n_random` others.

    d2: squared distances of the models that arrived since. recent_d2: of earlier ones, the latest first; they fill the
    comparison up to `n_compared`, so that one model that arrives alone does not win for want of others.
    (Verbraeken et al., 2021, and their program.)
    """
    padded = [*d2, *recent_d2[: max(0, n_compared - len(d2))]]
    near = [i for i in nearest(padded, n_near) if i < len(d2)]
    others = [i for i in range(len(d2)) if i not in set(near) and d2[i] < math.inf]
    return near + sorted(rng.sample(others, min(n_random, len(others))))


def bristle_weights(own_recall: Sequence[float], peer_recalls: Sequence[Sequence[float]]) -> list[list[float]]:
    """Bristle's second filter, performance on my own test set: a weight for each peer and each class that I have.

    With d = 10 |mine - theirs| of a class, a better peer scores d^(3 + mine), a worse one -d^(4 + mine) (1 + p), at
    least -100, where p adds 2 max(0, mine - theirs) of the peers before it: many bad models in a row count for less
    each. Weight = max(0, 10 sigmoid(score / 100) - 4) times max(0, mean - deviation of the peer's recalls).
    My own model has the weight 1.
    """
    penalties = [0.0] * len(own_recall)
    weights = []
    for recalls in peer_recalls:
        certainty = _certainty(recalls)
        scores = [_score(*pair) for pair in zip(own_recall, recalls, penalties, strict=True)]
        weights.append([_squashed(max(-100.0, score)) * certainty for score in scores])
        penalties = [p + max(0.0, 2.0 * (m - t)) for p, m, t in zip(penalties, own_recall, recalls, strict=True)]
    return weights


def bristle_foreign_weights(own_recall: Sequence[float], peer_recalls: Sequence[Sequence[float]]) -> list[float]:
    """One weight for each peer, from the sum of its scores: for the classes that I have no test data of."""
    penalties = [0.0] * len(own_recall)
    weights = []
    for recalls in peer_recalls:
        score = sum(_score(*pair) for pair in zip(own_recall, recalls, penalties, strict=True))
        weights.append(_squashed(score) * _certainty(recalls))
        penalties = [p + max(0.0, 2.0 * (m - t)) for p, m, t in zip(penalties, own_recall, recalls, strict=True)]
    return weights


def bristle_average(own_PL: Tensor, peers_NPL: Sequence[Tensor], weights_NL: Tensor) -> Tensor:
    """The output layer, class by class: (own + sum_i w_il x_i) / (1 + sum_i w_il). The other layers are frozen."""
    mine_PL = own_PL.double()
    for peer_PL, weight_L in zip(peers_NPL, weights_NL, strict=True):
        if bool((weight_L > 0.0).any()) and bool(torch.isfinite(peer_PL).all()):
            mine_PL = mine_PL + peer_PL * weight_L
    finite_N = torch.tensor([bool(torch.isfinite(peer_PL).all()) for peer_PL in peers_NPL], dtype=torch.bool)
    return (mine_PL / (1.0 + weights_NL[finite_N].double().sum(dim=0))).float()


def _score(mine: float, theirs: float, penalty: float) -> float:
    apart = 10.0 * abs(mine - theirs)
    return math.pow(apart, 3.0 + mine) if theirs > mine else -math.pow(apart, 4.0 + mine) * (1.0 + penalty)


def _squashed(score: float) -> float:
    # exp overflows past 700; there the sigmoid is 0 to all digits.
    return max(0.0, 10.0 / (1.0 + math.exp(min(700.0, -score / 100.0))) - 4.0)


def _certainty(recalls: Sequence[float]) -> float:
    average = sum(recalls) / max(1, len(recalls))
    return max(0.0, average - math.sqrt(sum((r - average) ** 2 for r in recalls) / max(1, len(recalls))))


def _dot(left: Tensor, right: Tensor) -> float:
    dot = 0.0
    for start, end in chunks(len(left), _COLUMNS):
        dot += float(torch.dot(left[start:end].double(), right[start:end].double()))
    return dot


def _weighted(rows: Sequence[Tensor], weights: Sequence[float], n_columns: int) -> Tensor:
    out_P = torch.empty(n_columns)
    for start, end in chunks(n_columns, _COLUMNS):
        sum_C = torch.zeros(end - start, dtype=torch.float64)
        for row, weight in zip(rows, weights, strict=True):
            sum_C.add_(row[start:end], alpha=weight)
        out_P[start:end] = sum_C
    return out_P
