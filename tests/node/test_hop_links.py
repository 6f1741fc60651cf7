"""A session's links: who is asked what it lacks, what breaks and mends by itself, and a successor that is filled."""

from __future__ import annotations

import msgspec
import pytest
import torch
import trio

from mycel.node.hop_links import REATTACH_PATIENCE_S, STEADY_S, UNANSWERED_BYTES, Logged, Outbound
from mycel.node.hop_service import ATTACH_PATIENCE_S, MAX_EARLY_LINKS
from mycel.protocols import ids
from mycel.protocols.codec import ring_codec, session_codec
from mycel.protocols.errors import PeerUnreachable
from mycel.protocols.hop import OutputLog
from mycel.protocols.messages import (
    AskProgress,
    Attach,
    Attached,
    HandOver,
    HopFailed,
    HopOpened,
    HopRefused,
    Leaving,
    Message,
    NextToken,
    OpenHop,
    Progress,
    Sampled,
    Step,
)
from mycel.protocols.ports import Stream
from tests.node.hop_rig import GENERATION, N_BLOCKS, PROMPT, SESSION, Rig, ended, heard, outputs, push, run
from tests.sim.faults import LinkFaults
from tests.sim.toy import ToySpan


async def answer(link: Stream) -> Message:
    """What the hop says on a link to it."""
    with trio.fail_after(60):
        frame = await link.receive()
    assert frame is not None
    return ring_codec.decode_only(frame)


async def silent(stream: Stream, for_s: float = 60.0) -> bool:
    with trio.move_on_after(for_s):
        await stream.receive()
        return False
    return True


async def feed(link: Stream, *positions: int) -> None:
    """Inputs of one token each, and time for what comes of them."""
    for position in positions:
        await push(link, position, 1)
    await trio.sleep(1)


def attached(rig: Rig, name: str) -> list[int]:
    return [message.link for who, message in rig.received if who == name and isinstance(message, Attach)]


# ---- who lacks what


def test_a_hop_says_what_it_lacks() -> None:
    async def scenario(rig: Rig) -> None:
        await rig.opened()
        first = await rig.attach()
        assert await answer(first) == Attached(0)
        await feed(first, 0, 1, 2)
        second = await rig.attach()
        assert await answer(second) == Attached(3)

    run(scenario)


def test_a_first_hop_says_it_after_its_prompt() -> None:
    async def scenario(rig: Rig) -> None:
        await rig.opened(rig.opening(0, 6, prompt=PROMPT))
        began = trio.current_time()
        assert await answer(await rig.attach()) == Attached(len(PROMPT))
        assert trio.current_time() - began > 6.0

    run(scenario, span=ToySpan(0, 6, N_BLOCKS, block_time_s=0.5))


def test_nothing_is_said_to_a_link_that_is_not_expected() -> None:
    async def scenario(rig: Rig) -> None:
        await rig.opened()
        assert await silent(await rig.attach(link=2))
        assert await silent(await rig.attach("stranger"), for_s=20.0)

    run(scenario)


def test_a_new_session_waits_for_no_answer() -> None:
    async def scenario(rig: Rig) -> None:
        del rig.lacking["after"]
        await rig.opened()
        link = await rig.attach()
        for n in range(1, 4):
            await feed(link, n - 1)
            assert rig.positions() == list(range(n))

    run(scenario)


def test_the_first_output_of_a_session_is_as_early_as_its_link_may_be() -> None:
    """Two round trips to connect and one to open the stream: the output is sent right behind Attach."""

    async def scenario(rig: Rig) -> None:
        rig.world.link("hop", "after", LinkFaults(latency_s=1.0))
        await rig.opened()
        began = trio.current_time()
        await push(await rig.attach(), 0, 1)
        await trio.sleep_until(began + 4 + 2 + 1 - 0.1)
        assert rig.positions() == []
        await trio.sleep(0.2)
        assert rig.positions() == [0]

    run(scenario)


