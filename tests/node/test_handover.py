"""A leaving hop gives a session's state to its successor, or lets it replay; and neither trusts the other."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterator

import msgspec
import pytest
import torch
import trio

from mycel.node.handover import OUTPUTS, PATIENCE_S
from mycel.node.hop_service import OPENING_PATIENCE_S, HopService
from mycel.node.kv_budget import KVBudget
from mycel.protocols import ids
from mycel.protocols.codec import handover_codec, ring_codec, session_codec
from mycel.protocols.errors import PeerRefused
from mycel.protocols.hop import MAX_STEP_TOKENS, OutputLog
from mycel.protocols.messages import (
    AskProgress,
    Attach,
    Attached,
    GiveState,
    HandedOver,
    HandOver,
    HopOpened,
    Message,
    NextToken,
    OpenHop,
    Progress,
    Relink,
    Sampled,
    StatePart,
    StateRefused,
    StateTaken,
)
from mycel.protocols.ports import Stream
from mycel.protocols.tensors import to_wire
from tests.node.hop_rig import (
    GENERATION,
    KV_BYTES,
    N_BLOCKS,
    PROMPT,
    SESSION,
    SWARM,
    Rig,
    ended,
    heard,
    inputs,
    outputs,
    push,
    run,
)
from tests.sim.compute import SimCompute
from tests.sim.faults import LinkFaults
from tests.sim.toy import HIDDEN, ToyPart, ToySpan, reference

N = 40  # tokens that the giver has


@pytest.fixture(autouse=True)
def _toy_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    """A toy's state has some kilobytes: what is small, and what is a window, shrink with it."""
    for name, value in (
        ("mycel.swarm.handover.SMALL_STATE_BYTES", 100),
        ("mycel.swarm.handover.MEASURED_BYTES", 256),
        ("mycel.node.handover.LEAST_WINDOW_BYTES", 600),
        ("mycel.node.handover.MOST_WINDOW_BYTES", 1200),
        ("mycel.node.handover.OUTPUT_BYTES", 256),
    ):
        monkeypatch.setattr(name, value)


def second(rig: Rig, name: str = "stranger") -> HopService:
    """Another hop for the same blocks."""
    transport, span = rig.world.node(name), ToySpan(rig.span.start, rig.span.end, N_BLOCKS)
    compute = SimCompute(rig.world, name)
    service = HopService(transport, SWARM, span, compute, KVBudget(KV_BYTES), rig.service.event)
    service.start()
    return service


async def opened_at(rig: Rig, name: str, opening: OpenHop) -> Stream:
    client = rig.world.node("client")
    client.learn(rig.address(name).peer, rig.address(name).addresses)
    stream = await client.open(rig.address(name).peer, ids.SESSION)
    await stream.send(*session_codec.encode(opening))
    assert await heard(stream) == HopOpened()
    return stream


def successor(rig: Rig, **changes: object) -> OpenHop:
    """The opening of the hop that is to take the rig's place."""
    opening = rig.opening(rig.span.start, rig.span.end, giver=rig.hop.peer_id, inbound=2, outbound=2, max_tokens=100)
    return msgspec.structs.replace(opening, **changes)


async def hand_over(control: Stream, rig: Rig, name: str = "stranger") -> HandedOver:
    await control.send(*session_codec.encode(HandOver(rig.address(name))))
    told = await heard(control)
    assert isinstance(told, HandedOver)
    return told


async def attach_at(rig: Rig, name: str, link: int) -> tuple[Stream, Message]:
    before = rig.world.node("before")
    before.learn(rig.address(name).peer, rig.address(name).addresses)
    stream = await before.open(rig.address(name).peer, ids.RING)
    await stream.send(*ring_codec.encode(Attach(SESSION, link)))
    with trio.fail_after(60):
        frame = await stream.receive()
    assert frame is not None
    return stream, ring_codec.decode_only(frame)


async def begun(rig: Rig) -> tuple[Stream, Stream]:
    """The giver's session after N tokens, prefilled and decoded: its control stream and the link to it."""
    control = await rig.opened(rig.opening(max_tokens=100))
    link = await rig.attach()
    await push(link, 0, 30)
    for position in range(30, N):
        await push(link, position, 1)
    await trio.sleep(2)
    assert rig.service.sessions[SESSION].machine.position == N
    return control, link


