"""A session's ways out: the link to the next hop and, while that one is being replaced, one to its successor.

Each link has its own place in the log of outputs. Until its peer has answered Attach, and wherever it has a history to
give, a link is filled by a task of its own; then outputs are sent in passing, by whoever computed them (`push`), since
that saves a task switch for each token. A link that breaks is attached anew once; then its owner is told.

Ring: shell.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from math import inf

import trio

from mycel.protocols import ids
from mycel.protocols.codec import ring_codec
from mycel.protocols.errors import LocalProtocolError, PeerError, PeerTimeout, RemoteProtocolError
from mycel.protocols.hop import LogCursor, Output, OutputLog
from mycel.protocols.messages import Attach, Attached, HopTiming, NextToken, PeerAddress, Step
from mycel.protocols.ports import Stream, Transport
from mycel.protocols.wire import WireTensor

# A peer that has not said what it lacks is given so much at most (and one output whole): it may have all of it.
UNANSWERED_BYTES = 1 << 20
# A link that breaks again within this time is given up: two healthy peers have no such link.
STEADY_S = 10.0
# For attaching anew: the peer was there a moment ago. Longer, and the client would wait for a peer that is gone.
REATTACH_PATIENCE_S = 2.0

Timings = tuple[HopTiming, ...]


@dataclass(frozen=True, slots=True)
class Logged:
    """An output as it will travel: hidden states with the timings so far, or a token for the first hop."""

    value: WireTensor | int
    timings: Timings

    def encode(self, position: int) -> list[bytes | memoryview]:
        if isinstance(self.value, WireTensor):
            return ring_codec.encode(Step(position, self.timings), [self.value])
        return ring_codec.encode(NextToken(position, self.value))


@dataclass(eq=False, slots=True)
class Link:
    """One numbered link to one peer. `lost` links send nothing more."""

    transport: Transport
    nursery: trio.Nursery
    session: bytes
    address: PeerAddress
    number: int
    cursor: LogCursor[Logged]
    report: Callable[[Link, str], Awaitable[None]]
    is_spare: bool = False
    lost: bool = False
    _inline: bool = field(default=False, init=False)
    _stream: Stream | None = field(default=None, init=False)
    _answered: bool = field(default=False, init=False)
    _ended: bool = field(default=False, init=False)
    _unanswered_bytes: float = field(default=0.0, init=False)
    _steady_at_s: float = field(default=-inf, init=False)
    _lock: trio.Lock = field(default_factory=trio.Lock, init=False)
    _work: trio.CancelScope = field(default_factory=trio.CancelScope, init=False)
    _more: trio.Event = field(default_factory=trio.Event, init=False)

    def leads(self, address: PeerAddress, number: int) -> bool:
        """Whether it can be the link `number` to that peer: one that was lost has to be laid anew."""
        return not self.lost and (self.address.peer, self.number) == (address.peer, number)

    async def push(self) -> None:
        """There is a new output: give it now, or leave it to the link's own task."""
        if self._inline:
            await self._give()
        else:
            self._more.set()

    def promote(self) -> None:
        """The spare link has become the link to the next hop, as it stands."""
        self.is_spare = False
        self._more.set()

    async def fill(self) -> None:
        """The link's own task: give what there is, until that can be done in passing or the link is lost."""
        self._inline = False
        while not self.lost:
            self._more = trio.Event()
            await self._give()
            if self._answered and not self.is_spare and self.cursor.pending() is None:
                self._inline = True
                return
            await self._more.wait()

    async def abandon(self) -> None:
        """Let go of the link, whatever it is doing; the peer sees it break."""
        if (stream := self._let_go()) is not None:
            await stream.reset()

    async def aclose(self) -> None:
        """End the link: what was sent arrives."""
        if (stream := self._let_go()) is not None:
            await stream.aclose()

    def _let_go(self) -> Stream | None:
        self.lost = True
        self._work.cancel()
        self._more.set()
        stream, self._stream = self._stream, None
        return stream

    # ---- giving -------------------------------------------------------------------------------------------------

    async def _give(self) -> None:
        """Give the peer all that it has not been given, as far as it may be given now."""
        async with self._lock:
            with trio.CancelScope() as self._work:
                while not self.lost and (output := self.cursor.pending()) is not None:
                    if self._ended:
                        # Its session is over, or it was told of another link before we were: Relink is on its way.
                        await trio.sleep(REATTACH_PATIENCE_S)
                        await self._lose("ended the link")
                    elif self._stream is None:
                        await self._attach()
                    elif not self._answered and self._unanswered_bytes >= UNANSWERED_BYTES:
                        return  # its answer wakes `fill`
                    elif not await self._send(self._stream, output):
                        return  # if there is another way, `fill` takes it

    async def _send(self, stream: Stream, output: Output[Logged]) -> bool:
        """Give an output; whether the link still stands."""
        parts = output.value.encode(output.position)
        self._unanswered_bytes += sum(len(part) for part in parts)
        try:
            await stream.send(*parts)
        except LocalProtocolError:
            if self._stream is stream:
                raise
            return False  # it broke, or was let go of, while we were sending
        except PeerError as error:
            await self._broke(stream, error)
            return False
        if self._stream is stream:
            self.cursor.given(output)
        return self._stream is stream

    async def _attach(self) -> None:
        """Open a stream; a peer that may have some of several outputs is waited for."""
        # Decided now: what is computed while the stream opens is no history.
        wait = self.cursor.has_history()
        again = self._steady_at_s > trio.current_time()
        try:
            with trio.move_on_after(REATTACH_PATIENCE_S if again else inf) as patience:
                stream = await self._open()
            if patience.cancelled_caught:
                reason = f"the link broke, and was not taken again within {REATTACH_PATIENCE_S:.0f} s"
                raise PeerTimeout(self.address.peer, reason)
        except PeerError as error:
            await self._lose(error.reason)
            return
        self._stream, self._answered, self._ended = stream, False, False
        self._unanswered_bytes = inf if wait else 0.0
        self.nursery.start_soon(self._listen, stream)

    async def _open(self) -> Stream:
        self.transport.learn(self.address.peer, self.address.addresses)
        stream = await self.transport.open(self.address.peer, ids.RING)
        try:
            await stream.send(*ring_codec.encode(Attach(self.session, self.number)))
            await trio.lowlevel.checkpoint_if_cancelled()  # let go of meanwhile: nobody would know of the stream
        except BaseException:
            await stream.reset()
            raise
        return stream

    # ---- hearing ------------------------------------------------------------------------------------------------

    async def _listen(self, stream: Stream) -> None:
        """Hear what the peer lacks, and notice a link that breaks while nothing is being sent."""
        try:
            while (frame := await stream.receive()) is not None:
                message = ring_codec.decode_only(frame)
                if not isinstance(message, Attached) or self._answered:
                    raise RemoteProtocolError(f"sent {type(message).__name__} against the direction of the ring")
                if self._stream is stream:
                    self._answered = True
                    self.cursor.skip_to(message.position)
                    self._more.set()
        except LocalProtocolError:
            if self._stream is stream:
                raise
        except PeerError as error:
            await self._broke(stream, error)
        else:
            if self._stream is stream:
                # Its session is over, and so will ours be, as a rule: that is told only if something is to be given.
                self._ended = True
                self._more.set()

    async def _broke(self, stream: Stream, error: PeerError) -> None:
        """The stream is of no more use: attach anew, once in a while; what was on its way may be lost."""
        if self._stream is not stream or self.lost:
            return
        self._stream = None
        now = trio.current_time()
        if isinstance(error, RemoteProtocolError) or now < self._steady_at_s:
            await self._lose(error.reason)
        else:
            self._steady_at_s = now + STEADY_S
            self.cursor.rewind()
            if self._inline:
                self.nursery.start_soon(self.fill)
            self._inline = False
            self._more.set()
        await stream.reset()

    async def _lose(self, reason: str) -> None:
        """Give the link up, and say so."""
        if not self.lost:
            self.lost = True
            self._more.set()
            await self.report(self, reason)


