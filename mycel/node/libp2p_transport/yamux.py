"""Yamux (streams over one connection) as a state machine: bytes in, callbacks out, what to send through `push`.

Written anew, on the wire the same as libp2p's: there a cancelled write corrupts the connection, a cancelled read loses
data, a writer is reset when its peer pauses for 5 s, the 257th stream hangs, a peer that ignores the window fills the
memory, and each small message costs a window update back. Here nothing awaits, so nothing can be cancelled half-way.
The specification is hashicorp/yamux `spec.md`.

Ring: pure.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Protocol

_HEADER = struct.Struct("!BBHII")  # version, kind, flags, stream id, length
_HEADER_BYTES = _HEADER.size
_DATA, _WINDOW_UPDATE, _PING, _GO_AWAY = range(4)
_SYN, _ACK, _FIN, _RST = 1, 2, 4, 8
_INITIAL_WINDOW_BYTES = 256 * 1024
# Go's Yamux loses what was read beyond half a window each of the six times that it doubles one, out of an eighth of a
# MiB which keeps it going: pieces of this size cannot use that up.
_SEGMENT_BYTES = 16 * 1024
# A Noise message holds 65,535 bytes with its 16-byte tag: a full chunk is one of them, not one and a crumb.
MAX_CHUNK_BYTES = 65535 - 16 - 4 * _HEADER_BYTES


class MuxError(Exception):
    """The connection cannot go on: the peer broke Yamux's rules or said goodbye. The text says which."""


class StreamUser(Protocol):
    """Who is told what happens to a stream; called while bytes are read, so it must not wait."""

    def on_data(self, data: memoryview) -> None: ...

    def on_window(self) -> None:
        """The peer takes more: `send_window` grew."""
        ...

    def on_down(self, reason: str) -> None:
        """The stream is gone, by the peer's doing or with its connection. The last call."""
        ...


class MuxStream:
    """One stream. `up` until either side reset it, the peer ended it, or the connection went down."""

    __slots__ = ("_muxer", "id", "inbound", "largest_window", "recv_window", "send_window", "up", "user")

    def __init__(self, muxer: Muxer, stream_id: int, inbound: bool, recv_window: int) -> None:
        self._muxer = muxer
        self.id = stream_id
        self.inbound = inbound
        self.user: StreamUser | None = None
        self.send_window = _INITIAL_WINDOW_BYTES
        self.largest_window = _INITIAL_WINDOW_BYTES
        self.recv_window = recv_window
        self.up = True

    def write(self, parts: list[bytes | memoryview], size_bytes: int) -> None:
        """Send `parts`, together `size_bytes`: at most MAX_CHUNK_BYTES and at most `send_window`."""
        self.send_window -= size_bytes
        if size_bytes <= _SEGMENT_BYTES:
            self._muxer.push(b"".join((_HEADER.pack(0, _DATA, 0, self.id, size_bytes), *parts)))
            return
        data, pieces = memoryview(b"".join(parts)), list[bytes | memoryview]()
        for at in range(0, size_bytes, _SEGMENT_BYTES):
            segment = data[at : at + _SEGMENT_BYTES]
            pieces += (_HEADER.pack(0, _DATA, 0, self.id, len(segment)), segment)
        self._muxer.push(b"".join(pieces))

    def write_last(self, data: bytes) -> None:
        """Send `data` and end the stream in the same breath; what the peer still sends is dropped.

        With FIN: behind a reset, Go's Yamux forgets what its reader has not taken yet.
        """
        header = _HEADER.pack(0, _DATA, 0, self.id, len(data))
        self._muxer.drop(self, header + data, _FIN)

    def grant(self, size_bytes: int) -> None:
        """Let the peer send so much more."""
        self.recv_window += size_bytes
        self._muxer.push(_HEADER.pack(0, _WINDOW_UPDATE, 0, self.id, size_bytes))

    def reset(self) -> None:
        """Abandon the stream in both directions. `on_down` is not called."""
        self._muxer.drop(self)