# ---- between two hops


def test_the_state_is_given_and_the_successor_goes_on_as_if_it_had_been_there_always() -> None:
    async def scenario(rig: Rig) -> None:
        control, link = await begun(rig)
        taker = second(rig)
        other = await opened_at(rig, "stranger", successor(rig))
        rig.lacking["after"] = N + 3  # by the time that it is asked it has more from the giver
        told = await hand_over(control, rig)
        assert told.position == N
        assert told.reason.startswith("3.2 kB of state pushed in ")  # 5 times 16 bytes a token
        await push(link, N, 3)  # the giver goes on, and the successor gets that from its neighbour
        spare, lacking = await attach_at(rig, "stranger", 2)
        assert lacking == Attached(N)
        await trio.sleep(1)
        rig.received.clear()
        await push(spare, N, 3)
        await push(spare, N + 3, 2)
        await trio.sleep(1)
        assert rig.positions() == [N + 3], "the next hop gets what it lacks and nothing else"
        assert taker.sessions[SESSION].machine.position == N + 5
        await other.send(*session_codec.encode(AskProgress()))
        assert await heard(other) == Progress(N + 5, N + 5)
        # Whoever is lost after the switch is refilled from the successor's log, of which a part was handed over.
        given = [output.value.value for output in taker.sessions[SESSION].log.outputs]
        log_TD = torch.cat(
            [torch.frombuffer(bytearray(wire.data), dtype=torch.float32).view(-1, HIDDEN) for wire in given]
        )
        assert torch.equal(log_TD, outputs(N + 5))
        assert taker.budget.reserved_bytes == rig.service.budget.reserved_bytes == 5 * 16 * 100
        await control.aclose()
        await other.aclose()
        await trio.sleep(1)
        assert taker.budget.reserved_bytes == rig.service.budget.reserved_bytes == 0

    run(scenario)


def test_what_is_computed_while_the_state_travels_comes_over_the_ring() -> None:
    async def scenario(rig: Rig) -> None:
        control, link = await begun(rig)
        second(rig)
        rig.world.link("hop", "stranger", LinkFaults(bandwidth_bytes_per_s=400))
        rig.span.prefill_block_s = 1000.0  # so that nobody thinks of replaying
        await opened_at(rig, "stranger", successor(rig))
        await control.send(*session_codec.encode(HandOver(rig.address("stranger"))))
        await trio.sleep(4)
        for position in range(N, N + 10):
            await push(link, position, 1)
        await trio.sleep(1)
        assert rig.positions()[-10:] == list(range(N, N + 10)), "the text goes on meanwhile"
        assert isinstance(told := await heard(control), HandedOver)
        assert told.position == N
        assert (await attach_at(rig, "stranger", 2))[1] == Attached(N)

    run(scenario)


def test_over_a_slow_link_the_history_is_replayed_and_the_rate_is_remembered() -> None:
    async def scenario(rig: Rig) -> None:
        control, _ = await begun(rig)
        taker = second(rig)
        rig.world.link("hop", "stranger", LinkFaults(bandwidth_bytes_per_s=400))
        other = await opened_at(rig, "stranger", successor(rig))
        told = await hand_over(control, rig)
        assert told.position == 0
        assert told.reason.startswith("replaying: ")
        assert "replaying 640 bytes of history" in told.reason  # 40 tokens of 16 bytes
        spare, lacking = await attach_at(rig, "stranger", 2)
        assert lacking == Attached(0), "nothing of it is used"
        await push(spare, 0, N)
        await trio.sleep(2)
        assert torch.equal(torch.cat(rig.hidden)[-N:], outputs(N))
        await other.aclose()
        await trio.sleep(1)
        frames = sum(1 for entry in rig.world.log if entry[1] == "frame" and ids.HANDOVER in entry[4])
        await opened_at(rig, "stranger", successor(rig))
        began = trio.current_time()
        again = await hand_over(control, rig)
        assert (again.position, again.reason[:11]) == (0, "replaying: ")
        assert trio.current_time() - began < 1.0
        await trio.sleep(1)
        new = sum(1 for entry in rig.world.log if entry[1] == "frame" and ids.HANDOVER in entry[4]) - frames
        assert new == 1, "the taker is told that nothing comes"
        assert taker.sessions[SESSION].machine.position == 0

    run(scenario)


