"""How much of our time a peer may take: token buckets that say how long to wait, for a bounded set of peers.

Ring: pure (`now` is monotonic time in seconds).
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class BudgetLimits:
    """rate_per_s requests for each peer in the long run, `burst` at once; `peers` remembered at most."""

    rate_per_s: float = 100.0
    burst: float = 200.0
    peers: int = 1024


class Budgets:
    """Token buckets by peer, least recently used first to be forgotten."""

    def __init__(self, limits: BudgetLimits) -> None:
        self._limits = limits
        self._buckets: OrderedDict[str, tuple[float, float]] = OrderedDict()  # peer -> (tokens, at)

    def __len__(self) -> int:
        return len(self._buckets)

    def spend(self, peer: str, now: float) -> float:
        """Take one request from the peer's budget; the seconds (0 or more) after which it may be answered.

        >>> budgets = Budgets(BudgetLimits(rate_per_s=10.0, burst=1.0))
        >>> budgets.spend("a", 0.0), budgets.spend("a", 0.0), budgets.spend("b", 0.0)
        (0.0, 0.1, 0.0)
        """
        tokens, at = self._buckets.pop(peer, (self._limits.burst, now))
        tokens = min(self._limits.burst, tokens + max(0.0, now - at) * self._limits.rate_per_s) - 1.0
        self._buckets[peer] = (tokens, now)
        while len(self._buckets) > self._limits.peers:
            self._buckets.popitem(last=False)
        return max(0.0, -tokens) / self._limits.rate_per_s
