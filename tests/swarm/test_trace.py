"""The account of where time went: exact sums, an honest rest, and nothing of a hop that was replaced."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mycel.protocols.messages import HopTiming, PeerAddress
from mycel.swarm.generation import NewToken, RouteChosen
from mycel.swarm.routing import Hop
from mycel.swarm.trace import RouteTrace

A, B, C = (Hop(PeerAddress(name), start, start + 2) for name, start in (("a", 0), ("b", 2), ("c", 2)))


def token(position: int, at_s: float, *timings: tuple[int, int], finish: str = "") -> NewToken:
    return NewToken(position, 7, finish, tuple(HopTiming(queue, compute) for queue, compute in timings), at_s)


def trace_of(*events: RouteChosen | NewToken, began_s: float = 0.0) -> RouteTrace:
    trace = RouteTrace(began_s)
    for event in events:
        trace.apply(event)
    return trace


def test_nothing_happened_yet() -> None:
    trace = trace_of()
    assert (trace.tokens_per_s, trace.first_token_s, trace.report()) == (None, None, ())
    routed = trace_of(RouteChosen((A, B), "the only way"))
    assert [(hop.peer, hop.start, hop.end) for hop in routed.report()] == [("a", 0, 2), ("b", 2, 4)]
    assert all(hop.compute_ms == hop.queue_ms == hop.network_ms == 0.0 for hop in routed.report())


@pytest.mark.parametrize("starts_s", [0.0, 1000.0])
def test_a_turn_of_the_ring_is_compute_and_queue_and_the_rest(starts_s: float) -> None:
    """The first token paid for the prefill; the two turns after it are what is shared out."""
    trace = trace_of(
        RouteChosen((A, B), "the only way"),
        token(5, starts_s, (0, 900_000), (0, 900_000)),
        token(6, starts_s + 0.1, (1_000, 20_000), (3_000, 30_000)),
        token(7, starts_s + 0.3, (3_000, 40_000), (5_000, 50_000)),
        began_s=starts_s - 2.0,
    )
    a, b = trace.report()
    assert (a.queue_ms, a.compute_ms) == (pytest.approx(2.0), pytest.approx(30.0))
    assert (b.queue_ms, b.compute_ms) == (pytest.approx(4.0), pytest.approx(40.0))
    # 300 ms of two turns, of which 4 + 60 + 8 + 80 are accounted for, over two links.
    assert a.network_ms == b.network_ms == pytest.approx((300 - 152) / 2 / 2)
    assert trace.tokens_per_s == pytest.approx(2 / 0.3)
    assert trace.first_token_s == pytest.approx(2.0)


def test_a_new_route_begins_a_new_account_and_says_who_was_lost() -> None:
    trace = trace_of(
        RouteChosen((A, B), "the only way"),
        token(5, 1.0, (0, 1000), (0, 1000)),
        token(6, 2.0, (0, 1000), (0, 1000)),
        RouteChosen((A, C), "the other way", (("b", "went away"),)),
        token(7, 9.0, (0, 500_000), (0, 500_000)),
        token(8, 9.1, (0, 10_000), (0, 20_000)),
    )
    assert [(one.position, one.peer, one.reason) for one in trace.replaced] == [(7, "b", "went away")]
    assert trace.reason == "the other way"
    assert [(hop.peer, hop.compute_ms) for hop in trace.report()] == [("a", 10.0), ("c", 20.0)]
    assert trace.report()[0].network_ms == pytest.approx(35.0)
    assert trace.n_tokens == 4


def test_who_left_is_told_apart_from_who_was_lost() -> None:
    trace = trace_of(
        RouteChosen((A, B), "the only way"),
        token(5, 1.0, (0, 1000), (0, 1000)),
        RouteChosen((A, C), "c took over", moved=(("b", "left: 3 kB of state pushed in 0.1 s"),), position=6),
    )
    assert trace.replaced == []
    assert [(one.position, one.peer) for one in trace.moved] == [(6, "b")]
    assert "state pushed" in trace.moved[0].reason


def test_a_loss_before_the_first_token_has_the_position_that_the_prompt_had_got_to() -> None:
    trace = trace_of(
        RouteChosen((A, B), "the only way"),
        RouteChosen((A, C), "the other way", (("b", "went away"),), position=512),
    )
    assert [one.position for one in trace.replaced] == [512]


@given(
    st.lists(
        st.tuples(st.floats(0, 10), st.lists(st.tuples(st.integers(0, 10**7), st.integers(0, 10**7)), max_size=4)),
        max_size=8,
    )
)
def test_whatever_hops_claim_no_number_is_negative(turns: list[tuple[float, list[tuple[int, int]]]]) -> None:
    """A hop may report more than the whole turn took, or for hops that there are not."""
    trace, at_s = trace_of(RouteChosen((A, B), "")), 0.0
    for position, (took_s, timings) in enumerate(turns):
        at_s += took_s
        trace.apply(token(position, at_s, *timings))
    for hop in trace.report():
        assert min(hop.compute_ms, hop.queue_ms, hop.network_ms) >= 0
    assert trace.tokens_per_s is None or trace.tokens_per_s > 0