def test_a_hop_that_has_computed_nothing_has_nothing_to_give() -> None:
    async def scenario(rig: Rig) -> None:
        control = await rig.opened()
        second(rig)
        await opened_at(rig, "stranger", successor(rig))
        assert await hand_over(control, rig) == HandedOver(0, "replaying: nothing has been computed here yet")
        assert (await attach_at(rig, "stranger", 2))[1] == Attached(0)

    run(scenario)


def test_a_first_hop_begins_behind_what_it_was_given() -> None:
    """The old chain has gone on since the successor was opened: it was given more than its prompt."""

    async def scenario(rig: Rig) -> None:
        control = await rig.opened(rig.opening(0, 6, prompt=PROMPT, max_tokens=100))
        link = await rig.attach()
        for position in range(5, 9):
            await link.send(*ring_codec.encode(NextToken(position, position)))
        await trio.sleep(1)
        taker = second(rig)
        await opened_at(rig, "stranger", successor(rig, start=0, prompt=(*PROMPT, 5)))
        assert (await hand_over(control, rig)).position == 9
        spare, lacking = await attach_at(rig, "stranger", 2)
        assert lacking == Attached(9)
        for at in (link, spare):
            await at.send(*ring_codec.encode(NextToken(9, 9)))
        await trio.sleep(1)
        mine, theirs = (service.sessions[SESSION].log.outputs[-1] for service in (rig.service, taker))
        assert mine.position == theirs.position == 9
        assert bytes(mine.value.value.data) == bytes(theirs.value.value.data)

    run(scenario, span=ToySpan(0, 6, N_BLOCKS))


@pytest.mark.parametrize("known", [0, 3])
def test_an_only_hop_goes_on_from_the_tokens_that_its_successor_knows(known: int) -> None:
    """The giver is ahead of what the client knew: the successor rolls back, and samples those tokens itself."""

    async def scenario(rig: Rig) -> None:
        generation = msgspec.structs.replace(GENERATION, max_position=30)
        control = await rig.opened(rig.opening(0, 8, prompt=PROMPT, generation=generation))
        tokens = list(PROMPT)
        for _ in range(8):
            told = await heard(control)
            assert isinstance(told, Sampled)
            tokens.append(told.token)
        second(rig)
        so_far = tuple(tokens[: len(PROMPT) + known])
        going_on = msgspec.structs.replace(generation, tokens=so_far)
        opening = successor(rig, start=0, end=8, prompt=so_far, generation=going_on)
        other = await opened_at(rig, "stranger", opening)
        await control.send(*session_codec.encode(HandOver(rig.address("stranger"))))
        while not isinstance(told := await heard(control), HandedOver):
            pass
        assert told.position == len(so_far) - 1
        sampled = [await heard(other) for _ in range(30 - len(so_far))]
        assert [*so_far, *(one.token for one in sampled)] == [*PROMPT, *reference(list(PROMPT), 25, N_BLOCKS)]
        assert sampled[-1].finish == "length"

    run(scenario, span=ToySpan(0, 8, N_BLOCKS, block_time_s=0.05))


def test_a_last_hop_needs_no_output_log() -> None:
    async def scenario(rig: Rig) -> None:
        generation = msgspec.structs.replace(GENERATION, max_position=60)
        control = await rig.opened(rig.opening(2, 8, generation=generation, max_tokens=100))
        link = await rig.attach()
        await push(link, 0, 5)
        for position in range(5, 12):
            await push(link, position, 1)
        tokens = [(await heard(control)).token for _ in range(8)]
        second(rig)
        known = msgspec.structs.replace(generation, tokens=(*PROMPT, *tokens[:6]))
        other = await opened_at(rig, "stranger", successor(rig, end=8, generation=known))
        told = await hand_over(control, rig)
        assert told.position == 10
        spare, lacking = await attach_at(rig, "stranger", 2)
        assert lacking == Attached(10)
        await push(spare, 10, 1)
        await push(spare, 11, 1)
        assert [(await heard(other)).token for _ in range(2)] == tokens[6:8]

    run(scenario, span=ToySpan(2, 8, N_BLOCKS))


