"""Hops that leave on purpose while a session runs: equal tokens, no loss, no pause, whoever leaves and when."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial

import pytest
import trio
from hypothesis import given, settings
from hypothesis import strategies as st

from mycel.protocols import ids
from mycel.protocols.messages import SamplingParams
from mycel.protocols.ports import Stream
from mycel.swarm import handing_over
from tests.sim.faults import LinkFaults, WorldOptions
from tests.sim.test_inference import GREEDY, HOT, PROMPT, Losses, Outcome, Swarm, expected_tokens, four_and_spares
from tests.sim.world import World, run_world

N_NEW = 30
FAST = WorldOptions(link=LinkFaults(latency_s=0.001))
SLOW = pytest.mark.slow


@dataclass
class Exits:
    """Has hops of a running session leave as a node does: told first, gone when it is empty or the time is over."""

    swarm: Swarm
    within_s: float = 30.0
    left: list[str] = field(default_factory=list)
    gone: dict[str, float] = field(default_factory=dict)

    def leave(self, name: str) -> None:
        if name not in self.left:
            self.left.append(name)
            self.swarm.world.nursery.start_soon(self._leave, name)

    async def _leave(self, name: str) -> None:
        began = trio.current_time()
        await self.swarm.services[name].leave(self.within_s)
        if self.swarm.world.node(name).crashed:
            return
        self.gone[name] = trio.current_time() - began
        self.swarm.hidden.add(name)
        self.swarm.world.crash(name)

    @property
    def peers(self) -> list[str]:
        return [self.swarm.services[name].transport.peer_id for name in self.left]


@dataclass
class Run:
    """A session with a listener that measures the pauses between its tokens."""

    swarm: Swarm
    sampling: SamplingParams = GREEDY
    n_new: int = N_NEW
    prompt: tuple[int, ...] = PROMPT
    exits: Exits = field(init=False)

    def __post_init__(self) -> None:
        self.session, self.outcome = self.swarm.session(self.n_new, prompt=self.prompt, sampling=self.sampling)
        self.exits = Exits(self.swarm)

    def leave(self, *indices: int) -> None:
        """The hops at these places of the chain leave now."""
        for name in [self.swarm.name_of(self.session.hops[i]) for i in indices if i < len(self.session.hops)]:
            self.exits.leave(name)

    async def __call__(self, at: dict[int, object]) -> Outcome:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self.outcome.collect, at)
            await self.session.run()
        assert self.outcome.tokens == expected_tokens(self.prompt, self.n_new, self.sampling)
        return self.outcome

    @property
    def lost(self) -> list[str]:
        return [peer for route in self.outcome.routes for peer, _ in route.lost]

    @property
    def moved(self) -> list[str]:
        return [peer for route in self.outcome.routes for peer, _ in route.moved]

    def check_smooth(self) -> None:
        """All that left were replaced before they went, nobody was lost, and nobody had to wait for it."""
        assert self.lost == []
        assert sorted(self.moved) == sorted(self.exits.peers)
        assert self.outcome.longest_gap_s < 1.0
        assert all(took_s < 5.0 for took_s in self.exits.gone.values())


@pytest.mark.parametrize(
    ("tokens", "sampling"),
    [((9,), HOT), pytest.param((1, 2, 9, 20), GREEDY, marks=SLOW), pytest.param((1, 2, 20), HOT, marks=SLOW)],
    ids=["sampled", "greedy at many tokens", "sampled at many tokens"],
)
@pytest.mark.parametrize("index", range(4))
def test_a_hop_leaves_at_any_token(index: int, tokens: tuple[int, ...], sampling: SamplingParams) -> None:
    async def scenario(world: World) -> None:
        run = Run(four_and_spares(world), sampling)
        await run({at: partial(run.leave, index)})
        run.check_smooth()
        assert [len(route.hops) for route in run.outcome.routes] == [4, 4]
        assert "state" in run.outcome.routes[1].moved[0][1]
        await trio.sleep(1.0)
        swarm = run.swarm
        assert all(not service.sessions and not service.budget.reserved_bytes for service in swarm.services.values())

    for at in tokens:
        run_world(at, scenario, options=FAST)


@pytest.mark.parametrize("sampling", [pytest.param(GREEDY, marks=SLOW), HOT], ids=["greedy", "sampled"])
@pytest.mark.parametrize("successors", [[(0, 8)], [(0, 4), (4, 8)]], ids=["one", "two"])
def test_the_only_hop_leaves(successors: list[tuple[int, int]], sampling: SamplingParams) -> None:
    async def scenario(world: World) -> None:
        swarm = Swarm(world)
        swarm.serve("a", 0, 8)
        world.add_node("client")
        run = Run(swarm, sampling)

        def leave() -> None:
            for number, (start, end) in enumerate(successors):
                swarm.serve(f"s{number}", start, end)
            run.leave(0)

        await run({at: leave})
        run.check_smooth()
        assert [(hop.start, hop.end) for hop in run.outcome.routes[-1].hops] == successors

    for at in (1, 12):
        run_world(at, scenario, options=FAST)


def test_one_of_four_leaves_and_two_take_its_place() -> None:
    async def scenario(world: World) -> None:
        swarm = Swarm(world)
        for name, start, end in (("a", 0, 3), ("b", 3, 6), ("c", 6, 8), ("x", 3, 5), ("y", 5, 6)):
            swarm.serve(name, start, end, block_time_s=0.05 if name in "xy" else 0.01)
        world.add_node("client")
        run = Run(swarm, HOT, 60)
        await run({4: lambda: run.exits.leave("b")})
        assert (run.lost, run.moved) == ([], run.exits.peers), [route.lost for route in run.outcome.routes]
        assert [swarm.name_of(hop) for hop in run.outcome.routes[-1].hops] == ["a", "x", "y", "c"]

    run_world(1, scenario, options=FAST)


@pytest.mark.parametrize("indices", [(0, 3), pytest.param((1, 2), marks=SLOW), pytest.param((0, 1, 2, 3), marks=SLOW)])
def test_several_leave_at_once(indices: tuple[int, ...]) -> None:
    async def scenario(world: World) -> None:
        run = Run(four_and_spares(world), HOT)
        await run({7: partial(run.leave, *indices)})
        run.check_smooth()
        assert not {hop.peer.peer for hop in run.outcome.routes[-1].hops} & set(run.exits.peers)

    run_world(1, scenario, options=FAST)


def test_two_neighbours_leave_and_one_peer_takes_the_place_of_both() -> None:
    async def scenario(world: World) -> None:
        swarm = Swarm(world)
        for name, start, end in (("a", 0, 3), ("b", 3, 5), ("c", 5, 8)):
            swarm.serve(name, start, end)
        world.add_node("client")
        run = Run(swarm, HOT)

        def leave() -> None:
            swarm.serve("whole", 2, 8)  # it alone could do either, and a chain visits a peer once
            run.leave(1, 2)

        await run({7: leave})
        run.check_smooth()
        assert [swarm.name_of(hop) for hop in run.outcome.routes[-1].hops] == ["a", "whole"]

    run_world(3, scenario, options=FAST)


@pytest.mark.slow
def test_a_hop_leaves_in_the_middle_of_a_long_prompt() -> None:
    prompt = tuple((7 * i * i + 3) % 97 for i in range(90))

    async def scenario(world: World) -> None:
        run = Run(four_and_spares(world), HOT, 12, prompt)

        async def leave() -> None:
            await trio.sleep(0.5)
            run.leave(index)

        world.nursery.start_soon(leave)
        await run({})
        assert (run.lost, run.moved) == ([], run.exits.peers), [route.lost for route in run.outcome.routes]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mycel.protocols.hop.MAX_STEP_TOKENS", 8)
        for index in range(4):
            run_world(index, scenario, options=FAST)


@pytest.mark.parametrize("index", [0, 1, pytest.param(2, marks=SLOW), pytest.param(3, marks=SLOW)])
def test_the_leaver_dies_while_it_hands_over(index: int) -> None:
    """Its successors are let go of, and another takes its place as that of any lost hop: nobody else is blamed."""

    async def scenario(world: World) -> None:
        swarm = four_and_spares(world)
        run = Run(swarm, HOT)

        def leave() -> None:
            name = swarm.name_of(run.session.hops[index])
            swarm.services[name].transport.serve(ids.HANDOVER, _never)
            for service in swarm.services.values():
                service.transport.serve(ids.HANDOVER, _never)  # a state that never gets through
            run.leave(index)
            world.nursery.start_soon(die, name)

        async def die(name: str) -> None:
            await trio.sleep(0.3)
            swarm.hidden.add(name)
            world.crash(name)

        await run({7: leave})
        assert (run.lost, run.moved) == (run.exits.peers, [])
        assert run.outcome.longest_gap_s < 3.0

    run_world(index, scenario, options=FAST)


async def _never(stream: Stream) -> None:
    while await stream.receive() is not None:
        pass


@pytest.mark.parametrize("after_s", [0.0, 0.005, 0.05, 0.3])
@pytest.mark.parametrize(
    "index", [pytest.param(0, marks=SLOW), pytest.param(1, marks=SLOW), pytest.param(2, marks=SLOW), 3]
)
def test_the_successor_dies_while_it_is_filled(index: int, after_s: float) -> None:
    """There is a third holder; the chain never notices."""

    async def scenario(world: World) -> None:
        swarm = four_and_spares(world)
        run = Run(swarm, HOT, 60)
        start = 2 * index
        for service in swarm.services.values():
            service.transport.serve(ids.HANDOVER, _never)  # slow enough to die on the way

        def leave() -> None:
            run.leave(index)
            world.nursery.start_soon(die)

        async def die() -> None:
            name = next(n for n in (f"a{start}", f"b{start}") if n not in run.exits.left)
            while not swarm.services[name].sessions:  # noqa: ASYNC110 (in virtual time, and it is ours to say when)
                await trio.sleep(0.001)
            await trio.sleep(after_s)
            swarm.serve(f"c{start}", start, start + 2)
            swarm.hidden.add(name)
            world.crash(name)

        await run({7: leave})
        run.check_smooth()
        assert swarm.name_of(run.outcome.routes[-1].hops[index]) == f"c{start}"

    run_world(index, scenario, options=FAST)


def test_there_is_no_successor_until_later() -> None:
    async def scenario(world: World) -> None:
        swarm = Swarm(world)
        for name, start, end in (("a", 0, 3), ("b", 3, 6), ("c", 6, 8)):
            swarm.serve(name, start, end)
        world.add_node("client")
        run = Run(swarm, HOT, 60)

        async def later() -> None:
            await trio.sleep(2.0)
            swarm.serve("d", 3, 6)

        def leave() -> None:
            run.leave(1)
            world.nursery.start_soon(later)

        await run({10: leave})
        run.check_smooth()
        assert [swarm.name_of(hop) for hop in run.outcome.routes[-1].hops] == ["a", "d", "c"]

    run_world(5, scenario, options=FAST)


def test_nobody_ever_takes_its_place_and_the_session_waits_for_its_patience() -> None:
    """The leaver computes until its time is over; then it is lost like any other, and a newcomer is taken."""

    async def scenario(world: World) -> None:
        swarm = Swarm(world)
        swarm.serve("a", 0, 4)
        swarm.serve("b", 4, 8)
        world.add_node("client")
        run = Run(swarm, GREEDY, 200)
        run.exits.within_s = 3.0

        async def later() -> None:
            await trio.sleep(8.0)
            swarm.serve("c", 4, 8)

        def leave() -> None:
            run.leave(1)
            world.nursery.start_soon(later)

        await run({10: leave})
        assert (run.lost, run.moved) == (run.exits.peers, [])
        assert 2.9 < run.exits.gone["b"] < 3.1

    run_world(6, scenario, options=FAST)


@pytest.mark.slow
def test_another_hop_is_lost_while_one_hands_over() -> None:
    """The mend goes first, and the handover is begun again after it."""

    async def scenario(world: World) -> None:
        swarm = four_and_spares(world)
        run = Run(swarm, HOT, 60)
        losing = Losses(world, swarm, run.session)
        for service in swarm.services.values():
            service.transport.serve(ids.HANDOVER, _never)

        async def lose() -> None:
            await trio.sleep(0.3)
            losing.lose("crash", lost)

        def leave() -> None:
            run.leave(1)
            world.nursery.start_soon(lose)

        await run({7: leave})
        assert len(run.lost) == 1
        assert run.lost != run.exits.peers
        assert run.moved == run.exits.peers
        assert run.outcome.longest_gap_s < 2.0

    for lost in (0, 2, 3):
        run_world(lost, scenario, options=FAST)


@pytest.mark.slow
def test_a_successor_that_comes_no_further_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario(world: World) -> None:
        swarm = four_and_spares(world)
        run = Run(swarm, HOT, 300)

        def leave() -> None:
            run.leave(1)
            name = next(n for n in ("a2", "b2") if n not in run.exits.left)
            swarm.services[name].transport.serve(ids.HANDOVER, _never)  # so that it has to compute everything
            world.slow(name, 1e4)
            world.nursery.start_soon(later)

        async def later() -> None:
            await trio.sleep(1.0)
            swarm.serve("c2", 2, 4)

        await run({7: leave})
        assert (run.lost, run.moved) == ([], run.exits.peers), [route.lost for route in run.outcome.routes]
        assert swarm.name_of(run.outcome.routes[-1].hops[1]) == "c2"
        assert run.outcome.longest_gap_s < 1.0

    monkeypatch.setattr(handing_over, "STALL_S", 2.0)
    run_world(2, scenario, options=FAST)


EVENTS = st.lists(
    st.tuples(st.integers(1, 39), st.sampled_from(["leave", "leave", "crash", "stop"]), st.integers(0, 3)),
    min_size=1,
    max_size=4,
)


def come_and_go(seed: int, events: list[tuple[int, str, int]], sampling: SamplingParams) -> None:
    """Any hops leave, die and stop at any tokens: of each place in the chain at most one."""

    async def scenario(world: World) -> None:
        swarm = four_and_spares(world)
        run = Run(swarm, sampling, 40)
        losing = Losses(world, swarm, run.session)

        def happen(how: str, index: int) -> None:
            if how != "leave":
                losing.lose(how, index)
            elif index not in losing.down and index < len(run.session.hops):
                losing.down.add(index)
                run.leave(index)

        await run({at: partial(happen, how, index) for at, how, index in events})
        alive = {s.transport.peer_id for n, s in swarm.services.items() if n not in swarm.hidden}
        assert not set(run.lost) & alive, "a healthy peer was blamed"
        assert len(run.lost) + len(run.moved) <= len(losing.down)

    run_world(seed, scenario, options=WorldOptions(link=LinkFaults(latency_s=0.01, jitter_s=0.005, loss=0.01)))


@settings(max_examples=5)
@given(seed=st.integers(0, 2**16), events=EVENTS)
def test_hops_come_and_go_at_any_token(seed: int, events: list[tuple[int, str, int]]) -> None:
    come_and_go(seed, events, HOT)


@pytest.mark.slow
@settings(max_examples=120)
@given(seed=st.integers(0, 2**16), events=EVENTS, sampling=st.sampled_from([GREEDY, HOT]))
def test_hops_come_and_go_at_any_token_many_times(
    seed: int, events: list[tuple[int, str, int]], sampling: SamplingParams
) -> None:
    come_and_go(seed, events, sampling)
