"""The serving side of inference: admits sessions and links them to the ring streams that push their inputs.

A session lives as long as its client's control stream; what it does in its life stands in hop_session.

Ring: shell.
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass, field

import trio

from mycel.node.events import EventSink
from mycel.node.handover import HandoverRates
from mycel.node.hop_session import HopSession
from mycel.node.kv_budget import KVBudget
from mycel.node.span_port import SpanSource
from mycel.protocols import ids
from mycel.protocols.codec import handover_codec, ring_codec, session_codec
from mycel.protocols.errors import PeerRefused, PeerTimeout, RemoteProtocolError
from mycel.protocols.hop import HopMachine
from mycel.protocols.messages import (
    Attach,
    GiveState,
    HopOpened,
    HopRefused,
    OpenHop,
    StateRefused,
)
from mycel.protocols.ports import Compute, Stream, Transport

OPENING_PATIENCE_S = 10.0
# Longer than a client waits for a hop to open: the first hop may push before the last has heard of the session.
ATTACH_PATIENCE_S = 30.0
# Links that the client has not announced yet wait as long as the session lives: a successor is filled in its own time.
MAX_EARLY_LINKS = 8
# For sessions that were ended to be gone: a step on the compute thread is waited for.
CLOSING_S = 5.0


@dataclass(frozen=True, slots=True)
class HopLimits:
    max_sessions: int = 256
    max_sessions_per_peer: int = 64


@dataclass(eq=False, slots=True)
class HopService:
    """All sessions of one node over one span. `leaving` admits nothing new."""

    transport: Transport
    swarm: bytes
    span: SpanSource
    compute: Compute
    budget: KVBudget
    event: EventSink
    limits: HopLimits = field(default_factory=HopLimits)
    leaving: bool = False
    sessions: dict[bytes, HopSession] = field(default_factory=dict, init=False)
    rates: HandoverRates = field(default_factory=HandoverRates, init=False)
    _changed: trio.Event = field(default_factory=trio.Event, init=False)
    _departs: trio.Event = field(default_factory=trio.Event, init=False)
    _departs_at_s: float = field(default=0.0, init=False)
    _early: dict[bytes, dict[str, trio.CancelScope]] = field(default_factory=dict, init=False)

    def start(self) -> None:
        """Answer sessions, ring links and handovers from now on."""
        self.transport.serve(ids.SESSION, self.serve_session)
        self.transport.serve(ids.RING, self.serve_ring)
        self.transport.serve(ids.HANDOVER, self.serve_handover)

    async def leave(self, within_s: float) -> None:
        """Admit nothing new, have every client told, and return once no session is left or `within_s` is over."""
        self.leaving, self._departs_at_s = True, trio.current_time() + within_s
        self._departs.set()
        with trio.move_on_after(within_s):
            while self.sessions:
                await self._changed.wait()

    async def close(self, reason: str) -> None:
        """End what is left, and let go of the blocks, of which the next ones may need the memory."""
        for session in list(self.sessions.values()):
            session.end(reason)
        with trio.move_on_after(CLOSING_S):
            while self.sessions:
                await self._changed.wait()
        # In place of handlers that hold this service, and with it the blocks.
        self.transport.serve(ids.SESSION, _refuse)
        self.transport.serve(ids.RING, _end)
        self.transport.serve(ids.HANDOVER, _end)

    async def departure(self) -> float:
        """Wait until this node leaves; the seconds that are left then."""
        await self._departs.wait()
        return max(self._departs_at_s - trio.current_time(), 0.0)

    def changed(self) -> None:
        """Wake whoever waits for a session or a neighbour to become known."""
        self._changed.set()
        self._changed = trio.Event()

    async def serve_session(self, stream: Stream) -> None:
        """One session, from OpenHop to the end of the client's stream."""
        opening = await _first_message(stream)
        await self._supersede(opening.session, stream.peer)
        with ExitStack() as stack:
            try:
                session = self._admit(opening, stream, stack)
            except PeerRefused as refusal:
                await stream.send(*session_codec.encode(HopRefused(refusal.reason[:400])))
                return
            self.sessions[opening.session] = session
            stack.callback(self._forget, opening.session)
            await stream.send(*session_codec.encode(HopOpened()))
            self.changed()
            self.event("session.opened", client=stream.peer, blocks=f"{opening.start}:{opening.end}")
            reason = await session.run()
            self.event("session.closed", client=stream.peer, tokens=session.machine.position, reason=reason)

    async def _supersede(self, session_id: bytes, client: str) -> None:
        """A client that opens its session again has given up the one before, which may not know it yet: end that."""
        while (old := self.sessions.get(session_id)) is not None and old.control.peer == client:
            old.end("opened again by its client")
            await self._changed.wait()

    def _forget(self, session_id: bytes) -> None:
        self.sessions.pop(session_id).end("closed")
        self.changed()

    def _admit(self, opening: OpenHop, stream: Stream, stack: ExitStack) -> HopSession:
        """Reserve what the session needs. Raises PeerRefused (full, leaving, not ours) or RemoteProtocolError."""
        span = self.span
        machine = HopMachine(opening, span.n_blocks)
        mine = sum(session.control.peer == stream.peer for session in self.sessions.values())
        history = opening.generation.tokens if opening.generation is not None else ()
        highest = max(max(opening.prompt, default=0), max(history, default=0))
        refusals = (
            (opening.swarm != self.swarm, "this node serves another swarm"),
            (opening.session in self.sessions, "this session is open already"),
            (self.leaving, "this node is leaving"),
            (not (span.start <= opening.start and opening.end <= span.end), f"blocks {span.start}:{span.end} only"),
            (opening.max_tokens > span.max_positions, f"the model's context is {span.max_positions} tokens"),
            (highest >= span.vocab_size, f"token {highest} of a vocabulary of {span.vocab_size}"),
            (
                not machine.is_alone and self.transport.peer_id in (opening.previous.peer, opening.next.peer),
                "a chain visits a peer once",
            ),
            (len(self.sessions) >= self.limits.max_sessions, f"{len(self.sessions)} sessions are open"),
            (mine >= self.limits.max_sessions_per_peer, f"{mine} sessions of this client are open"),
        )
        for refused, reason in refusals:
            if refused:
                raise PeerRefused(self.transport.peer_id, reason)
        stack.enter_context(self.budget.reserve(span.session_bytes(opening.start, opening.end, opening.max_tokens)))
        return HopSession(self, machine, span.part(opening.start, opening.end), stream)

    async def serve_ring(self, stream: Stream) -> None:
        """Inputs of one session from its previous hop, until that hop ends the stream or is replaced."""
        frame = await _in_time(stream, OPENING_PATIENCE_S)
        attach = ring_codec.decode_only(frame)
        if not isinstance(attach, Attach):
            raise RemoteProtocolError("a ring stream begins with Attach", stream.peer)
        session = await self._attachable(attach, stream.peer)
        await session.take_inputs(stream)

    async def _attachable(self, attach: Attach, peer: str) -> HopSession:
        """The session, once it is open and expects this link: hops are opened side by side, so a push may come early.

        Raises PeerRefused for a link that another has replaced, PeerTimeout for one that nobody expects.
        """
        deadline = trio.current_time() + ATTACH_PATIENCE_S
        while True:
            session = self.sessions.get(attach.session)
            if session is not None and session.machine.may_attach(peer, attach.link):
                return session
            if session is not None and attach.link < session.machine.inbound:
                raise PeerRefused(peer, "attached over a link that was replaced")
            if session is not None and attach.link > session.machine.inbound:
                await self._wait_early(attach.session, peer)
                continue
            with trio.move_on_at(deadline) as patience:
                await self._changed.wait()
            if patience.cancelled_caught:
                raise PeerTimeout(peer, "attached to a session that does not expect it")

    async def _wait_early(self, session: bytes, peer: str) -> None:
        """Hold a link that the client may announce any time, until something changes; only the newest of each peer.

        Raises PeerRefused when a newer one takes its place.
        """
        waiting = self._early.setdefault(session, {})
        if (older := waiting.pop(peer, None)) is not None:
            older.cancel()
        elif len(waiting) >= MAX_EARLY_LINKS:
            waiting.pop(next(iter(waiting))).cancel()
        with trio.CancelScope() as scope:
            waiting[peer] = scope
            try:
                await self._changed.wait()
            finally:
                if waiting.get(peer) is scope:
                    del waiting[peer]
                if not waiting and self._early.get(session) is waiting:
                    del self._early[session]
        if scope.cancel_called:
            raise PeerRefused(peer, "attached over another link, before this one was expected")

    async def serve_handover(self, stream: Stream) -> None:
        """The state of a session from the hop whose place ours is to take."""
        give = handover_codec.decode_only(await _in_time(stream, OPENING_PATIENCE_S))
        if not isinstance(give, GiveState):
            raise RemoteProtocolError("a handover begins with GiveState", stream.peer)
        session = self.sessions.get(give.session)
        if session is None or session.machine.opening.giver != stream.peer:
            await stream.send(*handover_codec.encode(StateRefused("no session here waits for a state from this peer")))
            return
        await session.takeover.take(stream, give)


async def _in_time(stream: Stream, patience_s: float) -> memoryview:
    """The stream's next frame. Raises PeerTimeout, or RemoteProtocolError if it ends first."""
    with trio.move_on_after(patience_s):
        frame = await stream.receive()
        if frame is None:
            raise RemoteProtocolError("ended the stream before its first message", stream.peer)
        return frame
    raise PeerTimeout(stream.peer, f"opened a stream and said nothing for {patience_s:.0f} s")


async def _refuse(stream: Stream) -> None:
    await stream.send(*session_codec.encode(HopRefused("this node serves no blocks at the moment")))


async def _end(_: Stream) -> None:
    """A handler that returns ends its stream."""


async def _first_message(stream: Stream) -> OpenHop:
    message = session_codec.decode_only(await _in_time(stream, OPENING_PATIENCE_S))
    if not isinstance(message, OpenHop):
        raise RemoteProtocolError("a session begins with OpenHop", stream.peer)
    return message
