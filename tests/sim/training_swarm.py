"""A run of toy stages whose peers are whole `TrainingPeer`s, in a world where they can be killed, cut off and started.

Each machine has a disk that outlives its process. Every step of every peer is noted, and what must never be broken is
held against it: a sum is made of each number exactly once (looked at before anything is summed up), and each stage has
one hash of parameters at each version, the reference's own (`check`).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from random import Random

import torch
import trio

from mycel.node.rounds.blobs import BlobExchange
from mycel.node.rounds.group import GroupPlace, GroupPorts
from mycel.node.rounds.round_streams import RoundDoor
from mycel.node.training.peer import Terms, TrainingPeer
from mycel.node.training.reducing import Pull, Reducer, TiedEnd
from mycel.node.training.round_sums import SCOPE, RoundSums, StageTwist, make_group
from mycel.node.training.stage_port import Backpass
from mycel.node.training.stage_reducer import StageReducer
from mycel.node.training.stepping import StepDone
from mycel.node.training.workshop_port import Holding
from mycel.protocols.messages import PeerAddress
from mycel.swarm.codecs import Layout
from mycel.swarm.rounds.terms import GroupTerms
from mycel.swarm.training.actions import Contribute, Reduce
from mycel.swarm.training.bell import Bell
from mycel.swarm.training.pipeline import Load
from mycel.swarm.training.plan import RunPlan
from tests.sim.compute import SimCompute
from tests.sim.lossy import Losses
from tests.sim.toy_stage import TABLE, VOCAB, ToyReference, ToySamples, ToyStage, ToyState
from tests.sim.transport import SimTransport
from tests.sim.world import World


@dataclass(eq=False, kw_only=True)
class NotedStage(ToyStage):
    """Tells of every pass when it is over: after its cost, before anybody hears of its result."""

    note: Callable[[str], None]

    def forward(self, work: bytes, tokens_BT1: torch.Tensor, input_BTW: torch.Tensor | None) -> torch.Tensor:
        self.note("forward")
        return super().forward(work, tokens_BT1, input_BTW)

    def backward(
        self, work: bytes, tokens_BT1: torch.Tensor, input_BTW: torch.Tensor | None, grad_BTW: torch.Tensor | None
    ) -> Backpass:
        self.note("backward")
        return super().backward(work, tokens_BT1, input_BTW, grad_BTW)


@dataclass(eq=False)
class ToyWorkshop:
    """Makes toy stages. `disk` holds a snapshot of each (stage, version) that was due; `every` 0 for none."""

    plan: RunPlan
    tied: bool
    every: int
    disk: dict[tuple[int, int], bytes]
    opened: Callable[[], None]
    note: Callable[[str], None]
    pass_s: float = 0.01
    kept: int = 0

    @property
    def whole(self) -> int:
        stages = range(self.plan.n_stages)
        versions = {version for _, version in self.disk}
        return max((v for v in versions if all((stage, v) in self.disk for stage in stages)), default=0)

    async def choose(self, index: int) -> None:
        await trio.lowlevel.checkpoint()

    async def store(self, holding: Holding, version: int, data: memoryview) -> None:
        await trio.lowlevel.checkpoint()
        self.disk[holding.stage.index, version] = bytes(data)
        self.kept = max(self.kept, version)

    async def archived(self, stage: int, version: int) -> tuple[memoryview, bytes] | None:
        await trio.lowlevel.checkpoint()
        if (data := self.disk.get((stage, version))) is None:
            return None
        return memoryview(data), hashlib.sha256(data[: len(data) // 2]).digest()

    def is_due(self, version: int) -> bool:
        return bool(self.every) and version % self.every == 0

    async def make(self, index: int) -> Holding:
        await trio.lowlevel.checkpoint()
        self.kept = self._newest(index, None)
        state = ToyState(self.plan, index, tied=self.tied)
        stage = NotedStage(self.plan, index, state, self.pass_s, 2 * self.pass_s, note=self.note)
        end: TiedEnd | None = None
        if stage.tied is not None:
            other = self.plan.n_stages - 1 - index
            end = TiedEnd(other, 0 if other == 0 else ToyState(self.plan, other, tied=True).params_P.size - TABLE)
        return Holding(stage, state, end)

    def _newest(self, index: int, at_most: int | None) -> int:
        return max((v for s, v in self.disk if s == index and (at_most is None or v <= at_most)), default=0)

    async def restore(self, holding: Holding, version: int | None) -> None:
        await trio.lowlevel.checkpoint()
        index = holding.stage.index
        self.kept = self._newest(index, version)
        first = ToyState(self.plan, index, tied=self.tied).snapshot()
        data = self.disk.get((index, self.kept), first)
        holding.state.load(memoryview(bytes(data)), self.kept)

    async def open(self, holding: Holding) -> None:
        await trio.lowlevel.checkpoint()
        self.opened()

    async def after_step(self, holding: Holding, version: int) -> None:
        await trio.lowlevel.checkpoint()
        if self.is_due(version):
            self.disk[holding.stage.index, version] = bytes(holding.state.snapshot())
            self.kept = version

    async def close(self, holding: Holding) -> None:
        pass


@dataclass(frozen=True)
class Told:
    """An event of a peer."""

    at_s: float
    name: str
    what: str
    fields: dict[str, object]


@dataclass(frozen=True)
class Rounds:
    """Sums come out of rounds with these terms; `folder` is where peers keep what they signed. Some lie."""

    folder: Path
    terms: GroupTerms
    begins_with: int = 1
    twists: dict[str, StageTwist] = field(default_factory=dict)


@dataclass
class TrainingSwarm:
    """Peers by name. `reference` is the same run in one place; a forward takes `pass_s`, a backward twice that.

    With `rounds` the first peer that starts is the run's founder, and nothing is held against the reference.
    """

    world: World
    plan: RunPlan
    reference: ToyReference
    tied: bool = False
    every: int = 0
    move_every_s: float = 300.0
    pass_s: float = 0.01
    # One disk for all, as on one machine; else everyone has its own.
    shared: dict[tuple[int, int], bytes] | None = None
    losses: Losses | None = None
    rounds: Rounds | None = None
    founder: str = ""
    peers: dict[str, TrainingPeer] = field(default_factory=dict)
    disks: dict[str, dict[tuple[int, int], bytes]] = field(default_factory=dict)
    # (stage, version) -> hash -> who had it
    seen: dict[tuple[int, int], dict[bytes, set[str]]] = field(default_factory=dict)
    # (stage, version) -> the sets of numbers that were summed up, by whoever summed up
    summed: dict[tuple[int, int], list[tuple[int, ...]]] = field(default_factory=dict)
    # Rung by every event and every step of anybody.
    moved: Bell = field(default_factory=Bell)
    made: list[tuple[float, str, int, StepDone]] = field(default_factory=list)
    told: list[Told] = field(default_factory=list)

    def start(
        self,
        name: str,
        *,
        stage: int | None = None,
        first: int | None = None,
        trains: bool = True,
        slowness: float = 1.0,
    ) -> TrainingPeer:
        """A peer that knows who is there, as a directory would tell it. After a crash it comes again with its disk.

        `stage` it holds for good, `first` is what it is made to choose at the beginning.
        """
        again = name in self.peers
        transport = self.world.restart(name) if again else self.world.add_node(name)
        self.founder = self.founder or transport.peer_id
        if self.losses is not None:
            self.losses.tap(transport)
        if slowness != 1.0:
            self.world.slow(name, slowness)
        seed = f"{self.world.seed} {name} {again}"
        peer = self.peers[name] = self._peer(transport, seed, self._load if trains else None, stage)
        if first is not None:
            _choose_first(peer, first)
        others = [node for node in self.world.nodes() if node.name != name and not node.crashed]

        async def main(transport: SimTransport) -> None:
            async with trio.open_nursery() as nursery:
                if self.rounds is not None:
                    await self._prepare_rounds(peer, self.rounds, nursery)
                for other in others:
                    if other.name in self.peers:
                        peer.meet(PeerAddress(other.peer_id, other.addresses))
                await peer.run(len(others))
                nursery.cancel_scope.cancel()
            peer.event("peer.left")
            self.world.crash(name)  # the process ends

        self.world.start(name, main)
        return peer

    async def _prepare_rounds(self, peer: TrainingPeer, rounds: Rounds, nursery: trio.Nursery) -> None:
        """What life.py does on a real node."""
        transport = peer.transport
        assert isinstance(transport, SimTransport)
        name, plan = transport.name, self.plan
        states = (ToyState(plan, stage, tied=self.tied) for stage in range(plan.n_stages))
        layouts = [Layout(((state.params_P.size // 4, 4),)) for state in states]
        terms = replace(rounds.terms, n_elements=max(layout.n_elements for layout in layouts))
        place = GroupPlace(plan.run, SCOPE, terms, self.founder)
        blobs = BlobExchange(transport, threads=SimCompute(self.world, name), event=peer.event)
        disk = SimCompute(self.world, name)
        ports = GroupPorts(RoundDoor(transport), blobs, transport.identity, peer.compute, disk, peer.event)
        reducer = StageReducer(layouts, terms, plan.n_microbatches)
        group = await make_group(place, ports, reducer, rounds.folder / name)
        twist = rounds.twists.get(name)
        sums = RoundSums(plan, group, reducer, peer.compute, peer.event, rounds.begins_with, twist)
        peer.use_rounds(sums)
        await nursery.start(blobs.run)

    async def _load(self, first: int, count: int) -> torch.Tensor:
        await trio.lowlevel.checkpoint()
        return ToySamples(self.plan.n_tokens).tokens(first, count)

    def _peer(self, transport: SimTransport, seed: str, load: Load | None, stage: int | None) -> TrainingPeer:
        """Whose steps, events and sums are noted."""
        name = transport.name

        def opened() -> None:
            assert peer.stepper is not None
            self._watch_sums(peer.stepper.reducer)

        def note(what: str) -> None:
            self.world.record(what, name)

        def event(what: str, /, **fields: object) -> None:
            self.world.record(what, name, *(f"{key}={value}" for key, value in fields.items()))
            self.told.append(Told(trio.current_time(), name, what, fields))
            self.moved.ring()

        def on_step(done: StepDone) -> None:
            stepper = peer.stepper
            assert stepper is not None
            self.made.append((trio.current_time(), name, stepper.reducer.stage, done))
            key = (stepper.reducer.stage, done.version)
            self.seen.setdefault(key, {}).setdefault(stepper.params, set()).add(name)
            self.moved.ring()

        disk = self.disks.setdefault(name, {} if self.shared is None else self.shared)
        workshop = ToyWorkshop(self.plan, self.tied, self.every, disk, opened, note, self.pass_s)
        terms = Terms("float32", 0.0, VOCAB, move_every_s=self.move_every_s)
        compute = SimCompute(self.world, name)
        peer = TrainingPeer(transport, self.plan, terms, workshop, compute, event, Random(seed), load, stage, on_step)
        peer.gossip.unix_time_s = self.world.unix_time_s
        return peer

    def fill(self, per_stage: int, *, trains: bool = True) -> None:
        """Peers a0, a1, ... of stage 0, 1, ..., then b0, b1, ..."""
        for letter in "abcdefgh"[:per_stage]:
            for stage in range(self.plan.n_stages):
                self.start(f"{letter}{stage}", stage=stage, trains=trains)

    def _watch_sums(self, reducer: Reducer) -> None:
        """Look at what is summed up before it is: each number once, and no number missing."""
        do = reducer.do

        async def watched(pull: Pull) -> None:
            if isinstance(pull, Reduce | Contribute):
                sets = tuple(counted for _, counted in pull.sources)
                step = f"step {reducer.table.version} of stage {reducer.stage}"
                assert sum(bits.bit_count() for bits in sets) == self.plan.n_microbatches, f"{step}: {pull.sources}"
                assert sum(sets) == self.plan.everything, f"{step}: {pull.sources}"
                self.summed.setdefault((reducer.stage, reducer.table.version), []).append(sets)
            await do(pull)

        reducer.do = watched  # type: ignore[method-assign]

    def crash(self, name: str) -> None:
        self.world.crash(name)
        self.moved.ring()

    def living(self) -> list[str]:
        return [name for name in self.peers if not self.world.node(name).crashed]

    def at(self, stage: int, *states: str) -> list[str]:
        """Those who live and hold a stage, by default and train it."""
        steppers = [(name, self.peers[name].stepper) for name in self.living()]
        wanted = states or ("training",)
        return [n for n, one in steppers if one is not None and one.reducer.stage == stage and one.state in wanted]

    def trainers(self) -> list[int]:
        """How many train, of each stage."""
        return [len(self.at(stage)) for stage in range(self.plan.n_stages)]

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
        await self.when(lambda: self.version() >= version)

    async def when(self, is_so: Callable[[], bool]) -> None:
        """Wait; looked at whenever anybody tells anything."""
        while True:
            seen = self.moved.count
            if is_so():
                return
            await self.moved.after(seen)

    def events(self, what: str, *, since_s: float = 0.0) -> list[Told]:
        return [one for one in self.told if one.what == what and one.at_s >= since_s]

    def check(self) -> None:
        """Every hash that anybody had, and what those who live hold now."""
        if self.rounds is not None:
            self._check_alike()
            return
        for (stage, version), hashes in self.seen.items():
            assert list(hashes) == [self.reference.digests[version][stage]], (
                f"stage {stage}, version {version}: {hashes}"
            )
        for name in self.living():
            stepper = self.peers[name].stepper
            if stepper is not None and stepper.state != "joining":
                stage, holder = stepper.reducer.stage, stepper.holder
                wanted = self.reference.digests[holder.version][stage]
                assert holder.params_digest() == wanted, f"{name}, stage {stage}, version {holder.version}"

    def _check_alike(self) -> None:
        """Nobody ever had other parameters than another at the same step, and nobody has now."""
        for (stage, version), hashes in self.seen.items():
            assert len(hashes) == 1, f"stage {stage}, version {version}: {hashes}"
        for name in self.living():
            stepper = self.peers[name].stepper
            if stepper is not None and stepper.state != "joining" and stepper.version > 0:
                stage, holder = stepper.reducer.stage, stepper.holder
                wanted = next(iter(self.seen[stage, holder.version]))
                assert holder.params_digest() == wanted, f"{name}, stage {stage}, version {holder.version}"

    def check_all_made(self, n_steps: int) -> None:
        """Every stage made every step up to there, each from a sum that somebody was seen to make."""
        self.check()
        steps = {(stage, version) for stage in range(self.plan.n_stages) for version in range(n_steps)}
        assert {(stage, version - 1) for stage, version in self.seen} >= steps
        assert set(self.summed) >= steps


def _choose_first(peer: TrainingPeer, stage: int) -> None:
    """Whatever is needed: it begins there, and may move."""

    async def choose(*, newcomer: bool) -> None:
        await peer._take(stage, "the test says so")

    peer._choose = choose  # type: ignore[method-assign]
