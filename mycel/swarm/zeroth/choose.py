"""How a late joiner gets to the state of a run: by snapshot, by the log, or by sums, whatever takes it the least time.

    seconds = bytes / bandwidth + directions * parameters * seconds per direction and parameter

A log is a few bytes for each update and much to compute, a snapshot the other way round; sums are between. Each may be
followed by the log's tail. Both speeds are measured on the machine that decides.

Ring: pure.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["Choice", "Way", "choose"]


@dataclass(frozen=True, slots=True)
class Way:
    """`name` as the reason shows it; what it downloads, its tail included, and how many directions it makes anew."""

    name: str
    n_bytes: int
    n_directions: int

    def seconds(self, n_elements: int, bytes_per_s: float, s_per_element: float) -> float:
        return self.n_bytes / bytes_per_s + self.n_directions * n_elements * s_per_element


@dataclass(frozen=True, slots=True)
class Choice:
    way: Way
    seconds: float
    reason: str


def choose(ways: Sequence[Way], n_elements: int, bytes_per_s: float, s_per_element: float) -> Choice:
    """The fastest way; of equals the one with fewer bytes, then the first by name.

    Raises ValueError without a way, or for a speed that is not positive.

    >>> choose([Way("snapshot", 4_000_000, 0), Way("log", 20_000, 9_000)], 1_000_000, 1e6, 1e-9).reason
    'snapshot: 4.0 s for 4.0 MB and 0 directions, where the log takes 9.0 s'
    """
    if not ways or not bytes_per_s > 0 or not s_per_element >= 0:
        raise ValueError("a choice needs a way, a bandwidth and a speed")
    timed = sorted((way.seconds(n_elements, bytes_per_s, s_per_element), way.n_bytes, way.name, way) for way in ways)
    seconds, _, _, best = timed[0]
    cost = f"{seconds:.1f} s for {best.n_bytes / 1e6:.1f} MB and {best.n_directions} directions"
    others = " and ".join(f"the {way.name} takes {other:.1f} s" for other, _, _, way in timed[1:])
    return Choice(best, seconds, f"{best.name}: {cost}" + (f", where {others}" if others else ""))
