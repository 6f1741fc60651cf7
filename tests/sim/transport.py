"""The `Transport` and `Stream` ports on a simulated network, with the same edges as the real adapter's."""

from __future__ import annotations

import zlib
from collections import deque
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING

import trio

from mycel.protocols.errors import LocalProtocolError, PeerError, PeerRefused, PeerTimeout, PeerUnreachable
from mycel.protocols.ports import MAX_FRAME_BYTES, Handler
from mycel.security.identity import Identity
from tests.sim.net import Connection, Item

if TYPE_CHECKING:
    from tests.sim.world import World

# Which node the running task belongs to: what is left of a crashed node must stop, what a test does with it is a bug.
_home: ContextVar[SimTransport | None] = ContextVar("_home", default=None)


class SimStream:
    """One end of a stream: frames that arrived, credit to send, and how it ended."""

    def __init__(self, owner: SimTransport, connection: Connection, stream_id: int, protocol: str) -> None:
        self._owner, self._connection = owner, connection
        self.stream_id, self.protocol = stream_id, protocol
        self._inbox: deque[bytearray] = deque()
        self._in_flight_bytes = 0
        self._closed = self._ended = False
        self._broken = ""
        self._busy: set[str] = set()
        self._readable, self._writable = trio.lowlevel.ParkingLot(), trio.lowlevel.ParkingLot()
        self._answer = trio.Event()
        self._refused: str | None = None
        connection.add(owner, self)

    @property
    def peer(self) -> str:
        return self._connection.other(self._owner).peer_id

    async def send(self, *parts: bytes | memoryview) -> None:
        size_bytes = sum(len(part) for part in parts)
        if not 0 < size_bytes <= MAX_FRAME_BYTES:
            raise LocalProtocolError(f"a frame of {size_bytes} bytes; 1 to {MAX_FRAME_BYTES} are allowed")
        await self._owner.present()
        await trio.lowlevel.checkpoint_if_cancelled()
        with self._alone("send"):
            while not self._may_send(size_bytes):
                await self._writable.park()
            self._in_flight_bytes += size_bytes
            self._push(Item("frame", self.stream_id, frame=bytearray().join(parts)))
        await trio.lowlevel.cancel_shielded_checkpoint()  # the frame is on its way: too late to cancel

    def _may_send(self, size_bytes: int) -> bool:
        if self._closed:
            raise LocalProtocolError("send on a stream that this side closed")
        if self._broken:
            raise PeerUnreachable(self.peer, self._broken)
        window_bytes = self._owner.world.options.window_bytes
        return self._in_flight_bytes == 0 or self._in_flight_bytes + size_bytes <= window_bytes

    async def receive(self) -> memoryview | None:
        await self._owner.present()
        await trio.lowlevel.checkpoint_if_cancelled()
        with self._alone("receive"):
            while not self._may_receive():
                await self._readable.park()
            frame = self._inbox.popleft() if self._inbox else None
        if frame is not None:
            self._push(Item("credit", self.stream_id, amount_bytes=len(frame)))
        await trio.lowlevel.cancel_shielded_checkpoint()  # the frame is taken: too late to cancel
        return None if frame is None else memoryview(frame)

    def _may_receive(self) -> bool:
        if self._closed:
            raise LocalProtocolError("receive on a stream that this side closed")
        if self._inbox or self._ended:
            return True
        if self._broken:
            raise PeerUnreachable(self.peer, self._broken)
        return False

    async def aclose(self) -> None:
        self.close_now()
        await trio.lowlevel.cancel_shielded_checkpoint()

    async def reset(self) -> None:
        self.reset_now("reset by the peer")
        await trio.lowlevel.cancel_shielded_checkpoint()

    def close_now(self) -> None:
        """As `aclose`; what was sent is still on its way, and the end comes behind it."""
        if self._closed:
            return
        self._push(Item("end", self.stream_id))
        self._close()

    def reset_now(self, reason: str) -> None:
        """As `reset`; `reason` is what the peer reads. After an aclose there is nothing left to abandon."""
        if self._closed:
            return
        self._connection.drop_lane(self._owner, self.stream_id)
        self._push(Item("reset", self.stream_id, text=reason))
        self._close()

    def _close(self) -> None:
        self._closed = True
        self._inbox.clear()
        self._connection.remove(self._owner, self.stream_id)  # a frame that still comes is answered with a reset
        self._wake()

    async def accepted(self) -> None:
        """Wait for the peer's answer to our opening. Raises PeerRefused, PeerTimeout or PeerUnreachable."""
        patience_s = self._owner.world.options.patience_s
        with trio.move_on_after(patience_s) as scope:
            await self._answer.wait()
        if scope.cancelled_caught:
            raise PeerTimeout(self.peer, f"did not accept a stream within {patience_s:.1f} s")
        if self._refused is not None:
            raise PeerRefused(self.peer, self._refused)
        if self._broken:
            raise PeerUnreachable(self.peer, self._broken)

    def on_item(self, item: Item) -> None:
        """Something arrived for this stream."""
        if item.kind == "frame" and item.frame is not None:
            self._inbox.append(item.frame)
            self._owner.world.record(
                "frame",
                self._connection.other(self._owner).name,
                self._owner.name,
                f"{self.protocol}#{self.stream_id}",
                f"{len(item.frame)} bytes {zlib.crc32(item.frame):08x}",
            )
        elif item.kind == "end":
            self._ended = True
        elif item.kind == "reset":
            self._broken = item.text
        elif item.kind == "credit":
            self._in_flight_bytes -= item.amount_bytes
        elif item.kind == "refuse":
            self._refused = item.text
        if item.kind in ("accept", "refuse"):
            self._answer.set()
        self._wake()

    def on_broken(self, reason: str) -> None:
        """The connection is dead."""
        self._broken = self._broken or reason
        self._answer.set()
        self._wake()

    def _wake(self) -> None:
        self._readable.unpark_all()
        self._writable.unpark_all()

    def _push(self, item: Item) -> None:
        self._connection.push(self._owner, item)

    @contextmanager
    def _alone(self, verb: str) -> Iterator[None]:
        if verb in self._busy:
            raise LocalProtocolError(f"two tasks {verb} on one stream at once")
        self._busy.add(verb)
        try:
            yield
        finally:
            self._busy.discard(verb)


