"""Signed records: which bytes a writer signs, and when a reader believes them.

The signature covers a versioned domain string and every field with its length: no two records, and no record and
another kind of message, share signed bytes. Knows neither where a record is kept nor what its value means.

Ring: pure.
"""

from __future__ import annotations

import math
import struct

from mycel.protocols.errors import LocalProtocolError, RemoteProtocolError
from mycel.protocols.messages import MAX_RECORD_VALUE_BYTES, SignedRecord
from mycel.security.signatures import Signer, verify

RECORD_DOMAIN = b"mycel/record/1\0"
KEY_BYTES = 32
MAX_WRITER_BYTES = 128
MAX_SEQ = 2**62
CLOCK_SKEW_S = 10.0  # a writer's clock may run this far ahead of ours


def signed_bytes(key: bytes, writer: str, seq: int, expires_at: float, value: bytes) -> bytes:
    """What a record's signature covers: domain | key | len, writer | seq | expires_at | len, value (big endian)."""
    name = writer.encode()
    header = struct.pack(">32sH", key, len(name)) + name + struct.pack(">QdI", seq, expires_at, len(value))
    return RECORD_DOMAIN + header + value


def sign_record(identity: Signer, key: bytes, seq: int, expires_at: float, value: bytes) -> SignedRecord:
    """A record of ours. `expires_at` is unix time in seconds.

    Raises LocalProtocolError for a field outside the limits that every reader enforces.
    """
    fields_fit = (
        len(key) == KEY_BYTES
        and 0 <= seq <= MAX_SEQ
        and math.isfinite(expires_at)
        and expires_at > 0
        and len(value) <= MAX_RECORD_VALUE_BYTES
    )
    if not fields_fit:
        raise LocalProtocolError(
            f"a record takes a key of {KEY_BYTES} bytes (got {len(key)}), a value of at most {MAX_RECORD_VALUE_BYTES} "
            f"(got {len(value)}), seq in [0, 2^62] (got {seq}) and a finite expiry (got {expires_at})"
        )
    signature = identity.sign(signed_bytes(key, identity.peer_id, seq, expires_at, value))
    return SignedRecord(key, identity.peer_id, seq, expires_at, value, signature)


def check_lifetime(record: SignedRecord, now: float, max_ttl_s: float) -> None:
    """Raise RemoteProtocolError unless the record is alive at `now` (unix time, s) and ends within `max_ttl_s`.

    The future end has an allowance of CLOCK_SKEW_S. The past end has none: a record that any reader's clock calls
    expired is dead, so a writer whose clock is late loses that much of its lifetime.
    """
    if not math.isfinite(record.expires_at):
        raise RemoteProtocolError(f"record expires at {record.expires_at}", record.writer)
    left_s = record.expires_at - now
    if left_s <= 0:
        raise RemoteProtocolError(f"record expired {-left_s:.1f} s ago (or the clocks disagree)", record.writer)
    if left_s > max_ttl_s + CLOCK_SKEW_S:
        reason = f"record lives {left_s:.0f} s, longer than the {max_ttl_s:.0f} s allowed (or the clocks disagree)"
        raise RemoteProtocolError(reason, record.writer)


def check_record(record: SignedRecord, now: float, max_ttl_s: float) -> None:
    """Raise RemoteProtocolError unless the record is alive (see `check_lifetime`) and its writer signed it.

    >>> from mycel.security.identity import Identity
    >>> record = sign_record(Identity.from_seed(bytes(32)), bytes(32), 1, 130.0, b"value")
    >>> check_record(record, now=100.0, max_ttl_s=30.0)
    """
    check_lifetime(record, now, max_ttl_s)
    if len(record.key) != KEY_BYTES or len(record.writer.encode()) > MAX_WRITER_BYTES or not 0 <= record.seq <= MAX_SEQ:
        raise RemoteProtocolError("record fields are out of bounds", record.writer)
    message = signed_bytes(record.key, record.writer, record.seq, record.expires_at, record.value)
    if not verify(record.writer, record.signature, message):
        raise RemoteProtocolError("record signature does not verify", record.writer)
