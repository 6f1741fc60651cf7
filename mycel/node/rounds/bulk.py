"""Bulk lanes: a TCP connection of its own beside the transport's, for peers that give each other many bytes.

`BulkLanes.open` gives a stream to a peer: a lane if one can be made, whoever of the two can dial the other, and the
transport's own stream otherwise. What is inside a lane is as authenticated as the transport: see bulk_wire.py.

Ring: shell.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field

import trio

from mycel.node.endpoints import Endpoint, parse_endpoint
from mycel.node.events import EventSink, no_events
from mycel.node.handling import run_handler
from mycel.node.rounds.bulk_stream import BulkStream
from mycel.node.rounds.bulk_wire import (
    LANE,
    TICKET_BYTES,
    DialBack,
    LaneAt,
    LaneMessage,
    NoLane,
    OpenLane,
    lane_codec,
    lane_keys,
)
from mycel.protocols.errors import (
    ConfigError,
    PeerError,
    PeerRefused,
    PeerTimeout,
    PeerUnreachable,
    RemoteProtocolError,
)
from mycel.protocols.ports import Handler, Stream, Transport

_HELLO = b"mycel lane"
_DIAL_S = 2.0  # all addresses of a peer together, a proof of who answers included
_AGREE_S = 10.0
_FIRST_REST_S, _LONGEST_REST_S = 30.0, 600.0
_MAX_LANES = 1024
_MAX_LANES_PER_PEER = 4
_MAX_STRANGERS = 64  # connections that have not shown yet that they belong to a peer
_MAX_DIALLED = 4
_MAX_RESTS = 4096


@dataclass(eq=False, slots=True)
class _Awaited:
    """A connection that is to come with a ticket: from whom, and the keys of our side."""

    peer: str
    send_key: bytes
    receive_key: bytes
    came: trio.Event = field(default_factory=trio.Event)
    stream: BulkStream | None = None


class BulkLanes:
    """Made for a transport. `listen` are multiaddrs with port 0, or none for a node that only dials.

    Others are told the hosts of the transport's own addresses.
    """

    def __init__(
        self, transport: Transport, listen: Sequence[str] = ("/ip4/0.0.0.0/tcp/0",), *, event: EventSink = no_events
    ) -> None:
        self._transport = transport
        self._listen = listen
        self._event = event
        self._addresses: tuple[str, ...] = ()
        self._awaited: dict[bytes, _Awaited] = {}
        self._lanes: Counter[str] = Counter()
        self._n_strangers = 0
        self._rests: dict[str, tuple[float, float]] = {}  # peer: (until when, for how long)
        self._handler: Handler | None = None
        self._protocol = ""

    async def run(
        self, protocol: str, handler: Handler, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
    ) -> None:
        """Make lanes until cancelled; `handler` serves those on which others ask, as streams of `protocol`.

        Raises ConfigError if an address cannot be listened on.
        """
        self._handler, self._protocol = handler, protocol
        async with trio.open_nursery() as nursery:
            listeners: list[trio.SocketListener] = []
            for text in self._listen:
                endpoint = parse_endpoint(text)
                if endpoint is None or endpoint.is_name:
                    raise ConfigError(f"not an address to listen on: {text!r}; it looks like /ip4/0.0.0.0/tcp/0")
                try:
                    listeners += await trio.open_tcp_listeners(endpoint.port, host=endpoint.host)
                except OSError as error:
                    raise ConfigError(f"cannot listen on {endpoint.shown}: {(error.strerror or str(error))}") from None
            self._addresses = self._reachable(listeners)
            if listeners:
                nursery.start_soon(trio.serve_listeners, self._accept, listeners)
            self._transport.serve(LANE, self._agree)
            task_status.started()
            try:
                await trio.sleep_forever()
            finally:
                self._addresses = ()

    def _reachable(self, listeners: Sequence[trio.SocketListener]) -> tuple[str, ...]:
        """The transport's hosts with the ports of our listeners for their kind."""
        ports = {listener.socket.getsockname()[1]: listener.socket.family for listener in listeners}
        found = []
        for text in self._transport.addresses:
            endpoint = parse_endpoint(text)
            for port, family in ports.items():
                if endpoint is not None and (endpoint.kind == "ip6") == (family == trio.socket.AF_INET6):
                    found.append(f"/{endpoint.kind}/{endpoint.host}/tcp/{port}")
        return tuple(dict.fromkeys(found))[:8]

    # ---- asking

    async def open(self, peer: str) -> Stream:
        """A lane to the peer, or a plain stream where there can be none. Raises PeerError."""
        if trio.current_time() >= self._rests.get(peer, (0.0, 0.0))[0]:
            try:
                agreeing = await self._transport.open(peer, LANE)
            except PeerRefused as refusal:
                self.rest(peer, refusal.reason)
            else:
                lane = await self._open_lane(agreeing)
                if lane is not None:
                    return lane
        return await self._transport.open(peer, self._protocol)

    def rest(self, peer: str, reason: str) -> None:
        """No lane to this peer for a while, a longer one each time."""
        self._event("lane.failed", peer=peer, reason=reason)
        _, last_s = self._rests.pop(peer, (0.0, _FIRST_REST_S / 2))
        rest_s = min(2 * last_s, _LONGEST_REST_S)
        self._rests[peer] = (trio.current_time() + rest_s, rest_s)
        if len(self._rests) > _MAX_RESTS:
            del self._rests[next(iter(self._rests))]

    async def _open_lane(self, stream: Stream) -> BulkStream | None:
        """Agree with a peer on `stream`, which is over then."""
        lane: BulkStream | None = None
        reason = f"no answer within {_AGREE_S:.0f} s"
        try:
            with trio.move_on_after(_AGREE_S):
                lane = await self._ask(stream)
        except (PeerError, _NoWayError) as error:
            reason = str(error)
        finally:
            if lane is None:
                with trio.CancelScope(shield=True):
                    await stream.reset()
        if lane is None:
            self.rest(stream.peer, reason)
        else:
            await stream.aclose()
        return lane

    async def _ask(self, stream: Stream) -> BulkStream:
        """Raises PeerError or _NoWayError."""
        peer, secret = stream.peer, os.urandom(32)
        await stream.send(*lane_codec.encode(OpenLane(secret, self._addresses)))
        answer = await _said(stream)
        if isinstance(answer, NoLane):
            raise PeerRefused(peer, answer.reason)
        if not isinstance(answer, LaneAt):
            raise RemoteProtocolError("answered the question for a lane with something else", peer)
        keys = lane_keys(self._transport.peer_id, peer, secret, answer.secret, answer.ticket)
        awaited = _Awaited(peer, *keys)
        try:
            return await _dial(awaited, answer.ticket, answer.addresses)
        except _NoWayError:
            if not self._addresses:
                raise
        with self._awaiting(answer.ticket, awaited):
            await stream.send(*lane_codec.encode(DialBack()))
            with trio.move_on_after(2 * _DIAL_S):
                await awaited.came.wait()
        if awaited.stream is None:
            raise _NoWayError("neither side can dial the other")
        return awaited.stream

    # ---- giving

    async def _agree(self, stream: Stream) -> None:
        """A peer wants a lane to ask on."""
        peer = stream.peer
        wish = await _said(stream)
        if not isinstance(wish, OpenLane):
            raise RemoteProtocolError("began to agree on a lane with something else", peer)
        if self._lanes[peer] >= _MAX_LANES_PER_PEER or self._lanes.total() >= _MAX_LANES:
            await stream.send(*lane_codec.encode(NoLane("too many lanes are open")))
            return
        self._lanes[peer] += 1
        try:
            secret, ticket = os.urandom(32), os.urandom(TICKET_BYTES)
            receive_key, send_key = lane_keys(peer, self._transport.peer_id, wish.secret, secret, ticket)
            awaited = _Awaited(peer, send_key, receive_key)
            with self._awaiting(ticket, awaited):
                await stream.send(*lane_codec.encode(LaneAt(secret, ticket, self._addresses)))
                await self._made(stream, awaited, ticket, wish.addresses)
            if awaited.stream is not None and self._handler is not None:
                await run_handler(self._handler, awaited.stream, self._protocol, self._event)
        finally:
            self._lanes[peer] -= 1
            if not self._lanes[peer]:
                del self._lanes[peer]

    async def _made(self, stream: Stream, awaited: _Awaited, ticket: bytes, addresses: Sequence[str]) -> None:
        """Wait for the asker to dial us, or to want to be dialled, or to give it up."""
        with trio.move_on_after(_AGREE_S):
            try:
                frame = await stream.receive()
            except PeerError:
                return
            if frame is None or awaited.stream is not None:
                return
            if not isinstance(lane_codec.decode_only(frame), DialBack):
                raise RemoteProtocolError("answered where a lane is with something else", stream.peer)
            with suppress(_NoWayError):
                awaited.stream = await _dial(awaited, ticket, addresses)

    # ---- connections that come

    @contextmanager
    def _awaiting(self, ticket: bytes, awaited: _Awaited) -> Iterator[None]:
        """Whoever shows the ticket meanwhile is looked at."""
        self._awaited[ticket] = awaited
        try:
            yield
        finally:
            del self._awaited[ticket]

    async def _accept(self, connection: trio.SocketStream) -> None:
        """Somebody dialled. trio closes the connection when this returns."""
        if self._n_strangers >= _MAX_STRANGERS:
            return
        self._n_strangers += 1
        lane: BulkStream | None = None
        try:
            with trio.move_on_after(_DIAL_S):
                lane = await self._greet(connection)
        finally:
            self._n_strangers -= 1
        if lane is not None:
            await lane.over.wait()

    async def _greet(self, connection: trio.SocketStream) -> BulkStream | None:
        """Whoever dialled has to show a ticket, and that it has the keys, before it costs anything."""
        try:
            awaited = self._awaited.get(await _exactly(connection, TICKET_BYTES))
            if awaited is None:
                return None
            lane = BulkStream(awaited.peer, connection, awaited.send_key, awaited.receive_key)
            if bytes(await lane.receive() or b"") != _HELLO or awaited.stream is not None:
                return None
            awaited.stream = lane
            await lane.send(_HELLO)
            awaited.came.set()
        except (PeerError, trio.BrokenResourceError, trio.ClosedResourceError):
            return None  # a stranger's affair
        return lane


