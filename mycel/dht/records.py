"""What a node announces about itself, and which of two records of one writer is the newer.

An announcement is the value of a signed record under `keys.span_key(swarm)`. Its limits are chosen so that a full one
always fits into a record.

Ring: pure.
"""

from __future__ import annotations

import math
from typing import Annotated, Literal

import msgspec
from msgspec import Meta, Struct

from mycel.protocols.errors import LocalProtocolError, RemoteProtocolError
from mycel.protocols.messages import MAX_BLOCKS, MAX_RECORD_VALUE_BYTES, Count, Key, Seconds, SignedRecord

MAX_RTTS = 32
MAX_ADDRESSES = 8
# Not \d or \w: those match any script, and the byte limit counts on one byte a character.
_Peer = Annotated[str, Meta(min_length=1, max_length=64, pattern=r"^[0-9A-Za-z]+\Z")]
_Address = Annotated[str, Meta(min_length=1, max_length=160, pattern=r"^/[!-~]+\Z")]
_Version = Annotated[str, Meta(max_length=32, pattern=r"^[!-~]*\Z")]
_Block = Annotated[int, Meta(ge=0, le=MAX_BLOCKS)]


class Announcement(Struct, frozen=True, array_like=True):
    """A peer serves blocks [start, end) of a swarm.

    `state`: "serving" takes sessions; "joining" will, once it has fetched and loaded them (so that others who choose a
    span count on it); "leaving" takes no new session.

    block_time_s: compute of one decode token through one block; overhead_s: the rest of a step; queue_s: expected wait.
    kv_free_tokens of kv_total_tokens: token positions of KV memory for the whole span. rtts: (peer id, seconds).
    link_bytes_per_s: the best rate measured between this peer and another, 0 if none was measured yet. moving_to: the
    span that it fetches to serve it in place of [start, end).
    """

    swarm: Key
    start: _Block
    end: _Block
    state: Literal["serving", "joining", "leaving"] = "serving"
    addresses: Annotated[tuple[_Address, ...], Meta(max_length=MAX_ADDRESSES)] = ()
    block_time_s: Seconds = 0.0
    overhead_s: Seconds = 0.0
    kv_free_tokens: Count = 0
    kv_total_tokens: Count = 0
    sessions: Count = 0
    queue_s: Seconds = 0.0
    rtts: Annotated[tuple[tuple[_Peer, Seconds], ...], Meta(max_length=MAX_RTTS)] = ()
    version: _Version = ""
    link_bytes_per_s: Annotated[float, Meta(ge=0.0, le=1e13)] = 0.0
    moving_to: tuple[_Block, _Block] | None = None


_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(Announcement)


def encode_announcement(announcement: Announcement) -> bytes:
    """The value of a record. Raises LocalProtocolError for an announcement that a reader would refuse."""
    value = _encoder.encode(announcement)
    try:
        decode_announcement(value)
    except RemoteProtocolError as error:
        raise LocalProtocolError(f"not announced: {error.reason}") from None
    return value


def decode_announcement(value: bytes) -> Announcement:
    """The announcement in a record's value. Raises RemoteProtocolError for any bytes that are not a sensible one."""
    if len(value) > MAX_RECORD_VALUE_BYTES:
        raise RemoteProtocolError(f"announcement of {len(value)} bytes is over the limit")
    try:
        announcement = _decoder.decode(value)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise RemoteProtocolError(f"announcement refused: {str(error)[:200]}") from None
    _check(announcement)
    return announcement


def _check(announcement: Announcement) -> None:
    """What the types cannot say."""
    if announcement.start >= announcement.end:
        raise RemoteProtocolError(f"announced span {announcement.start}:{announcement.end} is empty")
    if announcement.moving_to and announcement.moving_to[0] >= announcement.moving_to[1]:
        raise RemoteProtocolError("announced to move to an empty span")
    if announcement.kv_free_tokens > announcement.kv_total_tokens:
        raise RemoteProtocolError("announced more free KV memory than there is")
    numbers = (announcement.block_time_s, announcement.overhead_s, announcement.queue_s, announcement.link_bytes_per_s)
    if not all(map(math.isfinite, numbers + tuple(rtt_s for _, rtt_s in announcement.rtts))):
        raise RemoteProtocolError("announced a number that is not finite")
    if len({peer for peer, _ in announcement.rtts}) != len(announcement.rtts):
        raise RemoteProtocolError("announced two round-trip times for one peer")


def newer(a: SignedRecord, b: SignedRecord) -> SignedRecord:
    """The newer of two records of one writer under one key: the higher seq.

    A writer that signs two records with one seq breaks the rules; all readers then agree on the one with the greater
    (expires_at, value, signature), in whatever order they meet them.
    """
    return max(a, b, key=lambda record: (record.seq, record.expires_at, record.value, record.signature))
