"""The `Transport` port over the Go libp2p daemon that hivemind ships: TCP, Noise, Yamux, in a process of its own.

Each stream is a Unix socket between this process and the daemon. Peers with the libp2p adapter and peers with this one
speak the same on the wire and open streams to each other.

Ring: shell.
"""

from __future__ import annotations

import math
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import base58
import trio

from mycel.node.background import background
from mycel.node.events import EventSink, no_events
from mycel.node.handling import run_handler
from mycel.node.hivemind_engine import daemon_messages as said
from mycel.node.hivemind_engine.addresses import checked_listen, reachable, shown
from mycel.node.hivemind_engine.daemon import Daemon, read_message, run_daemon
from mycel.node.hivemind_engine.dialing import Dialler, refusal
from mycel.node.hivemind_engine.links import Link
from mycel.node.hivemind_engine.socket_stream import SocketStream
from mycel.node.libp2p_transport.limits import TransportLimits
from mycel.node.pulse import answer_pings
from mycel.protocols.errors import LocalProtocolError, PeerError, PeerTimeout, PeerUnreachable
from mycel.protocols.ids import PING
from mycel.protocols.ports import Handler, Stream
from mycel.security.identity import Identity
from mycel.security.signatures import public_key_of

_BACKLOG = 1024
_NO_ROOM_S = 0.1


@dataclass(slots=True)
class _Dial:
    """One attempt to reach a peer, for all who ask for it meanwhile."""

    done: trio.Event = field(default_factory=trio.Event)
    link: Link | None = None
    failure: PeerError | None = None


