"""Who failed: out of the question for moments, avoided for a while, and known with the reason."""

from __future__ import annotations

from mycel.swarm.failures import AVOID_S, MAX_BAR_S, Failures


def test_a_bar_is_short_and_grows_with_every_failure():
    failures, now = Failures(), 100.0
    bars = []
    for _ in range(6):
        failures.note("a", "went away", now)
        assert failures.barred(now) == failures.avoided(now) == {"a"}
        free_s = failures.next_free_s(now)
        assert free_s is not None
        assert failures.barred(free_s) == frozenset()
        assert failures.avoided(free_s) == {"a"}
        bars.append(free_s - now)
        now += 1000.0
    assert bars == [1.0, 2.0, 4.0, MAX_BAR_S, MAX_BAR_S, MAX_BAR_S]


def test_after_a_while_nothing_is_held_against_anybody():
    failures = Failures()
    failures.note("a", "full", 0.0)
    failures.note("b", "silent", 10.0)
    assert failures.avoided(AVOID_S - 0.1) == {"a", "b"}
    assert failures.avoided(AVOID_S) == {"b"}
    assert failures.next_free_s(10.5) == 11.0
    assert failures.next_free_s(11.0) is None


def test_the_sentence_names_who_and_why():
    failures = Failures()
    assert failures.told() == ""
    failures.note("a", "full", 0.0)
    failures.note("12D3KooWNsAKNeJVTxoCGJ14", "went away", 0.0)
    failures.note("12D3KooWNsAKNeJVTxoCGJ14", "refuses connections", 5.0)
    assert failures.told() == "a: full; 12D..CGJ14: went away, then refuses connections (2 times)"