def test_the_successor_s_link_onward_waits_for_the_switch_and_brings_nothing_twice() -> None:
    """All of it: giver, successor and the hop after them, which learns of the successor only at the switch."""

    async def scenario(rig: Rig) -> None:
        control, link = await begun(rig)
        second(rig)
        after = second_after(rig)
        last = await opened_at(rig, "after", after)
        await trio.sleep(1)
        await opened_at(rig, "stranger", successor(rig))
        assert (await hand_over(control, rig)).position == N
        spare, _ = await attach_at(rig, "stranger", 2)
        for at in (link, spare):
            for position in range(N, N + 5):
                await push(at, position, 1)
        await trio.sleep(60)  # the hop after holds the successor's link, however long it takes
        relink = Relink(rig.address("stranger"), rig.address("before"), 2, 9)
        await last.send(*session_codec.encode(relink))
        await trio.sleep(1)
        await control.aclose()
        for position in range(N + 5, N + 8):
            await push(spare, position, 1)
        await trio.sleep(1)
        await last.send(*session_codec.encode(AskProgress()))
        told = [await heard(last) for _ in range(N + 8 - len(PROMPT) + 1 + 1)]
        assert [one.position for one in told if isinstance(one, Sampled)] == list(range(len(PROMPT), N + 9))
        assert [one.received for one in told if isinstance(one, Progress)] == [N + 8]

    run(scenario)


def second_after(rig: Rig) -> OpenHop:
    """Serves the blocks after the rig's at "after", and the opening of its session."""
    transport, span = rig.world.node("after"), ToySpan(6, 8, N_BLOCKS)
    service = HopService(transport, SWARM, span, SimCompute(rig.world, "after"), KVBudget(KV_BYTES), rig.service.event)
    service.start()
    generation = msgspec.structs.replace(GENERATION, max_position=90)
    previous, following = rig.address("hop"), rig.address("before")
    return OpenHop(SESSION, SWARM, 6, 8, 100, previous, following, generation=generation, inbound=1, outbound=9)


# ---- a taker that the giver cannot rely on

Play = Callable[[Stream], Awaitable[None]]


async def nothing(stream: Stream) -> None:
    await trio.sleep_forever()


async def one_part(stream: Stream) -> None:
    """Takes a part and stops reading."""
    await stream.receive()
    await stream.receive()
    await stream.send(*handover_codec.encode(StateTaken(10)))
    await trio.sleep_forever()


def says(*messages: Message) -> Play:
    async def play(stream: Stream) -> None:
        await stream.receive()
        for message in messages:
            await stream.send(*handover_codec.encode(message))
        await trio.sleep_forever()

    return play


async def nonsense(stream: Stream) -> None:
    await stream.send(b"nonsense")
    await trio.sleep_forever()


async def resets(stream: Stream) -> None:
    await stream.receive()
    await stream.reset()


async def ends(stream: Stream) -> None:
    await stream.receive()
    await stream.aclose()


TAKERS: dict[str, tuple[Play | None, str]] = {
    "is gone": (None, "refuses connections"),
    "says nothing": (nothing, "took nothing of the state for 10 s"),
    "stops": (one_part, "took nothing of the state for 10 s"),
    "refuses": (says(StateRefused("no room here")), "no room here"),
    "takes what it was not given": (says(StateTaken(10_000)), "acknowledged what it was not given"),
    "takes less than before": (says(StateTaken(512), StateTaken(5)), "acknowledged what it was not given"),
    "begins too early": (says(StateTaken(5, 3)), "began with a state that it was not given"),
    "talks nonsense": (nonsense, "handover"),
    "gives instead": (says(GiveState(SESSION, 5)), "acknowledged what it was not given"),
    "breaks off": (resets, "reset"),
    "ends": (ends, "acknowledged what it was not given"),
}


