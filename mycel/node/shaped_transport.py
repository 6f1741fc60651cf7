"""A transport whose links are worse than they are: any `Transport`, wrapped at the ports.

The sender lets each frame wait until the shape says that it has arrived, and only then gives it to the stream below; so
with both ends wrapped each direction pays once. What is below is fast and does the rest: identity, order, ends. Opening
a stream costs its round trip, connecting five more.

What is not shaped: heartbeats, so that silence is noticed as ever, and the news that a peer's process is gone.

Ring: shell.
"""

from __future__ import annotations

from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from random import Random
from typing import Literal

import trio

from mycel.node.background import background
from mycel.protocols.errors import LocalProtocolError, PeerError, PeerUnreachable, RemoteProtocolError
from mycel.protocols.ports import MAX_FRAME_BYTES, Handler, Stream, Transport
from mycel.swarm.chaos import Shape, Uplink, Way

__all__ = ["ShapedTransport", "shaped"]

OPEN_ROUND_TRIPS = 1
CONNECT_ROUND_TRIPS = 5  # TCP, the choice of Noise, its handshake, the choice of Yamux
# How long the end of a stream waits behind frames that the peer does not take.
CLOSE_S = 2.0
_MAX_WAYS = 4096

End = Literal["aclose", "reset"]


@asynccontextmanager
async def shaped(transport: Transport, shape: Shape) -> AsyncIterator[Transport]:
    """`transport` with every link like `shape`; itself if that changes nothing.

    When the block ends, frames that are on their way still arrive, as long as that takes no longer than CLOSE_S.
    """
    if shape.is_plain:
        yield transport
        return
    async with background() as tasks:
        wrapped = ShapedTransport(transport, shape, tasks)
        try:
            yield wrapped
            with trio.move_on_after(CLOSE_S):
                await wrapped.drained()
        finally:
            wrapped.closed = True


class ShapedTransport:
    """See `mycel.protocols.ports.Transport`. Made by `shaped`."""

    def __init__(self, inner: Transport, shape: Shape, tasks: trio.Nursery) -> None:
        self.shape = shape
        self.closed = False
        self._inner = inner
        self._tasks = tasks
        self._uplink = Uplink(shape.bytes_per_s)
        self._ways: dict[str, Way] = {}
        self._deliveries: dict[Delivery, None] = {}  # in order, so that a simulation repeats

    @property
    def peer_id(self) -> str:
        return self._inner.peer_id

    @property
    def addresses(self) -> tuple[str, ...]:
        return self._inner.addresses

    async def open(self, peer: str, protocol: str) -> ShapedStream:
        way, is_new = self._way(peer), peer not in self._inner.connected()
        await trio.sleep(way.round_trips_s(OPEN_ROUND_TRIPS))
        stream = await self._inner.open(peer, protocol)
        if is_new:
            try:
                await trio.sleep(way.round_trips_s(CONNECT_ROUND_TRIPS))
            except BaseException:
                with trio.CancelScope(shield=True):
                    await stream.reset()
                raise
        return ShapedStream(self, stream, way)

    def serve(self, protocol: str, handler: Handler) -> None:
        self._inner.serve(protocol, partial(self._handle, handler))

    async def _handle(self, handler: Handler, inner: Stream) -> None:
        stream = ShapedStream(self, inner, self._way(inner.peer))
        try:
            try:
                await handler(stream)
            except Exception:
                await stream.reset()
                await stream.delivered()
                raise
            await stream.aclose()
            # The transport below ends the stream as soon as this returns.
            await stream.delivered()
        finally:
            stream.drop()

    def learn(self, peer: str, addresses: Sequence[str]) -> None:
        self._inner.learn(peer, addresses)

    def rtt_s(self, peer: str) -> float | None:
        """What was measured below, and what the shape adds to it."""
        measured_s = self._inner.rtt_s(peer)
        return None if measured_s is None else measured_s + self.shape.mean_rtt_s

    def connected(self) -> frozenset[str]:
        return self._inner.connected()

    def _way(self, peer: str) -> Way:
        if peer not in self._ways:
            if len(self._ways) >= _MAX_WAYS:
                del self._ways[next(iter(self._ways))]
            dice = Random(f"{self.shape.seed} {self.peer_id} {peer}")
            self._ways[peer] = Way(self.shape, self._uplink, dice)
        return self._ways[peer]

    def start(self, delivery: Delivery) -> None:
        """Let a stream deliver what it has on the way."""
        self._deliveries[delivery] = None
        self._tasks.start_soon(self._deliver, delivery)

    async def _deliver(self, delivery: Delivery) -> None:
        try:
            await delivery.run()
        finally:
            del self._deliveries[delivery]
            delivery.over.set()

    async def drained(self) -> None:
        """Wait until nothing is on its way."""
        while self._deliveries:
            await next(iter(self._deliveries)).over.wait()


@dataclass(eq=False, slots=True)
class Delivery:
    """A task that gives a stream's frames to the stream below while there are any on the way."""

    run: Callable[[], Awaitable[None]]
    scope: trio.CancelScope = field(default_factory=trio.CancelScope)
    over: trio.Event = field(default_factory=trio.Event)


