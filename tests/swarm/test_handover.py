"""Push or replay: the quicker, with its figures; and a rate that latency does not spoil."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mycel.swarm.handover import MEASURED_BYTES, MEASURED_S, SMALL_STATE_BYTES, RateMeter, plan_handover

MB = 10**6


@pytest.mark.parametrize(
    ("state", "history", "rate", "prefill_s", "push", "reason"),
    [
        # Loopback: a long prompt would be computed for seconds, and the state is there at once.
        (200 * MB, 32 * MB, 160 * MB, 9.0, True, "pushing: 200 MB of state take 1.2 s at 160 MB/s, "),
        # 20 layers of a 70B model, 2,048 tokens, 20 Mbit/s: the history is a fifth of the state.
        (201 * MB, 34 * MB, 2.5 * MB, 4.0, False, "replaying: 201 MB of state take 80 s at 2.5 MB/s, "),
        (201 * MB, 34 * MB, 2.5 * MB, 4.0, False, "replaying 34 MB of history 18 s"),
        # The first hop: its successor has the tokens, so that replaying moves nothing.
        (10 * MB, 0, MB, 1.0, False, "replaying 0 bytes of history 1 s"),
        (SMALL_STATE_BYTES, 0, 1.0, 0.0, True, "pushing: 262 kB of state is little"),
    ],
)
def test_the_quicker_is_chosen_and_says_why(
    state: int, history: int, rate: float, prefill_s: float, push: bool, reason: str
) -> None:
    decided, why = plan_handover(state, history, rate, prefill_s)
    assert decided is push
    assert reason in why


@given(
    state=st.integers(SMALL_STATE_BYTES + 1, 2**40),
    history=st.integers(0, 2**40),
    rate=st.floats(1.0, 1e12),
    prefill_s=st.floats(0, 1e6),
)
def test_it_is_never_the_slower(state: int, history: int, rate: float, prefill_s: float) -> None:
    push, reason = plan_handover(state, history, rate, prefill_s)
    times_s = state / rate, history / rate + prefill_s
    assert times_s[not push] == min(times_s)
    assert reason.startswith("pushing: " if push else "replaying: ")
    assert len(reason) < 400
    assert plan_handover(state, history, rate, state / rate)[0], "and never replays for nothing"


def test_a_link_without_a_rate_is_a_mistake_of_ours() -> None:
    with pytest.raises(ValueError, match="bytes a second"):
        plan_handover(MB, MB, 0.0, 1.0)


def test_the_rate_is_that_of_what_follows_the_first_acknowledgement() -> None:
    meter = RateMeter()
    assert meter.bytes_per_s is None
    meter.acknowledged(100_000, 7.0)  # after a second of connecting and a long way
    assert meter.bytes_per_s is None
    meter.acknowledged(100_000 + MEASURED_BYTES - 1, 7.1)
    assert meter.bytes_per_s is None
    meter.acknowledged(200_000, 7.1)
    assert meter.bytes_per_s == pytest.approx(1e6)
    assert not meter.is_settled
    meter.acknowledged(100_000 + int(1e6 * MEASURED_S), 7.0 + MEASURED_S)
    assert meter.bytes_per_s == pytest.approx(1e6)
    assert meter.is_settled


def test_a_link_faster_than_the_clock_has_a_rate() -> None:
    meter = RateMeter()
    for arrived in (0, 10**6):
        meter.acknowledged(arrived, 1.0)
    assert meter.bytes_per_s is not None
    assert plan_handover(10**9, 0, meter.bytes_per_s, 1.0)[0]
