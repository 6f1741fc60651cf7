"""What a peer does next: from tables, from any tables, and a whole run of peers that see each other late and die."""

from __future__ import annotations

import random
from dataclasses import dataclass, field, replace
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mycel.protocols.training import Reduced, StageStatus
from mycel.swarm.training import numbers
from mycel.swarm.training.actions import (
    AddTied,
    Begin,
    Commit,
    Decision,
    Finished,
    Reduce,
    Restore,
    Resync,
    Seal,
    TakeShards,
    TakeSum,
    Uncount,
    Wait,
)
from mycel.swarm.training.members import Members
from mycel.swarm.training.plan import RunPlan
from mycel.swarm.training.step import RESTORE_AFTER_S, Facts, decide, is_stranded, uncovered

RUN = bytes(range(32))
N = 90  # elements of every stage
ALL = 0b1111
CLIP = 2.0


def plan_of(n_stages: int, n_steps: int = 10) -> RunPlan:
    return RunPlan(RUN, tuple((i, i + 1) for i in range(n_stages)), n_steps, 4, 2, 3)


def summed(version: int, name: str = "x", sum_sq: float = 4.0) -> Reduced:
    return Reduced(version, name.encode().ljust(32, b"."), sum_sq)


def status(stage: int = 0, version: int = 3, counted: int = 0, state: str = "training", *sums: Reduced, **more):
    return StageStatus(RUN, 1, stage, state, version, counted=numbers.to_bytes(counted), reduced=sums, **more)


def decided(peers: dict[str, StageStatus], me: str = "b", n_stages: int = 1, clip: float = CLIP, **facts) -> Decision:
    members = Members(me, RUN)
    for peer, said in peers.items():
        members.hear(peer, said, 0.0)
    return decide(plan_of(n_stages), members, Facts(peers[me], N, **facts), clip)


# ---- one rule after the other


def test_it_waits_until_every_number_is_counted():
    decision = decided({"a": status(counted=0b0001), "b": status(counted=0b0110)})
    assert decision == Decision(Wait(), "3 of 4 microbatches are counted")


def test_of_two_who_counted_a_number_the_smaller_id_keeps_it():
    peers = {"a": status(counted=0b0011), "b": status(counted=0b0111), "c": status(counted=0b1101)}
    assert isinstance(decided(peers, "a").action, Wait)
    assert decided(peers, "b").action == Uncount(0b0011)
    assert decided(peers, "c").action == Uncount(0b0101)


def test_what_is_counted_at_another_version_or_stage_or_by_an_observer_does_not_matter():
    peers = {
        "a": status(version=2, counted=0b0011),
        "b": status(counted=0b0011),
        "c": status(stage=1, counted=0b0011),
        "d": status(counted=0b1100, state="observing"),
    }
    assert decided(peers, n_stages=2).reason == "2 of 4 microbatches are counted"


def test_it_sums_up_its_own_shard_first_and_names_the_sets_that_it_saw():
    peers = {"a": status(counted=0b0011), "b": status(counted=0b1100), "c": status(counted=0)}
    assert decided(peers, "b").action == Reduce(((30, 60),), (("a", 0b0011), ("b", 0b1100)))
    assert decided(peers, "c").action == Reduce(((60, 90),), (("a", 0b0011), ("b", 0b1100)))


def test_a_leaver_still_takes_part():
    peers = {"a": status(counted=0b0011, state="leaving"), "b": status(counted=0b1100)}
    assert decided(peers).action == Reduce(((45, 90),), (("a", 0b0011), ("b", 0b1100)))


def test_it_takes_the_other_shards_as_far_as_they_are_missing():
    peers = {"a": status(counted=0b0011), "b": status(counted=0b1100), "c": status()}
    decision = decided(peers, covered=((10, 60),))
    assert decision.action == TakeShards((("a", ((0, 10),)), ("c", ((60, 90),))))


def test_what_nobody_gave_it_sums_up_itself_or_takes_from_who_has_the_whole():
    peers = {"a": status(counted=0b0011), "b": status(counted=0b1100), "c": status()}
    assert decided(peers, covered=((0, 60),), failed=frozenset("c")).action == Reduce(
        ((60, 90),), (("a", 0b0011), ("b", 0b1100))
    )
    peers["a"] = status(0, 3, 0b0011, "training", summed(3))
    assert decided(peers, covered=((0, 60),), failed=frozenset("c")).action == TakeSum(3, summed(3).digest, ("a",))


