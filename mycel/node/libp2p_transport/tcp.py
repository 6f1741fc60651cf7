"""The socket under everything: writes that no cancellation cuts, buffered reads, time-outs, a last sign of life.

libp2p's own TCP stream sends a Noise message with awaits in between: cancelled there, the connection is corrupt. Here
`push` hands bytes to the kernel or to a queue at once, without awaiting, and only waiting for room can be cancelled.

Ring: shell.
"""

from __future__ import annotations

import errno
import socket
import sys
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress

import trio
from libp2p.abc import IListener, IRawConnection
from libp2p.custom_types import THandler
from libp2p.io.exceptions import ConnectionClosedError
from libp2p.io.trio import TrioTCPStream
from libp2p.network.connection.raw_connection import RawConnection
from libp2p.transport.tcp.tcp import TCP
from libp2p.utils.multiaddr_utils import multiaddr_from_socket
from multiaddr import Multiaddr

from mycel.node.libp2p_transport.limits import TransportLimits

_READ_BYTES = 128 * 1024
# All that a peer may send before it is authenticated; libp2p's negotiation would read lengths without an end.
_HANDSHAKE_BYTES = 64 * 1024
# Those who send much wait for an empty queue; what gathers beyond this are answers to a peer that does not read them.
_MAX_QUEUED_BYTES = 4 * 1024 * 1024
# How much the kernel takes beyond what is on its way, so that a small message does not wait behind megabytes.
_UNSENT_BYTES = 128 * 1024
_READS_IN_A_ROW = 8

Spawn = Callable[[Callable[[], Awaitable[None]]], None]
Errors = dict[str, OSError]  # by the address that could not be listened on


