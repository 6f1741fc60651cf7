"""A stream of frames over one Yamux stream: the `Stream` port.

Frames are cut while the connection is read, without a task for each stream, so there is nothing to cancel and nothing
between the socket and the caller but one queue. Yamux's window is the credit of the sender: it opens as frames are
taken, which is how a reader that pauses holds its sender back. A frame larger than the window passes an empty queue.

Ring: shell.
"""

from __future__ import annotations

from collections import deque
from typing import Literal

import trio

from mycel.node.libp2p_transport.framing import END, PREFIX_BYTES, FrameReader, prefix, take
from mycel.node.libp2p_transport.limits import TransportLimits
from mycel.node.libp2p_transport.tcp import Spawn, SteadyTcpStream
from mycel.node.libp2p_transport.yamux import MAX_CHUNK_BYTES, MuxStream
from mycel.protocols.errors import LocalProtocolError, PeerError, PeerUnreachable, RemoteProtocolError

_FRAME_OVERHEAD_BYTES = 128  # what an empty bytearray and its place in the queue cost, so that crumbs are not free
_CHUNKS_IN_A_ROW = 8


class HeldBytes:
    """What all streams of a connection hold for callers who have not taken it."""

    __slots__ = ("limit", "used")

    def __init__(self, limit: int) -> None:
        self.used = 0
        self.limit = limit


