"""What the Go libp2p daemon is told and what it answers: the few of its protobuf messages that a transport needs.

Its control protocol is `varint length | message` over a Unix socket, both ways. Written by hand, since the generated
classes live in hivemind, which must not be imported beside libp2p. The daemon is a child of this process; all the same
nothing here trusts a length.

Ring: pure.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import IntEnum

from mycel.protocols.errors import LocalProtocolError

MAX_MESSAGE_BYTES = 4 * 1024 * 1024
_MAX_VARINT_BYTES = 10
_UNIX_CODE = 400  # of /unix in a multiaddr
_VARINT, _BYTES = 0, 2


class Ask(IntEnum):
    """Kinds of requests."""

    IDENTIFY = 0
    CONNECT = 1
    STREAM_OPEN = 2
    STREAM_HANDLER = 3
    LIST_PEERS = 5
    DISCONNECT = 7
    PERSISTENT = 9


@dataclass(frozen=True, slots=True)
class StreamInfo:
    """Who is at the other end of a stream (the bytes of a peer id), where, and what it speaks."""

    peer: bytes
    protocol: str
    address: bytes = b""


@dataclass(frozen=True, slots=True)
class Answer:
    """`error` is "" for yes; the rest is there for the kinds of requests that ask for it."""

    error: str = ""
    stream: StreamInfo | None = None
    addresses: tuple[bytes, ...] = ()  # of ourselves, as binary multiaddrs
    peers: frozenset[bytes] = frozenset()


# ---- bytes


def varint(number: int) -> bytes:
    """Seven bits a byte, the lowest first."""
    out = bytearray()
    while number > 0x7F:
        out.append(number & 0x7F | 0x80)
        number >>= 7
    out.append(number)
    return bytes(out)


def _read_varint(data: bytes, at: int) -> tuple[int, int] | None:
    """The number at `at` and where it ends, or None if it is not complete."""
    number = 0
    for index in range(_MAX_VARINT_BYTES):
        if at + index >= len(data):
            return None
        byte = data[at + index]
        number |= (byte & 0x7F) << 7 * index
        if byte < 0x80:
            return number, at + index + 1
    raise LocalProtocolError("the p2p daemon sent a number without an end")


def delimited(message: bytes) -> bytes:
    return varint(len(message)) + message


def cut(data: bytes) -> tuple[bytes, bytes] | None:
    """The first message in `data` and what comes after it, or None while it is not complete."""
    head = _read_varint(data, 0)
    if head is None:
        return None
    size_bytes, start = head
    if size_bytes > MAX_MESSAGE_BYTES:
        raise LocalProtocolError(f"the p2p daemon announced a message of {size_bytes} bytes")
    stop = start + size_bytes
    return (data[start:stop], data[stop:]) if len(data) >= stop else None


def _number(field: int, value: int) -> bytes:
    return varint(field << 3 | _VARINT) + varint(value)


def _blob(field: int, value: bytes) -> bytes:
    return varint(field << 3 | _BYTES) + varint(len(value)) + value


def _fields(data: bytes) -> Iterator[tuple[int, int | bytes]]:
    at = 0
    while at < len(data):
        head = _read_varint(data, at)
        value = head and _read_varint(data, head[1])
        if head is None or value is None:
            raise LocalProtocolError("the p2p daemon sent half a message")
        field, at = head[0] >> 3, value[1]
        kind = head[0] & 7
        if kind == _BYTES:
            if at + value[0] > len(data):
                raise LocalProtocolError("the p2p daemon sent half a message")
            yield field, data[at : at + value[0]]
            at += value[0]
        elif kind == _VARINT:
            yield field, value[0]
        else:
            raise LocalProtocolError(f"the p2p daemon sent a field of kind {kind}")


def _blobs(data: bytes, wanted: int) -> list[bytes]:
    return [value for field, value in _fields(data) if field == wanted and isinstance(value, bytes)]


# ---- requests: whole, with their length


def simple(kind: Ask) -> bytes:
    """IDENTIFY, LIST_PEERS or PERSISTENT."""
    return delimited(_number(1, kind))


def connect(peer: bytes, addresses: Sequence[bytes], timeout_s: int) -> bytes:
    """Dial a peer at binary multiaddrs, unless it is connected."""
    body = _blob(1, peer) + b"".join(_blob(2, address) for address in addresses) + _number(3, timeout_s)
    return delimited(_number(1, Ask.CONNECT) + _blob(2, body))


def open_stream(peer: bytes, protocol: str, timeout_s: int) -> bytes:
    """After the answer, the connection that this was sent on is the stream."""
    body = _blob(1, peer) + _blob(2, protocol.encode()) + _number(3, timeout_s)
    return delimited(_number(1, Ask.STREAM_OPEN) + _blob(3, body))


def handle_streams(path: str, protocol: str) -> bytes:
    """Have streams of `protocol` delivered at the Unix socket `path`, each as a connection begun by a StreamInfo."""
    name = path.encode()
    address = varint(_UNIX_CODE) + varint(len(name)) + name
    body = _blob(1, address) + _blob(2, protocol.encode()) + _number(3, 0)
    return delimited(_number(1, Ask.STREAM_HANDLER) + _blob(4, body))


def disconnect(peer: bytes) -> bytes:
    return delimited(_number(1, Ask.DISCONNECT) + _blob(7, _blob(1, peer)))


def private_key_file(seed: bytes, public_key: bytes) -> bytes:
    """An Ed25519 key in libp2p's own form: kind 1, then seed and public key."""
    return _number(1, 1) + _blob(2, seed + public_key)


# ---- answers


def read_stream_info(message: bytes) -> StreamInfo:
    """What the daemon says first on a connection that brings a stream. Raises LocalProtocolError."""
    peer, protocol = _blobs(message, 1), _blobs(message, 3)
    if not peer or not protocol:
        raise LocalProtocolError("the p2p daemon brought a stream without a peer or a protocol")
    address = _blobs(message, 2)
    return StreamInfo(peer[0], protocol[0].decode(errors="replace"), address[0] if address else b"")


def read_answer(message: bytes) -> Answer:
    """Raises LocalProtocolError for what is no answer."""
    error, stream = "", None
    addresses: tuple[bytes, ...] = ()
    peers: set[bytes] = set()
    for field, value in _fields(message):
        if field == 1 and value == 1:
            error = error or "it does not say why"
        elif not isinstance(value, bytes):
            continue
        elif field == 2:
            error = b" ".join(_blobs(value, 1)).decode(errors="replace") or error
        elif field == 3:
            stream = read_stream_info(value)
        elif field == 4:
            addresses = tuple(_blobs(value, 2))
        elif field == 6:
            peers.update(_blobs(value, 1)[:1])
    return Answer(error, stream, addresses, frozenset(peers))