@pytest.mark.parametrize("name", sorted(TAKERS))
def test_a_taker_that_fails_costs_the_giver_nothing(name: str) -> None:
    play, reason = TAKERS[name]

    async def scenario(rig: Rig) -> None:
        control, link = await begun(rig)
        if play is None:
            rig.world.crash("stranger")
        else:
            rig.world.node("stranger").serve(ids.HANDOVER, play)
        told = await hand_over(control, rig)
        assert told.position == 0
        assert told.reason.startswith("the successor did not take the state: ")
        assert reason in told.reason
        await push(link, N, 2)
        await trio.sleep(1)
        assert rig.positions()[-1] == N, "and the session goes on"
        second(rig, "before")  # another successor
        rig.world.node("before").serve(ids.RING, rig._receiver("before"))
        await opened_at(rig, "before", successor(rig, previous=rig.address("stranger")))
        if play is not None:
            assert (await hand_over(control, rig, "before")).position == N + 2

    run(scenario)


def test_a_newer_wish_replaces_the_one_before() -> None:
    async def scenario(rig: Rig) -> None:
        control, _ = await begun(rig)
        rig.world.node("stranger").serve(ids.HANDOVER, nothing)
        await control.send(*session_codec.encode(HandOver(rig.address("stranger"))))
        await trio.sleep(1)
        second(rig, "before")
        await opened_at(rig, "before", successor(rig, previous=rig.address("stranger")))
        assert (await hand_over(control, rig, "before")).position == N
        assert await ended_within(control, 30.0) is None, "of the first nothing is heard"

    run(scenario)


async def ended_within(stream: Stream, seconds: float) -> object:
    with trio.move_on_after(seconds):
        return await stream.receive()
    return None


def test_a_session_that_ends_ends_its_giving() -> None:
    async def scenario(rig: Rig) -> None:
        control, _ = await begun(rig)
        rig.world.node("stranger").serve(ids.HANDOVER, failed := Broken())
        await control.send(*session_codec.encode(HandOver(rig.address("stranger"))))
        await trio.sleep(1)
        await control.aclose()
        await trio.sleep(1)
        assert failed.reason
        assert not rig.service.sessions

    run(scenario)


class Broken:
    reason = ""

    async def __call__(self, stream: Stream) -> None:
        await stream.receive()
        self.reason = await ended(stream)


# ---- a giver that the taker cannot rely on


def parts(count: int = 8) -> Iterator[tuple[StatePart, torch.Tensor]]:
    """The state of blocks 2:6 after `count` tokens, as a sound giver sends it."""
    part = ToyPart(2, 6, N_BLOCKS)
    cache = part.new_cache()
    step, hidden = inputs(0, count)
    given_TD = torch.frombuffer(bytearray(hidden.data), dtype=torch.float32).view(-1, HIDDEN)
    out_TD = part.forward(given_TD, cache)
    for block, position, (tensor,) in part.state_pieces(cache, count):
        yield StatePart(block, position), tensor
    yield StatePart(OUTPUTS, step.position), out_TD


def size_of(given: list[tuple[StatePart, torch.Tensor]]) -> int:
    return sum(tensor.nbytes for _, tensor in given)


async def give(rig: Rig, message: Message | None = None, name: str = "stranger") -> Stream:
    stream = await rig.world.node(name).open(rig.hop.peer_id, ids.HANDOVER)
    await stream.send(*handover_codec.encode(message or GiveState(SESSION, 8, size_of(list(parts())))))
    return stream


async def send(stream: Stream, part: StatePart, *tensors: torch.Tensor) -> None:
    await stream.send(*handover_codec.encode(part, [to_wire(tensor) for tensor in tensors]))


async def replied(stream: Stream) -> Message:
    with trio.fail_after(60):
        frame = await stream.receive()
    assert frame is not None
    return handover_codec.decode_only(frame)


