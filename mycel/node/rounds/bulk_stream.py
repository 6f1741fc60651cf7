"""A `Stream` on a TCP connection of its own: large frames in sealed records, with few copies and few awaits.

A frame is cut into records of 1 MiB; they are sealed out of the caller's memory, and opened into the frame's own. An
empty record is the end that `aclose` sends. A sender that is cancelled inside a frame ends the stream: what it had sent
cannot be taken back.

Ring: shell.
"""

from __future__ import annotations

import socket
import sys
from collections import deque
from contextlib import suppress

import torch
import trio

from mycel.node.rounds.bulk_wire import HEADER, RECORD_BYTES, SLACK_BYTES, TAG_BYTES, Sealer, Unsealer
from mycel.protocols.errors import LocalProtocolError, PeerError, PeerUnreachable, RemoteProtocolError
from mycel.protocols.ports import MAX_FRAME_BYTES

_OVERHEAD_BYTES = HEADER.size + TAG_BYTES
# A dead host is noticed after about so long, whether something is on its way to it or not.
_SILENT_S = 30
_CLOSE_S = 2.0


def room(size_bytes: int) -> memoryview:
    """Writable memory that nobody has touched: zeroing it first costs as much as filling it."""
    view: memoryview = torch.empty(size_bytes, dtype=torch.uint8).numpy().data
    return view


