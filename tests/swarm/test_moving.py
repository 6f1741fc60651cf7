"""Peers that train move to where work waits most: one at a time, worth it, and all name the same one."""

from __future__ import annotations

import random
from dataclasses import replace

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.training_churn import UNEQUAL, Case, churn, mean_queues
from mycel.protocols.training import StageState, StageStatus
from mycel.swarm.training.members import Member
from mycel.swarm.training.moving import HASTE, PERIOD_S, Move, Mover, Stay, best_move, must_go_back
from mycel.swarm.training.plan import RunPlan
from mycel.swarm.training.stages import capacities

RUN = bytes(32)


def plan_of(n_stages: int) -> RunPlan:
    return RunPlan(RUN, tuple((s, s + 1) for s in range(n_stages)), 10, 4, 1, 8)


def member(
    peer: str,
    stage: int,
    queue_s: float = 0.0,
    *,
    rate: float = 1.0,
    state: StageState = "training",
    moving_to: int = -1,
) -> Member:
    status = StageStatus(RUN, 0, stage, state, 0, queue_s=queue_s, sequences_per_s=rate, moving_to=moving_to)
    return Member(peer, status, 0.0)


UNEVEN = [
    *(member(peer, 0, queue_s) for peer, queue_s in (("a", 0.3), ("b", 0.1), ("c", 0.2))),
    *(member(peer, 1, 1.0) for peer in "de"),
    member("f", 2, 9.0),
]


def test_the_shortest_queue_of_the_emptiest_stage_goes_to_the_fullest() -> None:
    assert best_move(plan_of(3), UNEVEN) == Move(
        "b",
        0,
        2,
        "most work waits at stage 2, least at stage 0: the lesser of the two rises from 1 to 2 sequences a second",
    )


def test_everybody_names_the_same_mover() -> None:
    shuffled = random.Random(3).sample(UNEVEN, len(UNEVEN))
    assert best_move(plan_of(3), shuffled) == best_move(plan_of(3), UNEVEN)
    equal = [member(peer, 0, 0.2) for peer in "zyx"] + [member("f", 1, 9.0)]
    assert best_move(plan_of(2), equal).peer == "x", "the least id of equals"


def test_only_one_moves_at_a_time_in_the_whole_run() -> None:
    busy = [*UNEVEN, member("z", 1, 1.0, moving_to=2)]
    assert best_move(plan_of(3), busy) == Stay("z is moving to stage 2")


def test_a_stage_is_never_emptied() -> None:
    lone = [member("a", 0, 0.0, rate=9.0), member("b", 1, 9.0, rate=1.0), member("c", 0, state="joining", rate=9.0)]
    assert isinstance(best_move(plan_of(2), lone), Stay)


def test_a_move_has_to_raise_the_weak_stage_by_its_share() -> None:
    even = [member("a", 0, 0.0), member("b", 0, 0.0), member("c", 1, 5.0), member("d", 1, 5.0)]
    assert best_move(plan_of(2), even) == Stay(
        "no move raises stage 1, where most work waits, by 1/4 of what it computes"
    )
    slow = [member("a", 0, rate=9.0), member("b", 0, rate=0.5), member("c", 1, 9.0, rate=3.0)]
    assert isinstance(best_move(plan_of(2), slow), Stay), "0.5 of 3 is less than a third"


def test_a_long_queue_of_few_is_fuller_than_short_queues_of_many() -> None:
    many = [member(f"m{i}", 0, 1.0) for i in range(9)]
    few = [member("f", 1, 4.0, rate=2.0)]
    spare = [member(f"s{i}", 2, 0.1) for i in range(6)]
    assert best_move(plan_of(3), [*many, *few, *spare]).target == 1


def test_of_a_stage_the_peer_moves_that_helps_most() -> None:
    table = [
        member("a", 0, rate=1.0),
        member("b", 0, 0.1, rate=4.0),
        member("c", 0, rate=8.0),
        member("d", 1, 9.0, rate=2.0),
    ]
    assert best_move(plan_of(2), table).peer == "b", "with 4 both have at least 6; with 8 the source would keep 5"


def test_an_empty_stage_comes_before_all() -> None:
    table = [member("a", 0, 0.0), member("b", 0, 0.0), member("c", 2, 50.0)]
    assert best_move(plan_of(3), table) == Move("a", 0, 1, "nobody holds stage 1")


def test_before_the_first_step_somebody_goes_to_a_stage_that_nobody_holds() -> None:
    waiting = [member(peer, stage, state="observing") for peer, stage in (("a", 0), ("b", 1), ("c", 1))]
    move = best_move(plan_of(3), waiting)
    assert move == Move("b", 1, 2, "nobody holds stage 2")
    assert must_go_back(plan_of(3), [moving(waiting[1], 2), waiting[0], waiting[2]], "b") is None
    # Where nothing is missing an observer is a newcomer, and stays one.
    assert isinstance(best_move(plan_of(2), [waiting[0], waiting[1], waiting[2]]), Stay)


