"""What one stage keeps of each microbatch, and what it does about it next.

A walk names a microbatch, a turn and who computes each stage. Whoever has done its part answers from its cell, so a
walk may come again at any time, whole or in part, twice or late: within one walk everything is sent and said once, and
nothing is computed that is there. A stage that is done also sends the walk on: it cannot know whether somebody behind
it has to begin anew.

Ring: pure.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum, auto
from heapq import heappop, heappush

from mycel.protocols.training import Forward, Way
from mycel.protocols.wire import WireTensor
from mycel.swarm.training.plan import RunPlan, Work

Wires = tuple[WireTensor, ...]


class Do(Enum):
    """What is to be done for a cell now."""

    COMPUTE_FORWARD = auto()
    COMPUTE_BACKWARD = auto()
    SEND_ON = auto()
    SEND_BACK = auto()
    SAY_FORWARD = auto()
    SAY_BACKWARD = auto()


@dataclass(frozen=True, slots=True)
class Fail:
    """The walk ends here, by the fault of `peer`."""

    peer: str
    reason: str


Act = Do | Fail


@dataclass(eq=False, slots=True)
class Cell:
    """One microbatch at the stage that `me` hosts; `order` is its place among the cells of this peer.

    `inputs` are tokens and the border tensors of the stage before, `output` this stage's own; `output_grad` came from
    the stage behind, `input_grad` goes to the one before. `backed`: the backward was computed. `trainer`, `turn` and
    `ways` are those of the present walk; `input_from` and `grad_from` are who sent what is kept. `paused`: the trainer
    has come back and may know nothing of this walk; whatever turn it begins with is the next one.
    """

    me: str
    work: Work
    stage: int
    n_stages: int
    order: int
    inputs: Wires | None = None
    input_from: str = ""
    output: Wires | None = None
    output_grad: Wires | None = None
    grad_from: str = ""
    input_grad: Wires = ()
    backed: bool = False
    trainer: str = ""
    turn: int = 0
    ways: tuple[Way, ...] = ()
    paused: bool = False
    dropped: bool = False
    _computing: set[Do] = field(default_factory=set)
    _sent_on: bool = False
    _answered: bool = False

    @property
    def is_last(self) -> bool:
        return self.stage == self.n_stages - 1

    # ---- what happens to it; each gives what is to be done then. `counted`: its gradient is, here or by another.

    def walk(self, message: Forward, sender: str, inputs: Wires, counted: bool) -> list[Act]:
        """The microbatch came along; a walk that was overtaken, or is known, is ignored."""
        if self.trainer == message.trainer and message.turn <= self.turn and not self.paused:
            return []
        self.paused = False
        self.trainer, self.turn, self.ways = message.trainer, message.turn, message.ways
        self._sent_on = self._answered = False
        if self.inputs is None:
            if not inputs:
                return [Fail(self.me, "lacks the input")]
            self.inputs, self.input_from = inputs, sender
        promised = self.ways[self.stage].has_gradient and not self.is_last
        if promised and self.output_grad is None and not (counted and self.backed):
            return [Fail(self.me, "lacks the gradient")]
        return self.next(counted)

    def gradient(self, turn: int, sender: str, gradient: Wires, counted: bool) -> list[Act]:
        """The stage behind is done. What belongs to another walk is ignored."""
        if turn != self.turn or self.is_last or sender != self.ways[self.stage + 1].peer.peer or self.inputs is None:
            return []
        if self.output_grad is None:
            if not gradient:  # we were promised to have it, and said that we lack it; or it breaks its promise
                promised = self.ways[self.stage].has_gradient
                return [] if promised else [Fail(sender, "passed back without a gradient")]
            self.output_grad, self.grad_from = gradient, sender
        return self.next(counted)

    def computed_forward(self, output: Wires, counted: bool) -> list[Act]:
        self._computing.discard(Do.COMPUTE_FORWARD)
        self.output = output
        return self.next(counted)

    def computed_backward(self, input_grad: Wires, counted: bool) -> list[Act]:
        self._computing.discard(Do.COMPUTE_BACKWARD)
        self.backed, self.input_grad = True, input_grad
        return self.next(counted)

    def failed(self, what: Do) -> None:
        """It could not be computed. The next walk tries again."""
        self._computing.discard(what)

    def next(self, counted: bool) -> list[Act]:
        """What follows from how things are; nothing twice in one walk."""
        acts: list[Act] = []
        if self.inputs is None:
            return acts
        if not self.is_last:
            if self.output is None:
                acts += self._compute(Do.COMPUTE_FORWARD)
            elif not (self._sent_on or self.paused):
                self._sent_on = True
                acts += [Do.SEND_ON, Do.SAY_FORWARD]
        if counted and self.backed:
            if not (self._answered or self.paused):
                self._answered = True
                acts += [Do.SEND_BACK, Do.SAY_BACKWARD] if self.stage > 0 else [Do.SAY_BACKWARD]
        elif self.is_last or self.output_grad is not None:
            acts += self._compute(Do.COMPUTE_BACKWARD)
        return acts

    def _compute(self, what: Do) -> list[Act]:
        if what in self._computing:
            return []
        self._computing.add(what)
        return [what]

    def refuse_input(self, reason: str) -> Fail:
        """It was none: whoever walks next has to bring it."""
        self.inputs = None
        return self._blame(self.stage - 1, self.input_from, reason)

    def refuse_gradient(self, reason: str) -> Fail:
        self.output_grad = None
        return self._blame(self.stage + 1, self.grad_from, reason)

    def renew(self) -> None:
        """What was brought here gives nothing that can be counted or sent: the next walk brings it anew."""
        if not self.backed:
            self.inputs = self.output = self.output_grad = None

    def _blame(self, stage: int, peer: str, reason: str) -> Fail:
        """A neighbour; one of an earlier walk cannot be blamed in this one, and we lack what it sent."""
        return Fail(peer if self.ways[stage].peer.peer == peer else self.me, reason)

    def drop(self) -> None:
        """The step is over. Whoever still has the cell in a queue keeps no tensor with it."""
        self.dropped = True
        self.inputs = self.output = self.output_grad = None
        self.input_grad = ()


@dataclass(eq=False, slots=True)
class Cells:
    """The cells of one version, `max_cells` at most."""

    me: str
    plan: RunPlan
    stage: int
    max_cells: int
    version: int
    _cells: dict[bytes, Cell] = field(default_factory=dict, init=False)
    _n_opened: int = field(default=0, init=False)

    def __len__(self) -> int:
        return len(self._cells)

    def get(self, work: bytes) -> Cell | None:
        return self._cells.get(work)

    def of_number(self, number: int) -> Cell | None:
        return self._cells.get(self.plan.work(self.version, number).id)

    def open(self, number: int) -> Cell | None:
        """A new cell; None if there is no room for one more."""
        if len(self._cells) >= self.max_cells:
            return None
        work = self.plan.work(self.version, number)
        cell = Cell(self.me, work, self.stage, self.plan.n_stages, self._n_opened)
        self._n_opened += 1
        self._cells[work.id] = cell
        return cell

    def begin_anew(self, trainer: str) -> None:
        """A trainer has come back, perhaps as a new process, and counts its turns from the start."""
        for cell in self._cells.values():
            cell.paused |= cell.trainer == trainer

    def advance(self, version: int) -> tuple[bytes, ...]:
        """Begin another version with no cells; the works that were dropped."""
        works = tuple(self._cells)
        for cell in self._cells.values():
            cell.drop()
        self._cells.clear()
        self.version = version
        return works


@dataclass(eq=False, slots=True)
class Agenda:
    """What is to be computed: backward before forward, since that ends walks and frees activations; older first."""

    _heap: list[tuple[bool, int, float, Cell]] = field(default_factory=list, init=False)

    def push(self, cell: Cell, what: Do, now: float) -> None:
        heappush(self._heap, (what is Do.COMPUTE_FORWARD, cell.order, now, cell))

    def pop(self) -> tuple[Cell, Do, float] | None:
        """The next one, and since when it has been waiting."""
        if not self._heap:
            return None
        is_forward, _, since_s, cell = heappop(self._heap)
        return cell, Do.COMPUTE_FORWARD if is_forward else Do.COMPUTE_BACKWARD, since_s

    def clear(self) -> None:
        """Their step is over."""
        self._heap.clear()

    def waiting(self) -> tuple[int, int]:
        """How many forwards and backwards."""
        n_forward = sum(entry[0] for entry in self._heap)
        return n_forward, len(self._heap) - n_forward
