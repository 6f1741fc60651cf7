"""A stream of frames over one Unix socket, behind which the daemon holds a libp2p stream: the `Stream` port.

The socket is read only while somebody waits for a frame, so the kernel and the daemon hold a sender back without any
credit of ours. A socket has two ends and no reset: an end without the end mark is what the peer takes for one.

Ring: shell.
"""

from __future__ import annotations

import socket
from collections import deque
from collections.abc import Awaitable, Callable
from contextlib import suppress
from itertools import islice
from typing import Literal, Protocol

import trio

from mycel.node.libp2p_transport.framing import END, PREFIX_BYTES, FrameReader, prefix
from mycel.node.libp2p_transport.limits import TransportLimits
from mycel.protocols.errors import LocalProtocolError, PeerError, PeerUnreachable, RemoteProtocolError

_READ_BYTES = 128 * 1024
_READS_IN_A_ROW = 8
_WRITES_IN_A_ROW = 8
_PARTS_AT_ONCE = 64  # the kernel takes 1,024
_FRAME_OVERHEAD_BYTES = 128

Spawn = Callable[[Callable[[], Awaitable[None]]], None]
# One for all streams: it holds bytes only between a read and the frames that are cut from it.
_buffer = memoryview(bytearray(_READ_BYTES))


class Owner(Protocol):
    """The connection to a peer, as its streams know it."""

    peer: str
    held_bytes: int

    def heard(self) -> None:
        """The peer gave a sign of life: it sent something, or took something."""
        ...

    def forget(self, stream: SocketStream) -> None:
        """The stream's socket is closed."""
        ...


