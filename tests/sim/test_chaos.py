"""The schedule of `mycel up --kill ...` in virtual time: the same faults, load of the same kind, the same verdict."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from random import Random

import pytest
import trio

from mycel.cli.verdict import Answer, Injected, Verdict, judge
from mycel.protocols.errors import MycelError
from mycel.protocols.messages import SamplingParams
from mycel.swarm.chaos import Fault, Rates, Schedule, Shape, plan_faults
from mycel.swarm.generation import NewToken
from mycel.swarm.placement import even_spans
from mycel.swarm.trace import RouteTrace
from tests.sim.faults import LinkFaults, WorldOptions
from tests.sim.toy_swarm import GREEDY, HOT, N_BLOCKS, ToySwarm, expected_tokens
from tests.sim.world import World, run_world

N_NODES, REPLICAS, N_CLIENTS = 8, 2, 2
SPANS = even_spans([1] * N_BLOCKS, N_NODES, replicas=REPLICAS)
SHAPE = Shape(rtt_s=0.08, jitter_s=0.02, loss=0.01, bytes_per_s=12.5e6)
RATES = Rates(kill=1 / 10, stop=1 / 15, leave=1 / 20)
# As `mycel start --leave` has it.
LEAVE_S = 30.0
PROMPTS = ((5, 17, 3, 88, 41), (1, 2, 3), tuple(range(40)))


def link(shape: Shape) -> LinkFaults:
    """One direction of a shaped link, as the simulator has it."""
    return LinkFaults(shape.rtt_s / 2, shape.jitter_s / 2, shape.loss, shape.bytes_per_s)


def planned(seed: int, for_s: float) -> Schedule:
    return plan_faults(RATES, SPANS, until_s=for_s, rng=Random(f"faults {seed}"))


@dataclass
class SimChaos:
    """The counterpart of `mycel.cli.chaos.ChaosRun`, with nodes that cost nothing."""

    swarm: ToySwarm
    schedule: Schedule
    seed: int
    for_s: float
    answers: list[Answer] = field(default_factory=list)
    injected: list[Injected] = field(default_factory=list)

    async def play(self) -> Verdict:
        for index, (start, end) in enumerate(SPANS):
            self.swarm.serve(f"node-{index}", start, end)
        for number in range(N_CLIENTS):
            self.swarm.add_client(f"client-{number}")
        async with trio.open_nursery() as around:
            for fault in self.schedule.faults:
                around.start_soon(self.inject, fault)
            async with trio.open_nursery() as clients:
                for number in range(N_CLIENTS):
                    clients.start_soon(self.ask_on, number)
            seconds = trio.current_time()
            around.cancel_scope.cancel()
        return judge(self.answers, self.injected, seconds)

    async def ask_on(self, number: int) -> None:
        rng = Random(f"client {self.seed} {number}")
        while trio.current_time() < self.for_s:
            await self.ask(number, rng.choice(PROMPTS), rng.choice((GREEDY, HOT)), rng.randint(20, 60))

    async def ask(self, number: int, prompt: tuple[int, ...], sampling: SamplingParams, n_tokens: int) -> None:
        what = f"{prompt[:3]}... ({n_tokens} tokens)"
        expected = tuple(expected_tokens(prompt, 60, sampling)[:n_tokens])
        began_s = trio.current_time()
        answer, trace = Answer(number, what, expected, began_s), RouteTrace(began_s)
        self.answers.append(answer)
        session, heard = self.swarm.session(prompt, n_tokens, sampling, client=f"client-{number}")

        async def listen() -> None:
            async for event in heard.events:
                trace.apply(event)
                if isinstance(event, NewToken):
                    answer.note(event.token, trace, trio.current_time())
                    answer.finish = event.finish

        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(listen)
                await session.run()
        except* MycelError as group:
            answer.error = repr(group.exceptions[0])
        answer.note_route(trace, len(answer.tokens))

    async def inject(self, fault: Fault) -> None:
        await trio.sleep_until(fault.at_s)
        name = f"node-{fault.node}"
        self.injected.append(Injected(fault.at_s, fault.kind, self.swarm.world.node(name).peer_id))
        if fault.kind == "stop":
            self.swarm.stop(name)
            await trio.sleep(fault.away_s)
            self.swarm.cont(name)
            return
        if fault.kind == "leave":
            await self.swarm.services[name].leave(LEAVE_S)
        self.swarm.crash(name)
        await trio.sleep(fault.away_s)
        self.swarm.restart(name)


def run(seed: int, for_s: float) -> tuple[Verdict, World]:
    verdicts: list[Verdict] = []

    async def scenario(world: World) -> None:
        chaos = SimChaos(ToySwarm(world), planned(seed, for_s), seed, for_s)
        verdicts.append(await chaos.play())

    world = run_world(seed, scenario, options=WorldOptions(link=link(SHAPE)))
    return verdicts[0], world


def check(seeds: Sequence[int], for_s: float) -> None:
    failovers = 0
    for seed in seeds:
        verdict, _ = run(seed, for_s)
        assert verdict.ok, f"seed {seed}: {verdict.reason}"
        assert verdict.cut_short == verdict.failed == verdict.tokens_different == 0
        assert verdict.tokens_compared > 3 * for_s
        assert verdict.unexplained == (), f"seed {seed}: a healthy peer was blamed"
        assert sum(verdict.faults.values()) == len(planned(seed, for_s).faults) >= for_s / 8
        failovers += sum(verdict.failovers.values())
    assert failovers >= len(seeds), "the faults hit nobody"


def test_the_same_schedule_gives_the_same_verdict() -> None:
    check([7, 8], 20.0)


@pytest.mark.slow
def test_more_schedules_give_the_same_verdict() -> None:
    check(range(100, 110), 60.0)


def test_one_seed_is_one_run() -> None:
    (first, one), (second, other) = run(3, 8.0), run(3, 8.0)
    assert first == second
    assert one.digest() == other.digest()
