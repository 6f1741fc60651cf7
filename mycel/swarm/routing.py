"""Which chain of peers a request should take: the cheapest by expected seconds for a token.

A token costs, for each hop, its queue, its overhead and its blocks; for each link half a round trip; and the ring is
closed: the last hop sends the token to the first. A hop may use any part of what its peer serves, and a peer is used
for one hop at most, because a session has one state on each peer.

Many clients decide from the same view, which is seconds old, and know nothing of each other: if all took the cheapest
chain, it would be the worst. So a client draws (`choose_chain` with rng). Where peers could stand in for each other,
one is drawn with a weight of (best / cost) * max(1/2, best / cost): equal peers equally often, one that is twice as
slow a quarter as often. A weight between half the rate and the rate itself also means that of many clients no peer gets
more than twice the share that its rate is of all rates, whatever the others are.

Ring: pure.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from itertools import pairwise
from math import inf, log, sqrt
from typing import TYPE_CHECKING

from mycel.protocols.errors import RouteUnavailable
from mycel.protocols.messages import PeerAddress
from mycel.swarm.path import Leg, Network, cheapest_path
from mycel.swarm.view import PeerView, View, ranges, short_id, show_ranges

if TYPE_CHECKING:
    from random import Random

DEFAULT_RTT_S = 0.05
MAX_RTT_S = 5.0
# A chain that is drawn costs at most so many times what the cheapest does; who is dearer would be no help to anybody.
MAX_DEARER = 4.0
# In a larger swarm only the best holders of each block are looked at, which keeps the choice under some 50 ms.
MAX_CANDIDATES = 64
# More than any real chain costs: a peer without KV memory left is taken only where there is no other.
_FULL_PENALTY_S = 1e6
# One that is far dearer than others in its place is not drawn while there are others.
_DEAR_PENALTY_S = 1e3


@dataclass(frozen=True, slots=True)
class Hop:
    """Blocks [start, end) at a peer."""

    peer: PeerAddress
    start: int
    end: int


@dataclass(frozen=True, slots=True)
class Chain:
    """Hops in order, each starting where the one before ends; `reason` is a sentence for people."""

    hops: tuple[Hop, ...]
    expected_s_per_token: float
    reason: str


def choose_chain(  # noqa: PLR0913 (a stretch of a chain has two ends and two neighbours)
    view: View,
    *,
    rtts: Mapping[str, float],
    max_tokens: int,
    start: int = 0,
    end: int | None = None,
    failed: frozenset[str] = frozenset(),
    in_chain: frozenset[str] = frozenset(),
    previous: str | None = None,
    following: str | None = None,
    load: Mapping[str, int] | None = None,
    rng: Random | None = None,
) -> Chain:
    """The cheapest chain over blocks [start, end) (to the last block if None) for a session of `max_tokens` tokens.

    `rtts` are the client's own round trips in seconds, `load` the sessions that it has at peers already, which each
    wait for the others. With `previous` and `following`, the peers beside a stretch that has to be replaced, the links
    to them count and they are not used again; without, the stretch is a ring by itself. Not used either are peers that
    `failed`, are `in_chain` elsewhere, leave or only join; those with too little free KV memory only where nobody else
    serves a block.

    The same arguments give the same chain: the cheapest of all, for up to MAX_CANDIDATES usable peers. With `rng` it is
    drawn among those at most MAX_DEARER times as dear.

    Raises RouteUnavailable with the block ranges that no peer is left for.
    """
    end = view.n_blocks if end is None else end
    if not 0 <= start < end <= view.n_blocks:
        raise ValueError(f"[{start}, {end}) is not a range of {view.n_blocks} blocks")
    beside = frozenset(peer for peer in (previous, following) if peer is not None)
    barred = failed | in_chain | beside
    peers = (p for p in view.serving() if p.peer not in barred and p.start < end and p.end > start)
    usable = {p.peer: _loaded(p, start, end, (load or {}).get(p.peer, 0)) for p in peers}
    _demand_coverage(view, usable, start, end, failed, in_chain | beside)
    search = _Search(view, usable, start, end, Links.between(view, rtts), max_tokens, previous, following)
    legs, seconds = search.cheapest({})
    first_hops, how = sum(peer.start <= start for peer in usable.values()), "cheapest"
    if rng is not None and len(usable) > len(legs):
        drawn, drawn_s = search.cheapest(search.weighted(rng))
        if drawn_s <= MAX_DEARER * seconds:
            how = f"drawn at {drawn_s / seconds:.2f} times the cheapest" if seconds else "drawn"
            legs, seconds = drawn, drawn_s
    hops = tuple(Hop(usable[leg.peer].address, leg.start, leg.end) for leg in legs)
    return Chain(hops, seconds, _reason(hops, seconds, first_hops, search.full, how))


def _loaded(peer: PeerView, start: int, end: int, n_sessions: int) -> PeerView:
    """The peer as a further session finds it that has to wait for `n_sessions` of ours, with their part of its span."""
    if not n_sessions:
        return peer
    n_blocks = min(end, peer.end) - max(start, peer.start)
    step_s = peer.overhead_s + n_blocks * peer.block_time_s
    return replace(peer, queue_s=peer.queue_s + n_sessions * step_s)


@dataclass(frozen=True, slots=True)
class Links:
    """Round trips in seconds: `announced` by (from, to), and the client's own by peer."""

    announced: Mapping[tuple[str, str], float]
    client: Mapping[str, float]

    @classmethod
    def between(cls, view: View, client: Mapping[str, float]) -> Links:
        return cls({(p.peer, other): rtt_s for p in view.peers.values() for other, rtt_s in p.rtts}, client)

    def half_rtt_s(self, sender: str, receiver: str) -> float:
        """Seconds from one peer to another, at most half of MAX_RTT_S.

        Both ends may have announced their round trip: the longer one counts, so that no peer can make a link look
        shorter than the other end found it. If neither did, the way through the client is the bound, else a default.
        """
        found = [self.announced[key] for key in ((sender, receiver), (receiver, sender)) if key in self.announced]
        if found:
            rtt_s = max(found)
        elif sender in self.client and receiver in self.client:
            rtt_s = self.client[sender] + self.client[receiver]
        else:
            rtt_s = DEFAULT_RTT_S
        return min(rtt_s, MAX_RTT_S) / 2


