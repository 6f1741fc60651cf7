"""The client's side of a generation: one task that opens a chain, hears tokens and mends the chain when a hop is lost.

A token's walk is hop to hop; the client only hears the last hop and holds a control stream to each, which is how it
notices a loss at once and how hops notice that the client has gone. What the client knows (the tokens so far) is enough
to replace any hop: a new first hop gets them as its prompt, a new last hop as its history, and every other is refilled
by its neighbour.

Ring: shell.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from random import Random
from typing import Protocol

import trio

from mycel.protocols import ids
from mycel.protocols.codec import session_codec
from mycel.protocols.errors import (
    LocalProtocolError,
    MycelError,
    PeerError,
    PeerRefused,
    PeerTimeout,
    PeerUnreachable,
    RemoteProtocolError,
    RouteUnavailable,
    one_line,
)
from mycel.protocols.messages import (
    Generation,
    HopFailed,
    HopOpened,
    HopRefused,
    Sampled,
)
from mycel.protocols.ports import Stream, Transport
from mycel.swarm.chain import Mend, mend, opening, relinking
from mycel.swarm.generation import NewToken, Request, RouteChosen, SessionEvent
from mycel.swarm.routing import Chain, Hop, choose_chain
from mycel.swarm.view import View

OPEN_PATIENCE_S = 15.0
EXCLUSION_S = 30.0
REFRESH_S = 0.5
CLOSE_PATIENCE_S = 2.0
# Chains that are set up again and again and never give a token have to end, too.
MAX_MENDS_WITHOUT_TOKEN = 32


class ViewSource(Protocol):
    """Where a session learns who serves what."""

    async def view(self, *, fresh: bool = False) -> View:
        """The view of peers alive now; with `fresh`, read from the directory for this call."""
        ...


@dataclass(eq=False, slots=True)
class _Control:
    """An open hop: its stream, and whether it is still part of the chain."""

    hop: Hop
    stream: Stream
    lost: str = ""
    inbound: int = 0
    listening: trio.CancelScope = field(default_factory=trio.CancelScope)


@dataclass(frozen=True, slots=True)
class _Heard:
    control: _Control
    what: Sampled | HopFailed | PeerError


@dataclass(eq=False, slots=True)
class InferenceSession:
    """One generation. `run` sends its events into `out` and ends when the generation does.

    Raises RouteUnavailable when blocks stay uncovered for the request's patience, PeerTimeout when no token came in it.
    """

    transport: Transport
    source: ViewSource
    swarm: bytes
    request: Request
    out: trio.MemorySendChannel[SessionEvent]
    rng: Random = field(default_factory=Random)
    session_id: bytes = field(default_factory=lambda: os.urandom(16))
    tokens: list[int] = field(init=False)
    _controls: list[_Control] = field(default_factory=list, init=False)
    _excluded: dict[str, tuple[float, str]] = field(default_factory=dict, init=False)
    _progress_at_s: float = field(default=0.0, init=False)
    _mends: int = field(default=0, init=False)
    _attempts: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        self.tokens = list(self.request.prompt)

    @property
    def hops(self) -> tuple[Hop, ...]:
        """The chain as it is now."""
        return tuple(control.hop for control in self._controls)

    async def run(self) -> None:
        """The whole walk: open a chain, hear tokens, mend when a hop is lost, close."""
        heard_send, heard = trio.open_memory_channel[_Heard](16)
        failure: MycelError | None = None
        async with self.out, trio.open_nursery() as nursery:
            try:
                await self._mend(range(0), nursery, heard_send)
                await self._hear_all(nursery, heard_send, heard)
            except MycelError as error:
                failure = error  # raised below, outside the nursery, which would wrap it in a group
            finally:
                nursery.cancel_scope.cancel()
                with trio.move_on_after(CLOSE_PATIENCE_S, shield=True):
                    await _close_all(self._controls)
        if failure is not None:
            raise failure

    async def _hear_all(
        self,
        nursery: trio.Nursery,
        heard_send: trio.MemorySendChannel[_Heard],
        heard: trio.MemoryReceiveChannel[_Heard],
    ) -> None:
        while True:
            with trio.move_on_at(self._progress_at_s + self.request.patience_s) as patience:
                event = await heard.receive()
            if patience.cancelled_caught:
                raise PeerTimeout("", f"no token for {self.request.patience_s:.0f} s at position {len(self.tokens)}")
            if event.control not in self._controls:
                continue  # an echo of a hop that was replaced
            try:
                if isinstance(event.what, Sampled):
                    if await self._take(event.what):
                        return
                else:
                    self._mark_lost(event.control, event.what)
            except RemoteProtocolError as error:
                event.control.lost = error.reason
            while (stretch := self._lost_stretch()) is not None:
                await self._mend(stretch, nursery, heard_send)

    async def _take(self, sampled: Sampled) -> bool:
        """Pass a token on if it is new; whether it was the last."""
        if sampled.position < len(self.tokens):
            return False  # a replaced last hop may repeat what its predecessor had delivered
        if sampled.position > len(self.tokens):
            raise RemoteProtocolError(f"token for position {sampled.position}, expected {len(self.tokens)}")
        self.tokens.append(sampled.token)
        now = trio.current_time()
        await self.out.send(NewToken(sampled.position, sampled.token, sampled.finish, sampled.timings, now))
        self._progress_at_s, self._mends = trio.current_time(), 0
        return bool(sampled.finish)

    def _mark_lost(self, control: _Control, what: HopFailed | PeerError) -> None:
        """Blame the peer that failed, and it alone: a hop's report names its neighbour, not itself."""
        if isinstance(what, PeerError):
            control.lost = control.lost or what.reason
            return
        index, n_hops = self._controls.index(control), len(self._controls)
        for neighbour in (self._controls[index - 1], self._controls[(index + 1) % n_hops]):
            if neighbour.hop.peer.peer == what.peer and neighbour is not control:
                neighbour.lost = neighbour.lost or f"failed its neighbour: {one_line(what.reason)}"

    def _lost_stretch(self) -> range | None:
        """The first run of neighbouring lost hops, or None."""
        lost = [i for i, control in enumerate(self._controls) if control.lost]
        if not lost:
            return None
        end = lost[0] + 1
        while end in lost:
            end += 1
        return range(lost[0], end)

    async def _mend(self, stretch: range, nursery: trio.Nursery, heard: trio.MemorySendChannel[_Heard]) -> None:
        """Replace the hops of `stretch` (or open the first chain), trying others until the patience runs out."""
        self._mends += 1
        if self._mends > MAX_MENDS_WITHOUT_TOKEN:
            raise PeerTimeout("", f"no token in {self._mends} chains at position {len(self.tokens)}")
        gone = self._controls[stretch.start : stretch.stop]
        losses = tuple((control.hop.peer.peer, control.lost) for control in gone)
        for control in gone:
            self._exclude(control.hop.peer.peer, control.lost)
            nursery.start_soon(_abandon, control)
        deadline = trio.current_time() + self.request.patience_s
        opened, fresh = None, bool(gone)
        while opened is None:
            found, chain = await self._choose(stretch, deadline, fresh=fresh)
            if len(found) > len(stretch):
                await self._give_up_chain()
                stretch = range(0)
            self._attempts += 1
            links = [control.inbound for control in self._controls]
            plan = mend(self.hops, links, stretch, chain.hops, self._attempts)
            opened = await self._open_all(plan)
            fresh = True
        self._controls[stretch.start : stretch.stop] = opened
        for control, inbound in zip(self._controls, plan.links, strict=True):
            control.inbound = inbound
        self._progress_at_s = trio.current_time()
        for control in opened:
            nursery.start_soon(_listen, control, heard)
        for index in plan.relinked:
            control = self._controls[index]
            try:
                await control.stream.send(*session_codec.encode(relinking(plan, index)))
            except PeerError as error:
                control.lost = control.lost or error.reason
        # Last, because whoever listens may be slow, and the hops wait for their links.
        await self.out.send(RouteChosen(plan.hops, chain.reason, losses))
        self._progress_at_s = trio.current_time()

    async def _choose(self, stretch: range, deadline: float, *, fresh: bool) -> tuple[range, Chain]:
        """A chain for `stretch`, or else for all hops, waiting for the directory until `deadline`; and for which."""
        while True:
            view = await self.source.view(fresh=fresh)
            try:
                return stretch, self._choose_from(view, stretch)
            except RouteUnavailable as error:
                everything = range(len(self._controls))
                if len(stretch) < len(everything):
                    # Perhaps only hops that we have hold the lost blocks, and one hop cannot be two.
                    with suppress(RouteUnavailable):
                        return everything, self._choose_from(view, everything)
                if trio.current_time() >= deadline:
                    raise RouteUnavailable(error.missing, self._explain(error)) from None
            await trio.sleep(REFRESH_S)
            fresh = True

    def _choose_from(self, view: View, stretch: range) -> Chain:
        hops, now = self.hops, trio.current_time()
        whole = len(stretch) == len(hops)
        rtts = {peer: rtt for peer in self.transport.connected() if (rtt := self.transport.rtt_s(peer)) is not None}
        failed = {peer for peer, (until, _) in self._excluded.items() if until > now}
        surviving = {hop.peer.peer for index, hop in enumerate(hops) if index not in stretch}
        return choose_chain(
            view,
            rtts=rtts,
            max_tokens=self.request.max_tokens,
            start=hops[stretch.start].start if hops else 0,
            end=hops[stretch.stop - 1].end if hops else view.n_blocks,
            exclude=frozenset(failed | surviving),
            previous=None if whole else hops[stretch.start - 1].peer.peer,
            following=None if whole else hops[stretch.stop % len(hops)].peer.peer,
            rng=self.rng,
        )

    async def _give_up_chain(self) -> None:
        """Let go of the hops that are left, to start anew from the tokens so far."""
        for control in self._controls:
            await _abandon(control)
        self._controls.clear()

    def _explain(self, error: RouteUnavailable) -> str:
        reasons = "; ".join(f"{peer[-8:]}: {reason}" for peer, (_, reason) in self._excluded.items())
        return f"{error} (tried {reasons})" if reasons else str(error)

    def _exclude(self, peer: str, reason: str) -> None:
        self._excluded[peer] = (trio.current_time() + EXCLUSION_S, reason)

    async def _open_all(self, plan: Mend) -> list[_Control] | None:
        """Open the new hops side by side; None if any failed (it is excluded for a while, the others closed again)."""
        opened: dict[int, _Control] = {}

        async def attempt(index: int) -> None:
            try:
                opened[index] = await self._open(plan, index)
            except PeerError as error:
                self._exclude(plan.hops[index].peer.peer, error.reason)

        complete = False
        try:
            async with trio.open_nursery() as nursery:
                for index in plan.opened:
                    nursery.start_soon(attempt, index)
            complete = len(opened) == len(plan.opened)
        finally:
            if not complete:  # also when the caller does not want them any more
                with trio.move_on_after(CLOSE_PATIENCE_S, shield=True):
                    await _close_all(list(opened.values()))
        return [opened[index] for index in plan.opened] if complete else None

    async def _open(self, plan: Mend, index: int) -> _Control:
        """Open one hop. Raises PeerError if it cannot be reached, refuses, or does not answer in time."""
        hop = plan.hops[index]
        address = hop.peer
        request = self.request
        generation = Generation(request.sampling, tuple(self.tokens), request.max_tokens, request.eos_token_ids)
        message = opening(plan, index, self.session_id, self.swarm, request.max_tokens, generation)
        self.transport.learn(address.peer, address.addresses)
        with trio.move_on_after(OPEN_PATIENCE_S):
            stream = await self.transport.open(address.peer, ids.SESSION)
            try:
                await stream.send(*session_codec.encode(message))
                frame = await stream.receive()
                answer = session_codec.decode_only(frame) if frame is not None else None
            except BaseException:
                await stream.reset()
                raise
            if isinstance(answer, HopOpened):
                return _Control(hop, stream)
            await stream.reset()
            if isinstance(answer, HopRefused):
                raise PeerRefused(address.peer, answer.reason)
            raise RemoteProtocolError("did not answer the opening of a session", address.peer)
        raise PeerTimeout(address.peer, f"did not open the session within {OPEN_PATIENCE_S:.0f} s")


async def _listen(control: _Control, heard: trio.MemorySendChannel[_Heard]) -> None:
    """Pass on what a hop says until it is lost, which is the last thing passed on, or let go of."""
    peer = control.hop.peer.peer
    with control.listening:
        try:
            while True:
                frame = await control.stream.receive()
                if frame is None:
                    raise PeerUnreachable(peer, "ended the session")
                message = session_codec.decode_only(frame)
                if not isinstance(message, Sampled | HopFailed):
                    raise RemoteProtocolError(f"sent {type(message).__name__} in a running session", peer)
                await heard.send(_Heard(control, message))
        except LocalProtocolError:
            if not control.listening.cancel_called:
                raise
            # Let go of between two frames: the stream says that it was reset before it looks for the cancellation.
        except PeerError as error:
            await heard.send(_Heard(control, error))


async def _abandon(control: _Control) -> None:
    """Let go of a hop at once; nobody may still be receiving from its stream then."""
    control.listening.cancel()
    with trio.move_on_after(CLOSE_PATIENCE_S, shield=True):
        await control.stream.reset()


async def _close_all(controls: Sequence[_Control]) -> None:
    async with trio.open_nursery() as nursery:
        for control in controls:
            nursery.start_soon(control.stream.aclose)
