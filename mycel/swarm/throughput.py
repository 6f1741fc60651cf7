"""The tokens a second that a swarm can do for many sessions at once: a maximum flow over blocks, and what limits it.

A peer gives its time to any of its blocks, since a session may use any part of a span. With x_ib the steps a second of
block b that peer i does, the throughput F is the largest for which there are x_ib >= 0 with

    sum_i x_ib >= F        for every block b: each token needs each block once
    sum_b x_ib <= work_i   its time: work_i = n_i / (overhead_i + n_i * block_time_i) blocks a second for n_i blocks
    x_ib       <= link_i   its link: link_bytes_per_s / bytes_per_token tokens a second; 0 is unmeasured, no limit

This is a flow peers -> blocks. Its dual (minimum cut) names the blocks that limit it:

    F = min over sets B of blocks:  sum_i min(work_i, link_i * |B and span_i|) / |B|

KV memory is no part of it. It bounds the sessions at a time, not the rate: how many a rate needs follows from their
length and from how long a token takes around the ring, which no announcement knows; and the memory that is free now
says how busy a peer is. Counting that would have nodes move because of load, and then move back. Sessions that batch a
step make more of a peer than work_i, all peers alike.

Source: maximum flow for serving as in Helix (Mei et al., ASPLOS 2025), here with free parts of spans. Filling demands
from the left by the peers that end first is maximal in a convex bipartite graph (Glover 1967); links need augmenting
paths (Ford and Fulkerson 1956); the discrete Newton method (Dinkelbach 1967) leads from cut to cut to F.

Ring: pure.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise

from mycel.swarm.view import PeerView, View

# What a block is taken to need where nobody has measured anything.
DEFAULT_BLOCK_TIME_S = 0.001
# No machine does a step in less; a peer that has not measured itself yet announces zeros.
_LEAST_STEP_S = 1e-6
# What rounding may make of a share of the flow.
_ROUNDING = 1e-9


@dataclass(frozen=True, slots=True)
class Flow:
    """Tokens a second through all blocks, and the set of blocks that allows no more (block b is bit b)."""

    tokens_per_s: float
    bottleneck: int

    @property
    def blocks(self) -> tuple[int, ...]:
        """The blocks of the bottleneck, ascending."""
        return tuple(block for block in range(self.bottleneck.bit_length()) if self.bottleneck >> block & 1)


@dataclass(frozen=True)
class Supply:
    """What one peer gives: `work` blocks a second in [start, end), at most `link` a second of each."""

    start: int
    end: int
    work: float
    link: float

    @cached_property
    def mask(self) -> int:
        """Its blocks as bits."""
        return _mask(self.start, self.end)

    @property
    def even_rate(self) -> float:
        """Steps a second of each of its blocks if it gives them all the same."""
        return min(self.work / (self.end - self.start), self.link)

    def at(self, start: int) -> Supply:
        """The same machine with as many blocks from `start` on."""
        return Supply(start, start + self.end - self.start, self.work, self.link)

    def gives(self, blocks: int) -> float:
        """The most it can do for a set of blocks together, in blocks a second."""
        return min(self.work, self.link * (self.mask & blocks).bit_count()) if self.mask & blocks else 0.0


def supply(peer: PeerView, bytes_per_token: float = 0.0) -> Supply:
    """What `peer` gives by its announcement; `bytes_per_token` is a token's size on a link, 0 for no limit by links."""
    length = peer.end - peer.start
    own = own_supply(length, peer.block_time_s, peer.overhead_s, peer.link_bytes_per_s, bytes_per_token)
    return own.at(peer.start)


def own_supply(
    length: int, block_time_s: float, overhead_s: float, link_bytes_per_s: float, bytes_per_token: float
) -> Supply:
    """What a machine would give with `length` blocks, the first ones."""
    work = length / max(overhead_s + length * block_time_s, _LEAST_STEP_S)
    limited = link_bytes_per_s > 0.0 and bytes_per_token > 0.0
    return Supply(0, length, work, link_bytes_per_s / bytes_per_token if limited else math.inf)


def supplies(view: View, bytes_per_token: float = 0.0) -> list[Supply]:
    """What the peers that stay give, as placement counts on it: who has not measured itself is like the median."""
    return [supply(peer, bytes_per_token) for peer in measured(view).serving()]