class BulkStream:
    """See `mycel.protocols.ports.Stream`. `stream` is a connection on which both sides hold the keys."""

    def __init__(self, peer: str, stream: trio.SocketStream, send_key: bytes, receive_key: bytes) -> None:
        self._peer = peer
        self._stream = stream
        # trio's own send and recv take a turn of the scheduler each; the plain socket underneath does not block either.
        self._socket: socket.socket = stream.socket._sock  # type: ignore[attr-defined]
        self._sealer, self._unsealer = Sealer(send_key), Unsealer(receive_key)
        self._sending = trio.Lock()
        self._out = room(RECORD_BYTES + _OVERHEAD_BYTES + SLACK_BYTES)
        self._in = room(RECORD_BYTES + _OVERHEAD_BYTES)
        self._have = 0  # bytes of the next record in `_in`
        self._frame: memoryview | None = None
        self._frame_done = 0
        self._ended = False
        self._failure: PeerError | None = None
        self._closed = ""
        self.over = trio.Event()
        _set_options(self._socket)

    @property
    def peer(self) -> str:
        return self._peer

    # ---- sending

    async def send(self, *parts: bytes | memoryview) -> None:
        views = deque(memoryview(part).cast("B") for part in parts)
        size_bytes = sum(map(len, views))
        if not 0 < size_bytes <= MAX_FRAME_BYTES:
            raise LocalProtocolError(f"a frame has 1 to {MAX_FRAME_BYTES} bytes, not {size_bytes}")
        await trio.lowlevel.checkpoint_if_cancelled()
        async with self._sending:
            self._check("send")
            left = size_bytes
            try:
                while left:
                    data = _take(views, min(RECORD_BYTES, left))
                    left -= len(data)
                    await self._send_record(data, left)
            except trio.Cancelled:
                self._fail(PeerUnreachable(self._peer, "sending on this lane was given up inside a frame"))
                raise

    async def _send_record(self, data: memoryview, frame_left: int) -> None:
        stop = self._sealer.seal(data, frame_left, self._out)
        sent = 0
        while sent < stop:
            try:
                sent += self._socket.send(self._out[sent:stop])
            except BlockingIOError:
                await self._wait(trio.lowlevel.wait_writable)
            except OSError as error:
                raise self._fail(PeerUnreachable(self._peer, _lost(error))) from None
        if frame_left:
            await trio.lowlevel.checkpoint()  # a long frame must not have the loop for itself

    # ---- receiving

    async def receive(self) -> memoryview | None:
        await trio.lowlevel.checkpoint_if_cancelled()
        while True:
            self._check("receive")
            if self._ended:
                return None
            try:
                frame = await self._receive_record()
            except RemoteProtocolError as error:
                # Whoever is on the way could have sent it: it proves nothing of the peer.
                raise self._fail(PeerUnreachable(self._peer, error.reason)) from None
            if frame is not None:
                return frame

    async def _receive_record(self) -> memoryview | None:
        """Take in one record; the frame that it completes. Cancelled, it goes on where it was."""
        await self._fill(HEADER.size)
        size_bytes, frame_left = HEADER.unpack(self._in[: HEADER.size])
        done, total = self._frame_done, self._frame_done + size_bytes + frame_left
        if size_bytes > RECORD_BYTES or total > MAX_FRAME_BYTES or (frame_left and size_bytes != RECORD_BYTES):
            raise RemoteProtocolError(f"sent a record of {size_bytes} bytes with {frame_left} to come")
        stop = HEADER.size + size_bytes + TAG_BYTES
        await self._fill(stop)
        if self._frame is not None and len(self._frame) != total + SLACK_BYTES:
            raise RemoteProtocolError("sent records that make no frame")
        into = self._frame if self._frame is not None else room(total + SLACK_BYTES)
        self._unsealer.unseal(self._in[: HEADER.size], self._in[HEADER.size : stop], into[done:])
        self._have = 0
        self._frame, self._frame_done = into, done + size_bytes
        if frame_left:
            await trio.lowlevel.cancel_shielded_checkpoint()
            return None
        self._frame, self._frame_done = None, 0
        self._ended = total == 0
        return None if self._ended else into[:total]

    async def _fill(self, stop: int) -> None:
        """Read until `stop` bytes of the record are there."""
        while self._have < stop:
            try:
                n_read = self._socket.recv_into(self._in[self._have : stop])
            except BlockingIOError:
                await self._wait(trio.lowlevel.wait_readable)
                continue
            except OSError as error:
                raise self._fail(PeerUnreachable(self._peer, _lost(error))) from None
            if not n_read:
                raise self._fail(PeerUnreachable(self._peer, "the lane was lost"))
            self._have += n_read

    async def _wait(self, what: object) -> None:
        try:
            await what(self._socket)  # type: ignore[operator]
        except (trio.ClosedResourceError, OSError, ValueError):
            self._check("use")
            raise self._fail(PeerUnreachable(self._peer, "the lane was lost")) from None

    # ---- ending

    async def aclose(self) -> None:
        if not self._closed and self._failure is None:
            with trio.move_on_after(_CLOSE_S), suppress(PeerError, LocalProtocolError):
                async with self._sending:
                    await self._send_record(memoryview(b""), 0)
        self._close("aclose")
        await trio.lowlevel.checkpoint()

    async def reset(self) -> None:
        self.abandon()
        await trio.lowlevel.checkpoint()

    def abandon(self) -> None:
        """`reset` for those who cannot wait."""
        self._close("reset")

    def _close(self, how: str) -> None:
        self._closed = self._closed or how
        self._hang_up()

    def _fail(self, failure: PeerError) -> PeerError:
        self._failure = self._failure or failure
        self._hang_up()
        return failure

    def _hang_up(self) -> None:
        self._stream.socket.close()
        self.over.set()

    def _check(self, verb: str) -> None:
        if self._closed:
            raise LocalProtocolError(f"{verb} after {self._closed}")
        if self._failure is not None:
            raise PeerUnreachable(self._peer, self._failure.reason)


def _take(views: deque[memoryview], size_bytes: int) -> memoryview:
    """The first `size_bytes` of the parts: out of their own memory if one part has them all."""
    head = views[0]
    if len(head) >= size_bytes:
        views[0] = head[size_bytes:]
        if len(head) == size_bytes:
            views.popleft()
        return head[:size_bytes]
    joined = bytearray()
    while len(joined) < size_bytes:
        part = _take(views, min(len(views[0]), size_bytes - len(joined)))
        joined += part
    return memoryview(joined)


def _lost(error: OSError) -> str:
    return f"the lane was lost: {error.strerror or error}"


def _set_options(sock: socket.socket) -> None:
    options = [
        (socket.IPPROTO_TCP, socket.TCP_NODELAY, 1),
        (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
    ]
    if sys.platform == "linux":
        options += [
            (socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, _SILENT_S // 3),
            (socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, _SILENT_S // 6),
            (socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 4),
            (socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 1000 * _SILENT_S),
        ]
    for level, option, value in options:
        with suppress(OSError):  # the peer may be gone already; what a platform lacks only makes it slower to notice
            sock.setsockopt(level, option, value)
