"""A codec for each layer, such that all together meet a total error at the fewest bytes (L-GreCo).

    choose c_l for each layer l:  min sum_l bytes(l, c_l)  such that  sum_l error(l, c_l) <= sum_l error(l, default)

A knapsack with one choice a layer, solved by dynamic programming over the error in steps of 1/4096 of what is allowed.
Errors are rounded up to steps, so the bound holds exactly; only the last few bytes may be missed. Where that leaves no
choice (many layers, each rounded up) the default itself is the answer. Source: Alimohammadi et al., arXiv 2210.17357,
algorithm 1.

Ring: algorithms.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from mycel.swarm.codecs.layout import Layout
from mycel.swarm.codecs.spec import make_codec

__all__ = ["Cost", "Table", "choose", "measure"]

_STEPS = 4096


@dataclass(frozen=True, slots=True)
class Cost:
    """What one codec makes of one layer: bytes, and the sum of squared errors."""

    size_bytes: int
    squared_error: float


Table = Mapping[str, Cost]  # candidate spec -> cost


def measure(x_P: Tensor, layout: Layout, candidates: Sequence[str]) -> list[Table]:
    """A table for each tensor of `layout`: what each candidate makes of `x_P`, an update or the sum of some."""
    tables: list[Table] = []
    codecs = [make_codec(spec) for spec in candidates]
    for where, shape in layout.pieces():
        tensor, layer_P = Layout((shape,)), x_P[where]
        table = {}
        for codec in codecs:
            body = codec.encoder(tensor).encode(layer_P, b"")
            lost_P = (codec.decode(body, tensor) - layer_P).double()
            table[codec.name] = Cost(len(body), float(lost_P @ lost_P))
        tables.append(table)
    return tables


def choose(tables: Sequence[Table], default: str) -> tuple[str, ...]:
    """One of each table's specs. Raises ValueError for a table without the default.

    choose([{"int8": Cost(8, 1.0), "int4": Cost(4, 9.0)}, {"int8": Cost(80, 0.1), "int4": Cost(40, 0.9)}], "int8")
    == ("int8", "int8")      # any int4 would err by more than 1.1
    """
    if any(default not in table for table in tables):
        raise ValueError(f"every layer needs the cost of {default}")
    uniform = (default,) * len(tables)
    allowed = sum(table[default].squared_error for table in tables)
    # least_S[s]: the fewest bytes of the layers so far at an error of at most s steps.
    least_S = np.zeros(_STEPS + 1)
    picks_LS = []
    for table in tables:
        best_S, pick_S = np.full(_STEPS + 1, np.inf), np.zeros(_STEPS + 1, np.int32)
        for number, cost in enumerate(table.values()):
            steps = _steps(cost.squared_error, allowed)
            if steps > _STEPS:
                continue
            with_S = np.full(_STEPS + 1, np.inf)
            with_S[steps:] = least_S[: _STEPS + 1 - steps] + cost.size_bytes
            better_S = with_S < best_S
            best_S[better_S], pick_S[better_S] = with_S[better_S], number
        least_S = best_S
        picks_LS.append(pick_S)
    if least_S[_STEPS] >= sum(table[default].size_bytes for table in tables):
        return uniform
    return _walk_back(tables, picks_LS, allowed)


def _walk_back(tables: Sequence[Table], picks_LS: Sequence[np.ndarray], allowed: float) -> tuple[str, ...]:
    chosen, left = [], _STEPS
    for table, pick_S in zip(reversed(tables), reversed(picks_LS), strict=True):
        spec = list(table)[pick_S[left]]
        chosen.append(spec)
        left -= _steps(table[spec].squared_error, allowed)
    return tuple(reversed(chosen))


def _steps(squared_error: float, allowed: float) -> int:
    if squared_error <= 0.0:
        return 0
    share = squared_error / allowed if allowed > 0.0 else np.inf
    return int(np.ceil(share * _STEPS)) if share <= 1.0 else _STEPS + 1
