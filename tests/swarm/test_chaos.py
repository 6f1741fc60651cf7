"""Shapes and schedules of faults: what people write, what a link does to a frame, and which node is hit when."""

from __future__ import annotations

import math
from collections import Counter
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mycel.protocols.errors import ConfigError
from mycel.swarm.chaos import (
    PACKET_BYTES,
    RECOVERY_S,
    RETRANSMISSION_S,
    Rates,
    Schedule,
    Shape,
    Uplink,
    Way,
    bytes_per_s,
    duration_s,
    plan_faults,
    rate_per_s,
    share,
)
from mycel.swarm.placement import even_spans

SPANS = even_spans([1] * 8, 8, replicas=2)


@pytest.mark.parametrize(
    ("parse", "text", "value"),
    [
        (duration_s, "80ms", 0.08),
        (duration_s, "1.5 s", 1.5),
        (duration_s, "2m", 120.0),
        (duration_s, "1h", 3600.0),
        (share, "1%", 0.01),
        (share, "0.25", 0.25),
        (bytes_per_s, "100mbit", 12.5e6),
        (bytes_per_s, "1Gbit/s", 125e6),
        (bytes_per_s, "512kbit", 64e3),
        (rate_per_s, "1/20s", 0.05),
        (rate_per_s, "3/m", 0.05),
        (rate_per_s, "2 / 1m", 1 / 30),
    ],
)
def test_what_people_write(parse, text, value):
    assert parse(text) == pytest.approx(value, rel=1e-12)


@pytest.mark.parametrize(
    ("parse", "texts"),
    [
        (duration_s, ["", "80", "ms", "-1s", "1 day", "1e3s", "nan s", "\n1s\n2s"]),
        (share, ["", "101%", "2", "-1%", "one", "1%%"]),
        (bytes_per_s, ["", "100", "0mbit", "100MB", "fast"]),
        (rate_per_s, ["", "1", "1/", "/20s", "1/0s", "1/s/s", "1000/s", "1/20", "20s"]),
    ],
)
def test_anything_else_is_one_line_that_says_what_to_write(parse, texts):
    for text in texts:
        with pytest.raises(ConfigError, match=r"(?s)^'.*is not a .*: write [^\n]*$"):
            parse(text)


finite = st.floats(0, 10)
shapes = st.builds(
    Shape, finite, finite, st.floats(0, 0.5), st.floats(1000, 1e12) | st.just(math.inf), st.integers(0, 2**63)
)


@given(shapes)
def test_a_shape_travels_as_one_string(shape):
    assert Shape.parse(str(shape)) == shape


@pytest.mark.parametrize(
    "text",
    [
        "rtt_s",
        "rtt_s=",
        "rtt_s=fast",
        "x=1",
        "rtt_s=1,rtt_s=1",
        "rtt_s=-1",
        "rtt_s=nan",
        "rtt_s=inf",
        "loss=0.9",
        "bytes_per_s=1",
        "seed=1.5",
        "=1",
    ],
)
def test_no_other_string_is_a_shape(text):
    with pytest.raises(ConfigError):
        Shape.parse(text)


def test_a_frame_takes_half_a_round_trip_its_bytes_and_some_jitter():
    way = Way(Shape(rtt_s=0.08, jitter_s=0.02, bytes_per_s=1e6), Uplink(1e6), Random(1))
    arrivals = [way.arrival_s(float(at_s), 10_000) - at_s for at_s in range(200)]
    assert min(arrivals) == pytest.approx(0.05, abs=5e-4)  # 40 ms and 10 ms of sending
    assert max(arrivals) == pytest.approx(0.06, abs=5e-4)
    assert sum(arrivals) / 200 == pytest.approx(0.055, abs=1e-3)


def test_all_peers_share_the_uplink():
    shape = Shape(bytes_per_s=1e6)
    uplink = Uplink(shape.bytes_per_s)
    one, other = Way(shape, uplink, Random(1)), Way(shape, uplink, Random(2))
    assert [way.arrival_s(0.0, 500_000) for way in (one, other, one)] == pytest.approx([0.5, 1.0, 1.5])
    assert one.arrival_s(5.0, 500_000) == pytest.approx(5.5), "what was not used is not saved up"


