"""How routes, summaries and statuses read, and what a conversation keeps."""

from __future__ import annotations

import os
from types import SimpleNamespace

import pytest
import trio

from mycel.cli import chat as chat_module
from mycel.cli.answers import columns, show_route, summary
from mycel.cli.chat import Conversation, Lines, Manner
from mycel.cli.demo import choose_victim
from mycel.cli.exits import CommandFailedError
from mycel.cli.status import Status, status_json, status_lines
from mycel.protocols.errors import RouteUnavailable
from mycel.protocols.messages import HopTiming, PeerAddress
from mycel.swarm.estimate import estimate
from mycel.swarm.generation import NewToken, RouteChosen
from mycel.swarm.routing import Hop
from mycel.swarm.trace import RouteTrace
from mycel.swarm.view import View
from tests.swarm.swarms import peer, view_of


def hops(*spans: tuple[str, int, int]) -> tuple[Hop, ...]:
    return tuple(Hop(PeerAddress(name, ()), start, end) for name, start, end in spans)


def a_trace() -> RouteTrace:
    """Two hops; the second is replaced after the third token."""
    trace = RouteTrace(began_s=10.0)
    trace.apply(RouteChosen(hops(("a", 0, 2), ("b", 2, 4)), "cheapest"))
    timings = (HopTiming(100, 2000), HopTiming(300, 4000))
    for i in range(3):
        trace.apply(NewToken(5 + i, 7, "", timings, 10.5 + 0.01 * i))
    trace.apply(RouteChosen(hops(("a", 0, 2), ("c", 2, 4)), "mended", lost=(("b", "the connection was lost"),)))
    for i in range(3):
        trace.apply(NewToken(8 + i, 7, "", timings, 11.5 + 0.01 * i))
    return trace


def test_the_last_line() -> None:
    trace = a_trace()
    assert summary(trace) == "6 tokens, 4.9 tokens/s, first token after 0.5 s, 1 hop replaced"
    assert summary(RouteTrace(0.0)) == "0 tokens, 0 hops replaced"


def test_the_route_shows_where_the_time_went_and_who_was_replaced(capsys: pytest.CaptureFixture[str]) -> None:
    show_route(a_trace())
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.splitlines() == [
        "hop  peer  blocks  compute ms  queue ms  network ms",
        "1    a     0:2     2.00        0.10      1.80",
        "2    c     2:4     4.00        0.30      1.80",
        "replaced b at position 8: the connection was lost",
    ]


def test_columns_are_as_wide_as_their_widest_cell() -> None:
    assert columns([("a", "bb", "c"), ("aaa", "b", "")]) == ["a    bb  c", "aaa  b"]


def a_status(view: View) -> Status:
    return Status("toy", "ab" * 32, view, estimate(view), {"a": 0.0021})


def test_status_for_people() -> None:
    lines = status_lines(a_status(view_of(4, peer("b", 2, 4), peer("a", 0, 2), peer("c", 2, 3, state="leaving"))))
    assert lines[0] == "toy: 4 blocks, 3 nodes, swarm abababab"
    assert lines[2].split() == ["a", "0:2", "##..", "serving", "1.00", "0", "1000", "2.1", "ms"]
    assert lines[3].split() == ["c", "2:3", "..#.", "leaving", "1.00", "0", "1000", "-"]
    assert "coverage      1111" in lines
    assert "weakest block 0 (1 node)" in lines
    assert any(line.startswith("expected") and "tokens/s for one answer" in line for line in lines)


def test_status_of_a_swarm_with_a_gap() -> None:
    found = a_status(view_of(4, peer("a", 0, 2)))
    assert "coverage      11.." in status_lines(found)
    assert "weakest block 2 (0 nodes)" in status_lines(found)
    value = status_json(found)
    assert value["coverage"] == [1, 1, 0, 0]
    assert value["missing"] == [[2, 4]]
    assert not value["complete"]
    assert value["stream_tokens_per_s"] == 0.0
    assert value["peers"][0]["blocks"] == [0, 2]
    assert value["peers"][0]["rtt_ms"] == 2.1


def test_status_of_an_empty_swarm() -> None:
    lines = status_lines(a_status(view_of(3)))
    assert lines[0] == "toy: 3 blocks, 0 nodes, swarm abababab"
    assert "coverage      ..." in lines


def test_the_victim_of_the_demo_is_one_that_can_be_spared() -> None:
    view = view_of(4, peer("a", 0, 2), peer("b", 2, 4), peer("c", 2, 4))
    assert choose_victim(hops(("a", 0, 2), ("c", 2, 4)), view) == "c"
    with pytest.raises(CommandFailedError, match="none can be spared"):
        choose_victim(hops(("a", 0, 2), ("c", 2, 4)), view.without(["b"]))


def read_lines(data: bytes, *, limit: int = 10) -> list[str | None]:
    """What Lines makes of a pipe that holds `data` and ends."""
    reading, writing = os.pipe()
    os.write(writing, data)
    os.close(writing)

    async def main() -> list[str | None]:
        lines, found = Lines(reading), []
        while not found or (found[-1] is not None and len(found) < limit):
            await lines.read()
            found.append(lines.last)
        return found

    try:
        return trio.run(main)
    finally:
        os.close(reading)


@pytest.mark.parametrize(
    ("data", "lines"),
    [
        (b"", [None]),
        (b"one\n", ["one", None]),
        (b"one\ntwo", ["one", "two", None]),
        (b"\n\nx\n", ["", "", "x", None]),
        (b"\xff\n", ["\ufffd", None]),
    ],
)
def test_lines_of_standard_input(data: bytes, lines: list[str | None]) -> None:
    assert read_lines(data) == lines


def test_a_line_without_end_is_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat_module, "_MAX_LINE_BYTES", 8)
    monkeypatch.setattr(chat_module, "_READ_BYTES", 8)
    assert read_lines(b"a" * 20) == ["a" * 8, "a" * 8, "a" * 4, None]


class CountingCodec:
    """One token for each letter of each message; no template."""

    template = None

    def encode_chat(self, messages: list[dict[str, str]]) -> list[int]:
        return [ord(letter) for message in messages for letter in message["content"]]


class RefusingModel:
    """A model of a swarm that cannot answer."""

    codec = CountingCodec()
    manifest = SimpleNamespace(max_positions=20)

    def generate(self, *_: object, **__: object) -> None:
        raise RouteUnavailable(((0, 1),))


def a_conversation(*, system: str | None = None) -> Conversation:
    manner = Manner(system=system, max_tokens=5, timeout=1.0, show_route=False, sampling={})
    return Conversation(RefusingModel(), manner, {})  # type: ignore[arg-type]


def test_a_question_that_was_not_answered_is_forgotten() -> None:
    conversation = a_conversation()
    with pytest.raises(RouteUnavailable):
        trio.run(conversation.answer, "hello")
    assert conversation.messages == []


def test_the_oldest_part_of_a_conversation_gives_way_but_not_the_system_prompt() -> None:
    conversation = a_conversation(system="sys")
    turns = [("user", "one"), ("assistant", "two"), ("user", "three"), ("assistant", "four"), ("user", "five")]
    conversation.messages += [{"role": role, "content": content} for role, content in turns]
    # 20 positions less 5 for the answer: "sys" and the last three turns are 16 letters, one too many.
    assert bytes(conversation._prompt()).decode() == "sysfive"
    assert [message["content"] for message in conversation.messages] == ["five"]
