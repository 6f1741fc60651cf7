"""Replacing hops that leave while they still work: make before break, so that tokens keep flowing.

    choose and open successors -> the leaver gives its state -> the hop before fills the rest -> they have caught up

Then the session switches, in no time. Whatever fails on the way costs nothing but the attempt: the chain goes on as it
was, and another successor is tried. What a successor samples before the switch is the session's affair.

Ring: shell.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import trio

from mycel.protocols.errors import PeerError, PeerTimeout, PeerUnreachable, RouteUnavailable
from mycel.protocols.messages import AskProgress, HandedOver, HandOver, HopFailed, Progress
from mycel.swarm.chain import Mend, filling, mend, relaid, relinking
from mycel.swarm.control import Control, Heard, abandon_all
from mycel.swarm.recruiting import Recruiter

# Leavers come in company: whom all of them leave room for is not the same as whom the first does.
SETTLE_S = 0.05
# How long the search for a successor rests while there is none.
RETRY_S = 0.5
# A successor is asked this often how far it is, and given up if it has not come any further for so long.
POLL_S = 1.0
STALL_S = 10.0
# For a state to be given, which is measured and given up by the leaver itself: only against one that says nothing.
GIVING_S = 30.0


@dataclass(eq=False, slots=True)
class HandingOver:
    """A leaving hop of the chain `controls` on its way to a successor; or several neighbours, or several successors.

    `stretch` are the places of those that are replaced now; of several, `turn` says with whom to try first.

    `tokens` grows with the session. `run` ends by itself; then `outcome` says how the successors got their past, or is
    "" if there are none that can take over. `give_up` undoes everything, at any time before the switch.
    """

    recruiter: Recruiter
    controls: Sequence[Control]
    tokens: Sequence[int]
    turn: int
    stretch: range = field(default=range(0), init=False)
    successors: list[Control] = field(default_factory=list, init=False)
    plan: Mend | None = field(default=None, init=False)
    outcome: str | None = field(default=None, init=False)
    _relay_out: bool = field(default=False, init=False)
    _giver: str = field(default="", init=False)
    _filler: Control | None = field(default=None, init=False)
    _handed: HandedOver | None = field(default=None, init=False)
    _received: int = field(default=-1, init=False)
    _failure: PeerError | None = field(default=None, init=False)
    _news: trio.Event = field(default_factory=trio.Event, init=False)
    _scope: trio.CancelScope = field(default_factory=trio.CancelScope, init=False)
    _ended: trio.Event = field(default_factory=trio.Event, init=False)

    @property
    def leavers(self) -> Sequence[Control]:
        return self.controls[self.stretch.start : self.stretch.stop]

    @property
    def is_ready(self) -> bool:
        """Whether the successors can take over: they may have failed since they had caught up."""
        return bool(self.outcome) and self._failure is None

    async def run(self, nursery: trio.Nursery, heard: trio.MemorySendChannel[Heard]) -> None:
        """Bring successors to where they can take over, and wake whoever hears."""
        try:
            with self._scope:
                outcome = await self._attempt(nursery, heard)
                if not outcome:
                    await trio.sleep(RETRY_S)
                self.outcome = outcome
                await heard.send(Heard(self.controls[0], None))
        finally:
            self._ended.set()

    def switching(self) -> Mend:
        """What the switch comes to."""
        assert self.plan is not None
        if not self._relay_out:
            return self.plan
        after = (self.plan.opened[-1] + 1) % len(self.plan.hops)
        onward = relaid(self.plan.hops, self.plan.links, after, self.recruiter.new_link())
        return replace(onward, relinked=tuple(sorted({*onward.relinked, *self.plan.relinked})))

    async def give_up(self, nursery: trio.Nursery) -> None:
        """Have the chain as if nothing had been tried; the successors are let go of meanwhile."""
        self._scope.cancel()
        nursery.start_soon(self._let_go)
        if self._filler is not None and not self._filler.lost:
            hops, links = [c.hop for c in self.controls], [c.inbound for c in self.controls]
            await self._filler.tell(relinking(hops, links, self.controls.index(self._filler)))

    async def _let_go(self) -> None:
        with trio.CancelScope(shield=True):  # bounded: what is cancelled ends, and letting go takes its time at most
            await self._ended.wait()
            await abandon_all(self.successors)

    def hear(self, control: Control, what: object) -> bool:
        """Take in what a successor, the leaver or the filling hop says; whether it concerned this attempt."""
        if isinstance(what, PeerError) and control in self.successors:
            self._failure = self._failure or PeerUnreachable(control.peer, what.reason)
        elif isinstance(what, HopFailed) and control in self.successors:
            self._neighbour_failed(control, what)
        elif isinstance(what, HopFailed) and control is self._filler and what.peer == self._first:
            self._failure = self._failure or PeerUnreachable(what.peer, what.reason)
        elif isinstance(what, Progress) and self.successors and control is self.successors[-1]:
            self._received = max(self._received, what.received)
        elif isinstance(what, Progress) and control is self.controls[0]:
            pass  # `_history` may wait for it; what it says stands in the control
        elif isinstance(what, HandedOver) and control in self.leavers:
            self._handed = what
        else:
            return False
        self._news.set()
        return True

    @property
    def _first(self) -> str:
        return self.successors[0].peer if self.successors else ""

    def _neighbour_failed(self, control: Control, what: HopFailed) -> None:
        """A successor lost a neighbour: another successor, or the hop after them, which does not know it yet."""
        if any(what.peer == successor.peer for successor in self.successors):
            self._failure = self._failure or PeerUnreachable(what.peer, what.reason)
        elif control is self.successors[-1]:
            self._relay_out = True  # that hop would not hold the new link for so long: it gets another at the switch
        else:
            self._failure = self._failure or PeerUnreachable("", f"the filling broke: {what.reason}")

    async def _attempt(self, nursery: trio.Nursery, heard: trio.MemorySendChannel[Heard]) -> str:
        """How the successors got their past; "" if there are none or they failed."""
        await trio.sleep(SETTLE_S)
        if not await self._open(nursery, heard):
            return ""
        try:
            how = await self._give() if self._giver else "its successor computed it anew"
            await self._fill()
            await self._catch_up()
        except PeerError as error:
            if error.peer:
                self.recruiter.note(error.peer, error.reason)
            return ""
        return how

    async def _open(self, nursery: trio.Nursery, heard: trio.MemorySendChannel[Heard]) -> bool:
        hops = [control.hop for control in self.controls]
        leaving = [index for index, control in enumerate(self.controls) if control.leaving]
        turn, choose = self.turn % len(leaving), self.recruiter.choose_successors
        leaving = leaving[turn:] + leaving[:turn]
        try:
            self.stretch, chain = choose(await self.recruiter.view(fresh=False), hops, leaving)
        except RouteUnavailable:
            try:
                self.stretch, chain = choose(await self.recruiter.view(fresh=True), hops, leaving)
            except (RouteUnavailable, PeerError):
                return False
        links = [control.inbound for control in self.controls]
        self.plan = mend(hops, links, self.stretch, chain.hops, self.recruiter.new_link())
        if len(chain.hops) == len(self.stretch) == 1 and not self.leavers[0].gave:
            self._giver = self.leavers[0].peer  # one peer takes over from one: a state can only be given whole
        n_history = await self._history()
        opened = await self.recruiter.open_all(self.plan, self.tokens, n_history=n_history, giver=self._giver)
        if opened is None:
            return False
        self.successors += opened
        for control in opened:
            nursery.start_soon(control.listen, heard)
        return True

    async def _history(self) -> int | None:
        """How many tokens a new last hop is told, as in a mend: no more than a first hop that moved in has for certain.

        None: all, or there is no new last hop. An old answer would do, too, but who is told less has to sample more.
        """
        first = self.controls[0]
        if not first.moved_in or not self.stretch.start or self.stretch.stop < len(self.controls):
            return None
        n_answers = first.n_answers
        await first.tell(AskProgress())
        with trio.move_on_after(POLL_S):
            while first.n_answers == n_answers:
                await self._hear_more()
        return first.n_known(len(self.recruiter.request.prompt))

    async def _give(self) -> str:
        """Have the leaver give its state; how that went, as it says. A second attempt goes without."""
        leaver, taker = self.leavers[0], self.successors[0]
        leaver.gave = True
        await leaver.tell(HandOver(taker.hop.peer))
        with trio.move_on_after(GIVING_S):
            while self._handed is None:
                await self._hear_more()
            return self._handed.reason
        raise PeerTimeout("", f"{leaver.peer} did not say whether it gave its state")

    async def _fill(self) -> None:
        """Have the hop before send the successors what they lack, beside what it sends on."""
        assert self.plan is not None
        hops, links = [control.hop for control in self.controls], [control.inbound for control in self.controls]
        found = filling(hops, links, self.plan)
        if found is not None:
            index, message = found
            self._filler = self.controls[index]
            await self._filler.tell(message)

    async def _catch_up(self) -> None:
        """Until the last successor has all inputs that went through the chain by now."""
        last, position = self.successors[-1], len(self.tokens) - 1
        await last.tell(AskProgress(position))
        grown_s, before = trio.current_time(), self._received
        while self._received < position:
            with trio.move_on_after(POLL_S) as scope:
                await self._hear_more()
            if self._received > before:
                grown_s, before = trio.current_time(), self._received
            elif trio.current_time() >= grown_s + STALL_S:
                raise PeerTimeout(last.peer, f"came no further than position {before} in {STALL_S:.0f} s")
            if scope.cancelled_caught:
                await last.tell(AskProgress())

    async def _hear_more(self) -> None:
        """Wait for news. Raises PeerError if it is that a successor failed."""
        if self._failure is not None:
            raise self._failure
        await self._news.wait()
        self._news = trio.Event()
        if self._failure is not None:
            raise self._failure
