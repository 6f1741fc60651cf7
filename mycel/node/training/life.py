"""Training as a part of a node's life: what `run_node` starts in place of plain serving when the swarm is a run.

Ring: shell.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from random import Random

import msgspec
import psutil
import trio

from mycel.node.announcer import Announcer
from mycel.node.compute import DeviceCompute
from mycel.node.config import NodeConfig
from mycel.node.events import Say
from mycel.node.model import Model
from mycel.node.placing import MEMORY_SHARE, Placing
from mycel.node.station import Station
from mycel.node.training.archivist import Archivist
from mycel.node.training.bottleneck import border_width
from mycel.node.training.checkpoints import CheckpointPlace
from mycel.node.training.dataset import TokenDataset, open_dataset
from mycel.node.training.founding import FoundedRun, plan_of, read_recipe
from mycel.node.training.metrics import MetricsFile, StepReporter, metrics_path
from mycel.node.training.peer import LISTEN_S, Terms, TrainingPeer
from mycel.node.training.stepping import StepDone
from mycel.node.training.workshop import TorchWorkshop
from mycel.protocols.borders import border_bytes
from mycel.protocols.errors import ConfigError, PeerError
from mycel.protocols.messages import PeerAddress
from mycel.swarm.manifest import RECIPE_FILE
from mycel.swarm.placement import show_bytes
from mycel.swarm.training.pipeline import Load, threaded
from mycel.swarm.training.plan import RunPlan
from mycel.swarm.training.recipe import Recipe, canonical
from mycel.swarm.training.schedule import learning_rate
from mycel.swarm.watch import REFRESH_S, SwarmWatch

__all__ = ["TrainingLife", "make_life", "recipe_of"]


HURRY_S = 1.0
# What is said of a microbatch beyond its tensors, for each stage: peers and their addresses.
SAID_BYTES = 16 << 10


@dataclass(eq=False)
class TrainingLife:
    """A node's part in a run. Made by `make_life`; `run` until `leave`."""

    peer: TrainingPeer
    workshop: TorchWorkshop
    reporter: StepReporter
    watch: SwarmWatch
    known: int
    archivist: Archivist | None = None
    _over: trio.Event = field(default_factory=trio.Event, init=False)

    async def run(self, tasks: trio.Nursery) -> None:
        """Train until `leave`. `tasks` outlives the changes of stage."""
        self.workshop.tasks = tasks
        tasks.start_soon(self._meet)
        if self.archivist is not None:
            tasks.start_soon(self.archivist.run)
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


async def make_life(
    config: NodeConfig,
    recipe: Recipe,
    founded: FoundedRun | None,
    station: Station,
    announcer: Announcer,
    placing: Placing,
    say: Say,
) -> TrainingLife:
    """Everything that a node needs to train in the run of `station`'s model.

    Raises ConfigError for text that is not the run's, or a stage that does not fit into memory.
    """
    model, event = station.model, station.event
    plan = await _blocking(partial(plan_of, recipe, model.swarm, model.directory))
    dataset = (
        founded.dataset if founded is not None else await _blocking(partial(_dataset, config, recipe, model.directory))
    )
    load: Load | None = threaded(dataset) if dataset is not None else None
    say(f"run {recipe.name}: {plan.n_steps} steps of {plan.step_tokens:,} tokens in {plan.n_stages} stages")
    say("this node drives microbatches, too" if load else "this node has not the text: it holds a stage for others")
    folder = metrics_path(config.data_dir, model.swarm).parent
    place = CheckpointPlace(
        config.checkpoints or folder / "checkpoints",
        model.directory,
        model.swarm,
        hashlib.sha256(canonical(recipe).encode()).digest(),
        recipe.checkpoint.keep,
    )
    view = await placing.look()

    async def fetch(start: int, end: int) -> None:
        await placing.fetch(await placing.watch.view(), start, end)

    kept_bytes = _kept_bytes(plan, recipe, model.info.hidden_size)
    memory_bytes = _left_bytes(config, kept_bytes)
    workshop = TorchWorkshop(station, announcer, plan, recipe, place, memory_bytes, fetch, event)
    terms = Terms(recipe.border.codec, recipe.optimizer.clip, model.info.vocab_size, kept_bytes)
    peer = TrainingPeer(
        station.network.transport,
        plan,
        terms,
        workshop,
        station.compute,
        event,
        Random(),
        load,
        _fixed_stage(config, plan),
        hashing=DeviceCompute("hashing"),
    )
    reporter = StepReporter(
        plan,
        peer.members,
        MetricsFile(metrics_path(config.data_dir, model.swarm)),
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
    transport = station.network.transport
    # Who founds a run keeps it: without a whole checkpoint anywhere it could not be taken up again.
    keeps = config.checkpoints is not None or founded is not None
    archivist = Archivist(transport, peer.members, workshop, event) if keeps else None
    return TrainingLife(peer, workshop, reporter, placing.watch, len(others), archivist)


def recipe_of(model: Model) -> Recipe | None:
    """The recipe that the swarm's manifest carries, or None if it is no training run.

    A model directory may hold a recipe for other reasons; what counts is what the founder signed.
    """
    if all(file.name != RECIPE_FILE for file in model.manifest.files):
        return None
    return read_recipe(model.directory / RECIPE_FILE)


def _dataset(config: NodeConfig, recipe: Recipe, model: Path) -> TokenDataset | None:
    """The run's samples, if this machine has the text: it is told where by a recipe, or every Python has it."""
    cache_dir = config.data_dir / "cache"
    if config.recipe is not None:
        local = read_recipe(config.recipe).data
        data = msgspec.structs.replace(recipe.data, kind=local.kind, files=local.files, field=local.field)
        return open_dataset(msgspec.structs.replace(recipe, data=data), model, config.recipe.parent, cache_dir)
    if recipe.data.kind == "python-topics":
        try:
            return open_dataset(recipe, model, Path(), cache_dir)
        except ConfigError:
            return None  # another Python has other topics
    return None


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


def _kept_bytes(plan: RunPlan, recipe: Recipe, hidden_size: int) -> int:
    """What a stage keeps of all microbatches of a step, should it be alone: less, and the step could not be made."""
    shape = (plan.n_sequences, plan.n_tokens, border_width(recipe.border, hidden_size))
    one_bytes = 4 * border_bytes(shape, recipe.border.codec) + 4 * plan.n_sequences * (plan.n_tokens + 1)
    return plan.n_microbatches * (one_bytes + plan.n_stages * SAID_BYTES)


def _left_bytes(config: NodeConfig, kept_bytes: int) -> int:
    """What is left for the stage itself. Raises ConfigError, before anything large is made, for a huge recipe."""
    may_bytes = config.memory_bytes or int(psutil.virtual_memory().available * MEMORY_SHARE)
    if kept_bytes >= may_bytes:
        raise ConfigError(
            f"not enough memory: the microbatches of one step take {show_bytes(kept_bytes)}, {show_bytes(may_bytes)} "
            "may be used (step.batch_tokens and data.sequence in the run's recipe say how many and how long they are)"
        )
    return may_bytes - kept_bytes


_blocking = trio.to_thread.run_sync
