"""Which contributions are complete, and how long a grace the late ones get."""

from __future__ import annotations

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
    grace.learn(2.0)
    assert grace.seconds == 3.0
    for _ in range(50):
        grace.learn(0.0)
    assert grace.seconds < 0.01
    for _ in range(50):
        grace.learn(100.0)
    assert grace.seconds == 10.0
