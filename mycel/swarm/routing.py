"""Which chain of peers a request should take: the cheapest by expected seconds for a token.

A token costs, for each hop, its queue, its overhead and its blocks; for each link half a round trip; and the ring is
closed: the last hop sends the token to the first. A hop may use any part of what its peer serves, and a peer is used
for one hop at most, because a session has one state on each peer.

Ring: pure.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from typing import TYPE_CHECKING

from mycel.protocols.errors import RouteUnavailable
from mycel.protocols.messages import PeerAddress
from mycel.swarm.path import Leg, Network, cheapest_path
from mycel.swarm.view import PeerView, View, ranges, short_id, show_ranges

if TYPE_CHECKING:
    from random import Random

DEFAULT_RTT_S = 0.05
MAX_RTT_S = 5.0
# With chance, a chain may be this much dearer than the cheapest, so that many clients do not all take the same one.
SPREAD = 0.1
# In a larger swarm only the best holders of each block are looked at, which keeps the choice under some 50 ms.
MAX_CANDIDATES = 64
# More than any real chain costs: a peer without KV memory left is taken only where there is no other.
_FULL_PENALTY_S = 1e6


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
    exclude: frozenset[str] = frozenset(),
    previous: str | None = None,
    following: str | None = None,
    rng: Random | None = None,
) -> Chain:
    """The cheapest chain over blocks [start, end) (to the last block if None) for a session of `max_tokens` tokens.

    `rtts` are the client's own round trips in seconds. With `previous` and `following`, the peers beside a stretch that
    has to be replaced, the links to them count and they are not used again; without, the stretch is a ring by itself.
    Leaving peers are never used, those with too little free KV memory only where nobody else serves a block.

    The same arguments give the same chain: the cheapest of all, for up to MAX_CANDIDATES usable peers. With `rng` it is
    drawn among those at most SPREAD dearer: every peer's part is made dearer by a random factor in [1, 1 + SPREAD] and
    the cheapest is taken then.

    Raises RouteUnavailable with the block ranges that no peer is left for.
    """
    end = view.n_blocks if end is None else end
    if not 0 <= start < end <= view.n_blocks:
        raise ValueError(f"[{start}, {end}) is not a range of {view.n_blocks} blocks")
    barred = exclude | {peer for peer in (previous, following) if peer is not None}
    usable = {p.peer: p for p in view.serving() if p.peer not in barred and p.start < end and p.end > start}
    _demand_coverage(view, usable, start, end)
    full = frozenset(name for name, peer in usable.items() if peer.kv_free_tokens < max_tokens)
    links = Links.between(view, rtts)
    factors = {name: 1.0 + (SPREAD * rng.random() if rng else 0.0) for name in usable}
    candidates = _shortlist(usable, start, end, _dearness(usable, links, factors, full))
    network = _network(candidates, start, end, links, factors=factors, full=full)
    legs = cheapest_path(network, previous, following)
    seconds = _seconds(usable, legs, links, previous, following)
    hops = tuple(Hop(usable[leg.peer].address, leg.start, leg.end) for leg in legs)
    first_hops = sum(peer.start <= start for peer in usable.values())
    return Chain(hops, seconds, _reason(hops, seconds, first_hops, full, drawn=rng is not None))


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


def _demand_coverage(view: View, usable: Mapping[str, PeerView], start: int, end: int) -> None:
    """Raises RouteUnavailable, saying who was set aside, unless every block of [start, end) has a usable peer."""
    covered = {block for peer in usable.values() for block in range(peer.start, peer.end)}
    missing = ranges(block for block in range(start, end) if block not in covered)
    if not missing:
        return
    holds = [p for p in view.peers.values() if any(p.start < last and first < p.end for first, last in missing)]
    leaving = sum(not peer.serving for peer in holds)
    excluded = len(holds) - leaving
    aside = [f"{count} {why}" for count, why in ((leaving, "leaving"), (excluded, "failed or in use")) if count]
    note = f" (of those that did: {', '.join(aside)})" if aside else ""
    raise RouteUnavailable(missing, f"no live peer serves blocks {show_ranges(missing)}{note}")


def _dearness(
    usable: Mapping[str, PeerView], links: Links, factors: Mapping[str, float], full: frozenset[str]
) -> dict[str, float]:
    """Seconds a block, each peer by itself: what it is to be ranked by before chains are looked at."""
    way_s = {name: links.client.get(name, DEFAULT_RTT_S) for name in usable}
    return {
        name: factors[name] * ((p.overhead_s + p.queue_s + way_s[name]) / (p.end - p.start) + p.block_time_s)
        + (_FULL_PENALTY_S if name in full else 0.0)
        for name, p in usable.items()
    }


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
    full: frozenset[str],
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
            name: (p.overhead_s + p.queue_s) * factors[name] + (_FULL_PENALTY_S if name in full else 0.0)
            for name, p in usable.items()
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


def _reason(hops: tuple[Hop, ...], seconds: float, first_hops: int, full: frozenset[str], *, drawn: bool) -> str:
    route = ", ".join(f"{short_id(hop.peer.peer)} {hop.start}:{hop.end}" for hop in hops)
    count = "1 hop" if len(hops) == 1 else f"{len(hops)} hops"
    if first_hops == 1:
        why = "the only first hop"
    elif drawn:
        why = f"drawn within {SPREAD:.0%} of the cheapest of {first_hops} first hops"
    else:
        why = f"cheapest of {first_hops} first hops"
    short = [short_id(hop.peer.peer) for hop in hops if hop.peer.peer in full]
    note = f"; short of KV memory: {', '.join(short)}" if short else ""
    return f"{count}, {seconds * 1e3:.1f} ms a token: {route} ({why}{note})"