def test_when_another_has_the_sum_nothing_is_counted_or_taken_back_any_more():
    peers = {"a": status(0, 3, 0b0001, "training", summed(3)), "b": status(counted=0b0001)}
    assert decided(peers).action == TakeSum(3, summed(3).digest, ("a",))


def test_the_whole_sum_is_sealed_or_gets_the_other_share_of_the_table():
    peers = {"a": status(counted=0b0011), "b": status(counted=0b1100), "c": status(stage=1), "d": status(stage=1)}
    whole = {"covered": ((0, N),)}
    assert decided(peers, n_stages=2, **whole).action == Seal()
    decision = decided(peers, n_stages=2, tied_to=1, **whole)
    assert decision == Decision(Wait(), "stage 1, which shares the table, still counts")
    peers["c"] = status(stage=1, counted=ALL)
    assert decided(peers, n_stages=2, tied_to=1, **whole).action == AddTied(("c", "d"))
    peers["d"] = status(1, 4, 0, "training", summed(3))
    assert decided(peers, n_stages=2, tied_to=1, **whole).action == AddTied(("d", "c"))


def test_the_step_is_made_when_all_who_compute_have_their_sums():
    peers = {
        "a": status(0, 3, ALL, "training", summed(3)),
        "b": status(0, 3, 0, "training", summed(3)),
        "c": status(1, 3, ALL, "training", summed(3, "y", sum_sq=12.0)),
    }
    assert decided(peers, n_stages=2) == Decision(Commit(2.0 / (4.0 + 1e-6), 4.0), "all stages have their sums")
    assert decided(peers, n_stages=2, clip=0.0).action == Commit(1.0, 4.0)
    peers["e"] = status(0, 3, 0, "observing")
    assert isinstance(decided(peers, n_stages=2).action, Commit), "an observer is not waited for"
    peers["d"] = status(1, 3, 0, "observing")
    expected = "at stage 1 one peer alone has the sum, and an observer takes it"
    assert decided(peers, n_stages=2) == Decision(Wait(), expected), "unless one would be alone"
    peers["d"] = status(1, 1, 0, "training")
    assert isinstance(decided(peers, n_stages=2).action, Commit), "nor is who is two steps behind"
    for version in (2, 3):
        peers["d"] = status(1, version, 0, "training")
        expected = "1 peers do not have their sum yet, at stage 1 among others"
        assert decided(peers, n_stages=2) == Decision(Wait(), expected)


def test_a_stage_without_anybody_or_without_a_sum_is_waited_for():
    peers = {"b": status(0, 3, ALL, "training", summed(3))}
    assert decided(peers, n_stages=2) == Decision(Wait(), "nobody is at stage 1")
    peers["c"] = status(1, 3, ALL)
    assert decided(peers, n_stages=2) == Decision(Wait(), "stage 1 has not summed up yet")


def test_what_one_has_made_all_make():
    peers = {
        "a": status(0, 4, 0, "training", summed(3)),
        "b": status(0, 3, 0, "training", summed(3)),
        "c": status(1, 3, 0, "training", summed(3)),
        "d": status(1, 3, 0b0001, "training"),
    }
    lone = decided(peers, n_stages=2, clip=0.0)
    assert lone == Decision(Wait(), "1 peers do not have their sum yet, at stage 1 among others"), "it might lie"
    peers["e"] = status(1, 4, 0, "training", summed(3))
    decision = decided(peers, n_stages=2, clip=0.0)
    assert decision == Decision(Commit(1.0, 8.0**0.5), "others have made the step")


def test_who_is_behind_takes_the_sums_and_the_scale_or_else_the_state():
    peers = {"a": status(0, 5, 0, "training", summed(3), summed(4)), "b": status(counted=0b1)}
    assert decided(peers).action == TakeSum(3, summed(3).digest, ("a",))
    peers["b"] = status(0, 3, 0, "training", summed(3))
    assert decided(peers, scale=0.25).action == Commit(0.25, 2.0)
    peers["a"] = status(0, 6, 0, "training", summed(5), summed(6))
    peers["b"] = status(counted=0b1)
    assert decided(peers) == Decision(Resync(), "the stage is at version 6, and nobody keeps the sum of step 3")


