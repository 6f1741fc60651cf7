"""The whole walk on one machine: refuse, measure, decide, combine.

Ring: algorithms.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mycel.security.aggregators.combine import combine
from mycel.security.aggregators.decide import decide
from mycel.security.aggregators.decision import Decision
from mycel.security.aggregators.gram import finite_rows, measure
from mycel.security.aggregators.rules import Rule


@dataclass(frozen=True, slots=True)
class Aggregate:
    """One vector; how the rows that were admitted (in their order) were weighed; the rows that were not."""

    vector: Tensor
    decision: Decision
    rejected: tuple[int, ...]


def aggregate(
    rows: Sequence[Tensor],
    rule: Rule,
    n_liars: int,
    *,
    center: Tensor | None = None,
    seed: bytes = b"",
    weights: Sequence[int] | None = None,
    quorum_touch: bool = False,
) -> Aggregate:
    """`rule` over float32 [P] rows, of which `n_liars` may be false; a row that is not finite is one of them.

    With no row left, the vector is the centre. Raises ConfigError for a rule that would try too many subsets.

    >>> rows = [torch.tensor([1.0]), torch.tensor([2.0]), torch.tensor([torch.nan]), torch.tensor([1.5])]
    >>> aggregate(rows, parse_rule("median"), 1).vector
    tensor([1.5000])
    """
    gram_NN = None
    if rule.needs_gram:
        gram_NN, finite = measure(rows, center)
    else:
        finite = finite_rows(rows)
    kept = [i for i, good in enumerate(finite) if good]
    rejected = tuple(i for i, good in enumerate(finite) if not good)
    if rejected and gram_NN is not None:
        gram_NN = gram_NN[kept][:, kept].contiguous()
    f = max(0, n_liars - len(rejected))
    stated = None if weights is None else [weights[i] for i in kept]
    decision = decide(rule, gram_NN, f, seed=seed, weights=stated, n_rows=len(kept))
    if not kept:
        blank = torch.zeros(len(rows[0]) if len(rows) else 0)
        return Aggregate(blank if center is None else center.clone(), decision, rejected)
    vector = combine(rule, [rows[i] for i in kept], decision, center, f, quorum_touch=quorum_touch)
    return Aggregate(vector, decision, rejected)
