"""One peer's steps: look at what everybody says, decide, do it, wait for the next change.

Decisions are made in `mycel/swarm/training/step.py`, sums come together in `reducing`. Here is what a peer *is*: its
state and version, and the moment at which a step is made, whole or not at all.

Ring: shell.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

import trio

from mycel.node.events import EventSink
from mycel.node.training.ledger import Ledger
from mycel.node.training.reducing import Pull, Reducer
from mycel.node.training.stage_port import StateHolder
from mycel.node.training.sum_table import SumTable
from mycel.protocols.errors import PeerError, PeerRefused
from mycel.protocols.ports import Compute
from mycel.protocols.training import Reduced, StageState, StageStatus
from mycel.swarm.training.actions import (
    Action,
    Begin,
    Commit,
    Decision,
    Finished,
    Reduce,
    Restore,
    Resync,
    TakeSum,
    Uncount,
    Wait,
)
from mycel.swarm.training.bell import Bell
from mycel.swarm.training.doubts import Doubt, suspects
from mycel.swarm.training.members import Members
from mycel.swarm.training.numbers import to_bytes
from mycel.swarm.training.plan import RunPlan
from mycel.swarm.training.progress import mean_loss
from mycel.swarm.training.step import Facts, decide, is_stranded, lacks_sum

__all__ = ["FetchState", "StageWork", "StepDone", "Stepper"]

# Looked again without a change: some decisions depend on how long something has been so.
TICK_S = 1.0
FIRST_REST_S, LONGEST_REST_S = 0.25, 4.0
# A peer that leaves stays for so long after its last step, until the others have made it, too.
LINGER_S = 2.0
# A peer is not asked again in this step after so much: an error counts 3, and a refusal, which may be of a question
# that came too early, 2.
GIVE_UP = 3
# So many times in a row nobody gave the sum that others say they have.
HELPLESS = 8
# A state that could not be had is not asked for again for so long, and twice as long each time.
FIRST_CALM_S, LONGEST_CALM_S = 30.0, 960.0
# The ledger's version while the state is being replaced: work that still waits for the processor is of no version.
NO_VERSION = -1


class StageWork(Protocol):
    """The stage's microbatches (stage_service)."""

    def advance(self, version: int) -> None:
        """The parameters are now at `version`; after a restore that is less than before."""
        ...

    async def uncount(self, bits: int) -> None:
        """Take these numbers' gradients back out of the ledger, computed again from what is kept."""
        ...


class FetchState(Protocol):
    """Where a stage's state comes from when the stepper has none, or a wrong one (state sync, checkpoints)."""

    async def __call__(self, version: int | None) -> int:
        """Load a state into the StateHolder, on the compute thread, and return its version.

        None: the newest that the peers of the stage agree on; own checkpoint or first weights if nobody is there who
        has one. A number: that version, from the own disk or from peers, or the newest before it that can be had.
        Raises PeerError if that did not work now: it is called again.
        """
        ...


@dataclass(frozen=True, slots=True)
class StepDone:
    """A step that this peer made: `version` steps are behind it now. `loss` is a token's, None if nobody said it.

    `norm` is of the whole model's gradient before it was clipped (0: not known), `duplicates` were taken back here,
    `retries` questions that somebody did not answer; `taken`: the sum came from another peer as a whole.
    """

    version: int
    loss: float | None
    norm: float
    scale: float
    seconds: float
    duplicates: int
    retries: int
    taken: bool


def _ignore(_: object) -> None:
    """For who does not listen."""