def test_the_scale_is_asked_for_when_the_other_stages_no_longer_say_what_it_came_from():
    peers = {
        "a": status(0, 5, 0, "training", summed(3), summed(4)),
        "b": status(0, 3, 0, "training", summed(3)),
        "c": status(1, 5, 0, "training", summed(4), summed(5)),
    }
    assert decided(peers, n_stages=2).action == TakeSum(3, summed(3).digest, ("a",))
    assert decided(peers, n_stages=2, scale=0.5).action == Commit(0.5, 0.0)


def test_sums_that_differ_become_that_of_most_or_of_the_smallest_id_or_of_who_has_stepped():
    a, b, c = (status(0, 3, 0, "training", summed(3, name)) for name in "xyy")
    assert decided({"a": a, "b": b}).action == TakeSum(3, summed(3, "x").digest, ("a",))
    assert isinstance(decided({"a": a, "b": b}, "a").action, Wait)
    assert decided({"a": a, "b": b, "c": c}, "a").action == TakeSum(3, summed(3, "y").digest, ("b", "c"))
    c = status(0, 4, 0, "training", summed(3, "z"))
    assert decided({"a": a, "b": b, "c": c}).action == TakeSum(3, summed(3, "z").digest, ("c",))


def test_who_has_other_parameters_than_most_of_its_stage_fetches_them():
    def with_params(name: str, state: str = "training", version: int = 3):
        return status(0, version, 0, state, params=name.encode().ljust(32))

    x, y = with_params("x"), with_params("y")
    assert decided({"a": x, "b": y, "c": y}, "a").action == Resync()
    assert isinstance(decided({"a": x, "b": y, "c": y}, "b").action, Wait)
    assert decided({"a": x, "b": y}, "b").action == Resync()
    assert isinstance(decided({"a": with_params("x", version=4), "b": y}, "a").action, Wait)
    newcomer = with_params("x", "observing")
    assert decided({"a": newcomer, "b": y}, "a").action == Resync()
    assert isinstance(decided({"a": newcomer, "b": y}, "b").action, Wait), "observers judge nobody"


def test_an_observer_takes_sums_and_computes_at_once_only_where_nobody_does():
    peers = {"a": status(counted=0b0001), "b": status(state="observing")}
    assert isinstance(decided(peers).action, Wait)
    peers["a"] = status(0, 3, 0b0001, "training", summed(3))
    assert decided(peers).action == TakeSum(3, summed(3).digest, ("a",))
    assert decided({"b": status(state="observing")}).action == Begin()


def test_who_has_no_parameters_fetches_them_and_who_has_made_all_steps_is_finished():
    assert decided({"b": status(state="joining")}).action == Resync()
    assert decided({"b": status(version=10)}).action == Finished()
    assert decided({"a": status(version=4), "b": status()}, helpless=True).action == Resync()
    assert isinstance(decided({"a": status(), "b": status()}, helpless=True).action, Wait), "it is not made yet"


def test_everybody_goes_back_when_a_stage_has_lost_steps_but_not_at_once():
    peers = {
        "a": status(0, 7, kept=6),
        "b": status(0, 7, kept=4),
        "c": status(1, 4, 0, "observing", kept=4),
        "d": status(2, 7, kept=6),
    }
    members = Members("b", RUN)
    for peer, said in peers.items():
        members.hear(peer, said, 0.0)
    assert is_stranded(plan_of(3), members, Facts(peers["b"], N))
    assert isinstance(decided(peers, n_stages=3).action, Wait)
    decision = decided(peers, n_stages=3, stranded_s=RESTORE_AFTER_S)
    expected = "stage 1 has lost what it had beyond 4 steps, and everybody goes back to a checkpoint"
    assert decision == Decision(Restore(4), expected)
    assert decided(peers, "c", 3, stranded_s=RESTORE_AFTER_S).action == Begin()
    peers["a"] = status(0, 4, kept=6)
    assert decided(peers, n_stages=3, stranded_s=RESTORE_AFTER_S).action == Restore(4)


