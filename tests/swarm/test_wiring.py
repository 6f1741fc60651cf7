"""Routing by measured speed: shares, faults, newcomers; the bounds are those of the research's own measurements."""

from collections import Counter
from random import Random

import pytest

from benchmarks.wiring import SPEEDS, Loop, Machine, four
from mycel.swarm.training.wiring import LEAST_DEADLINE_S, MOST_BAN_S, MOST_DEADLINE_S, Wiring

SUM = sum(SPEEDS)


def wiring_of(**announced: float) -> Wiring:
    wiring = Wiring(1, Random(0))
    wiring.set_peers(0, announced, 0.0)
    return wiring


def measured(**seconds: float) -> Wiring:
    """Peers that were seen to take so long."""
    wiring = wiring_of(**dict.fromkeys(seconds, 0.0))
    for name, seconds_each in seconds.items():
        wiring.passed(0, name, 1, seconds_each)
    return wiring


def chosen(wiring: Wiring, n: int, now: float = 0.0) -> Counter[str]:
    found: Counter[str] = Counter()
    for _ in range(n):
        choice = wiring.choose(0, 1, now)
        assert choice is not None
        found[choice.peer] += 1
    return found


# ---- the closed loop


@pytest.mark.parametrize("seed", range(10))
def test_four_speeds_reach_their_sum_in_ideal_shares(seed):
    outcome = Loop(four(), seed, uniform=False, jitter=0.2, warm=200).run(3000, 8)
    assert outcome.done.total() / outcome.seconds >= 0.97 * SUM
    for speed in SPEEDS:
        assert outcome.share(f"x{speed:g}") == pytest.approx(speed / SUM, abs=0.01)


@pytest.mark.parametrize("seed", range(10))
def test_a_uniform_draw_waits_for_the_slowest(seed):
    outcome = Loop(four(), seed, uniform=True, jitter=0.2, warm=200).run(3000, 8)
    assert outcome.done.total() / outcome.seconds <= 0.3 * SUM


def test_shares_follow_what_is_measured_not_what_is_announced():
    machines = four()
    for machine in machines:
        machine.speed = 9.0 - machine.speed if machine.name in ("x1", "x8") else machine.speed
    loop = Loop(machines, 1, uniform=False, jitter=0.2, warm=400)
    loop.wiring.set_peers(0, {f"x{speed:g}": speed for speed in SPEEDS}, 0.0)  # the first and the last swapped: a lie
    outcome = loop.run(3000, 8)
    assert outcome.share("x1") == pytest.approx(8 / SUM, abs=0.02)
    assert outcome.share("x8") == pytest.approx(1 / SUM, abs=0.02)


def test_who_never_answers_costs_little():
    outcome = Loop(four(mute=Machine("mute", 8.0, silent=True)), 3, uniform=False, jitter=0.2).run(3000, 8)
    assert outcome.done.total() / outcome.seconds >= 0.93 * SUM
    assert outcome.again <= 40


def test_who_dies_takes_only_what_it_had():
    outcome = Loop(four(x8=Machine("x8", 8.0, dies_s=100.0)), 3, uniform=False, jitter=0.2).run(3000, 8)
    assert outcome.again <= 8
    assert outcome.seconds == pytest.approx(100.0 + (3000 - 1500) / 7.0, rel=0.03)


def test_who_joins_is_used_at_once_and_not_flooded():
    late = Machine("x8", 8.0, joins_s=100.0)
    loop = Loop(four(x8=late), 3, uniform=False, jitter=0.2)
    outcome = loop.run(3000, 8)
    assert outcome.seconds == pytest.approx(100.0 + (3000 - 700) / 15.0, rel=0.03)
    assert late.free_at_s - outcome.seconds < 2.0


# ---- single choices


def test_equal_peers_take_turns_and_chance_decides_between_equals():
    wiring = wiring_of(a=1.0, b=1.0, c=1.0)
    rounds = [tuple(sorted(chosen(wiring, 3))) for _ in range(50)]
    assert set(rounds) == {("a", "b", "c")}
    firsts = {next(iter(chosen(drawn_with(seed), 1))) for seed in range(20)}
    assert firsts == {"a", "b"}


def drawn_with(seed: int) -> Wiring:
    wiring = Wiring(1, Random(seed))
    wiring.set_peers(0, {"a": 0.0, "b": 0.0}, 0.0)
    return wiring


def test_a_newcomer_is_next_and_gets_its_share_once_it_has_answered():
    wiring = measured(a=1.0, b=1.0)
    chosen(wiring, 1000)
    wiring.set_peers(0, {"a": 0.0, "b": 0.0, "c": 0.0}, 0.0)
    assert "c" in chosen(wiring, 2)
    assert chosen(wiring, 28)["c"] == 3, "after 1, 3 and 7 of each of the others: nobody knows it yet"
    wiring.passed(0, "c", 1, 1.0)
    assert chosen(wiring, 30)["c"] == 10


def test_who_says_nothing_of_itself_counts_as_the_middle_of_the_others():
    wiring = wiring_of(a=1.0, b=4.0, c=10.0, d=0.0)
    assert wiring.expected_s(0, "d") == 0.25


def test_boasting_brings_a_newcomer_little():
    wiring = measured(a=1.0, b=1.0)
    wiring.set_peers(0, {"a": 1.0, "b": 1.0, "liar": 1e9}, 0.0)
    assert chosen(wiring, 20)["liar"] <= 8
    wiring.passed(0, "liar", 1, 10.0)
    assert chosen(wiring, 210)["liar"] == 10


