"""What every node of a run begins with, whatever the method: the plan, the text, memory, where checkpoints go.

Ring: shell.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Protocol

import msgspec
import psutil
import trio

from mycel.node.announcer import Announcer
from mycel.node.config import NodeConfig
from mycel.node.events import Say
from mycel.node.model import Model
from mycel.node.placing import MEMORY_SHARE, Placing
from mycel.node.station import Station
from mycel.node.training.bottleneck import border_width
from mycel.node.training.checkpoints import CheckpointPlace
from mycel.node.training.dataset import TokenDataset, open_dataset
from mycel.node.training.founding import FoundedRun, plan_of, read_recipe
from mycel.node.training.metrics import metrics_path
from mycel.node.training.workshop import TorchWorkshop
from mycel.protocols.borders import border_bytes
from mycel.protocols.errors import ConfigError
from mycel.swarm.manifest import RECIPE_FILE
from mycel.swarm.placement import show_bytes
from mycel.swarm.training.pipeline import Load, threaded
from mycel.swarm.training.plan import RunPlan
from mycel.swarm.training.recipe import Recipe, canonical

__all__ = ["Ground", "Life", "prepare", "recipe_of"]

# What is said of a microbatch beyond its tensors, for each stage: peers and their addresses.
SAID_BYTES = 16 << 10


class Life(Protocol):
    """A node's part in a run, whatever the method."""

    @property
    def ready(self) -> trio.Event:
        """Set once others can use what the node serves."""
        ...

    async def run(self, tasks: trio.Nursery) -> None: ...

    async def leave(self, within_s: float) -> None: ...


@dataclass(frozen=True, slots=True)
class Ground:
    """`load` gives the tokens of samples, None where the text is not. `founds`: this node founded the run, now.

    `kept_bytes` is what the microbatches of a step may take.
    """

    config: NodeConfig
    recipe: Recipe
    plan: RunPlan
    station: Station
    placing: Placing
    workshop: TorchWorkshop
    load: Load | None
    kept_bytes: int
    founds: bool
    say: Say

    @property
    def metrics(self) -> Path:
        """This node's metrics file."""
        return metrics_path(self.config.data_dir, self.plan.run)


async def prepare(
    config: NodeConfig,
    recipe: Recipe,
    founded: FoundedRun | None,
    station: Station,
    announcer: Announcer,
    placing: Placing,
    say: Say,
) -> Ground:
    """Raises ConfigError for text that is not the run's, or a recipe that does not fit into memory."""
    model = station.model
    plan = await _blocking(partial(plan_of, recipe, model.swarm, model.directory))
    dataset = (
        founded.dataset if founded is not None else await _blocking(partial(_dataset, config, recipe, model.directory))
    )
    load: Load | None = threaded(dataset) if dataset is not None else None
    say(f"run {recipe.name}: {plan.n_steps} steps of {plan.step_tokens:,} tokens in {plan.n_stages} stages")
    place = CheckpointPlace(
        config.checkpoints or metrics_path(config.data_dir, model.swarm).parent / "checkpoints",
        model.directory,
        model.swarm,
        hashlib.sha256(canonical(recipe).encode()).digest(),
        recipe.checkpoint.keep,
    )

    async def fetch(start: int, end: int) -> None:
        await placing.fetch(await placing.watch.view(), start, end)

    kept_bytes = _kept_bytes(plan, recipe, model.info.hidden_size)
    memory_bytes = _left_bytes(config, kept_bytes)
    workshop = TorchWorkshop(station, announcer, plan, recipe, place, memory_bytes, fetch, station.event)
    return Ground(config, recipe, plan, station, placing, workshop, load, kept_bytes, founded is not None, say)


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