def test_one_who_comes_back_from_far_ahead_moves_nobody_but_itself():
    peers = {"a": status(0, 3, 0b0001), "b": status(0, 9), "c": status(1, 3)}
    assert decided(peers, "a", 2).reason == "1 of 4 microbatches are counted"
    assert decided(peers, "b", 2, stranded_s=RESTORE_AFTER_S).action == Restore(3)


def test_uncovered():
    assert uncovered((), 0, 5) == ((0, 5),)
    assert uncovered(((0, 2), (3, 4)), 1, 6) == ((2, 3), (4, 6))
    assert uncovered(((0, 9),), 2, 4) == ()
    assert uncovered(((6, 9),), 2, 4) == ((2, 4),)


# ---- any table

NAMES = "abcdef"


@st.composite
def tables(draw) -> dict[str, StageStatus]:
    peers = {}
    for name in NAMES[: draw(st.integers(1, 6))]:
        version = draw(st.integers(2, 4))
        sums = [summed(v, draw(st.sampled_from("xxxy")), draw(st.sampled_from((1.0, 1.0, 9.0)))) for v in (2, 3, 4)]
        first = draw(st.integers(0, 3))
        peers[name] = status(
            draw(st.integers(0, 1)),
            version,
            draw(st.sampled_from((0, 0b0011, 0b1100, 0b0110, ALL))),
            draw(st.sampled_from(("joining", "observing", "training", "training", "leaving"))),
            *(one for one in sums[first : first + draw(st.integers(0, 2))] if one.version <= version),
        )
    return peers


@given(tables())
@settings(max_examples=150, deadline=None)
def test_no_two_peers_decide_what_contradicts(peers: dict[str, StageStatus]):
    decisions = {me: decided(peers, me, 2) for me in peers}
    for stage in (0, 1):
        for version in (2, 3, 4):
            here = {
                me: decisions[me].action
                for me, said in peers.items()
                if said.stage == stage and said.version == version and said.state in ("training", "leaving")
            }
            for number in range(4):
                having = [me for me in here if numbers.from_bytes(peers[me].counted) >> number & 1]
                if having:
                    keep = [m for m in having if not (isinstance(here[m], Uncount) and here[m].numbers >> number & 1)]
                    assert having[0] in keep, "the smallest id keeps what it counted"
            ranges = sorted(part for action in here.values() if isinstance(action, Reduce) for part in action.ranges)
            assert all(before[1] <= after[0] for before, after in pairwise(ranges))
            if ranges and all(isinstance(action, Reduce) for action in here.values()):
                assert uncovered(ranges, 0, N) == ()
    for me, decision in decisions.items():
        assert decision.reason
        if isinstance(decision.action, Commit):
            _check_commit(peers, me, decision.action)
    for version in (2, 3, 4):
        made = {
            d.action for me, d in decisions.items() if peers[me].version == version and isinstance(d.action, Commit)
        }
        assert len(made) <= 1, "all make a step in the same way"


def _check_commit(peers: dict[str, StageStatus], me: str, commit: Commit) -> None:
    version = peers[me].version
    there = [said for said in peers.values() if said.state != "joining"]
    for stage in (0, 1):
        assert any(
            said.version > version or any(one.version == version for one in said.reduced)
            for said in there
            if said.stage == stage
        ), "every stage has its sum"
    assert any(one.version == version for one in peers[me].reduced)
    assert 0.0 < commit.scale <= 1.0


# ---- a run of peers that see each other late, and die


@dataclass
class Peer:
    """A peer without tensors: sums are names, parameters are the scales that were applied."""

    name: str
    stage: int
    members: Members
    state: str = "observing"
    version: int = 0
    counted: int = 0
    covered: tuple = ()
    finals: dict[int, Reduced] = field(default_factory=dict)
    scales: dict[int, float] = field(default_factory=dict)
    scale: float = 0.0
    failed: set[str] = field(default_factory=set)
    stranded: int = 0
    seq: int = 0

    def status(self) -> StageStatus:
        sums = tuple(self.finals[v] for v in sorted(self.finals))[-2:]
        return replace_seq(status(self.stage, self.version, self.counted, self.state, *sums), self.seq)

    def begin(self, version: int, state: str) -> None:
        self.version, self.state, self.counted, self.covered, self.scale = version, state, 0, (), 0.0
        self.failed.clear()

    def add(self, start: int, end: int) -> None:
        self.covered = tuple(sorted((*self.covered, *uncovered(self.covered, start, end))))