async def waiting(rig: Rig, **changes: object) -> Stream:
    """A session that may be given a state by "stranger"."""
    return await rig.opened(rig.opening(giver=rig.address("stranger").peer, **changes))


async def lacks(rig: Rig, link: Stream) -> tuple[int, float]:
    """Where the session begins, and after how long."""
    began = trio.current_time()
    with trio.fail_after(100):
        frame = await link.receive()
    assert frame is not None
    message = ring_codec.decode_only(frame)
    assert isinstance(message, Attached)
    return message.position, trio.current_time() - began


def test_a_sound_state_is_acknowledged_part_by_part() -> None:
    async def scenario(rig: Rig) -> None:
        await waiting(rig)
        stream = await give(rig)
        taken = 0
        given = list(parts())
        for part, tensor in given:
            await send(stream, part, tensor)
            taken += tensor.nbytes
            last = taken == size_of(given)
            assert await replied(stream) == StateTaken(taken, 8 if last else 0)
        assert await ended(stream) == ""
        link = await rig.attach()
        assert (await lacks(rig, link))[0] == 8
        await push(link, 8, 1)
        await trio.sleep(1)
        assert torch.equal(torch.cat(rig.hidden), outputs(9))

    run(scenario)


WRONG_PARTS: dict[str, tuple[StatePart, list[torch.Tensor]]] = {
    "a shape": (StatePart(2, 0), [torch.zeros(8, HIDDEN + 1)]),
    "not a number": (StatePart(2, 0), [torch.full((8, HIDDEN), torch.nan)]),
    "a dtype": (StatePart(2, 0), [torch.zeros(8, HIDDEN, dtype=torch.float16)]),
    "an order": (StatePart(2, 4), [torch.zeros(4, HIDDEN)]),
    "a block": (StatePart(6, 0), [torch.zeros(8, HIDDEN)]),
    "too many tokens": (StatePart(2, 0), [torch.zeros(9, HIDDEN)]),
    "too many bytes": (StatePart(2, 0), [torch.zeros(8, HIDDEN)] * 6),
    "nothing": (StatePart(2, 0), []),
    "no rows": (StatePart(2, 0), [torch.zeros(0, HIDDEN)]),
    "two tensors of outputs": (StatePart(OUTPUTS, 0), [torch.zeros(4, HIDDEN)] * 2),
    "outputs of another width": (StatePart(OUTPUTS, 0), [torch.zeros(4, HIDDEN + 1)]),
    "outputs of three dimensions": (StatePart(OUTPUTS, 0), [torch.zeros(1, 4, HIDDEN)]),
    "outputs of another dtype": (StatePart(OUTPUTS, 0), [torch.zeros(4, HIDDEN, dtype=torch.bfloat16)]),
    "outputs that are not finite": (StatePart(OUTPUTS, 0), [torch.full((4, HIDDEN), torch.inf)]),
    "outputs from the middle": (StatePart(OUTPUTS, 1), [torch.zeros(4, HIDDEN)]),
}


@pytest.mark.parametrize("name", sorted(WRONG_PARTS))
def test_a_wrong_part_ends_the_giving_and_the_session_begins_with_nothing_of_it(name: str) -> None:
    part, tensors = WRONG_PARTS[name]

    async def scenario(rig: Rig) -> None:
        control = await waiting(rig)
        link = await rig.attach()
        stream = await give(rig)
        await send(stream, part, *tensors)
        assert await ended(stream) != ""
        position, after_s = await lacks(rig, link)
        assert position == 0
        assert after_s < 1.0
        await push(link, 0, 3)
        await trio.sleep(1)
        assert torch.equal(torch.cat(rig.hidden), outputs(3))
        assert await ended_within(control, 10.0) is None, "the client still has its session"

    run(scenario)


def test_more_outputs_than_a_step_may_have_are_not_taken_at_once() -> None:
    """Each part becomes one step when it is sent again."""

    async def scenario(rig: Rig) -> None:
        await waiting(rig, max_tokens=400)
        stream = await give(rig, GiveState(SESSION, 300, 300 * 5 * 16))
        await send(stream, StatePart(OUTPUTS, 0), torch.zeros(MAX_STEP_TOKENS + 1, HIDDEN))
        assert await ended(stream) != ""
        await rig.attach()

    run(scenario)


