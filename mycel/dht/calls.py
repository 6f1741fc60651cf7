"""Requests to other peers' record service, over streams that are kept: opening one costs two round trips.

A stream carries one request at a time. Each peer has a few, idle ones are reused, and a kept stream that turns out to
have ended is replaced once before the peer is blamed. Knows nothing of what is asked.

Ring: shell.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field

import trio

from mycel.protocols import ids
from mycel.protocols.codec import record_codec
from mycel.protocols.errors import PeerTimeout, PeerUnreachable, RemoteProtocolError
from mycel.protocols.messages import RecordMessage
from mycel.protocols.ports import Stream, Transport

# A deadline that is noticed so late says that this process stood still, and nothing about the peer.
OVERSLEPT_S = 0.5


@dataclass(frozen=True, slots=True)
class CallLimits:
    """answer_s: patience with a connected peer; connect_s: what is added where a connection must be made first."""

    answer_s: float = 2.0
    connect_s: float = 3.0
    idle_s: float = 60.0
    streams_per_peer: int = 4
    idle_per_peer: int = 2
    idle_total: int = 256


@dataclass(slots=True)
class _Line:
    """What we have with one peer."""

    limiter: trio.CapacityLimiter
    idle: list[tuple[Stream, float]] = field(default_factory=list)
    waiting_since: list[float] = field(default_factory=list)
    users: int = 0


class Calls:
    """Calls to peers, each with its own deadline."""

    def __init__(self, transport: Transport, limits: CallLimits) -> None:
        self._transport = transport
        self._limits = limits
        self._lines: OrderedDict[str, _Line] = OrderedDict()

    def silent_s(self, peer: str) -> float:
        """For how long the oldest unanswered request to `peer` has been waiting; 0 if there is none."""
        line = self._lines.get(peer)
        return trio.current_time() - min(line.waiting_since) if line is not None and line.waiting_since else 0.0

    async def call(self, peer: str, request: RecordMessage) -> RecordMessage:
        """The peer's answer to `request`.

        Raises PeerUnreachable, PeerRefused, PeerTimeout after the limits' patience, or RemoteProtocolError.
        """
        line = self._lines.setdefault(peer, _Line(trio.CapacityLimiter(self._limits.streams_per_peer)))
        self._lines.move_to_end(peer)
        line.users += 1
        try:
            async with line.limiter:  # queueing is our own doing: the peer's deadline starts after it
                return await self._timed(peer, line, request)
        finally:
            line.users -= 1
            self._forget_unused(peer)

    async def close_idle(self, *, older_than_s: float | None = None) -> None:
        """End the streams that have been idle for `older_than_s`, the limits' idle_s unless told."""
        limit_s = self._limits.idle_s if older_than_s is None else older_than_s
        cutoff = trio.current_time() - limit_s
        ended = []
        for peer, line in tuple(self._lines.items()):
            ended += [stream for stream, since in line.idle if since <= cutoff]
            line.idle = [(stream, since) for stream, since in line.idle if since > cutoff]
            self._forget_unused(peer)
        async with trio.open_nursery() as nursery:
            for stream in ended:
                nursery.start_soon(stream.aclose)

    async def _timed(self, peer: str, line: _Line, request: RecordMessage) -> RecordMessage:
        overslept = False
        while True:
            connected = peer in self._transport.connected()
            patience_s = self._limits.answer_s + (0.0 if connected else self._limits.connect_s)
            began = trio.current_time()
            line.waiting_since.append(began)
            try:
                with trio.fail_after(patience_s):
                    return await self._exchange(peer, line, request)
            except trio.TooSlowError:
                late_s = trio.current_time() - began - patience_s
                if overslept or late_s < OVERSLEPT_S:
                    reason = f"no answer to {type(request).__name__} within {patience_s:g} s"
                    raise PeerTimeout(peer, reason) from None
                # This process stood still (a stop, a suspended laptop, a machine out of memory): the answer may be
                # there, unread. The peer is blamed for its own silence only, so it is asked again, once.
                overslept = True
            finally:
                line.waiting_since.remove(began)

    async def _exchange(self, peer: str, line: _Line, request: RecordMessage) -> RecordMessage:
        frame = record_codec.encode(request)
        if line.idle:
            stream, _ = line.idle.pop()
            try:
                return await self._ask(stream, line, frame)
            except PeerUnreachable:
                pass  # it may have ended while it was idle, with the peer in good health: a fresh one will tell
        return await self._ask(await self._transport.open(peer, ids.RECORDS), line, frame)

    async def _ask(self, stream: Stream, line: _Line, frame: list[bytes | memoryview]) -> RecordMessage:
        answered = False
        try:
            await stream.send(*frame)
            reply = await stream.receive()
            if reply is None:
                raise PeerUnreachable(stream.peer, "the peer ended the stream before it answered")
            answer = record_codec.decode_only(reply)
            answered = True
        except RemoteProtocolError as error:
            raise RemoteProtocolError(error.reason, stream.peer) from None
        finally:
            if not answered:
                with trio.CancelScope(deadline=trio.current_time() + 2.0, shield=True):
                    await stream.reset()
        line.idle.append((stream, trio.current_time()))
        await self._trim(line)
        return answer

    async def _trim(self, line: _Line) -> None:
        """Hold the number of idle streams to its limits; the longest idle go."""
        surplus = []
        while len(line.idle) > self._limits.idle_per_peer:
            surplus.append(line.idle.pop(0)[0])
        n_idle = sum(len(each.idle) for each in self._lines.values())
        for other in self._lines.values():  # least recently called peer first
            while n_idle > self._limits.idle_total and other.idle:
                surplus.append(other.idle.pop(0)[0])
                n_idle -= 1
        for stream in surplus:
            await stream.aclose()

    def _forget_unused(self, peer: str) -> None:
        line = self._lines.get(peer)
        if line is not None and not line.users and not line.idle:
            del self._lines[peer]
