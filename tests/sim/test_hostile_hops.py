"""Hops that lie, stall or never read: the client takes tokens from whom it may, and every wait has an end."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import pytest
import trio

from mycel.protocols import ids
from mycel.protocols.codec import session_codec
from mycel.protocols.errors import MycelError, PeerTimeout
from mycel.protocols.messages import AskProgress, HopOpened, OpenHop, Progress, Sampled
from mycel.protocols.ports import Stream
from tests.sim.faults import LinkFaults, WorldOptions
from tests.sim.toy_swarm import GREEDY, HOT, ToySwarm, expected_tokens
from tests.sim.world import World, run_world

PROMPT = (1, 2, 3)
N_NEW = 10
PATIENCE_S = 20.0
FAST = WorldOptions(link=LinkFaults(latency_s=0.005))

Conduct = Callable[[Stream, OpenHop], Awaitable[None]]


def hostile(conduct: Conduct) -> Callable[[Stream], Awaitable[None]]:
    """A hop that opens and then does as it likes."""

    async def serve(stream: Stream) -> None:
        frame = await stream.receive()
        assert frame is not None
        opening = session_codec.decode_only(frame)
        assert isinstance(opening, OpenHop)
        await stream.send(*session_codec.encode(HopOpened()))
        await conduct(stream, opening)
        await trio.sleep_forever()

    return serve


async def say(stream: Stream, *messages: Sampled | Progress) -> None:
    for message in messages:
        await stream.send(*session_codec.encode(message))


async def ask(swarm: ToySwarm, limit_s: float = 120.0) -> tuple[list[int], list[str], MycelError | None]:
    """The tokens, who was replaced, and the error that it ended with, all within `limit_s`."""
    session, heard = swarm.session(PROMPT, N_NEW, GREEDY, patience_s=PATIENCE_S)
    failure: list[MycelError] = []

    async def drive() -> None:
        try:
            await session.run()
        except MycelError as error:
            failure.append(error)

    with trio.fail_after(limit_s):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(heard.collect)
            nursery.start_soon(drive)
    return heard.tokens, [swarm.name_of(peer) for peer, _ in heard.lost], failure[0] if failure else None


async def forge_from_the_middle(stream: Stream, _: OpenHop) -> None:
    await say(stream, *(Sampled(at, 42, (), "length" if at == 12 else "") for at in range(3, 13)))


async def never_end(stream: Stream, opening: OpenHop) -> None:
    for position in range(len(opening.prompt), 500):
        await say(stream, Sampled(position, 1, ()))
        await trio.sleep(0.01)


async def end_at_once(stream: Stream, opening: OpenHop) -> None:
    await say(stream, Sampled(len(opening.prompt), 1, (), "\x1b[2Jbogus"))


async def token_of_no_vocabulary(stream: Stream, opening: OpenHop) -> None:
    await say(stream, Sampled(len(opening.prompt), 2**31 - 1, ()))


async def grow_for_ever(stream: Stream, _: OpenHop) -> None:
    n_asked = 0
    while (frame := await stream.receive()) is not None:
        if isinstance(session_codec.decode_only(frame), AskProgress):
            n_asked += 1
            await say(stream, Progress(n_asked, 0, 1))


async def always_busy(stream: Stream, _: OpenHop) -> None:
    while (frame := await stream.receive()) is not None:
        if isinstance(session_codec.decode_only(frame), AskProgress):
            await say(stream, Progress(1, 0, 1))


@pytest.mark.parametrize(
    "conduct", [never_end, end_at_once, token_of_no_vocabulary, grow_for_ever, always_busy], ids=lambda c: c.__name__
)
def test_a_lone_hop_that_lies_is_replaced_or_given_up_in_time(conduct: Conduct) -> None:
    """A slow honest peer holds its blocks, too. What it told before it was caught cannot be checked."""

    async def scenario(world: World) -> None:
        swarm = ToySwarm(world)
        swarm.serve("liar", 0, 8)
        swarm.serve("honest", 0, 8, queue_s=1000.0)
        swarm.add_client("client")
        world.node("liar").serve(ids.SESSION, hostile(conduct))
        tokens, lost, failure = await ask(swarm)
        assert len(tokens) <= N_NEW
        if conduct is never_end:  # it told tokens that nobody can check yet, and not one too many
            assert "liar" in lost or len(tokens) == N_NEW
            return
        assert (lost, failure) == (["liar"], None)
        assert tokens == expected_tokens(PROMPT, N_NEW, GREEDY)

    run_world(1, scenario, options=FAST)


def test_only_the_last_hop_tells_tokens() -> None:
    async def scenario(world: World) -> None:
        swarm = ToySwarm(world)
        for name, start, end in (("a", 0, 2), ("liar", 2, 6), ("c", 6, 8)):
            swarm.serve(name, start, end)
        swarm.serve("honest", 2, 6, queue_s=1000.0)
        swarm.add_client("client")
        world.node("liar").serve(ids.SESSION, hostile(forge_from_the_middle))
        tokens, lost, failure = await ask(swarm)
        assert (tokens, lost, failure) == (expected_tokens(PROMPT, N_NEW, GREEDY), ["liar"], None)

    run_world(1, scenario, options=FAST)


def test_a_holder_that_never_opens_ends_the_session_in_its_patience() -> None:
    async def never(_: Stream) -> None:
        await trio.sleep_forever()

    async def scenario(world: World) -> None:
        swarm = ToySwarm(world)
        swarm.serve("a", 0, 4)
        swarm.serve("mute", 4, 8)
        swarm.add_client("client")
        world.node("mute").serve(ids.SESSION, never)
        tokens, _, failure = await ask(swarm)
        assert (tokens, type(failure)) == ([], PeerTimeout)
        assert "did not open the session" in str(failure)

    run_world(1, scenario, options=FAST)


def test_a_hop_that_never_reads_does_not_hold_up_the_client() -> None:
    async def talk_without_reading(stream: Stream, _: OpenHop) -> None:
        while True:
            await say(stream, Progress(3, 3))
            await trio.sleep(0.2)

    async def scenario(world: World) -> None:
        swarm = ToySwarm(world)
        for name, start, end in (("deaf", 0, 2), ("a1", 2, 6), ("a2", 6, 8)):
            swarm.serve(name, start, end)
        swarm.serve("b1", 2, 6, queue_s=1000.0)
        swarm.serve("b0", 0, 2, queue_s=1000.0)
        swarm.add_client("client")
        world.node("deaf").serve(ids.SESSION, hostile(talk_without_reading))

        async def crash() -> None:
            await trio.sleep(1.6)
            swarm.crash("a1")

        world.nursery.start_soon(crash)
        tokens, lost, failure = await ask(swarm)
        assert (tokens, failure) == (expected_tokens(PROMPT, N_NEW, GREEDY), None)
        assert set(lost) == {"deaf", "a1"}

    run_world(1, scenario, options=WorldOptions(link=LinkFaults(latency_s=0.005), window_bytes=100))


def test_the_last_hop_leaves_after_two_took_the_place_of_the_first() -> None:
    """Only the first of the two has the prompt for certain, and its answer counts for what a new last hop is told."""
    prompt = tuple((7 * i * i + 3) % 97 for i in range(20))

    async def scenario(world: World) -> None:
        swarm = ToySwarm(world)
        swarm.serve("a0", 0, 4)
        swarm.serve("a1", 4, 8)
        swarm.add_client("client")
        session, heard = swarm.session(prompt, 40, HOT)

        async def leave_one_after_the_other() -> None:
            while len(heard.tokens) < 5:  # noqa: ASYNC110 - virtual time
                await trio.sleep(0.01)
            swarm.serve("b0", 0, 2)
            swarm.serve("b1", 2, 4)
            swarm.leave("a0")
            while len(session.hops) < 3:  # noqa: ASYNC110 - virtual time
                await trio.sleep(0.01)
            swarm.serve("b2", 4, 8)
            swarm.leave("a1")

        with trio.fail_after(200):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(heard.collect)
                nursery.start_soon(leave_one_after_the_other)
                await session.run()
        assert heard.tokens == expected_tokens(prompt, 40, HOT)
        assert [swarm.name_of(peer) for route in heard.routes for peer, _ in route.moved] == ["a0", "a1"]

    run_world(1, scenario, options=FAST)