class _NoWayError(Exception):
    """No connection could be made; the text says why."""


async def _dial(awaited: _Awaited, ticket: bytes, addresses: Sequence[str]) -> BulkStream:
    """The lane at the first address that answers with the keys. Raises _NoWayError."""
    reason = "no address to dial"
    with trio.move_on_after(_DIAL_S):
        for endpoint in [found for text in addresses[:_MAX_DIALLED] if (found := parse_endpoint(text)) is not None]:
            reason = f"{endpoint.shown} does not answer"
            with suppress(OSError, PeerError, trio.BrokenResourceError, trio.ClosedResourceError):
                return await _dial_one(awaited, ticket, endpoint)
    raise _NoWayError(reason)


async def _dial_one(awaited: _Awaited, ticket: bytes, endpoint: Endpoint) -> BulkStream:
    connection = await trio.open_tcp_stream(endpoint.host, endpoint.port)
    try:
        await connection.send_all(ticket)
        lane = BulkStream(awaited.peer, connection, awaited.send_key, awaited.receive_key)
        await lane.send(_HELLO)
        if bytes(await lane.receive() or b"") != _HELLO:
            raise PeerUnreachable(awaited.peer, "said something else than hello")
        return lane
    except BaseException:
        connection.socket.close()
        raise


async def _exactly(connection: trio.SocketStream, size_bytes: int) -> bytes:
    data = b""
    while len(data) < size_bytes:
        more = await connection.receive_some(size_bytes - len(data))
        if not more:
            raise trio.BrokenResourceError("it ended")
        data += more
    return data


async def _said(stream: Stream) -> LaneMessage:
    """The next message. Raises PeerError."""
    with trio.move_on_after(_AGREE_S):
        frame = await stream.receive()
        if frame is None:
            raise PeerUnreachable(stream.peer, "ended the stream before it had answered")
        try:
            return lane_codec.decode_only(frame)
        except RemoteProtocolError as error:
            raise RemoteProtocolError(error.reason, stream.peer) from None
    raise PeerTimeout(stream.peer, f"answered nothing for {_AGREE_S:.0f} s")
