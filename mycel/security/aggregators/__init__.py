"""Robust aggregation: many contributions, some of them lies, to one vector, with the same bits on every machine.

    rows -> finite_rows (the gate) -> gram (n x n, exact) -> decide (who counts how much) -> combine (one vector)

`gram` and `combine` work on one shard each; `decide` needs the sum of the shards' Grams alone, so all shards share one
decision that is small enough to sign and that anybody can recheck. `aggregate` is the whole walk on one machine.

Ring: algorithms.
"""

from __future__ import annotations

from mycel.security.aggregators.aggregate import Aggregate, aggregate
from mycel.security.aggregators.combine import combine
from mycel.security.aggregators.decide import capped, decide
from mycel.security.aggregators.decision import MAX_ROWS, UNIT, Decision
from mycel.security.aggregators.gram import finite_rows, gram
from mycel.security.aggregators.rules import Rule, parse_rule
from mycel.security.aggregators.standing import Standing, decide_standing

__all__ = [
    "MAX_ROWS",
    "UNIT",
    "Aggregate",
    "Decision",
    "Rule",
    "Standing",
    "aggregate",
    "capped",
    "combine",
    "decide",
    "decide_standing",
    "finite_rows",
    "gram",
    "parse_rule",
]