class FrameStream:
    """See `mycel.protocols.ports.Stream`."""

    def __init__(
        self, peer: str, mux: MuxStream, tcp: SteadyTcpStream, held: HeldBytes, spawn: Spawn, limits: TransportLimits
    ) -> None:
        self._peer = peer
        self._mux = mux
        self._tcp = tcp
        self._held = held
        self._spawn = spawn
        self._limits = limits
        self._reader = FrameReader(limits.max_frame_bytes)
        self._frames: deque[tuple[bytearray, int]] = deque()  # a frame, and what taking it gives back to the window
        self._held_bytes = 0
        self._taken_bytes = 0  # taken by the caller and not yet given back to the window
        self._ahead_bytes = 0  # of the frame that is not complete: given back before it was taken
        self._receivers = trio.lowlevel.ParkingLot()
        self._senders = trio.lowlevel.ParkingLot()
        self._turn = trio.Semaphore(1, max_value=1)  # whose frame is being sent; a task may give it to another
        self._failure: PeerError | None = None
        self._closed: Literal["aclose", "reset"] | None = None
        mux.user = self

    @property
    def peer(self) -> str:
        return self._peer

    # ---- receiving

    async def receive(self) -> memoryview | None:
        await trio.lowlevel.checkpoint_if_cancelled()
        while True:
            if self._closed is not None:
                raise LocalProtocolError(f"receive after {self._closed}")
            if self._frames:
                return memoryview(self._take())
            if self._reader.ended:
                return None
            if self._failure is not None:
                raise self._fresh_failure()
            await self._receivers.park()

    def _take(self) -> bytearray:
        frame, cost_bytes = self._frames.popleft()
        self._release(PREFIX_BYTES + len(frame) + _FRAME_OVERHEAD_BYTES)
        self._taken_bytes += cost_bytes
        self._open_window()
        return frame

    def _open_window(self) -> None:
        """Give back what was taken, half a window at a time. With an empty queue, all of a frame that is arriving."""
        partial_bytes = self._reader.partial_bytes
        arriving_bytes = 0 if self._frames else partial_bytes - self._ahead_bytes
        if self._taken_bytes + arriving_bytes >= self._limits.window_bytes // 2 and self._mux.up:
            self._mux.grant(self._taken_bytes + arriving_bytes)
            self._taken_bytes = 0
            self._ahead_bytes += arriving_bytes

    def on_data(self, data: memoryview) -> None:
        """Bytes of this stream arrived."""
        try:
            frames = self._reader.feed(data)
        except RemoteProtocolError as error:
            self._mux.reset()
            self._fail(RemoteProtocolError(error.reason, self._peer))
            return
        for frame in frames:
            self._frames.append((frame, PREFIX_BYTES + len(frame) - self._ahead_bytes))
            self._ahead_bytes = 0
        self._hold(len(data) + _FRAME_OVERHEAD_BYTES * len(frames))
        if self._held.used > self._held.limit:
            self._mux.reset()
            self._drop_frames()  # so that the other streams of the connection have room again
            self._fail(PeerUnreachable(self._peer, "reset here: frames that nobody took fill the memory"))
            return
        if frames or self._reader.ended:
            self._receivers.unpark_all()
        if not self._frames:
            self._open_window()

    def _hold(self, size_bytes: int) -> None:
        self._held_bytes += size_bytes
        self._held.used += size_bytes

    def _release(self, size_bytes: int) -> None:
        self._held_bytes -= size_bytes
        self._held.used -= size_bytes

    # ---- sending

    async def send(self, *parts: bytes | memoryview) -> None:
        if self._closed is not None:
            raise LocalProtocolError(f"send after {self._closed}")
        size_bytes = sum(part.nbytes if isinstance(part, memoryview) else len(part) for part in parts)
        if not 0 < size_bytes <= self._limits.max_frame_bytes:
            raise LocalProtocolError(f"a frame has 1 to {self._limits.max_frame_bytes} bytes, not {size_bytes}")
        await trio.lowlevel.checkpoint_if_cancelled()
        if self._turn.value:
            self._turn.acquire_nowait()  # `acquire` would spend a turn of the scheduler
        else:
            await self._turn.acquire()
        mine = True
        try:
            rest = deque(memoryview(part).cast("B") for part in (prefix(size_bytes), *parts))
            try:
                await self._send_rest(rest)
            except trio.Cancelled:
                if sum(map(len, rest)) < PREFIX_BYTES + size_bytes:
                    mine = self._finish_later(rest)
                raise
        finally:
            if mine:
                self._turn.release()

    async def _send_rest(self, rest: deque[memoryview]) -> None:
        """Send `rest` in whatever the peer takes. Cancelled, it holds what was not sent.

        Waiting for more credit than one byte could wait for ever: Go's Yamux may owe a sender most of its window until
        the last of it is used.
        """
        in_a_row = 0
        while rest:
            await self._wait_for_credit(1)
            size_bytes = min(MAX_CHUNK_BYTES, self._mux.send_window)
            chunk = take(rest, size_bytes)
            self._mux.write([*chunk], sum(map(len, chunk)))
            in_a_row += 1
            if in_a_row % _CHUNKS_IN_A_ROW == 0:  # a long frame must not have the loop for itself
                await trio.lowlevel.checkpoint()

    def _finish_later(self, rest: deque[memoryview]) -> bool:
        """The sender was cancelled inside a frame: a task sends a copy of the rest. False if it took over the turn."""
        if not self._mux.up:
            return True
        copy = deque([memoryview(b"".join(rest))])

        async def finish() -> None:
            try:
                await self._send_rest(copy)
            except (PeerError, LocalProtocolError):
                pass  # nobody waits for this frame: the stream is gone, and whoever uses it hears that
            finally:
                self._turn.release()

        self._spawn(finish)
        return False

    async def _wait_for_credit(self, size_bytes: int) -> None:
        """Until the peer takes `size_bytes` more and the socket has room. Raises if the stream ended instead."""
        while True:
            if self._failure is not None:
                raise self._fresh_failure()
            if self._closed == "reset" or not self._mux.up:
                raise LocalProtocolError("the stream was reset while a frame was being sent")
            if not self._tcp.has_room:
                await self._tcp.wait_for_room()
            elif self._mux.send_window < size_bytes:
                await self._senders.park()
            else:
                return

    def on_window(self) -> None:
        self._senders.unpark_all()

    # ---- ending

    async def aclose(self) -> None:
        if self._closed is not None:
            await trio.lowlevel.checkpoint()
            return
        self._close("aclose")
        try:
            if not self._mux.up:
                return
            with trio.move_on_after(self._limits.close_timeout_s):
                async with self._turn:  # a frame that was begun comes first
                    try:
                        await self._wait_for_credit(len(END))
                        self._mux.write_last(END)
                    except (PeerError, LocalProtocolError):
                        pass  # it ended without us
        finally:
            self._mux.reset()  # nothing, once the end is on its way
            await trio.lowlevel.checkpoint_if_cancelled()

    async def reset(self) -> None:
        self.abandon()
        await trio.lowlevel.checkpoint()

    def abandon(self) -> None:
        """`reset` for those who cannot wait."""
        if self._closed is None:
            self._close("reset")
        self._mux.reset()
        self._senders.unpark_all()

    def _close(self, how: Literal["aclose", "reset"]) -> None:
        self._closed = how
        self._drop_frames()
        self._receivers.unpark_all()

    def _drop_frames(self) -> None:
        self._frames.clear()
        self._release(self._held_bytes)

    def on_down(self, reason: str) -> None:
        """The peer or the connection ended the stream; after the peer's end mark that is how a stream closes."""
        self._fail(PeerUnreachable(self._peer, "the peer closed the stream" if self._reader.ended else reason))

    def _fail(self, failure: PeerError) -> None:
        if self._failure is None:
            self._failure = failure
        self._receivers.unpark_all()
        self._senders.unpark_all()

    def _fresh_failure(self) -> PeerError:
        """A new exception each time: one that is raised twice collects both tracebacks."""
        assert self._failure is not None
        if isinstance(self._failure, RemoteProtocolError):
            return RemoteProtocolError(self._failure.reason, self._peer)
        return PeerUnreachable(self._peer, self._failure.reason)
