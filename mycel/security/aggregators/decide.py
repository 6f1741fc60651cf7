"""From the Gram matrix of all rows to who counts how much: the part that peers sign and recheck.

    N rows, M rows after the pre-steps

A pre-step is a matrix: row j of the mixed rows is y_j = c + sum_i A_ji (x_i - c), and their Gram matrix is A G A'. So
nothing here sees a row, and the whole decision is one weight a row (or, for a coordinate rule, A itself).

Ring: algorithms.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from mycel.protocols.errors import ConfigError, LocalProtocolError
from mycel.security.aggregators import subsets, weighing
from mycel.security.aggregators.decision import MAX_ROWS, MAX_WEIGHT, UNIT, Decision
from mycel.security.aggregators.flag import flag
from mycel.security.aggregators.rules import PreStep, Rule
from mycel.security.aggregators.small import Array, distances, product, times, total

_DOMAIN = b"mycel/aggregate/buckets/1"
_WEIGHING: dict[str, Callable[[Array, int], Array]] = {
    "mean": weighing.mean,
    "geometric-median": weighing.geometric_median,
    "krum": weighing.krum,
    "multi-krum": weighing.multi_krum,
    "centered-clip": weighing.centered_clip,
    "caf": weighing.caf,
    "mda": subsets.mda,
    "smea": subsets.smea,
    "flag": flag,
}


@dataclass(frozen=True, slots=True)
class _Mixed:
    """The rows after some pre-steps: the matrix that makes them, their Gram matrix, and the liars among them."""

    matrix: Array  # [M, N]
    gram: Array  # [M, M]
    f: int


def decide(
    rule: Rule,
    gram_NN: Tensor | None,
    n_liars: int,
    *,
    seed: bytes,
    weights: Sequence[int] | None = None,
    n_rows: int | None = None,
) -> Decision:
    """How `rule` weighs the rows whose Gram matrix is `gram_NN`, the sum of all shards' Grams; the same on any machine.

    n_liars: how many of these rows may lie, at most; rows that were refused before are taken off it by the caller. It
        counts as (n - 1) // 2 where it is more: no rule withstands a majority.
    seed: public chance for buckets, which no peer knew when it made its row.
    weights: what the senders say (samples, say), capped; the plain mean alone listens to it.
    n_rows: instead of a Gram matrix, for a rule that needs none (`rule.needs_gram`).

    Raises ConfigError for a rule that would have to try too many subsets.
    """
    gram = _checked(rule, gram_NN, n_rows)
    n = len(gram)
    f = max(0, min(n_liars, (n - 1) // 2))
    if n == 0:
        return Decision(0, reason=f"{rule} of no rows: nothing moves")
    mixed = _Mixed(np.eye(n), gram, f)
    for step in rule.pre:
        mixed = _pre_step(step, mixed, seed)
    if rule.per_coordinate:
        mixing = tuple(_integers(row_N) for row_N in mixed.matrix) if rule.pre else ()
        return _decision(rule, n, f, mixing=mixing)
    if rule.base == "mean" and not rule.pre and weights is not None:
        share_N = _shares(capped(weights), n)
    else:
        _check_subsets(rule.base, len(mixed.gram), mixed.f)
        share_N = times(mixed.matrix.T, _WEIGHING[rule.base](mixed.gram, mixed.f))
    # Krum takes one row: that the others have no weight says nothing of them, but their order does.
    last = weighing.krum_order(mixed.gram, mixed.f)[n - f :] if rule.base == "krum" and len(mixed.gram) == n else None
    return _decision(rule, n, f, weights=_integers(share_N), last=last)


def capped(weights: Sequence[int]) -> tuple[int, ...]:
    """Stated weights, none over twice their median: who claims a billion samples counts twice at most.

    >>> capped([10, 12, 1000000000])
    (10, 12, 24)
    """
    stated = [max(0, int(weight)) for weight in weights]
    limit = 2 * sorted(stated)[(len(stated) - 1) // 2] if stated else 0
    return tuple(min(weight, limit) for weight in stated)


def n_mixed_liars(rule: Rule, n_rows: int, n_liars: int) -> int:
    """How many of the rows that the pre-steps of `rule` make may be a liar's."""
    f = max(0, min(n_liars, (n_rows - 1) // 2))
    for step in rule.pre:
        if step.name == "bucketing":
            n_rows = -(-n_rows // step.size)
            f = min(f, (n_rows - 1) // 2)
    return f


def _checked(rule: Rule, gram_NN: Tensor | None, n_rows: int | None) -> Array:
    if gram_NN is None:
        if n_rows is None or rule.needs_gram:
            raise LocalProtocolError(f"{rule} needs a Gram matrix")
        gram = np.zeros((n_rows, n_rows))
    else:
        gram = gram_NN.numpy()
    if gram.shape != (len(gram), len(gram)) or len(gram) > MAX_ROWS or gram.dtype != np.float64:
        raise LocalProtocolError(f"a Gram matrix is float64 of at most {MAX_ROWS} rows, not {gram.dtype} {gram.shape}")
    if not np.isfinite(gram).all():
        raise LocalProtocolError("rows that are not finite go through finite_rows before the Gram matrix")
    return gram


def _check_subsets(base: str, n: int, f: int) -> None:
    limit = subsets.MAX_SUBSETS.get(base)
    if limit is not None and subsets.n_subsets(n, f) > limit:
        raise ConfigError(
            f"{base} would try {subsets.n_subsets(n, f):,} subsets of {n} rows with {f} liars, and stops at {limit:,}: "
            "use caf"
        )


# ----------------------------------------------------------------------------------------------------------- pre-steps


def _pre_step(step: PreStep, mixed: _Mixed, seed: bytes) -> _Mixed:
    m = len(mixed.gram)
    f = mixed.f
    if step.name == "nnm":
        matrix = _nearest(mixed.gram, m - f)
    elif step.name == "bucketing":
        matrix = _buckets(m, step.size, seed)
        f = min(f, (len(matrix) - 1) // 2)
    else:
        length_M = np.sqrt(np.maximum(np.diagonal(mixed.gram), 0.0))
        ordered_M = np.sort(length_M)
        # Static clipping: the median length. Adaptive (Allouah et al., 2025): the k longest, to the length of the next.
        at = (m - 1) // 2 if step.name == "clip" else m - 1 - 2 * f * (m - f) // m
        matrix = np.diag(weighing.clip_scales(length_M, float(ordered_M[at])))
    mixed_gram = product(product(matrix, mixed.gram), np.ascontiguousarray(matrix.T))
    return _Mixed(product(matrix, mixed.matrix), mixed_gram, f)


def _nearest(gram_MM: Array, k: int) -> Array:
    """Nearest-neighbour mixing (Allouah et al., 2023): each row becomes the mean of its k nearest, itself included."""
    order = np.argsort(distances(gram_MM), axis=1, kind="stable")[:, :k]
    matrix = np.zeros_like(gram_MM)
    np.put_along_axis(matrix, order, 1.0 / k, axis=1)
    return matrix


def _buckets(m: int, size: int, seed: bytes) -> Array:
    """Bucketing (Karimireddy et al., 2022): means of `size` rows each, drawn by `seed`."""
    draw = [
        hashlib.sha256(_DOMAIN + len(seed).to_bytes(4, "little") + seed + i.to_bytes(4, "little")) for i in range(m)
    ]
    order = sorted(range(m), key=lambda i: draw[i].digest())
    matrix = np.zeros((-(-m // size), m))
    for bucket, start in enumerate(range(0, m, size)):
        members = order[start : start + size]
        matrix[bucket, members] = 1.0 / len(members)
    return matrix


# ------------------------------------------------------------------------------------------------------------ decisions


def _shares(weights: Sequence[int], n: int) -> Array:
    if len(weights) != n:
        raise LocalProtocolError(f"{len(weights)} weights for {n} rows")
    whole = sum(weights)
    return np.array([weight / whole if whole else 1.0 / n for weight in weights])


def _integers(share_N: Array) -> tuple[int, ...]:
    """Shares in units of 1/UNIT. A share under half a unit is none: a row far away must not get one by rounding."""
    rounded = [int(share) for share in np.clip(np.rint(share_N * UNIT), -MAX_WEIGHT, MAX_WEIGHT)]
    if abs(float(total(share_N)) - 1.0) < 2.0**-30:
        # What rounding left over goes to the row that is trusted most, so that the sum is 1 as it was.
        rounded[int(np.argmax(share_N))] += UNIT - sum(rounded)
    return tuple(rounded)


def _decision(
    rule: Rule,
    n: int,
    f: int,
    *,
    weights: tuple[int, ...] = (),
    mixing: tuple[tuple[int, ...], ...] = (),
    last: Sequence[int] | None = None,
) -> Decision:
    outliers = tuple(sorted(last)) if last is not None else _outliers(rule, weights, mixing)
    of = f"{rule} of {n} rows, at most {f} of them false"
    if outliers:
        rest = f" and {len(outliers) - 8} more" if len(outliers) > 8 else ""
        why = f"next to nothing counts of {', '.join(map(str, outliers[:8]))}{rest}"
    elif rule.per_coordinate:
        why = "decided at each coordinate"
    else:
        why = "all count"
    return Decision(n, weights, mixing, outliers, f"{of}: {why}")


def _outliers(rule: Rule, weights: tuple[int, ...], mixing: tuple[tuple[int, ...], ...]) -> tuple[int, ...]:
    if any(step.name == "bucketing" for step in rule.pre) or (rule.base == "mean" and not rule.pre):
        return ()  # a bucket hides who in it was off; the mean suspects nobody
    # In a mixing matrix liars still count in their own rows: half of the usual is little there.
    shares, part = (weights, 10) if weights else ([sum(column) for column in zip(*mixing, strict=True)], 2)
    usual = sorted(shares)[len(shares) // 2] if mixing else sum(shares) / max(1, len(shares))
    return tuple(i for i, share in enumerate(shares) if share * part < usual)
