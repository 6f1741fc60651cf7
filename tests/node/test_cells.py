"""One microbatch at one stage: whatever comes in whatever order, nothing is said or computed twice, all of it once."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mycel.node.training.admission import Admission
from mycel.node.training.cells import Agenda, Cell, Cells, Do, Fail
from mycel.protocols.errors import RemoteProtocolError
from mycel.protocols.messages import PeerAddress
from mycel.protocols.training import Forward, Way
from mycel.protocols.wire import TensorHeader, WireTensor
from tests.sim.toy_stage import toy_plan

PLAN = toy_plan(3)
WIRES = (WireTensor(TensorHeader("uint8", (1,)), memoryview(b"x")),)
NEW = (WireTensor(TensorHeader("uint8", (1,)), memoryview(b"y")),)


def forward(turn: int = 1, *, stage: int = 1, trainer: str = "trainer", has: str = "", peers: str = "abc") -> Forward:
    """`has`: who has its input (a, b, c) or its gradient (A, B, C)."""
    ways = tuple(Way(PeerAddress(name), name in has, name.upper() in has) for name in peers)
    return Forward(PLAN.run, PLAN.work(0, 2).id, 0, 2, turn, stage, trainer, ways)


def cell(stage: int = 1) -> Cell:
    return Cell("abc"[stage], PLAN.work(0, 2), stage, 3, 0)


# ---- the way of one microbatch, by stage


def test_a_stage_between() -> None:
    one = cell()
    assert one.walk(forward(), "a", WIRES, False) == [Do.COMPUTE_FORWARD]
    assert one.computed_forward(NEW, False) == [Do.SEND_ON, Do.SAY_FORWARD]
    assert one.gradient(1, "c", NEW, False) == [Do.COMPUTE_BACKWARD]
    assert one.computed_backward(NEW, True) == [Do.SEND_BACK, Do.SAY_BACKWARD]


def test_the_first_stage_sends_nothing_back() -> None:
    one = cell(0)
    assert one.walk(forward(stage=0), "trainer", WIRES, False) == [Do.COMPUTE_FORWARD]
    assert one.computed_forward(NEW, False) == [Do.SEND_ON, Do.SAY_FORWARD]
    assert one.gradient(1, "b", NEW, False) == [Do.COMPUTE_BACKWARD]
    assert one.computed_backward((), True) == [Do.SAY_BACKWARD]


def test_the_last_stage_turns_round() -> None:
    one = cell(2)
    assert one.walk(forward(stage=2), "b", WIRES, False) == [Do.COMPUTE_BACKWARD]
    assert one.gradient(1, "c", NEW, False) == []
    assert one.computed_backward(NEW, True) == [Do.SEND_BACK, Do.SAY_BACKWARD]


def test_who_is_done_answers_at_once_and_sends_the_walk_on() -> None:
    one = cell()
    one.walk(forward(), "a", WIRES, False)
    one.computed_forward(NEW, False)
    one.gradient(1, "c", NEW, False)
    one.computed_backward(NEW, True)
    everything = [Do.SEND_ON, Do.SAY_FORWARD, Do.SEND_BACK, Do.SAY_BACKWARD]
    assert one.walk(forward(2, has="abcABC"), "a", (), True) == everything
    assert one.walk(forward(2, has="abcABC"), "a", (), True) == [], "within a walk, once"
    assert one.gradient(2, "c", (), True) == []
    assert one.walk(forward(1), "a", WIRES, True) == [], "overtaken"
    assert one.walk(forward(1, trainer="another"), "a", WIRES, True) == everything


def test_what_is_counted_nowhere_any_more_is_computed_again() -> None:
    one = cell()
    one.walk(forward(), "a", WIRES, False)
    one.computed_forward(NEW, False)
    one.gradient(1, "c", NEW, False)
    assert one.computed_backward(NEW, False) == [Do.COMPUTE_BACKWARD], "who had counted it went meanwhile"
    assert one.computed_backward(NEW, True) == [Do.SEND_BACK, Do.SAY_BACKWARD]
    assert one.walk(forward(2, has="abcB"), "a", (), False) == [Do.SEND_ON, Do.SAY_FORWARD, Do.COMPUTE_BACKWARD]


def test_a_walk_that_comes_while_it_is_computed_gets_the_result() -> None:
    one = cell()
    one.walk(forward(1), "a", WIRES, False)
    assert one.walk(forward(2, peers="xbz"), "x", WIRES, False) == [], "it is being computed"
    assert one.computed_forward(NEW, False) == [Do.SEND_ON, Do.SAY_FORWARD]
    assert one.gradient(1, "c", NEW, False) == [], "of the walk before"
    assert one.gradient(2, "c", NEW, False) == [], "of a peer of the walk before"
    assert one.gradient(2, "z", NEW, False) == [Do.COMPUTE_BACKWARD]


def test_what_is_lacking_is_said() -> None:
    one = cell()
    assert one.walk(forward(1, has="b"), "a", (), False) == [Fail("b", "lacks the input")]
    assert one.walk(forward(2, has="B"), "a", WIRES, False) == [Fail("b", "lacks the gradient")]
    assert one.walk(forward(3), "a", WIRES, False) == [Do.COMPUTE_FORWARD]
    one.computed_forward(NEW, False)
    assert one.gradient(3, "c", (), False) == [Fail("c", "passed back without a gradient")]


def test_who_sent_what_is_none_is_blamed_while_it_is_on_the_way() -> None:
    one = cell()
    one.walk(forward(), "a", WIRES, False)
    one.failed(Do.COMPUTE_FORWARD)
    assert one.refuse_input("NaN") == Fail("a", "NaN")
    assert one.walk(forward(2), "a", WIRES, False) == [Do.COMPUTE_FORWARD], "the next walk brings it again"
    one.walk(forward(3, peers="xbc"), "x", WIRES, False)
    assert one.refuse_input("NaN") == Fail("b", "NaN"), "the trainer knows nobody else on this walk"
    one.walk(forward(4), "a", WIRES, False)
    one.computed_forward(NEW, False)
    one.gradient(4, "c", NEW, False)
    assert one.refuse_gradient("NaN") == Fail("c", "NaN")


# ---- any order


@dataclass
class Book:
    """What a cell asked for, and what must hold of it."""

    cell: Cell
    computing: Counter[Do] = field(default_factory=Counter)
    done: Counter[tuple[str, int, Do]] = field(default_factory=Counter)

    def note(self, acts: list[Do | Fail]) -> None:
        one = self.cell
        for act in acts:
            if isinstance(act, Fail):
                assert act.peer in {one.me, *(way.peer.peer for way in one.ways)}
                continue
            if act in (Do.COMPUTE_FORWARD, Do.COMPUTE_BACKWARD):
                self.computing[act] += 1
                assert self.computing[act] == 1, "twice at once"
                assert one.inputs is not None
                assert act is Do.COMPUTE_BACKWARD or one.output is None, "it is there"
                assert act is Do.COMPUTE_FORWARD or one.is_last or one.output_grad is not None
                continue
            key = (one.trainer, one.turn, act)
            self.done[key] += 1
            assert self.done[key] == 1, f"twice in one walk: {key}"
            assert act not in (Do.SEND_ON, Do.SAY_FORWARD) or one.output is not None
            assert act not in (Do.SEND_BACK, Do.SAY_BACKWARD) or one.backed


peers = st.sampled_from(["abc", "xbc", "abz", "xbz"])
steps = st.one_of(
    st.tuples(st.just("walk"), st.integers(1, 4), peers, st.sampled_from(["", "b", "abc", "B", "abcABC", "C"])),
    st.tuples(st.just("gradient"), st.integers(1, 4), st.sampled_from("acxz"), st.booleans()),
    st.tuples(st.just("computed"), st.sampled_from([Do.COMPUTE_FORWARD, Do.COMPUTE_BACKWARD]), st.booleans()),
    st.tuples(st.just("broke"), st.sampled_from([Do.COMPUTE_FORWARD, Do.COMPUTE_BACKWARD]), st.booleans()),
    st.tuples(st.just("counted"), st.booleans()),
)


@settings(max_examples=300)
@given(st.integers(0, 2), st.lists(steps, max_size=25))
def test_any_order_of_everything(stage: int, script: list[tuple]) -> None:
    one, counted = cell(stage), False
    one.me = "b"
    book = Book(one)
    shift = {0: "b{0}{2}", 1: "{0}b{2}", 2: "{0}{2}b"}[stage]
    turns: dict[str, int] = {}
    for kind, *what in script:
        if kind == "walk":
            turn, names, has = what
            message = forward(turn, stage=stage, has=has, peers=shift.format(*names))
            wires = () if message.ways[stage].has_input else WIRES
            known = turns.get("trainer", 0)
            book.note(one.walk(message, "anyone", wires, counted))
            turns["trainer"] = max(known, turn)
            assert one.turn == turns["trainer"]
        elif kind == "gradient" and one.turn:
            turn, sender, full = what
            book.note(one.gradient(turn, sender, NEW if full else (), counted))
        elif kind == "computed" and book.computing[what[0]] and one.inputs is not None:
            book.computing[what[0]] = 0
            if what[0] is Do.COMPUTE_FORWARD:
                book.note(one.computed_forward(NEW, counted))
            else:
                counted = counted or what[1]
                book.note(one.computed_backward(NEW, counted))
        elif kind == "broke" and book.computing[what[0]]:
            book.computing[what[0]] = 0
            one.failed(what[0])
            if what[1] and what[0] is Do.COMPUTE_FORWARD:
                book.note([one.refuse_input("NaN")])
        elif kind == "counted":
            counted = what[0]
    # Whatever has happened: one more honest walk gets through.
    book.computing.clear()
    one.failed(Do.COMPUTE_FORWARD)
    one.failed(Do.COMPUTE_BACKWARD)
    acts = one.walk(forward(9, stage=stage, peers=shift.format(*"abc")), "anyone", WIRES, counted)
    book.note(acts)
    if not one.is_last:
        if one.output is None:
            book.computing[Do.COMPUTE_FORWARD] = 0
            book.note(one.computed_forward(NEW, counted))
        book.note(one.gradient(9, one.ways[stage + 1].peer.peer, NEW, counted))
    if not book.done["trainer", 9, Do.SAY_BACKWARD]:
        assert book.computing[Do.COMPUTE_BACKWARD]
        book.note(one.computed_backward(NEW, True))
    assert book.done["trainer", 9, Do.SAY_BACKWARD] == 1
    assert book.done["trainer", 9, Do.SAY_FORWARD] == (not one.is_last)
    assert book.done["trainer", 9, Do.SEND_BACK] == (stage > 0)


# ---- all cells of a peer


def test_so_many_cells_and_no_more() -> None:
    cells = Cells("b", PLAN, 1, 2, 0)
    first, second = cells.open(0), cells.open(3)
    assert first is not None
    assert second is not None
    assert cells.open(1) is None
    assert cells.get(PLAN.work(0, 3).id) is second
    assert cells.of_number(3) is second
    assert cells.of_number(1) is None
    first.inputs = WIRES
    assert cells.advance(1) == (first.work.id, second.work.id)
    assert first.dropped
    assert first.inputs is None, "who still has it in a queue keeps no tensors"
    assert len(cells) == 0
    third = cells.open(0)
    assert third is not None
    assert third.work == PLAN.work(1, 0)


def test_a_trainer_that_comes_back_counts_from_the_start() -> None:
    """And hears nothing of the walks that it left: it might not know their turns."""
    cells = Cells("b", PLAN, 1, 9, 0)
    left, other = cells.open(2), cells.open(3)
    assert left and other  # noqa: PT018
    left.walk(forward(7, trainer="t"), "a", WIRES, False)
    other.walk(forward(7, trainer="u"), "a", WIRES, False)
    cells.begin_anew("t")
    assert left.computed_forward(NEW, False) == []
    assert other.computed_forward(NEW, False) == [Do.SEND_ON, Do.SAY_FORWARD]
    assert left.gradient(7, "c", NEW, False) == [Do.COMPUTE_BACKWARD]
    assert left.computed_backward(NEW, True) == []
    everything = [Do.SEND_ON, Do.SAY_FORWARD, Do.SEND_BACK, Do.SAY_BACKWARD]
    assert left.walk(forward(1, trainer="t"), "a", WIRES, True) == everything
    assert left.walk(forward(1, trainer="t"), "a", WIRES, True) == []
    assert other.walk(forward(1, trainer="u"), "a", WIRES, True) == [], "still overtaken"


def test_backward_comes_before_forward_and_older_before_newer() -> None:
    cells, agenda = Cells("b", PLAN, 1, 9, 0), Agenda()
    one, two, three = (cells.open(number) for number in range(3))
    assert one and two and three  # noqa: PT018
    for each in (three, two, one):
        agenda.push(each, Do.COMPUTE_FORWARD, 1.0)
    agenda.push(three, Do.COMPUTE_BACKWARD, 2.0)
    agenda.push(two, Do.COMPUTE_BACKWARD, 3.0)
    assert agenda.waiting() == (3, 2)
    popped = [agenda.pop() for _ in range(6)]
    assert popped == [
        (two, Do.COMPUTE_BACKWARD, 3.0),
        (three, Do.COMPUTE_BACKWARD, 2.0),
        (one, Do.COMPUTE_FORWARD, 1.0),
        (two, Do.COMPUTE_FORWARD, 1.0),
        (three, Do.COMPUTE_FORWARD, 1.0),
        None,
    ]
    agenda.push(one, Do.COMPUTE_FORWARD, 4.0)
    agenda.clear()
    assert agenda.pop() is None
    assert agenda.waiting() == (0, 0)


# ---- who may say what


def hosted(stage: int) -> Admission:
    return Admission("abc"[stage], PLAN, stage, 11, 96, 96)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({}, ""),
        ({"run": bytes(32)}, "another run"),
        ({"number": 6}, "another run"),
        ({"version": 4}, "another run"),
        ({"version": 1}, "wrong id"),
        ({"number": 3}, "wrong id"),
        ({"stage": 0}, "does not come here"),
        ({"stage": 3}, "does not come here"),
        ({"ways": forward(peers="ab").ways}, "2 peers for 3 stages"),
        ({"ways": forward(peers="aba").ways}, "2 peers for 3 stages"),
        ({"ways": forward(peers="abcd").ways}, "4 peers for 3 stages"),
        ({"ways": forward(peers="xbc").ways}, "not the sender's"),
    ],
)
def test_a_microbatch_is_what_it_says(changes: dict[str, object], reason: str) -> None:
    message = msgspec.structs.replace(forward(), **changes)
    if not reason:
        hosted(1).check_forward(message, "a", drives=False)
        return
    with pytest.raises(RemoteProtocolError, match=reason):
        hosted(1).check_forward(message, "a", drives=False)


def test_the_first_stage_hears_trainers_and_the_others_neighbours() -> None:
    first = forward(stage=0)
    hosted(0).check_forward(first, "trainer", drives=True)
    for sender, drives in (("trainer", False), ("b", True), ("b", False)):
        with pytest.raises(RemoteProtocolError, match="not the sender's"):
            hosted(0).check_forward(first, sender, drives=drives)
    with pytest.raises(RemoteProtocolError, match="not the sender's"):
        hosted(1).check_forward(forward(), "a", drives=True)