class ShapedStream:
    """See `mycel.protocols.ports.Stream`."""

    def __init__(self, owner: ShapedTransport, inner: Stream, way: Way) -> None:
        self._owner, self._inner, self._way = owner, inner, way
        # When it arrives, and what: a frame, or how the stream ends.
        self._on_the_way: deque[tuple[float, bytes | End]] = deque()
        self._in_flight_bytes = 0
        self._room = trio.lowlevel.ParkingLot()
        self._receiving: set[trio.CancelScope] = set()
        self._failure: PeerError | None = None
        self._closed: End | None = None
        self._delivery: Delivery | None = None

    @property
    def peer(self) -> str:
        return self._inner.peer

    # ---- sending

    async def send(self, *parts: bytes | memoryview) -> None:
        size_bytes = sum(part.nbytes if isinstance(part, memoryview) else len(part) for part in parts)
        if not 0 < size_bytes <= MAX_FRAME_BYTES:
            raise LocalProtocolError(f"a frame has 1 to {MAX_FRAME_BYTES} bytes, not {size_bytes}")
        await trio.lowlevel.checkpoint_if_cancelled()
        while not self._may_send(size_bytes):
            await self._room.park()
        self._in_flight_bytes += size_bytes
        self._put(size_bytes, b"".join(parts))

    def _may_send(self, size_bytes: int) -> bool:
        if self._closed is not None:
            raise LocalProtocolError(f"send after {self._closed}")
        if self._failure is not None:
            raise _again(self._failure)
        if self._owner.closed:
            raise PeerUnreachable(self.peer, "this transport is closed")
        return self._in_flight_bytes == 0 or self._in_flight_bytes + size_bytes <= self._owner.shape.window_bytes

    def _put(self, size_bytes: int, what: bytes | End) -> None:
        self._on_the_way.append((self._way.arrival_s(trio.current_time(), size_bytes), what))
        if self._delivery is None:
            self._delivery = Delivery(self._deliver)
            self._owner.start(self._delivery)

    async def _deliver(self) -> None:
        """Give everything to the stream below when its time has come."""
        delivery = self._delivery
        if delivery is None:
            return  # forgotten before it began
        try:
            with delivery.scope as scope:
                while self._on_the_way:
                    await self._deliver_one(*self._on_the_way[0])
                    self._on_the_way.popleft()
            if scope.cancelled_caught and self._closed is not None:
                await self._inner.reset()  # the end did not get through in time
        except PeerError as error:
            self._fail(error)
        finally:
            self.drop()

    async def _deliver_one(self, due_s: float, what: bytes | End) -> None:
        if due_s > trio.current_time():
            await trio.sleep_until(due_s)
        if isinstance(what, bytes):
            await self._inner.send(what)
            self._in_flight_bytes -= len(what)
            self._room.unpark_all()
        elif what == "aclose":
            await self._inner.aclose()
        else:
            await self._inner.reset()

    async def delivered(self) -> None:
        """Wait until nothing of this stream is on its way."""
        if self._delivery is not None:
            await self._delivery.over.wait()

    # ---- receiving

    async def receive(self) -> memoryview | None:
        if self._closed is None:
            with trio.CancelScope() as scope:
                self._receiving.add(scope)
                try:
                    return await self._inner.receive()
                except PeerError as error:
                    self._fail(error)
                    raise
                finally:
                    self._receiving.discard(scope)
        await trio.lowlevel.checkpoint_if_cancelled()
        raise LocalProtocolError(f"receive after {self._closed}")

    # ---- ending

    async def aclose(self) -> None:
        self._end("aclose")
        await trio.lowlevel.checkpoint()

    async def reset(self) -> None:
        self._end("reset")
        await trio.lowlevel.checkpoint()

    def _end(self, how: End) -> None:
        """The end travels behind what was sent; after the first one there is nothing left to end."""
        if self._closed is not None:
            return
        self._closed = how
        for scope in self._receiving:
            scope.cancel()
        self._room.unpark_all()
        if self._owner.closed:
            return  # the transport below is about to end all its streams
        self._put(0, how)
        assert self._delivery is not None
        # What is sent arrives before an aclose; a reset does not wait for a link that is slow.
        due_s = self._on_the_way[-1][0] if how == "aclose" else trio.current_time() + self._way.shape.rtt_s
        self._delivery.scope.deadline = due_s + CLOSE_S

    def drop(self) -> None:
        """Forget what is on its way: nobody is there to deliver it, or to take it."""
        self._on_the_way.clear()
        self._in_flight_bytes = 0
        self._room.unpark_all()
        if self._delivery is not None:
            self._delivery.scope.cancel()
            self._delivery = None

    def _fail(self, error: PeerError) -> None:
        self._failure = self._failure or error
        self._room.unpark_all()


def _again(error: PeerError) -> PeerError:
    """A new exception each time: one that is raised twice collects both tracebacks."""
    if isinstance(error, RemoteProtocolError):
        return RemoteProtocolError(error.reason, error.peer)
    return PeerUnreachable(error.peer, error.reason)