@dataclass(eq=False)
class Stepper:
    """Makes the steps of one stage in one peer. `say` tells the others that something has changed (gossip).

    `clip` bounds the norm of the gradient of the whole model, 0 for not at all. `after_step` is awaited with the new
    version before new work begins. `state` is "joining" for a peer that has no parameters yet, else "observing".
    """

    plan: RunPlan
    members: Members
    bell: Bell
    say: Callable[[], None]
    holder: StateHolder
    reducer: Reducer
    work: StageWork
    fetch_state: FetchState
    event: EventSink
    clip: float = 0.0
    after_step: Sequence[Callable[[int], Awaitable[None]]] = ()
    on_step: Callable[[StepDone], None] = _ignore
    state: StageState = "observing"
    # Told whose word led to a fetch for nothing.
    on_withheld: Callable[[Doubt], None] = _ignore
    version: int = field(default=0, init=False)
    params: bytes = field(default=b"", init=False)
    decision: Decision = field(default=Decision(Wait(), "has not begun"), init=False)
    _made_counted: int | None = field(default=None, init=False)
    _strikes: dict[str, int] = field(default_factory=dict, init=False)
    _failures: int = field(default=0, init=False)
    _retries: int = field(default=0, init=False)
    _duplicates: int = field(default=0, init=False)
    _taken: bool = field(default=False, init=False)
    _looked: int = field(default=0, init=False)
    _began_s: float = field(default=0.0, init=False)
    _stranded_s: float | None = field(default=None, init=False)
    _lacks_s: float | None = field(default=None, init=False)
    _fruitless: int = field(default=0, init=False)
    _calm_until_s: float = field(default=0.0, init=False)
    _leaves_at: int | None = field(default=None, init=False)
    _scope: trio.CancelScope = field(default_factory=trio.CancelScope, init=False)
    _ended: trio.Event = field(default_factory=trio.Event, init=False)

    # ---- for the rest of the node

    @property
    def ledger(self) -> Ledger:
        return self.reducer.ledger

    @property
    def table(self) -> SumTable:
        return self.reducer.table

    @property
    def compute(self) -> Compute:
        return self.reducer.compute

    @property
    def counted(self) -> int:
        """The numbers of step `version`: the ledger may be at the next one, for a moment."""
        if self.state == "joining":
            return 0
        return self.ledger.counted if self._made_counted is None else self._made_counted

    @property
    def strikes(self) -> Mapping[str, int]:
        """Who did not give in this step what was asked for, and how often."""
        return self._strikes

    @property
    def reduced(self) -> tuple[Reduced, ...]:
        """The sums that are here whole."""
        return () if self.state == "joining" else self.table.reduced

    def status(self) -> StageStatus:
        """What the steps know of a status; queue, speed, disk, bytes and addresses are for others to add."""
        return StageStatus(
            run=self.plan.run,
            seq=0,
            stage=self.reducer.stage,
            state=self.state,
            version=max(self.version, 0),
            params=self.params,
            counted=to_bytes(self.counted),
            reduced=self.reduced,
        )

    async def leave(self) -> None:
        """Finish the step, as far as others count on us for it, and return when nobody does any more."""
        if self._leaves_at is None:
            self._leaves_at = self.version
            if self.state == "training":
                self.state = "leaving"
            else:
                self._scope.cancel()
            self.say()
            self.bell.ring()
        await self._ended.wait()

    async def run(self) -> None:
        """Make steps until cancelled, or gone after `leave`."""
        try:
            with self._scope:
                if self.state != "joining":
                    await self._adopt(self.state)
                while not self._is_over():
                    await self._once()
                await self._linger()
        finally:
            self._ended.set()

    async def _linger(self) -> None:
        """Who has not heard of the step yet would miss what we counted, and walk it again."""
        with trio.move_on_after(LINGER_S):
            while any(m.version < self.version for m in self.members if m.status.state in ("training", "leaving")):
                await self.bell.after(self.bell.count)

    def _is_over(self) -> bool:
        return self._leaves_at is not None and (
            self.state != "leaving" or self.version != self._leaves_at or self.version >= self.plan.n_steps
        )

    # ---- look, decide, do

    async def _once(self) -> None:
        seen, facts = self.bell.count, self._facts()
        self.decision = decision = decide(self.plan, self.members, facts, self.clip)
        match decision.action:
            case Wait() | Finished():
                await self._rest(seen, TICK_S)
            case Begin():
                self.event("step.begin", stage=self.reducer.stage, version=self.version, reason=decision.reason)
                self._become("training")
            case Uncount(bits):
                self._duplicates += bits.bit_count()
                self.event("step.uncount", version=self.version, count=bits.bit_count(), reason=decision.reason)
                await self.work.uncount(bits)
                self.say()
            case Commit():
                await self._commit(decision.action)
            case Resync() if self.state != "joining" and trio.current_time() < self._calm_until_s:
                await self._rest(seen, TICK_S)
            case Resync():
                await self._fetch(None, decision)
            case Restore(version):
                await self._fetch(version, decision)
            case pull:
                await self._pull(pull, decision, facts)

    def _facts(self) -> Facts:
        facts = Facts(
            status=self.status(),
            n_elements=self.table.n_elements,
            covered=self.table.covered,
            tied_to=None if self.reducer.tied_end is None else self.reducer.tied_end.stage,
            scale=self.reducer.scale,
            failed=frozenset(peer for peer, strikes in self._strikes.items() if strikes >= GIVE_UP),
            helpless=self._failures >= HELPLESS,
            round=None if self.reducer.rounds is None else self.reducer.rounds.facts,
        )
        now = trio.current_time()
        self._stranded_s = _since(self._stranded_s, now, is_so=is_stranded(self.plan, self.members, facts))
        self._lacks_s = _since(
            self._lacks_s, now, is_so=facts.round is not None and lacks_sum(self.plan, self.members, facts)
        )
        stranded_s, lacks_s = (0.0 if at_s is None else now - at_s for at_s in (self._stranded_s, self._lacks_s))
        return replace(facts, stranded_s=stranded_s, lacks_s=lacks_s)

    async def _rest(self, seen: int, longest_s: float) -> None:
        with trio.move_on_after(longest_s):
            await self.bell.after(seen)

    def _become(self, state: StageState) -> None:
        self.state = state
        self.say()
        self.bell.ring()

    async def _pull(self, pull: Pull, decision: Decision, facts: Facts) -> None:
        """Fetch and add what is missing, for as long as that is what is to be done."""
        failure: PeerError | None = None
        self._looked = self.bell.count
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._watch, decision.action, facts, nursery.cancel_scope)
            try:
                await self.reducer.do(pull)
                self._failures = 0
                self._taken |= isinstance(pull, TakeSum)
                self.say()
                self.bell.ring()
            except PeerError as error:
                failure = error
            nursery.cancel_scope.cancel()
        if failure is not None:
            await self._failed(failure, pull, decision)

    async def _watch(self, action: Action, facts: Facts, scope: trio.CancelScope) -> None:
        """Cancel what is being done once something else is to be done; that it progresses does not matter."""
        while True:
            self._looked = self.bell.count
            now = replace(self._facts(), covered=facts.covered)
            if _aim(decide(self.plan, self.members, now, self.clip).action) != _aim(action):
                scope.cancel()
                return
            await self.bell.after(self._looked)

    async def _failed(self, error: PeerError, pull: Pull, decision: Decision) -> None:
        self._retries += 1
        self._strikes[error.peer] = self._strikes.get(error.peer, 0) + (2 if isinstance(error, PeerRefused) else 3)
        self._failures = self._failures + 1 if isinstance(pull, TakeSum) else 0
        self.event("step.failed", peer=error.peer, version=self.version, doing=decision.reason, reason=error.reason)
        # Not if something has changed since it was last looked at: that may be why the question was refused.
        await self._rest(self._looked, min(FIRST_REST_S * self._retries, LONGEST_REST_S))

    # ---- another version

    async def _commit(self, commit: Commit) -> None:
        """Parameters, ledger and version change together: nothing is awaited between the job's end and the rest."""
        version, final = self.version, self.table.finals[self.version]
        loss = mean_loss(self.members, self.plan, version)
        self._made_counted = self.ledger.counted

        def job() -> bytes:
            assert self.holder.version == self.ledger.version == version, "state, ledger and step are at one version"
            self.holder.apply(final.sum_P, commit.scale)
            self.ledger.advance(version + 1)
            return self.holder.params_digest()

        params = (await self.compute.run(job)).value
        self.table.made(version, commit.scale)
        self._begin(version + 1, params)
        self.table.advance(version + 1)
        # Who leaves computes nothing more: nobody may draw it for the next step.
        self.state = "observing" if self.state == "leaving" else self._trains
        done = StepDone(
            version + 1,
            loss,
            commit.norm,
            commit.scale,
            trio.current_time() - self._began_s,
            self._duplicates,
            self._retries,
            self._taken,
        )
        self._began_s, self._duplicates, self._retries, self._taken = trio.current_time(), 0, 0, False
        self.say()
        self.event("step.done", version=done.version, loss=loss, norm=done.norm, seconds=round(done.seconds, 3))
        self.on_step(done)
        for hook in self.after_step:
            await hook(version + 1)
        self.work.advance(version + 1)
        self.bell.ring()

    @property
    def _trains(self) -> StageState:
        """What a peer is that has made a step: who is no certified member of the run's rounds counts nothing."""
        rounds = self.reducer.rounds
        return "training" if rounds is None or rounds.facts.may_compute else "observing"

    def _begin(self, version: int, params: bytes) -> None:
        self.version, self.params, self._made_counted = version, params, None
        self.reducer.scale = 0.0
        self._strikes.clear()
        self._failures = 0

    async def _fetch(self, version: int | None, decision: Decision) -> None:
        """Get another state. What was counted or summed up with the old one is nobody's any more."""
        before, status, mates = self.state, self.status(), self.members.of_stage(self.reducer.stage)
        self.event("step.fetch", version=self.version, to=version, reason=decision.reason)
        self._become("joining")
        await self.compute.run(lambda: self.ledger.advance(NO_VERSION))
        self.table.restart(NO_VERSION)
        # Now, not in _adopt alone: it may be the same version again, and what is kept is of the old parameters.
        self.work.advance(NO_VERSION)
        try:
            await self.fetch_state(version)
        except PeerError as error:
            self._failures += 1
            self.event("step.failed", peer=error.peer, version=self.version, doing="fetches state", reason=error.reason)
            await self._rest(self.bell.count, min(FIRST_REST_S * 2**self._failures, LONGEST_REST_S))
            if version is not None or await self._is_intact():
                await self._adopt(before)
            if version is None and before != "joining":
                self._calm_down(status, {member.peer for member in mates})
            return
        self._fruitless = 0
        await self._adopt(self._trains if version is not None and before == "training" else "observing")

    async def _is_intact(self) -> bool:
        """Whether the state that was to be replaced is here still, whole."""

        def job() -> bool:
            return bool(self.params) and (self.holder.version, self.holder.params_digest()) == (
                self.version,
                self.params,
            )

        return (await self.compute.run(job)).value

    def _calm_down(self, status: StageStatus, mates: Collection[str]) -> None:
        """Nobody gave the state that `mates` say is right: perhaps one of them has lied."""
        self._calm_until_s = trio.current_time() + min(FIRST_CALM_S * 2.0**self._fruitless, LONGEST_CALM_S)
        self._fruitless = min(self._fruitless + 1, 16)
        for doubt in suspects(self.plan, self.members, status):
            if doubt.peer in mates:
                self.on_withheld(doubt)
                return

    async def _adopt(self, state: StageState) -> None:
        """Begin anew with what the StateHolder has."""

        def job() -> tuple[int, bytes]:
            self.ledger.advance(self.holder.version)
            return self.holder.version, self.holder.params_digest()

        version, params = (await self.compute.run(job)).value
        self._begin(version, params)
        self.table.restart(version)
        self._began_s = trio.current_time()
        self.work.advance(version)
        self._become(state)


def _since(before: float | None, now: float, *, is_so: bool) -> float | None:
    """Since when something has been so; None while it is not."""
    if not is_so:
        return None
    return now if before is None else before


def _aim(action: Action) -> object:
    """What stays the same while an action makes progress."""
    match action:
        case Reduce():
            return Reduce, action.sources
        case TakeSum():
            return TakeSum, action.version, action.digest
        case _:
            return type(action)
