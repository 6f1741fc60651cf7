"""Stages of a training run over simulated hours while peers come and go: what rebalancing is worth.

    python -m benchmarks.training_churn --seeds 3

64 peers hold 8 stages. Each lives for 6 hours on average (exponentially) and is replaced by a newcomer, which takes a
stage at random or by mycel/swarm/training/stages.py and computes when it has fetched its state. Those that train move
by mycel/swarm/training/moving.py. The throughput is that of the least stage, the optimum the sum of all rates over the
number of stages: as if peers could be divided, and no state ever had to be fetched.

How much work waits where is that of a closed network of queues with a fixed number of microbatches under way, by mean
value analysis (Reiser and Lavenberg 1980), times noise. Statuses arrive at once: tests/swarm/test_moving.py has those
that do not.
"""

from __future__ import annotations

import argparse
import heapq
import statistics
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from random import Random
from unittest import mock

from mycel.protocols.training import StageState, StageStatus
from mycel.swarm.training import moving
from mycel.swarm.training.members import Member
from mycel.swarm.training.moving import Move, Mover, Stay, must_go_back
from mycel.swarm.training.plan import RunPlan
from mycel.swarm.training.stages import SETTLE_S, choose_stage

HOUR_S = 3600.0
FETCH_S = 60.0
# Microbatches under way for each peer.
UNDER_WAY = 2
# Queues are averages over so long, and still off by this factor (standard deviation of its logarithm).
NOISE_S = 10.0
NOISE = 0.3
EQUAL = (1.0,)
UNEQUAL = (1.0, 2.0, 4.0, 8.0)
RUN = bytes(32)


@dataclass(frozen=True, slots=True)
class Case:
    """`period_s` is how often peers look whether to move, None for never; `greedy`: newcomers choose, or draw lots."""

    period_s: float | None
    greedy: bool = False
    speeds: tuple[float, ...] = EQUAL
    n_peers: int = 64
    n_stages: int = 8
    hours: float = 32.0
    lifetime_h: float = 6.0


@dataclass(frozen=True, slots=True)
class Result:
    """Throughput over the optimum: of all hours, and of the last one."""

    share: float
    last_share: float
    moves: int
    deaths: int


@dataclass(eq=False, slots=True)
class Peer:
    """One peer in truth."""

    name: str
    rate: float
    stage: int
    state: StageState = "training"
    moving_to: int = -1
    alive: bool = True
    mover: Mover | None = None
    looks: int = 0


@dataclass(eq=False)
class Churn:
    """The simulation: events in the order of their times."""

    case: Case
    seed: int
    now: float = 0.0
    moves: int = 0
    deaths: int = 0
    peers: dict[str, Peer] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.rng = Random(self.seed)
        self.plan = RunPlan(RUN, tuple((s, s + 1) for s in range(self.case.n_stages)), 1, 1, 1, 1)
        self._agenda: list[tuple[float, int, Callable[[], None]]] = []
        self._n_events = 0
        self._table: tuple[Member, ...] = ()
        self._table_until = -1.0
        for _ in range(self.case.n_peers):
            self._begin(self._new_peer())

    def run(self) -> Result:
        """All hours, from a run whose peers train already."""
        ends = self.case.hours * HOUR_S
        done = best = last_done = last_best = 0.0
        while self.now < ends:
            until = min(self._agenda[0][0], ends)
            rate, limit = self.throughput(), self.optimum()
            done += rate * (until - self.now)
            best += limit * (until - self.now)
            last_s = max(until - max(self.now, ends - HOUR_S), 0.0)
            last_done += rate * last_s
            last_best += limit * last_s
            self.now = until
            if until < ends:
                heapq.heappop(self._agenda)[2]()
        return Result(done / best, last_done / last_best, self.moves, self.deaths)

    def throughput(self) -> float:
        return min(self._capacities())

    def optimum(self) -> float:
        return sum(peer.rate for peer in self.peers.values()) / self.case.n_stages

    def _capacities(self) -> list[float]:
        held = [0.0] * self.case.n_stages
        for peer in self.peers.values():
            held[peer.stage] += peer.rate * (peer.state == "training")
        return held

    # ---- what is known

    def members(self) -> tuple[Member, ...]:
        """Everybody's newest status."""
        if self.now >= self._table_until:
            held = self._capacities()
            queues = mean_queues(
                [sum(p.stage == s and p.state == "training" for p in self.peers.values()) for s in range(len(held))],
                held,
                UNDER_WAY * len(self.peers),
            )
            self._table = tuple(self._member(peer, queues[peer.stage]) for peer in self.peers.values())
            self._table_until = self.now + NOISE_S
        return self._table

    def _member(self, peer: Peer, queue: float) -> Member:
        training = peer.state == "training"
        queue_s = queue / peer.rate * self.rng.lognormvariate(0.0, NOISE) if training else 0.0
        status = StageStatus(
            RUN,
            0,
            peer.stage,
            peer.state,
            0,
            queue_s=queue_s,
            sequences_per_s=peer.rate if training else 0.0,
            moving_to=peer.moving_to,
        )
        return Member(peer.name, status, self.now)

    # ---- what happens

    def _at(self, after_s: float, event: Callable[[], None]) -> None:
        self._n_events += 1
        heapq.heappush(self._agenda, (self.now + after_s, self._n_events, event))

    def _for(self, peer: Peer, after_s: float, event: Callable[[Peer], None]) -> None:
        """An event of a peer's life, if it still lives then."""
        self._at(after_s, lambda: event(peer) if peer.alive else None)

    def _new_peer(self) -> Peer:
        name = f"{self.rng.getrandbits(40):010x}"
        rate = self.rng.choice(self.case.speeds)
        stage = self.rng.randrange(self.case.n_stages)
        if self.case.greedy:
            stage, _ = choose_stage(self.plan, self.members(), name)
        peer = self.peers[name] = Peer(name, rate, stage)
        self._changed()
        self._for(peer, self.rng.expovariate(1.0 / (self.case.lifetime_h * HOUR_S)), self._die)
        return peer

    def _changed(self) -> None:
        self._table_until = -1.0

    def _die(self, peer: Peer) -> None:
        peer.alive = False
        self.deaths += 1
        del self.peers[peer.name]
        self._changed()
        newcomer = self._new_peer()
        newcomer.state = "joining"
        self._for(newcomer, FETCH_S, self._begin)

    def _begin(self, peer: Peer) -> None:
        peer.state = "training"
        self._changed()
        if self.case.period_s is not None:
            # The first look of the peers with which the simulation began is at any time of a period.
            since_s = self.now if self.now else -self.rng.uniform(0.0, self.case.period_s)
            peer.mover = Mover(peer.name, since_s, self.case.period_s)
            self._look_later(peer)

    def _look_later(self, peer: Peer) -> None:
        assert peer.mover is not None
        due_s = peer.mover.due_s(empty=0.0 in self._capacities())
        self._for(peer, max(due_s - self.now, 0.001), self._look)

    def _look(self, peer: Peer) -> None:
        assert peer.mover is not None
        decision = peer.mover.decide(self.plan, self.members(), self.now, fetch_s=FETCH_S)
        if isinstance(decision, Move):
            peer.moving_to = decision.target
            self._changed()
            self._for(peer, SETTLE_S, self._leave)
        else:
            self._look_later(peer)

    def _leave(self, peer: Peer) -> None:
        """Pessimistic: it has no memory for two stages, so it fetches after it has left."""
        if must_go_back(self.plan, self.members(), peer.name):
            peer.moving_to = -1
            self._changed()
            self._look_later(peer)
            return
        self.moves += 1
        peer.stage, peer.state, peer.moving_to = peer.moving_to, "joining", -1
        self._changed()
        self._for(peer, FETCH_S, self._begin)


