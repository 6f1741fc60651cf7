"""Newcomers go where they help most, and of those that chose at the same moment the first stays."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mycel.protocols.training import StageState, StageStatus
from mycel.swarm.training.members import Member
from mycel.swarm.training.plan import RunPlan
from mycel.swarm.training.stages import capacities, choose_stage, must_yield

RUN = bytes(32)


def plan_of(n_stages: int) -> RunPlan:
    return RunPlan(RUN, tuple((s, s + 1) for s in range(n_stages)), 10, 4, 1, 8)


def member(peer: str, stage: int, state: StageState = "training", rate: float = 1.0, moving_to: int = -1) -> Member:
    return Member(peer, StageStatus(RUN, 0, stage, state, 0, sequences_per_s=rate, moving_to=moving_to), 0.0)


def test_a_stage_without_peers_comes_first() -> None:
    here = [member("a", 0), member("b", 2, rate=0.01)]
    assert choose_stage(plan_of(3), here, "me") == (1, "nobody holds it")


def test_then_the_stage_that_computes_least() -> None:
    here = [member("a", 0, rate=2.0), member("b", 1, rate=1.0), member("c", 1, rate=0.5), member("d", 2, rate=4.0)]
    stage, reason = choose_stage(plan_of(3), here, "me")
    assert stage == 1
    assert reason == "it computes least: 1.5 sequences a second, a stage on average 2.5"


def test_who_is_on_the_way_counts_where_it_goes_with_a_typical_rate() -> None:
    plan = plan_of(2)
    here = [member("a", 0, rate=3.0), member("b", 1, rate=3.0), member("c", 1, "joining", rate=0.0)]
    assert capacities(plan, here) == [3.0, 6.0]
    assert choose_stage(plan, here, "me")[0] == 0
    moving = [*here, member("d", 1, rate=5.0, moving_to=0)]
    assert capacities(plan, moving) == [8.0, 6.0]
    assert choose_stage(plan, moving, "me")[0] == 1


def test_who_leaves_does_not_count_and_nor_does_oneself() -> None:
    plan = plan_of(2)
    assert choose_stage(plan, [member("a", 0), member("b", 1, "leaving")], "me")[0] == 1
    assert choose_stage(plan, [member("a", 0), member("me", 1, "joining")], "me")[0] == 1


def test_a_stage_that_the_plan_does_not_have_is_ignored() -> None:
    assert capacities(plan_of(2), [member("a", 63), member("b", 0, moving_to=40)]) == [0.0, 0.0]


def test_newcomers_that_see_nobody_spread_over_the_stages() -> None:
    plan = plan_of(4)
    chosen = [choose_stage(plan, [], f"peer {i}")[0] for i in range(400)]
    assert min(chosen.count(stage) for stage in range(4)) > 70
    assert chosen[:9] == [choose_stage(plan, [], f"peer {i}")[0] for i in range(9)]


def test_of_two_at_the_same_hole_the_first_stays_and_the_other_takes_the_next() -> None:
    plan = plan_of(3)
    here = [member("p", 0), member("a", 1, "joining", 0.0), member("b", 1, "joining", 0.0)]
    assert must_yield(plan, here, "a") is None
    assert must_yield(plan, here, "b") == "chooses again: a came first to stage 1, and nobody holds stage 2"
    assert must_yield(plan, here, "p") is None, "who has its state is on no way"


def test_a_newcomer_stays_beside_the_first_if_no_other_stage_is_weaker() -> None:
    plan = plan_of(2)
    two = [member("p", 0), member("q", 0), member("a", 1, "joining", 0.0), member("b", 1, "joining", 0.0)]
    assert must_yield(plan, two, "b") is None
    one = [
        member("p", 0),
        member("q", 1),
        member("r", 1),
        member("a", 1, "joining", 0.0),
        member("b", 1, "joining", 0.0),
    ]
    assert must_yield(plan, one, "b") == "chooses again: a came first to stage 1, and stage 0 computes less"


def test_who_has_been_lost_from_the_table_keeps_its_choice() -> None:
    assert must_yield(plan_of(2), [member("a", 0, "joining")], "b") is None


@given(
    st.integers(1, 6),
    st.lists(st.tuples(st.integers(0, 5), st.sampled_from([0.5, 1.0, 4.0])), max_size=8),
    st.lists(st.integers(0, 5), min_size=1, max_size=10),
)
def test_yielding_ends_and_covers_what_it_can(
    n_stages: int, settled: list[tuple[int, float]], chosen: list[int]
) -> None:
    """However newcomers chose in ignorance: all look again and again, and come to rest without a needless hole."""
    plan = plan_of(n_stages)
    there = [member(f"s{i}", stage % n_stages, rate=rate) for i, (stage, rate) in enumerate(settled)]
    goals = {f"n{i}": stage % n_stages for i, stage in enumerate(chosen)}
    for _ in range(len(goals) + 1):
        table = [*there, *(member(peer, stage, "joining", 0.0) for peer, stage in goals.items())]
        yielding = {peer for peer in goals if must_yield(plan, table, peer)}
        if not yielding:
            break
        before = {peer: [m for m in table if m.status.state != "joining" or m.peer < peer] for peer in yielding}
        goals |= {peer: choose_stage(plan, before[peer], peer)[0] for peer in yielding}
    else:
        pytest.fail("newcomers go on yielding to each other")
    held = {m.stage for m in there} | set(goals.values())
    crowded = [stage for stage in goals.values() if list(goals.values()).count(stage) > 1]
    assert len(held) == n_stages or not crowded