def test_a_peer_looks_once_a_period_and_oftener_while_a_stage_is_empty() -> None:
    mover = Mover("b", 100.0)
    assert mover.decide(plan_of(3), UNEVEN, 100.0 + PERIOD_S - 1.0, fetch_s=1.0) == Stay("looks again in 1 s")
    assert isinstance(mover.decide(plan_of(3), UNEVEN, 100.0 + PERIOD_S, fetch_s=1.0), Move)
    assert isinstance(mover.decide(plan_of(3), UNEVEN, 101.0 + PERIOD_S, fetch_s=1.0), Stay)
    hole = [m for m in UNEVEN if m.stage != 2]
    assert isinstance(Mover("b", 0.0).decide(plan_of(3), hole, PERIOD_S / HASTE, fetch_s=1e6), Move)


def test_the_named_one_moves_and_the_others_know_it() -> None:
    assert Mover("a", 0.0).decide(plan_of(3), UNEVEN, PERIOD_S, fetch_s=1.0) == Stay("b is to move to stage 2")


def test_who_has_come_only_now_stays_for_two_fetches() -> None:
    mover = Mover("b", 0.0)
    stay = mover.decide(plan_of(3), UNEVEN, PERIOD_S, fetch_s=400.0)
    assert stay == Stay("has come only now: may move to stage 2 in 500 s")
    assert isinstance(mover.decide(plan_of(3), UNEVEN, 3 * PERIOD_S, fetch_s=400.0), Move)


def test_of_two_that_move_at_once_the_first_goes_on() -> None:
    table = [m if m.peer not in "ab" else moving(m, 2) for m in UNEVEN]
    assert must_go_back(plan_of(3), table, "a") is None
    assert must_go_back(plan_of(3), table, "b") == "stays in stage 0: a moves at the same time and comes first"


def test_a_mover_stays_when_the_others_have_died_or_the_target_has_got_help() -> None:
    alone = [moving(member("a", 0), 1), member("d", 1, 1.0)]
    assert must_go_back(plan_of(2), alone, "a") == "stays in stage 0: nobody else holds it any more"
    helped = [moving(member("a", 0), 1), member("b", 0), member("d", 1), member("e", 1, state="joining")]
    assert must_go_back(plan_of(2), helped, "a") == "stays in stage 0: it computes less than stage 1 by now"
    assert must_go_back(plan_of(2), helped, "gone") is None


def moving(one: Member, target: int) -> Member:
    return replace(one, status=msgspec.structs.replace(one.status, moving_to=target))


@given(
    st.integers(2, 6),
    st.lists(st.tuples(st.integers(0, 5), st.sampled_from([1.0, 2.0, 4.0, 8.0])), min_size=2, max_size=30),
    st.integers(0, 2**32),
)
def test_moves_raise_the_weakest_and_end_whatever_the_queues_say(
    n_stages: int, peers: list[tuple[int, float]], seed: int
) -> None:
    plan, rng = plan_of(n_stages), random.Random(seed)
    table = [member(f"p{i:02}", stage % n_stages, rate=rate) for i, (stage, rate) in enumerate(peers)]
    for _ in range(40 * len(table)):
        table = [member(m.peer, m.stage, rng.random(), rate=m.status.sequences_per_s) for m in table]
        before = capacities(plan, table)
        move = best_move(plan, table)
        if isinstance(move, Stay):
            continue
        table = [
            member(m.peer, move.target if m.peer == move.peer else m.stage, rate=m.status.sequences_per_s)
            for m in table
        ]
        after = capacities(plan, table)
        assert sorted(after) > sorted(before), "the weakest stages rise, in order"
        assert min(after[move.source], after[move.target]) > before[move.target]
    held = capacities(plan, table)
    assert len(peers) < n_stages or min(held) > 0.0


def test_queues_of_a_closed_network() -> None:
    assert mean_queues([1, 1], [1.0, 1.0], 4) == pytest.approx([2.0, 2.0])
    queues = mean_queues([4, 1], [4.0, 1.0], 50)
    assert 4 * queues[0] + queues[1] == pytest.approx(50.0)
    assert queues[1] > 40.0, "nearly everything waits at the bottleneck"
    assert mean_queues([1, 0], [1.0, 0.0], 4) == [0.0, 0.0]


def test_rebalancing_pays_in_a_small_swarm_with_churn() -> None:
    """Four hours of 24 peers in 4 stages; the whole size is below."""
    small = Case(None, n_peers=24, n_stages=4, hours=4.0, lifetime_h=2.0)
    none, often = churn(small, 2), churn(replace(small, period_s=60.0), 2)
    assert often.share >= 0.85
    assert often.share >= 1.4 * none.share
    assert often.moves <= 1.5 * often.deaths + small.n_peers


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2])
def test_rebalancing_pays_through_32_hours_of_churn(seed: int) -> None:
    """64 peers, 8 stages, mean lifetime 6 h, newcomers at random: the bounds of the project."""
    none, moves = churn(Case(None), seed), churn(Case(300.0), seed)
    assert moves.share >= 0.85
    assert moves.share >= 1.5 * none.share


@pytest.mark.slow
def test_it_pays_for_unlike_machines_too() -> None:
    none, moves = churn(Case(None, speeds=UNEQUAL), 1), churn(Case(300.0, speeds=UNEQUAL), 1)
    assert moves.share >= 0.85
    assert moves.share >= 1.5 * none.share
