"""One connection to one peer: libp2p secured it, and asks this class to be its muxer; `yamux` does the work.

Also its heart: pings tell the round-trip time, and a peer from which nothing at all comes is given up. Yamux's own ping
is the heartbeat, so it needs no stream, and any libp2p peer answers it.

Ring: shell.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any, Protocol

import trio
from libp2p.abc import IMuxedConn, IMuxedStream, ISecureConn
from libp2p.connection_types import ConnectionType
from libp2p.peer.id import ID
from libp2p.security.noise.io import NoiseTransportReadWriter
from libp2p.security.secure_session import SecureSession
from libp2p.stream_muxer.exceptions import MuxedConnUnavailable
from multiaddr import Multiaddr

from mycel.node.endpoints import tcp_multiaddr
from mycel.node.libp2p_transport.limits import TransportLimits
from mycel.node.libp2p_transport.stream import HeldBytes
from mycel.node.libp2p_transport.tcp import SteadyTcpStream
from mycel.node.libp2p_transport.yamux import Muxer, MuxError, MuxStream, StreamUser

_RTT_GAIN = 1 / 8  # RFC 6298
_MAX_OPENING = 128  # streams that wait for an answer: Go's Yamux resets what comes beyond 256


class Owner(Protocol):
    """The transport, as a connection knows it."""

    def connection_up(self, connection: Connection) -> None: ...

    def accept(self, connection: Connection, stream: MuxStream) -> StreamUser | None: ...

    def connection_down(self, connection: Connection, reason: str) -> None: ...


class Connection(IMuxedConn):
    """The muxer that libp2p's swarm starts and closes."""

    def __init__(self, secured_conn: ISecureConn, peer_id: ID, owner: Owner, limits: TransportLimits) -> None:
        # The way down, in the types of libp2p 0.8.1: session, Noise, raw connection, socket.
        assert isinstance(secured_conn, SecureSession)
        noise = secured_conn.conn
        assert isinstance(noise, NoiseTransportReadWriter)
        assert noise.conn is not None
        tcp = noise.conn.stream
        assert isinstance(tcp, SteadyTcpStream)
        self.secured_conn = secured_conn
        self.peer_id = peer_id
        self.peer = str(peer_id)
        self.tcp = tcp
        self.event_started = trio.Event()
        self.closed = trio.Event()
        self.on_close: Callable[[], Awaitable[Any]] | None = None  # set by libp2p's SwarmConn
        self.down_reason: str | None = None
        self.rtt_s: float | None = None
        self.held = HeldBytes(limits.max_held_bytes_per_connection)
        self.n_inbound = 0
        self.n_outbound = 0
        self.opening = trio.Semaphore(_MAX_OPENING)
        self.unanswered: dict[int, tuple[float, MuxStream]] = {}  # inbound streams without a protocol, and since when
        self._owner = owner
        self._limits = limits
        self._noise = noise
        self._ping_number = 0
        self._pinged_at: float | None = None
        self.muxer = Muxer(
            secured_conn.is_initiator, limits.window_bytes, self._push, self._on_stream, self._on_pong, self._on_gone
        )
        tcp.authenticated()

    @property
    def remote_address(self) -> str | None:
        """The other end as a multiaddr, or None once the socket is closed. libp2p's own knows IPv4 alone."""
        try:
            host, port, *_ = self.tcp.stream.socket.getpeername()
        except OSError:
            return None
        return tcp_multiaddr(host, port)

    # ---- bytes

    def _push(self, frames: bytes) -> None:
        """Encrypt and send at once: nothing may come between the two, for each message has its number."""
        if self.down_reason is None:
            message = self._noise.encrypt(frames)
            self.tcp.push(len(message).to_bytes(2, "big") + message)

    async def start(self) -> None:
        """Read until the connection ends, for whatever reason."""
        self.event_started.set()
        self._owner.connection_up(self)
        reason = "the connection was closed here"
        try:
            while True:
                self.muxer.receive(await self.secured_conn.read())
        except MuxError as error:
            reason = str(error)
        except Exception as error:  # noqa: BLE001 - libp2p and its Noise raise a dozen kinds, all of them the end
            reason = "the connection was lost" + (
                f": {error.__cause__}" if isinstance(error.__cause__, OSError) else ""
            )
        finally:
            self.kill(reason)
        if self.on_close is not None:
            await self.on_close()

    def kill(self, reason: str) -> None:
        """Give the connection up now: every stream of it hears `reason`."""
        if self.down_reason is None:
            self.down_reason = reason
            self.tcp.abort()
            self.muxer.stop(reason)
            self.closed.set()
            self._owner.connection_down(self, reason)

    # ---- streams

    def _on_stream(self, stream: MuxStream) -> StreamUser | None:
        user = self._owner.accept(self, stream)
        if user is not None:
            self.n_inbound += 1
            self.unanswered[stream.id] = (trio.current_time(), stream)
        return user

    def open(self, user: StreamUser, opening: bytes) -> MuxStream:
        self.n_outbound += 1
        return self.muxer.open(user, opening)

    def _on_gone(self, stream: MuxStream) -> None:
        if stream.inbound:
            self.n_inbound -= 1
            self.unanswered.pop(stream.id, None)
        else:
            self.n_outbound -= 1

    # ---- heartbeat

    async def watch(self) -> None:
        """Ping until the connection ends, and end it when nothing came for `silence_s`."""
        interval_s = self._limits.heartbeat_interval_s
        while self.down_reason is None:
            if self._pinged_at is None:
                self._ping_number = (self._ping_number + 1) % 2**32
                self._pinged_at = trio.current_time()
                self.muxer.ping(self._ping_number)
            due = trio.current_time() + interval_s
            with trio.move_on_after(interval_s):
                await self.closed.wait()
            now = trio.current_time()
            if now - due > interval_s:
                # This process slept itself (a stop, a suspended laptop, a busy loop): what the peer sent meanwhile is
                # still to be read.
                self.tcp.last_received = max(self.tcp.last_received, now - interval_s)
            if now - self.tcp.last_received > self._limits.silence_s - interval_s / 2:
                self.kill(f"silent for {self._limits.silence_s:.1f} s")
            for since, stream in list(self.unanswered.values()):
                if now - since > self._limits.open_timeout_s:
                    stream.reset()

    def _on_pong(self, number: int) -> None:
        if number == self._ping_number and self._pinged_at is not None:
            rtt_s = trio.current_time() - self._pinged_at
            self._pinged_at = None
            self.rtt_s = rtt_s if self.rtt_s is None else self.rtt_s + _RTT_GAIN * (rtt_s - self.rtt_s)

    # ---- what libp2p's swarm asks of a muxer

    @property
    def is_initiator(self) -> bool:
        return self.secured_conn.is_initiator

    @property
    def is_established(self) -> bool:
        return self.event_started.is_set() and self.down_reason is None

    @property
    def is_closed(self) -> bool:
        return self.down_reason is not None

    async def close(self) -> None:
        self.kill("the connection was closed here")
        await trio.lowlevel.cancel_shielded_checkpoint()

    async def accept_stream(self) -> IMuxedStream:
        """Streams go to their handlers past libp2p, in `accept`; this only says when there will be no more."""
        await self.closed.wait()
        raise MuxedConnUnavailable("the connection is closed")

    async def open_stream(self) -> IMuxedStream:
        raise MuxedConnUnavailable("streams of this connection are opened with Transport.open")

    def get_transport_addresses(self) -> list[Multiaddr]:
        return self.secured_conn.get_transport_addresses()

    def get_connection_type(self) -> ConnectionType:
        return self.secured_conn.get_connection_type()