def test_who_stays_silent_is_given_no_more_than_a_bounded_amount() -> None:
    async def scenario(rig: Rig) -> None:
        del rig.lacking["after"]
        await rig.opened()
        link = await rig.attach()
        await feed(link, *range(10))
        given = rig.positions()
        assert given[0] == 0
        assert len(given) < 10
        await rig.links["after"][0].send(*ring_codec.encode(Attached(7)))
        await trio.sleep(1)
        assert rig.positions() == [*given, 7, 8, 9]

    with pytest.MonkeyPatch.context() as patch:
        assert UNANSWERED_BYTES > 100_000
        patch.setattr("mycel.node.hop_links.UNANSWERED_BYTES", 200)
        run(scenario)


@pytest.mark.parametrize(
    ("lacking", "expected"), [(0, [0, 3, 6]), (3, [3, 6]), (4, [3, 6]), (8, [6]), (9, []), (11, [])]
)
def test_a_next_hop_gets_what_it_lacks(lacking: int, expected: list[int]) -> None:
    """An output of which it has a part is given whole."""

    async def scenario(rig: Rig) -> None:
        control = await rig.opened()
        link = await rig.attach()
        for position in (0, 3, 6):
            await push(link, position, 3)
        await trio.sleep(1)
        rig.lacking["stranger"] = lacking
        await rig.relink(control, "before", "stranger", 1, 2)
        await trio.sleep(1)
        assert rig.positions("stranger") == expected
        await feed(link, *range(9, 13))
        assert rig.positions("stranger") == [*expected, *range(max(lacking, 9), 13)]

    run(scenario)


def test_a_next_hop_that_does_not_say_what_it_lacks_gets_nothing_of_a_history_and_holds_nobody_up() -> None:
    async def scenario(rig: Rig) -> None:
        control = await rig.opened()
        link = await rig.attach()
        await feed(link, 0, 1)
        del rig.lacking["stranger"]
        await rig.relink(control, "before", "stranger", 1, 2)
        await feed(link, 2, 3, 4)
        assert attached(rig, "stranger") == [2]
        assert rig.positions("stranger") == []
        await control.send(*session_codec.encode(AskProgress()))
        assert await heard(control) == Progress(5, 0)

    run(scenario)


@pytest.mark.parametrize("message", [Step(0, ()), Attached(0), NextToken(0, 0)], ids=lambda m: type(m).__name__)
def test_who_talks_against_the_direction_of_the_ring_is_named(message: Message) -> None:
    async def scenario(rig: Rig) -> None:
        control = await rig.opened()
        await feed(await rig.attach(), 0)
        await rig.links["after"][0].send(*ring_codec.encode(message))
        told = await heard(control)
        assert isinstance(told, HopFailed)
        assert (told.peer, "against the direction" in told.reason) == (rig.address("after").peer, True)
        assert attached(rig, "after") == [1], "it is not tried again"

    run(scenario)


# ---- links that break


@pytest.mark.parametrize("busy", [True, False])
def test_a_link_that_breaks_between_healthy_hops_is_attached_anew_at_once(busy: bool) -> None:
    """Of what was on its way, the second stream gives what the next hop says that it lacks."""

    async def scenario(rig: Rig) -> None:
        control = await rig.opened()
        link = await rig.attach()
        await feed(link, 0, 1, 2)
        rig.lacking["after"] = 2  # it has taken two of the three
        if busy:
            await push(link, 3, 1)
        await rig.cut("after")
        await trio.sleep(1)
        assert attached(rig, "after") == [1, 1]
        await feed(link, *range(3 + busy, 6))
        assert rig.positions()[:3] == [0, 1, 2]
        assert rig.positions()[-4:] == [2, 3, 4, 5]
        assert await silent(control), "nobody failed"

    run(scenario)