class SimTransport:
    """One life of a node, from its start to its crash. A restarted node has a new one."""

    def __init__(self, world: World, name: str, identity: Identity, address: str) -> None:
        self.world, self.name, self.identity = world, name, identity
        self.crashed = False
        self._address = address
        self._handlers: dict[str, Handler] = {}
        self._known: dict[str, tuple[str, ...]] = {}
        self._connections: dict[str, Connection] = {}
        self._dialling: dict[str, trio.Lock] = {}
        self._scopes: dict[int, trio.CancelScope] = {}
        self._n_tasks = 0

    @property
    def peer_id(self) -> str:
        return self.identity.peer_id

    @property
    def addresses(self) -> tuple[str, ...]:
        return (self._address,)

    def serve(self, protocol: str, handler: Handler) -> None:
        self._handlers[protocol] = handler

    def learn(self, peer: str, addresses: Sequence[str]) -> None:
        self._known[peer] = tuple(dict.fromkeys((*addresses, *self._known.get(peer, ()))))

    def rtt_s(self, peer: str) -> float | None:
        """The round trip over the link as it is now: the heartbeats' average, without simulating heartbeats."""
        if peer not in self._connections:
            return None
        other = self._connections[peer].other(self).name
        ways = (self.world.faults(self.name, other), self.world.faults(other, self.name))
        return sum(way.latency_s + way.jitter_s / 2 for way in ways)

    def connected(self) -> frozenset[str]:
        return frozenset(self._connections)

    async def open(self, peer: str, protocol: str) -> SimStream:
        await self.present()
        if peer == self.peer_id:
            raise LocalProtocolError("a stream to ourselves")
        async with self._dialling.setdefault(peer, trio.Lock()):
            connection = self._connections.get(peer) or await self._dial(peer)
        stream = SimStream(self, connection, connection.new_stream_id(), protocol)
        connection.push(self, Item("open", stream.stream_id, text=protocol))
        try:
            await stream.accepted()
        except BaseException:
            stream.reset_now("the opener gave up")
            raise
        return stream

    async def _dial(self, peer: str) -> Connection:
        failure: PeerError = PeerUnreachable(peer, "no address is known")
        for address in self._known.get(peer, ()):
            try:
                return await self._dial_one(peer, address)
            except PeerError as error:
                failure = error
        self.world.record("unreachable", self.name, self.world.name_of(peer), failure.reason)
        raise failure

    async def _dial_one(self, peer: str, address: str) -> Connection:
        """Two round trips: TCP and the handshake. The last of them shows who answers, and whether it still does."""
        target = self.world.at_address(address)
        if target is None:
            await trio.sleep(2 * self.world.options.link.latency_s)
            raise PeerUnreachable(peer, f"nothing answers at {address}")
        patience_s = self.world.options.patience_s
        if self.world.is_cut(self.name, target.name):
            await trio.sleep(patience_s)
            if self.world.is_stopped(target.name) and not target.crashed:
                raise PeerTimeout(peer, f"{address} accepts but stays silent for {patience_s:.1f} s")
            raise PeerUnreachable(peer, f"no answer from {address} within {patience_s:.1f} s")
        round_trip_s = sum(self.world.faults(*way).latency_s for way in self._ways(target))
        if target.crashed:
            await trio.sleep(round_trip_s)
            raise PeerUnreachable(peer, f"{address} refuses connections")
        await trio.sleep(2 * round_trip_s)
        if target.crashed or self.world.is_cut(self.name, target.name):
            raise PeerUnreachable(peer, f"{address} was lost while connecting")
        if target.peer_id != peer:
            raise PeerUnreachable(peer, f"another peer answers at {address}")
        if (existing := self._connections.get(peer)) is not None:
            return existing  # the peer dialled us meanwhile
        connection = Connection(self.world, self, target)
        self._connections[peer] = target._connections[self.peer_id] = connection
        self.world.add_connection(connection, self, target)
        return connection

    def _ways(self, target: SimTransport) -> tuple[tuple[str, str], tuple[str, str]]:
        return (self.name, target.name), (target.name, self.name)

    def accept(self, connection: Connection, item: Item) -> None:
        """A stream was opened from the other side."""
        handler = self._handlers.get(item.text)
        if handler is None:
            connection.push(self, Item("refuse", item.stream_id, text=f"does not speak {item.text}"))
            return
        stream = SimStream(self, connection, item.stream_id, item.text)
        connection.push(self, Item("accept", item.stream_id))
        self.start(self._handle, handler, stream)

    async def _handle(self, handler: Handler, stream: SimStream) -> None:
        try:
            await handler(stream)
        except Exception as error:  # noqa: BLE001 - the port's promise: reported, the stream reset, nobody else notices
            self.world.report(self.name, stream.protocol, error)
            stream.reset_now("the peer's handler failed")
        except BaseException:  # cancelled: the node is going down
            stream.reset_now("the peer is going down")
            raise
        else:
            stream.close_now()

    def start(self, task: Callable[..., Awaitable[None]], *args: object) -> None:
        """Run a task that ends with this life of the node."""
        self.world.nursery.start_soon(self._at_home, task, args)

    async def _at_home(self, task: Callable[..., Awaitable[None]], args: tuple[object, ...]) -> None:
        _home.set(self)
        number, self._n_tasks = self._n_tasks, self._n_tasks + 1
        with trio.CancelScope() as scope:
            self._scopes[number] = scope
            if self.crashed:
                scope.cancel()
            try:
                await task(*args)
            finally:
                del self._scopes[number]

    async def present(self) -> None:
        """Nothing that is left of a crashed node gets any further; a test that still uses it is wrong."""
        if not self.crashed:
            return
        if _home.get() is self:
            await trio.sleep_forever()
        raise LocalProtocolError(f"node {self.name} has crashed")

    def forget(self, peer: str, connection: Connection) -> None:
        if self._connections.get(peer) is connection:
            del self._connections[peer]

    def crash(self) -> None:
        """All tasks and connections of this life end; tasks first, so that they see no error before the end."""
        self.crashed = True
        for scope in list(self._scopes.values()):
            scope.cancel()
        for connection in list(self._connections.values()):
            connection.crash(self)