class Muxer:
    """All streams of one connection.

    `push` takes bytes that leave in this order; `on_stream` gives the user of a stream that the peer opened, or None to
    refuse it; `on_pong` hears the number of an answered ping; `on_gone` hears of each stream that is open no more.
    """

    def __init__(
        self,
        initiator: bool,
        window_bytes: int,
        push: Callable[[bytes], None],
        on_stream: Callable[[MuxStream], StreamUser | None],
        on_pong: Callable[[int], None],
        on_gone: Callable[[MuxStream], None],
    ) -> None:
        self.push = push
        self.streams: dict[int, MuxStream] = {}
        self._on_stream = on_stream
        self._on_pong = on_pong
        self._on_gone = on_gone
        self._window_bytes = window_bytes
        self._next_id = 1 if initiator else 2
        self._peer_parity = 0 if initiator else 1
        self._partial = bytearray()  # of a header
        self._body_left = 0
        self._body_of: MuxStream | None = None
        self._body_flags = 0
        self._up = True

    # ---- what we do

    def open(self, user: StreamUser, opening: bytes) -> MuxStream:
        """A new stream whose first bytes are `opening`; the peer may refuse it with a reset."""
        stream = MuxStream(self, self._next_id, False, self._window_bytes)
        self._next_id += 2
        stream.user = user
        self.streams[stream.id] = stream
        stream.send_window -= len(opening)
        more = self._window_bytes - _INITIAL_WINDOW_BYTES
        self.push(
            _HEADER.pack(0, _WINDOW_UPDATE, _SYN, stream.id, more)
            + _HEADER.pack(0, _DATA, 0, stream.id, len(opening))
            + opening
        )
        return stream

    def ping(self, number: int) -> None:
        self.push(_HEADER.pack(0, _PING, _SYN, 0, number))

    def drop(self, stream: MuxStream, last: bytes = b"", flag: int = _RST) -> None:
        """Send `last` and a reset, and forget the stream. What the peer still sends for it is refused."""
        if not stream.up:
            return
        self.push(last + _HEADER.pack(0, _WINDOW_UPDATE, flag, stream.id, 0))
        self._forget(stream)

    def stop(self, reason: str) -> None:
        """The connection is gone: tell every stream."""
        self._up = False
        for stream in list(self.streams.values()):
            self._down(stream, reason)

    # ---- what the peer does

    def receive(self, data: bytes) -> None:
        """Take bytes of the connection, in order. Raises MuxError when it cannot go on."""
        view = memoryview(data)
        at, end = 0, len(view)
        while at < end and self._up:
            if self._body_left:
                stop = min(end, at + self._body_left)
                self._body(view[at:stop])
                at = stop
            elif not self._partial and end - at >= _HEADER_BYTES:
                self._frame(*_HEADER.unpack_from(view, at))
                at += _HEADER_BYTES
            else:
                stop = min(end, at + _HEADER_BYTES - len(self._partial))
                self._partial += view[at:stop]
                at = stop
                if len(self._partial) == _HEADER_BYTES:
                    header = _HEADER.unpack(self._partial)
                    self._partial.clear()
                    self._frame(*header)

    def _body(self, data: memoryview) -> None:
        self._body_left -= len(data)
        stream = self._body_of
        if stream is not None and stream.up and stream.user is not None:
            stream.user.on_data(data)
        if not self._body_left and stream is not None:
            self._flags(stream, self._body_flags)

    def _frame(self, version: int, kind: int, flags: int, stream_id: int, length: int) -> None:
        if version != 0 or kind > _GO_AWAY:
            raise MuxError(f"the peer sent an unknown frame (version {version}, kind {kind})")
        if kind == _PING:
            if flags & _SYN:
                self.push(_HEADER.pack(0, _PING, _ACK, 0, length))
            else:
                self._on_pong(length)
            return
        if kind == _GO_AWAY:
            raise MuxError("the peer closed the connection")
        stream = self._accept(stream_id) if flags & _SYN else self.streams.get(stream_id)
        if kind == _DATA:
            self._data(stream, stream_id, flags, length)
        elif stream is not None:
            if length:
                stream.send_window += length
                stream.largest_window = max(stream.largest_window, stream.send_window)
                if stream.user is not None:
                    stream.user.on_window()
            self._flags(stream, flags)

    def _data(self, stream: MuxStream | None, stream_id: int, flags: int, length: int) -> None:
        """The head of a data frame; its bytes come next."""
        if stream is not None and length > stream.recv_window:
            raise MuxError("the peer sent more than its window")
        self._body_left, self._body_of, self._body_flags = length, stream, flags
        if stream is not None:
            stream.recv_window -= length
            if not length:
                self._flags(stream, flags)
        elif not flags & (_SYN | _FIN | _RST):
            # A stream that we ended while the peer was sending: without this it would wait for a window for ever.
            self.push(_HEADER.pack(0, _WINDOW_UPDATE, _RST, stream_id, 0))

    def _accept(self, stream_id: int) -> MuxStream | None:
        if stream_id == 0 or stream_id % 2 != self._peer_parity or stream_id in self.streams:
            raise MuxError(f"the peer opened stream {stream_id}, which is not its to open")
        stream = MuxStream(self, stream_id, True, self._window_bytes)
        user = self._on_stream(stream)
        if user is None:
            stream.up = False
            self.push(_HEADER.pack(0, _WINDOW_UPDATE, _RST, stream_id, 0))
            return None
        stream.user = user
        self.streams[stream_id] = stream
        more = self._window_bytes - _INITIAL_WINDOW_BYTES
        self.push(_HEADER.pack(0, _WINDOW_UPDATE, _ACK, stream_id, more))
        return stream

    def _flags(self, stream: MuxStream, flags: int) -> None:
        if flags & _RST:
            self._down(stream, "the peer reset the stream")
        elif flags & _FIN and stream.up:
            # Our streams have no half-closed state: the frames above say when one ended.
            self.push(_HEADER.pack(0, _WINDOW_UPDATE, _RST, stream.id, 0))
            self._down(stream, "the peer closed the stream")

    def _down(self, stream: MuxStream, reason: str) -> None:
        if stream.up:
            self._forget(stream)
            if stream.user is not None:
                stream.user.on_down(reason)

    def _forget(self, stream: MuxStream) -> None:
        stream.up = False
        self.streams.pop(stream.id, None)
        self._on_gone(stream)