def replace_seq(said: StageStatus, seq: int) -> StageStatus:
    return StageStatus(said.run, seq, said.stage, said.state, said.version, counted=said.counted, reduced=said.reduced)


class Run:
    """Peers that act one at a time, in any order; what they say arrives later, in order of each speaker."""

    def __init__(self, seed: int, n_stages: int, n_steps: int, *, tied: bool) -> None:
        self.rng = random.Random(seed)
        self.plan = plan_of(n_stages, n_steps)
        self.tied = tied
        self.peers: dict[str, Peer] = {}
        self.mail: dict[tuple[str, str], list[StageStatus | None]] = {}
        self.scales: dict[int, float] = {}
        self.ever_summed: set[tuple[int, int]] = set()
        self.n_born = 0

    def born(self, stage: int, state: str = "observing") -> None:
        name = f"p{self.rng.randrange(1000):03}.{self.n_born}"
        self.n_born += 1
        self.peers[name] = Peer(name, stage, Members(name, RUN), state)
        for other in self.peers.values():
            self.say(other)

    def die(self, name: str) -> None:
        del self.peers[name]
        for other in self.peers:
            self.mail.setdefault((name, other), []).append(None)

    def say(self, peer: Peer) -> None:
        peer.seq += 1
        for other in self.peers:
            self.mail.setdefault((peer.name, other), []).append(peer.status())

    def deliver(self, source: str, target: str) -> None:
        said = self.mail[source, target].pop(0)
        if not self.mail[source, target]:
            del self.mail[source, target]
        if target in self.peers and source != target:
            members = self.peers[target].members
            members.lose(source) if said is None else members.hear(source, said, 0.0)

    def facts(self, peer: Peer) -> Facts:
        tied_to = {0: self.plan.n_stages - 1, self.plan.n_stages - 1: 0}.get(peer.stage) if self.tied else None
        facts = Facts(peer.status(), N, peer.covered, tied_to, peer.scale, frozenset(peer.failed))
        peer.stranded = peer.stranded + 1 if is_stranded(self.plan, peer.members, facts) else 0
        return replace(facts, stranded_s=RESTORE_AFTER_S if peer.stranded > 20 else 0.0)

    def act(self, peer: Peer) -> Decision:
        decision = decide(self.plan, peer.members, self.facts(peer), CLIP)
        before = peer.status()
        getattr(self, f"_{type(decision.action).__name__.lower()}")(peer, decision.action)
        if peer.status() != before:
            self.say(peer)
        return decision

    def _wait(self, peer: Peer, _: Wait) -> None:
        peer.failed.clear()

    def _finished(self, peer: Peer, _: Finished) -> None:
        pass

    def _begin(self, peer: Peer, _: Begin) -> None:
        peer.state = "training"

    def _uncount(self, peer: Peer, action: Uncount) -> None:
        peer.counted &= ~action.numbers

    def _reduce(self, peer: Peer, action: Reduce) -> None:
        assert sum(bits for _, bits in action.sources) == ALL, "each number once"
        for name, bits in action.sources:
            other = self.peers.get(name)
            if other is None or other.version != peer.version or other.counted != bits:
                peer.failed.add(name)
                return
        for part in action.ranges:
            peer.add(*part)

    def _takeshards(self, peer: Peer, action: TakeShards) -> None:
        for name, ranges in action.shares:
            for part in ranges:
                if not self._has(name, peer.version, part):
                    peer.failed.add(name)
                    return
                peer.add(*part)

    def _has(self, name: str, version: int, part: tuple[int, int]) -> bool:
        other = self.peers.get(name)
        if other is None:
            return False
        return version in other.finals or (other.version == version and not uncovered(other.covered, *part))

    def _addtied(self, peer: Peer, action: AddTied) -> None:
        for name in action.peers:
            if self._has(name, peer.version, (0, N)):
                self._seal(peer, action)
                return
            peer.failed.add(name)

    def _seal(self, peer: Peer, _: object) -> None:
        assert uncovered(peer.covered, 0, N) == ()
        self._keep(peer, summed(peer.version, f"{peer.stage} {peer.version}", 3.0 + peer.stage))

    def _keep(self, peer: Peer, reduced: Reduced) -> None:
        peer.finals[reduced.version] = reduced
        peer.finals = {v: one for v, one in peer.finals.items() if v > reduced.version - 2}
        self.ever_summed.add((peer.stage, reduced.version))

    def _takesum(self, peer: Peer, action: TakeSum) -> None:
        for name in action.peers:
            other = self.peers.get(name)
            if other is not None and action.version in other.finals:
                peer.scale = other.scales.get(action.version, 0.0)
                self._keep(peer, other.finals[action.version])
                return
            peer.failed.add(name)

    def _commit(self, peer: Peer, action: Commit) -> None:
        version = peer.version
        assert version in peer.finals
        assert all((stage, version) in self.ever_summed for stage in range(self.plan.n_stages))
        assert self.scales.setdefault(version, action.scale) == action.scale
        peer.scales[version] = action.scale
        peer.begin(version + 1, "training" if peer.state == "observing" else peer.state)

    def _resync(self, peer: Peer, _: Resync) -> None:
        donors = [p for p in self.peers.values() if p.stage == peer.stage and p is not peer and p.state != "joining"]
        peer.finals.clear()
        peer.begin(max((p.version for p in donors), default=0), "observing")

    def _restore(self, peer: Peer, action: Restore) -> None:
        here = {p.version for p in self.peers.values() if p.stage == peer.stage}
        peer.finals.clear()
        peer.begin(action.version if action.version in here else 0, peer.state)

    def count(self) -> None:
        """Somebody counts a number that it does not know to be counted: only where a microbatch finds its way."""
        peer = self.rng.choice(list(self.peers.values()))
        stages = {p.stage for p in self.peers.values() if p.version == peer.version and p.state == "training"}
        if peer.state != "training" or len(stages) < self.plan.n_stages or peer.version in peer.finals:
            return
        known = peer.counted
        for mate in peer.members.of_stage(peer.stage):
            known |= mate.counted if mate.version == peer.version and mate.peer != peer.name else 0
        if missing := list(numbers.members(ALL & ~known)):
            peer.counted |= 1 << self.rng.choice(missing)
            self.say(peer)

    def stir(self, n_turns: int, deadly: float) -> None:
        for _ in range(n_turns):
            drawn = self.rng.random()
            if drawn < deadly:
                self.disturb()
            elif drawn < 0.3:
                self.count()
            elif drawn < 0.6 and self.mail:
                self.deliver(*self.rng.choice(list(self.mail)))
            else:
                self.act(self.rng.choice(list(self.peers.values())))
            self.check()

    def disturb(self) -> None:
        if self.rng.random() < 0.5 and len(self.peers) > 1:
            self.die(self.rng.choice(list(self.peers)))
        else:
            self.born(self.rng.randrange(self.plan.n_stages), self.rng.choice(("joining", "observing")))

    def check(self) -> None:
        """One history: whatever anybody applied at a version is what all did."""
        for peer in self.peers.values():
            for version, scale in peer.scales.items():
                assert self.scales[version] == scale

    def finish(self, n_rounds: int = 400) -> None:
        """Nothing more goes wrong: everybody comes to the end."""
        for stage in range(self.plan.n_stages):
            if all(peer.stage != stage for peer in self.peers.values()):
                self.born(stage)
        for _ in range(n_rounds):
            while self.mail:
                self.deliver(*next(iter(self.mail)))
            if all(peer.version == self.plan.n_steps for peer in self.peers.values()):
                return
            for _ in range(20):
                self.count()
            for peer in list(self.peers.values()):
                self.act(peer)
                self.check()
        reasons = {p.name: (p.stage, p.version, p.state, self.act(p).reason) for p in self.peers.values()}
        raise AssertionError(f"no end: {reasons}")


@pytest.mark.parametrize("seed", range(36))
def test_whoever_dies_the_others_come_to_the_end_with_one_history(seed: int):
    run = Run(seed, n_stages=1 + seed % 3, n_steps=5, tied=seed % 3 > 0 and seed % 2 == 0)
    for stage in range(run.plan.n_stages):
        for _ in range(1 + seed % 4):
            run.born(stage)
    run.stir(1000, deadly=(0.0, 0.01, 0.03)[seed % 3])
    run.finish()