def test_an_output_that_was_taken_by_a_stream_that_broke_is_given_again() -> None:
    """The transport took it, and then the stream broke before it had left."""

    class Fragile:
        peer = "after"

        def __init__(self, breaks: bool) -> None:
            self.sent: list[Message] = []
            self._breaks, self._answers = trio.Event(), [Attached(0)]
            self._fragile = breaks

        async def send(self, *parts: bytes | memoryview) -> None:
            self.sent.append(ring_codec.decode(b"".join(parts))[0])
            await trio.sleep(1)
            if self._fragile and len(self.sent) == 2:
                self._breaks.set()
                await trio.sleep(1)  # whoever listens hears of it first

        async def receive(self) -> memoryview:
            if self._answers:
                return memoryview(bytearray().join(ring_codec.encode(self._answers.pop())))
            await self._breaks.wait()
            raise PeerUnreachable("after", "broke")

        async def reset(self) -> None:
            self._breaks.set()

        aclose = reset

    class Streams:
        streams = (Fragile(breaks=True), Fragile(breaks=False))

        def __init__(self) -> None:
            self._left = list(self.streams)

        def learn(self, *_: object) -> None: ...

        async def open(self, *_: object) -> Fragile:
            return self._left.pop(0)

    async def scenario(rig: Rig) -> None:
        log, transport = OutputLog[Logged](), Streams()

        async def tell(*_: object) -> None:
            raise AssertionError("nobody failed")

        async with trio.open_nursery() as nursery:
            links = Outbound(transport, nursery, SESSION, log, tell)  # type: ignore[arg-type]
            await links.relink(rig.address("after"), 1, None, 0)
            log.append(0, 1, Logged(7, ()))
            await links.push()
            await trio.sleep(10)
            await links.aclose()
        assert [stream.sent for stream in transport.streams] == [[Attach(SESSION, 1), NextToken(0, 7)]] * 2

    run(scenario)


def test_a_link_that_breaks_again_is_given_up_and_one_that_held_is_attached_anew() -> None:
    async def scenario(rig: Rig) -> None:
        control = await rig.opened()
        await feed(await rig.attach(), 0, 1)
        for _ in range(3):
            await trio.sleep(STEADY_S)
            await rig.cut("after")
            await trio.sleep(1)
        assert attached(rig, "after") == [1] * 4
        await rig.cut("after")
        told = await heard(control)
        assert isinstance(told, HopFailed)
        assert told.peer == rig.address("after").peer
        await trio.sleep(STEADY_S)
        assert attached(rig, "after") == [1] * 4

    run(scenario)


def test_a_peer_that_takes_no_second_stream_is_named_soon() -> None:
    async def scenario(rig: Rig) -> None:
        control = await rig.opened()
        await feed(await rig.attach(), 0, 1)
        rig.world.stop("after")  # its heartbeat is missed after a while; attaching anew then takes long, too
        began = trio.current_time()
        told = await heard(control)
        assert isinstance(told, HopFailed)
        assert told.peer == rig.address("after").peer
        silence_s = rig.world.options.silence_s
        assert trio.current_time() - began == pytest.approx(silence_s + REATTACH_PATIENCE_S, abs=0.5)

    run(scenario)


def test_a_link_that_its_receiver_ends_is_told_once_there_is_something_to_give() -> None:
    """As a rule the session is over there, and will be here: at the end of every session nobody shall be accused."""

    async def scenario(rig: Rig) -> None:
        control = await rig.opened()
        link = await rig.attach()
        await feed(link, 0)
        await rig.end_link("after")
        assert await silent(control)
        await push(link, 1, 1)
        assert await heard(control) == HopFailed(rig.address("after").peer, "ended the link")

    run(scenario)


# ---- a successor is filled