REFUSED: dict[str, tuple[GiveState, str]] = {
    "too long": (GiveState(SESSION, 40, 640), "40 tokens of a session of 40"),
    "too much": (GiveState(SESSION, 8, 2**50), "; 3.2 kB reserved"),
    "another session": (GiveState(bytes(15) + b"x", 8, 640), "no session here waits"),
}


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_a_state_that_does_not_fit_is_refused(name: str) -> None:
    message, reason = REFUSED[name]

    async def scenario(rig: Rig) -> None:
        await waiting(rig)
        stream = await give(rig, message)
        refused = await replied(stream)
        assert isinstance(refused, StateRefused)
        assert reason in refused.reason
        assert await ended(stream) == ""
        assert (await lacks(rig, await rig.attach()))[0] == 0

    run(scenario)


def test_a_state_that_is_not_complete_is_not_used() -> None:
    """All bytes are there, and the outputs among them twice instead of a block."""

    async def scenario(rig: Rig) -> None:
        await waiting(rig)
        given = list(parts())
        stream = await give(rig)
        for part, tensor in given[:3]:
            await send(stream, part, tensor)
        await send(stream, StatePart(OUTPUTS, 0), given[-1][1])
        await send(stream, StatePart(OUTPUTS, 8), given[-1][1])
        assert await ended(stream) != ""
        assert (await lacks(rig, await rig.attach()))[0] == 0

    run(scenario)


def test_a_state_without_its_outputs_is_not_used() -> None:
    """Whoever is lost later could not be refilled from here."""

    async def scenario(rig: Rig) -> None:
        await waiting(rig)
        given = [(part, tensor) for part, tensor in parts() if part.block != OUTPUTS]
        stream = await give(rig, GiveState(SESSION, 8, size_of(given)))
        for part, tensor in given:
            await send(stream, part, tensor)
        assert await ended(stream) != ""
        assert (await lacks(rig, await rig.attach()))[0] == 0

    run(scenario)


def test_a_state_that_is_complete_just_too_late_is_not_used() -> None:
    async def scenario(rig: Rig) -> None:
        await rig.opened()
        await push(await rig.attach(), 0, 3)
        await trio.sleep(1)
        session = rig.service.sessions[SESSION]
        intake = session.model.state_intake(8, 8)
        for part, tensor in parts():
            if part.block != OUTPUTS:
                intake.take(part.block, part.position, [tensor])
        with pytest.raises(PeerRefused, match="begun meanwhile"):
            session.takeover._begin(8, 8, intake, OutputLog())
        assert session.machine.position == session.cache.length == 3

    run(scenario)


def test_only_the_giver_may_give() -> None:
    async def scenario(rig: Rig) -> None:
        await waiting(rig)
        refused = await replied(await give(rig, name="before"))
        assert refused == StateRefused("no session here waits for a state from this peer")
        stream = await give(rig)
        for part, tensor in parts():
            await send(stream, part, tensor)
        assert (await lacks(rig, await rig.attach()))[0] == 8

    run(scenario)


def test_a_session_without_a_giver_takes_nothing() -> None:
    async def scenario(rig: Rig) -> None:
        await rig.opened()
        for name in ("before", "after", "stranger"):
            rig.world.node(name).learn(rig.hop.peer_id, rig.hop.addresses)
            assert isinstance(await replied(await give(rig, name=name)), StateRefused)

    run(scenario)