class SteadyTcpStream(TrioTCPStream):
    """One TCP connection, dialled or accepted. `spawn` starts the task that empties the queue."""

    def __init__(self, stream: trio.SocketStream, spawn: Spawn, limits: TransportLimits) -> None:
        super().__init__(stream)
        # trio's own send and recv take a turn of the scheduler each; the plain socket underneath does not block either.
        self._socket: socket.socket = stream.socket._sock  # type: ignore[attr-defined]
        self._spawn = spawn
        self._queue: deque[memoryview] = deque()
        self._queued_bytes = 0
        self._room = trio.lowlevel.ParkingLot()
        self._buffer = memoryview(bytearray(_READ_BYTES))
        self._start = self._stop = 0
        self._reads_in_a_row = 0
        self._handshake_left: int | None = _HANDSHAKE_BYTES
        self._closed = False
        self.last_received = trio.current_time()
        self._set_options(limits)

    def _set_options(self, limits: TransportLimits) -> None:
        unsent = getattr(socket, "TCP_NOTSENT_LOWAT", 25 if sys.platform == "linux" else None)
        user_timeout = getattr(socket, "TCP_USER_TIMEOUT", None)
        options = [
            (socket.IPPROTO_TCP, socket.TCP_NODELAY, 1),
            (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
            (socket.IPPROTO_TCP, unsent, _UNSENT_BYTES),
            (socket.IPPROTO_TCP, user_timeout, int(1600 * limits.silence_s)),
        ]
        for level, option, value in options:
            if option is not None:
                try:
                    self._socket.setsockopt(level, option, value)
                except OSError as error:
                    # The peer may be gone already; what else a platform lacks only makes the socket slower to notice.
                    if error.errno not in (errno.EINVAL, errno.ENOPROTOOPT, errno.EBADF, errno.ENOTCONN):
                        raise

    # ---- writing

    @property
    def has_room(self) -> bool:
        """Whether the kernel took everything so far (or the connection is gone, and pushing costs nothing)."""
        return not self._queue

    def push(self, data: bytes) -> None:
        """Send `data`, now or as soon as the kernel takes it, after all that was pushed before. Never waits."""
        if self._closed:
            return
        if self._queue:
            self._queue.append(memoryview(data))
            self._queued_bytes += len(data)
            if self._queued_bytes > _MAX_QUEUED_BYTES:
                self.abort()
            return
        sent = self._send(data)
        if sent < len(data) and not self._closed:
            self._queue.append(memoryview(data)[sent:])
            self._queued_bytes = len(data) - sent
            self._spawn(self._flush)

    def _send(self, data: bytes | memoryview) -> int:
        try:
            return self._socket.send(data)
        except BlockingIOError:
            return 0
        except OSError:
            self.abort()  # the reader hears of it and says why
            return 0

    async def _flush(self) -> None:
        while self._queue and not self._closed:
            try:
                await trio.lowlevel.wait_writable(self._socket.fileno())
            except (trio.ClosedResourceError, OSError, ValueError):
                break
            while self._queue and not self._closed:
                head = self._queue[0]
                sent = self._send(head)
                self._queued_bytes -= sent
                if sent < len(head):
                    if not self._closed:
                        self._queue[0] = head[sent:]
                    break
                self._queue.popleft()
        self._room.unpark_all()

    async def wait_for_room(self) -> None:
        """Until the kernel has taken everything, or the connection is gone."""
        while self._queue:
            await self._room.park()

    async def write(self, data: bytes) -> None:
        """For libp2p's handshakes. Cancelled, the data is on its way all the same."""
        if self._closed:
            raise ConnectionClosedError("the connection is closed", transport="tcp")
        self.push(data)
        await self.wait_for_room()

    # ---- reading

    def authenticated(self) -> None:
        """The handshake is over: from here on the peer may send what it likes."""
        self._handshake_left = None

    async def read(self, n: int | None = None) -> bytes:
        """At most `n` bytes, as soon as there are any; b"" at the end. A cancelled read loses nothing."""
        if n == 0:
            return b""
        if self._start == self._stop and not await self._fill():
            return b""
        stop = self._stop if n is None else min(self._stop, self._start + n)
        data = bytes(self._buffer[self._start : stop])
        self._start = stop
        return data

    async def _fill(self) -> bool:
        """Wait for bytes; False at the end of the connection."""
        while not self._closed:
            try:
                n_read = self._socket.recv_into(self._buffer)
            except BlockingIOError:
                self._reads_in_a_row = 0
                try:
                    await trio.lowlevel.wait_readable(self._socket.fileno())
                except (trio.ClosedResourceError, ValueError):
                    return False
                continue
            except OSError as error:
                raise ConnectionClosedError(f"the connection broke: {error.strerror}", transport="tcp") from error
            if not n_read:
                return False
            self._start, self._stop = 0, n_read
            self.last_received = trio.current_time()
            if self._handshake_left is not None:
                self._handshake_left -= n_read
                if self._handshake_left < 0:
                    raise ConnectionClosedError("the peer sent too much before it was known", transport="tcp")
            self._reads_in_a_row += 1
            if self._reads_in_a_row >= _READS_IN_A_ROW:  # a peer that never pauses must not have the loop for itself
                self._reads_in_a_row = 0
                await trio.lowlevel.cancel_shielded_checkpoint()
            return True
        return False

    # ---- ending

    def abort(self) -> None:
        """Close the socket at once. Whoever waits on it wakes."""
        if self._closed:
            return
        self._closed = True
        self._queue.clear()
        self._queued_bytes = 0
        self.stream.socket.close()
        self._room.unpark_all()

    async def close(self) -> None:
        self.abort()
        await trio.lowlevel.cancel_shielded_checkpoint()


class SteadyListener(IListener):
    """Accepts connections at one address. libp2p's own shares its port with whoever asks for it (SO_REUSEPORT)."""

    def __init__(
        self, handle: THandler, steady: Callable[[trio.SocketStream], SteadyTcpStream], spawn: Spawn, errors: Errors
    ) -> None:
        self._handle = handle
        self._steady = steady
        self._spawn = spawn
        self._errors = errors
        self._listeners: Sequence[trio.SocketListener] = ()
        self._scope = trio.CancelScope()
        self._stopped = trio.Event()

    async def listen(self, maddr: Multiaddr) -> None:
        """Raises OSError; libp2p's swarm swallows it, so it is kept in `errors` as well."""
        (_, host), (_, port) = maddr.items()
        try:
            self._listeners = await trio.open_tcp_listeners(int(str(port)), host=str(host))
        except OSError as error:
            self._errors[str(maddr)] = error
            raise
        self._spawn(self._serve)

    async def _serve(self) -> None:
        try:
            with self._scope:
                await trio.serve_listeners(self._accept, [*self._listeners])
        finally:
            self._stopped.set()

    async def _accept(self, stream: trio.SocketStream) -> None:
        with suppress(Exception):  # a stranger's handshake fails in one of libp2p's dozen ways; libp2p has closed it
            await self._handle(self._steady(stream))

    def get_addrs(self) -> tuple[Multiaddr, ...]:
        return tuple(multiaddr_from_socket(listener.socket) for listener in self._listeners)

    async def close(self) -> None:
        if self._listeners:
            self._scope.cancel()
            await self._stopped.wait()


class SteadyTcp(TCP):
    """libp2p's TCP transport with our streams in it. `on_dialled` hears of each connection that was dialled."""

    def __init__(self, spawn: Spawn, limits: TransportLimits, on_dialled: Callable[[SteadyTcpStream], None]) -> None:
        super().__init__(dns_resolution_timeout=limits.dial_timeout_s, dns_max_retries=1)
        self.listen_errors: Errors = {}
        self._spawn = spawn
        self._limits = limits
        self._on_dialled = on_dialled

    async def dial(self, maddr: Multiaddr) -> IRawConnection:
        raw = await super().dial(maddr)
        assert isinstance(raw, RawConnection)
        assert isinstance(raw.stream, TrioTCPStream)
        stream = self._steady(raw.stream.stream)
        raw.stream = stream
        self._on_dialled(stream)
        return raw

    def create_listener(self, handler_function: THandler) -> IListener:  # type: ignore[override]
        return SteadyListener(handler_function, self._steady, self._spawn, self.listen_errors)

    def _steady(self, stream: trio.SocketStream) -> SteadyTcpStream:
        return SteadyTcpStream(stream, self._spawn, self._limits)