@given(st.lists(st.tuples(st.floats(0, 1), st.integers(0, 10**6)), min_size=1), shapes, st.integers(0, 99))
def test_nothing_overtakes(frames, shape, seed):
    way = Way(shape, Uplink(shape.bytes_per_s), Random(seed))
    now, last = 0.0, -math.inf
    for wait_s, size_bytes in frames:
        now += wait_s
        arrival_s = way.arrival_s(now, size_bytes)
        assert arrival_s >= max(last, now + shape.rtt_s / 2)
        last = arrival_s


def test_a_loss_costs_a_time_out_and_everything_behind_it_waits():
    shape = Shape(rtt_s=0.1, loss=0.01)
    timeout_s = RETRANSMISSION_S + 0.1
    assert shape.retransmitting_s(100, 0.98) == 0
    assert shape.retransmitting_s(100, 0.995) == pytest.approx(timeout_s)
    assert shape.retransmitting_s(100, 0.99995) == pytest.approx(3 * timeout_s)
    assert shape.retransmitting_s(100 * PACKET_BYTES, 0.5) == pytest.approx(timeout_s), "0.99^100 is 0.37"
    way = Way(shape, Uplink(), Random(5))
    taken = [way.arrival_s(n * 1e-3, 100) - n * 1e-3 for n in range(1000)]
    late = [n for n, s in enumerate(taken) if s > 0.051]
    assert len(late) > 300, "each loss holds up what follows within its time-out"


def test_loss_is_as_frequent_as_it_is_said():
    shape, rng = Shape(loss=0.02), Random(3)
    delayed = sum(shape.retransmitting_s(100, rng.random()) > 0 for _ in range(20_000))
    assert delayed / 20_000 == pytest.approx(0.02, abs=0.003)


# --------------------------------------------------------------------------------------------------------------- faults


def plan(rates: Rates, seed: int, until_s: float = 120.0, spans=SPANS, **options) -> Schedule:
    return plan_faults(rates, spans, until_s=until_s, rng=Random(f"faults {seed}"), **options)


def test_one_fault_in_each_interval():
    schedule = plan(Rates(kill=1 / 20), 7)
    assert [int(fault.at_s // 20) for fault in schedule.faults] == list(range(6))
    assert {fault.kind for fault in schedule.faults} == {"kill"}
    assert schedule.left_out == ()


def test_the_seed_decides():
    rates = Rates(kill=1 / 20, stop=1 / 30, leave=1 / 40)
    assert plan(rates, 7) == plan(rates, 7)
    assert len({plan(rates, seed).faults for seed in range(20)}) == 20


def test_no_rates_no_faults():
    assert plan(Rates(), 1) == Schedule(())
    assert plan(Rates(), 1, spans=[(0, 8)]) == Schedule(())


@given(
    st.integers(0, 2**32),
    st.builds(Rates, *[st.sampled_from([0.0, 1 / 60, 1 / 7, 1.0])] * 3),
    st.sampled_from([(8, 2), (4, 2), (6, 3), (9, 2)]),
)
def test_the_last_holder_of_a_block_is_spared(seed, rates, swarm):
    n_nodes, replicas = swarm
    spans = even_spans([1] * 8, n_nodes, replicas=replicas)
    schedule = plan(rates, seed, 60.0, spans)
    expected = sum(math.ceil(60 * rates.of(kind)) for kind in ("kill", "stop", "leave"))
    assert len(schedule.faults) + len(schedule.left_out) <= expected
    for fault in schedule.faults:
        assert 0 <= fault.at_s < 60
        assert fault.away_s > 0
        down = [f for f in schedule.faults if f.at_s <= fault.at_s < f.at_s + f.away_s + RECOVERY_S]
        nodes = Counter(f.node for f in down)
        assert max(nodes.values()) == 1, "a node that is away is not hit"
        up = [span for node, span in enumerate(spans) if node not in nodes]
        assert all(any(start <= block < end for start, end in up) for block in range(8))
    assert [f.at_s for f in schedule.faults] == sorted(f.at_s for f in schedule.faults)


def test_without_replicas_there_is_nobody_to_spare():
    with pytest.raises(ConfigError, match="--replicas"):
        plan(Rates(kill=1 / 20), 1, spans=[(0, 4), (4, 8)])
    hit = {fault.node for fault in plan(Rates(kill=1 / 20), 1, spans=[(0, 4), (4, 8)], spare_last=False).faults}
    assert hit == {0, 1}