@dataclass(eq=False, slots=True)
class Outbound:
    """The links of one session: `main` to the next hop, `spare` to whoever will take that one's place."""

    transport: Transport
    nursery: trio.Nursery
    session: bytes
    log: OutputLog[Logged]
    tell: Callable[[PeerAddress, str], Awaitable[None]]
    main: Link | None = field(default=None, init=False)
    spare: Link | None = field(default=None, init=False)

    @property
    def given(self) -> int:
        """The end of what the next hop has been given."""
        return 0 if self.main is None else self.main.cursor.position

    async def push(self) -> None:
        """There is a new output."""
        if self.spare is not None:
            await self.spare.push()  # its own task does it: no wait
        if self.main is not None:
            await self.main.push()

    async def relink(self, following: PeerAddress, number: int, spare: PeerAddress | None, spare_link: int) -> None:
        """The next hop and its successor from now on. A spare link whose number is asked for becomes the main one."""
        old: list[Link] = []
        if self.main is None or self.main.number != number:
            old += [self.main] if self.main is not None else []
            if self.spare is not None and self.spare.leads(following, number):
                self.main, self.spare = self.spare, None
                self.main.promote()
            else:
                self.main = self._link(following, number, is_spare=False)
        wanted = (spare.peer, spare_link) if spare is not None else None
        if self.spare is not None and (self.spare.address.peer, self.spare.number) != wanted:
            old.append(self.spare)
            self.spare = None
        if self.spare is None and spare is not None:
            self.spare = self._link(spare, spare_link, is_spare=True)
        for link in old:
            await link.abandon()

    def _link(self, address: PeerAddress, number: int, *, is_spare: bool) -> Link:
        cursor = LogCursor(self.log)
        link = Link(self.transport, self.nursery, self.session, address, number, cursor, self._report, is_spare)
        self.nursery.start_soon(link.fill)
        return link

    async def _report(self, link: Link, reason: str) -> None:
        if link is self.main or link is self.spare:
            await self.tell(link.address, reason)

    async def aclose(self) -> None:
        """End the links side by side."""
        async with trio.open_nursery() as nursery:
            for link in (self.main, self.spare):
                if link is not None:
                    nursery.start_soon(link.aclose)