class P2pdTransport:
    """See `mycel.protocols.ports.Transport`. Made by `open_p2pd_transport`."""

    def __init__(
        self, identity: Identity, daemon: Daemon, limits: TransportLimits, event: EventSink, tasks: trio.Nursery
    ) -> None:
        self.limits = limits
        self.listening: tuple[str, ...] = ()  # as seen from here; `addresses` is what others are told
        self._identity = identity
        self._daemon = daemon
        self._event = event
        self._tasks = tasks
        self._serving: trio.Nursery | None = None
        self._handlers: dict[str, Handler] = {}
        self._links: dict[str, Link] = {}
        self._over: set[Link] = set()  # whose streams somebody may still hold
        self._dials: dict[str, _Dial] = {}
        self._dialler = Dialler(daemon, limits)
        self._announced: tuple[str, ...] = ()
        self._n_tasks = 0
        self._idle = trio.Event()
        self._closed = False

    # ---- the port

    @property
    def peer_id(self) -> str:
        return self._identity.peer_id

    @property
    def addresses(self) -> tuple[str, ...]:
        return self._announced or self.listening

    async def open(self, peer: str, protocol: str) -> SocketStream:
        if peer == self.peer_id:
            raise LocalProtocolError("a node does not dial itself")
        if public_key_of(peer) is None:
            raise PeerUnreachable(peer, "this is not the id of a peer")
        link = self._links.get(peer)
        if link is not None and link.proved:
            try:
                return await self._open_on(link, protocol)
            except PeerUnreachable:
                pass  # it had died and nobody had noticed: the peer itself may be well
        return await self._open_on(await self._connect(peer), protocol)

    def serve(self, protocol: str, handler: Handler) -> None:
        if protocol not in self._handlers:
            answer = self._daemon.ask_at_once(said.handle_streams(self._daemon.streams, protocol))
            if answer.error:
                raise LocalProtocolError(f"the p2p daemon does not take {protocol}: {answer.error}")
        self._handlers[protocol] = handler

    def learn(self, peer: str, addresses: Sequence[str]) -> None:
        self._dialler.learn(peer, addresses)

    def rtt_s(self, peer: str) -> float | None:
        link = self._links.get(peer)
        return link.rtt_s if link is not None else None

    def connected(self) -> frozenset[str]:
        return frozenset(peer for peer, link in self._links.items() if link.proved)

    # ---- beyond the port: for the service that tells peers whether they can be reached (node/reach.py)

    def came_from(self, peer: str) -> tuple[str, ...]:
        """Where the peer's connection to us comes from, as a multiaddr; nothing if we dialled."""
        link = self._links.get(peer)
        return (link.came_from,) if link is not None and link.came_from is not None else ()

    async def probe(self, peer: str, address: str, within_s: float) -> None:
        """Whether `peer` answers at `address`, by a connection of its own. Raises PeerErrors.

        The daemon would answer from a connection that it has, so the other engine looks, as a stranger.
        """
        from mycel.node.libp2p_transport import open_transport

        if peer == self.peer_id:
            raise PeerUnreachable(peer, "a node does not dial itself")
        async with open_transport(Identity.generate(), listen=()) as stranger:
            await stranger.probe(peer, address, within_s)

    # ---- connections

    async def _connect(self, peer: str) -> Link:
        """A link over which the peer itself gave a sign of life. One attempt for all who ask for it meanwhile."""
        dial = self._dials.get(peer)
        if dial is None:
            if self._closed:
                raise PeerUnreachable(peer, "this transport is closed")
            dial = self._dials[peer] = _Dial()
            self._tasks.start_soon(self._run_dial, peer, dial)
        await dial.done.wait()
        if dial.link is not None:
            return dial.link
        if dial.failure is None:
            raise PeerUnreachable(peer, "this transport is closed")
        raise type(dial.failure)(peer, dial.failure.reason)

    async def _run_dial(self, peer: str, dial: _Dial) -> None:
        try:
            if peer not in self._links:
                await self._dialler.dial(peer)
            link = self._link_to(peer, None)
            await link.settled.wait()
            if link.over is not None:
                raise link.failure()
            dial.link = link
        except PeerError as error:
            dial.failure = error
            self._event("dial.failed", peer=peer, reason=error.reason)
        finally:
            del self._dials[peer]
            dial.done.set()

    def _link_to(self, peer: str, came_from: str | None) -> Link:
        """The link to a peer that the daemon is connected with; a new one begins to beat."""
        link = self._links.get(peer)
        if link is None:
            link = self._links[peer] = Link(peer, self.limits, self._link_over)
            link.came_from = came_from
            self._tasks.start_soon(self._keep, link)
        return link

    async def _keep(self, link: Link) -> None:
        self._event("peer.connected", peer=link.peer)
        await link.live(lambda: self._open_on(link, PING))
        if isinstance(link.over, PeerTimeout):  # whatever the daemon holds of it would only be waited for again
            await self._daemon.ask(said.disconnect(base58.b58decode(link.peer)))

    def _link_over(self, link: Link) -> None:
        assert link.over is not None
        del self._links[link.peer]
        self._over = {other for other in self._over if other.streams} | {link}
        if not self._closed:
            self._event("peer.lost", peer=link.peer, reason=link.over.reason)

    async def watch_strangers(self) -> None:
        """The daemon takes any number of connections: those that nobody uses go when there are too many."""
        while True:
            await trio.sleep(self.limits.silence_s)
            peers = (await self._daemon.ask(said.simple(said.Ask.LIST_PEERS))).peers
            if (excess := len(peers) - self.limits.max_connections) > 0:
                used = {base58.b58decode(peer) for peer in self._links}
                for peer in sorted(peers - used)[:excess]:
                    await self._daemon.ask(said.disconnect(peer))
                self._event("peers.refused", peer="", reason=f"{len(peers)} connections, {excess} too many")

    # ---- streams

    async def _open_on(self, link: Link, protocol: str) -> SocketStream:
        patience_s = self.limits.open_timeout_s
        request = said.open_stream(base58.b58decode(link.peer), protocol, math.ceil(patience_s))
        with trio.move_on_after(patience_s):
            sock, answer, first = await self._daemon.open(request)
            if not answer.error and link.over is None:
                return self._stream(link, sock, first, inbound=False)
            sock.close()
            raise refusal(link.peer, protocol, answer.error) if answer.error else link.failure()
        raise PeerTimeout(link.peer, f"no answer to opening {protocol} within {patience_s} s")

    def _stream(self, link: Link, sock: socket.socket, first: bytes, *, inbound: bool) -> SocketStream:
        stream = SocketStream(link, sock, first, self._spawn, self.limits, inbound)
        link.streams.add(stream)
        return stream

    def _spawn(self, task: Callable[[], Awaitable[None]]) -> None:
        """A task of a stream, for which a shutdown waits, bounded."""

        async def run() -> None:
            try:
                await task()
            finally:
                self._n_tasks -= 1
                if not self._n_tasks:
                    self._idle.set()

        if not self._closed:
            self._n_tasks += 1
            self._tasks.start_soon(run)

    async def accept_for_ever(self, listener: socket.socket) -> None:
        """Take the streams that the daemon brings."""
        while True:
            try:
                sock, _ = listener.accept()
            except BlockingIOError:
                await trio.lowlevel.wait_readable(listener)
            except OSError as error:  # too many open files; those that wait are not lost
                self._event("stream.refused", peer="", reason=f"no stream can be taken: {error.strerror}")
                await trio.sleep(_NO_ROOM_S)
            else:
                sock.setblocking(False)
                if self._serving is None:
                    sock.close()
                else:
                    self._serving.start_soon(self._welcome, sock)

    async def _welcome(self, sock: socket.socket) -> None:
        """A stream that a peer opened: who it is, and which handler takes it."""
        stream: SocketStream | None = None
        try:
            with trio.move_on_after(self.limits.open_timeout_s):
                message, first = await read_message(sock)
                info = said.read_stream_info(message)
                stream = self._admit(sock, info, first)
        except LocalProtocolError:
            pass  # the peer was gone before it could be introduced
        finally:
            if stream is None:
                sock.close()
        if stream is not None:
            link = self._links.get(stream.peer)
            if link is not None and info.protocol != PING:
                await link.beating.wait()  # nobody is answered who could not tell if this process then stood still
            await run_handler(self._handlers[info.protocol], stream, info.protocol, self._event)

    def _admit(self, sock: socket.socket, info: said.StreamInfo, first: bytes) -> SocketStream | None:
        peer = base58.b58encode(info.peer).decode()
        link = self._link_to(peer, None if peer in self._dials else shown(info.address))
        if link.n_inbound >= self.limits.max_streams_per_peer or info.protocol not in self._handlers:
            self._event("stream.refused", peer=link.peer, reason=f"{link.n_inbound} streams from it are open")
            return None
        link.prove()
        return self._stream(link, sock, first, inbound=True)

    async def _answer_pings(self, stream: Stream) -> None:
        try:
            silent = await answer_pings(stream, self.limits.heartbeat_interval_s, self.limits.silence_s)
        except PeerUnreachable:
            return  # it left; our own heartbeat hears the same
        link = self._links.get(stream.peer)
        if silent and link is not None:
            link.end(PeerTimeout(stream.peer, f"silent for {self.limits.silence_s:.1f} s"))

    # ---- beginning and end

    async def begin(self, listener: socket.socket, announce: Sequence[str]) -> None:
        """Serve, and learn where the daemon listens."""
        listener.setblocking(False)
        listener.bind(self._daemon.streams)
        listener.listen(_BACKLOG)
        self._tasks.start_soon(self.accept_for_ever, listener)
        self._tasks.start_soon(self.watch_strangers)
        self.serve(PING, self._answer_pings)
        self.listening = reachable((await self._daemon.ask(said.simple(said.Ask.IDENTIFY))).addresses)
        self._announced = tuple(announce) if self.listening else ()

    @asynccontextmanager
    async def serving(self) -> AsyncIterator[None]:
        """While the block runs, inbound streams get their handlers; afterwards no handler is left."""
        async with background() as handlers:
            self._serving = handlers
            try:
                yield
            finally:
                self._serving = None
                handlers.cancel_scope.cancel()

    async def shut_down(self) -> None:
        """Let what was sent leave, then close every stream."""
        with trio.move_on_after(self.limits.close_timeout_s):
            while self._n_tasks:
                self._idle = trio.Event()
                await self._idle.wait()
        self._closed = True
        for link in (*self._links.values(), *self._over):
            for stream in tuple(link.streams):
                stream.cut_off()