def test_the_average_is_not_biased_by_its_beginning():
    wiring = wiring_of(a=0.0)
    wiring.passed(0, "a", 4, 8.0)
    assert wiring.expected_s(0, "a") == pytest.approx(2.0)
    wiring.passed(0, "a", 4, 8.0)
    assert wiring.expected_s(0, "a") == pytest.approx(2.0)
    wiring.passed(0, "a", 4, 16.0)  # (0.81 * 0.1 + 0.09) * 2 + 0.1 * 4, over 1 - 0.9^3
    assert wiring.expected_s(0, "a") == pytest.approx((0.171 * 2 + 0.1 * 4) / 0.271)


def test_timeouts_count_as_their_time_and_ban_from_the_second_on():
    wiring = wiring_of(a=10.0, b=10.0)
    wiring.timed_out(0, "a", 1, 2.0, 0.0)
    assert wiring.expected_s(0, "a") == pytest.approx(2.0)
    assert wiring.is_free(0, "a", 0.0)
    wiring.timed_out(0, "a", 1, 4.0, 5.0)
    assert not wiring.is_free(0, "a", 5.9)
    assert wiring.is_free(0, "a", 6.0)


def test_bans_double_up_to_a_minute_and_successes_halve_them():
    wiring = wiring_of(a=1.0, b=1.0)
    now, lengths = 0.0, []
    for _ in range(9):
        wiring.failed(0, "a", now)
        wiring.failed(0, "a", now)  # the same failure, seen by another microbatch
        length = next(s for s in (1, 2, 4, 8, 16, 32, 60, 120) if wiring.is_free(0, "a", now + s))
        assert not wiring.is_free(0, "a", now + length - 0.01)
        lengths.append(length)
        now += length
    assert lengths == [1, 2, 4, 8, 16, 32, 60, 60, 60]
    assert max(lengths) == MOST_BAN_S
    for _ in range(4):
        wiring.passed(0, "a", 1, 1.0)
    wiring.failed(0, "a", now)
    assert wiring.is_free(0, "a", now + 1.0)


def test_when_all_are_banned_the_first_to_come_back_is_named_and_nothing_is_charged():
    wiring = wiring_of(a=1.0, b=1.0)
    wiring.failed(0, "a", 0.0)
    wiring.failed(0, "b", 0.5)
    choice = wiring.choose(0, 1, 0.7)
    assert choice is not None
    assert (choice.peer, choice.not_before_s) == ("a", 1.0)
    assert "all are banned" in choice.reason
    assert chosen(wiring, 2, now=2.0) == {"a": 1, "b": 1}


def test_a_lone_peer_is_tried_every_four_seconds_however_long_its_ban():
    wiring = wiring_of(a=1.0)
    for now in range(0, 600, 100):
        wiring.failed(0, "a", now)
    choice = wiring.choose(0, 1, 500.0)
    assert choice is not None
    assert choice.not_before_s == 504.0
    again = wiring.choose(0, 1, 504.0)
    assert again is not None
    assert again.not_before_s == 0.0
    wiring.failed(0, "a", 504.5)
    third = wiring.choose(0, 1, 505.0)
    assert third is not None
    assert third.not_before_s == 508.5
    assert not wiring.is_free(0, "a", 504.0)


def test_who_was_banned_has_saved_nothing_up():
    wiring = measured(a=1.0, b=1.0, c=1.0)
    wiring.failed(0, "a", 0.0)
    assert chosen(wiring, 200, now=0.5) == {"b": 100, "c": 100}
    assert chosen(wiring, 30, now=2.0) == {"a": 10, "b": 10, "c": 10}


def test_going_and_coming_back_does_not_end_a_ban():
    wiring = wiring_of(a=1.0, b=1.0)
    wiring.failed(0, "a", 0.0)
    wiring.set_peers(0, {"b": 1.0}, 0.1)
    assert wiring.peers(0) == ("b",)
    wiring.set_peers(0, {"a": 1.0, "b": 1.0}, 0.2)
    assert not wiring.is_free(0, "a", 0.9)


def test_avoided_peers_are_taken_when_nobody_else_is_there():
    wiring = wiring_of(a=1.0, b=1.0)
    for _ in range(5):
        choice = wiring.choose(0, 1, 0.0, avoid={"a"})
        assert choice is not None
        assert choice.peer == "b"
    choice = wiring.choose(0, 1, 0.0, avoid={"a", "b"})
    assert choice is not None
    assert choice.peer == "a"
    assert "nobody else" in choice.reason


def test_nobody_there_gives_nobody():
    assert Wiring(2, Random(0)).choose(1, 1, 0.0) is None


def test_deadlines_follow_measure_and_queue_between_bounds():
    wiring = wiring_of(a=100.0)
    assert wiring.deadline_s(0, "a", 8) == LEAST_DEADLINE_S
    assert wiring.deadline_s(0, "a", 8, queue_s=3.0) == pytest.approx(5 * 3.08)
    wiring.passed(0, "a", 8, 8.0)
    assert wiring.deadline_s(0, "a", 8) == pytest.approx(40.0)
    assert wiring.deadline_s(0, "a", 8, queue_s=1e9) == MOST_DEADLINE_S


def test_choices_say_why():
    choice = wiring_of(a=2.0, b=0.0).choose(0, 1, 0.0)
    assert choice is not None
    assert choice.reason == f"{choice.peer} is next of 2: 0.5 s a sequence"
