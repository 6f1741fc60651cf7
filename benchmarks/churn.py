"""A swarm over simulated hours while peers come and go: what it does, over what the best placement would do.

Every peer decides from a view of its own, in which what the others announce shows late. Fetching takes time, deaths are
not announced, and a peer that has chosen serves only when it has fetched. `benchmarks.placement --churn` runs it.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from random import Random

from benchmarks.placement import BYTES_PER_TOKEN, Machine, draw_machine, one_search_for_all, optimum
from mycel.swarm.claims import must_yield
from mycel.swarm.placement import choose_span
from mycel.swarm.rebalance import Move, Rebalancer, pause_s
from mycel.swarm.throughput import Supply, max_flow
from mycel.swarm.view import PeerView, View

VIEW_DELAY_S = (10.0, 30.0)
SETTLE_S = 3.0 * VIEW_DELAY_S[1]
FETCH_BLOCK_S = (20.0, 60.0)
# Between dropping blocks and serving those that replace them.
LOAD_S = 10.0
CHECK_S = 20.0
ABSENCE_S = 600.0  # after a death, until somebody else comes: on average
HOUR_S = 3600.0


@dataclass(frozen=True, slots=True)
class Result:
    """Averages over time in tokens a second; `holes_share` is the part of the time in which blocks were missing."""

    throughput: float
    optimum: float
    holes_share: float
    deaths: int
    moves: int
    went_back: int

    @property
    def share(self) -> float:
        return self.throughput / self.optimum

    def summary(self) -> str:
        return (
            f"{self.share:.3f} of the optimum ({self.throughput:.0f} of {self.optimum:.0f} tokens a second) through "
            f"{self.deaths} deaths; blocks missing {self.holes_share:.1%} of the time; "
            f"{self.moves} moves, {self.went_back} taken back"
        )


@dataclass(eq=False, slots=True)
class Peer:
    """One peer: what it announces, what it serves in truth, and where it is going."""

    machine: Machine
    fetch_block_s: float
    announced: PeerView
    alive: bool = True
    serves: tuple[int, int] = (0, 0)
    goal: tuple[int, int] = (0, 0)
    ready_at: float = 0.0
    on_disk: int = 0
    before: View = field(default_factory=lambda: View(1))
    rebalancer: Rebalancer | None = None
    # What the others will see, each after a delay of its own: when it was said, and what; None for a death.
    said: list[tuple[float, PeerView | None]] = field(default_factory=list)

    def fetch_s(self, start: int, end: int) -> float:
        needed = (1 << end) - (1 << start)
        return self.fetch_block_s * (needed & ~self.on_disk).bit_count()


class Churn:
    """The simulation: events in the order of their times, and the peers by name; the dead are kept until all know."""

    def __init__(self, n_peers: int, n_blocks: int, *, lifetime_h: float, seed: int) -> None:
        self._rng = Random(seed)
        self._n_blocks = n_blocks
        self._lifetime_s = lifetime_h * HOUR_S
        self._now = 0.0
        self._agenda: list[tuple[float, int, Callable[[], None]]] = []
        self._count = 0
        self._peers: dict[str, Peer] = {}
        self._delays: dict[tuple[str, str, float], float] = {}
        self._optima: dict[frozenset[str], float] = {}
        self.deaths = self.moves = self.went_back = 0
        for _ in range(n_peers):
            self._at(self._rng.uniform(0.0, ABSENCE_S), self._join)

    def run(self, hours: float) -> Result:
        """Averages from the second hour on: the first one is for everybody to come."""
        flow_s = best_s = holes_s = 0.0
        began, ends = HOUR_S, (hours + 1.0) * HOUR_S
        while self._now < ends:
            self._now, _, event = heapq.heappop(self._agenda)
            event()
            seconds = min(self._agenda[0][0], ends) - max(self._now, began)
            if seconds > 0.0:
                flow = self._throughput()
                flow_s += flow * seconds
                best_s += self._optimum() * seconds
                holes_s += seconds * (flow == 0.0)
        total_s = hours * HOUR_S
        return Result(flow_s / total_s, best_s / total_s, holes_s / total_s, self.deaths, self.moves, self.went_back)

    # ---- what is true

    def _throughput(self) -> float:
        given = []
        for peer in self._peers.values():
            start, end = peer.serves
            if peer.alive and start < end:
                whole = peer.machine.supply(self._n_blocks)
                given.append(Supply(start, end, whole.work, whole.link))
        return max_flow(given, self._n_blocks).tokens_per_s

    def _optimum(self) -> float:
        living = [peer.machine for peer in self._peers.values() if peer.alive]
        names = frozenset(machine.name for machine in living)
        if names not in self._optima:
            enough = sum(machine.capacity for machine in living) >= self._n_blocks
            self._optima[names] = optimum(living, self._n_blocks, gap=0.02) if enough else 0.0
        return self._optima[names]

    # ---- what is known

    def _say(self, peer: Peer, announced: PeerView | None) -> None:
        if announced is not None:
            peer.announced = announced
        peer.said.append((self._now, announced))

    def _view(self, viewer: str) -> View:
        """What `viewer` knows: of each other peer the last that has reached it, of itself everything."""
        found = {}
        for name, peer in self._peers.items():
            for said_at, announced in reversed(peer.said):
                if name == viewer or said_at + self._delay(viewer, name, said_at) <= self._now:
                    if announced is not None:
                        found[name] = announced
                    break
        return View(self._n_blocks, found)

    def _delay(self, viewer: str, name: str, said_at: float) -> float:
        key = viewer, name, said_at
        if key not in self._delays:
            self._delays[key] = self._rng.uniform(*VIEW_DELAY_S)
        return self._delays[key]

    # ---- what happens

    def _at(self, after_s: float, event: Callable[[], None]) -> None:
        self._count += 1
        heapq.heappush(self._agenda, (self._now + after_s, self._count, event))

    def _for(self, peer: Peer, after_s: float, event: Callable[[Peer], None]) -> None:
        """An event of a peer's life, if it still lives then."""
        self._at(after_s, lambda: event(peer) if peer.alive else None)

    def _join(self) -> None:
        machine = draw_machine(self._rng, f"p{self._rng.getrandbits(40):011x}", self._n_blocks)
        peer = Peer(machine, self._rng.uniform(*FETCH_BLOCK_S), machine.announce(0, 1, "joining"))
        self._peers[machine.name] = peer
        self._for(peer, self._rng.expovariate(1.0 / self._lifetime_s), self._die)
        self._choose(peer)

    def _die(self, peer: Peer) -> None:
        peer.alive = False
        self.deaths += 1
        self._say(peer, None)
        self._at(VIEW_DELAY_S[1], lambda: self._peers.pop(peer.machine.name))
        self._at(self._rng.expovariate(1.0 / ABSENCE_S), self._join)

    def _choose(self, peer: Peer) -> None:
        machine = peer.machine
        view = self._view(machine.name).without({machine.name})
        start, end, _ = choose_span(
            view,
            machine.capacity,
            block_time_s=machine.block_time_s,
            link_bytes_per_s=machine.link,
            bytes_per_token=BYTES_PER_TOKEN,
        )
        self._say(peer, machine.announce(start, end, "joining"))
        self._set_out(peer, view, start, end)

    def _set_out(self, peer: Peer, before: View, start: int, end: int) -> None:
        """Fetch, and see meanwhile whether somebody else came first."""
        peer.before, peer.goal = before, (start, end)
        peer.ready_at = self._now + max(SETTLE_S, peer.fetch_s(start, end))
        self._for(peer, CHECK_S, self._check)

    def _check(self, peer: Peer) -> None:
        name = peer.machine.name
        if must_yield(self._view(name), name, peer.before, bytes_per_token=BYTES_PER_TOKEN):
            self.went_back += 1
            if peer.rebalancer is None:
                self._choose(peer)
            else:
                peer.rebalancer.went_back()
                self._say(peer, replace(peer.announced, moving_to=None))
                self._look_later(peer)
        elif self._now < peer.ready_at:
            self._for(peer, min(CHECK_S, peer.ready_at - self._now), self._check)
        else:
            start, end = peer.serves
            peer.serves = max(start, peer.goal[0]), min(end, peer.goal[1])
            self._for(peer, LOAD_S, self._serve)

    def _serve(self, peer: Peer) -> None:
        peer.serves = start, end = peer.goal
        peer.on_disk |= (1 << end) - (1 << start)
        self._say(peer, peer.machine.announce(start, end))
        if peer.rebalancer is None:
            machine = peer.machine
            peer.rebalancer = Rebalancer(machine.name, machine.capacity, self._now, BYTES_PER_TOKEN)
        self._look_later(peer)

    def _look_later(self, peer: Peer) -> None:
        holes = bool(self._view(peer.machine.name).staying().missing())
        self._for(peer, pause_s(self._rng, urgent=holes), self._look)

    def _look(self, peer: Peer) -> None:
        assert peer.rebalancer is not None
        view = self._view(peer.machine.name)
        decision = peer.rebalancer.decide(view, self._now, download_s=peer.fetch_block_s * peer.machine.capacity)
        if isinstance(decision, Move):
            self.moves += 1
            start, end = decision.start, decision.end
            self._say(peer, replace(peer.announced, moving_to=(start, end)))
            self._set_out(peer, view, start, end)
        else:
            self._look_later(peer)


def churn(n_peers: int, n_blocks: int, *, hours: float, lifetime_h: float, seed: int) -> Result:
    """Some `n_peers` peers at a time, each for `lifetime_h` hours on average, whose deaths others make up for."""
    with one_search_for_all():
        return Churn(n_peers, n_blocks, lifetime_h=lifetime_h, seed=seed).run(hours)