def test_a_successor_is_filled_while_the_one_before_goes_on_and_takes_over_as_it_is() -> None:
    async def scenario(rig: Rig) -> None:
        control = await rig.opened()
        link = await rig.attach()
        await feed(link, 0, 1, 2)
        rig.lacking["stranger"] = 1
        await rig.relink(control, "before", "after", 1, 1, "stranger", 2)
        await feed(link, 3, 4)
        assert rig.positions("after") == [0, 1, 2, 3, 4]
        assert rig.positions("stranger") == [1, 2, 3, 4]
        await control.send(*session_codec.encode(AskProgress()))
        assert await heard(control) == Progress(5, 5)
        await rig.relink(control, "before", "stranger", 1, 2)
        await feed(link, 5, 6)
        assert rig.positions("after") == [0, 1, 2, 3, 4]
        assert rig.positions("stranger") == [1, 2, 3, 4, 5, 6]
        assert attached(rig, "stranger") == [2], "the link stands as it was"
        assert rig.service.sessions[SESSION].links.main._inline, "and is given outputs without a task switch"
        assert len(rig.failures) == 1, "and the one before sees its own end"
        assert await silent(control)

    run(scenario)


def test_a_successor_that_takes_over_while_it_is_filled_misses_nothing() -> None:
    async def scenario(rig: Rig) -> None:
        rig.world.link("hop", "stranger", LinkFaults(latency_s=0.5, bandwidth_bytes_per_s=400))
        control = await rig.opened()
        link = await rig.attach()
        await feed(link, *range(20))
        await rig.relink(control, "before", "after", 1, 1, "stranger", 2)
        await trio.sleep(8)
        got = len(rig.positions("stranger"))
        assert 0 < got < 20
        await rig.relink(control, "before", "stranger", 1, 2)
        for position in range(20, 25):
            await push(link, position, 1)
        await trio.sleep(60)
        assert rig.positions("stranger") == list(range(25))
        assert rig.positions("after") == list(range(20))

    run(scenario, window_bytes=500)


@pytest.mark.parametrize("how", ["dead", "dies", "talks"])
def test_a_successor_that_fails_is_named_and_the_text_goes_on(how: str) -> None:
    async def scenario(rig: Rig) -> None:
        control = await rig.opened()
        link = await rig.attach()
        await feed(link, 0)
        if how == "dead":
            rig.world.crash("stranger")
        await rig.relink(control, "before", "after", 1, 1, "stranger", 2)
        await feed(link, 1)
        if how == "dies":
            rig.world.crash("stranger")
        if how == "talks":
            await rig.links["stranger"][0].send(b"nonsense")
        told = await heard(control)
        assert isinstance(told, HopFailed)
        assert told.peer == rig.address("stranger").peer
        await feed(link, 2, 3)
        assert rig.positions("after") == [0, 1, 2, 3]
        assert await silent(control)

    run(scenario)


def test_a_successor_that_takes_nothing_delays_nobody() -> None:
    async def scenario(rig: Rig) -> None:
        async def hold(stream: Stream) -> None:
            await stream.send(*ring_codec.encode(Attached(0)))
            await trio.sleep_forever()

        rig.world.node("stranger").serve(ids.RING, hold)
        control = await rig.opened()
        link = await rig.attach()
        await feed(link, 0)
        await rig.relink(control, "before", "after", 1, 1, "stranger", 2)
        began = trio.current_time()
        await feed(link, *range(1, 30))
        assert rig.positions("after") == list(range(30))
        assert trio.current_time() - began < 2.5

    run(scenario, window_bytes=500)


def test_a_successor_that_is_not_wanted_any_more_is_let_go_of() -> None:
    async def scenario(rig: Rig) -> None:
        control = await rig.opened()
        link = await rig.attach()
        await feed(link, 0, 1)
        await rig.relink(control, "before", "after", 1, 1, "stranger", 2)
        await feed(link, 2)
        await rig.relink(control, "before", "after", 1, 1, "stranger", 2)
        await feed(link, 3)
        assert attached(rig, "stranger") == [2], "said twice, it is the same link"
        await rig.relink(control, "before", "after", 1, 1)
        await feed(link, 4)
        assert rig.positions("stranger") == [0, 1, 2, 3]
        assert len(rig.failures) == 1
        await rig.relink(control, "before", "after", 1, 1, "stranger", 3)
        await feed(link, 5)
        assert rig.positions("stranger")[4:] == [0, 1, 2, 3, 4, 5]
        assert rig.positions("after") == [0, 1, 2, 3, 4, 5]

    run(scenario)


