"""When a round stops waiting for contributions: which are complete, and how long a grace the late ones get.

Ring: pure.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterable, Sequence

_EMA_SHARE = 0.3
_GRACE_PER_SPREAD = 1.5
# Some rounds in which all came at once must not let the next one close before anybody who is as late as ever.
_FLOOR_PER_SPREAD, _FLOOR_ROUNDS = 0.5, 8
_FLOOR_PER_WAIT = 0.05


class Grace:
    """How long to wait for the rest once enough are there: 1.5 times the usual spread of arrivals, within bounds.

    At least half of the largest spread of the last rounds, and a twentieth of the wait for enough.
    """

    def __init__(self, longest_s: float) -> None:
        self._longest_s = longest_s
        self._spread_s: float | None = None
        self._last_spreads_s: deque[float] = deque(maxlen=_FLOOR_ROUNDS)
        self._wait_s = 0.0

    @property
    def seconds(self) -> float:
        """While nothing is known of the others' speed the longest grace is given."""
        if self._spread_s is None:
            return self._longest_s
        floor_s = max(_FLOOR_PER_SPREAD * max(self._last_spreads_s), _FLOOR_PER_WAIT * self._wait_s)
        return min(max(_GRACE_PER_SPREAD * self._spread_s, floor_s), self._longest_s)

    def learn(self, spread_s: float, wait_s: float) -> None:
        """In a round that is over enough were there after `wait_s`, and the last came so long after that."""
        self._last_spreads_s.append(spread_s)
        self._wait_s = wait_s
        before = spread_s if self._spread_s is None else self._spread_s
        self._spread_s = before + _EMA_SHARE * (spread_s - before)


class Holdings:
    """Who holds the bodies of which offers, counted as the reports come in.

    An offer is complete when a majority of each shard's aggregators hold it. The first `n_aggregators` of a shard's
    ring that are there aggregate it; 0 means that everybody who is there does.
    """

    def __init__(self, rings: Sequence[tuple[str, ...]], n_aggregators: int) -> None:
        self._rings = rings
        self._n_aggregators = n_aggregators
        self._held: dict[tuple[str, int], frozenset[bytes]] = {}
        self._counts: list[Counter[bytes]] = []
        self._shards_done: Counter[bytes] = Counter()
        self.aggregators: list[tuple[str, ...]] = []
        self.since: dict[bytes, float] = {}
        """When each offer became complete in my view; it stays so."""

    def present(self, peers: frozenset[str], now: float) -> None:
        """These are there, I among them."""
        take = self._n_aggregators or None
        self.aggregators = [tuple(peer for peer in ring if peer in peers)[:take] for ring in self._rings]
        self._counts = [Counter() for _ in self._rings]
        self._shards_done = Counter()
        for shard, aggregators in enumerate(self.aggregators):
            for peer in aggregators:
                self._count(shard, self._held.get((peer, shard), frozenset()), now)

    def of(self, peer: str, shard: int) -> frozenset[bytes]:
        """What `peer` has said to hold of `shard`."""
        return self._held.get((peer, shard), frozenset())

    def hold(self, peer: str, shard: int, offers: Iterable[bytes], now: float) -> None:
        """`peer` says that it holds `shard` of these; what it held before it holds."""
        before = self._held.get((peer, shard), frozenset())
        new = frozenset(offers) - before
        if new:
            self._held[peer, shard] = before | new
            if peer in self.aggregators[shard]:
                self._count(shard, new, now)

    def complete(self, offer: bytes, now: float) -> None:
        """An offer without bodies is complete by itself."""
        self.since.setdefault(offer, now)

    def _count(self, shard: int, offers: Iterable[bytes], now: float) -> None:
        majority = len(self.aggregators[shard]) // 2 + 1
        counts = self._counts[shard]
        for offer in offers:
            counts[offer] += 1
            if counts[offer] == majority:
                self._shards_done[offer] += 1
                if self._shards_done[offer] == len(self._rings):
                    self.since.setdefault(offer, now)
