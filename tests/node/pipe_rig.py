"""Stages of a toy model in the simulated world, and a trainer that a test plays."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass, field
from random import Random

import torch
import trio
from torch import Tensor

from mycel.node.training.ledger import Ledger
from mycel.node.training.stage_service import StageService
from mycel.protocols import ids
from mycel.protocols.codec import pipe_codec
from mycel.protocols.errors import LocalProtocolError, PeerError
from mycel.protocols.messages import PeerAddress
from mycel.protocols.ports import Handler, Stream
from mycel.protocols.tensors import to_wire
from mycel.protocols.training import Drive, Forward, Passed, StageStatus, Way, WorkFailed
from mycel.protocols.wire import WireTensor
from mycel.swarm.training import numbers
from mycel.swarm.training.bell import Bell
from mycel.swarm.training.lattice import GradientSum
from mycel.swarm.training.members import Members
from mycel.swarm.training.plan import RunPlan
from tests.sim.compute import SimCompute
from tests.sim.toy_stage import VOCAB, ToySamples, ToyStage, ToyState, toy_plan, toy_reference
from tests.sim.transport import SimTransport
from tests.sim.world import World, run_world

Report = Passed | WorkFailed


@dataclass
class Weather:
    """What befalls each frame that a node sends on a stream of PIPE: swallowed, said twice, or said again later."""

    dice: Random
    drop: float = 0.0
    twice: float = 0.0
    late: float = 0.0
    late_s: float = 0.5

    def over(self, world: World, transport: SimTransport) -> None:
        """Put it between a node's transport and all who use it, before they do."""
        open_stream, serve = transport.open, transport.serve

        async def open_weathered(peer: str, protocol: str) -> Stream:
            return WeatheredStream(self, world, await open_stream(peer, protocol))

        def serve_weathered(protocol: str, handler: Handler) -> None:
            async def handle(stream: Stream) -> None:
                await handler(WeatheredStream(self, world, stream))

            serve(protocol, handle)

        transport.open = open_weathered  # type: ignore[method-assign,assignment]
        transport.serve = serve_weathered  # type: ignore[method-assign]


@dataclass
class WeatheredStream:
    weather: Weather
    world: World
    stream: Stream

    @property
    def peer(self) -> str:
        return self.stream.peer

    async def send(self, *parts: bytes | memoryview) -> None:
        frame, chance = b"".join(parts), self.weather.dice.random()
        if isinstance(pipe_codec.decode(bytearray(frame))[0], Drive):
            await self.stream.send(frame)
            return
        if chance < self.weather.drop:
            return
        if (chance := chance - self.weather.drop) < self.weather.late:
            self.world.nursery.start_soon(self._send_late, frame)
            return
        await self.stream.send(frame)
        if chance - self.weather.late < self.weather.twice:
            await self.stream.send(frame)

    async def _send_late(self, frame: bytes) -> None:
        await trio.sleep(self.weather.late_s * (0.5 + self.weather.dice.random()))
        with suppress(PeerError, LocalProtocolError):  # the stream has ended, or is busy: dropped after all
            await self.stream.send(frame)

    async def receive(self) -> memoryview | None:
        return await self.stream.receive()

    async def aclose(self) -> None:
        await self.stream.aclose()

    async def reset(self) -> None:
        await self.stream.reset()


@dataclass
class Peer:
    """One peer of a stage."""

    transport: SimTransport
    state: ToyState
    stage: ToyStage
    ledger: Ledger
    members: Members
    bell: Bell
    service: StageService
    n_said: int = 0

    @property
    def name(self) -> str:
        return self.transport.name

    def status(self, run: bytes) -> StageStatus:
        self.n_said += 1
        counted = numbers.to_bytes(self.ledger.counted)
        return StageStatus(run, self.n_said, self.stage.index, "training", self.ledger.version, counted=counted)


