"""When a chain falls silent: who is given up, how soon, and who is left alone. All in virtual time."""

from __future__ import annotations

import pytest
import trio

from mycel.protocols.errors import RouteUnavailable
from tests.sim.faults import LinkFaults, WorldOptions
from tests.sim.test_inference import GREEDY, HOT, Losses, Outcome, Swarm, expected_tokens, four_and_spares
from tests.sim.world import World, run_world

FAST = WorldOptions(link=LinkFaults(latency_s=0.001))
SLOW = pytest.mark.slow
LONG = tuple((7 * i * i + 3) % 97 for i in range(90))


def three(world: World) -> Swarm:
    """Three hops, and no spare for any."""
    swarm = Swarm(world)
    for name, start, end in (("a", 0, 3), ("b", 3, 6), ("c", 6, 8)):
        swarm.serve(name, start, end)
    world.add_node("client")
    return swarm


def cut_between(world: World, one: str, other: str) -> None:
    """A partition that two nodes alone notice."""
    before = world.is_cut
    world.is_cut = lambda a, b: {a, b} == {one, other} or before(a, b)  # type: ignore[method-assign]
    world._update_cuts()


def lost_of(outcome: Outcome) -> list[tuple[str, str]]:
    return [loss for route in outcome.routes for loss in route.lost]


@pytest.mark.parametrize("index", range(4))
def test_a_stopped_hop_is_missed_within_two_seconds(index: int) -> None:
    """Long before its streams break, which takes five."""

    async def scenario(world: World) -> None:
        swarm = four_and_spares(world)
        session, outcome = swarm.session(30, sampling=HOT)
        losing = Losses(world, swarm, session)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(outcome.collect, {10: lambda: losing.lose("stop", index)})
            await session.run()
        losing.check(outcome, expected_tokens(session.request.prompt, 30, HOT))
        assert outcome.longest_gap_s < 2.0 + 0.8  # the rest is the replay of 15 tokens
        assert lost_of(outcome)[0][1].startswith("silent for 2.")

    run_world(index, scenario, options=FAST)


@pytest.mark.parametrize("indices", [(0, 1), pytest.param((1, 3), marks=SLOW), pytest.param((0, 1, 2), marks=SLOW)])
def test_several_stopped_hops_are_missed_at_once(indices: tuple[int, ...]) -> None:
    async def scenario(world: World) -> None:
        swarm = four_and_spares(world)
        session, outcome = swarm.session(30)
        losing = Losses(world, swarm, session)

        def stop() -> None:
            for index in indices:
                losing.lose("stop", index)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(outcome.collect, {10: stop})
            await session.run()
        losing.check(outcome, expected_tokens(session.request.prompt, 30, GREEDY))
        assert outcome.longest_gap_s < 4.0
        assert len(lost_of(outcome)) == len(indices)

    run_world(3, scenario, options=FAST)


@pytest.mark.parametrize(
    "index", [1, pytest.param(0, marks=SLOW), pytest.param(2, marks=SLOW), pytest.param(3, marks=SLOW)]
)
def test_a_partition_between_two_hops_that_both_see_the_client(index: int) -> None:
    """Nobody is silent to the client: the progress of the two tells which link carries nothing, before they notice."""

    async def scenario(world: World) -> None:
        swarm = four_and_spares(world)
        session, outcome = swarm.session(30)

        def cut() -> None:
            cut_between(world, *(swarm.name_of(session.hops[i]) for i in (index, (index + 1) % 4)))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(outcome.collect, {10: cut})
            await session.run()
        assert outcome.tokens == expected_tokens(session.request.prompt, 30, GREEDY)
        assert outcome.longest_gap_s < 6.0
        assert len(lost_of(outcome)) == 1
        peer, reason = lost_of(outcome)[0]
        assert peer == world.node(swarm.name_of(outcome.routes[0].hops[(index + 1) % 4])).peer_id
        assert "also over a new link" in reason or "failed its neighbour" in reason

    run_world(index, scenario, options=FAST)


@pytest.mark.parametrize("blip_s", [0.5, 1.9, 3.0, 4.5, 7.0, 11.0])
@pytest.mark.parametrize("name", ["b", pytest.param("a", marks=SLOW), pytest.param("c", marks=SLOW)])
def test_the_only_holder_of_its_blocks_blips(name: str, blip_s: float) -> None:
    """It costs the time that it is away, and little more; shorter than what breaks its streams, nothing is replayed."""

    async def scenario(world: World) -> None:
        swarm = three(world)
        session, outcome = swarm.session(30)

        async def blip() -> None:
            world.stop(name)
            await trio.sleep(blip_s)
            world.cont(name)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(outcome.collect, {10: lambda: world.nursery.start_soon(blip)})
            await session.run()
        assert outcome.tokens == expected_tokens(session.request.prompt, 30, GREEDY)
        assert outcome.longest_gap_s < blip_s + (1.0 if blip_s < 5 else 6.0)
        if blip_s < 5.0:
            assert len(outcome.routes) == 1

    run_world(1, scenario, options=FAST)


