"""Training as a part of a node's life: what `run_node` starts in place of plain serving when the swarm is a run.

Ring: shell.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from random import Random

import trio

from mycel.node.compute import DeviceCompute
from mycel.node.config import NodeConfig
from mycel.node.events import Say
from mycel.node.rounds.blobs import BlobExchange
from mycel.node.rounds.group_port import GroupPlace, GroupPorts
from mycel.node.rounds.round_streams import RoundDoor
from mycel.node.training.archivist import Archivist
from mycel.node.training.ground import Ground, Life
from mycel.node.training.metrics import MetricsFile, StepReporter
from mycel.node.training.peer import LISTEN_S, Terms, TrainingPeer
from mycel.node.training.replica_life import DEFAULT_RULE, make_replica_life
from mycel.node.training.round_sums import SCOPE, RoundSums, StageTwist, make_group
from mycel.node.training.stage_reducer import StageReducer
from mycel.node.training.stepping import StepDone
from mycel.node.training.workshop import TorchWorkshop
from mycel.node.zeroth.life import make_zeroth_life
from mycel.protocols.errors import ConfigError, PeerError
from mycel.protocols.messages import PeerAddress
from mycel.security.attacks import play
from mycel.swarm.codecs import Layout, make_codec
from mycel.swarm.methods.options import DataParallelOptions
from mycel.swarm.rounds.terms import GroupTerms
from mycel.swarm.training.plan import RunPlan
from mycel.swarm.training.recipe import ExactOptions, RoundPart
from mycel.swarm.training.schedule import learning_rate
from mycel.swarm.watch import REFRESH_S, SwarmWatch
from mycel.swarm.zeroth.options import ZerothOptions

__all__ = ["TrainingLife", "make_life"]


HURRY_S = 1.0


@dataclass(eq=False)
class TrainingLife:
    """A node's part in a run. Made by `make_life`; `run` until `leave`."""

    peer: TrainingPeer
    workshop: TorchWorkshop
    reporter: StepReporter
    watch: SwarmWatch
    known: int
    archivist: Archivist | None = None
    blobs: BlobExchange | None = None
    _over: trio.Event = field(default_factory=trio.Event, init=False)

    @property
    def ready(self) -> trio.Event:
        return self.peer.ready

    async def run(self, tasks: trio.Nursery) -> None:
        """Train until `leave`. `tasks` outlives the changes of stage."""
        self.workshop.tasks = tasks
        tasks.start_soon(self._meet)
        if self.archivist is not None:
            tasks.start_soon(self.archivist.run)
        if self.blobs is not None:
            await tasks.start(self.blobs.run)
        try:
            await self.peer.run(self.known)
        finally:
            self._over.set()

    async def leave(self, within_s: float) -> None:
        """Finish the step that others count on, write the checkpoint that was taken, and go; for at most so long."""
        with trio.move_on_after(within_s):
            await self.peer.leave()
            await self._over.wait()
            await self.workshop.settled()

    async def _meet(self) -> None:
        """Whoever is in the directory may train with us. Those who come together look often, to choose apart."""
        calm_s = trio.current_time() + 2 * LISTEN_S
        while True:
            try:
                for peer in (await self.watch.view(fresh=True)).peers.values():
                    self.peer.meet(PeerAddress(peer.peer, peer.addresses))
            except PeerError:
                pass  # the next look tells
            await trio.sleep(REFRESH_S if trio.current_time() > calm_s else HURRY_S)


async def make_life(ground: Ground) -> Life:
    """What the recipe's method wants of a node. Raises ConfigError for what cannot be."""
    if isinstance(ground.recipe.method, ExactOptions) or ground.plan.n_stages > 1:
        return await _make_training_life(ground)
    if isinstance(ground.recipe.method, ZerothOptions):
        return await make_zeroth_life(ground)
    return await make_replica_life(ground)