@asynccontextmanager
async def open_p2pd_transport(
    identity: Identity,
    *,
    listen: Sequence[str] = ("/ip4/127.0.0.1/tcp/0",),
    announce: Sequence[str] = (),
    limits: TransportLimits | None = None,
    event: EventSink = no_events,
) -> AsyncIterator[P2pdTransport]:
    """A running transport; without `listen` addresses a client, which others cannot dial.

    Others are told the addresses `announce` in place of those listened on, if there are any. Raises ConfigError if the
    engine cannot run here (see `engine_available`) or an address cannot be listened on. When the block ends, handlers
    are cancelled, every stream is closed, the daemon is gone, and no task is left.
    """
    limits = limits or TransportLimits()
    async with run_daemon(identity, _flags(listen)) as daemon, background() as tasks:
        with socket.socket(socket.AF_UNIX) as listener:
            transport = P2pdTransport(identity, daemon, limits, event, tasks)
            try:
                async with transport.serving():
                    await transport.begin(listener, announce)
                    yield transport
            finally:
                with trio.CancelScope(shield=True):
                    await transport.shut_down()
                tasks.cancel_scope.cancel()
                trio.lowlevel.notify_closing(listener)


def _flags(listen: Sequence[str]) -> list[str]:
    """How the daemon is started. Noise and nothing else, as the libp2p adapter; it relays for nobody."""
    endpoints = checked_listen(listen)
    where = ",".join(endpoint.multiaddr for endpoint in endpoints)
    return ["-tls=0", "-relay=0", "-relayService=0", f"-hostAddrs={where}" if where else "-noListenAddrs"]