@pytest.mark.parametrize("cut_off_s", [4.0, 8.0, pytest.param(1.5, marks=SLOW), pytest.param(20.0, marks=SLOW)])
def test_the_client_is_cut_off_from_everybody(cut_off_s: float) -> None:
    """It loses all hops, for which there are no spares, and takes them all up again at once when they are back."""

    async def scenario(world: World) -> None:
        swarm = three(world)
        session, outcome = swarm.session(60)

        async def cut() -> None:
            world.partition(["client"])
            await trio.sleep(cut_off_s)
            world.heal()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(outcome.collect, {10: lambda: world.nursery.start_soon(cut)})
            await session.run()
        assert outcome.tokens == expected_tokens(session.request.prompt, 60, GREEDY)
        assert outcome.longest_gap_s < cut_off_s + 8.0
        if cut_off_s < 5.0:
            assert len(outcome.routes) == 1, "all silent at once: that is us"

    run_world(1, scenario, options=FAST)


def test_a_long_prompt_that_makes_progress_is_left_alone() -> None:
    """Each chunk takes seconds at each hop; no token comes for a minute, and nobody is replaced."""

    async def scenario(world: World) -> None:
        swarm = four_and_spares(world)
        for name in swarm.services:
            world.slow(name, 50.0)
        session, outcome = swarm.session(3, prompt=LONG, patience_s=10.0)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(outcome.collect)
            await session.run()
        assert outcome.tokens == expected_tokens(LONG, 3, GREEDY)
        assert len(outcome.routes) == 1
        assert trio.current_time() > 40.0

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mycel.protocols.hop.MAX_STEP_TOKENS", 8)
        run_world(1, scenario, options=FAST)


def test_a_hop_that_computes_for_ever_is_replaced() -> None:
    async def scenario(world: World) -> None:
        swarm = four_and_spares(world)
        session, outcome = swarm.session(30)
        names: list[str] = []

        def hang() -> None:
            names.append(swarm.name_of(session.hops[2]))
            world.slow(names[0], 1e6)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(outcome.collect, {10: hang})
            await session.run()
        assert outcome.tokens == expected_tokens(session.request.prompt, 30, GREEDY)
        [(peer, reason)] = lost_of(outcome)
        assert peer == world.node(names[0]).peer_id
        assert reason.startswith("stuck in one step for 1")
        assert 10.0 < outcome.longest_gap_s < 14.0
        world.slow(names[0], 1.0)

    run_world(1, scenario, options=FAST)


def test_a_loss_in_the_middle_of_the_prompt_says_how_far_it_had_got() -> None:
    async def scenario(world: World) -> None:
        swarm = four_and_spares(world)
        session, outcome = swarm.session(5, prompt=LONG)
        losing = Losses(world, swarm, session)

        async def lose() -> None:
            await trio.sleep(3.0)
            losing.lose("crash", 1)

        for name in swarm.services:
            world.slow(name, 10.0)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(outcome.collect)
            nursery.start_soon(lose)
            await session.run()
        losing.check(outcome, expected_tokens(LONG, 5, GREEDY))
        assert 0 < outcome.routes[1].position < len(LONG)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mycel.protocols.hop.MAX_STEP_TOKENS", 8)
        run_world(1, scenario, options=FAST)


def test_when_nobody_is_left_the_error_says_who_was_tried_and_why() -> None:
    async def scenario(world: World) -> None:
        swarm = three(world)
        session, outcome = swarm.session(30, patience_s=20.0)
        swarm.stale.add("b")
        with pytest.RaisesGroup(RouteUnavailable) as caught:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(outcome.collect, {10: lambda: world.crash("b")})
                await session.run()
        error = caught.value.exceptions[0]
        assert isinstance(error, RouteUnavailable)
        assert error.missing == ((3, 6),)
        assert "1 failed" in str(error)
        assert f"tried {world.node('b').peer_id[:3]}..{world.node('b').peer_id[-5:]}: " in str(error)
        assert "refuses connections" in str(error)

    run_world(1, scenario, options=FAST)
