"""One hop's machine and its log of outputs, under any order of inputs and relinks."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from mycel.protocols import ids
from mycel.protocols.errors import LocalProtocolError, RemoteProtocolError
from mycel.protocols.hop import HopMachine, LogCursor, OutputLog
from mycel.protocols.messages import Generation, OpenHop, PeerAddress, Relink, SamplingParams

PEERS = [PeerAddress(name) for name in "abcd"]
peers = st.sampled_from(PEERS)
MAX_TOKENS = 30


def opening(start: int = 1, end: int = 2, **changes: object) -> OpenHop:
    fields: dict[str, object] = {"max_tokens": MAX_TOKENS, "previous": PEERS[0], "next": PEERS[1], **changes}
    return OpenHop(bytes(16), bytes(32), start, end, **fields)  # type: ignore[arg-type]


class HopUnderAnyOrder(RuleBasedStateMachine):
    """Inputs that are new, old, overlapping or with a gap, and neighbours that change: what was computed stays one
    row without holes, and whoever is given everything again has the same row.
    """

    def __init__(self) -> None:
        super().__init__()
        self.machine = HopMachine(opening(), 3)
        self.log: OutputLog[tuple[int, ...]] = OutputLog()
        self.cursor = LogCursor(self.log)
        self.computed: list[int] = []
        self.received: list[int] = []  # at the present next hop
        self.next_machine = HopMachine(opening(), 3)

    @rule(position=st.integers(0, MAX_TOKENS + 3), count=st.integers(-1, 12))
    def push(self, position: int, count: int) -> None:
        before = self.machine.position
        legal = count >= 1 and position <= before and position + count <= MAX_TOKENS
        try:
            skip = self.machine.accept(position, count)
        except RemoteProtocolError:
            assert not legal
            assert self.machine.position == before, "a refused input changes nothing"
            return
        assert legal
        new = tuple(range(position + skip, position + count))
        assert skip == count or new[0] == before
        self.computed += new
        if new:
            self.log.append(new[0], len(new), new)

    @precondition(lambda self: self.cursor.pending() is not None)
    @rule(delivered=st.booleans())
    def send(self, delivered: bool) -> None:
        """Whoever is unsure whether an output arrived gives it again."""
        output = self.cursor.pending()
        assert output is not None
        skip = self.next_machine.accept(output.position, output.count)
        self.received += output.value[skip:]
        if delivered:
            self.cursor.given(output)

    @rule()
    def say_what_is_lacking(self) -> None:
        """The next hop says how far it is, at any moment: nothing that it has is given again."""
        self.cursor.skip_to(self.next_machine.position)
        output = self.cursor.pending()
        assert output is None or output.end > self.next_machine.position

    @rule()
    def break_the_link(self) -> None:
        """Between the same two hops: what was on its way may be lost."""
        self.cursor.rewind()

    @rule(previous=peers, following=peers, share=st.floats(0, 1))
    def relink(self, previous: PeerAddress, following: PeerAddress, share: float) -> None:
        """The next hop is a new one, that knows nothing yet or was handed the state of some tokens."""
        links = self.machine.inbound + 1, self.machine.outbound + 1
        assert not self.machine.may_attach(previous.peer, links[0])
        assert self.machine.relink(Relink(previous, following, *links)) == (True, True)
        self.cursor, self.next_machine = LogCursor(self.log), HopMachine(opening(), 3)
        known = int(share * min(self.machine.position, MAX_TOKENS - 1))
        self.next_machine.take_over(known)
        self.received = self.computed[:known]
        assert [p.peer for p in PEERS if self.machine.may_attach(p.peer, links[0])] == [previous.peer]
        assert not any(self.machine.may_attach(p.peer, links[0] - 1) for p in PEERS), "the link before is over"
        assert self.machine.relink(Relink(previous, following, *links)) == (False, False), "the same changes nothing"

    @invariant()
    def one_row_without_holes(self) -> None:
        assert self.computed == list(range(self.machine.position))
        assert self.machine.position <= MAX_TOKENS

    @invariant()
    def the_next_hop_has_the_beginning_of_it(self) -> None:
        assert self.received == self.computed[: len(self.received)]
        if self.cursor.pending() is None:
            assert self.received == self.computed


HopUnderAnyOrder.TestCase.settings = settings(max_examples=60, stateful_step_count=40)
TestHopUnderAnyOrder = HopUnderAnyOrder.TestCase


def test_the_log_takes_no_gap() -> None:
    log: OutputLog[str] = OutputLog()
    log.append(4, 3, "a")  # it may begin anywhere: a last hop begins at the end of the prompt
    for position in (6, 8, 4):
        with pytest.raises(LocalProtocolError, match="gap"):
            log.append(position, 1, "b")
    log.append(7, 1, "b")
    assert [output.value for output in log.outputs] == ["a", "b"]


def test_a_cursor_begins_where_the_peer_says_even_before_the_log_is_there() -> None:
    log: OutputLog[str] = OutputLog()
    cursor = LogCursor(log)
    cursor.skip_to(5)
    for position, value in ((0, "a"), (3, "b")):
        assert cursor.pending() is None
        log.append(position, 3, value)
    assert cursor.pending() == log.outputs[1], "position 5 is in the middle of it: it is given whole"
    assert not cursor.has_history()
    log.append(6, 3, "c")
    assert cursor.has_history()
    cursor.given(log.outputs[1])
    assert (cursor.position, cursor.pending()) == (6, log.outputs[2])
    cursor.rewind()
    assert (cursor.position, cursor.pending()) == (0, log.outputs[0])


GENERATION = Generation(SamplingParams(), (1, 2), 8)


def test_a_last_hop_begins_where_it_knows_the_tokens() -> None:
    last, other = HopMachine(opening(1, 3, generation=GENERATION), 3), HopMachine(opening(), 3)
    assert [last.usable(p) for p in (0, 1, 2, 7)] == [0, 1, 1, 1]
    assert other.usable(7) == 7
    last.take_over(1)
    assert last.position == 1
    for machine, position in ((last, 1), (HopMachine(opening(1, 3, generation=GENERATION), 3), 2), (other, MAX_TOKENS)):
        with pytest.raises(LocalProtocolError, match="state of"):
            machine.take_over(position)


@pytest.mark.parametrize(
    ("wrong", "reason"),
    [
        (opening(2, 2), "blocks"),
        (opening(2, 1), "blocks"),
        (opening(1, 4), "blocks"),
        (opening(0, 1), "prompt"),
        (opening(1, 2, prompt=(1,)), "prompt"),
        (opening(1, 3), "sampling"),
        (opening(1, 2, generation=GENERATION), "sampling"),
        (opening(1, 3, generation=Generation(SamplingParams(), (), 8)), "fit"),
        (opening(1, 3, generation=Generation(SamplingParams(), (1, 2), 2)), "fit"),  # there would be nothing to say
        (opening(1, 3, generation=Generation(SamplingParams(), (1, 2), MAX_TOKENS + 1)), "fit"),
        (opening(0, 1, prompt=(1,) * MAX_TOKENS), "prompt of"),
        (opening(0, 3, prompt=(1, 2, 3), generation=GENERATION), "goes on from"),
    ],
)
def test_an_opening_that_makes_no_sense_is_refused(wrong: OpenHop, reason: str) -> None:
    with pytest.raises(RemoteProtocolError, match=reason):
        HopMachine(wrong, 3)


@pytest.mark.parametrize(
    ("right", "first", "last"),
    [
        (opening(0, 1, prompt=(1,)), True, False),
        (opening(1, 2), False, False),
        (opening(1, 3, generation=GENERATION), False, True),
        (opening(0, 3, prompt=(1, 2), generation=GENERATION), True, True),
    ],
)
def test_a_hop_knows_its_place(right: OpenHop, first: bool, last: bool) -> None:
    machine = HopMachine(right, 3)
    assert (machine.is_first, machine.is_last, machine.is_alone) == (first, last, first and last)


@given(st.integers(0, 20), st.integers(1, 20))
def test_what_is_skipped_is_what_was_there(position: int, count: int) -> None:
    machine = HopMachine(opening(max_tokens=64), 3)
    machine.accept(0, 20)
    assert machine.accept(position, count) == min(count, 20 - position)
    assert machine.position == max(20, position + count)


def test_protocol_ids_are_distinct_and_versioned() -> None:
    values = [value for name, value in vars(ids).items() if name.isupper()]
    assert len(set(values)) == len(values) >= 4
    assert all(value.startswith("/mycel/") and value.rsplit("/", 1)[1].isdecimal() for value in values)
