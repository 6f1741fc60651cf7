"""The cheapest way over a row of stretches, each held by several peers, using no peer twice: a best-first search.

Hands over only where some peer's span begins or ends. Moving the place between two hops changes the price linearly, so
one of its ends is best; and a hop that would shrink to nothing is left out, which is never dearer where links obey the
triangle inequality.

A best-first search (A*) whose bound of what is left is the cheapest way that may use a peer twice. It knows nothing of
views, records or why prices are what they are.

Ring: pure.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from heapq import heappop, heappush
from math import inf

# A view made to be hard costs a dearer chain, not our time: after so many walks (some 60 ms) the relaxed one is mended.
MAX_WALKS = 20_000

# Peers in order, each with the index of the cut where it begins.
_Walk = tuple[tuple[str, int], ...]


@dataclass(frozen=True, slots=True)
class Leg:
    """Blocks [start, end) at a peer."""

    peer: str
    start: int
    end: int


@dataclass(frozen=True, slots=True)
class Network:
    """What there is to choose from. `holders[i]`, never empty, can do the blocks [cuts[i], cuts[i + 1]).

    A hop costs enter_s once and block_s for each block; link_s(sender, receiver) is added between hops. Seconds. What a
    peer holds is contiguous.
    """

    cuts: tuple[int, ...]
    holders: tuple[tuple[str, ...], ...]
    enter_s: Mapping[str, float]
    block_s: Mapping[str, float]
    link_s: Callable[[str, str], float]

    @property
    def n_stretches(self) -> int:
        return len(self.holders)

    def stretch_s(self, peer: str, index: int) -> float:
        return (self.cuts[index + 1] - self.cuts[index]) * self.block_s[peer]


@dataclass(frozen=True, slots=True)
class _Bounds:
    """Lower bounds: `rest[i][p]` of going on from cut i after p, `closing[p]` of coming back to first hop p."""

    rest: tuple[Mapping[str, float], ...]
    closing: Mapping[str, float]


def cheapest_path(network: Network, previous: str | None = None, following: str | None = None) -> tuple[Leg, ...]:
    """The cheapest legs over all stretches, no peer twice.

    The links from `previous` and to `following` count. With neither, the path is a ring: the link from the last peer
    back to the first counts, unless they are one.
    """
    ring = previous is None and following is None
    bounds = _bounds(network, following, ring=ring)
    starts = {
        peer: (0.0 if previous is None else network.link_s(previous, peer)) + network.enter_s[peer]
        for peer in network.holders[0]
    }
    walk = _search(network, bounds, starts, ring=ring) or _mended(network, bounds, starts)
    cuts = [network.cuts[index] for _, index in walk] + [network.cuts[-1]]
    return tuple(Leg(peer, cuts[i], cuts[i + 1]) for i, (peer, _) in enumerate(walk))


def _search(network: Network, bounds: _Bounds, starts: Mapping[str, float], *, ring: bool) -> _Walk | None:
    """The cheapest walk, or None if it takes too many to find. `starts`: what it costs to begin at a peer."""
    heap: list[tuple[float, int, _Walk, float]] = []
    seen: set[tuple[str, str, int, frozenset[str]]] = set()
    pushed = 0

    def push(walk: _Walk, cut: int, spent_s: float) -> None:
        nonlocal pushed
        pushed += 1
        bound_s = spent_s + _remaining_s(network, bounds, walk, cut, ring=ring)
        # Of equal bounds the one that is further along: many chains of one price are not all looked at.
        heappush(heap, (bound_s, -cut, walk, spent_s))

    for peer, start_s in starts.items():
        push(((peer, 0),), 1, start_s + network.stretch_s(peer, 0))
    while heap and pushed < MAX_WALKS:
        _, negative_cut, walk, spent_s = heappop(heap)
        cut = -negative_cut
        if cut == network.n_stretches:
            return walk
        key = _key(network, walk, cut, ring=ring)
        if key in seen:
            continue
        seen.add(key)
        for longer, added_s in _extended(network, walk, cut):
            push(longer, cut + 1, spent_s + added_s)
    return None


def _mended(network: Network, bounds: _Bounds, starts: Mapping[str, float]) -> _Walk:
    """The cheapest way that may use a peer twice, where such a peer then keeps all between its first and last part."""

    def begin_s(peer: str) -> float:
        return starts[peer] + network.stretch_s(peer, 0) + bounds.rest[1][peer]

    owners = [min(network.holders[0], key=begin_s)]
    for cut in range(1, network.n_stretches):
        last = owners[-1]

        def onward_s(peer: str, cut: int = cut, last: str = last) -> float:
            handed_s = 0.0 if peer == last else network.link_s(last, peer) + network.enter_s[peer]
            return handed_s + network.stretch_s(peer, cut) + bounds.rest[cut + 1][peer]

        owners.append(min(network.holders[cut], key=onward_s))
    walk: list[tuple[str, int]] = []
    index = 0
    while index < len(owners):
        walk.append((owners[index], index))
        index = len(owners) - owners[::-1].index(owners[index])
    return tuple(walk)


def _extended(network: Network, walk: _Walk, cut: int) -> Iterator[tuple[_Walk, float]]:
    """Every way to do the stretch after `cut`, with what it adds."""
    used = {peer for peer, _ in walk}
    last = walk[-1][0]
    for peer in network.holders[cut]:
        if peer == last:
            yield walk, network.stretch_s(peer, cut)
        elif peer not in used:
            added_s = network.link_s(last, peer) + network.enter_s[peer] + network.stretch_s(peer, cut)
            yield (*walk, (peer, cut)), added_s


def _key(network: Network, walk: _Walk, cut: int, *, ring: bool) -> tuple[str, str, int, frozenset[str]]:
    """What decides how a walk can go on: of two with the same key, the first that was reached is the cheaper."""
    barred = frozenset(peer for peer, _ in walk[:-1]) & frozenset(network.holders[cut])
    return (walk[0][0] if ring else ""), walk[-1][0], cut, barred


def _remaining_s(network: Network, bounds: _Bounds, walk: _Walk, cut: int, *, ring: bool) -> float:
    """A lower bound of what a walk still costs, exact at the end."""
    first, last = walk[0][0], walk[-1][0]
    rest_s = bounds.rest[cut][last]
    if not ring:
        return rest_s
    if cut == network.n_stretches:
        return rest_s if first == last else rest_s + network.link_s(last, first)
    alone = len(walk) == 1 and first in network.holders[-1]
    return rest_s if alone else rest_s + bounds.closing[first]


def _bounds(network: Network, following: str | None, *, ring: bool) -> _Bounds:
    """Backwards over the cuts, the cheapest way on if peers could be used twice."""
    lasts = network.holders[-1]
    rest: list[dict[str, float]] = [
        {peer: 0.0 if following is None else network.link_s(peer, following) for peer in lasts}
    ]
    for cut in range(network.n_stretches - 1, 0, -1):
        onward = {peer: network.stretch_s(peer, cut) + rest[-1][peer] for peer in network.holders[cut]}
        entered = {peer: network.enter_s[peer] + cost_s for peer, cost_s in onward.items()}
        rest.append(
            {
                peer: min(
                    onward.get(peer, inf),
                    min((network.link_s(peer, q) + cost_s for q, cost_s in entered.items()), default=inf),
                )
                for peer in network.holders[cut - 1]
            }
        )
    rest.append({})  # at cut 0 there is no last hop yet
    closing: dict[str, float] = {}
    if ring:
        for first in network.holders[0]:
            closing[first] = min((network.link_s(last, first) for last in lasts if last != first), default=inf)
    return _Bounds(tuple(reversed(rest)), closing)