async def _make_training_life(ground: Ground) -> TrainingLife:
    recipe, plan, station, say = ground.recipe, ground.plan, ground.station, ground.say
    workshop, transport = ground.workshop, station.network.transport
    drives = ground.load is not None
    say("this node drives microbatches, too" if drives else "this node has not the text: it holds a stage for others")
    view = await ground.placing.look()
    terms = Terms(recipe.border.codec, recipe.optimizer.clip, station.model.info.vocab_size, ground.kept_bytes)
    peer = TrainingPeer(
        transport,
        plan,
        terms,
        workshop,
        station.compute,
        station.event,
        Random(),
        ground.load,
        _fixed_stage(ground.config, plan),
        hashing=DeviceCompute("hashing"),
    )
    reporter = StepReporter(
        plan,
        peer.members,
        MetricsFile(ground.metrics),
        lambda version: learning_rate(recipe.schedule, recipe.optimizer.learning_rate, version, plan.n_steps),
        say,
    )

    def on_step(done: StepDone) -> None:
        reporter.made(done.version)

    peer.on_step = on_step

    def on_diverged(version: int, reason: str) -> None:
        say(_diverged(version, reason, workshop.whole))

    peer.on_diverged = on_diverged
    others = view.without({peer.me}).peers.values()
    for other in others:
        peer.meet(PeerAddress(other.peer, other.addresses))
    # Who founds a run keeps it: without a whole checkpoint anywhere it could not be taken up again.
    keeps = ground.config.checkpoints is not None or ground.founds
    archivist = Archivist(transport, peer.members, workshop, station.event) if keeps else None
    life = TrainingLife(peer, workshop, reporter, ground.placing.watch, len(others), archivist)
    if isinstance(recipe.method, DataParallelOptions):
        life.blobs = await _join_rounds(ground, peer, recipe.method)
    return life


async def _join_rounds(ground: Ground, peer: TrainingPeer, method: DataParallelOptions) -> BlobExchange:
    """Sums come out of rounds; what has to run for that beside the peer."""
    recipe, plan, station = ground.recipe, ground.plan, ground.station
    network, event = station.network, station.event

    def all_layouts() -> list[Layout]:
        stages = (ground.workshop.layout(index) for index in range(plan.n_stages))
        return [Layout(tuple(tensor.shape for tensor in stage.tensors)) for stage in stages]

    layouts = await trio.to_thread.run_sync(all_layouts)
    terms = _stage_terms(recipe.round, method, layouts)
    reducer = StageReducer(layouts, terms, plan.n_microbatches)
    blobs = BlobExchange(network.transport, event=event)
    door = RoundDoor(network.transport)
    ports = GroupPorts(door, blobs, network.identity, station.compute, DeviceCompute("disk"), event)
    place = GroupPlace(plan.run, SCOPE, terms, station.model.manifest.founder)
    group = await make_group(place, ports, reducer, ground.metrics.parent / "group")
    lie = _play(ground.config.liar, ground.say)
    peer.use_rounds(RoundSums(plan, group, reducer, station.compute, event, recipe.round.peers, lie))
    return blobs


def _stage_terms(part: RoundPart, method: DataParallelOptions, layouts: Sequence[Layout]) -> GroupTerms:
    """What a recipe says of rounds, for the vectors of all stages: as long as the longest.

    `part.peers` is for the first step alone: a group that pauses whenever it is smaller would stop for one peer that
    has gone. Raises ConfigError, one line, for a codec that there is not.
    """
    make_codec(method.codec)
    make_codec(method.result_codec)
    return GroupTerms(
        max(layout.n_elements for layout in layouts),
        rule=part.rule or (DEFAULT_RULE if part.liars else "mean"),
        codec=method.codec,
        result_codec=method.result_codec,
        liars=part.liars,
        aggregators=part.aggregators,
        open=part.open,
        contributors=part.contributors,
        absences=part.absences,
        audits=part.audits,
        patience_s=part.patience_s,
        longest_grace_s=part.patience_s / 2,
    )


def _play(liar: str, say: Say) -> StageTwist | None:
    if not liar:
        return None
    say(f"this node lies on purpose: {liar}")
    return play(liar)


def _diverged(version: int, reason: str, whole: int) -> str:
    """One line: what has happened, what the node does, what its user can do."""
    back = f"go on from the checkpoint of step {whole}" if whole else "begin again"
    return (
        f"the run has diverged at step {version}: {reason}. It is tried again ever more seldom; "
        f"better stop it, lower optimizer.learning_rate in the recipe and {back}"
    )


def _fixed_stage(config: NodeConfig, plan: RunPlan) -> int | None:
    if config.blocks is None:
        return None
    if config.blocks not in plan.spans:
        spans = ", ".join(f"{start}:{end}" for start, end in plan.spans)
        raise ConfigError(f"blocks {config.blocks[0]}:{config.blocks[1]} are no stage of this run: {spans}")
    return plan.spans.index(config.blocks)
