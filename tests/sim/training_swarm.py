"""A run of toy stages whose peers are whole `TrainingPeer`s, in a world where they can be killed, cut off and started.

Each machine has a disk that outlives its process. Every step of every peer is noted, and `check` holds what must never
be broken: one hash of parameters for each stage and version, the reference's own.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from random import Random

import torch
import trio

from mycel.node.training.peer import Holding, Terms, TrainingPeer
from mycel.node.training.reducing import TiedEnd
from mycel.node.training.stepping import StepDone
from mycel.protocols.messages import PeerAddress
from mycel.swarm.training.bell import Bell
from mycel.swarm.training.plan import RunPlan
from tests.sim.compute import SimCompute
from tests.sim.toy_stage import TABLE, VOCAB, ToyReference, ToySamples, ToyStage, ToyState
from tests.sim.transport import SimTransport
from tests.sim.world import World


@dataclass(eq=False)
class ToyWorkshop:
    """Makes toy stages. `disk` holds a snapshot of each (stage, version) that was due; `every` 0 for none."""

    plan: RunPlan
    tied: bool
    every: int
    disk: dict[tuple[int, int], bytes]
    kept: int = 0

    @property
    def whole(self) -> int:
        return 0

    async def make(self, index: int) -> Holding:
        await trio.lowlevel.checkpoint()
        state = ToyState(self.plan, index, tied=self.tied)
        stage = ToyStage(self.plan, index, state)
        end: TiedEnd | None = None
        if stage.tied is not None:
            other = self.plan.n_stages - 1 - index
            end = TiedEnd(other, 0 if other == 0 else ToyState(self.plan, other, tied=True).params_P.size - TABLE)
        return Holding(stage, state, end)

    async def restore(self, holding: Holding, version: int | None) -> None:
        await trio.lowlevel.checkpoint()
        index = holding.stage.index
        there = [v for s, v in self.disk if s == index and (version is None or v <= version)]
        self.kept = max(there, default=0)
        data = self.disk[index, self.kept] if there else ToyState(self.plan, index, tied=self.tied).snapshot()
        holding.state.load(memoryview(bytes(data)), self.kept)

    async def open(self, holding: Holding) -> None:
        await trio.lowlevel.checkpoint()

    async def after_step(self, holding: Holding, version: int) -> None:
        await trio.lowlevel.checkpoint()
        if self.every and version % self.every == 0:
            self.disk[holding.stage.index, version] = bytes(holding.state.snapshot())
            self.kept = version

    async def close(self, holding: Holding) -> None:
        pass


@dataclass
class TrainingSwarm:
    """Peers by name. `reference` is the same run in one place."""

    world: World
    plan: RunPlan
    reference: ToyReference
    tied: bool = False
    every: int = 0
    move_every_s: float = 300.0
    peers: dict[str, TrainingPeer] = field(default_factory=dict)
    disks: dict[str, dict[tuple[int, int], bytes]] = field(default_factory=dict)
    # (stage, version) -> hash -> who had it
    seen: dict[tuple[int, int], dict[bytes, set[str]]] = field(default_factory=dict)
    moved: Bell = field(default_factory=Bell)
    made: list[tuple[float, str, int, StepDone]] = field(default_factory=list)

    def start(self, name: str, *, stage: int | None = None, trains: bool = True, slowness: float = 1.0) -> TrainingPeer:
        """A peer that knows who is there, as a directory would tell it. After a crash it comes again with its disk."""
        again = name in self.peers
        transport = self.world.restart(name) if again else self.world.add_node(name)
        if slowness != 1.0:
            self.world.slow(name, slowness)
        workshop = ToyWorkshop(self.plan, self.tied, self.every, self.disks.setdefault(name, {}))
        samples = ToySamples(self.plan.n_tokens)

        async def load(first: int, count: int) -> torch.Tensor:
            await trio.lowlevel.checkpoint()
            return samples.tokens(first, count)

        def event(what: str, /, **fields: object) -> None:
            self.world.record(what, name, *(f"{key}={value}" for key, value in fields.items()))

        def on_step(done: StepDone) -> None:
            stepper = peer.stepper
            assert stepper is not None
            self.made.append((trio.current_time(), name, stepper.reducer.stage, done))
            key = (stepper.reducer.stage, done.version)
            self.moved.ring()
            self.seen.setdefault(key, {}).setdefault(stepper.params, set()).add(name)

        peer = TrainingPeer(
            transport,
            self.plan,
            Terms("float32", 0.0, VOCAB, move_every_s=self.move_every_s),
            workshop,
            SimCompute(self.world, name),
            event,
            Random(f"{self.world.seed} {name} {again}"),
            load if trains else None,
            stage,
            on_step,
        )
        others = [node for node in self.world.nodes() if node.name != name and not node.crashed]

        async def main(transport: SimTransport) -> None:
            for other in others:
                if other.name in self.peers:
                    peer.meet(PeerAddress(other.peer_id, other.addresses))
            await peer.run(len(others))

        self.peers[name] = peer
        self.world.start(name, main)
        return peer

    def crash(self, name: str) -> None:
        self.world.crash(name)

    def living(self) -> list[str]:
        return [name for name in self.peers if not self.world.node(name).crashed]

    def version(self) -> int:
        """Steps that some living peer of every stage has made."""
        reach = [0] * self.plan.n_stages
        for name in self.living():
            stepper = self.peers[name].stepper
            if stepper is not None and stepper.state != "joining":
                reach[stepper.reducer.stage] = max(reach[stepper.reducer.stage], stepper.version)
        return min(reach)

    async def until(self, version: int) -> None:
        """Wait until every stage has made so many steps."""
        while True:
            seen = self.moved.count
            if self.version() >= version:
                return
            await self.moved.after(seen)

    def check(self) -> None:
        for (stage, version), hashes in self.seen.items():
            assert list(hashes) == [self.reference.digests[version][stage]], (
                f"stage {stage}, version {version}: {hashes}"
            )
