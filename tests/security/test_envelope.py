"""Signed records: what a reader believes, and that no field can be changed or moved."""

from __future__ import annotations

import math

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mycel.protocols.errors import LocalProtocolError, RemoteProtocolError
from mycel.protocols.messages import MAX_RECORD_VALUE_BYTES, SignedRecord
from mycel.security.envelope import CLOCK_SKEW_S, RECORD_DOMAIN, check_record, sign_record, signed_bytes
from mycel.security.identity import Identity
from mycel.security.signatures import peer_id_of, public_key_of, verify

WRITER = Identity.from_seed(b"\x01" * 32)
OTHER = Identity.from_seed(b"\x02" * 32)
KEY = b"\x09" * 32
NOW = 1_000.0

keys = st.binary(min_size=32, max_size=32)
fields = st.tuples(keys, st.text(max_size=40), st.integers(0, 2**62), st.floats(0, 1e11), st.binary(max_size=64))


def good() -> SignedRecord:
    return sign_record(WRITER, KEY, 5, NOW + 30, b"value")


def test_a_good_record_is_believed() -> None:
    check_record(good(), NOW, max_ttl_s=30)


@given(fields, fields)
def test_signed_bytes_are_unambiguous(one: tuple, two: tuple) -> None:
    if one != two:
        assert signed_bytes(*one) != signed_bytes(*two)
    assert signed_bytes(*one).startswith(RECORD_DOMAIN)


def test_moving_a_byte_between_fields_changes_what_is_signed() -> None:
    assert signed_bytes(KEY, "ab", 1, 2.0, b"c") != signed_bytes(KEY, "a", 1, 2.0, b"bc")


@pytest.mark.parametrize(
    "change",
    [
        {"key": b"\x08" * 32},
        {"writer": OTHER.peer_id},
        {"writer": "nobody"},
        {"writer": "0OIl" * 13},  # no base58
        {"seq": 6},
        {"expires_at": NOW + 29},
        {"value": b"valuf"},
        {"value": b""},
        {"signature": bytes(64)},
        {"signature": OTHER.sign(b"x")},
    ],
)
def test_any_change_breaks_it(change: dict) -> None:
    with pytest.raises(RemoteProtocolError, match="signature"):
        check_record(msgspec.structs.replace(good(), **change), NOW, max_ttl_s=30)


def test_a_signature_of_something_else_of_ours_does_not_serve() -> None:
    plain = signed_bytes(KEY, WRITER.peer_id, 5, NOW + 30, b"value").removeprefix(RECORD_DOMAIN)
    with pytest.raises(RemoteProtocolError, match="signature"):
        check_record(msgspec.structs.replace(good(), signature=WRITER.sign(plain)), NOW, max_ttl_s=30)


@pytest.mark.parametrize("field", [{"key": b"short"}, {"writer": "ü" * 128}, {"seq": -1}, {"seq": 2**63}])
def test_fields_out_of_bounds_are_refused(field: dict) -> None:
    with pytest.raises(RemoteProtocolError, match="out of bounds"):
        check_record(msgspec.structs.replace(good(), **field), NOW, max_ttl_s=30)


def test_time() -> None:
    record = good()
    check_record(record, NOW + 29.99, max_ttl_s=30)
    for now in (NOW + 30, NOW + 31):
        with pytest.raises(RemoteProtocolError, match="expired"):
            check_record(record, now, max_ttl_s=30)
    check_record(record, NOW - CLOCK_SKEW_S, max_ttl_s=30)
    with pytest.raises(RemoteProtocolError, match="longer than"):
        check_record(record, NOW - CLOCK_SKEW_S - 1, max_ttl_s=30)
    for forever in (math.inf, math.nan):
        with pytest.raises(RemoteProtocolError):
            check_record(msgspec.structs.replace(record, expires_at=forever), NOW, max_ttl_s=30)


@pytest.mark.parametrize(
    ("key", "seq", "expires_at", "value"),
    [
        (b"short", 1, 1.0, b""),
        (KEY, -1, 1.0, b""),
        (KEY, 2**62 + 1, 1.0, b""),
        (KEY, 1, math.nan, b""),
        (KEY, 1, math.inf, b""),
        (KEY, 1, 0.0, b""),
        (KEY, 1, 1.0, bytes(MAX_RECORD_VALUE_BYTES + 1)),
    ],
)
def test_what_nobody_would_accept_is_not_signed(key: bytes, seq: int, expires_at: float, value: bytes) -> None:
    with pytest.raises(LocalProtocolError):
        sign_record(WRITER, key, seq, expires_at, value)


@given(st.text(max_size=200), st.binary(max_size=80), st.binary(max_size=80))
def test_verify_survives_anything(peer: str, signature: bytes, data: bytes) -> None:
    assert not verify(peer, signature, data)


@given(st.binary(min_size=32, max_size=32))
def test_a_peer_id_holds_its_public_key(public_key: bytes) -> None:
    assert public_key_of(peer_id_of(public_key)) == public_key
