"""A stage's door to the microbatches: what comes in, what is computed, what goes on and back, what the trainer hears.

It knows who sent what, the version and the ledger. What a cell does next stands in cells, how it is computed in passes,
how it gets to a neighbour in pipes.

Ring: shell.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import torch
import trio
from torch import Tensor

from mycel.node.events import EventSink
from mycel.node.training.admission import admission
from mycel.node.training.cells import Act, Agenda, Cell, Cells, Do, Fail, Wires
from mycel.node.training.inlets import Inlets
from mycel.node.training.ledger import Ledger
from mycel.node.training.passes import Outcome, Passes
from mycel.node.training.pipes import Parcel, Pipes
from mycel.node.training.stage_port import TrainingStage
from mycel.protocols import ids
from mycel.protocols.borders import BorderCodec
from mycel.protocols.codec import pipe_codec
from mycel.protocols.errors import LocalProtocolError, RemoteProtocolError
from mycel.protocols.ports import Compute, Done, Transport
from mycel.protocols.tensors import to_wire
from mycel.protocols.training import Backward, Forward, Passed, PipeMessage, WorkFailed
from mycel.swarm.training import numbers
from mycel.swarm.training.bell import Bell
from mycel.swarm.training.members import Members
from mycel.swarm.training.plan import RunPlan
from mycel.swarm.training.walks import drivers

Report = Callable[[Passed | WorkFailed], None]

# So often the same microbatch gave nothing that can be counted or sent: it is not chance.
DIVERGED = 3
# Microbatches of the next step that are held until this one is made.
MAX_HELD = 64
_SMOOTHING = 0.2  # weight of the newest pass in the average


@dataclass(frozen=True, slots=True)
class Arrived:
    """A Forward that was checked, and who sent it."""

    message: Forward
    wires: Wires
    sender: str


@dataclass(eq=False)
class StageService:
    """One stage of a run. `vocab_size` bounds the tokens, `memory_bytes` what is kept of a step's microbatches.

    The step calls `advance` once the ledger is at another version, and `uncount` for what another peer keeps.
    """

    transport: Transport
    plan: RunPlan
    stage: TrainingStage
    ledger: Ledger
    members: Members
    compute: Compute
    codec: BorderCodec
    vocab_size: int
    event: EventSink
    bell: Bell
    memory_bytes: int = 1 << 30
    # Told once a step, of a microbatch that cannot be computed: the version, and why.
    on_diverged: Callable[[int, str], None] = lambda _version, _reason: None

    def __post_init__(self) -> None:
        plan, me = self.plan, self.transport.peer_id
        self._admission = admission(me, plan, self.stage, self.codec, self.vocab_size)
        max_cells = max(self.memory_bytes // self.cell_bytes, 1)
        self._cells = Cells(me, plan, self.stage.index, max_cells, self.ledger.version)
        # What is held comes on top of the cells: a part of them.
        self._max_held = min(MAX_HELD, max(max_cells // 4, 2))
        self._agenda = Agenda()
        self._passes = Passes(self.stage, self.ledger, self.codec)
        self._pipes = Pipes(self.transport)
        self._inlets = Inlets(plan.run, self)
        self._jobs = Bell()
        self._forgotten: list[bytes] = []
        self._held: dict[bytes, Arrived] = {}
        self._local: Report | None = None
        self._average_s: dict[Do, float] = {}
        self._running: Do | None = None
        self._exploded: dict[int, int] = {}
        self.diverged = False

    # ---- for the rest of the node

    def start(self) -> None:
        """Answer trainers and neighbours from now on."""
        self.transport.serve(ids.PIPE, self._inlets.serve)

    async def run(self) -> None:
        """Compute and send until cancelled; then all streams end, and this service answers no more."""
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._pipes.run)
                nursery.start_soon(self._work)
        finally:
            self._inlets.close("this peer has left its stage")

    def advance(self, version: int) -> None:
        """The parameters are at another version: what is kept of the one before is dropped, what was held begins."""
        self._forgotten += self._cells.advance(version)
        self._agenda.clear()
        self._exploded.clear()
        self.diverged = False
        self._jobs.ring()
        held, self._held = self._held, {}
        for arrived in held.values():
            self._admit(arrived)

    async def uncount(self, bits: int) -> None:
        """Take the gradients of these numbers of the present version back; those that are not counted are passed over.

        They are computed again from what is kept, to the same bits.
        """
        for number in numbers.members(bits & self.ledger.counted):
            cell = self._cells.of_number(number)
            if cell is None or cell.inputs is None:
                if self.ledger.version == self._cells.version and self.ledger.counted >> number & 1:
                    raise LocalProtocolError(f"number {number} is counted, and nothing is kept of it")
                return  # the step was made meanwhile
            job = self._passes.uncount(cell.work, cell.inputs, cell.output_grad)
            await self.compute.run(job, cost_s=self.stage.cost_s(backward=True))
            self.bell.ring()

    def drive_locally(self, report: Report) -> None:
        """Reports to the trainer of this node go there; it is called at once and must not wait or raise."""
        self._local = report

    async def forward_locally(self, message: Forward, tokens_BT1: Tensor) -> None:
        """A Forward of this node's own trainer. Raises LocalProtocolError for one that no peer would take."""
        await trio.lowlevel.checkpoint()
        me = self.transport.peer_id
        try:
            self._admission.check_forward(message, me, drives=True)
            promised = message.ways[message.stage].has_input
            wires = () if promised else (to_wire(tokens_BT1.to(torch.int32)),)
            self._forward(message, wires, me, 0)
        except RemoteProtocolError as error:
            raise LocalProtocolError(error.reason) from error

    @property
    def cell_bytes(self) -> int:
        """What is kept of each microbatch of a step, at most."""
        return self._admission.cell_bytes

    @property
    def queue_s(self) -> float:
        """How long work that came now would wait, if all passes took as long as the last ones did on average."""
        waiting = dict(zip((Do.COMPUTE_FORWARD, Do.COMPUTE_BACKWARD), self._agenda.waiting(), strict=True))
        if self._running is not None:
            waiting[self._running] += 1
        return sum(count * self._average_s.get(what, 0.0) for what, count in waiting.items())

    @property
    def sequences_per_s(self) -> float:
        """What it computes, forward and backward; 0 before it was measured."""
        if Do.COMPUTE_BACKWARD not in self._average_s:
            return 0.0
        return self.plan.n_sequences / max(sum(self._average_s.values()), 1e-9)

    @property
    def sent_bytes(self) -> int:
        """Microbatches that were sent to neighbours, in all."""
        return self._pipes.sent_bytes

    # ---- what is said

    def trainer_returned(self, peer: str) -> None:
        """As `inlets.Listener` says."""
        self._cells.begin_anew(peer)

    def take(self, peer: str, message: PipeMessage, wires: Wires, n_bytes: int, *, drives: bool) -> None:
        """As `inlets.Listener` says."""
        if isinstance(message, Forward):
            self._admission.check_forward(message, peer, drives=drives)
            self._forward(message, wires, peer, n_bytes)
        elif isinstance(message, Backward) and not drives:
            self._admission.check_backward(message, peer, n_bytes)
            self._backward(message, wires, peer)
        else:
            raise RemoteProtocolError(f"{type(message).__name__} has no place on this stream", peer)

    def _forward(self, message: Forward, wires: Wires, sender: str, n_bytes: int) -> None:
        if message.stage != self.stage.index:
            self._refuse(message, f"this peer is at stage {self.stage.index} now")
            return
        self._admission.check_attached(message, wires, sender, n_bytes)
        self._admit(Arrived(message, wires, sender))

    def _admit(self, arrived: Arrived) -> None:
        """Walk it, or hold it for the next step, or say why not."""
        message, version = arrived.message, self._cells.version
        if message.version == version + 1:
            self._hold(arrived)
        elif message.version != version:
            at = f"this peer is at step {version}" if version >= 0 else "this peer has no state at the moment"
            self._refuse(message, "that step is over" if message.version < version else at)
        else:
            cell = self._cells.get(message.work)
            if cell is None and not arrived.wires:
                self._refuse(message, "lacks the input")
                return
            if cell is not None and self._is_driven_by_another(cell, message.trainer):
                self._refuse(message, "another drives it")
                return
            cell = cell or self._cells.open(message.number)
            if cell is None:
                self._refuse(message, f"full: {len(self._cells)} microbatches are kept")
                return
            self._act(cell, cell.walk(message, arrived.sender, arrived.wires, self._is_counted(cell)))

    def _is_driven_by_another(self, cell: Cell, trainer: str) -> bool:
        """Whoever else wants it, a walk stays with the trainer to whom it falls: all see alike who that is."""
        if cell.trainer in ("", trainer) or cell.paused:
            return False
        trainers = drivers(self.members)
        return cell.trainer in trainers and self.plan.owner(cell.work, trainers) == cell.trainer

    def _hold(self, arrived: Arrived) -> None:
        message, earlier = arrived.message, self._held.get(arrived.message.work)
        if earlier is None and len(self._held) >= self._max_held and not self._make_room(message.trainer):
            self._refuse(message, f"full: {len(self._held)} microbatches wait for the next step")
        elif earlier is None or earlier.message.trainer != message.trainer or earlier.message.turn < message.turn:
            self._held[message.work] = arrived

    def _make_room(self, trainer: str) -> bool:
        """Let go of one of whoever has most of them: one trainer cannot keep the others out."""
        held = Counter(arrived.message.trainer for arrived in self._held.values())
        greedy, most = held.most_common(1)[0]
        if most <= held[trainer] + 1:
            return False
        last = [work for work, arrived in self._held.items() if arrived.message.trainer == greedy][-1]
        self._refuse(self._held.pop(last).message, "full: others want to be held, too")
        return True

    def _backward(self, message: Backward, wires: Wires, sender: str) -> None:
        cell = self._cells.get(message.work)
        if cell is not None and message.stage == self.stage.index:
            self._act(cell, cell.gradient(message.turn, sender, wires, self._is_counted(cell)))

    # ---- what is done

    def _act(self, cell: Cell, acts: list[Act], timing: tuple[int, int] = (0, 0)) -> None:
        for act in acts:
            if isinstance(act, Fail) and cell.paused:
                continue  # of a walk that its trainer may not know
            if isinstance(act, Fail):
                message = WorkFailed(cell.work.id, cell.turn, cell.stage, act.peer, act.reason[:400])
                self._report(cell.trainer, message)
            elif act in (Do.COMPUTE_FORWARD, Do.COMPUTE_BACKWARD):
                self._agenda.push(cell, act, trio.current_time())
                self._jobs.ring()
            elif act in (Do.SAY_FORWARD, Do.SAY_BACKWARD):
                backward = act is Do.SAY_BACKWARD
                self._report(cell.trainer, Passed(cell.work.id, cell.turn, cell.stage, backward, *timing))
            else:
                self._send(cell, forward=act is Do.SEND_ON)

    def _send(self, cell: Cell, *, forward: bool) -> None:
        """To the neighbour of the present walk, unless another walk begins before its turn comes."""
        walk = (cell.trainer, cell.turn)
        stage = cell.stage + 1 if forward else cell.stage - 1
        way = cell.ways[stage]

        def is_wanted() -> bool:
            return not (cell.dropped or cell.paused) and (cell.trainer, cell.turn) == walk

        def pack() -> list[bytes | memoryview] | None:
            return self._packed(cell, stage, forward=forward) if is_wanted() else None

        def failed(reason: str) -> None:
            if is_wanted():
                self._act(cell, [Fail(way.peer.peer, reason)])

        self._pipes.post(way.peer, Parcel(pack, failed))

    def _packed(self, cell: Cell, stage: int, *, forward: bool) -> list[bytes | memoryview]:
        run, work, way = self.plan.run, cell.work, cell.ways[stage]
        if not forward:
            return pipe_codec.encode(
                Backward(run, work.id, cell.turn, stage), () if way.has_gradient else cell.input_grad
            )
        assert cell.inputs is not None, "sent on without an input"
        assert cell.output is not None, "sent on without an output"
        message = Forward(run, work.id, work.version, work.number, cell.turn, stage, cell.trainer, cell.ways)
        return pipe_codec.encode(message, () if way.has_input else (cell.inputs[0], *cell.output))

    def _refuse(self, message: Forward, reason: str) -> None:
        """Nobody broke a rule, and nothing is kept."""
        me = self.transport.peer_id
        self._report(message.trainer, WorkFailed(message.work, message.turn, message.stage, me, reason))

    def _report(self, trainer: str, message: Passed | WorkFailed) -> None:
        """To the trainer, if it listens."""
        if trainer == self.transport.peer_id:
            if self._local is not None:
                self._local(message)
        else:
            self._inlets.report(trainer, message)

    # ---- what is computed

    async def _work(self) -> None:
        """One pass at a time."""
        while True:
            seen = self._jobs.count
            if self._forgotten:
                works, self._forgotten = self._forgotten, []
                await self.compute.run(lambda works=works: self._forget(works))  # type: ignore[misc]
            elif (entry := self._agenda.pop()) is not None:
                await self._compute(*entry)
            else:
                await self._jobs.after(seen)

    def _forget(self, works: list[bytes]) -> None:
        for work in works:
            self.stage.forget(work)

    async def _compute(self, cell: Cell, what: Do, since_s: float) -> None:
        if cell.inputs is None:  # it was refused by the other pass
            cell.failed(what)
            return
        backward = what is Do.COMPUTE_BACKWARD
        if backward:
            count = not self._is_counted_elsewhere(cell)
            job = self._passes.backward(cell.work, cell.inputs, cell.output_grad, count=count)
        else:
            job = self._passes.forward(cell.work, cell.inputs)
        queue_s = trio.current_time() - since_s
        self._running = what
        try:
            done = await self.compute.run(job, cost_s=self.stage.cost_s(backward=backward))
        finally:
            self._running = None
        self._finish(cell, what, done, queue_s + done.queue_s)

    def _finish(self, cell: Cell, what: Do, done: Done[Outcome], queue_s: float) -> None:
        outcome = done.value
        if outcome.fault:
            cell.failed(what)
            if not cell.dropped:
                self._trouble(cell, outcome)
            return
        before_s = self._average_s.get(what, done.compute_s)
        self._average_s[what] = before_s + _SMOOTHING * (done.compute_s - before_s)
        if what is Do.COMPUTE_BACKWARD:
            self.bell.ring()
        if not cell.dropped:
            computed = cell.computed_backward if what is Do.COMPUTE_BACKWARD else cell.computed_forward
            timing = (_microseconds(queue_s), _microseconds(done.compute_s))
            self._act(cell, computed(outcome.wires, self._is_counted(cell)), timing)

    def _trouble(self, cell: Cell, outcome: Outcome) -> None:
        """A pass gave nothing: its version is over, or a neighbour sent what is no border, or it is our own affair."""
        if outcome.fault == "over":
            return
        if outcome.fault == "own":
            fail = Fail(self.transport.peer_id, outcome.reason)
            cell.renew()
            self._note_explosion(cell, outcome.reason)
        else:
            sender = cell.input_from if outcome.fault == "input" else cell.grad_from
            refuse = cell.refuse_input if outcome.fault == "input" else cell.refuse_gradient
            fail = refuse(outcome.reason)
            self._inlets.end_neighbour(sender, outcome.reason)
        work = cell.work
        self.event("microbatch.failed", version=work.version, number=work.number, peer=fail.peer, reason=fail.reason)
        self._act(cell, [fail])

    def _note_explosion(self, cell: Cell, reason: str) -> None:
        times = self._exploded[cell.work.number] = self._exploded.get(cell.work.number, 0) + 1
        if times >= DIVERGED and not self.diverged:
            self.diverged = True
            self.event("run.diverged", version=cell.work.version, number=cell.work.number, reason=reason)
            self.on_diverged(cell.work.version, reason)

    def _is_counted(self, cell: Cell) -> bool:
        """Whether its gradient is in a sum of this stage, here or elsewhere."""
        here = self.ledger.version == cell.work.version and self.ledger.counted >> cell.work.number & 1
        return bool(here) or self._is_counted_elsewhere(cell)

    def _is_counted_elsewhere(self, cell: Cell) -> bool:
        return any(
            member.version == cell.work.version and member.counted >> cell.work.number & 1
            for member in self.members.of_stage(self.stage.index)
            if member.peer != self.transport.peer_id
        )


def _microseconds(time_s: float) -> int:
    return min(round(time_s * 1e6), 2**31 - 1)
