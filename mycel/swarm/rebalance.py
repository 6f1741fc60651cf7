"""When a node that serves should move to other blocks, because peers left or because the swarm grew unevenly.

Every node computes the same plan from the same view: the fewest moves, of at most MAX_MOVES peers, that raise the
swarm's throughput by MIN_SHARE (mycel/swarm/moves.py). Whoever is first in it moves, the others wait; who does not move
in PATIENCE_S is taken to stay for good, and the plan is made without it. While blocks are missing, moves that close
holes come before everything and wait for no cool-down.

Why it cannot oscillate. Let nobody join or leave, speeds be constant, and F be the throughput of the places that peers
serve. Of moves chosen in ignorance of each other all but one go back (mycel/swarm/claims.py), so that moves are made
one by one, each in the state for which it was chosen. No move uncovers a block: a peer gives up only what others serve.
A move is of one of three kinds:

1. Repair: a missing block is covered, at most once for each block.
2. Gain: F rises by MIN_SHARE at least, at once.
3. Preparation: it makes room, so that further moves of its plan will raise F by MIN_SHARE, and may lower F meanwhile. A
   node prepares PREPARATIONS times, and again when F has risen by MIN_SHARE over what it was at the first of them.

F has a greatest and a least value above 0, since there are finitely many arrangements. So with
G = log(F_max / F_min) / log(1 + MIN_SHARE) a node prepares at most P = PREPARATIONS * (1 + G) times, N nodes N * P
times, and between two preparations there are at most G gains: the number of moves is bounded and ends.

Petals (Borzunov et al. 2023, appendix) plays through the greedy moves of all servers instead and moves if the weakest
block gains a quarter; nothing bounds its number of moves, and servers that look at the same time move together.

Ring: pure.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from mycel.swarm.claims import MIN_SHARE
from mycel.swarm.moves import Machine, Plan, Relocation, find_patch, find_plan
from mycel.swarm.throughput import Supply, kept_blocks, max_flow, measured, own_supply, supply
from mycel.swarm.view import PeerView, View, short_id, show_ranges

if TYPE_CHECKING:
    from random import Random

# Peers that a plan moves; benchmarks/placement.py shows what that is worth.
MAX_MOVES = 3
# The others may follow with another plan than the one that a node made room for.
PREPARATIONS = 3
# Seconds between two looks, on average.
PERIOD_S = 60.0
# While blocks are missing, looks are so many times as frequent.
HASTE = 6.0
# After a move, so many seconds at the place, and so many times what the next download takes.
COOL_DOWN_S = 600.0
COOL_DOWN_DOWNLOADS = 3.0
# What the swarm loses while a peer fetches, its gain has to bring back within so many seconds.
REPAY_S = 3600.0
# How long to wait for a peer that the plan moves first.
PATIENCE_S = 180.0


@dataclass(frozen=True, slots=True)
class Stay:
    """Go on serving the same blocks."""

    reason: str


@dataclass(frozen=True, slots=True)
class Move:
    """Announce that it moves to [start, end), fetch that, then serve it, unless mycel/swarm/claims.py says to go back.

    Until then it serves what it has; what is in both spans is served all the time.
    """

    start: int
    end: int
    reason: str


@dataclass(eq=False, slots=True)
class Rebalancer:
    """The decisions of one node, and what it has to remember between two of them.

    `capacity_blocks` is what its memory holds, `last_move_at` when it joined, `bytes_per_token` what a token has on a
    link (0: links do not count). Times are those of one clock, in seconds.
    """

    me: str
    capacity_blocks: int
    last_move_at: float
    bytes_per_token: float = 0.0
    _before_that_at: float = field(default=-math.inf, init=False)
    _members: frozenset[str] = field(default=frozenset(), init=False)
    # What the swarm did at best with these members.
    _best_per_s: float = field(default=0.0, init=False)
    # How often it has moved to make room for others since the swarm did so many tokens a second.
    _preparations: int = field(default=0, init=False)
    _prepared_per_s: float = field(default=0.0, init=False)
    # Peers that plans move first: their place, and since when they have been waited for.
    _awaited: dict[str, tuple[tuple[int, int], float]] = field(default_factory=dict, init=False)

    def decide(self, view: View, now: float, *, download_s: float) -> Stay | Move:
        """Whether to move, from a view with this node in it. A Move counts as made unless `went_back` says otherwise.

        `download_s` is what fetching a span takes, infinite if its blocks cannot be had.
        """
        mine = view.peers.get(self.me)
        if mine is None or not mine.serving:
            return Stay("stays: it does not serve yet")
        here = f"stays at {mine.start}:{mine.end}"
        if math.isinf(download_s):
            return Stay(f"{here}: nobody has other blocks to fetch")
        self._notice(view)
        holes = view.staying().missing()
        plan = self._plan(view, now, whole=not holes)
        if plan is None:
            return Stay(f"{here}: " + _nothing_better(view, show_ranges(holes)))
        first = plan.moves[0]
        if first.peer != self.me:
            self._awaited.setdefault(first.peer, (_place(view.peers[first.peer]), now))
            return Stay(f"{here}: waits for {short_id(first.peer)} to move to {first.start}:{first.end}")
        if holes:
            return self._move(first, now, f"nobody serves {show_ranges(holes)}")
        return self._consider(view, plan, now, download_s)

    def went_back(self) -> None:
        """The last Move was not made: it had to yield."""
        self.last_move_at = self._before_that_at

    def _notice(self, view: View) -> None:
        """Forget what was only true of other peers at other places."""
        members = frozenset(name for name, peer in view.peers.items() if peer.staying)
        if members != self._members:
            self._members, self._preparations, self._best_per_s, self._awaited = members, 0, 0.0, {}
        self._awaited = {
            name: (place, since) for name, (place, since) in self._awaited.items() if _place(view.peers[name]) == place
        }

    def _plan(self, view: View, now: float, *, whole: bool) -> Plan | None:
        """What to do for the swarm, if those do not move who were waited for long enough."""
        stuck = {name for name, (_, since) in self._awaited.items() if now - since >= PATIENCE_S}
        machines = [self._machine(view, peer, stuck) for peer in measured(view).serving()]
        self._best_per_s = max(
            self._best_per_s, max_flow([each.supply for each in machines], view.n_blocks).tokens_per_s
        )
        plan = find_plan(machines, view.n_blocks, share=MIN_SHARE, depth=MAX_MOVES, known_per_s=self._best_per_s)
        if plan is None and not whole and (patch := find_patch(machines, view.n_blocks)):
            return Plan((patch,), 0.0)
        return plan

    def _machine(self, view: View, peer: PeerView, stuck: set[str]) -> Machine:
        given = supply(peer, self.bytes_per_token)
        kept = kept_blocks(view, peer.peer)
        shape: Supply | None = given
        if peer.peer == self.me:
            length = min(self.capacity_blocks, view.n_blocks)
            link_bytes_per_s = peer.link_bytes_per_s
            shape = own_supply(length, peer.block_time_s, peer.overhead_s, link_bytes_per_s, self.bytes_per_token)
        if peer.peer in stuck or kept != given.mask:  # the second is on its way already
            shape = None
        return Machine(peer.peer, given, shape, kept)

    def _consider(self, view: View, plan: Plan, now: float, download_s: float) -> Stay | Move:
        """A plan that this node is to begin: is it time, and worth it?"""
        mine = view.peers[self.me]
        here = f"stays at {mine.start}:{mine.end}"
        cool_down_s = max(COOL_DOWN_S, COOL_DOWN_DOWNLOADS * download_s)
        if now - self.last_move_at < cool_down_s:
            left_s = self.last_move_at + cool_down_s - now
            return Stay(f"{here}: it moved {now - self.last_move_at:.0f} s ago, the next move is in {left_s:.0f} s")
        given = [supply(peer, self.bytes_per_token) for peer in measured(view.without({self.me})).serving()]
        without = max_flow(given, view.n_blocks).tokens_per_s
        present = self._flow_at(view, given, mine.start, mine.end)
        gain, loss = plan.tokens_per_s - present, (present - without) * len(plan.moves)
        move = plan.moves[0]
        if gain * REPAY_S < loss * download_s:
            return Stay(
                f"{here}: {move.start}:{move.end} would raise the swarm from {present:.3g} to {plan.tokens_per_s:.3g} "
                f"tokens a second, but {download_s:.0f} s of fetching cost more than that brings in an hour"
            )
        reason = f"raises the swarm from {present:.3g} to {plan.tokens_per_s:.3g} tokens a second"
        if self._flow_at(view, given, move.start, move.end) >= present * (1.0 + MIN_SHARE):
            return self._move(move, now, reason)
        if self._preparations == 0 or present >= self._prepared_per_s * (1.0 + MIN_SHARE):
            self._preparations, self._prepared_per_s = 0, present
        elif self._preparations == PREPARATIONS:
            return Stay(f"{here}: it has made room for others {PREPARATIONS} times, and that did not help")
        self._preparations += 1
        following = " and ".join(f"{short_id(each.peer)} to {each.start}:{each.end}" for each in plan.moves[1:])
        return self._move(move, now, f"with {following} that {reason}")

    def _flow_at(self, view: View, others: list[Supply], start: int, end: int) -> float:
        own = replace(measured(view).peers[self.me], start=start, end=end)
        return max_flow([*others, supply(own, self.bytes_per_token)], view.n_blocks).tokens_per_s

    def _move(self, move: Relocation, now: float, reason: str) -> Move:
        self._before_that_at, self.last_move_at = self.last_move_at, now
        return Move(move.start, move.end, f"moves to {move.start}:{move.end}: {reason}")


def pause_s(rng: Random, period_s: float = PERIOD_S, *, urgent: bool) -> float:
    """Seconds to the next look: spread, so that nodes seldom decide at the same time; few while blocks are missing."""
    return period_s / (HASTE if urgent else 1.0) * rng.uniform(0.5, 1.5)


def _place(peer: PeerView) -> tuple[int, int]:
    return peer.start, peer.end


def _nothing_better(view: View, holes: str) -> str:
    if holes:
        return f"nobody serves {holes}, and no peer can leave its blocks to others"
    return f"no {MAX_MOVES} moves raise the swarm by {MIN_SHARE:.0%}"