def _demand_coverage(
    view: View,
    usable: Mapping[str, PeerView],
    start: int,
    end: int,
    failed: frozenset[str],
    in_chain: frozenset[str],
) -> None:
    """Raises RouteUnavailable, saying who was set aside, unless every block of [start, end) has a usable peer."""
    covered = {block for peer in usable.values() for block in range(peer.start, peer.end)}
    missing = ranges(block for block in range(start, end) if block not in covered)
    if not missing:
        return
    counts: dict[str, int] = {}
    for p in view.peers.values():
        if any(p.start < last and first < p.end for first, last in missing):
            why = (
                "in this chain" if p.peer in in_chain else "failed" if p.peer in failed else p.state
            )  # what else sets one aside is that it does not serve (yet, or any more)
            counts[why] = counts.get(why, 0) + 1
    aside = ", ".join(f"{count} {why}" for why, count in sorted(counts.items()))
    note = f" (of those that hold them: {aside})" if aside else ""
    raise RouteUnavailable(missing, f"no live peer serves blocks {show_ranges(missing)}{note}")


@dataclass(frozen=True, slots=True)
class _Search:
    """One request: who may serve blocks [start, end), over which links, between whom."""

    view: View
    usable: Mapping[str, PeerView]
    start: int
    end: int
    links: Links
    max_tokens: int
    previous: str | None
    following: str | None

    @property
    def full(self) -> frozenset[str]:
        """Who has too little free KV memory."""
        return frozenset(name for name, peer in self.usable.items() if peer.kv_free_tokens < self.max_tokens)

    def cheapest(self, factors: Mapping[str, float]) -> tuple[tuple[Leg, ...], float]:
        """The cheapest legs where a peer's part costs `factors` times as much, and what they cost without."""
        weighed = {name: factors.get(name, 1.0) for name in self.usable}
        penalties = dict.fromkeys(self.full, _FULL_PENALTY_S)
        for name, factor in weighed.items():
            if factor == inf:
                weighed[name], penalties[name] = 1.0, penalties.get(name, 0.0) + _DEAR_PENALTY_S
        candidates = _shortlist(self.usable, self.start, self.end, self._dearness(weighed, penalties))
        network = _network(candidates, self.start, self.end, self.links, factors=weighed, penalties=penalties)
        legs = cheapest_path(network, self.previous, self.following)
        return legs, _seconds(self.usable, legs, self.links, self.previous, self.following)

    def weighted(self, rng: Random) -> dict[str, float]:
        """Random factors that make a peer the cheapest in its place as often as its weight says; inf: not at all.

        Of peers that could stand in for each other, the one with the least E / weight is taken, E being exponential:
        that draws them by weight. As a factor on the cost: sqrt(E / weight) * best / cost.
        """
        dearness = self._dearness(dict.fromkeys(self.usable, 1.0), {})
        blocks = range(self.start, self.end)
        holders = [[n for n, p in self.usable.items() if p.start <= block < p.end] for block in blocks]
        best = [min(dearness[name] for name in names) for names in holders]
        factors: dict[str, float] = {}
        for name, peer in self.usable.items():
            own = best[max(peer.start, self.start) - self.start : min(peer.end, self.end) - self.start]
            here = sum(own) / len(own)
            times = dearness[name] / here if here > 0.0 else 1.0 if dearness[name] <= 0.0 else inf
            chance = sqrt(-log(1.0 - rng.random()))
            factors[name] = inf if times > MAX_DEARER else chance * (1.0 if times <= 2.0 else sqrt(2.0 / times))
        return factors

    def _dearness(self, factors: Mapping[str, float], penalties: Mapping[str, float]) -> dict[str, float]:
        """Seconds a block, each peer by itself: what it is to be ranked by before chains are looked at."""
        found: dict[str, float] = {}
        for name, p in self.usable.items():
            n_blocks = min(p.end, self.end) - max(p.start, self.start)
            seconds = (p.overhead_s + p.queue_s + self._way_s(p)) / n_blocks + p.block_time_s
            found[name] = factors[name] * seconds + penalties.get(name, 0.0)
        return found

    def _way_s(self, peer: PeerView) -> float:
        """What the links of a peer are expected to cost, before it is known whom they lead to."""
        beside = [name for name in (self.previous, self.following) if name is not None]
        if beside:
            return sum(self.links.half_rtt_s(name, peer.peer) for name in beside)
        return 0.0 if peer.covers(self.start, self.end) else self.links.client.get(peer.peer, DEFAULT_RTT_S)


