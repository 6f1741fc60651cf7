"""The directory's promise on real connections: 32 nodes in four processes, of which ten die."""

from __future__ import annotations

import pytest

from benchmarks.directory import BOUND_MS, measure

TTL_S = 10.0


@pytest.mark.slow
@pytest.mark.loopback
@pytest.mark.parametrize("death", ["crash", "silent"])
def test_find_is_fast_and_the_dead_are_forgotten(death: str) -> None:
    result = measure(death, TTL_S)
    assert (result["nodes"], result["died"]) == (32, 10)
    assert result["healthy"]["median_ms"] < BOUND_MS
    assert result["after_deaths"]["median_ms"] < BOUND_MS
    assert result["complete_healthy"] == result["complete_after"] == 1.0, "nobody who lives is missing"
    assert result["forgotten_s"] < TTL_S + 1.0  # a find may be under way at that moment
