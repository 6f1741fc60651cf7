"""The trainer with real stages in virtual time: lost reports, dead peers, dead trainers, unequal speeds.

What is compared is the sum of gradients, bit for bit, with that of one process alone.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache
from random import Random

import msgspec
import pytest
import torch
import trio
from torch import Tensor

from mycel.node.training.ledger import Ledger
from mycel.node.training.stage_service import StageService
from mycel.protocols import ids
from mycel.protocols.borders import BorderCodec, decode_border, encode_border
from mycel.protocols.codec import pipe_codec
from mycel.protocols.errors import LocalProtocolError, PeerError
from mycel.protocols.messages import Message
from mycel.protocols.ports import Handler, Stream
from mycel.protocols.tensors import to_wire
from mycel.protocols.training import Backward, Drive, Passed, StageStatus, WorkFailed
from mycel.swarm.training import numbers
from mycel.swarm.training.bell import Bell
from mycel.swarm.training.lattice import to_float
from mycel.swarm.training.members import HEARTBEAT_S, Members
from mycel.swarm.training.pipeline import Pipeline, threaded
from mycel.swarm.training.plan import RunPlan
from mycel.swarm.training.walks import owned
from tests.sim.compute import SimCompute
from tests.sim.faults import LinkFaults
from tests.sim.toy_stage import VOCAB, ToyReference, ToySamples, ToyStage, ToyState, toy_plan, toy_reference
from tests.sim.transport import SimTransport
from tests.sim.world import World, run_world

GOSSIP_S = 0.005
# The run is over when nothing has changed for so long: whatever was delayed has come.
CALM_S = 12.0


@dataclass
class Faults:
    """What becomes of frames with replies, by chance; a late one comes after every deadline."""

    drop: float = 0.0
    double: float = 0.0
    delay: float = 0.0
    delay_s: tuple[float, float] = (3.0, 9.0)


class LossyStream:
    """A stream of the PIPE protocol whose replies meet with `Faults`. Real streams lose nothing: this is the worst."""

    def __init__(self, node: Node, stream: Stream) -> None:
        self._node, self._stream = node, stream
        self._speaking = trio.Lock()

    @property
    def peer(self) -> str:
        return self._stream.peer

    @property
    def protocol(self) -> str:
        return ids.PIPE

    async def send(self, *parts: bytes | memoryview) -> None:
        frame = bytearray().join(parts)
        message, _ = pipe_codec.decode(frame)
        self._node.swarm.said[type(message).__name__] += 1
        fate = self._node.swarm.fate(message)
        self._node.swarm.fates[fate] += 1
        if fate == "dropped":
            return
        if fate == "delayed":
            self._node.transport.start(self._send_late, frame)
            return
        for _ in range(1 + (fate == "doubled")):
            async with self._speaking:
                await self._stream.send(frame)

    async def _send_late(self, frame: bytearray) -> None:
        await trio.sleep(self._node.swarm.dice.uniform(*self._node.swarm.faults.delay_s))
        try:
            async with self._speaking:
                await self._stream.send(frame)
        except (PeerError, LocalProtocolError):
            pass  # the stream has ended meanwhile, there or here

    async def receive(self) -> memoryview | None:
        return await self._stream.receive()

    async def aclose(self) -> None:
        await self._stream.aclose()

    async def reset(self) -> None:
        await self._stream.reset()


@dataclass(eq=False)
class Node:
    """One peer: a stage, and maybe a trainer."""

    swarm: Swarm
    transport: SimTransport
    stage: ToyStage
    trains: bool
    members: Members = field(init=False)
    bell: Bell = field(default_factory=Bell)
    ledger: Ledger = field(init=False)
    service: StageService = field(init=False)
    pipeline: Pipeline | None = None
    state: str = "training"
    seq: int = 0
    told: StageStatus | None = None

    def __post_init__(self) -> None:
        swarm, transport = self.swarm, self.transport
        self._tap()
        self.members = Members(transport.peer_id, swarm.plan.run)
        self.ledger = Ledger(self.stage.n_elements)
        compute = SimCompute(swarm.world, transport.name)
        self.service = StageService(
            transport,
            swarm.plan,
            self.stage,
            self.ledger,
            self.members,
            compute,
            swarm.codec,
            VOCAB,
            self.event,
            self.bell,
        )
        if self.trains:
            self.pipeline = Pipeline(
                transport,
                swarm.plan,
                self.members,
                self.load,
                self.bell,
                self.event,
                Random(f"{transport.name} {swarm.world.seed}"),
                lambda: self.ledger.version,
                self.service,
                swarm.in_flight,
            )

    def _tap(self) -> None:
        open_stream, serve = self.transport.open, self.transport.serve

        async def open_lossy(peer: str, protocol: str) -> Stream:
            stream = await open_stream(peer, protocol)
            return LossyStream(self, stream) if protocol == ids.PIPE else stream

        def serve_lossy(protocol: str, handler: Handler) -> None:
            async def handle(stream: Stream) -> None:
                await handler(LossyStream(self, stream))

            serve(protocol, handle)

        self.transport.open = open_lossy  # type: ignore[method-assign,assignment]
        self.transport.serve = serve_lossy  # type: ignore[method-assign]

    @property
    def name(self) -> str:
        return self.transport.name

    def event(self, what: str, /, **fields: object) -> None:
        self.swarm.world.record(what, self.name, *(f"{key}={value}" for key, value in fields.items()))
        self.swarm.events.append((what, self.name, fields))

    async def load(self, first: int, count: int) -> Tensor:
        return ToySamples(self.swarm.plan.n_tokens).tokens(first, count)

    def status(self) -> StageStatus:
        return StageStatus(
            self.swarm.plan.run,
            0,
            self.stage.index,
            self.state,  # type: ignore[arg-type]
            self.ledger.version,
            counted=numbers.to_bytes(self.ledger.counted),
            trains=self.trains,
            queue_s=round(self.service.queue_s, 3),
            sequences_per_s=self.service.sequences_per_s,
            addresses=self.transport.addresses,
        )

    async def run(self, _: SimTransport) -> None:
        self.service.start()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self.service.run)
            nursery.start_soon(self._gossip)
            nursery.start_soon(self._resolve)
            if self.pipeline is not None:
                nursery.start_soon(self.pipeline.run)

    async def _gossip(self) -> None:
        """Tell everybody at every change, and as a heartbeat."""
        while True:
            seen = self.bell.count
            status = self.status()
            self.swarm.spread(self, status)
            with trio.move_on_after(HEARTBEAT_S):
                while msgspec.structs.replace(status, queue_s=0.0) == msgspec.structs.replace(
                    self.status(), queue_s=0.0
                ):
                    await self.bell.after(seen)
                    seen = self.bell.count

    async def _resolve(self) -> None:
        """Of two that have counted a number the one with the smaller id keeps it."""
        while True:
            seen = self.bell.count
            others = [
                member.counted
                for member in self.members.of_stage(self.stage.index)
                if member.peer < self.transport.peer_id and member.version == self.ledger.version
            ]
            double = 0
            for bits in others:
                double |= bits & self.ledger.counted
            if double:
                await self.service.uncount(double)
            else:
                await self.bell.after(seen)


def _news(status: StageStatus) -> StageStatus:
    """What others wait for; the rest comes along."""
    return msgspec.structs.replace(status, queue_s=0.0, sequences_per_s=0.0)


@dataclass
class Swarm:
    """Nodes in a world, and what passes between them beside the pipeline."""

    world: World
    plan: RunPlan
    faults: Faults = field(default_factory=Faults)
    codec: BorderCodec = "float32"
    in_flight: int = 64
    nodes: dict[str, Node] = field(default_factory=dict)
    events: list[tuple[str, str, dict[str, object]]] = field(default_factory=list)
    said: Counter[str] = field(default_factory=Counter)
    fates: Counter[str] = field(default_factory=Counter)
    changed: Bell = field(default_factory=Bell)

    def __post_init__(self) -> None:
        self.dice = Random(f"faults {self.world.seed}")

    def fate(self, message: Message) -> str:
        if not isinstance(message, Passed | Backward | WorkFailed):
            return "spared"
        rolled = self.dice.random()
        for fate, chance in (
            ("dropped", self.faults.drop),
            ("doubled", self.faults.double),
            ("delayed", self.faults.delay),
        ):
            if rolled < chance:
                return fate
            rolled -= chance
        return "sent"

    def add(
        self, name: str, stage: int, *, trains: bool = False, speed: float = 1.0, state: ToyState | None = None
    ) -> Node:
        toy = ToyStage(self.plan, stage, state or ToyState(self.plan, stage), 0.01 / speed, 0.02 / speed)
        node = self.nodes[name] = Node(self, self.world.add_node(name), toy, trains)
        self.world.start(name, node.run)
        return node

    def living(self) -> Iterator[Node]:
        return (node for node in self.nodes.values() if not node.transport.crashed)

    def of_stage(self, stage: int) -> list[Node]:
        return [node for node in self.living() if node.stage.index == stage]

    def spread(self, node: Node, status: StageStatus) -> None:
        node.seq += 1
        status = msgspec.structs.replace(status, seq=node.seq)
        sender = node.transport.peer_id

        def arrive(other: Node) -> None:
            if not other.transport.crashed and not node.transport.crashed:
                other.members.hear(sender, status, trio.current_time())
                other.bell.ring()

        for other in self.living():
            self.world.agenda.after(0.0 if other is node else GOSSIP_S, lambda other=other: arrive(other))
        self.changed.ring()

    def crash(self, name: str) -> None:
        gone = self.nodes[name].transport.peer_id
        self.world.crash(name)
        for other in self.living():

            def tell(other: Node = other) -> None:
                other.members.lose(gone)
                other.bell.ring()

            self.world.agenda.after(GOSSIP_S, tell)
        self.changed.ring()

    def is_whole(self) -> bool:
        """Every number is in exactly one living ledger of each stage."""
        for stage in range(self.plan.n_stages):
            union = total = 0
            for node in self.of_stage(stage):
                union |= node.ledger.counted
                total += node.ledger.counted.bit_count()
            if union != self.plan.everything or total != self.plan.n_microbatches:
                return False
        return True

    async def until(self, holds: Callable[[], bool], limit_s: float = 600.0) -> None:
        """Looked at whenever any of them says something, which is at every change and every second."""
        with trio.fail_after(limit_s):
            while True:
                seen = self.changed.count
                if holds():
                    return
                await self.changed.after(seen)

    async def until_whole(self, limit_s: float = 600.0) -> None:
        await self.until(self.is_whole, limit_s)

    async def step(self) -> None:
        """Make a step in place of the peers, each in its own time."""
        sums = [to_float(self.sum_of(stage)) for stage in range(self.plan.n_stages)]
        nodes = list(self.living())
        self.world.rng.shuffle(nodes)
        for node in nodes:
            await trio.sleep(self.world.rng.uniform(0.0, 0.05))
            node.stage.state.apply(sums[node.stage.index], 1.0)
            node.ledger.advance(node.ledger.version + 1)
            node.service.advance(node.ledger.version)
            node.bell.ring()

    def sum_of(self, stage: int) -> Tensor:
        total_P = torch.zeros_like(self.of_stage(stage)[0].ledger.sum.sum_P)
        for node in self.of_stage(stage):
            total_P += node.ledger.sum.sum_P
        return total_P

    def check_sums(self, version: int = 0) -> None:
        wanted = reference(self.plan, self.codec, version + 1)
        for stage in range(self.plan.n_stages):
            assert torch.equal(self.sum_of(stage), wanted.sums[version][stage]), f"stage {stage} of step {version}"
        losses = [loss for node in self.of_stage(self.plan.n_stages - 1) for loss in node.ledger.losses.values()]
        assert sum(losses) == pytest.approx(wanted.losses[version], rel=1e-12)

    def calls(self, stage: int, what: str, nodes: list[Node] | None = None) -> Counter[bytes]:
        """How often each microbatch was computed at a stage, by those that live and those that died."""
        found: Counter[bytes] = Counter()
        for node in self.nodes.values() if nodes is None else nodes:
            if node.stage.index == stage:
                for (kind, work), times in node.stage.calls.items():
                    if kind == what:
                        found[work] += times
        return found


@cache
def reference(plan: RunPlan, codec: BorderCodec, n_steps: int) -> ToyReference:
    def border(border_BTW: Tensor) -> Tensor:
        return decode_border(encode_border(border_BTW, codec), tuple(border_BTW.shape), codec)

    return toy_reference(plan, n_steps=n_steps, border=border)


def fill(swarm: Swarm, per_stage: int, *, trainers: tuple[str, ...] = ("s0a",)) -> None:
    """Peers s0a, s0b, ..., s1a, ..."""
    for stage in range(swarm.plan.n_stages):
        for letter in "abcdefgh"[:per_stage]:
            name = f"s{stage}{letter}"
            swarm.add(name, stage, trains=name in trainers)


# ---- without faults


def test_a_step_without_faults_computes_everything_once():
    async def scenario(world: World) -> None:
        swarm = Swarm(world, toy_plan(3, n_microbatches=24))
        fill(swarm, 2)
        await swarm.until_whole()
        swarm.check_sums()
        for stage in range(3):
            assert set(swarm.calls(stage, "backward").values()) == {1}
            assert len(swarm.calls(stage, "backward")) == 24
        counters = swarm.nodes["s0a"].pipeline.counters
        await trio.sleep(1.0)
        assert (counters.done, counters.replaced, counters.wasted, counters.resent) == (24, 0, 0, 0)
        assert 0.09 < counters.mean_s < 2.0

    run_world(1, scenario)


# ---- (a) lost, doubled and late replies


SLOW = pytest.mark.slow
SEEDS = [pytest.param(seed, marks=SLOW if seed > 1 else ()) for seed in range(8)]


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("codec", ["float32", "int8"])
def test_sums_are_equal_whatever_replies_are_lost_doubled_or_late(seed, codec):
    async def scenario(world: World) -> None:
        swarm = Swarm(world, toy_plan(3, n_microbatches=24), Faults(0.2, 0.1, 0.1), codec)
        fill(swarm, 2, trainers=("s0a", "s1b"))
        await swarm.until_whole()
        swarm.check_sums()
        await trio.sleep(CALM_S)  # what was late comes now, and changes nothing
        await swarm.until_whole()
        swarm.check_sums()
        assert min(swarm.fates[fate] for fate in ("dropped", "doubled", "delayed")) > 0

    run_world(seed, scenario)


# ---- (b) peers that die on the way


@pytest.mark.parametrize("moment", [pytest.param(1, marks=SLOW), 3, pytest.param(6, marks=SLOW)])
@pytest.mark.parametrize("stage", [0, 1, 2])
def test_only_what_a_dead_peer_had_is_computed_again(stage, moment):
    async def scenario(world: World) -> None:
        swarm = Swarm(world, toy_plan(3, n_microbatches=36))
        fill(swarm, 3)
        victim = swarm.nodes[f"s{stage}b"]
        await swarm.until(lambda: victim.ledger.counted.bit_count() >= moment)
        swarm.crash(victim.name)
        await swarm.until_whole()
        swarm.check_sums()
        assert sum(victim.stage.calls.values()) > 0
        for at in range(3):
            # Whoever lives has done all of it, once: also what the dead had counted, from inputs that were kept.
            for what in ("forward", "backward") if at < 2 else ("backward",):
                assert set(swarm.calls(at, what, swarm.of_stage(at)).values()) == {1}, (at, what)
                assert len(swarm.calls(at, what)) == 36
            if at != stage:
                assert set(swarm.calls(at, "backward").values()) == {1}
        assert 1 <= swarm.nodes["s0a"].pipeline.counters.replaced <= 36
        reasons = {fields["reason"] for what, _, fields in swarm.events if what == "work.replaced"}
        assert reasons <= {"is gone", "another has done it"} | {one for one in reasons if "(says " in str(one)}, reasons

    run_world(stage * 10 + moment, scenario)


@pytest.mark.parametrize("seed", [pytest.param(seed, marks=SLOW if seed else ()) for seed in range(4)])
def test_peers_of_all_stages_die_and_the_step_is_made(seed):
    async def scenario(world: World) -> None:
        swarm = Swarm(world, toy_plan(3, n_microbatches=24), Faults(0.1, 0.1, 0.1))
        fill(swarm, 3)
        victims = [f"s{stage}{letter}" for stage in range(3) for letter in "bc"]
        world.rng.shuffle(victims)
        for name in victims[:4]:
            await trio.sleep(world.rng.uniform(0.02, 0.2))
            swarm.crash(name)
        await swarm.until_whole()
        swarm.check_sums()

    run_world(seed, scenario)


def test_a_stage_that_has_lost_everybody_goes_on_when_somebody_comes():
    async def scenario(world: World) -> None:
        swarm = Swarm(world, toy_plan(3, n_microbatches=12))
        fill(swarm, 1)
        await swarm.until(lambda: swarm.nodes["s1a"].ledger.counted.bit_count() >= 3)
        swarm.crash("s1a")
        await trio.sleep(20.0)
        assert not swarm.is_whole()
        swarm.add("s1b", 1)
        began_s = trio.current_time()
        await swarm.until_whole()
        assert trio.current_time() - began_s < 5.0
        swarm.check_sums()

    run_world(5, scenario)


# ---- (c) trainers that die, come and go


@pytest.mark.parametrize("seed", [pytest.param(seed, marks=SLOW if seed else ()) for seed in range(3)])
def test_the_numbers_of_a_dead_trainer_are_driven_by_others(seed):
    async def scenario(world: World) -> None:
        swarm = Swarm(world, toy_plan(3, n_microbatches=30))
        fill(swarm, 2, trainers=("s0a", "s1b", "s2a"))
        dead = swarm.nodes["s1b"]
        trainers = sorted(node.transport.peer_id for node in swarm.living() if node.trains)
        share = owned(swarm.plan, 0, trainers, dead.transport.peer_id)
        await swarm.until(lambda: dead.pipeline.counters.done >= 3)
        assert dead.pipeline.counters.done < share.bit_count()
        swarm.crash("s1b")
        await swarm.until_whole()
        swarm.check_sums()
        await trio.sleep(1.0)
        living = [swarm.nodes[name].pipeline for name in ("s0a", "s2a")]
        assert sum(pipeline.counters.done for pipeline in living) >= 30 - dead.pipeline.counters.done
        assert trio.current_time() < 8.0, "nobody waited for a deadline"

    run_world(seed, scenario)


def test_a_trainer_that_joins_drives_from_the_next_step_on():
    async def scenario(world: World) -> None:
        swarm = Swarm(world, toy_plan(2, n_microbatches=40))
        fill(swarm, 1)
        await swarm.until(lambda: swarm.nodes["s0a"].pipeline.counters.done >= 3)
        late = swarm.add("s1b", 1, trains=True)
        late.state = "observing"
        await swarm.until_whole()
        swarm.check_sums()
        assert late.pipeline.counters.done == 0
        await swarm.step()
        late.state = "training"
        await swarm.until_whole()
        swarm.check_sums(1)
        assert late.pipeline.counters.done > 5

    run_world(2, scenario)


# ---- (d) unequal speeds, slow links


def test_work_is_shared_by_speed():
    async def scenario(world: World) -> None:
        swarm = Swarm(world, toy_plan(2, n_microbatches=400))
        swarm.add("first", 0, trains=True, speed=16.0)
        speeds = {f"x{speed:g}": speed / 4.0 for speed in (1.0, 2.0, 4.0, 8.0)}
        nodes = {name: swarm.add(name, 1, speed=speed) for name, speed in speeds.items()}
        warm = 80
        await swarm.until(lambda: swarm.nodes["first"].pipeline.counters.done >= warm)
        before = {name: node.ledger.counted.bit_count() for name, node in nodes.items()}
        began_s = trio.current_time()
        await swarm.until(lambda: swarm.nodes["first"].pipeline.counters.done >= 360)  # the end waits for the slowest
        done = {name: node.ledger.counted.bit_count() - before[name] for name, node in nodes.items()}
        rate = sum(done.values()) / (trio.current_time() - began_s)
        ideal = sum(speeds.values()) / 0.02
        assert rate >= 0.97 * ideal, f"{rate:.0f} of {ideal:.0f} microbatches a second"
        for name, speed in speeds.items():
            assert done[name] / sum(done.values()) == pytest.approx(speed / sum(speeds.values()), abs=0.02)
        await swarm.until_whole()
        swarm.check_sums()
        assert swarm.nodes["first"].pipeline.counters.replaced == 0

    run_world(4, scenario)


@SLOW
def test_slow_links_are_filled_and_slow_peers_are_not_flooded():
    async def scenario(world: World) -> None:
        swarm = Swarm(world, toy_plan(2, n_microbatches=400), in_flight=100)
        swarm.add("first", 0, trains=True, speed=4.0)
        swarm.add("second", 1)
        world.link("first", "second", LinkFaults(latency_s=0.1))
        pipeline = swarm.nodes["first"].pipeline
        await swarm.until(lambda: pipeline.counters.done >= 100)
        began_s = trio.current_time()
        most = pipeline.counters.in_flight
        await swarm.until(lambda: pipeline.counters.done >= 300)
        assert 200 / (trio.current_time() - began_s) >= 0.9 / 0.02
        assert 10 <= most <= 20
        world.slow("second", 20.0)
        await trio.sleep(30.0)
        assert pipeline.counters.in_flight <= 20

    run_world(4, scenario)


# ---- steps, streams, rules


def test_steps_follow_each_other_with_peers_that_are_ahead_and_behind():
    async def scenario(world: World) -> None:
        swarm = Swarm(world, toy_plan(3, n_microbatches=10, n_steps=4), Faults(0.05, 0.1, 0.0))
        fill(swarm, 2, trainers=("s0a", "s2b"))
        wanted = reference(swarm.plan, "float32", 4)
        for version in range(4):
            await swarm.until_whole()
            swarm.check_sums(version)
            await swarm.step()
            for node in swarm.living():
                assert node.stage.state.params_digest() == wanted.digests[version + 1][node.stage.index]
        done = sum(swarm.nodes[name].pipeline.counters.done for name in ("s0a", "s2b"))
        await trio.sleep(CALM_S)
        assert sum(swarm.nodes[name].pipeline.counters.done for name in ("s0a", "s2b")) == done, "the run is over"
        assert all(node.pipeline.counters.in_flight == 0 for node in swarm.living() if node.pipeline is not None)

    run_world(7, scenario)


def test_streams_that_break_are_opened_anew():
    async def scenario(world: World) -> None:
        swarm = Swarm(world, toy_plan(3, n_microbatches=30))
        fill(swarm, 2)
        trainer = swarm.nodes["s0a"]
        for name in ("s1a", "s2b", "s0b"):
            await swarm.until(lambda name=name: swarm.nodes[name].ledger.counted.bit_count() >= 3)
            other = world.node(name)
            connection = trainer.transport._connections[other.peer_id]
            connection.lose(trainer.transport, "reset by the test")
            connection.lose(other, "reset by the test")
        await swarm.until_whole()
        swarm.check_sums()
        assert {fields["peer"] for what, _, fields in swarm.events if what == "work.link_lost"} == {
            swarm.nodes[name].transport.peer_id for name in ("s1a", "s2b", "s0b")
        }

    run_world(3, scenario)


@pytest.mark.parametrize("lie", ["no message", "a message that is none of its", "a stage that there is not", "tensors"])
def test_a_peer_that_breaks_the_rules_is_hung_up_on_and_passed_over(lie):
    async def scenario(world: World) -> None:
        swarm = Swarm(world, toy_plan(2, n_microbatches=12))
        fill(swarm, 2)
        liar = swarm.nodes["s1b"]

        async def serve(stream: Stream) -> None:
            await stream.receive()
            await trio.sleep(0.05)
            work = swarm.plan.work(0, 0).id
            frames = {
                "no message": [b"\x01\x02"],
                "a message that is none of its": pipe_codec.encode(Drive(swarm.plan.run)),
                "a stage that there is not": pipe_codec.encode(Passed(work, 1, 9, backward=True)),
                "tensors": pipe_codec.encode(Passed(work, 1, 1, backward=True), [to_wire(torch.zeros(1))]),
            }
            await stream.send(*frames[lie])
            await trio.sleep_forever()

        world.start("s1b", lambda transport: _replace_service(transport, serve))
        await swarm.until_whole()
        swarm.check_sums()
        assert liar.ledger.counted == 0
        lost = [fields for what, _, fields in swarm.events if what == "work.link_lost"]
        assert lost
        assert {fields["peer"] for fields in lost} == {liar.transport.peer_id}

    run_world(1, scenario)


async def _replace_service(transport: SimTransport, serve: Handler) -> None:
    await trio.sleep(0.0)
    transport.serve(ids.PIPE, serve)


def test_samples_are_read_on_a_thread():
    async def main() -> Tensor:
        return await threaded(ToySamples(3))(5, 2)

    assert torch.equal(trio.run(main), ToySamples(3).tokens(5, 2))


@SLOW
@pytest.mark.parametrize("seed", range(100, 120))
def test_chaos_gives_the_same_sums(seed):
    """Lost, doubled and late replies, slow and stopped peers, broken streams, deaths: all at once."""

    async def scenario(world: World) -> None:
        rng = world.rng
        plan, codec = toy_plan(rng.choice((2, 3, 4)), n_microbatches=20), rng.choice(("float32", "int8"))
        swarm = Swarm(world, plan, Faults(0.2, 0.1, 0.1), codec)
        fill(swarm, 3, trainers=("s0a", "s1a"))
        for stage in range(swarm.plan.n_stages):
            world.slow(f"s{stage}c", rng.choice((1.0, 3.0, 30.0)))
        for _ in range(4):
            await trio.sleep(rng.uniform(0.05, 1.0))
            name = f"s{rng.randrange(swarm.plan.n_stages)}{rng.choice('bc')}"
            if swarm.nodes[name].transport.crashed:
                continue
            if rng.random() < 0.6:
                swarm.crash(name)
            else:
                world.stop(name)
                await trio.sleep(rng.uniform(0.5, 4.0))
                world.cont(name)
        if rng.random() < 0.5 and len(swarm.of_stage(1)) > 1:
            swarm.crash("s1a")
        await swarm.until_whole(1200.0)
        swarm.check_sums()
        await trio.sleep(CALM_S)
        await swarm.until_whole()
        swarm.check_sums()

    run_world(seed, scenario)
