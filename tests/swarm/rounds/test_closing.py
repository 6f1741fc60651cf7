"""Which contributions are complete, and how long a grace the late ones get."""

from __future__ import annotations

import pytest

from mycel.swarm.rounds.closing import Grace, Holdings

ALL = frozenset("abcd")
X, Y = b"x" * 32, b"y" * 32


def holdings(n_aggregators: int = 3) -> Holdings:
    made = Holdings([("a", "b", "c", "d"), ("b", "c", "d", "a")], n_aggregators)
    made.present(ALL, 0.0)
    return made


def test_an_offer_is_complete_when_a_majority_of_each_shards_aggregators_hold_it():
    made = holdings()
    made.hold("a", 0, [X], 1.0)
    made.hold("b", 0, [X, Y], 2.0)
    made.hold("b", 1, [X], 3.0)
    made.hold("a", 1, [X], 4.0)  # it aggregates another shard
    assert made.since == {}
    made.hold("d", 1, [X], 5.0)
    assert made.since == {X: 5.0}


def test_saying_it_twice_counts_once():
    made = holdings(1)
    for _ in range(3):
        made.hold("a", 0, [X], 1.0)
    assert made.since == {}
    made.hold("b", 1, [X], 2.0)
    assert made.since == {X: 2.0}


def test_when_an_aggregator_goes_the_next_one_counts_with_what_it_said_before():
    made = holdings(1)
    made.hold("b", 0, [X], 1.0)
    made.hold("b", 1, [X], 1.0)
    assert made.since == {}
    made.present(ALL - {"a"}, 2.0)
    assert made.since == {X: 2.0}
    made.present(ALL, 3.0)
    assert made.since == {X: 2.0}


def test_where_everybody_collects_everything_a_majority_of_those_here_counts():
    made = Holdings([("a", "b", "c", "d")], 0)
    made.present(ALL, 0.0)
    for peer in "ab":
        made.hold(peer, 0, [X], 1.0)
    assert made.since == {}
    made.hold("c", 0, [X], 2.0)
    assert made.since == {X: 2.0}


def test_the_grace_is_the_longest_at_first_and_then_follows_the_spread_of_arrivals():
    grace = Grace(10.0)
    assert grace.seconds == 10.0
    grace.learn(2.0, 1.0)
    assert grace.seconds == 3.0
    for _ in range(50):
        grace.learn(0.0, 1.0)
    assert grace.seconds == pytest.approx(0.05)
    for _ in range(50):
        grace.learn(100.0, 1.0)
    assert grace.seconds == 10.0


def test_some_rounds_in_which_all_come_at_once_do_not_take_the_grace_from_who_is_late_again():
    grace = Grace(10.0)
    grace.learn(4.0, 1.0)
    for _ in range(7):
        grace.learn(0.0, 1.0)
    assert grace.seconds == 2.0
    grace.learn(0.0, 1.0)
    assert grace.seconds < 1.0


def test_a_grace_is_a_twentieth_of_the_wait_for_enough_at_least():
    grace = Grace(10.0)
    for _ in range(20):
        grace.learn(0.0, 40.0)
    assert grace.seconds == 2.0
