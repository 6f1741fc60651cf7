"""Steps in a simulated swarm: whoever dies at whatever moment, all peers of a stage hold what one process alone gets.

In place of the pipeline a filler has peers count what is missing, with the true gradients, some of it twice.
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache

import msgspec
import pytest
import torch
import trio

from mycel.node.training.gossip import Gossip
from mycel.node.training.ledger import Ledger
from mycel.node.training.reducing import Reducer, TiedEnd
from mycel.node.training.stepping import StepDone, Stepper
from mycel.node.training.sum_table import SumTable
from mycel.node.training.sums import SumClient, SumService
from mycel.protocols.errors import PeerUnreachable
from mycel.protocols.messages import PeerAddress
from mycel.protocols.training import StageState, StageStatus
from mycel.swarm.training import numbers
from mycel.swarm.training.bell import Bell
from mycel.swarm.training.lattice import to_float
from mycel.swarm.training.members import Members
from mycel.swarm.training.plan import RunPlan
from tests.sim.compute import SimCompute
from tests.sim.faults import LinkFaults, WorldOptions
from tests.sim.toy_stage import TABLE, ToySamples, ToyStage, ToyState, _step, toy_plan, toy_reference
from tests.sim.world import World, run_world

CLIP = 0.05
LATENCY_S = 0.005


@dataclass(frozen=True)
class Truth:
    """Of each version and stage the gradient and loss of every number, and the digests after each step."""

    plan: RunPlan
    tied: bool
    grads: dict[tuple[int, int, int], tuple[torch.Tensor, float]]
    digests: list[tuple[bytes, ...]]
    losses: list[float]


@cache
def truth(n_stages: int, n_steps: int, *, tied: bool) -> Truth:
    """What one process alone gets, and each microbatch's share of it."""
    plan = toy_plan(n_stages, n_steps=n_steps)
    reference = toy_reference(plan, tied=tied, clip=CLIP)
    states = [ToyState(plan, index, tied=tied) for index in range(n_stages)]
    stages = [ToyStage(plan, index, state) for index, state in enumerate(states)]
    samples, grads = ToySamples(plan.n_tokens), {}
    for version in range(n_steps):
        assert tuple(state.params_digest() for state in states) == reference.digests[version]
        for number in range(plan.n_microbatches):
            work = plan.work(version, number)
            tokens_BT1, inputs = samples.tokens(work.first, work.count), [None]
            for stage in stages[:-1]:
                inputs.append(stage.forward(work.id, tokens_BT1, inputs[-1]))
            grad_BTW = None
            for stage in reversed(stages):
                backpass = stage.backward(work.id, tokens_BT1, inputs[stage.index], grad_BTW)
                grads[version, stage.index, number] = backpass.grad_P.clone(), backpass.loss
                grad_BTW = backpass.grad_BTW
        _apply(states, stages, reference.sums[version], tied=tied)
    return Truth(plan, tied, grads, reference.digests, reference.losses)


def _apply(states, stages, sums, *, tied: bool) -> None:
    """The step, by the toy's own arithmetic."""
    _step(stages, [to_float(total) for total in sums], CLIP)
    assert all(state.tied == tied for state in states)


