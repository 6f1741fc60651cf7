"""The `Transport` port over py-libp2p 0.8.1: TCP, Noise, Yamux.

Ring: shell.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from functools import partial

import trio
from libp2p.abc import ISecureConn
from libp2p.network.swarm import Swarm
from libp2p.peer.id import ID
from libp2p.tools.anyio_service import background_trio_service
from multiaddr import Multiaddr

from mycel.node.events import EventSink, no_events
from mycel.node.handling import run_handler
from mycel.node.libp2p_transport import swarm as libp2p_swarm
from mycel.node.libp2p_transport.connection import Connection
from mycel.node.libp2p_transport.dialing import Dialler, note_accepted
from mycel.node.libp2p_transport.limits import TransportLimits
from mycel.node.libp2p_transport.opening import Answering, Opening
from mycel.node.libp2p_transport.probing import probe
from mycel.node.libp2p_transport.stream import FrameStream
from mycel.node.libp2p_transport.tcp import SteadyTcp
from mycel.node.libp2p_transport.yamux import MuxStream, StreamUser
from mycel.node.pulse import answer_pings
from mycel.protocols.errors import LocalProtocolError, PeerError, PeerRefused, PeerTimeout, PeerUnreachable
from mycel.protocols.ids import PING
from mycel.protocols.ports import Handler, Stream
from mycel.security.identity import Identity
from mycel.security.signatures import public_key_of

_LIBP2P_CLOSE_S = 3.0  # what libp2p may take to end its own tasks, beside the time for our bytes


class Libp2pTransport:
    """See `mycel.protocols.ports.Transport`. Made by `open_transport`."""

    def __init__(self, identity: Identity, limits: TransportLimits, event: EventSink, tasks: trio.Nursery) -> None:
        self.limits = limits
        self._identity = identity
        self._event = event
        self._tasks = tasks
        self._serving: trio.Nursery | None = None
        self._handlers: dict[str, Handler] = {PING: self._answer_pings}
        self._live: dict[str, list[Connection]] = {}
        self._addresses: tuple[str, ...] = ()
        self.listening: tuple[str, ...] = ()  # as seen from here; `addresses` is what others are told
        self._closed = False
        self._tcp = SteadyTcp(self._spawn, limits, note_accepted)
        self.swarm: Swarm = libp2p_swarm.new_swarm(identity, self._tcp, self._make_connection, limits)
        self._dialler = Dialler(self._dial_address, self._spawn, limits)

    # ---- the port

    @property
    def peer_id(self) -> str:
        return self._identity.peer_id

    @property
    def addresses(self) -> tuple[str, ...]:
        return self._addresses

    async def open(self, peer: str, protocol: str) -> FrameStream:
        if peer == self.peer_id:
            raise LocalProtocolError("a node does not dial itself")
        if public_key_of(peer) is None:
            raise PeerUnreachable(peer, "this is not the id of a peer")
        known = self._connection_to(peer)
        if known is not None:
            try:
                return await self._open_on(known, protocol)
            except PeerUnreachable:
                pass  # it had died and nobody had noticed: the peer itself may be well
        return await self._open_on(await self._connect(peer), protocol)

    def serve(self, protocol: str, handler: Handler) -> None:
        self._handlers[protocol] = handler

    def learn(self, peer: str, addresses: Sequence[str]) -> None:
        self._dialler.learn(peer, addresses)

    def rtt_s(self, peer: str) -> float | None:
        measured = [connection.rtt_s for connection in self._live.get(peer, ()) if connection.rtt_s is not None]
        return min(measured, default=None)

    def connected(self) -> frozenset[str]:
        return frozenset(self._live)

    # ---- beyond the port: for the service that tells peers whether they can be reached (node/reach.py)

    def came_from(self, peer: str) -> tuple[str, ...]:
        """Where the peer's connections to us come from, as multiaddrs; nothing of those that we dialled."""
        accepted = (connection for connection in self._live.get(peer, ()) if not connection.is_initiator)
        return tuple(address for connection in accepted if (address := connection.remote_address) is not None)

    async def probe(self, peer: str, address: str, within_s: float) -> None:
        """Whether `peer` answers at `address`, by a connection of its own. Raises PeerErrors: see probing.py."""
        if peer == self.peer_id:
            raise PeerUnreachable(peer, "a node does not dial itself")
        await probe(self._tcp, self.swarm.upgrader, peer, address, within_s)

    # ---- connections

    def _spawn(self, task: Callable[[], Awaitable[None]]) -> None:
        if not self._closed:
            self._tasks.start_soon(task)

    def _connection_to(self, peer: str) -> Connection | None:
        return next(iter(self._live.get(peer, ())), None)

    async def _connect(self, peer: str) -> Connection:
        connection = self._connection_to(peer)
        if connection is not None:  # the peer dialled us meanwhile
            return connection
        if self._closed:
            raise PeerUnreachable(peer, "this transport is closed")
        try:
            return await self._dialler.connect(peer)
        except PeerError as error:
            connection = self._connection_to(peer)
            if connection is not None:
                return connection
            self._event("dial.failed", peer=peer, reason=error.reason)
            raise

    async def _dial_address(self, address: Multiaddr, peer: str) -> Connection:
        swarm_conn = await self.swarm.dial_addr(address, ID.from_string(peer))
        connection = swarm_conn.muxed_conn
        assert isinstance(connection, Connection)
        if connection.down_reason is not None:
            raise PeerUnreachable(peer, connection.down_reason)
        return connection

    def _make_connection(self, secured_conn: ISecureConn, peer_id: ID) -> Connection:
        return Connection(secured_conn, peer_id, self, self.limits)

    def connection_up(self, connection: Connection) -> None:
        """libp2p admitted the connection and is about to read from it."""
        if self._closed:
            connection.kill("this transport is closed")
            return
        live = self._live.setdefault(connection.peer, [])
        live.append(connection)
        self._spawn(connection.watch)
        if len(live) > self.limits.max_connections_per_peer:
            connection.kill(f"refused here: more than {self.limits.max_connections_per_peer} connections of one peer")
        elif len(live) == 1:
            self._event("peer.connected", peer=connection.peer)

    def connection_down(self, connection: Connection, reason: str) -> None:
        live = self._live.get(connection.peer, [])
        if connection in live:
            live.remove(connection)
            if not live:
                del self._live[connection.peer]
                self._event("peer.lost", peer=connection.peer, reason=reason)

    # ---- streams

    async def _open_on(self, connection: Connection, protocol: str) -> FrameStream:
        peer = connection.peer
        n_open = sum(other.n_outbound for other in self._live.get(peer, ()))
        if n_open >= self.limits.max_streams_per_peer:
            raise PeerRefused(peer, f"{n_open} streams to it are open, and no more are allowed here")
        async with connection.opening:
            opening = Opening(connection, protocol, self._frame_stream)
            try:
                with trio.move_on_after(self.limits.open_timeout_s):
                    await opening.done.wait()
                if opening.failure is not None:
                    raise opening.failure
                if opening.stream is None:
                    raise PeerTimeout(peer, f"no answer to opening {protocol} within {self.limits.open_timeout_s} s")
            except BaseException:
                opening.abandon()
                raise
            return opening.stream

    def _frame_stream(self, connection: Connection, mux: MuxStream) -> FrameStream:
        return FrameStream(connection.peer, mux, connection.tcp, connection.held, self._spawn, self.limits)

    def accept(self, connection: Connection, stream: MuxStream) -> StreamUser | None:
        """The peer opens a stream: who negotiates for us, or None to refuse it."""
        n_open = sum(other.n_inbound for other in self._live.get(connection.peer, ()))
        if self._serving is None:
            return None
        if n_open >= self.limits.max_streams_per_peer:
            self._event("stream.refused", peer=connection.peer, reason=f"{n_open} streams from it are open")
            return None
        return Answering(stream, self._handlers, partial(self._start_handler, connection))

    def _start_handler(self, connection: Connection, mux: MuxStream, protocol: str) -> FrameStream | None:
        connection.unanswered.pop(mux.id, None)
        if self._serving is None:
            return None
        stream = self._frame_stream(connection, mux)
        self._serving.start_soon(
            run_handler, self._handlers[protocol], stream, protocol, self._event, name=f"serve {protocol}"
        )
        return stream

    async def _answer_pings(self, stream: Stream) -> None:
        """The heartbeat of a peer whose connection is held by a process beside its own: only this tells of itself."""
        try:
            silent = await answer_pings(stream, self.limits.heartbeat_interval_s, self.limits.silence_s)
        except PeerUnreachable:
            return  # it left, as its other streams hear, too
        if silent:
            for connection in tuple(self._live.get(stream.peer, ())):
                connection.kill(f"silent for {self.limits.silence_s:.1f} s")

    # ---- the end

    async def listen(self, addresses: Sequence[str], announce: Sequence[str]) -> None:
        self.listening = await libp2p_swarm.listen(self.swarm, self._tcp, addresses)
        self._addresses = tuple(announce) if announce and self.listening else self.listening

    @asynccontextmanager
    async def serving(self) -> AsyncIterator[None]:
        """While the block runs, inbound streams get their handlers; afterwards no handler is left."""
        async with trio.open_nursery() as nursery:
            self._serving = nursery
            try:
                yield
            finally:
                self._serving = None
                nursery.cancel_scope.cancel()

    async def shut_down(self) -> None:
        """Let queued bytes leave, then close every connection, all at once; libp2p's own way takes 0.2 s for each."""
        for listener in self.swarm.listeners.values():
            await listener.close()
        connections = [connection for live in self._live.values() for connection in live]
        with trio.move_on_after(self.limits.close_timeout_s):
            for connection in connections:
                await connection.tcp.wait_for_room()
        self._closed = True
        for connection in connections:
            connection.kill("the connection was closed here")
        await self.swarm.close()


