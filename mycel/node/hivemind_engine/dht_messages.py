"""What a node and its DHT process say: requests and answers in frames over a socket, a bounded number of each.

Ring: pure.
"""

from __future__ import annotations

from typing import Annotated

import msgspec
from msgspec import Meta, Struct

from mycel.protocols.errors import LocalProtocolError

PREFIX_BYTES = 4
MAX_FRAME_BYTES = 8 * 1024 * 1024
MAX_IN_FLIGHT = 64  # requests: a request is answered before more than these are under way
MAX_VALUES = 4096  # of one key

_Text = Annotated[str, Meta(max_length=1024)]
_Blob = Annotated[bytes, Meta(max_length=16 * 1024)]


class Start(Struct, frozen=True, tag=True, array_like=True):
    """A DHT node that joins through multiaddrs and listens at others; without any of those it only asks."""

    initial: Annotated[tuple[_Text, ...], Meta(max_length=64)]
    listen: Annotated[tuple[_Text, ...], Meta(max_length=16)]


class Put(Struct, frozen=True, tag=True, array_like=True):
    """Keep `value` under (key, subkey) until `expires_at`, unix time in seconds."""

    node: int
    key: _Blob
    subkey: _Text
    value: _Blob
    expires_at: float


class Get(Struct, frozen=True, tag=True, array_like=True):
    node: int
    key: _Blob


class Stop(Struct, frozen=True, tag=True, array_like=True):
    node: int


class Started(Struct, frozen=True, tag=True, array_like=True):
    """`addresses` lead there, each with the DHT node's own peer id."""

    node: int
    addresses: tuple[_Text, ...]


class Kept(Struct, frozen=True, tag=True, array_like=True):
    holders: int


class Got(Struct, frozen=True, tag=True, array_like=True):
    values: Annotated[tuple[_Blob, ...], Meta(max_length=MAX_VALUES)]


class Stopped(Struct, frozen=True, tag=True, array_like=True):
    """The node is gone."""


class Failed(Struct, frozen=True, tag=True, array_like=True):
    reason: _Text


Request = Start | Put | Get | Stop
Reply = Started | Kept | Got | Stopped | Failed


class Asked(Struct, frozen=True, array_like=True):
    number: int
    body: Request


class Answered(Struct, frozen=True, array_like=True):
    number: int
    body: Reply


_encoder = msgspec.msgpack.Encoder()
_asked = msgspec.msgpack.Decoder(Asked)
_answered = msgspec.msgpack.Decoder(Answered)


def to_frame(message: Asked | Answered) -> bytes:
    body = _encoder.encode(message)
    if len(body) > MAX_FRAME_BYTES:
        raise LocalProtocolError(f"a message of {len(body)} bytes to the DHT process")
    return len(body).to_bytes(PREFIX_BYTES, "big") + body


def body_bytes(prefix: bytes) -> int:
    """How long the message behind a prefix is."""
    size_bytes = int.from_bytes(prefix, "big")
    if size_bytes > MAX_FRAME_BYTES:
        raise LocalProtocolError(f"the DHT process announced {size_bytes} bytes")
    return size_bytes


def read_asked(body: bytes) -> Asked:
    return _asked.decode(body)


def read_answered(body: bytes) -> Answered:
    return _answered.decode(body)
