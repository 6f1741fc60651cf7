"""What a swarm is said to do and to survive."""

from __future__ import annotations

import pytest
from hypothesis import given

from mycel.swarm.estimate import coverage_bar, estimate, span_bar
from mycel.swarm.view import View
from tests.swarm.swarms import peer, view_of, views


def test_a_chain_of_two():
    view = view_of(8, peer("a", 0, 4, rtts=(("b", 0.004),)), peer("b", 4, 8))
    found = estimate(view)
    assert found.stream_tokens_per_s == pytest.approx(1 / 0.014)
    assert found.total_tokens_per_s == pytest.approx(200.0)
    assert found.complete
    assert not found.survives_any_loss
    assert found.indispensable == ("a", "b")
    assert found.reason == (
        "8/8 blocks covered, weakest block 0 1x, 71.4 tokens a second expected, loses blocks with any of a, b"
    )


def test_replicas_add_up_and_cover_a_loss():
    view = view_of(8, peer("a", 0, 4), peer("b", 0, 4), peer("c", 4, 8), peer("d", 3, 8))
    found = estimate(view, rtts=dict.fromkeys("abcd", 0.001))
    # a and b together do 1600 blocks a second, c 800, d 5000 / 6: enough to give all eight blocks the same
    assert found.total_tokens_per_s == pytest.approx((1600 + 800 + 5000 / 6) / 8)
    assert found.survives_any_loss
    assert found.reason.endswith("survives the loss of any one node")


def test_missing_blocks_mean_no_tokens():
    found = estimate(view_of(8, peer("a", 0, 4)))
    assert (found.stream_tokens_per_s, found.total_tokens_per_s) == (0.0, 0.0)
    assert found.missing == ((4, 8),)
    assert not found.survives_any_loss
    assert found.reason == "4/8 blocks covered, nobody serves 4:8"
    assert estimate(View(3)).coverage == (0, 0, 0)


@given(views())
def test_survival_is_what_taking_each_peer_away_shows(view):
    found = estimate(view)
    assert found.complete == (found.stream_tokens_per_s > 0 or view_is_free(view))
    breaking = {name for name in view.peers if view.without({name}).missing() != view.missing()}
    assert set(found.indispensable) == breaking
    everyone = all(view.without({name}).missing() == () for name in view.peers)
    assert found.survives_any_loss == (everyone and not view.missing() and bool(view.peers))


def view_is_free(view: View) -> bool:
    """Whether some chain of the swarm promises to take no time at all."""
    return not view.missing() and estimate(view).stream_tokens_per_s == 0.0


def test_the_bar_of_coverage():
    assert coverage_bar((0, 1, 2, 9, 10, 300)) == ".129++"
    assert coverage_bar((3, 3, 0, 3), width=2) == "3."
    assert coverage_bar((1, 2), width=80) == "12"


def test_the_bar_of_a_peer():
    assert span_bar(peer("a", 2, 5), 8) == "..###..."
    assert span_bar(peer("a", 2, 3), 8, width=4) == ".#.."


@given(views())
def test_bars_are_as_wide_as_asked(view):
    for width in (1, 2, 3):
        assert len(coverage_bar(view.coverage(), width)) == min(width, view.n_blocks)
