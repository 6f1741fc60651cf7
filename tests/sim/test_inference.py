"""Sessions and hop services over simulated links: the same tokens as one process, whatever dies on the way."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from math import inf

import pytest
import torch
import trio
from hypothesis import given, settings
from hypothesis import strategies as st

from mycel.dht.directory import Located
from mycel.dht.records import Announcement
from mycel.node.hop_service import HopService
from mycel.node.kv_budget import KVBudget
from mycel.node.sampling import sample
from mycel.protocols import ids
from mycel.protocols.codec import session_codec
from mycel.protocols.errors import LocalProtocolError, PeerTimeout, RouteUnavailable
from mycel.protocols.messages import HopOpened, PeerAddress, SamplingParams
from mycel.protocols.ports import Stream
from mycel.swarm.control import Control, Heard
from mycel.swarm.generation import NewToken, Request, RouteChosen, SessionEvent
from mycel.swarm.routing import Hop
from mycel.swarm.session import InferenceSession
from mycel.swarm.view import View
from tests.sim.compute import SimCompute
from tests.sim.faults import LinkFaults, WorldOptions
from tests.sim.toy import ToyPart, ToySpan, reference
from tests.sim.transport import SimTransport
from tests.sim.world import World, run_world

SWARM = bytes(range(32))
N_BLOCKS = 8
PROMPT = (5, 17, 3, 88, 41)
GREEDY = SamplingParams()
# Hot enough that the toy's logits leave a choice, and a penalty, so that a token depends on all the tokens before.
HOT = SamplingParams(temperature=2.5, top_p=0.95, repetition_penalty=1.7, seed=11)


@dataclass
class Swarm:
    """Nodes of a world that serve the toy, and a directory that always tells the truth (some time later)."""

    world: World
    services: dict[str, HopService] = field(default_factory=dict)
    hidden: set[str] = field(default_factory=set)
    stale: set[str] = field(default_factory=set)  # crashed, and the directory does not know yet

    def serve(self, name: str, start: int, end: int, kv_bytes: int = 1 << 20, block_time_s: float = 0.01) -> None:
        transport = self.world.add_node(name)

        def event(what: str, /, **fields: object) -> None:
            self.world.record(what, name, *(str(value) for value in fields.values()))

        span = ToySpan(start, end, N_BLOCKS, block_time_s)
        service = HopService(transport, SWARM, span, SimCompute(self.world, name), KVBudget(kv_bytes), event)
        service.start()
        self.services[name] = service

    async def view(self, *, fresh: bool = False) -> View:
        if fresh:
            await trio.sleep(0.05)
        view = View(N_BLOCKS)
        for seq, (name, service) in enumerate(self.services.items()):
            if name in self.hidden or (self.world.node(name).crashed and name not in self.stale):
                continue
            span, transport = service.span, self.world.node(name)
            announcement = Announcement(
                SWARM,
                span.start,
                span.end,
                addresses=transport.addresses,
                block_time_s=service.span.block_time_s,
                kv_free_tokens=10_000,
                kv_total_tokens=10_000,
            )
            view = view.apply(Located(transport.peer_id, announcement, seq, 1e12))
        return view

    def session(
        self,
        n_new: int,
        patience_s: float = 60.0,
        prompt: tuple[int, ...] = PROMPT,
        sampling: SamplingParams = GREEDY,
    ) -> tuple[InferenceSession, Outcome]:
        send, receive = trio.open_memory_channel[SessionEvent](0)
        request = Request(prompt, n_new, sampling, patience_s=patience_s)
        client = self.world.node("client")
        session = InferenceSession(
            client, self, SWARM, request, send, rng=self.world.rng, session_id=self.world.rng.randbytes(16)
        )
        return session, Outcome(receive, len(prompt))

    def name_of(self, hop: Hop) -> str:
        return next(name for name, service in self.services.items() if service.transport.peer_id == hop.peer.peer)


@dataclass
class Outcome:
    events: trio.MemoryReceiveChannel[SessionEvent]
    n_prompt: int = len(PROMPT)
    tokens: list[int] = field(default_factory=list)
    routes: list[RouteChosen] = field(default_factory=list)
    finish: str = ""
    longest_gap_s: float = 0.0
    _at_s: float = inf

    async def collect(self, at: dict[int, object] | None = None) -> None:
        """Read to the end; call at[n] once n tokens are there."""
        async for event in self.events:
            if isinstance(event, RouteChosen):
                self.routes.append(event)
                continue
            assert isinstance(event, NewToken)
            assert event.position == self.n_prompt + len(self.tokens)
            self.tokens.append(event.token)
            self.longest_gap_s = max(self.longest_gap_s, event.at_s - self._at_s)
            self._at_s = event.at_s
            self.finish = event.finish
            action = (at or {}).get(len(self.tokens))
            if callable(action):
                action()


async def generate(swarm: Swarm, n_new: int, at: dict[int, object] | None = None, patience_s: float = 60.0) -> Outcome:
    session, outcome = swarm.session(n_new, patience_s)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(outcome.collect, at)
        await session.run()
    return outcome


def four_and_spares(world: World) -> Swarm:
    """Four hops of two blocks, and for each a second holder."""
    swarm = Swarm(world)
    for start in range(0, N_BLOCKS, 2):
        swarm.serve(f"a{start}", start, start + 2)
        swarm.serve(f"b{start}", start, start + 2)
    world.add_node("client")
    return swarm


@pytest.mark.parametrize("spans", [[(0, 8)], [(0, 4), (4, 8)], [(0, 2), (2, 4), (4, 6), (6, 8)], [(0, 6), (2, 8)]])
def test_a_split_swarm_gives_the_tokens_of_one_process(spans: list[tuple[int, int]]) -> None:
    async def scenario(world: World) -> None:
        swarm = Swarm(world)
        for index, (start, end) in enumerate(spans):
            swarm.serve(f"n{index}", start, end)
        world.add_node("client")
        outcome = await generate(swarm, 30)
        assert outcome.tokens == reference(list(PROMPT), 30, N_BLOCKS)
        assert outcome.finish == "length"
        assert len(outcome.routes) == 1
        await trio.sleep(5)
        assert all(not service.sessions and not service.budget.reserved_bytes for service in swarm.services.values())

    run_world(1, scenario)


LOSSES = st.lists(
    st.tuples(st.integers(1, 39), st.sampled_from(["crash", "stop"]), st.integers(0, 3)), min_size=1, max_size=4
)
LOSSY_LINKS = WorldOptions(link=LinkFaults(latency_s=0.01, jitter_s=0.005, loss=0.01))


@dataclass
class Losses:
    """Takes hops of a running session away, of each position in the chain at most one."""

    world: World
    swarm: Swarm
    session: InferenceSession
    down: set[int] = field(default_factory=set)

    def lose(self, how: str, index: int) -> None:
        if index in self.down or index >= len(self.session.hops):
            return  # its only other holder must stay
        self.down.add(index)
        name = self.swarm.name_of(self.session.hops[index])
        self.swarm.hidden.add(name)
        (self.world.crash if how == "crash" else self.world.stop)(name)

    def check(self, outcome: Outcome, expected: list[int]) -> None:
        assert outcome.tokens == expected
        lost = {peer for route in outcome.routes for peer, _ in route.lost}
        alive = {s.transport.peer_id for n, s in self.swarm.services.items() if n not in self.swarm.hidden}
        assert not lost & alive, "a healthy peer was blamed"


def lose_at_tokens(seed: int, losses: list[tuple[int, str, int]], sampling: SamplingParams) -> None:
    async def scenario(world: World) -> None:
        swarm = four_and_spares(world)
        session, outcome = swarm.session(40, sampling=sampling)
        losing = Losses(world, swarm, session)
        at: dict[int, object] = {n: partial(losing.lose, how, index) for n, how, index in losses}
        async with trio.open_nursery() as nursery:
            nursery.start_soon(outcome.collect, at)
            await session.run()
        losing.check(outcome, expected_tokens(PROMPT, 40, sampling))

    run_world(seed, scenario, options=LOSSY_LINKS)


def lose_at_times(seed: int, losses: list[tuple[float, str, int]], sampling: SamplingParams) -> None:
    """The prompt takes the first seconds: losses come in the middle of prefill, of a replay and of decoding."""
    prompt = tuple((7 * i * i + 3) % 97 for i in range(90))

    async def scenario(world: World) -> None:
        swarm = four_and_spares(world)
        session, outcome = swarm.session(12, prompt=prompt, sampling=sampling)
        losing = Losses(world, swarm, session)

        async def lose_later(at_s: float, how: str, index: int) -> None:
            await trio.sleep_until(at_s)
            losing.lose(how, index)

        async with trio.open_nursery() as tasks:
            for loss in losses:
                tasks.start_soon(lose_later, *loss)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(outcome.collect)
                await session.run()
            tasks.cancel_scope.cancel()
        losing.check(outcome, expected_tokens(prompt, 12, sampling))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mycel.protocols.hop.MAX_STEP_TOKENS", 8)
        run_world(seed, scenario, options=LOSSY_LINKS)


def expected_tokens(prompt: tuple[int, ...], n_new: int, sampling: SamplingParams) -> list[int]:
    """What one process alone would generate."""
    part = ToyPart(0, N_BLOCKS, N_BLOCKS)
    cache, tokens = part.new_cache(), list(prompt)
    inputs = tokens[:]
    for position in range(len(prompt), len(prompt) + n_new):
        logits_V = part.logits(part.forward(torch.tensor(inputs), cache)[-1:])[0]
        inputs = [sample(logits_V, tokens, sampling, position)]
        tokens += inputs
    return tokens[len(prompt) :]


@settings(max_examples=12)
@given(seed=st.integers(0, 2**16), losses=LOSSES)
def test_any_hops_may_die_at_any_token(seed: int, losses: list[tuple[int, str, int]]) -> None:
    lose_at_tokens(seed, losses, GREEDY)


@pytest.mark.slow
@settings(max_examples=150)
@given(seed=st.integers(0, 2**16), losses=LOSSES, sampling=st.sampled_from([GREEDY, HOT]))
def test_any_hops_may_die_at_any_token_also_of_a_sampled_text(
    seed: int, losses: list[tuple[int, str, int]], sampling: SamplingParams
) -> None:
    lose_at_tokens(seed, losses, sampling)


@pytest.mark.slow
@settings(max_examples=120)
@given(
    seed=st.integers(0, 2**16),
    losses=st.lists(
        st.tuples(st.floats(0.05, 4.0), st.sampled_from(["crash", "stop"]), st.integers(0, 3)), min_size=1, max_size=4
    ),
    sampling=st.sampled_from([GREEDY, HOT]),
)
def test_any_hops_may_die_at_any_moment_of_a_long_prompt(
    seed: int, losses: list[tuple[float, str, int]], sampling: SamplingParams
) -> None:
    lose_at_times(seed, losses, sampling)


@pytest.mark.parametrize("index", range(4))
@pytest.mark.parametrize("how", ["crash", "stop"])
def test_a_hop_dies_in_the_middle_of_prefill(how: str, index: int) -> None:
    lose_at_times(index, [(0.3, how, index)], HOT)


def test_the_sampled_reference_is_no_greedy_text() -> None:
    assert expected_tokens(PROMPT, 40, HOT) != expected_tokens(PROMPT, 40, GREEDY)
    assert expected_tokens(PROMPT, 40, GREEDY) == reference(list(PROMPT), 40, N_BLOCKS)


def test_if_only_a_hop_of_the_chain_holds_the_lost_blocks_the_chain_is_laid_anew() -> None:
    """a does 0:4 of its 0:6; when b (4:8) dies, a is needed for 4:6, too, and a chain visits a peer once."""

    async def scenario(world: World) -> None:
        swarm = Swarm(world)
        swarm.serve("a", 0, 6)
        swarm.serve("b", 4, 8)
        world.add_node("client")
        session, outcome = swarm.session(30)

        def kill() -> None:
            assert session.hops[0].end in {4, 6}
            swarm.serve("c", 6, 8)
            swarm.hidden.add("b")
            world.crash("b")

        async with trio.open_nursery() as nursery:
            nursery.start_soon(outcome.collect, {10: kill})
            await session.run()
        assert outcome.tokens == reference(list(PROMPT), 30, N_BLOCKS)
        assert [swarm.name_of(hop) for hop in outcome.routes[-1].hops] == ["a", "c"]
        assert [(hop.start, hop.end) for hop in outcome.routes[-1].hops] == [(0, 6), (6, 8)]
        assert [peer for route in outcome.routes for peer, _ in route.lost] == [world.node("b").peer_id]
        await trio.sleep(5)
        assert all(not service.sessions and not service.budget.reserved_bytes for service in swarm.services.values())

    for seed in range(6):
        run_world(seed, scenario)


def test_a_replacement_is_none_of_the_hops_that_are_left() -> None:
    """d could do the lost blocks, and faster than e, but is the last hop already."""

    async def scenario(world: World) -> None:
        swarm = Swarm(world)
        for start, name in enumerate("abc"):
            swarm.serve(name, 2 * start, 2 * start + 2)
        swarm.serve("d", 2, 8, block_time_s=0.5)
        world.add_node("client")
        session, outcome = swarm.session(12)

        def kill() -> None:
            swarm.serve("e", 2, 4, block_time_s=1.0)
            swarm.hidden.add("b")
            world.crash("b")

        async with trio.open_nursery() as nursery:
            nursery.start_soon(outcome.collect, {6: kill})
            await session.run()
        assert outcome.tokens == reference(list(PROMPT), 12, N_BLOCKS)
        assert ["".join(swarm.name_of(hop) for hop in route.hops) for route in outcome.routes] == ["abcd", "aecd"]

    run_world(8, scenario)


@pytest.mark.parametrize("lost", ["all", "the end"])
def test_links_of_a_chain_that_was_given_up_do_not_disturb_the_next(lost: str) -> None:
    """The directory still lists hops that died: chains are tried and given up in quick succession, by the same peers.

    What the hops of one attempt have on its way to each other must not meet those of the next.
    """

    async def scenario(world: World) -> None:
        swarm = Swarm(world)
        for name, start, end in (("a", 0, 2), ("b", 2, 4), ("c", 4, 6), ("d", 6, 8)):
            swarm.serve(name, start, end, block_time_s=0.001)
        names = ["a", "b", "c", "d"]
        world.add_node("client")
        for one in names:
            for other in names:
                world.link(one, other, LinkFaults(latency_s=world.rng.choice([0.001, 0.02]), jitter_s=0.01))
            world.link("client", one, LinkFaults(latency_s=0.001, jitter_s=world.rng.choice([0.01, 0.05, 0.1])))
        await generate(swarm, 3)  # now all are connected
        for number in range(10):
            swarm.serve(f"dead{number}", 6, 8, block_time_s=0.0005)
            world.link("client", f"dead{number}", LinkFaults(latency_s=world.rng.choice([0.001, 0.01, 0.03])))

        def bury() -> None:
            for number in range(10):
                swarm.stale.add(f"dead{number}")
                world.crash(f"dead{number}")

        if lost == "all":
            bury()
            await trio.sleep(1)
        session, outcome = swarm.session(20)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(outcome.collect, {5: bury} if lost != "all" else None)
            await session.run()
        assert outcome.tokens == reference(list(PROMPT), 20, N_BLOCKS)
        alive = {world.node(name).peer_id for name in names}
        assert not alive & {peer for route in outcome.routes for peer, _ in route.lost}

    for seed in (22, 175, *range(10)):  # the first two failed while links had no numbers
        run_world(seed, scenario)


def test_a_link_between_two_healthy_hops_may_break_while_data_waits_on_it() -> None:
    """Both hops and the client are well. The hop before attaches anew, nobody is replaced, the text goes on at once."""

    async def scenario(world: World) -> None:
        swarm = four_and_spares(world)
        session, outcome = swarm.session(30)

        def cut() -> None:
            one, other = (swarm.services[swarm.name_of(hop)].transport for hop in session.hops[:2])
            connection = one._connections[other.peer_id]
            connection.lose(one, "cut by the test")
            connection.lose(other, "cut by the test")

        async with trio.open_nursery() as nursery:
            nursery.start_soon(outcome.collect, {10: cut})
            await session.run()
        assert outcome.tokens == reference(list(PROMPT), 30, N_BLOCKS)
        assert len(outcome.routes) == 1
        assert trio.current_time() < 10.0

    run_world(9, scenario)


def test_a_slow_listener_costs_nobody_the_place_in_the_chain() -> None:
    """The consumer pauses for minutes, also while the chain is being mended."""

    async def scenario(world: World) -> None:
        swarm = four_and_spares(world)
        session, outcome = swarm.session(60)
        losing = Losses(world, swarm, session)

        async def read_slowly() -> None:
            async for event in outcome.events:
                await trio.sleep(100.0)
                if isinstance(event, RouteChosen):
                    outcome.routes.append(event)
                    continue
                outcome.tokens.append(event.token)

        async def lose() -> None:
            await trio.sleep(2.0)  # some 20 tokens are made by then, and none has been read
            losing.lose("crash", 2)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(read_slowly)
            nursery.start_soon(lose)
            await session.run()
        losing.check(outcome, reference(list(PROMPT), 60, N_BLOCKS))
        assert len(outcome.routes) == 2

    run_world(10, scenario, limit_s=20_000)


def test_chains_that_never_give_a_token_come_to_an_end() -> None:
    """Two hops that open every session and then break it, for ever."""

    async def scenario(world: World) -> None:
        swarm = Swarm(world)
        for name in ("x", "y", "z"):
            swarm.serve(name, 0, 8)
        world.add_node("client")

        async def open_and_break(stream: Stream) -> None:
            await stream.receive()
            await stream.send(*session_codec.encode(HopOpened()))
            await trio.sleep(9.0)
            await stream.reset()

        for service in swarm.services.values():
            service.transport.serve(ids.SESSION, open_and_break)
        with pytest.RaisesGroup(PeerTimeout):
            await generate(swarm, 5, patience_s=60.0)

    run_world(12, scenario)


@pytest.mark.parametrize("abandoned", [True, False])
def test_who_is_let_go_of_between_two_frames_is_no_failure_of_ours(abandoned: bool) -> None:
    """A stream may say that it was reset before it looks whether its reader was cancelled; the real adapter does."""

    class Reset:
        waits = trio.Event()

        async def receive(self) -> memoryview:
            with trio.CancelScope(shield=True):
                await self.waits.wait()
            raise LocalProtocolError("receive after reset")

        async def reset(self) -> None:
            self.waits.set()

    async def scenario(world: World) -> None:
        stream = Reset()
        control = Control(Hop(PeerAddress("p"), 0, 8), stream)  # type: ignore[arg-type]
        send, _receive = trio.open_memory_channel[Heard](1)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(control.listen, send)
            await trio.sleep(1)
            if abandoned:
                await control.abandon()
            else:
                stream.waits.set()

    if abandoned:
        run_world(14, scenario)
    else:
        with pytest.RaisesGroup(pytest.RaisesGroup(LocalProtocolError)):
            run_world(14, scenario)


def test_a_cancelled_opening_leaves_no_session_behind() -> None:
    """a opens at once, b takes its time, and the user gives up in between."""

    async def scenario(world: World) -> None:
        swarm = Swarm(world)
        swarm.serve("a", 0, 4)
        swarm.serve("b", 4, 8)
        world.add_node("client")
        world.link("client", "b", LinkFaults(latency_s=2.0))
        session, _ = swarm.session(5)
        with trio.move_on_after(4.0):
            await session.run()
        assert swarm.services["a"].sessions
        await trio.sleep(60.0)
        assert all(not service.sessions and not service.budget.reserved_bytes for service in swarm.services.values())

    run_world(13, scenario)


def test_without_a_replacement_it_waits_and_then_names_the_blocks() -> None:
    async def scenario(world: World) -> None:
        swarm = Swarm(world)
        swarm.serve("a", 0, 4)
        swarm.serve("b", 4, 8)
        world.add_node("client")
        began = trio.current_time()
        with pytest.RaisesGroup(RouteUnavailable) as caught:
            await generate(swarm, 30, {10: lambda: world.crash("b")}, patience_s=20.0)
        error = caught.value.exceptions[0]
        assert isinstance(error, RouteUnavailable)
        assert error.missing == ((4, 8),)
        assert trio.current_time() - began >= 20.0

    run_world(3, scenario)


def test_a_holder_that_appears_in_time_takes_over() -> None:
    async def scenario(world: World) -> None:
        swarm = Swarm(world)
        swarm.serve("a", 0, 4)
        swarm.serve("b", 4, 8)
        world.add_node("client")

        async def later() -> None:
            await trio.sleep(5)
            swarm.serve("c", 4, 8)

        def kill() -> None:
            world.crash("b")
            world.nursery.start_soon(later)

        outcome = await generate(swarm, 30, {10: kill}, patience_s=20.0)
        assert outcome.tokens == reference(list(PROMPT), 30, N_BLOCKS)
        assert [peer for peer, _ in outcome.routes[-1].lost] == [world.node("b").peer_id]

    run_world(4, scenario)


def test_full_memory_is_refused_and_another_peer_is_tried() -> None:
    async def scenario(world: World) -> None:
        swarm = Swarm(world)
        swarm.serve("full", 0, 8, kv_bytes=100)
        swarm.serve("a", 0, 4)
        swarm.serve("b", 4, 8)
        world.add_node("client")
        outcome = await generate(swarm, 20)
        assert outcome.tokens == reference(list(PROMPT), 20, N_BLOCKS)
        assert len(outcome.routes[0].hops) == 2

    run_world(5, scenario)


def test_a_client_that_vanishes_frees_the_memory() -> None:
    async def scenario(world: World) -> None:
        swarm = Swarm(world)
        swarm.serve("a", 0, 4)
        swarm.serve("b", 4, 8)
        world.add_node("client")
        seen = trio.Event()

        async def main(_transport: SimTransport) -> None:
            session, outcome = swarm.session(1000)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(outcome.collect, {20: seen.set})
                await session.run()

        world.start("client", main)
        await seen.wait()
        assert all(service.budget.reserved_bytes for service in swarm.services.values())
        world.crash("client")
        await trio.sleep(10)
        assert not any(service.budget.reserved_bytes or service.sessions for service in swarm.services.values())

    run_world(6, scenario)


def test_a_stuck_swarm_ends_in_a_timeout() -> None:
    async def scenario(world: World) -> None:
        swarm = Swarm(world)
        swarm.serve("a", 0, 8)
        world.add_node("client")
        world.slow("a", 5e3)
        with pytest.RaisesGroup(PeerTimeout):
            await generate(swarm, 5, patience_s=30.0)

    run_world(7, scenario)


def test_the_same_seed_gives_the_same_walk() -> None:
    async def scenario(world: World) -> None:
        swarm = four_and_spares(world)
        session, outcome = swarm.session(20)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(outcome.collect, {7: lambda: world.crash("a2" if swarm.services else "a0")})
            await session.run()

    options = WorldOptions(link=LinkFaults(latency_s=0.01, jitter_s=0.005, loss=0.02))
    logs = [run_world(seed, scenario, options=options).log for seed in (11, 11, 12)]
    assert logs[0] == logs[1]
    assert logs[0] != logs[2]
