"""One peer, as the transport knows it: its streams, its heartbeat, and whether it is still there.

The daemon answers libp2p's own pings for a process that hangs, and takes minutes to miss a peer. So each node beats on
a stream of its own, and anything that a peer sends or takes is a sign of life.

Ring: shell.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import trio

from mycel.node.hivemind_engine.socket_stream import SocketStream
from mycel.node.libp2p_transport.limits import TransportLimits
from mycel.protocols.errors import PeerError, PeerTimeout, PeerUnreachable

_RTT_GAIN = 1 / 8  # RFC 6298
_GRACE_S = 0.3  # when the heartbeat broke, the other streams break by themselves, after what was still on its way


class Link:
    """`proved` once the peer itself, not only its daemon, gave a sign of life; `over` says why it ended.

    `on_end` is called at that moment, once. `live` is its task.
    """

    def __init__(self, peer: str, limits: TransportLimits, on_end: Callable[[Link], None]) -> None:
        self.peer = peer
        self.held_bytes = 0
        self.streams: set[SocketStream] = set()
        self.rtt_s: float | None = None
        self.proved = False
        self.settled = trio.Event()  # proved, or over
        self.beating = trio.Event()  # the peer can miss us from now on; or over
        self.over: PeerError | None = None
        self.came_from: str | None = None  # where its connection comes from, unless we dialled
        self._limits = limits
        self._on_end = on_end
        self._last_heard = trio.current_time()
        self._scope = trio.CancelScope()

    @property
    def n_inbound(self) -> int:
        return sum(stream.inbound for stream in self.streams)

    def heard(self) -> None:
        self._last_heard = trio.current_time()

    def forget(self, stream: SocketStream) -> None:
        self.streams.discard(stream)

    def prove(self) -> None:
        self.proved = True
        self.settled.set()

    def end(self, why: PeerError) -> None:
        """The peer is gone. Idempotent."""
        if self.over is None:
            self.over = why
            self.settled.set()
            self.beating.set()
            self._on_end(self)
            self._scope.cancel()

    def failure(self) -> PeerError:
        """A new exception of the kind that ended the link."""
        assert self.over is not None
        return type(self.over)(self.peer, self.over.reason)

    async def live(self, open_ping: Callable[[], Awaitable[SocketStream]]) -> None:
        """Ping each second until the peer is gone or silent; that ends the link, then its streams."""
        try:
            with self._scope:
                await self._beat(open_ping)
            if isinstance(self.over, PeerUnreachable):
                await trio.sleep(_GRACE_S)
        finally:
            self.end(PeerUnreachable(self.peer, "this transport is closed"))
            assert self.over is not None
            for stream in tuple(self.streams):
                stream.lose(self.over.reason)

    async def _beat(self, open_ping: Callable[[], Awaitable[SocketStream]]) -> None:
        try:
            stream = await open_ping()
            self.beating.set()
            try:
                await self._ping_for_ever(stream)
            finally:
                stream.abandon()
        except PeerError as error:
            self.end(error)

    async def _ping_for_ever(self, stream: SocketStream) -> None:
        number = 0
        while True:
            number += 1
            sent_at = trio.current_time()
            await self._exchange(stream, number.to_bytes(8, "big"))
            rtt_s = trio.current_time() - sent_at
            self.rtt_s = rtt_s if self.rtt_s is None else self.rtt_s + _RTT_GAIN * (rtt_s - self.rtt_s)
            self.prove()
            await trio.sleep_until(sent_at + self._limits.heartbeat_interval_s)

    async def _exchange(self, stream: SocketStream, ping: bytes) -> None:
        """One ping and its echo, however late, unless there was no sign of life at all for `silence_s`."""
        sent = False
        while True:
            due = trio.current_time() + self._limits.heartbeat_interval_s
            with trio.move_on_at(due):
                if not sent:
                    await stream.send(ping)  # cancelled, it may be sent all the same: one ping more does no harm
                    sent = True
                while (echo := await stream.receive()) is not None:
                    if bytes(echo) == ping:
                        return
                raise PeerUnreachable(self.peer, "the peer closed the connection")
            self._check_silence(due)

    def _check_silence(self, due: float) -> None:
        now, limits = trio.current_time(), self._limits
        if now - due > limits.heartbeat_interval_s:
            # This process slept itself (a stop, a suspended laptop, a busy loop): what the peer sent meanwhile is
            # still to be read.
            self._last_heard = max(self._last_heard, now - limits.heartbeat_interval_s)
        if not self.proved:
            if now - self._last_heard >= limits.open_timeout_s:
                raise PeerTimeout(self.peer, f"accepts connections but stays silent for {limits.open_timeout_s} s")
        elif now - self._last_heard > limits.silence_s - limits.heartbeat_interval_s / 2:
            raise PeerTimeout(self.peer, f"silent for {limits.silence_s:.1f} s")
