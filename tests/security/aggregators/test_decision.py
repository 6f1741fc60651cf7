"""A decision's bytes: one encoding each, and nothing else is taken for one."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mycel.protocols.errors import RemoteProtocolError
from mycel.security.aggregators import UNIT, Decision, decide, parse_rule
from mycel.security.aggregators.decision import MAX_DECISION_BYTES
from tests.security.aggregators.cases import ALL, honest_rows


def gram_of(rows):
    return rows.double() @ rows.double().T


@pytest.mark.parametrize("text", ALL)
def test_decisions_survive_the_round_trip(text):
    decision = decide(parse_rule(text), gram_of(honest_rows(9, 5)), 2, seed=b"s")
    assert decision.check() is None
    assert Decision.from_bytes(decision.to_bytes()) == decision


def test_the_largest_decision_fits():
    rows = honest_rows(256, 8)
    decision = decide(parse_rule("arc+nnm+median"), gram_of(rows), 100, seed=b"")
    assert Decision.from_bytes(decision.to_bytes()) == decision


GOOD = (3, (UNIT, 0, 0), (), (1,), "why")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({0: -1}, "-1 rows"),
        ({0: 4}, "3 weights for 4 rows"),
        ({0: 257}, "257 rows"),
        ({1: (UNIT, 0, 1 << 29)}, "out of range"),
        ({1: (UNIT, 0, 1 << 63)}, "out of range"),
        ({1: (UNIT, 0, 0.5)}, "Expected"),
        ({2: ((UNIT, 0, 0),)}, "both"),
        ({1: (), 2: ((UNIT, 0, 0),) * 4}, "4 mixed rows"),
        ({1: (), 2: ((UNIT, 0),)}, "2 weights for 3 rows"),
        ({3: (1, 1)}, "outliers"),
        ({3: (3,)}, "outliers"),
        ({3: (2, 1)}, "outliers"),
        ({4: "two\nlines"}, "reason"),
        ({4: "x" * 201}, "reason"),
    ],
)
def test_a_false_decision_is_refused_with_its_reason(change, reason):
    fields = [change.get(i, value) for i, value in enumerate(GOOD)]
    with pytest.raises(RemoteProtocolError, match=reason):
        Decision.from_bytes(msgspec.msgpack.encode(fields))


def test_a_second_encoding_and_a_bomb_are_refused():
    data = Decision(*GOOD).to_bytes()
    longer = data.replace(b"\x01", b"\xcc\x01", 1)
    assert msgspec.msgpack.decode(longer) == msgspec.msgpack.decode(data)
    with pytest.raises(RemoteProtocolError, match="shortest"):
        Decision.from_bytes(longer)
    with pytest.raises(RemoteProtocolError, match="over the limit"):
        Decision.from_bytes(bytes(MAX_DECISION_BYTES + 1))
    with pytest.raises(RemoteProtocolError):
        Decision.from_bytes(b"\x91" * 100_000)


@given(st.binary(max_size=200))
def test_any_bytes_are_a_decision_or_a_protocol_error(data):
    try:
        decision = Decision.from_bytes(data)
    except RemoteProtocolError:
        return
    assert decision.to_bytes() == data
