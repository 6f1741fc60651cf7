"""Rows, rules and attacks that the tests of the aggregators share.

N rows, the first f of them liars'; P parameters
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from mycel.security.aggregators import Rule, aggregate, parse_rule

BASES = (
    "median",
    "trimmed-mean",
    "meamed",
    "geometric-median",
    "krum",
    "multi-krum",
    "centered-clip",
    "caf",
    "mda",
    "smea",
    "flag",
)
MIXED = ("nnm+trimmed-mean", "nnm+geometric-median", "nnm+meamed", "bucketing:2+caf", "arc+nnm+median", "clip+mean")
# All but the mean, which withstands nothing.
ROBUST = (*BASES, *MIXED)
ALL = ("mean", *ROBUST)


def honest_rows(n: int, p: int, seed: int = 0, *, mean: float = 1.0, spread: float = 0.1) -> Tensor:
    """n rows about one vector of norm about `mean` an entry."""
    generator = torch.Generator().manual_seed(seed)
    middle_P = mean * torch.randn(p, generator=generator)
    return middle_P + spread * torch.randn(n, p, generator=generator)


def run(rule: Rule | str, rows: Tensor | list[Tensor], f: int, center: Tensor | None = None) -> Tensor:
    """The aggregate's vector."""
    rule = parse_rule(rule) if isinstance(rule, str) else rule
    return aggregate(list(rows), rule, f, center=center, seed=b"test").vector


def spread(honest_NP: Tensor) -> float:
    """The root of the mean squared distance of the honest rows to their mean."""
    return float((honest_NP - honest_NP.mean(dim=0)).double().square().sum(dim=1).mean().sqrt())


def error(vector_P: Tensor, honest_NP: Tensor) -> float:
    """The distance to the honest mean, in units of the honest rows' spread."""
    return float((vector_P.double() - honest_NP.double().mean(dim=0)).norm()) / spread(honest_NP)


def worst_attack(rule: str, honest_NP: Tensor, f: int, lie: Callable[[float], Tensor], factors: list[float]) -> float:
    """The greatest error that f copies of `lie(factor)` cause: a line search against the rule itself."""
    return max(error(run(rule, torch.cat([lie(factor).expand(f, -1), honest_NP]), f), honest_NP) for factor in factors)
