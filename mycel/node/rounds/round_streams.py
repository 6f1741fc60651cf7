"""Every peer of a group tells every other its statements: one stream to each, one way, in the order they were made.

A new stream begins with all that this peer has to say now, so nothing is lost with an old one, and a peer that takes in
too little loses its stream rather than making us keep what we say. Who breaks the rules loses its stream, too, and has
to rest. What the statements mean is the machine's affair.

Ring: shell.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Awaitable, Callable, Collection, Sequence
from dataclasses import dataclass, field

import trio

from mycel.node.events import EventSink
from mycel.protocols.codec import stream_codec
from mycel.protocols.errors import LocalProtocolError, PeerError, PeerRefused, PeerTimeout, RemoteProtocolError
from mycel.protocols.ids import ROUND
from mycel.protocols.messages import PeerAddress
from mycel.protocols.ports import Stream, Transport
from mycel.protocols.rounds import (
    MAX_GROUP,
    Held,
    Joining,
    Offer,
    RoundMessage,
    Scalars,
    StreamMessage,
    restored,
    shortened,
)
from mycel.swarm.training.bell import Bell

# Of those who are no members; members there are at most as many.
MAX_STRANGERS = MAX_GROUP
# Streams on which nothing has been said yet, of all peers and of one.
MAX_SILENT, MAX_SILENT_OF_ONE = 2 * MAX_GROUP, 4
FIRST_REST_S, LONGEST_REST_S = 0.5, 8.0
# Who refuses the protocol is in no group; who broke the rules is not heard for so long.
REFUSED_REST_S, BROKEN_REST_S = 60.0, 60.0
# Who is unreachable for so many tries in a row may be gone for good, unless it is a member.
MAX_FAILURES = 12
# Statements taken from one peer: so many at once, and then so many a second. More wait in the stream.
BURST, PER_SECOND = 1000, 200.0
# A large statement counts for several.
STATEMENT_BYTES = 16 << 10
MAX_MESSAGE_BYTES = 1 << 20
# What waits for one peer.
MAX_WAITING, MAX_WAITING_BYTES = 2048, 32 << 20
SEND_PATIENCE_S, FIRST_WORD_S = 10.0, 10.0
# Between two lists of what is held, so that several bodies are told of at once.
HELD_GAP_S = 0.02


class RoundDoor:
    """Where ROUND streams come in: the groups that this node is in share it, and the first word says which is meant."""

    def __init__(self, transport: Transport) -> None:
        self.transport = transport
        self._groups: dict[tuple[bytes, str], Callable[[Stream, Joining], Awaitable[None]]] = {}
        self._silent: Counter[str] = Counter()
        transport.serve(ROUND, self._handle)

    def admit(self, place: tuple[bytes, str], handler: Callable[[Stream, Joining], Awaitable[None]]) -> None:
        """Let `handler` have the streams of the group (run, scope). Raises LocalProtocolError if it is there."""
        if place in self._groups:
            raise LocalProtocolError(f"this node is in the group {place[1]!r} already")
        self._groups[place] = handler

    def forget(self, place: tuple[bytes, str]) -> None:
        self._groups.pop(place, None)

    async def _handle(self, stream: Stream) -> None:
        if self._silent[stream.peer] >= MAX_SILENT_OF_ONE or self._silent.total() >= MAX_SILENT:
            return
        self._silent[stream.peer] += 1
        try:
            with trio.move_on_after(FIRST_WORD_S) as patience:
                frame = await stream.receive()
        finally:
            self._silent[stream.peer] -= 1
            self._silent += Counter()  # forgets those who have none
        if patience.cancelled_caught:
            raise PeerTimeout(stream.peer, "opened a stream and said nothing")
        if frame is None:
            return
        first = decoded(stream.peer, frame)
        if not isinstance(first, Joining):
            raise RemoteProtocolError(f"began a stream with {type(first).__name__}", stream.peer)
        if (handler := self._groups.get((first.run, first.scope))) is not None:
            await handler(stream, first)


@dataclass(eq=False, slots=True)
class _Line:
    """What waits for one peer: each with what makes an older one needless, or ""."""

    bell: Bell = field(default_factory=Bell)
    # Rung to try again at once.
    again: Bell = field(default_factory=Bell)
    waiting: deque[tuple[str, bytes]] = field(default_factory=deque)
    waiting_bytes: int = 0
    is_open: bool = False
    # The last that was put here.
    joining: Joining | None = None

    def put(self, key: str, frame: bytes) -> None:
        place = next((number for number, one in enumerate(self.waiting) if one[0] == key), None) if key else None
        if place is not None:
            self.waiting_bytes -= len(self.waiting[place][1])
            del self.waiting[place]
        # A Joining stays before what was said after it, which may leave out what it says.
        self.waiting.insert(len(self.waiting) if place is None or key.startswith("held") else place, (key, frame))
        self.waiting_bytes += len(frame)
        self.bell.ring()

    def take(self) -> tuple[str, bytes]:
        key, frame = self.waiting.popleft()
        self.waiting_bytes -= len(frame)
        return key, frame

    def clear(self) -> None:
        self.waiting.clear()
        self.waiting_bytes = 0
        self.joining = None

    @property
    def is_too_long(self) -> bool:
        return len(self.waiting) > MAX_WAITING or self.waiting_bytes > MAX_WAITING_BYTES


@dataclass(eq=False)
class RoundStreams:
    """Of one group. `greeting` is all that this peer has to say now, its Joining first.

    `hear` is told each statement of the authenticated peer, and raises RemoteProtocolError for one that breaks the
    rules; `changed` is called when `present` did. A peer for which `is_needed` holds is tried for ever.
    """

    door: RoundDoor
    place: tuple[bytes, str]
    event: EventSink
    greeting: Callable[[], Sequence[RoundMessage]]
    hear: Callable[[str, RoundMessage], None]
    changed: Callable[[], None]
    is_needed: Callable[[str], bool]
    sent_bytes: int = field(default=0, init=False)
    _lines: dict[str, _Line] = field(default_factory=dict, init=False)
    _meetings: list[str] = field(default_factory=list, init=False)
    _met: Bell = field(default_factory=Bell, init=False)
    # What was encoded last: most of it goes to everybody.
    _encoded: tuple[RoundMessage | None, bytes] = field(default=(None, b""), init=False)
    # The listening to each peer's newest stream; to an older one nobody listens.
    _listening: dict[str, trio.CancelScope] = field(default_factory=dict, init=False)
    _resting: dict[str, float] = field(default_factory=dict, init=False)

    @property
    def present(self) -> frozenset[str]:
        """Who speaks to us."""
        return frozenset(self._listening)

    async def run(self) -> None:
        """Speak and listen until cancelled."""
        self.door.admit(self.place, self._listen)
        try:
            async with trio.open_nursery() as nursery:
                while True:
                    seen = self._met.count
                    for peer in self._meetings:
                        nursery.start_soon(self._tell, peer)
                    self._meetings.clear()
                    await self._met.after(seen)
        finally:
            self.door.forget(self.place)

    def meet(self, address: PeerAddress) -> None:
        """Speak to this peer from now on."""
        transport = self.door.transport
        if address.peer == transport.peer_id:
            return
        if address.addresses:
            transport.learn(address.peer, address.addresses)
        if (line := self._lines.get(address.peer)) is not None:
            if address.addresses and not line.is_open:
                line.again.ring()
        elif self._has_room(address.peer, self._lines):
            self._lines[address.peer] = _Line()
            self._meetings.append(address.peer)
            self._met.ring()

    def say(self, message: RoundMessage) -> None:
        """Tell everybody we speak to; who is not reached now hears what still counts when it is."""
        key = _supersedes(message)
        for line in self._lines.values():
            if line.is_open:
                line.put(key, self._frame(line, message))

    def repeat(self, peer: str) -> None:
        """Tell one peer again all that there is to say."""
        if (line := self._lines.get(peer)) is not None and line.is_open:
            self._greet(line)

    def _greet(self, line: _Line) -> None:
        line.clear()
        for message in self.greeting():
            line.put(_supersedes(message), self._frame(line, message))

    def _frame(self, line: _Line, message: RoundMessage) -> bytes:
        """What to send: of an own offer of scalars what the peer does not know from our last Joining."""
        if isinstance(message, Joining):
            line.joining = message
        elif isinstance(message, Offer) and line.joining is not None:
            return _encoded(shortened(message, line.joining, self.door.transport.peer_id))
        if message is not self._encoded[0]:
            self._encoded = (message, _encoded(message))
        return self._encoded[1]

    # ---- speaking

    async def _tell(self, peer: str) -> None:
        """Keep one peer informed for as long as it is there."""
        failures, line = 0, self._lines[peer]
        while failures < MAX_FAILURES or self.is_needed(peer):
            seen, began_s, rest_s = line.again.count, trio.current_time(), REFUSED_REST_S
            try:
                await self._tell_once(peer, line)
            except PeerRefused as refusal:
                self.event("peer.refused", peer=peer, reason=refusal.reason)
                failures += 1
            except PeerError as error:
                has_worked = trio.current_time() - began_s > LONGEST_REST_S
                failures = 1 if has_worked else failures + 1
                rest_s = 0.0 if has_worked else min(FIRST_REST_S * 2 ** (failures - 1), LONGEST_REST_S)
                if failures == 1:
                    self.event("peer.unreachable", peer=peer, reason=error.reason)
            line.clear()
            with trio.move_on_after(rest_s):
                await line.again.after(seen)
        del self._lines[peer]

    async def _tell_once(self, peer: str, line: _Line) -> None:
        """Raises PeerError in the end."""
        stream = await self.door.transport.open(peer, ROUND)
        try:
            line.is_open = True
            self._greet(line)
            await self._tell_on(stream, line)
        finally:
            line.is_open = False
            with trio.CancelScope(shield=True):
                await stream.aclose()

    async def _tell_on(self, stream: Stream, line: _Line) -> None:
        """Send what waits; returns never. Raises PeerError."""
        listed_s = -HELD_GAP_S
        while True:
            seen = line.bell.count
            wait_s = listed_s + HELD_GAP_S - trio.current_time()
            if not line.waiting:
                await line.bell.after(seen)
                continue
            if wait_s > 0 and all(key.startswith("held") for key, _ in line.waiting):
                with trio.move_on_after(wait_s):
                    await line.bell.after(seen)
                continue
            if line.is_too_long:
                raise PeerTimeout(stream.peer, "takes in less than is said")
            key, frame = line.take()
            with trio.move_on_after(SEND_PATIENCE_S) as patience:
                await stream.send(frame)
            if patience.cancelled_caught:
                raise PeerTimeout(stream.peer, "takes in nothing")
            self.sent_bytes += len(frame)
            # A list goes at once, those that follow on it go together.
            if key.startswith("held") and not line.waiting:
                listed_s = trio.current_time()

    # ---- listening

    async def _listen(self, stream: Stream, first: Joining) -> None:
        """One peer's statements, until its stream ends: then it is gone, unless it speaks on another already."""
        peer, reason = stream.peer, "ended its stream"
        if self._is_resting(peer):
            return
        if (older := self._listening.get(peer)) is not None:
            older.cancel()
        elif not self._has_room(peer, self._listening):
            return
        with trio.CancelScope() as scope:
            self._listening[peer] = scope
            try:
                self._welcome(peer, first)
                self.changed()
                await self._hear_all(stream, first)
            except RemoteProtocolError as error:
                reason = error.reason
                self._resting[peer] = trio.current_time() + BROKEN_REST_S
                self.event("peer.broke_rules", peer=peer, reason=reason)
                raise
            except PeerError as error:
                reason = error.reason
                raise
            finally:
                if self._listening.get(peer) is scope:
                    del self._listening[peer]
                    self.event("peer.lost", peer=peer, reason=reason)
                    self.changed()

    def _welcome(self, peer: str, joining: Joining) -> None:
        self.meet(PeerAddress(peer, joining.addresses))
        if (line := self._lines.get(peer)) is not None and not line.is_open:
            line.again.ring()

    def _has_room(self, peer: str, others: Collection[str]) -> bool:
        """Strangers, however many, keep no member out."""
        return self.is_needed(peer) or sum(not self.is_needed(other) for other in others) < MAX_STRANGERS

    def _is_resting(self, peer: str) -> bool:
        now = trio.current_time()
        self._resting = {who: until for who, until in self._resting.items() if until > now}
        return peer in self._resting

    async def _hear_all(self, stream: Stream, first: Joining) -> None:
        peer, joining, allowed, at_s = stream.peer, first, float(BURST), trio.current_time()
        self._hear(peer, first)
        while (frame := await stream.receive()) is not None:
            now = trio.current_time()
            cost = 1 + len(frame) // STATEMENT_BYTES
            allowed, at_s = min(BURST, allowed + (now - at_s) * PER_SECOND) - cost, now
            if allowed < 0:
                await trio.sleep(cost / PER_SECOND)
            message = decoded(peer, frame)
            if isinstance(message, Joining):
                joining = message
            if isinstance(message, Scalars):
                offer = restored(message, joining, peer)
                if offer is None:
                    raise RemoteProtocolError(f"scalars of round {message.round} in round {joining.round}", peer)
                self._hear(peer, offer)
            else:
                self._hear(peer, message)

    def _hear(self, peer: str, message: RoundMessage) -> None:
        if isinstance(message, Joining) and (message.run, message.scope) != self.place:
            raise RemoteProtocolError("speaks of another group on a stream of this one", peer)
        try:
            self.hear(peer, message)
        except RemoteProtocolError as error:
            raise RemoteProtocolError(error.reason, peer) from None


def _encoded(message: StreamMessage) -> bytes:
    return b"".join(stream_codec.encode(message))


def decoded(peer: str, frame: memoryview) -> StreamMessage:
    """Raises RemoteProtocolError."""
    if len(frame) > MAX_MESSAGE_BYTES:
        raise RemoteProtocolError(f"a statement of {len(frame)} bytes", peer)
    try:
        return stream_codec.decode_only(frame)
    except RemoteProtocolError as error:
        raise RemoteProtocolError(error.reason, peer) from None


def _supersedes(message: RoundMessage) -> str:
    """What an older statement must be of for this one to make it needless."""
    if isinstance(message, Held):
        return f"held {message.round} {message.shard}"
    return f"joining {message.round}" if isinstance(message, Joining) else ""
