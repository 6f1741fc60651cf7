"""Work sized to speed: everybody arrives together; grace windows; weights that no sender chooses."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mycel.protocols.errors import ConfigError
from mycel.swarm.methods.sizing import (
    WEIGHT_UNIT,
    Grace,
    contribution_weight,
    quorum,
    round_time_s,
    size_work,
    staleness_weight,
)


def test_peers_of_unlike_speed_arrive_together() -> None:
    """1:2:4:8 (training.md, section 10: idle at most 10 %), where equal work leaves the fastest idle for 7/8."""
    speeds = {"a": 1.0, "b": 2.0, "c": 4.0, "d": 8.0}
    time_s = round_time_s(speeds, 40)
    works = {peer: size_work(step_s, time_s, 5, 200) for peer, step_s in speeds.items()}
    last = max(work.seconds for work in works.values())
    assert sum(last - work.seconds for work in works.values()) <= 0.1 * 4 * last
    assert all(work.late_s == 0.0 for work in works.values())
    assert [works[peer].steps for peer in "abcd"] == [80, 40, 20, 10]


def test_who_is_too_slow_says_so() -> None:
    work = size_work(10.0, 20.0, 5, 50)
    assert (work.steps, work.late_s) == (5, 30.0)
    assert "least" in work.reason


def test_three_tenths_fit_into_three_times_a_tenth() -> None:
    assert size_work(0.1, 0.3, 1, 9).steps == 3


@given(st.floats(1e-6, 1e6), st.floats(1e-6, 1e6), st.integers(1, 1000), st.integers(0, 1000))
def test_work_is_in_range_and_on_time_unless_it_is_the_least(
    step_s: float, time_s: float, least: int, more: int
) -> None:
    work = size_work(step_s, time_s, least, least + more)
    assert least <= work.steps <= least + more
    assert work.steps == least or work.seconds <= time_s * (1.0 + 1e-6)
    assert work.steps == least + more or (work.steps + 1) * step_s > time_s * (1.0 - 1e-6)
    assert work.late_s >= 0.0


def test_ranges_and_measurements_that_are_none() -> None:
    with pytest.raises(ConfigError):
        size_work(1.0, 1.0, 5, 4)
    for bad in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match="s a step"):
            size_work(bad, 1.0, 1, 2)
        with pytest.raises(ValueError, match="seconds a step"):
            round_time_s({"a": bad}, 10)
    with pytest.raises(ValueError, match="seconds a step"):
        round_time_s({}, 10)


def test_a_quorum_is_never_rounded_down() -> None:
    for n in range(1, 200):
        assert 3 * quorum(n) >= 2 * n
        assert 3 * (quorum(n) - 1) < 2 * n or quorum(n) == 1
        assert quorum(n, 1.0) == n
        assert quorum(n, 0.0) == 1


def test_the_grace_window_follows_the_spread() -> None:
    grace = Grace(most_s=20.0)
    assert grace.window_s == 20.0  # nothing is known yet
    for _ in range(60):
        grace = grace.after(4.0)
    assert grace.window_s == pytest.approx(6.0)
    for _ in range(60):
        grace = grace.after(0.0)
    assert grace.window_s == pytest.approx(0.0, abs=1e-3)
    assert Grace(least_s=1.0).after(0.0).window_s == 1.0


def test_one_straggler_moves_the_window_a_little() -> None:
    grace = Grace(most_s=10.0).after(1.0)
    assert grace.after(1e9).window_s <= 1.5 * (1.0 + 0.2 * 9.0)
    for bad in (-1.0, math.nan):
        with pytest.raises(ValueError, match="spread"):
            grace.after(bad)


def test_late_contributions_count_for_less() -> None:
    weights = [staleness_weight(late) for late in range(5)]
    assert weights[0] == WEIGHT_UNIT
    assert weights == sorted(weights, reverse=True)
    assert weights[3] == WEIGHT_UNIT // 4
    with pytest.raises(ValueError, match="late"):
        staleness_weight(-1)


@given(st.integers(0, 1 << 70), st.integers(1, 1 << 20), st.integers(0, 50))
def test_no_statement_of_steps_is_worth_more_than_twice_the_normal(steps: int, normal: int, late: int) -> None:
    weight = contribution_weight(steps, normal, late)
    assert 0 <= weight <= 2 * WEIGHT_UNIT
    if steps <= 2 * normal:
        assert weight == pytest.approx(steps / normal / (1 + late) * WEIGHT_UNIT, abs=2.0 + steps / normal)