def _shortlist(
    usable: Mapping[str, PeerView], start: int, end: int, dearness: Mapping[str, float]
) -> Mapping[str, PeerView]:
    """All usable peers, or of too many the best holders of every block, then the second best, until they are enough."""
    if len(usable) <= MAX_CANDIDATES:
        return usable
    ranked = sorted(usable, key=lambda name: (dearness[name], name))
    by_block = [[n for n in ranked if usable[n].start <= block < usable[n].end] for block in range(start, end)]
    kept: set[str] = set()
    for rank in range(len(ranked)):
        kept.update(names[rank] for names in by_block if rank < len(names))
        if len(kept) >= MAX_CANDIDATES:
            break
    return {name: p for name, p in usable.items() if name in kept}


def _network(
    usable: Mapping[str, PeerView],
    start: int,
    end: int,
    links: Links,
    *,
    factors: Mapping[str, float],
    penalties: Mapping[str, float],
) -> Network:
    """The stretches between the ends of spans, who holds each, and the price of everything."""
    edges = {edge for p in usable.values() for edge in (p.start, p.end) if start < edge < end}
    cuts = (start, *sorted(edges), end)
    holders = tuple(
        tuple(name for name, p in sorted(usable.items()) if p.covers(left, right)) for left, right in pairwise(cuts)
    )

    @cache
    def link_s(sender: str, receiver: str) -> float:
        return links.half_rtt_s(sender, receiver) * factors.get(receiver, 1.0)

    return Network(
        cuts=cuts,
        holders=holders,
        enter_s={
            name: (p.overhead_s + p.queue_s) * factors[name] + penalties.get(name, 0.0) for name, p in usable.items()
        },
        block_s={name: p.block_time_s * factors[name] for name, p in usable.items()},
        link_s=link_s,
    )


def _seconds(
    usable: Mapping[str, PeerView],
    legs: tuple[Leg, ...],
    links: Links,
    previous: str | None,
    following: str | None,
) -> float:
    """What a token is expected to take over `legs`."""
    total = 0.0
    for leg in legs:
        peer = usable[leg.peer]
        total += peer.queue_s + peer.overhead_s + (leg.end - leg.start) * peer.block_time_s
    walk = [leg.peer for leg in legs]
    if previous is None and following is None and len(walk) > 1:
        walk.append(walk[0])
    if previous is not None:
        walk.insert(0, previous)
    if following is not None:
        walk.append(following)
    return total + sum(links.half_rtt_s(a, b) for a, b in pairwise(walk))


def _reason(hops: tuple[Hop, ...], seconds: float, first_hops: int, full: frozenset[str], how: str) -> str:
    route = ", ".join(f"{short_id(hop.peer.peer)} {hop.start}:{hop.end}" for hop in hops)
    count = "1 hop" if len(hops) == 1 else f"{len(hops)} hops"
    why = "the only first hop" if first_hops == 1 else f"{how} of {first_hops} first hops"
    short = [short_id(hop.peer.peer) for hop in hops if hop.peer.peer in full]
    note = f"; short of KV memory: {', '.join(short)}" if short else ""
    return f"{count}, {seconds * 1e3:.1f} ms a token: {route} ({why}{note})"