class SocketStream:
    """See `mycel.protocols.ports.Stream`. `first` is what was read of it already."""

    def __init__(
        self, owner: Owner, sock: socket.socket, first: bytes, spawn: Spawn, limits: TransportLimits, inbound: bool
    ) -> None:
        self.inbound = inbound
        self._owner = owner
        self._socket = sock
        self._spawn = spawn
        self._limits = limits
        self._reader = FrameReader(limits.max_frame_bytes)
        self._frames: deque[bytearray] = deque()
        self._held_bytes = 0
        self._reads_in_a_row = 0
        self._turn = trio.Semaphore(1, max_value=1)  # whose frame is being sent; a task may give it to another
        self._failure: PeerError | None = None
        self._closed: Literal["aclose", "reset"] | None = None
        self._socket_open = True
        if first:
            self._feed(memoryview(first))

    @property
    def peer(self) -> str:
        return self._owner.peer

    # ---- receiving

    async def receive(self) -> memoryview | None:
        await trio.lowlevel.checkpoint_if_cancelled()
        while True:
            if self._closed is not None:
                raise LocalProtocolError(f"receive after {self._closed}")
            if self._frames:
                frame = self._frames.popleft()
                self._hold(-PREFIX_BYTES - len(frame) - _FRAME_OVERHEAD_BYTES)
                return memoryview(frame)
            if self._reader.ended:
                return None
            await self._read()

    async def _read(self) -> None:
        """More bytes, or the reason why there are none: raised only once everything that arrived was read."""
        try:
            n_read = self._socket.recv_into(_buffer) if self._socket_open else 0
        except BlockingIOError:
            if self._failure is not None:
                raise self._fresh_failure() from None
            self._reads_in_a_row = 0
            with suppress(trio.ClosedResourceError):  # somebody woke us to look
                await trio.lowlevel.wait_readable(self._socket)
            return
        except OSError:
            n_read = 0
        if not n_read:
            self._fail(PeerUnreachable(self.peer, "the stream broke"))
            raise self._fresh_failure()
        self._owner.heard()
        self._feed(_buffer[:n_read])
        self._reads_in_a_row += 1
        if self._reads_in_a_row >= _READS_IN_A_ROW:  # a peer that never pauses must not have the loop for itself
            self._reads_in_a_row = 0
            await trio.lowlevel.cancel_shielded_checkpoint()

    def _feed(self, data: memoryview) -> None:
        try:
            frames = self._reader.feed(data)
        except RemoteProtocolError as error:
            self._fail(RemoteProtocolError(error.reason, self.peer))
            self._close_socket()
            return
        self._frames.extend(frames)
        self._hold(len(data) + _FRAME_OVERHEAD_BYTES * len(frames))
        if self._owner.held_bytes > self._limits.max_held_bytes_per_connection:
            self._fail(PeerUnreachable(self.peer, "reset here: frames that nobody took fill the memory"))
            self._close_socket()

    def _hold(self, size_bytes: int) -> None:
        self._held_bytes += size_bytes
        self._owner.held_bytes += size_bytes

    # ---- sending

    async def send(self, *parts: bytes | memoryview) -> None:
        if self._closed is not None:
            raise LocalProtocolError(f"send after {self._closed}")
        views = [view for view in (memoryview(part).cast("B") for part in parts) if len(view)]
        size_bytes = sum(map(len, views))
        if not 0 < size_bytes <= self._limits.max_frame_bytes:
            raise LocalProtocolError(f"a frame has 1 to {self._limits.max_frame_bytes} bytes, not {size_bytes}")
        await trio.lowlevel.checkpoint_if_cancelled()
        if self._turn.value:
            self._turn.acquire_nowait()  # `acquire` would spend a turn of the scheduler
        else:
            await self._turn.acquire()
        mine = True
        try:
            rest = deque([memoryview(prefix(size_bytes)), *views])
            total_bytes = size_bytes + PREFIX_BYTES
            try:
                await self._write(rest)
            except trio.Cancelled:
                if sum(map(len, rest)) < total_bytes:
                    mine = self._finish_later(rest)
                raise
        finally:
            if mine:
                self._turn.release()

    async def _write(self, rest: deque[memoryview]) -> None:
        """Send `rest`. Cancelled, it holds what was not sent."""
        in_a_row = 0
        while True:
            if self._failure is not None:
                raise self._fresh_failure()
            if not self._socket_open:
                raise LocalProtocolError("the stream was reset while a frame was being sent")
            try:
                _drop(rest, self._socket.sendmsg(list(islice(rest, _PARTS_AT_ONCE))))
            except BlockingIOError:
                in_a_row = 0
                try:
                    await trio.lowlevel.wait_writable(self._socket)
                    self._owner.heard()  # there is room because the peer took what was before
                except trio.ClosedResourceError:
                    pass  # somebody woke us to look
            except OSError:
                # What the peer sent before it went is still to be read, so this is no failure of the stream yet.
                raise PeerUnreachable(self.peer, "the stream broke") from None
            if not rest:
                return
            in_a_row += 1
            if in_a_row % _WRITES_IN_A_ROW == 0:
                await trio.lowlevel.checkpoint()

    def _finish_later(self, rest: deque[memoryview]) -> bool:
        """The sender was cancelled inside a frame: a task sends a copy of the rest. False if it took over the turn."""
        if not self._socket_open:
            return True
        copy = deque([memoryview(b"".join(rest))])

        async def finish() -> None:
            try:
                await self._write(copy)
            except (PeerError, LocalProtocolError):
                pass  # nobody waits for this frame: the stream is gone, and whoever uses it hears that
            finally:
                self._turn.release()

        self._spawn(finish)
        return False

    # ---- ending

    async def aclose(self) -> None:
        if self._closed is not None:
            await trio.lowlevel.checkpoint()
            return
        self._closed = "aclose"
        self._frames.clear()
        self._wake()
        said = False
        try:
            with trio.move_on_after(self._limits.close_timeout_s):
                async with self._turn:  # a frame that was begun comes first
                    try:
                        await self._write(deque([memoryview(END)]))
                        self._socket.shutdown(socket.SHUT_WR)
                        said = True
                    except (PeerError, LocalProtocolError, OSError):
                        pass  # it ended without us
        finally:
            if said:
                self._spawn(self._drain)
            else:
                self._close_socket()
            await trio.lowlevel.checkpoint_if_cancelled()

    async def _drain(self) -> None:
        """Read on until the daemon has sent everything and closes: closed before that, it would reset the stream."""
        try:
            with trio.move_on_after(self._limits.close_timeout_s):
                while self._socket_open:
                    try:
                        if not self._socket.recv_into(_buffer):
                            break
                        await trio.lowlevel.checkpoint()
                    except BlockingIOError:
                        await trio.lowlevel.wait_readable(self._socket)
        except (OSError, trio.ClosedResourceError):
            pass
        finally:
            self._close_socket()

    async def reset(self) -> None:
        self.abandon()
        await trio.lowlevel.checkpoint()

    def abandon(self) -> None:
        """`reset` for those who cannot wait."""
        if self._closed is None:
            self._closed = "reset"
            self._close_socket()

    def lose(self, reason: str) -> None:
        """The connection is gone: whoever waits hears `reason`, after what arrived before."""
        self._fail(PeerUnreachable(self.peer, reason))
        self._wake()

    def cut_off(self) -> None:
        """The transport ends: nothing of this stream remains."""
        self._fail(PeerUnreachable(self.peer, "the connection was closed here"))
        self._close_socket()

    def _wake(self) -> None:
        if self._socket_open:
            trio.lowlevel.notify_closing(self._socket)

    def _close_socket(self) -> None:
        if self._socket_open:
            self._socket_open = False
            trio.lowlevel.notify_closing(self._socket)
            self._socket.close()
            self._hold(-self._held_bytes)
            self._owner.forget(self)

    def _fail(self, failure: PeerError) -> None:
        if self._failure is None:
            self._failure = failure

    def _fresh_failure(self) -> PeerError:
        """A new exception each time: one that is raised twice collects both tracebacks."""
        assert self._failure is not None
        if isinstance(self._failure, RemoteProtocolError):
            return RemoteProtocolError(self._failure.reason, self.peer)
        return PeerUnreachable(self.peer, self._failure.reason)


def _drop(parts: deque[memoryview], n_bytes: int) -> None:
    """Forget the first `n_bytes` of `parts`."""
    while parts and n_bytes >= len(parts[0]):
        n_bytes -= len(parts.popleft())
    if n_bytes:
        parts[0] = parts[0][n_bytes:]