@dataclass(eq=False)
class Node:
    """One life of a peer."""

    swarm: Swarm
    name: str
    stage: int
    stepper: Stepper
    gossip: Gossip
    state: ToyState
    ledger: Ledger
    compute: SimCompute
    bell: Bell
    done: list[StepDone] = field(default_factory=list)
    events: list[tuple[str, dict]] = field(default_factory=list)
    uncounted: int = 0

    async def main(self, transport) -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self.gossip.run)
            await trio.lowlevel.checkpoint()
            await self.stepper.run()
            nursery.cancel_scope.cancel()

    # ---- StageWork

    def advance(self, version: int) -> None:
        self.swarm.check(self)

    async def uncount(self, bits: int) -> None:
        for number in numbers.members(bits):
            version = self.ledger.version
            found = self.swarm.truth.grads.get((version, self.stage, number))

            def job(number=number, version=version, found=found) -> None:
                if found is not None:
                    self.uncounted += self.ledger.uncount(version, number, found[0])

            await self.compute.run(job, cost_s=0.02)

    async def count(self, version: int, number: int) -> None:
        grad_P, loss = self.swarm.truth.grads[version, self.stage, number]

        def job() -> bool:
            if self.stepper.state != "training":
                return False
            return self.ledger.count(version, number, grad_P, loss)

        if (await self.compute.run(job, cost_s=0.02)).value:
            self.bell.ring()

    # ---- FetchState: as state sync does, at once

    async def fetch(self, version: int | None) -> int:
        await trio.sleep(0.2)
        mates = [
            node
            for node in self.swarm.alive(self.stage)
            if node is not self
            and node.stepper.state != "joining"
            and not self.swarm.world.is_cut(self.name, node.name)
        ]
        if version is None:
            donors = sorted(mates, key=lambda node: -node.stepper.version)
        else:
            donors = [node for node in mates if node.state.version == version]
        if donors:
            data, at = donors[0].state.snapshot(), donors[0].state.version
        elif version is None and mates:
            raise PeerUnreachable("", "nobody gives a state")
        else:
            kept = self.swarm.kept[self.stage]
            at = version if version in kept else max(kept)
            data = kept[at]
        await self.compute.run(lambda: self.state.load(data, at), cost_s=0.01)
        return at

    def described(self) -> StageStatus:
        kept = max(self.swarm.kept[self.stage])
        return msgspec.structs.replace(
            self.stepper.status(), trains=True, kept=kept, addresses=self.gossip.transport.addresses
        )


