"""The client's side of a generation: one task that opens a chain, hears tokens and mends the chain when a hop is lost.

A token's walk is hop to hop; the client only hears the last hop and holds a control stream to each, which is how it
notices a loss at once and how hops notice that the client has gone. What the client knows (the tokens so far) is enough
to replace any hop: a new first hop gets them as its prompt, a new last hop as its history, and every other is refilled
by its neighbour.

Others decide and do the parts: who is to be replaced (liveness), by whom (recruiting), with which messages (chain), and
how a hop that leaves is replaced while it still works (handing_over).

Ring: shell.
"""

from __future__ import annotations

import os
from collections import Counter
from dataclasses import dataclass, field
from random import Random

import trio

from mycel.protocols.errors import MycelError, PeerError, PeerTimeout, RemoteProtocolError, RouteUnavailable
from mycel.protocols.messages import AskProgress, HopFailed, Leaving, Progress, Sampled
from mycel.protocols.ports import Transport
from mycel.swarm.chain import mend, relaid
from mycel.swarm.control import Control, Heard, Said, abandon_all, dismiss_all
from mycel.swarm.generation import NewToken, Request, RouteChosen, SessionEvent
from mycel.swarm.handing_over import HandingOver
from mycel.swarm.liveness import Ask, Lost, Relay
from mycel.swarm.open_chain import OpenChain
from mycel.swarm.recruiting import Recruiter, ViewSource
from mycel.swarm.routing import Chain, Hop
from mycel.swarm.view import short_id

REFRESH_S = 0.5
PROGRESS_PATIENCE_S = 1.0
# Chains that are set up again and again and never give a token have to end, too.
MAX_MENDS_WITHOUT_TOKEN = 32


