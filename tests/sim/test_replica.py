"""Replicas in virtual time: every method, and everybody who is late, lies, dies or comes later; one state for all.

That all have the same state after every round is checked by the rig, in every test.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import trio

from mycel.node.training.shared_state import load_shared
from mycel.security.attacks import play
from mycel.swarm.methods.outer import SharedState
from tests.sim.replica_rig import LAYOUT, ReplicaSwarm, distance, replica_world

DILOCO = {"name": "diloco", "inner_steps": 8, "rate": 0.7, "momentum": 0.5}
STREAMING = {"name": "streaming", "inner_steps": 8, "fragments": 2, "delay": 1, "rate": 0.7, "mix": 0.0}
EAGER = {"name": "eager", "inner_steps": 8, "rate": 0.7, "momentum": 0.5}
OTHERS = [
    {"name": "streaming", "inner_steps": 8, "fragments": 2, "delay": 7, "rate": 0.7, "mix": 0.0},
    {"name": "streaming", "inner_steps": 2, "fragments": 2, "delay": 1, "rate": 0.7, "mix": 0.0},
    {"name": "sparseloco", "inner_steps": 8},
    {"name": "data-parallel", "optimizer": "sgd", "rate": 0.1, "momentum": 0.0},
    {"name": "data-parallel", "rate": 0.1, "delay": 1},
    {"name": "demo", "rate": 0.05},
]
FIRST = distance(torch.zeros(LAYOUT.n_elements))


@pytest.mark.parametrize(
    "options",
    [DILOCO, EAGER, *(pytest.param(options, marks=pytest.mark.slow) for options in (STREAMING, *OTHERS))],
    ids=lambda options: f"{options['name']}-{options.get('delay', 0)}",
)
def test_every_method_learns_and_all_hold_the_same(tmp_path: Path, options: dict[str, object]) -> None:
    async def body(swarm: ReplicaSwarm) -> None:
        for name in "abc":
            swarm.start(name)
        await swarm.until(10)

    swarm = replica_world(tmp_path, body, options, n_rounds=10, min_members=3, contributors=1.0)
    assert len({peer.method.state.digest() for peer in swarm.peers.values()}) == 1
    # Sparse ones have sent a part of what they know, and steps by the sign go so far and no further.
    most = {"sparseloco": 0.75, "demo": 0.9, "streaming": 0.8}.get(str(options["name"]), 0.5)
    assert distance(swarm.peers["a"].method.state.theta_P) < most * FIRST
    for peer in swarm.peers.values():
        assert peer.work is not None
        assert [done.version for done in peer.applied] == [*range(1, 11)]
        assert all(done.accepted and done.loss is not None and done.contributors == 3 for done in peer.applied)
        assert len(set(peer.work.drawn)) == len(peer.work.drawn), "a batch was drawn twice"
    assert not swarm.events("peer.named")
    assert not swarm.events("round.refused")


@pytest.mark.slow
def test_eager_never_waits_and_diloco_does(tmp_path: Path) -> None:
    """With links that take long, work goes on while the round travels: steps made for the same number of results."""

    def steps(options: dict[str, object], folder: str) -> float:
        async def body(swarm: ReplicaSwarm) -> None:
            for name in "ab":
                swarm.start(name, step_s=0.02)
            await swarm.until(3)
            began_s = trio.current_time()
            await swarm.until(8)
            took_s.append(trio.current_time() - began_s)

        took_s: list[float] = []
        replica_world(tmp_path / folder, body, options, min_members=2, contributors=1.0)
        return took_s[0]

    diloco, eager = steps(DILOCO, "d"), steps(EAGER, "e")
    assert eager < diloco
    assert eager >= 5 * 8 * 0.02 - 1e-9


def test_a_liar_does_no_harm_under_a_robust_rule(tmp_path: Path) -> None:
    ends: list[float] = []

    async def body(swarm: ReplicaSwarm) -> None:
        for name in "abcd":
            swarm.start(name)
        swarm.start("e", twist=play("x1000"))
        await swarm.all_in(*"abcde")
        await swarm.until(max(peer.version for peer in swarm.living()) + 4)
        ends.append(distance(swarm.peers["a"].method.state.theta_P))

    swarm = replica_world(tmp_path, body, DILOCO, min_members=5, rule="caf", liars=0.2)
    assert ends[0] < 0.5 * FIRST
    assert any(done.accepted for done in swarm.peers["e"].applied)


@pytest.mark.slow
def test_what_is_no_vector_is_left_out_by_any_rule(tmp_path: Path) -> None:
    async def body(swarm: ReplicaSwarm) -> None:
        for name in "abc":
            swarm.start(name)
        swarm.start("d", twist=play("nan"))
        await swarm.all_in(*"abcd")
        await swarm.until(max(peer.version for peer in swarm.living()) + 4)

    swarm = replica_world(tmp_path, body, DILOCO, min_members=4, rule="mean")
    assert distance(swarm.peers["a"].method.state.theta_P) < FIRST


@pytest.mark.slow
@pytest.mark.parametrize("options", [DILOCO, STREAMING, EAGER], ids=lambda options: str(options["name"]))
def test_who_comes_late_takes_the_state_of_the_others(tmp_path: Path, options: dict[str, object]) -> None:
    async def body(swarm: ReplicaSwarm) -> None:
        for name in "abc":
            swarm.start(name)
        await swarm.until(14)
        late = swarm.start("d")
        await swarm.all_in(*"abcd")
        await swarm.when(lambda: sum(done.accepted for done in late.applied) >= 3)

    swarm = replica_world(tmp_path, body, options, min_members=3)
    assert swarm.events("round.state", "d")
    assert not swarm.events("round.state", "a")
    assert swarm.peers["d"].applied[0].version > 10
    assert not swarm.events("peer.named")


@pytest.mark.slow
@pytest.mark.parametrize("options", [DILOCO, STREAMING, EAGER], ids=lambda options: str(options["name"]))
def test_who_is_killed_goes_on_from_its_own_disk(tmp_path: Path, options: dict[str, object]) -> None:
    async def body(swarm: ReplicaSwarm) -> None:
        for name in "abcd":
            swarm.start(name)
        await swarm.all_in(*"abcd")
        await swarm.until(4)
        before = swarm.peers["d"].version
        swarm.crash("d")
        await swarm.until(before + 2)
        again = swarm.start("d")
        assert before <= again.version <= before + 1, "its state was on disk"
        await swarm.when(lambda: sum(done.accepted for done in again.applied) >= 2)

    swarm = replica_world(tmp_path, body, options, min_members=3, absences=10)
    assert not swarm.events("round.state")
    assert not swarm.events("peer.named")


@pytest.mark.parametrize("moment", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_all_are_killed_in_the_midst_of_a_round_and_go_on(tmp_path: Path, moment: int) -> None:
    """Once when all have offered; once when all are bound by their votes to results that they alone have."""
    in_time = [
        lambda peer: peer.replica.group.times.get("offered"),
        lambda peer: peer.replica.group._driver.machine._attempts.voting.valid is not None,
    ][moment]
    reached: list[int] = []

    async def body(swarm: ReplicaSwarm) -> None:
        for name in "abc":
            swarm.start(name, step_s=0.02)
        await swarm.all_in(*"abc")
        await swarm.until(2)
        while not all(map(in_time, swarm.living())):  # noqa: ASYNC110 - nobody tells of it
            await trio.sleep(0.001)
        reached.append(max(peer.version for peer in swarm.living()))
        swarm.crash(*"abc")
        await trio.sleep(5.0)
        for name in "abc":
            swarm.start(name, step_s=0.02)
        assert {peer.version for peer in swarm.living()} == {reached[0]}
        await swarm.until(reached[0] + 2)

    swarm = replica_world(tmp_path, body, DILOCO, min_members=3)
    assert distance(swarm.peers["a"].method.state.theta_P) < FIRST
    assert not swarm.events("peer.named")


@pytest.mark.slow
def test_who_is_slow_does_less_and_is_in_time_then(tmp_path: Path) -> None:
    async def body(swarm: ReplicaSwarm) -> None:
        for name in "abc":
            swarm.start(name)
        swarm.start("d", step_s=0.5)
        await swarm.all_in(*"abcd")
        await swarm.until(16)

    swarm = replica_world(tmp_path, body, DILOCO, min_members=4, longest_grace_s=0.5, absences=100)
    slow = swarm.peers["d"]
    sized = [fields["steps"] for fields in swarm.events("round.sized", "d")]
    assert sized
    assert sized[0] < 8
    assert sum(done.accepted for done in slow.applied[6:]) >= 4
    staleness = {number: contribution.staleness for number, contribution in slow.offered}
    assert max(staleness.values()) > 0
    assert any(done.accepted and staleness[done.round] for done in slow.applied if done.round in staleness)
    assert {contribution.weight for _, contribution in slow.offered} - {1 << 20}, "it stated what it did"


def test_work_that_comes_to_nothing_finite_begins_anew(tmp_path: Path) -> None:
    async def body(swarm: ReplicaSwarm) -> None:
        swarm.start("a")
        swarm.start("b", spoiled_at=20)
        await swarm.until(8)

    swarm = replica_world(tmp_path, body, DILOCO, n_rounds=8, min_members=2)
    spoiled = swarm.peers["b"]
    assert len(swarm.events("round.diverged", "b")) == 1
    assert spoiled.work is not None
    assert spoiled.work.n_forgotten == 1
    assert spoiled.applied[-1].accepted
    assert distance(spoiled.method.state.theta_P) < 0.5 * FIRST


def test_who_has_no_text_looks_on_and_answers_with_the_newest(tmp_path: Path) -> None:
    async def body(swarm: ReplicaSwarm) -> None:
        for name in "ab":
            swarm.start(name)
        observer = swarm.start("c", works=False)
        await swarm.until(6)
        assert not observer.replica.group.is_member
        assert torch.equal(observer.shown_P, observer.method.state.theta_P)

    swarm = replica_world(tmp_path, body, DILOCO, min_members=2)
    assert not any(done.accepted for done in swarm.peers["c"].applied)


@pytest.mark.slow
def test_a_run_that_is_over_is_there_for_who_comes_then(tmp_path: Path) -> None:
    async def body(swarm: ReplicaSwarm) -> None:
        for name in "ab":
            swarm.start(name)
        await swarm.until(12)
        await trio.sleep(100.0)
        late = swarm.start("c")
        await swarm.until(12)
        await swarm.when(lambda: bool(swarm.events("round.state_taken", "c")))
        await trio.sleep(1.0)
        assert late.method.state.digest() == swarm.peers["a"].method.state.digest()
        for peer in swarm.living():
            assert peer.version == 12
            assert peer.work is not None
            assert torch.equal(peer.work.params_P, peer.method.state.theta_P)

    replica_world(tmp_path, body, DILOCO, n_rounds=12, min_members=2)


@pytest.mark.slow
def test_who_leaves_is_not_waited_for(tmp_path: Path) -> None:
    async def body(swarm: ReplicaSwarm) -> None:
        for name in "abcd":
            swarm.start(name)
        await swarm.all_in(*"abcd")
        await swarm.peers["d"].replica.leave()
        swarm.crash("d")
        await swarm.all_in(*"abc")
        began_s, version = trio.current_time(), swarm.peers["a"].version
        await swarm.until(version + 3)
        assert trio.current_time() - began_s < 10.0
        # The last one has nobody to tell.
        swarm.crash("b", "c")
        await swarm.when(lambda: not swarm.peers["a"].replica.group.present)
        await swarm.peers["a"].replica.leave()

    replica_world(tmp_path, body, DILOCO, min_members=3)


def test_the_state_on_disk_is_that_after_its_round(tmp_path: Path) -> None:
    async def body(swarm: ReplicaSwarm) -> None:
        for name in "ab":
            swarm.start(name)
        await swarm.until(4)
        swarm.crash(*"ab")

    swarm = replica_world(tmp_path, body, DILOCO, min_members=2)
    for name in "ab":
        state = SharedState(torch.zeros(LAYOUT.n_elements), 1)
        number = load_shared(tmp_path / name / "shared.state", state)
        assert number is not None
        assert state.digest() == swarm.digests[number]