class Swarm:
    """All peers of a run, the checkpoints that they share, and the filler."""

    def __init__(self, world: World, n_stages: int, *, n_steps: int = 4, tied: bool = False, duplicates: float = 0.0):
        self.world, self.truth = world, truth(n_stages, n_steps, tied=tied)
        self.plan, self.duplicates = self.truth.plan, duplicates
        self.nodes: dict[str, Node] = {}
        self.rng = random.Random(f"filler {world.seed}")
        self.filling = True
        self.digests: dict[tuple[int, int], set[bytes]] = defaultdict(set)
        self.kept: dict[int, dict[int, memoryview]] = {
            stage: {0: ToyState(self.plan, stage, tied=tied).snapshot()} for stage in range(n_stages)
        }
        self.checkpoint_every = 0
        world.nursery.start_soon(self._fill)

    def add(self, name: str, stage: int, state: StageState = "observing", *, life=None) -> Node:
        transport = life or self.world.add_node(name)
        plan, me = self.plan, transport.peer_id
        bell, members, compute = Bell(), Members(me, plan.run), SimCompute(self.world, name)
        held = ToyState(plan, stage, tied=self.truth.tied)
        toy = ToyStage(plan, stage, held)
        ledger, table = Ledger(toy.n_elements), SumTable(toy.n_elements, toy.tied)
        client = SumClient(transport, plan.run)
        end = None
        if toy.tied is not None:
            last = ToyState(plan, plan.n_stages - 1, tied=True)
            end = TiedEnd(plan.n_stages - 1, len(last.params_P) - TABLE) if stage == 0 else TiedEnd(0, 0)
        reducer = Reducer(me, stage, ledger, compute, table, client, bell, end, counts_tied=stage == 0)
        node: Node

        def event(what: str, /, **fields: object) -> None:
            node.events.append((what, fields))
            self.world.record(what, name, *(str(value) for value in fields.values()))

        def described() -> StageStatus:
            return node.described()

        gossip = Gossip(transport, plan, members, described, bell, event, unix_time_s=self.world.unix_time_s)

        async def keep(version: int) -> None:
            if self.checkpoint_every and version % self.checkpoint_every == 0:
                self.kept[stage][version] = (await compute.run(held.snapshot)).value

        async def fetch(version: int | None) -> int:
            return await node.fetch(version)

        class Work:
            def advance(self, version: int) -> None:
                node.advance(version)

            async def uncount(self, bits: int) -> None:
                await node.uncount(bits)

        stepper = Stepper(
            plan, members, bell, gossip.say, held, reducer, Work(), fetch, event, CLIP, (keep,), state=state
        )
        node = Node(self, name, stage, stepper, gossip, held, ledger, compute, bell)
        stepper.on_step = node.done.append
        SumService(transport, plan.run, stage, ledger, table, compute, bell).start()
        self.nodes[name] = node
        self.world.start(name, node.main)
        for other in self.world.nodes():
            if other is not transport:
                gossip.meet(PeerAddress(other.peer_id, other.addresses))
        return node

    def alive(self, stage: int | None = None) -> list[Node]:
        """Those whose program runs, oldest first."""
        return [n for n in self.nodes.values() if stage in (None, n.stage) and not self.world.node(n.name).crashed]

    def peer(self, name: str) -> str:
        return self.world.node(name).peer_id

    def fetches(self) -> list[tuple[str, object]]:
        """Who got another state, and why."""
        return [
            (node.name, told["reason"])
            for node in self.nodes.values()
            for what, told in node.events
            if what == "step.fetch"
        ]

    # ---- safety

    def check(self, node: Node) -> None:
        """Called at every new version of every peer: it has the parameters that one process alone would have."""
        if node.state.version == node.stepper.version:
            self.digests[node.stage, node.state.version].add(node.state.params_digest())
            assert len(self.digests[node.stage, node.state.version]) == 1, "two peers of a stage have stepped apart"
            assert node.state.params_digest() == self.truth.digests[node.state.version][node.stage]

    async def reach(self, version: int, *, within_s: float = 60.0, nodes: Callable[[], list[Node]] | None = None):
        """Until all who live have made so many steps."""
        with trio.fail_after(within_s):
            await until(
                lambda: all(
                    n.stepper.version >= version and n.stepper.state != "joining" for n in (nodes or self.alive)()
                )
            )

    # ---- the filler: what trainers and the pipeline do, as far as sums can tell

    async def _fill(self) -> None:
        while True:
            await trio.sleep(0.02)
            for version in {node.stepper.version for node in self.alive()}:
                if self.filling and version < self.plan.n_steps:
                    for side in self._sides():
                        self._fill_version(version, side)

    def _sides(self) -> list[list[Node]]:
        """Groups that see each other."""
        sides: dict[int, list[Node]] = defaultdict(list)
        for node in self.alive():
            if not self.world.is_stopped(node.name):
                sides[self.world._sides.get(node.name, 0)].append(node)
        return list(sides.values())

    def _fill_version(self, version: int, side: list[Node]) -> None:
        ready = {
            stage: [
                n for n in side if n.stage == stage and n.stepper.version == version and n.stepper.state == "training"
            ]
            for stage in range(self.plan.n_stages)
        }
        if not all(ready.values()):
            return  # no microbatch finds its way
        for stage, nodes in ready.items():
            # A trainer knows what peers have said, so some of it is counted once more.
            seen = self.rng.choice(nodes)
            counted = seen.ledger.counted
            for mate in seen.stepper.members.of_stage(stage):
                counted |= mate.counted if mate.version == version and mate.peer != seen.stepper.members.me else 0
            missing = list(numbers.members(self.plan.everything & ~counted))
            if missing and not any(version in n.stepper.table.finals for n in nodes):
                number = self.rng.choice(missing)
                chosen = [self.rng.choice(nodes)]
                if self.rng.random() < self.duplicates:
                    chosen = nodes
                for node in chosen:
                    self.world.node(node.name).start(node.count, version, number)