@pytest.mark.parametrize("how", ["dies", "resets", "ends", "says no", "says that nothing comes", "says a wrong word"])
def test_a_giver_that_stops_half_way_leaves_a_session_that_begins_at_once(how: str) -> None:
    async def scenario(rig: Rig) -> None:
        await waiting(rig)
        link = await rig.attach()
        if how == "says that nothing comes":
            stream = await give(rig, GiveState(SESSION, 0))
        else:
            stream = await give(rig)
            given = list(parts())
            for part, tensor in given[:2]:
                await send(stream, part, tensor)
                await replied(stream)
            match how:
                case "dies":
                    rig.world.crash("stranger")
                case "resets":
                    await stream.reset()
                case "ends":
                    await stream.aclose()
                case "says no":
                    await stream.send(*handover_codec.encode(StateRefused("it is quicker to replay")))
                case "says a wrong word":
                    await stream.send(*handover_codec.encode(StateTaken(7)))
        position, after_s = await lacks(rig, link)
        assert (position, after_s < 1.0) == (0, True)
        if how == "dies":
            rig.world.restart("stranger").learn(rig.hop.peer_id, rig.hop.addresses)
        again = await give(rig)
        assert await replied(again) == StateRefused("the session has begun, or is being given a state already")
        await push(link, 0, 3)
        await trio.sleep(1)
        assert torch.equal(torch.cat(rig.hidden), outputs(3))

    run(scenario)


def test_a_second_giving_does_not_disturb_the_first() -> None:
    async def scenario(rig: Rig) -> None:
        await waiting(rig)
        first = await give(rig)
        given = list(parts())
        await send(first, *given[0])
        assert await replied(await give(rig)) == StateRefused(
            "the session has begun, or is being given a state already"
        )
        for part, tensor in given[1:]:
            await send(first, part, tensor)
        assert (await lacks(rig, await rig.attach()))[0] == 8

    run(scenario)


def test_a_giver_that_never_comes_is_waited_for_in_vain_but_not_long() -> None:
    async def scenario(rig: Rig) -> None:
        await rig.opened(rig.opening(0, 6, prompt=PROMPT, giver=rig.address("stranger").peer))
        await trio.sleep(PATIENCE_S - 1)
        assert rig.positions() == [], "the prompt waits, too"
        position, after_s = await lacks(rig, await rig.attach())
        assert position == len(PROMPT)
        assert after_s == pytest.approx(1.0, abs=0.6)
        await trio.sleep(1)
        assert rig.positions() == [0]

    run(scenario, span=ToySpan(0, 6, N_BLOCKS))


def test_a_giver_is_given_time_as_long_as_parts_come_and_no_longer() -> None:
    async def scenario(rig: Rig) -> None:
        await waiting(rig)
        link = await rig.attach()
        await trio.sleep(PATIENCE_S - 1)
        stream = await give(rig)
        began = trio.current_time()
        given = list(parts())
        for part, tensor in given[:2]:
            await trio.sleep(PATIENCE_S - 2)
            await send(stream, part, tensor)
        position, _ = await lacks(rig, link)
        assert position == 0
        assert trio.current_time() - began == pytest.approx(3 * PATIENCE_S - 4, abs=0.5)
        assert isinstance(await replied(stream), StateTaken)
        assert isinstance(await replied(stream), StateTaken)
        assert await replied(stream) == StateRefused("the session has begun, or ended, meanwhile")

    run(scenario)


def test_a_session_that_ends_while_it_is_given_a_state_takes_no_more_of_it() -> None:
    async def scenario(rig: Rig) -> None:
        control = await waiting(rig)
        stream = await give(rig)
        given = list(parts())
        await send(stream, *given[0])
        await replied(stream)
        await control.aclose()
        assert await replied(stream) == StateRefused("the session has begun, or ended, meanwhile")
        assert rig.service.budget.reserved_bytes == 0

    run(scenario)


@pytest.mark.parametrize(
    "frame", [b"nonsense", b"".join(handover_codec.encode(StateTaken(1))), b"".join(ring_codec.encode(Attach(SESSION)))]
)
def test_who_does_not_begin_with_what_it_gives_is_cut_off(frame: bytes) -> None:
    async def scenario(rig: Rig) -> None:
        await waiting(rig)
        stream = await rig.world.node("stranger").open(rig.hop.peer_id, ids.HANDOVER)
        await stream.send(frame)
        assert await ended(stream) != ""
        silent = await rig.world.node("stranger").open(rig.hop.peer_id, ids.HANDOVER)
        began = trio.current_time()
        assert await ended(silent) != ""
        assert trio.current_time() - began == pytest.approx(OPENING_PATIENCE_S, abs=1)

    run(scenario)