@dataclass
class Rig:
    """`codec` float32 crosses borders exactly, so that sums are those of `toy_reference`."""

    world: World
    plan: RunPlan = field(default_factory=toy_plan)
    codec: str = "float32"
    weather: Weather | None = None
    new_ledger: Callable[[int], Ledger] = Ledger
    peers: dict[str, Peer] = field(default_factory=dict)
    heard: list[tuple[str, Report]] = field(default_factory=list)
    events: list[tuple[str, dict[str, object]]] = field(default_factory=list)
    news: Bell = field(default_factory=Bell)
    drives: dict[str, Stream] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.samples = ToySamples(self.plan.n_tokens)
        self.trainer = self.node("trainer")

    def node(self, name: str) -> SimTransport:
        transport = self.world.add_node(name)
        if self.weather is not None:
            self.weather.over(self.world, transport)
        return transport

    # ---- peers

    def add(self, name: str, stage: int, *, transport: SimTransport | None = None, **limits: int) -> Peer:
        transport = transport or self.node(name)
        state = ToyState(self.plan, stage)
        toy = ToyStage(self.plan, stage, state)
        ledger, members, bell = self.new_ledger(toy.n_elements), Members(transport.peer_id, self.plan.run), Bell()
        compute = SimCompute(self.world, name)
        service = StageService(
            transport, self.plan, toy, ledger, members, compute, self.codec, VOCAB, self._event, bell, **limits
        )
        service.start()
        peer = self.peers[name] = Peer(transport, state, toy, ledger, members, bell, service)

        async def main(_: SimTransport) -> None:
            await service.run()

        self.world.start(name, main)
        return peer

    def swarm(self, per_stage: int = 1) -> None:
        """Peers a0, b0, c0, ... a1, b1, ...: a letter for each stage."""
        for index in range(per_stage):
            for stage in range(self.plan.n_stages):
                self.add(f"{'abcdefgh'[stage]}{index}", stage)

    def _event(self, what: str, /, **fields: object) -> None:
        self.events.append((what, fields))

    def peer_id(self, name: str) -> str:
        return self.world.node(name).peer_id

    def share(self, *gone: str) -> None:
        """Everybody hears at once how far everybody is; and that some are gone."""
        for peer in self.peers.values():
            for other in self.peers.values():
                if other.name in gone:
                    peer.members.lose(other.transport.peer_id)
                else:
                    peer.members.hear(other.transport.peer_id, other.status(self.plan.run), trio.current_time())

    def advance(self, *names: str) -> None:
        """These peers make a step with whatever they have; all of them by default."""
        for name in names or tuple(self.peers):
            peer = self.peers[name]
            peer.state.apply(torch.zeros(peer.stage.n_elements), 1.0)
            peer.ledger.advance(peer.state.version)
            peer.service.advance(peer.state.version)

    # ---- the trainer

    def ways(self, names: str, has_input: str = "", has_gradient: str = "") -> tuple[Way, ...]:
        """Of "a0 b0 c0"; the other two name whoever has something already."""
        return tuple(
            Way(
                PeerAddress(self.peer_id(name), self.world.node(name).addresses),
                name in has_input.split(),
                name in has_gradient.split(),
            )
            for name in names.split()
        )

    def message(
        self, number: int, turn: int, names: str, has_input: str = "", has_gradient: str = "", version: int = 0
    ) -> Forward:
        work = self.plan.work(version, number)
        ways = self.ways(names, has_input, has_gradient)
        return Forward(self.plan.run, work.id, version, number, turn, 0, self.trainer.peer_id, ways)

    def tokens(self, number: int, version: int = 0) -> Tensor:
        work = self.plan.work(version, number)
        return self.samples.tokens(work.first, work.count)

    def wire(self, number: int, version: int = 0) -> WireTensor:
        return to_wire(self.tokens(number, version).to(torch.int32))

    async def drive(self, name: str) -> Stream:
        """The stream on which the trainer drives a peer; its reports are collected in `heard`."""
        if name not in self.drives:
            node = self.world.node(name)
            self.trainer.learn(node.peer_id, node.addresses)
            stream = self.drives[name] = await self.trainer.open(node.peer_id, ids.PIPE)
            await stream.send(*pipe_codec.encode(Drive(self.plan.run)))
            self.world.nursery.start_soon(self._hear, name, stream)
        return self.drives[name]

    async def drive_all(self) -> None:
        for name in self.peers:
            await self.drive(name)

    async def _hear(self, name: str, stream: Stream) -> None:
        try:
            while (frame := await stream.receive()) is not None:
                message = pipe_codec.decode_only(frame)
                assert isinstance(message, Passed | WorkFailed)
                self.heard.append((name, message))
                self.news.ring()
        except PeerError:
            pass
        except LocalProtocolError:
            if self.drives.get(name) is stream:  # else we have hung up
                raise
        if self.drives.get(name) is stream:
            del self.drives[name]
        self.news.ring()

    async def hang_up(self) -> None:
        """The trainer ends all its streams."""
        streams, self.drives = list(self.drives.values()), {}
        for stream in streams:
            await stream.reset()

    def lose_connection(self, a: str, b: str) -> None:
        """The connection between two living nodes is reset."""
        one, other = self.world.node(a), self.world.node(b)
        connection = one._connections[other.peer_id]
        connection.lose(one, "reset by the test")
        connection.lose(other, "reset by the test")

    async def forward(self, message: Forward, wire: WireTensor | None = None) -> None:
        """Send it to its first stage, with its tokens unless that one has them."""
        way = message.ways[0]
        stream = await self.drive(self.world.name_of(way.peer.peer))
        wire = wire or self.wire(message.number, message.version)
        await stream.send(*pipe_codec.encode(message, () if way.has_input else (wire,)))

    async def walk(self, number: int, turn: int, names: str, has_input: str = "", has_gradient: str = "") -> None:
        await self.forward(self.message(number, turn, names, has_input, has_gradient))

    def said(self, number: int, turn: int, version: int = 0) -> list[tuple[str, bool]]:
        """Who has passed this turn of a microbatch, and whether backward, in the order in which it was heard."""
        work = self.plan.work(version, number).id
        return [
            (name, report.backward)
            for name, report in self.heard
            if isinstance(report, Passed) and (report.work, report.turn) == (work, turn)
        ]

    def failures(self) -> list[tuple[str, str, str]]:
        """(who says it, who is to blame, why)."""
        return [
            (name, self.world.name_of(report.peer), report.reason)
            for name, report in self.heard
            if isinstance(report, WorkFailed)
        ]

    async def until(self, done: Callable[[], bool], within_s: float = 60.0) -> None:
        with trio.fail_after(within_s):
            while True:
                seen = self.news.count
                if done():
                    return
                await self.news.after(seen)

    async def walked(self, number: int, turn: int, names: str, version: int = 0) -> None:
        """Wait until all of these have passed it in both directions."""

        def done() -> bool:
            said = self.said(number, turn, version)
            return all((name, True) in said for name in names.split())

        await self.until(done)

    # ---- what must hold

    def sum_of(self, *names: str) -> Tensor:
        return torch.stack([self.peers[name].ledger.sum.sum_P for name in names]).sum(0)

    def check_sums(self, *numbers_counted: int) -> None:
        """The peers of each stage together hold exactly the gradients of these numbers (all by default), once."""
        wanted = numbers.of(numbers_counted) if numbers_counted else self.plan.everything
        for stage, sum_P in enumerate(reference_sums(self.plan, wanted)):
            mine = [peer for peer in self.peers.values() if peer.stage.index == stage and not peer.transport.crashed]
            union = 0
            for peer in mine:
                assert not union & peer.ledger.counted, f"stage {stage}: counted twice"
                union |= peer.ledger.counted
            assert union == wanted, f"stage {stage}: {union:b} counted, not {wanted:b}"
            assert torch.equal(self.sum_of(*(peer.name for peer in mine)), sum_P), f"stage {stage}: another sum"