async def until(is_so: Callable[[], bool], look_s: float = 0.01) -> None:
    while not is_so():  # noqa: ASYNC110 - virtual time, and a condition over many nodes
        await trio.sleep(look_s)


def simulate(seed: int, scenario, *, link: LinkFaults | None = None, limit_s: float = 600.0) -> World:
    options = WorldOptions(link=link or LinkFaults(latency_s=LATENCY_S, jitter_s=0.01))
    return run_world(seed, scenario, options=options, limit_s=limit_s)


def fill_stages(swarm: Swarm, *sizes: int) -> None:
    for stage, size in enumerate(sizes):
        for index in range(size):
            swarm.add(f"{'abcd'[index]}{stage}", stage)


# ---- nothing goes wrong


@pytest.mark.parametrize(("sizes", "tied"), [((1,), False), ((2, 3, 2), False), ((2, 2), True), ((3, 1, 2), True)])
def test_all_peers_get_what_one_process_alone_gets(sizes: tuple[int, ...], tied: bool):
    async def scenario(world: World) -> None:
        swarm = Swarm(world, len(sizes), tied=tied, duplicates=0.3)
        fill_stages(swarm, *sizes)
        await swarm.reach(4)
        for stage in range(len(sizes)):
            assert swarm.digests[stage, 4] == {swarm.truth.digests[4][stage]}
        for node in swarm.alive():
            assert [one.version for one in node.done] == [1, 2, 3, 4]
            losses = [one.loss * swarm.plan.step_tokens for one in node.done]
            assert losses == pytest.approx(swarm.truth.losses)
            assert node.stepper.decision.reason == "all 4 steps are made"
        if sum(sizes) > len(sizes):
            assert sum(node.uncounted for node in swarm.alive()) == sum(
                done.duplicates for node in swarm.alive() for done in node.done
            )

    simulate(7, scenario)


# ---- somebody dies


@cache
def moments(sizes: tuple[int, ...], *, tied: bool) -> tuple[float, ...]:
    """When something happens in the first two steps: a question or an answer about sums, a new version."""
    log = _walk(sizes, tied=tied)
    times = {
        entry[0]
        for entry in log
        if entry[1] == "step.done" or (entry[1] == "frame" and str(entry[4]).startswith("/mycel/reduce/"))
    }
    second = sorted(entry[0] for entry in log if entry[1] == "step.done" and entry[3] == "2")
    return tuple(sorted(time for time in times if time <= second[-1]))


def _walk(sizes: tuple[int, ...], *, tied: bool, victim: str = "", at_s: float = 0.0):
    async def scenario(world: World) -> None:
        swarm = Swarm(world, len(sizes), tied=tied, duplicates=0.2)
        fill_stages(swarm, *sizes)
        if victim:
            world.agenda.after(at_s, lambda: world.crash(victim))
        await swarm.reach(4)
        assert swarm.fetches() == [], "nobody had to go back, or to get its state from others"

    return simulate(11, scenario).log


KILLS = [(sizes, tied, victim) for sizes, tied in (((2, 2, 2), False), ((2, 2), True)) for victim in ("a0", "b1")]