@pytest.mark.parametrize(("spare", "number"), [("hop", 2), ("stranger", 1)])
def test_a_client_that_spares_nonsense_ends_its_session(spare: str, number: int) -> None:
    async def scenario(rig: Rig) -> None:
        control = await rig.opened()
        await rig.relink(control, "before", "after", 1, 1, spare, number)
        assert await ended(control) == ""
        assert not rig.service.sessions

    run(scenario)


def test_a_client_cannot_hand_a_hop_over_to_itself() -> None:
    async def scenario(rig: Rig) -> None:
        control = await rig.opened()
        await control.send(*session_codec.encode(HandOver(rig.address("hop"))))
        assert await ended(control) == ""

    run(scenario)


def test_links_end_with_their_session() -> None:
    async def scenario(rig: Rig) -> None:
        control = await rig.opened()
        await feed(await rig.attach(), 0, 1)
        await rig.relink(control, "before", "after", 1, 1, "stranger", 2)
        await trio.sleep(1)
        await control.aclose()
        await trio.sleep(1)
        assert not rig.service.sessions
        assert rig.failures == [], "both see an end, not a failure"

    run(scenario)


# ---- links that come before the client's word


def test_a_link_of_a_successor_waits_as_long_as_it_takes() -> None:
    """It is filled in its own time: minutes, over a slow link. Nothing that it sends meanwhile is computed."""

    async def scenario(rig: Rig) -> None:
        control = await rig.opened()
        old = await rig.attach()
        early = await rig.attach("stranger", 2)
        await push(early, 0, 1)
        await feed(old, 0, 1, 2)
        await trio.sleep(20 * ATTACH_PATIENCE_S)
        await rig.relink(control, "stranger", "after", 2, 1)
        assert await answer(early) == Attached(3)
        await feed(early, 3)
        assert rig.positions() == [0, 1, 2, 3]
        assert torch.equal(torch.cat(rig.hidden), outputs(4))

    run(scenario)


def test_of_links_that_come_too_early_one_of_each_peer_is_held_and_few_in_all() -> None:
    async def scenario(rig: Rig) -> None:
        control = await rig.opened()
        first = await rig.attach("stranger", 2)
        await trio.sleep(1)
        second = await rig.attach("stranger", 2)
        assert await ended(first) != ""
        others = []
        for number in range(MAX_EARLY_LINKS):
            name = f"early {number}"
            rig.world.add_node(name).learn(rig.hop.peer_id, rig.hop.addresses)
            others.append(await rig.attach(name, 3))
            await trio.sleep(1)
        assert await ended(second) != "", "the oldest had to go"
        await rig.relink(control, "early 7", "after", 3, 1)
        assert await answer(others[7]) == Attached(0)
        await control.aclose()
        for stream in others:
            await ended(stream)
        assert rig.service._early == {}

    run(scenario)


# ---- how far are you?


async def ask(control: Stream, position: int) -> None:
    await control.send(*session_codec.encode(AskProgress(position)))


def test_progress_is_told_at_once_or_when_a_position_is_reached() -> None:
    async def scenario(rig: Rig) -> None:
        control = await rig.opened()
        link = await rig.attach()
        await ask(control, 0)
        assert await heard(control) == Progress(0, 0)
        await ask(control, 3)
        await feed(link, 0, 1)
        assert await silent(control)
        await ask(control, 0)
        assert await heard(control) == Progress(2, 2), "a question without a position leaves the other waiting"
        await push(link, 2, 2)
        told = await heard(control)
        assert isinstance(told, Progress)
        assert (told.received, told.given) == (4, 2)
        await trio.sleep(1)
        await ask(control, 4)
        assert await heard(control) == Progress(4, 4)

    run(scenario)


def test_of_several_questions_the_newest_is_answered() -> None:
    async def scenario(rig: Rig) -> None:
        control = await rig.opened()
        link = await rig.attach()
        for position in (2, 4, 3):
            await ask(control, position)
        await feed(link, 0, 1)
        assert await silent(control)
        await feed(link, 2, 3)
        told = await heard(control)
        assert isinstance(told, Progress)
        assert told.received == 3
        assert await silent(control)

    run(scenario)