def reference_sums(plan: RunPlan, wanted: int) -> list[Tensor]:
    """The sums of version 0 over these numbers, on each stage."""
    if wanted == plan.everything:
        return list(toy_reference(plan, n_steps=1).sums[0])
    stages = [ToyStage(plan, index, ToyState(plan, index)) for index in range(plan.n_stages)]
    sums = [GradientSum(stage.n_elements) for stage in stages]
    for number in numbers.members(wanted):
        work = plan.work(0, number)
        tokens_BT1 = ToySamples(plan.n_tokens).tokens(work.first, work.count)
        inputs: list[Tensor | None] = [None]
        for stage in stages[:-1]:
            inputs.append(stage.forward(work.id, tokens_BT1, inputs[-1]))
        grad_BTW: Tensor | None = None
        for stage in reversed(stages):
            backpass = stage.backward(work.id, tokens_BT1, inputs[stage.index], grad_BTW)
            sums[stage.index].add(backpass.grad_P)
            grad_BTW = backpass.grad_BTW
    return [one.sum_P for one in sums]


def run(scenario: Callable[[Rig], Awaitable[None]], seed: int = 1, **changes: object) -> World:
    async def main(world: World) -> None:
        await scenario(Rig(world, **changes))  # type: ignore[arg-type]

    return run_world(seed, main, limit_s=600.0)