@asynccontextmanager
async def open_transport(
    identity: Identity,
    *,
    listen: Sequence[str] = ("/ip4/127.0.0.1/tcp/0",),
    announce: Sequence[str] = (),
    limits: TransportLimits | None = None,
    event: EventSink = no_events,
) -> AsyncIterator[Libp2pTransport]:
    """A running transport; without `listen` addresses a client, which others cannot dial.

    Others are told the addresses `announce` in place of those listened on, if there are any. Raises ConfigError if an
    address cannot be listened on. When the block ends, handlers are cancelled, every connection and listener is closed,
    and no task is left.
    """
    libp2p_swarm.quiet_libp2p()
    limits = limits or TransportLimits()
    failure: BaseException | None = None
    async with trio.open_nursery() as tasks:
        transport = Libp2pTransport(identity, limits, event, tasks)
        async with background_trio_service(transport.swarm):
            try:
                async with transport.serving():
                    try:
                        await transport.listen(listen, announce)
                        yield transport
                    except BaseException as error:  # noqa: BLE001 - raised below, outside of the nurseries that would wrap it
                        failure = error
            finally:
                with trio.CancelScope(shield=True), trio.move_on_after(limits.close_timeout_s + _LIBP2P_CLOSE_S):
                    await transport.shut_down()
        tasks.cancel_scope.cancel()
    if failure is not None:
        raise failure