@dataclass(eq=False, slots=True)
class InferenceSession:
    """One generation. `run` sends its events into `out` and ends when the generation does.

    `planned` is a chain to begin with; `in_flight` counts the hops of all sessions of this client, by peer.

    Raises RouteUnavailable when blocks stay uncovered for the request's patience, PeerTimeout when no token came in it.
    """

    transport: Transport
    source: ViewSource
    swarm: bytes
    request: Request
    out: trio.MemorySendChannel[SessionEvent]
    rng: Random = field(default_factory=Random)
    session_id: bytes = field(default_factory=lambda: os.urandom(16))
    planned: Chain | None = None
    in_flight: Counter[str] = field(default_factory=Counter)
    tokens: list[int] = field(init=False)
    _recruiter: Recruiter = field(init=False)
    _chain: OpenChain = field(init=False)
    _losses: list[tuple[str, str]] = field(default_factory=list, init=False)
    _lost_at: int = field(default=0, init=False)
    _exit: HandingOver | None = field(default=None, init=False)
    _exits_failed: int = field(default=0, init=False)
    _over: bool = field(default=False, init=False)
    _progress_at_s: float = field(default=0.0, init=False)
    _mends: int = field(default=0, init=False)
    _nursery: trio.Nursery = field(init=False)
    _heard_send: trio.MemorySendChannel[Heard] = field(init=False)
    _heard: trio.MemoryReceiveChannel[Heard] = field(init=False)

    def __post_init__(self) -> None:
        self.tokens = list(self.request.prompt)
        self._recruiter = Recruiter(
            self.transport, self.source, self.swarm, self.session_id, self.request, self.rng, self.in_flight
        )
        self._chain = OpenChain(self.in_flight)

    @property
    def hops(self) -> tuple[Hop, ...]:
        """The chain as it is now."""
        return self._chain.hops

    async def run(self) -> None:
        """The whole walk: open a chain, hear tokens, mend when a hop is lost, close."""
        self._heard_send, self._heard = trio.open_memory_channel[Heard](16)
        failure: MycelError | None = None
        async with self.out, trio.open_nursery() as self._nursery:
            try:
                await self._mend()
                while not self._over:
                    patience_until_s = self._progress_at_s + self.request.patience_s
                    await self._hear(min(patience_until_s, self._chain.liveness.wake_at_s))
                    await self._look_around()
                    await self._mend()
                    await self._hand_over()
            except MycelError as error:
                failure = error  # raised below, outside the nursery, which would wrap it in a group
            finally:
                self._nursery.cancel_scope.cancel()
                successors = self._exit.successors if self._exit is not None else ()
                await dismiss_all([*self._chain.clear(), *successors])
        if failure is not None:
            raise failure

    # ---- hearing ------------------------------------------------------------------------------------------------

    async def _hear(self, until_s: float) -> None:
        """Take in the next thing that is said, or come back at `until_s`."""
        try:
            heard = self._heard.receive_nowait()  # what is there counts, however late it is
        except trio.WouldBlock:
            with trio.move_on_at(until_s) as waiting:
                heard = await self._heard.receive()
            if waiting.cancelled_caught:
                return
        await self._take_in(heard)

    async def _take_in(self, heard: Heard) -> None:
        control, what = heard.control, self._checked(heard)
        in_chain = control in self._chain.controls
        if self._exit is not None and self._exit.hear(control, what) and not in_chain:
            return
        succeeds = self._exit is not None and control in self._exit.successors
        if not in_chain and not succeeds:
            return  # an echo of a hop that was replaced
        try:
            if isinstance(what, Leaving):
                control.leaving = True
            elif isinstance(what, Sampled):
                await self._take_token(control, what)
            elif isinstance(what, Progress):
                self._chain.liveness.answered(trio.current_time(), control.peer, what)
            elif isinstance(what, HopFailed):
                self._chain.blame_neighbour(control, what)
            elif isinstance(what, PeerError):
                control.lost = control.lost or what.reason
        except RemoteProtocolError as error:
            if in_chain:
                control.lost = control.lost or error.reason
            elif self._exit is not None:
                self._exit.hear(control, error)

    def _checked(self, heard: Heard) -> Said | PeerError | None:
        """What was said; an answer that no hop of this session can give is a broken rule."""
        what = heard.what
        if isinstance(what, Progress):
            if what.received > self.request.max_tokens:
                reason = f"is at position {what.received} of {self.request.max_tokens}"
                return RemoteProtocolError(reason, heard.control.peer)
            heard.control.answered(what)
        return what

    async def _take_token(self, control: Control, sampled: Sampled) -> None:
        """Pass a token on if it is new, whoever comes first: the last hop, or one that is about to take its place."""
        if control.hop.end != self._chain.controls[-1].hop.end:
            raise RemoteProtocolError("sent a token, and is not the last hop")
        if sampled.position < len(self.tokens):
            return  # a new last hop may repeat what another had delivered
        if sampled.position > len(self.tokens):
            raise RemoteProtocolError(f"token for position {sampled.position}, expected {len(self.tokens)}")
        if sampled.token >= self.request.vocab_size:
            raise RemoteProtocolError(f"token {sampled.token} of a vocabulary of {self.request.vocab_size}")
        if sampled.finish != self._finish(sampled):
            raise RemoteProtocolError(f"finish {sampled.finish!r} with token {sampled.token} at {sampled.position}")
        await self._pass_on(sampled)

    def _finish(self, sampled: Sampled) -> str:
        """What the last hop has to say of a token: where a generation ends is not for it to choose."""
        if sampled.token in self.request.eos_token_ids:
            return "stop"
        return "length" if sampled.position + 1 >= self.request.max_tokens else ""

    async def _pass_on(self, sampled: Sampled) -> None:
        now = trio.current_time()
        self.tokens.append(sampled.token)
        self._over, self._mends = bool(sampled.finish), 0
        self._chain.liveness.token(now, sampled.position, sampled.timings)
        await self.out.send(NewToken(sampled.position, sampled.token, sampled.finish, sampled.timings, now))
        self._listener_took_it()

    def _listener_took_it(self) -> None:
        """Whoever listens may take its time, and that is nobody's silence."""
        now = self._progress_at_s = trio.current_time()
        if now >= self._chain.liveness.wake_at_s:
            self._chain.liveness.restart(now)

    async def _look_around(self) -> None:
        """Do what the clock and the answers call for: ask, give up a silent hop, lay a link anew."""
        now, liveness = trio.current_time(), self._chain.liveness
        for verdict in liveness.decide(now, self._recruiter.rtts()) if liveness.is_due(now) else ():
            if isinstance(verdict, Ask):
                self._chain.ask(self._nursery)
            elif isinstance(verdict, Lost):
                await self._lose(verdict)
            elif isinstance(verdict, Relay):
                await self._give_up_exit()
                number = self._recruiter.new_link()
                await self._chain.relink(relaid(self.hops, self._chain.links, verdict.receiver, number))
        self._progress_at_s = max(self._progress_at_s, liveness.progress_at_s)
        if now >= self._progress_at_s + self.request.patience_s:
            patience_s = self.request.patience_s
            raise PeerTimeout("", f"no token for {patience_s:.0f} s at position {len(self.tokens)}")

    async def _lose(self, verdict: Lost) -> None:
        """Give up a hop that may yet come back: only where another can take its place now."""
        self._nursery.start_soon(self._recruiter.refresh)
        view = await self._recruiter.view(fresh=False)
        for index, control in enumerate(self._chain.controls):
            if control.peer == verdict.peer and self._recruiter.is_replaceable(view, self.hops, index):
                control.lost = control.lost or verdict.reason

    # ---- planned exits ------------------------------------------------------------------------------------------

    async def _hand_over(self) -> None:
        """Go on with the replacement of hops that leave: switch if successors are ready, begin if there is none."""
        if self._exit is not None and self._exit.outcome is not None:
            if self._exit.is_ready:
                await self._switch(self._exit)
            else:
                self._exits_failed += 1
                await self._give_up_exit()
        if self._exit is None and self._chain.leaving and not self._over:
            # One for whom it comes to nothing does not keep the others waiting: it is another's turn.
            self._exit = HandingOver(self._recruiter, tuple(self._chain.controls), self.tokens, self._exits_failed)
            self._nursery.start_soon(self._exit.run, self._nursery, self._heard_send)

    async def _switch(self, exit_: HandingOver) -> None:
        """The successors go on where the leavers are; nobody has to wait for anything."""
        self._exit, self._exits_failed = None, 0
        plan, leavers = exit_.switching(), list(exit_.leavers)
        for control in exit_.successors:
            control.moved_in = True
        try:
            await self._chain.splice(exit_.stretch, exit_.successors, plan)
        finally:
            self._nursery.start_soon(dismiss_all, leavers)  # nobody else knows of them any more
        reason = f"left: {exit_.outcome}"
        moved = tuple((control.peer, reason) for control in leavers)
        names = " and ".join(short_id(control.peer) for control in exit_.successors)
        await self.out.send(RouteChosen(self.hops, f"{names} took over", moved=moved, position=len(self.tokens)))
        self._listener_took_it()

    async def _give_up_exit(self) -> None:
        """Forget about successors that are on their way: something else goes first, or they failed."""
        if self._exit is not None:
            exit_, self._exit = self._exit, None
            await exit_.give_up(self._nursery)

    # ---- mending ------------------------------------------------------------------------------------------------

    async def _mend(self) -> None:
        """Until no hop is lost: replace lost hops (or open the first chain), trying others for as long as it takes."""
        fresh, began_s = False, trio.current_time()
        while not self._over and self._chain.lost_stretch() is not None:
            await self._hear_all_there_is()
            stretch = self._chain.lost_stretch()
            if stretch is None or self._over:
                return
            await self._let_go_of_lost()
            try:
                part, chain = await self._choose(stretch, fresh=fresh)
            except RouteUnavailable as error:
                if self._is_impatient(began_s):
                    raise self._recruiter.unavailable(error) from None
                await self._rest()
                fresh = True
                continue
            fresh = not await self._replace(part, chain)
            if fresh and self._is_impatient(began_s):
                tried = self._recruiter.failures.told()
                raise PeerTimeout("", f"no chain was opened in {self.request.patience_s:.0f} s; tried {tried}")

    def _is_impatient(self, began_s: float) -> bool:
        """Whether a mend that began then, and has come to nothing yet, has to end the session."""
        return trio.current_time() >= max(began_s, self._progress_at_s) + self.request.patience_s

    async def _hear_all_there_is(self) -> None:
        """Losses come in company: whatever cut one hop off may have cut off others, whose listeners have their turn."""
        for _ in range(3):
            await trio.lowlevel.checkpoint()
            while not self._over and self._heard.statistics().current_buffer_used:
                await self._take_in(self._heard.receive_nowait())

    async def _let_go_of_lost(self) -> None:
        await self._give_up_exit()
        for control in self._chain.controls:
            if control.lost and not control.let_go:
                control.let_go = True
                self._recruiter.note(control.peer, control.lost)
                self._losses.append((control.peer, control.lost))
                began = len(self.tokens) > len(self.request.prompt)
                self._lost_at = len(self.tokens) if began else self._chain.liveness.furthest
                self._nursery.start_soon(control.abandon)
                self._nursery.start_soon(self._recruiter.refresh)

    async def _choose(self, stretch: range, *, fresh: bool) -> tuple[range, Chain]:
        """Raises RouteUnavailable."""
        if self.planned is not None:
            planned, self.planned = self.planned, None
            self._recruiter.expect(await self._recruiter.view(fresh=False), planned)
            return range(0), planned
        return self._recruiter.choose(await self._recruiter.view(fresh=fresh), self.hops, stretch)

    async def _rest(self) -> None:
        """Wait for a moment, or until a peer may be asked again, listening all the while."""
        now = trio.current_time()
        free_s = self._recruiter.failures.next_free_s(now)
        until_s = now + REFRESH_S if free_s is None else min(free_s, now + REFRESH_S)
        while not self._over and trio.current_time() < until_s:
            await self._hear(until_s)

    async def _replace(self, stretch: range, chain: Chain) -> bool:
        """Open the hops of `chain` in the place of `stretch`; whether that went well."""
        if len(stretch) == len(self._chain.controls):
            await abandon_all(control for control in self._chain.clear() if not control.let_go)
            stretch = range(0)
        plan = mend(self.hops, self._chain.links, stretch, chain.hops, self._recruiter.new_link())
        opened = await self._recruiter.open_all(plan, self.tokens, n_history=await self._history(stretch))
        if opened is None:
            return False
        self._mends += 1
        if self._mends > MAX_MENDS_WITHOUT_TOKEN:
            await dismiss_all(opened)
            raise PeerTimeout("", f"no token in {self._mends} chains at position {len(self.tokens)}")
        for control in opened:
            self._nursery.start_soon(control.listen, self._heard_send)
        await self._chain.splice(stretch, opened, plan)
        self._progress_at_s = trio.current_time()
        losses, self._losses = tuple(self._losses), []
        # Last, because whoever listens may be slow, and the hops wait for their links.
        await self.out.send(RouteChosen(plan.hops, chain.reason, losses, position=self._lost_at))
        self._listener_took_it()
        return True

    async def _history(self, stretch: range) -> int | None:
        """How many tokens a new last hop is told: no more than the first hop has, so that it passes on the rest.

        As a rule that is all of them: a token that was heard was made from those before. But what we have heard of may
        have gone through a hop whose place the first one has taken meanwhile, and only the lost hop could tell it.
        """
        if not stretch or stretch.stop < len(self._chain.controls) or not self._chain.controls[0].moved_in:
            return None
        first, until_s = self._chain.controls[0], trio.current_time() + PROGRESS_PATIENCE_S
        n_answers = first.n_answers
        await first.tell(AskProgress())
        while first.n_answers == n_answers and trio.current_time() < until_s and not first.lost:
            await self._hear(until_s)
        return first.n_known(len(self.request.prompt))