def mean_queues(n_peers: list[int], held: list[float], under_way: int) -> list[float]:
    """Mean number of microbatches at each peer of each stage: a closed network of single servers in a cycle.

    Peers of a stage get work by their rates, so that each has the same load: 1 / held[stage] seconds a microbatch.
    """
    stages = [s for s, rate in enumerate(held) if rate]
    queues = [0.0] * len(held)
    if len(stages) < len(held):  # nothing moves, and all work waits before the empty stage
        return queues
    for n_under_way in range(1, under_way + 1):
        waits_s = {s: (1.0 + queues[s]) / held[s] for s in stages}
        rate = n_under_way / sum(n_peers[s] * waits_s[s] for s in stages)
        for s in stages:
            queues[s] = rate * waits_s[s]
    return queues


def one_look_for_all() -> mock._patch:
    """Peers with the same statuses name the same mover: find it once."""
    known: list[tuple[tuple[Member, ...], Move | Stay]] = []
    find = moving.best_move

    def found(plan: RunPlan, members: Iterable[Member]) -> Move | Stay:
        assert isinstance(members, tuple)
        if not known or known[0][0] is not members:
            known[:] = [(members, find(plan, members))]
        return known[0][1]

    return mock.patch.object(moving, "best_move", found)


def churn(case: Case, seed: int) -> Result:
    """One run."""
    with one_look_for_all():
        return Churn(case, seed).run()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--hours", type=float, default=32.0)
    options = parser.parse_args()
    for speeds, what in ((EQUAL, "equal speeds"), (UNEQUAL, "speeds 1:2:4:8")):
        print(f"{what}, {options.seeds} seeds, {options.hours:g} hours; throughput over the optimum:")
        none = 0.0
        for greedy in (False, True):
            for period_s in (None, 300.0, 60.0):
                case = Case(period_s, greedy, speeds, hours=options.hours)
                found = [churn(case, seed) for seed in range(1, options.seeds + 1)]
                share = statistics.fmean(result.share for result in found)
                none = none or share
                each = " ".join(f"{result.share:.3f}" for result in found)
                last = statistics.fmean(result.last_share for result in found)
                newcomers = "choose" if greedy else "at random"
                looks = "no rebalancing" if period_s is None else f"every {period_s:3.0f} s"
                print(
                    f"  newcomers {newcomers:9}, {looks:14}: {share:.3f} ({each}), last hour {last:.3f}, "
                    f"{share / none:.2f} times none, {found[0].moves} moves for {found[0].deaths} deaths"
                )


if __name__ == "__main__":
    main()