@pytest.mark.parametrize(("sizes", "tied", "victim"), KILLS[-2:])
def test_whenever_a_peer_dies_the_others_make_the_same_steps(sizes: tuple[int, ...], tied: bool, victim: str):
    times = moments(sizes, tied=tied)
    for at_s in times[:: len(times) // 4]:
        _walk(sizes, tied=tied, victim=victim, at_s=at_s + 1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(("sizes", "tied", "victim"), KILLS)
def test_whenever_a_peer_dies_the_others_make_the_same_steps_thoroughly(sizes, tied: bool, victim: str):
    times = moments(sizes, tied=tied)
    for at_s in times[:: max(1, len(times) // 10)]:
        _walk(sizes, tied=tied, victim=victim, at_s=at_s)


def test_what_the_dead_alone_had_counted_is_counted_again():
    """It dies when everything is counted, before anybody has asked it."""

    async def scenario(world: World) -> None:
        swarm = Swarm(world, 2)
        fill_stages(swarm, 2, 2)
        victim = swarm.nodes["b0"]
        await until(lambda: sum(n.ledger.counted for n in swarm.alive(0)) == swarm.plan.everything, 0.001)
        alone = victim.ledger.counted
        world.crash("b0")
        await swarm.reach(1)
        assert swarm.nodes["a0"].stepper.version == 1
        assert alone
        assert swarm.digests[0, 1] == {swarm.truth.digests[1][0]}

    simulate(3, scenario)


def test_the_last_of_a_stage_dies_and_everybody_goes_back_to_the_checkpoint():
    async def scenario(world: World) -> None:
        swarm = Swarm(world, 2)
        swarm.checkpoint_every = 2
        fill_stages(swarm, 2, 1)
        await swarm.reach(3)
        world.crash("a1")
        await trio.sleep(1.0)
        swarm.add("b1", 1, "joining")
        await swarm.reach(4)
        restored = [fields["to"] for node in swarm.alive(0) for what, fields in node.events if what == "step.fetch"]
        assert restored == [2, 2]
        assert [one.version for one in swarm.nodes["b1"].done] == [3, 4]

    simulate(5, scenario)


# ---- somebody comes back, or is apart for a while


def test_a_newcomer_observes_and_trains_from_its_next_step_on():
    async def scenario(world: World) -> None:
        swarm = Swarm(world, 2)
        fill_stages(swarm, 1, 2)
        await swarm.reach(1)
        node = swarm.add("d0", 0, "joining")
        states: dict[str, int] = {}
        while node.stepper.version < 3:
            states.setdefault(node.stepper.state, node.stepper.version)
            await trio.sleep(0.002)
        assert list(states) == ["joining", "observing", "training"]
        assert states["training"] == states["observing"] + 1
        assert node.done[0].taken, "an observer takes the sum"
        await swarm.reach(4)

    simulate(9, scenario)


def test_a_partition_heals_and_both_halves_have_made_the_same_steps():
    async def scenario(world: World) -> None:
        swarm = Swarm(world, 2, tied=True)
        fill_stages(swarm, 2, 2)
        await swarm.reach(1)
        world.partition(["a0", "a1"], ["b0", "b1"])
        await swarm.reach(2)
        world.heal()
        await swarm.reach(4)
        assert swarm.fetches() == []

    simulate(13, scenario)


def test_who_missed_up_to_two_steps_catches_up_by_sums():
    async def scenario(world: World) -> None:
        swarm = Swarm(world, 2)
        fill_stages(swarm, 2, 2)
        await swarm.reach(1)
        world.stop("b0")
        await swarm.reach(3, nodes=lambda: [n for n in swarm.alive() if n.name != "b0"])
        swarm.filling = False
        await trio.sleep(10.0)
        world.cont("b0")
        await swarm.reach(3)
        late = swarm.nodes["b0"]
        assert [done.taken for done in late.done[-2:]] == [True, True]
        assert swarm.fetches() == []
        swarm.filling = True
        await swarm.reach(4)

    simulate(17, scenario)


def test_who_missed_more_fetches_the_state():
    async def scenario(world: World) -> None:
        swarm = Swarm(world, 1, n_steps=6)
        fill_stages(swarm, 2)
        await swarm.reach(1)
        world.stop("b0")
        await swarm.reach(5, nodes=lambda: [swarm.nodes["a0"]])
        world.cont("b0")
        await swarm.reach(6)
        assert [name for name, _ in swarm.fetches()] == ["b0"]

    simulate(19, scenario)


def test_a_leaver_finishes_the_step_and_is_not_missed():
    async def scenario(world: World) -> None:
        swarm = Swarm(world, 2)
        fill_stages(swarm, 2, 2)
        await swarm.reach(1)
        leaver = swarm.nodes["b0"]
        await trio.sleep(0.05)
        at = leaver.stepper.version
        await leaver.stepper.leave()
        assert leaver.stepper.version == at + 1
        await swarm.reach(4, nodes=lambda: [n for n in swarm.alive() if n is not leaver])
        assert leaver.stepper.version == at + 1

    simulate(23, scenario)


# ---- something is wrong


def test_a_sum_that_differs_is_noticed_and_that_of_most_taken(monkeypatch: pytest.MonkeyPatch):
    async def scenario(world: World) -> None:
        swarm = Swarm(world, 1)
        fill_stages(swarm, 3)
        liar = min(swarm.alive(), key=lambda node: swarm.peer(node.name))
        finish, bent = liar.stepper.table.finish, []

        def bend(final) -> None:
            if not bent:
                bent.append(final)
                values = final.sum_P.clone()
                values[5] += 1e-3
                wrong = msgspec.structs.replace(final.reduced, digest=bytes(32))
                final = type(final)(values, final.own_tied, wrong)
            finish(final)

        monkeypatch.setattr(
            type(liar.stepper.table),
            "finish",
            lambda table, final: bend(final) if table is liar.stepper.table else original(table, final),
        )
        await swarm.reach(4)
        assert bent
        assert liar.done[0].taken

    original = SumTable.finish
    simulate(29, scenario)


def test_parameters_that_differ_are_noticed_and_the_state_fetched():
    async def scenario(world: World) -> None:
        swarm = Swarm(world, 1)
        fill_stages(swarm, 3)
        await swarm.reach(1)
        broken = swarm.nodes["c0"]
        check, swarm.check = swarm.check, lambda node: None if node is broken else check(node)  # type: ignore[method-assign]
        broken.state.params_P[3] += 1.0
        await swarm.reach(4)
        assert swarm.fetches() == [("c0", f"has other parameters after {broken.done[1].version} steps than its stage")]
        assert broken.state.params_digest() == swarm.truth.digests[4][0]

    simulate(31, scenario)


def _disturb(swarm: Swarm, rng: random.Random) -> None:
    world, drawn, alive = swarm.world, rng.random(), swarm.alive()
    if drawn < 0.4 and len(alive) > 2:
        world.crash(rng.choice(alive).name)
    elif drawn < 0.6:
        world.partition([node.name for node in alive if rng.random() < 0.5])
    elif drawn < 0.7:
        world.stop(rng.choice(alive).name)
    else:
        world.heal()


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4))
def test_while_peers_come_and_go_all_the_time_there_is_one_history(seed: int):
    """Crashes, newcomers, pauses and partitions; at the end everybody alive has made all steps."""

    async def scenario(world: World) -> None:
        swarm = Swarm(world, 2, n_steps=12, tied=bool(seed % 2), duplicates=0.2)
        swarm.checkpoint_every = 3
        fill_stages(swarm, 3, 3)
        for born in range(12):
            await trio.sleep(world.rng.uniform(0.1, 1.5))
            _disturb(swarm, world.rng)
            if world.rng.random() < 0.5:
                swarm.add(f"n{born}", world.rng.randrange(2), "joining")
        world.heal()
        for node in filter(lambda node: world.is_stopped(node.name), swarm.alive()):
            world.cont(node.name)
        for stage in range(2):
            if not swarm.alive(stage):
                swarm.add(f"z{stage}", stage, "joining")
        for other in swarm.alive():  # as the directory does: everybody is named again
            for node in swarm.alive():
                other.gossip.meet(PeerAddress(swarm.peer(node.name), world.node(node.name).addresses))
        await swarm.reach(12, within_s=300.0)

    simulate(100 + seed, scenario, limit_s=900.0)
