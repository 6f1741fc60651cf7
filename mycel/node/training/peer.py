"""One peer of a run: the stage that it holds, everything that works on it, and its change to another one.

    choose a stage -> have its state -> compute, count, step, give state -> (move: choose again) -> leave

The same in life and in a simulation: what differs comes in as a `Workshop` and through the ports.

Ring: shell.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from random import Random

import msgspec
import trio

from mycel.node.background import background
from mycel.node.events import EventSink
from mycel.node.training.gossip import Gossip
from mycel.node.training.ledger import Ledger
from mycel.node.training.reducing import Reducer
from mycel.node.training.round_sums import RoundSums
from mycel.node.training.stage_service import StageService
from mycel.node.training.state_service import StateService
from mycel.node.training.state_source import StateSource
from mycel.node.training.stepping import TICK_S, StepDone, Stepper
from mycel.node.training.sum_table import SumTable
from mycel.node.training.sums import SumClient, SumService
from mycel.node.training.workshop_port import Holding, Workshop
from mycel.protocols.borders import BorderCodec
from mycel.protocols.messages import PeerAddress
from mycel.protocols.ports import Compute, Transport
from mycel.protocols.training import StageStatus
from mycel.swarm.training.bell import Bell
from mycel.swarm.training.doubts import Doubt, Doubts
from mycel.swarm.training.members import Members
from mycel.swarm.training.moving import PERIOD_S, Move, Mover, must_go_back
from mycel.swarm.training.pipeline import Load, Pipeline
from mycel.swarm.training.plan import RunPlan
from mycel.swarm.training.stages import SETTLE_S, choose_stage, must_yield

__all__ = ["Holding", "Terms", "TrainingPeer", "Workshop"]

# How long a newcomer listens for those whom it knows of before it chooses a stage.
LISTEN_S = 5.0
# Microbatches that one trainer has on their way at most; fewer while there are fewer peers (pipeline).
IN_FLIGHT = 64
# Of a status; a pass may have taken no time that a clock shows.
MAX_FIGURE = 1e9
# How often a peer looks whether it is time to look whether to move.
LOOK_S = 5.0


@dataclass(frozen=True, slots=True)
class Terms:
    """What all peers of a run agree on besides the plan, and what this one gives."""

    codec: BorderCodec
    clip: float
    vocab_size: int
    memory_bytes: int = 1 << 30
    move_every_s: float = PERIOD_S


def _ignore(_: StepDone) -> None:
    """For who does not listen."""


@dataclass(frozen=True, eq=False, slots=True)
class _Tenure:
    """What works on the stage that is held."""

    service: StageService
    sums: SumService
    client: SumClient
    states: StateService
    source: StateSource
    stepper: Stepper
    pipeline: Pipeline | None

    @property
    def sent_bytes(self) -> int:
        return sum(part.sent_bytes for part in (self.service, self.sums, self.client, self.states))


@dataclass(eq=False)
class TrainingPeer:
    """`load` gives the tokens of samples; a peer without it holds a stage and drives nothing.

    `fixed` is a stage to hold whatever the run needs. `on_step` hears of every step, `hashing` is a processor beside
    the compute thread, and `ready` is set when the first stage is held.
    """

    transport: Transport
    plan: RunPlan
    terms: Terms
    workshop: Workshop
    compute: Compute
    event: EventSink
    rng: Random
    load: Load | None = None
    fixed: int | None = None
    on_step: Callable[[StepDone], None] = _ignore
    hashing: Compute | None = None
    # Told when a step cannot be computed: its version, and why.
    on_diverged: Callable[[int, str], None] = lambda _version, _reason: None
    ready: trio.Event = field(default_factory=trio.Event)
    bell: Bell = field(default_factory=Bell, init=False)
    # Where sums come from in a run that does not sum exactly.
    rounds: RoundSums | None = field(default=None, init=False)
    members: Members = field(init=False)
    gossip: Gossip = field(init=False)
    _tenure: _Tenure | None = field(default=None, init=False)
    _sent_before: int = field(default=0, init=False)  # in stages held before
    _doubts: Doubts = field(init=False)
    _stage: int = field(default=0, init=False)
    _moving_to: int = field(default=-1, init=False)
    _leaving: trio.Event = field(default_factory=trio.Event, init=False)

    def __post_init__(self) -> None:
        self.members = Members(self.transport.peer_id, self.plan.run)
        self._doubts = Doubts(self.plan, self.members)
        self.gossip = Gossip(self.transport, self.plan, self.members, self.describe, self.bell, self.event)

    @property
    def me(self) -> str:
        return self.transport.peer_id

    @property
    def stepper(self) -> Stepper | None:
        """Of the stage that is held; None between two."""
        return self._tenure.stepper if self._tenure is not None else None

    @property
    def service(self) -> StageService | None:
        """The same."""
        return self._tenure.service if self._tenure is not None else None

    @property
    def pipeline(self) -> Pipeline | None:
        """The same; also None on a node without the text."""
        return self._tenure.pipeline if self._tenure is not None else None

    # ---- for the rest of the node

    def use_rounds(self, rounds: RoundSums) -> None:
        """Sums come out of these. Before `run`."""
        self.rounds = rounds
        rounds.attach(self.members, self.bell, self.describe)

    def meet(self, address: PeerAddress) -> None:
        """There is somebody who may train with us."""
        self.gossip.meet(address)
        if self.rounds is not None:
            self.rounds.meet(address)

    async def leave(self) -> None:
        """Finish the step and go; `run` then returns."""
        self._leaving.set()
        if self.stepper is not None:
            await self.stepper.leave()

    async def run(self, known: int = 0) -> None:
        """Hold a stage, and another after each move, until `leave`. `known` peers are listened for before choosing."""
        async with background() as tasks:
            tasks.start_soon(self.gossip.run)
            if self.rounds is not None:
                await tasks.start(self.rounds.run)
            self._stage = self.fixed or 0
            await self._listen(known)
            if self.fixed is None:
                await self._choose(newcomer=known > 0)
            while not self._leaving.is_set():
                if (target := await self._hold(self._stage)) is None:
                    break
                self._stage, self._moving_to = target, -1
            if self.rounds is not None:
                await self.rounds.leave()

    def describe(self) -> StageStatus:
        """This peer's status as of now."""
        stepper, service = self.stepper, self.service
        if stepper is None or service is None:
            status = StageStatus(run=self.plan.run, seq=0, stage=self._stage, state="joining", version=0)
        else:
            status = stepper.status()
        return msgspec.structs.replace(
            status,
            trains=self.load is not None,
            queue_s=min(service.queue_s, MAX_FIGURE) if service is not None else 0.0,
            sequences_per_s=min(service.sequences_per_s, MAX_FIGURE) if service is not None else 0.0,
            kept=min(self.workshop.kept, self.plan.n_steps),
            whole=min(self.workshop.whole, self.plan.n_steps),
            sent_bytes=self._sent_bytes,
            moving_to=self._moving_to,
            addresses=self.transport.addresses[:8],
        )

    @property
    def _sent_bytes(self) -> int:
        now = self._tenure.sent_bytes if self._tenure is not None else 0
        rounds = self.rounds.sent_bytes if self.rounds is not None else 0
        return self._sent_before + now + rounds

    # ---- which stage

    async def _listen(self, known: int) -> None:
        """Until all those have spoken, or for long enough: who believes to be alone begins with what is on its disk."""
        with trio.move_on_after(LISTEN_S):
            while sum(1 for _ in self.members) - 1 < known:
                await self.bell.after(self.bell.count)

    async def _choose(self, *, newcomer: bool) -> None:
        """Choose, and choose again if somebody chose the same at the same moment and comes first."""
        stage, reason = choose_stage(self.plan, self.members, self.me)
        await self._take(stage, reason)
        until_s = trio.current_time() + (SETTLE_S if newcomer else 0.0)
        while True:
            seen = self.bell.count
            if yields := must_yield(self.plan, self.members, self.me):
                first = [m for m in self.members if m.status.state != "joining" or m.peer < self.me]
                await self._take(choose_stage(self.plan, first, self.me)[0], yields)
            if trio.current_time() >= until_s:
                return
            with trio.move_on_at(until_s):
                await self.bell.after(seen)

    async def _take(self, stage: int, reason: str) -> None:
        self._stage = stage
        self.event("stage.chosen", stage=stage, reason=reason)
        self.gossip.say()
        await self.workshop.choose(stage)

    # ---- one stage

    async def _hold(self, index: int) -> int | None:
        """Train stage `index`; where to go next, or None when this peer leaves the run."""
        holding = await self.workshop.make(index)
        tenure = self._tenure = self._equip(holding)
        try:
            async with background() as tasks:
                tenure.service.start()
                tenure.sums.start()
                await tasks.start(tenure.states.run)
                tasks.start_soon(tenure.service.run)
                if tenure.pipeline is not None:
                    tasks.start_soon(tenure.pipeline.run)
                tasks.start_soon(self._open_when_ready, holding, tenure.stepper)
                tasks.start_soon(self._doubt, tenure.stepper, tenure.service)
                if self.fixed is None:
                    mover = Mover(self.me, trio.current_time(), self.terms.move_every_s)
                    tasks.start_soon(self._move, mover, tenure.stepper, tenure.source)
                await tenure.stepper.run()
        finally:
            self._sent_before += tenure.sent_bytes
            self._tenure = None
            if self.rounds is not None:
                self.rounds.let_go()
            with trio.CancelScope(shield=True):
                await self.workshop.close(holding)
        return self._moving_to if self._moving_to >= 0 and not self._leaving.is_set() else None

    def _equip(self, holding: Holding) -> _Tenure:
        """Everything that works on a stage, tied together; nothing runs yet."""
        stage, state, plan, index = holding.stage, holding.state, self.plan, holding.stage.index
        ledger = Ledger(stage.n_elements, state.version)
        table = SumTable(stage.n_elements, stage.tied, state.version)
        client = SumClient(self.transport, plan.run)
        sums = SumService(self.transport, plan.run, index, ledger, table, self.compute, self.bell)
        service = StageService(
            self.transport,
            plan,
            stage,
            ledger,
            self.members,
            self.compute,
            self.terms.codec,
            self.terms.vocab_size,
            self.event,
            self.bell,
            self.terms.memory_bytes,
            self.on_diverged,
        )
        states = StateService(
            self.transport,
            plan.run,
            index,
            state,
            self.compute,
            self.event,
            hashing=self.hashing,
            archive=self.workshop.archived,
            always=self.workshop.is_due,
        )
        reducer = Reducer(
            self.me,
            index,
            ledger,
            self.compute,
            table,
            client,
            self.bell,
            holding.tied_end,
            counts_tied=index == 0,
            rounds=self.rounds,
        )
        if self.rounds is not None:
            self.rounds.hold(index, ledger, table)
        source = StateSource(
            self.transport,
            plan,
            self.members,
            self.bell,
            self.compute,
            self.event,
            holding,
            self.workshop,
            states,
            client,
        )
        stepper = Stepper(
            plan,
            self.members,
            self.bell,
            self.gossip.say,
            state,
            reducer,
            service,
            source.fetch,
            self.event,
            self.terms.clip,
            (states.after_step, partial(self.workshop.after_step, holding)),
            self.on_step,
            state="joining",
            on_withheld=self._withheld,
        )
        pipeline = self._trainer(stepper, service) if self.load is not None else None
        return _Tenure(service, sums, client, states, source, stepper, pipeline)

    def _trainer(self, stepper: Stepper, service: StageService) -> Pipeline:
        assert self.load is not None
        return Pipeline(
            self.transport,
            self.plan,
            self.members,
            self.load,
            self.bell,
            self.event,
            self.rng,
            lambda: stepper.version,
            service,
            IN_FLIGHT,
        )

    async def _open_when_ready(self, holding: Holding, stepper: Stepper) -> None:
        while stepper.state == "joining":
            await self.bell.after(self.bell.count)
        await self.workshop.open(holding)
        self.ready.set()

    async def _doubt(self, stepper: Stepper, service: StageService) -> None:
        """While the run stands still, pass over whose word is in the way."""
        while True:
            await trio.sleep(TICK_S)
            if service.diverged:
                continue  # it is nobody's word that is in the way
            doubt = self._doubts.look(stepper.status(), stepper.strikes, trio.current_time())
            if doubt is not None:
                self.event("peer.doubted", peer=doubt.peer, version=stepper.version, reason=doubt.reason)
            if doubt is not None or self._doubts.has_changed:
                self.bell.ring()

    def _withheld(self, doubt: Doubt) -> None:
        self._doubts.convict(doubt.peer, trio.current_time())
        self.event("peer.doubted", peer=doubt.peer, reason=doubt.reason)
        self.bell.ring()

    async def _move(self, mover: Mover, stepper: Stepper, source: StateSource) -> None:
        """Look now and then whether another stage needs this peer more; if so leave this one."""
        while True:
            await trio.sleep(min(LOOK_S, self.terms.move_every_s))
            if stepper.state not in ("training", "observing"):
                continue
            move = mover.decide(self.plan, self.members, trio.current_time(), fetch_s=source.took_s)
            if isinstance(move, Move) and await self._means_it(move):
                await stepper.leave()
                return

    async def _means_it(self, move: Move) -> bool:
        """Say where we go, and go unless somebody else does at the same time, or we are needed here."""
        self._moving_to = move.target
        self.event("stage.moving", to=move.target, reason=move.reason)
        self.gossip.say()
        until_s = trio.current_time() + SETTLE_S
        while True:
            seen = self.bell.count
            if reason := must_go_back(self.plan, self.members, self.me):
                self._moving_to = -1
                self.event("stage.stays", reason=reason)
                self.gossip.say()
                return False
            if trio.current_time() >= until_s:
                return True
            with trio.move_on_at(until_s):
                await self.bell.after(seen)
