"""From rows and a decision to one vector: the same bits on any processor and with any number of threads.

    N rows, M mixed rows, P parameters of a shard, C columns of a chunk

Rows are added one after the other, in float64, elementwise. The products are exact (see UNIT), so it does not matter
whether a processor fuses them with the sum.

Ring: algorithms.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mycel.protocols.errors import LocalProtocolError
from mycel.security.aggregators.coordinates import SCRATCH_ELEMENTS, coordinate_rule
from mycel.security.aggregators.decide import n_mixed_liars
from mycel.security.aggregators.decision import UNIT, Decision
from mycel.security.aggregators.gram import check_rows, chunks
from mycel.security.aggregators.rules import Rule
from mycel.security.aggregators.touch import Touch, few_touched

_LINEAR_COLUMNS = 1 << 15


def combine(
    rule: Rule,
    rows: Sequence[Tensor],
    decision: Decision,
    center: Tensor | None,
    n_liars: int,
    *,
    quorum_touch: bool = False,
) -> Tensor:
    """The aggregate of a shard, float32 [P]: `rows` in canonical order, as `decision` (of all shards) says.

    quorum_touch: for rows that are zero at most places (top-k and the like). Where fewer than 2f + 1 rows are not zero,
        no majority of those can be honest: each row counts there with 1/n at most, zeros included, and with no more
        than the usual largest entry of a row. Where more are, a coordinate rule is taken among them, times their share.

    Raises LocalProtocolError where the rows do not fit the decision.
    """
    n_rows, n_columns = check_rows(rows, center)
    wrong = decision.check()
    if wrong is None and decision.n_rows != n_rows:
        wrong = f"it is about {decision.n_rows} rows, and there are {n_rows}"
    if wrong is None and not decision.weights and n_rows and not rule.per_coordinate:
        wrong = f"it has no weights, and {rule} needs them"
    if wrong is not None:
        raise LocalProtocolError(f"decision does not fit: {wrong}")
    if n_rows == 0:
        return torch.zeros(0) if center is None else center.clone()
    touch = Touch.of(rows, n_liars) if quorum_touch else None
    out_P = torch.empty(n_columns)
    width = _LINEAR_COLUMNS if decision.weights else max(256, SCRATCH_ELEMENTS // n_rows)
    for start, end in chunks(n_columns, width):
        part = [row[start:end] for row in rows]
        center_C = None if center is None else center[start:end]
        if decision.weights:
            sum_C = _weighted(part, decision.weights, center_C).mul_(1.0 / UNIT)
        else:
            sum_C = _per_coordinate(rule, part, decision, center_C, n_liars, touch)
        if touch is not None:
            few_touched(part, decision.weights, touch, sum_C)
        # Plus zero: of -0.0 and 0.0, which is the lesser depends on the processor.
        out_P[start:end] = sum_C.add_(0.0)
    return out_P


def _weighted(part: Sequence[Tensor], weights: Sequence[int], center_C: Tensor | None) -> Tensor:
    """sum_i weights_i x_i + (UNIT - sum weights) c, float64."""
    sum_C = torch.zeros(len(part[0]), dtype=torch.float64)
    rest = UNIT - sum(weights)
    if center_C is not None and rest:
        sum_C.add_(center_C, alpha=rest)
    for row_C, weight in zip(part, weights, strict=True):
        if weight:
            sum_C.add_(row_C, alpha=weight)
    return sum_C


def _per_coordinate(
    rule: Rule,
    part: Sequence[Tensor],
    decision: Decision,
    center_C: Tensor | None,
    n_liars: int,
    touch: Touch | None,
) -> Tensor:
    if not decision.mixing:
        f = min(n_liars, (len(part) - 1) // 2)
        return coordinate_rule(rule.base, torch.stack(list(part)), f) if touch is None else touch.rule(rule.base, part)
    mixed_MC = torch.zeros(len(decision.mixing), len(part[0]), dtype=torch.float64)
    # Column by column of the matrix, so that each mixed row is the sum in the order of the rows.
    weight_MN = torch.tensor(decision.mixing, dtype=torch.float64)
    if center_C is not None:
        rest_M1 = torch.tensor([[UNIT - sum(weights)] for weights in decision.mixing], dtype=torch.float64)
        mixed_MC.addcmul_(rest_M1, center_C.double())
    for i, row_C in enumerate(part):
        mixed_MC.addcmul_(weight_MN[:, i, None], row_C.double())
    f = n_mixed_liars(rule, len(part), n_liars)
    return coordinate_rule(rule.base, mixed_MC.mul_(1.0 / UNIT).float(), f)
