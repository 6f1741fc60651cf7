"""Random schedules of faults, several clients: nothing wrong is ever said, and once the faults are over all goes on.

A failing seed is a failing example: `play(seed)` does it again, fault by fault.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from random import Random

import pytest
import trio

from mycel.protocols.messages import SamplingParams
from mycel.swarm.chain import covers
from mycel.swarm.session import InferenceSession
from tests.sim.faults import LinkFaults, WorldOptions
from tests.sim.toy_swarm import GREEDY, HOT, N_BLOCKS, Heard, ToySwarm, expected_tokens
from tests.sim.world import World, run_world

CHAOS_S = 12.0
# A session may have shut out everybody for 30 s just before the end of the faults, and has to notice silence.
HEALED_S = 90.0
SPLITS = (((0, 8),), ((0, 4), (4, 8)), ((0, 2), (2, 6), (6, 8)), ((0, 2), (2, 4), (4, 6), (6, 8)), ((0, 6), (2, 8)))
REPLICAS = 3


@dataclass
class Running:
    """A request on its way, and the text that it must become."""

    session: InferenceSession
    heard: Heard
    expected: list[int]

    def check(self) -> None:
        tokens = self.heard.tokens
        assert tokens == self.expected[: len(tokens)], f"after {len(tokens)} tokens"
        hops = self.session.hops
        if hops:
            assert covers(hops, 0, N_BLOCKS)
            assert len({hop.peer.peer for hop in hops}) == len(hops), "a chain visits a peer once"


@dataclass
class Chaos:
    """A swarm, its clients, and whom something was done to: nobody else may be blamed."""

    swarm: ToySwarm
    dice: Random
    running: dict[str, Running] = field(default_factory=dict)
    n_finished: int = 0
    troubled: set[str] = field(default_factory=set)
    _slow: set[str] = field(default_factory=set)
    _cut: set[tuple[str, str]] = field(default_factory=set)

    @property
    def world(self) -> World:
        return self.swarm.world

    # ---- clients

    async def request(self, client: str) -> None:
        """One generation, from the draw of its prompt to its last token."""
        dice = self.dice
        prompt = tuple(dice.randrange(97) for _ in range(dice.choice((1, 5, 30))))
        n_new = dice.randint(5, 20)
        sampling: SamplingParams = dice.choice((GREEDY, HOT))
        session, heard = self.swarm.session(prompt, n_new, sampling, client=client)
        running = self.running[client] = Running(session, heard, expected_tokens(prompt, n_new, sampling))
        async with trio.open_nursery() as nursery:
            nursery.start_soon(heard.collect)
            await session.run()
        running.check()
        assert heard.tokens == running.expected
        assert heard.finish == "length"
        blamed = {self.swarm.name_of(peer) for peer, _ in heard.lost}
        assert blamed <= self.troubled, f"{blamed - self.troubled} were blamed, and nothing had been done to them"
        del self.running[client]
        self.n_finished += 1

    async def requests(self, client: str, until_s: float) -> None:
        """One after the other, none begun after `until_s`."""
        while trio.current_time() < until_s:
            await self.request(client)
            await trio.sleep(2.0 * self.dice.random())

    def check(self) -> None:
        """What holds at every moment."""
        self.swarm.check_budgets()
        for running in self.running.values():
            running.check()

    # ---- faults

    def names(self, *, down: bool | None = None) -> list[str]:
        return [name for name in self.swarm.services if down is None or self.swarm.is_down(name) == down]

    def trouble(self) -> None:
        """Something goes wrong, or comes right again."""
        acts: list[tuple[int, Callable[[], None]]] = [
            (4, self._crash),
            (3, self._leave),
            (4, self._restart),
            (3, self._stop),
            (3, self._continue),
            (2, self._slow_down),
            (2, self._cut_link),
            (1, self._mend_link),
            (1, self._drop_connection),
            (1, self._partition),
            (1, self._heal_partition),
        ]
        weights = [weight for weight, _ in acts]
        self.dice.choices([act for _, act in acts], weights)[0]()

    def _crash(self) -> None:
        if names := [name for name in self.names() if not self.world.node(name).crashed]:
            self._on(self.dice.choice(names), self.swarm.crash)

    def _leave(self) -> None:
        if names := [name for name in self.names(down=False) if not self.swarm.services[name].leaving]:
            self._on(self.dice.choice(names), lambda name: self.swarm.leave(name, self.dice.choice((1.0, 10.0))))

    def _restart(self) -> None:
        if names := [name for name in self.names() if self.world.node(name).crashed]:
            self._on(self.dice.choice(names), self.swarm.restart)

    def _stop(self) -> None:
        if names := self.names(down=False):
            self._on(self.dice.choice(names), self.swarm.stop)

    def _continue(self) -> None:
        if names := [name for name in self.names() if self.world.is_stopped(name)]:
            self._on(self.dice.choice(names), self.swarm.cont)

    def _slow_down(self) -> None:
        name = self.dice.choice(self.names())
        self._slow.add(name)
        self._on(name, lambda name: self.world.slow(name, self.dice.choice((1.0, 3.0, 10.0, 30.0))))

    def _on(self, name: str, act: Callable[[str], None]) -> None:
        self.troubled.add(name)
        act(name)

    def _pair(self) -> tuple[str, str]:
        one, other = self.dice.sample([node.name for node in self.world.nodes()], 2)
        self.troubled |= {one, other}
        return one, other

    def _cut_link(self) -> None:
        pair = self._pair()
        self._cut.add(pair)
        self.swarm.cut(*pair)

    def _mend_link(self) -> None:
        if self._cut:
            pair = self.dice.choice(sorted(self._cut))
            self._cut.discard(pair)
            self.swarm.mend_link(*pair)

    def _drop_connection(self) -> None:
        self.swarm.drop_connection(*self._pair())

    def _partition(self) -> None:
        everybody = [node.name for node in self.world.nodes()]
        apart = self.dice.sample(everybody, self.dice.randint(1, len(everybody) // 2))
        self.troubled.update(everybody)
        self.world.partition(apart)

    def _heal_partition(self) -> None:
        self.world.heal()

    def heal(self) -> None:
        """Everything is well again."""
        self.world.heal()
        for pair in sorted(self._cut):
            self.swarm.mend_link(*pair)
        for name in self.names():
            self.world.slow(name, 1.0)
            if self.swarm.services[name].leaving and not self.world.node(name).crashed:
                self.swarm.crash(name)  # what is left of its time is of no interest
            if self.world.node(name).crashed:
                self.swarm.restart(name)
            elif self.world.is_stopped(name):
                self.swarm.cont(name)

    async def wreak(self) -> None:
        """Faults for a while, safety checked after each, then none."""
        while (left_s := CHAOS_S - trio.current_time()) > 0:
            await trio.sleep(min(left_s, self.dice.expovariate(1.0)))
            self.trouble()
            self.check()
        self.heal()
        self.check()


def play(seed: int) -> World:
    """One schedule, from its seed alone."""

    async def scenario(world: World) -> None:
        dice = Random(f"schedule {seed}")
        swarm = ToySwarm(world)
        for index, (start, end) in enumerate(dice.choice(SPLITS)):
            for replica in range(REPLICAS):
                swarm.serve(f"n{index}{'abc'[replica]}", start, end, block_time_s=dice.choice((0.01, 0.02, 0.04)))
        chaos = Chaos(swarm, dice)
        clients = [f"client{number}" for number in range(dice.randint(2, 3))]
        for client in (*clients, "quitter"):
            swarm.add_client(client)

        async def quit_at_once(_: object) -> None:
            with trio.move_on_after(dice.uniform(0.0, CHAOS_S)):
                await chaos.requests("quitter", CHAOS_S)
            chaos.running.pop("quitter", None)

        world.start("quitter", quit_at_once)
        with trio.fail_after(CHAOS_S + HEALED_S):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(chaos.wreak)
                for client in clients:
                    nursery.start_soon(chaos.requests, client, CHAOS_S)
        assert chaos.n_finished >= len(clients)
        await trio.sleep(60.0)
        assert not swarm.left_over()

    links = LinkFaults(latency_s=0.01, jitter_s=0.005, loss=0.01)
    return run_world(seed, scenario, options=WorldOptions(link=links), limit_s=1000.0)


@pytest.mark.parametrize("seed", range(10))
def test_a_random_schedule(seed: int) -> None:
    play(seed)


@pytest.mark.slow
@pytest.mark.parametrize("tens", range(1, 20))
def test_ten_more_random_schedules(tens: int) -> None:
    for seed in range(10 * tens, 10 * tens + 10):
        try:
            play(seed)
        except BaseException as error:
            error.add_note(f"seed {seed}")
            raise


def test_a_schedule_follows_from_its_seed() -> None:
    assert play(3).digest() == play(3).digest()


# ---- churn -----------------------------------------------------------------------------------------------------------

LIFETIME_S = 60.0
REBIRTH_S = 5.0
CHURN_S = 600.0


@pytest.mark.slow
def test_ten_minutes_in_which_every_node_lives_for_one() -> None:
    """Four stretches with three replicas each, lives of 60 s on average: every request finishes with the right text."""

    async def scenario(world: World) -> None:
        swarm, dice = ToySwarm(world), Random("churn")
        for start in range(0, N_BLOCKS, 2):
            for letter in "abc":
                swarm.serve(f"{letter}{start}", start, start + 2, block_time_s=0.05)
        chaos, n_lives = Chaos(swarm, dice), 0

        async def live_and_die(name: str) -> None:
            nonlocal n_lives
            while True:
                await trio.sleep(dice.expovariate(1 / LIFETIME_S))
                n_lives += 1
                chaos.troubled.add(name)
                swarm.crash(name)
                chaos.check()
                await trio.sleep(REBIRTH_S)
                swarm.restart(name)

        clients = ("client0", "client1", "client2")
        for client in clients:
            swarm.add_client(client)
        async with trio.open_nursery() as deaths:
            for name in swarm.services:
                deaths.start_soon(live_and_die, name)
            async with trio.open_nursery() as nursery:
                for client in clients:
                    nursery.start_soon(chaos.requests, client, CHURN_S)
            deaths.cancel_scope.cancel()
        assert n_lives > 0.7 * len(swarm.services) * CHURN_S / (LIFETIME_S + REBIRTH_S)
        assert chaos.n_finished > 100

    run_world(60, scenario, limit_s=CHURN_S + 200.0)
