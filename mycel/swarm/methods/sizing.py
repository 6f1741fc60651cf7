"""How much work a peer does before a round, how long a round waits for it, and what it counts for when it is late.

Peers are of unlike speed. Who is told to make as many steps as fit into one and the same time arrives with the others:
no one waits, and nobody's work is thrown away.

Ring: pure.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from statistics import median_low

from mycel.protocols.errors import ConfigError

__all__ = [
    "WEIGHT_UNIT",
    "Grace",
    "Work",
    "contribution_weight",
    "quorum",
    "round_time_s",
    "size_work",
    "staleness_weight",
]

# Weights are integers in these units, so that everybody has the same ones.
WEIGHT_UNIT = 1 << 20
_SPREADS = 1.5  # a grace window is so many times the usual spread of arrivals
_BLEND = 0.2  # what the newest spread counts for


@dataclass(frozen=True, slots=True)
class Work:
    """What a peer is to do before a round: `steps`, which should take it `seconds`; `late_s` after the others."""

    steps: int
    seconds: float
    late_s: float
    reason: str


def round_time_s(step_s: Mapping[str, float], normal_steps: int) -> float:
    """How long a round's work takes: `normal_steps` of the peer in the middle. `step_s`: seconds a step, by peer."""
    if not step_s or any(not 0.0 < seconds < math.inf for seconds in step_s.values()):
        raise ValueError("seconds a step are needed of one peer at least, all positive")
    return normal_steps * median_low(step_s.values())


def size_work(step_s: float, time_s: float, least: int, most: int) -> Work:
    """The work of a peer that needs `step_s` a step in a round of `time_s`: as many steps as fit, within [least, most].

    Source: FedCompass, arXiv 2309.14675, section 3 (a range of local steps in place of tiers of peers).

    >>> size_work(0.5, 20.0, 10, 80).steps, size_work(4.0, 20.0, 10, 80).late_s
    (40, 20.0)
    """
    if not 1 <= least <= most:
        raise ConfigError(f"inner steps of a peer: {least} to {most} is no range")
    if not (0.0 < step_s < math.inf and 0.0 < time_s < math.inf):
        raise ValueError(f"{step_s} s a step in {time_s} s")
    # A hair more, so that 3 * 0.1 s fit into 0.3 s.
    fit = min(time_s / step_s * (1.0 + 1e-9), float(most))
    steps = max(least, math.floor(fit))
    seconds = steps * step_s
    if steps > fit:
        return Work(
            steps, seconds, seconds - time_s, f"{steps} steps, the least of a round, though they take {seconds:.1f} s"
        )
    limit = "the most of a round" if steps == most else f"what fits into {time_s:.1f} s"
    return Work(steps, seconds, 0.0, f"{steps} steps, {limit}")


def quorum(n_peers: int, share: float = 2 / 3) -> int:
    """How many contributions a round waits for before its grace begins: `share` of them rounded up, one at least.

    >>> [quorum(n) for n in (1, 2, 3, 4, 9)]
    [1, 2, 2, 3, 6]
    """
    return max(1, math.ceil(round(n_peers * share, 9)))


@dataclass(frozen=True, slots=True)
class Grace:
    """How long a round waits beyond its quorum: 1.5 times the usual spread of arrivals, within [least_s, most_s].

    The spread of a round is from its quorum to the last contribution that came at all, late ones included; so a window
    that was too short grows. Source: Decoupled DiLoCo, arXiv 2604.21428 (quorum and adaptive grace window).
    """

    least_s: float = 0.0
    most_s: float = 30.0
    spread_s: float | None = None

    @property
    def window_s(self) -> float:
        """Before anything was seen it is the longest."""
        usual = self.most_s if self.spread_s is None else _SPREADS * self.spread_s
        return min(max(usual, self.least_s), self.most_s)

    def after(self, spread_s: float) -> Grace:
        """Having seen one more round. One single straggler moves the window by no more than `most_s` would."""
        if not spread_s >= 0.0:
            raise ValueError(f"a spread of {spread_s} s")
        seen = min(spread_s, self.most_s)
        return replace(
            self, spread_s=seen if self.spread_s is None else self.spread_s + _BLEND * (seen - self.spread_s)
        )


def staleness_weight(rounds_late: int) -> int:
    """1 / (1 + rounds_late), in WEIGHT_UNIT.

    >>> staleness_weight(0) == WEIGHT_UNIT, staleness_weight(1) == WEIGHT_UNIT // 2
    (True, True)
    """
    if rounds_late < 0:
        raise ValueError(f"{rounds_late} rounds late")
    return WEIGHT_UNIT // (1 + rounds_late)


def contribution_weight(steps: int, normal_steps: int, rounds_late: int = 0) -> int:
    """What a contribution of so many steps counts for, in WEIGHT_UNIT; at most twice that of a peer of normal speed.

    The sender states its steps and nobody can check them: the cap is what keeps one number from owning the mean. Robust
    rules count heads, and take no weights.

    >>> contribution_weight(5, 20) / WEIGHT_UNIT, contribution_weight(10**9, 20, 1) / WEIGHT_UNIT
    (0.25, 1.0)
    """
    if steps < 0 or normal_steps < 1:
        raise ValueError(f"{steps} steps where {normal_steps} are normal")
    return min(steps, 2 * normal_steps) * staleness_weight(rounds_late) // normal_steps