def measured(view: View) -> View:
    """The peers that stay, those without a measurement with the median block time of the others."""
    view = view.staying()
    known = sorted(peer.block_time_s for peer in view.peers.values() if peer.block_time_s > 0.0)
    median_s = known[len(known) // 2] if known else DEFAULT_BLOCK_TIME_S
    peers = {
        name: peer if peer.block_time_s > 0.0 else replace(peer, block_time_s=median_s)
        for name, peer in view.peers.items()
    }
    return replace(view, peers=peers)


def covered_blocks(supplies: Iterable[Supply]) -> int:
    """All blocks that somebody has, as bits."""
    blocks = 0
    for each in supplies:
        blocks |= each.mask
    return blocks


def swarm_flow(view: View, *, bytes_per_token: float = 0.0) -> Flow:
    """The throughput of the serving peers of `view`, by what they announce; 0 while a block is missing."""
    return max_flow([supply(peer, bytes_per_token) for peer in view.serving()], view.n_blocks)


def kept_blocks(view: View, peer: str) -> int:
    """The blocks that `peer` serves now and does not mean to give up, as bits: none while it joins or leaves."""
    now = view.peers[peer]
    then = view.without(view.peers.keys() - {peer}).staying().peers.get(peer)
    if then is None or not now.serving:
        return 0
    return _mask(now.start, now.end) & _mask(then.start, then.end)


def cut_flow(supplies: Iterable[Supply], blocks: int) -> float:
    """What the set `blocks` allows: no throughput is above it."""
    return math.fsum(each.gives(blocks) for each in supplies) / blocks.bit_count()


def max_flow(supplies: Sequence[Supply], n_blocks: int) -> Flow:
    """The maximum flow through blocks [0, n_blocks), exact but for rounding.

    >>> max_flow([Supply(0, 2, 200.0, math.inf), Supply(1, 3, 100.0, math.inf)], 3).tokens_per_s
    100.0
    """
    everything = (1 << n_blocks) - 1
    stretches = _stretches(supplies, n_blocks)
    found = Flow(cut_flow(supplies, everything), everything)
    while True:
        # Each turn has a smaller bottleneck value, so that no set of blocks is met twice.
        blocks = _Filling(supplies, stretches, found.tokens_per_s).cut()
        if not blocks:
            return found
        lower = cut_flow(supplies, blocks)
        if lower >= found.tokens_per_s * (1.0 - _ROUNDING):
            return found
        found = Flow(lower, blocks)


def _mask(start: int, end: int) -> int:
    return (1 << end) - (1 << start)


def _stretches(supplies: Sequence[Supply], n_blocks: int) -> list[tuple[int, int]]:
    """Blocks that the same peers hold, as (first, end): their demands are alike and can be filled as one."""
    edges = sorted({0, n_blocks, *(each.start for each in supplies), *(each.end for each in supplies)})
    return list(pairwise(edges))


class _Filling:
    """An attempt to give every block `rate` steps a second: a maximal flow, and the cut that it leaves."""

    def __init__(self, supplies: Sequence[Supply], stretches: Sequence[tuple[int, int]], rate: float) -> None:
        self._stretches = stretches
        self._tolerance = rate * _ROUNDING
        self._peers = sorted(supplies, key=lambda each: each.end)
        self._left = [each.work for each in self._peers]
        self._flows: list[dict[int, float]] = [{} for _ in self._peers]
        self._holders: list[list[int]] = [[] for _ in stretches]
        self._lacks = [rate * (end - start) for start, end in stretches]
        for place, (start, end) in enumerate(stretches):
            holders = self._holders[place]
            holders.extend(i for i, each in enumerate(self._peers) if each.start <= start and end <= each.end)
            self._fill(place, holders, end - start)

    def _fill(self, place: int, holders: Sequence[int], length: int) -> None:
        """Take from whoever ends first, as much as there is."""
        lack, left = self._lacks[place], self._left
        for i in holders:
            if left[i] > 0.0:
                given = min(lack, left[i], self._peers[i].link * length)
                left[i] -= given
                lack -= given
                self._flows[i][place] = given
                if lack <= 0.0:
                    break
        self._lacks[place] = lack

    def cut(self) -> int:
        """The blocks of a minimum cut that cannot have the rate, 0 if all have it."""
        cut: set[int] = set()
        for place, (start, end) in enumerate(self._stretches):
            while self._lacks[place] > self._tolerance * (end - start):
                seen = self._augment(place)
                if seen:
                    cut |= seen
                    break
        return sum(_mask(start, end) for start, end in (self._stretches[place] for place in cut))

    def _augment(self, lacking: int) -> set[int]:
        """Bring more to a stretch along a shortest path of peers that can take over for each other.

        If there is none: the stretches from which there is none.
        """
        came: dict[int, tuple[int, int]] = {}  # stretch -> (peer that would give less to it, stretch that gets more)
        reached, asked, row = {lacking}, set[int](), [lacking]
        for place in row:
            start, end = self._stretches[place]
            for i in self._holders[place]:
                room = self._peers[i].link * (end - start) - self._flows[i].get(place, 0.0)
                if i in asked or room <= self._tolerance:
                    continue
                asked.add(i)
                if self._left[i] > self._tolerance:
                    self._shift(i, place, came)
                    return set()
                for other, given in self._flows[i].items():
                    if given > self._tolerance and other not in reached:
                        reached.add(other)
                        came[other] = (i, place)
                        row.append(other)
        return reached

    def _shift(self, giver: int, place: int, came: dict[int, tuple[int, int]]) -> None:
        """Push as much as fits from the free time of `giver` along the path to the stretch that lacks."""
        path = [(giver, place)]
        while path[-1][1] in came:
            path.append(came[path[-1][1]])
        amount = min(self._left[giver], self._lacks[path[-1][1]])
        for step, (i, to) in enumerate(path):
            start, end = self._stretches[to]
            amount = min(amount, self._peers[i].link * (end - start) - self._flows[i].get(to, 0.0))
            if step:
                amount = min(amount, self._flows[i][path[step - 1][1]])
        self._left[giver] -= amount
        for step, (i, to) in enumerate(path):
            self._flows[i][to] = self._flows[i].get(to, 0.0) + amount
            if step:
                self._flows[i][path[step - 1][1]] -= amount
        self._lacks[path[-1][1]] -= amount