def test_progress_is_told_while_a_step_is_computed_and_for_how_long_it_has_been() -> None:
    async def scenario(rig: Rig) -> None:
        control = await rig.opened()
        await push(await rig.attach(), 0, 1)
        await trio.sleep(10)
        began = trio.current_time()
        await ask(control, 0)
        told = await heard(control)
        assert trio.current_time() - began < 0.1
        assert isinstance(told, Progress)
        assert (told.received, told.given) == (1, 0)
        assert told.busy_us == pytest.approx(10e6, rel=0.01)
        await trio.sleep(100)
        await ask(control, 0)
        assert await heard(control) == Progress(1, 1)

    run(scenario, span=ToySpan(2, 6, N_BLOCKS, block_time_s=10.0))


def test_progress_of_an_only_hop() -> None:
    async def scenario(rig: Rig) -> None:
        generation = msgspec.structs.replace(GENERATION, max_position=6)
        control = await rig.opened(rig.opening(0, 8, prompt=PROMPT, generation=generation))
        assert isinstance(await heard(control), Sampled)
        await ask(control, 0)
        assert await heard(control) == Progress(5, 5)

    run(scenario, span=ToySpan(0, 8, N_BLOCKS))


# ---- leaving


def numbered(rig: Rig, n: int) -> OpenHop:
    return rig.opening(session=bytes(15) + bytes([n]))


def test_a_node_that_leaves_says_so_goes_on_and_waits_for_its_sessions() -> None:
    async def scenario(rig: Rig) -> None:
        control, other = await rig.opened(), await rig.opened(numbered(rig, 1))
        link = await rig.attach()
        await feed(link, 0)
        began = trio.current_time()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(rig.service.leave, 100.0)
            assert await heard(control) == Leaving(100.0)
            assert await heard(other) == Leaving(100.0)
            assert (await rig.open(numbered(rig, 2)))[1] == HopRefused("this node is leaving")
            await feed(link, 1, 2)
            assert rig.positions() == [0, 1, 2]
            await other.aclose()
            await trio.sleep(30)
            await control.aclose()
        assert trio.current_time() - began == pytest.approx(32, abs=1), "gone with the last session"

    run(scenario)


def test_a_node_leaves_in_the_end_whoever_stays() -> None:
    async def scenario(rig: Rig) -> None:
        await rig.opened()
        began = trio.current_time()
        await rig.service.leave(20.0)
        assert trio.current_time() - began == pytest.approx(20.0)
        assert rig.service.sessions
        await rig.service.leave(0.0)

    run(scenario)


@pytest.mark.parametrize("when", ["before it is told that it is open", "after"])
def test_a_session_that_was_admitted_in_the_same_instant_is_told_too(when: str) -> None:
    async def scenario(rig: Rig) -> None:
        def leave(*_: object, **__: object) -> None:
            rig.world.nursery.start_soon(rig.service.leave, 5.0)

        if when == "after":
            rig.service.event = leave
        else:
            reserve = rig.span.session_bytes
            rig.span.session_bytes = lambda *span: (leave(), reserve(*span))[1]  # type: ignore[method-assign]
        stream, opened = await rig.open(rig.opening())
        assert opened == HopOpened()
        told = await heard(stream)
        assert isinstance(told, Leaving)
        assert told.within_s == pytest.approx(5.0, abs=0.1)

    run(scenario)


def test_a_session_that_is_open_is_known_by_its_number() -> None:
    """The early links of one session say nothing about another's."""

    async def scenario(rig: Rig) -> None:
        await rig.opened(numbered(rig, 1))
        link = await rig.attach(link=9)  # of SESSION, which does not exist
        began = trio.current_time()
        assert await ended(link) != ""
        assert trio.current_time() - began == pytest.approx(ATTACH_PATIENCE_S, abs=1)
        assert SESSION not in rig.service._early

    run(scenario)
