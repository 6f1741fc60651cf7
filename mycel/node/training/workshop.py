"""A stage of a real model: from weights and checkpoints on this machine to a stage that trains and answers.

What a `TrainingPeer` is given in life. The inference that a node offers meanwhile runs on the very parameters that are
trained; with learned bottlenecks at the borders there is none.

Ring: shell.
"""

from __future__ import annotations

import hashlib
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import torch
import trio

from mycel.node.announcer import Announcer
from mycel.node.events import EventSink
from mycel.node.station import Station
from mycel.node.training.checkpoint_files import CheckpointPlace, read_part
from mycel.node.training.checkpoint_layout import StageFiles
from mycel.node.training.checkpoint_read import newest, read_stage, whole_checkpoints
from mycel.node.training.checkpoints import Checkpointer, is_due, on_thread
from mycel.node.training.optimizer import FlatState
from mycel.node.training.reducing import TiedEnd
from mycel.node.training.stage import TorchStage
from mycel.node.training.stage_layout import StageLayout, stage_layout
from mycel.node.training.workshop_port import Holding
from mycel.protocols.errors import ConfigError
from mycel.swarm.placement import show_bytes
from mycel.swarm.training.plan import RunPlan
from mycel.swarm.training.recipe import Recipe

__all__ = ["TorchWorkshop", "stage_bytes"]

T = TypeVar("T")

# Parameters, gradient, its sum on the lattice, two moments, the sums of two steps, and a copy of the state for whoever
# fetches it: 4 + 4 + 8 + 8 + 8 + 12 bytes. Activations come on top.
_BYTES_PER_PARAMETER = 44


def stage_bytes(layout: StageLayout) -> int:
    """Memory that a stage takes besides its activations."""
    return layout.n_elements * _BYTES_PER_PARAMETER


@dataclass(eq=False)
class TorchWorkshop:
    """For one node and one run. `fetch` brings the first weights of blocks [start, end) here if they are not."""

    station: Station
    announcer: Announcer
    plan: RunPlan
    recipe: Recipe
    place: CheckpointPlace
    memory_bytes: int
    fetch: Callable[[int, int], Awaitable[None]]
    event: EventSink
    _checkpointer: Checkpointer | None = field(default=None, init=False)
    _writing: trio.CancelScope = field(default_factory=trio.CancelScope, init=False)
    # Steps between two states that a checkpoint could be of.
    stride: int = 1
    # Set by whoever runs the node: where background work belongs.
    tasks: trio.Nursery | None = None

    @property
    def directory(self) -> Path:
        return self.station.model.directory

    @property
    def checkpointer(self) -> Checkpointer | None:
        """Of the stage that is held now."""
        return self._checkpointer

    @property
    def kept(self) -> int:
        return self._checkpointer.kept if self._checkpointer is not None else 0

    @property
    def whole(self) -> int:
        return self._checkpointer.whole if self._checkpointer is not None else 0

    def layout(self, index: int) -> StageLayout:
        """Of any stage of the run, without its weights."""
        return stage_layout(self.directory, self.plan, index, self.recipe.border)

    async def choose(self, index: int) -> None:
        self.station.claim(*self.plan.spans[index])
        await self.announcer.say()

    async def make(self, index: int) -> Holding:
        start, end = self.plan.spans[index]
        layout = await self._on_compute(lambda: self.layout(index))
        if (needed := stage_bytes(layout)) > self.memory_bytes:
            may = show_bytes(self.memory_bytes)
            raise ConfigError(
                f"not enough memory: stage {index} takes {show_bytes(needed)} to train, {may} may be used"
            )
        await self.choose(index)
        await self.fetch(start, end)
        holding = await self._on_compute(lambda: self._load(index))
        files = self.files(index, layout)
        checkpointer = self._checkpointer = Checkpointer(self.place, files, self.is_due, event=self.event)
        checkpointer.kept = await self._kept_here(files)
        return holding

    async def _kept_here(self, files: StageFiles) -> int:
        """The version that `restore` would give; of a whole checkpoint by its note alone."""
        whole = await on_thread(lambda _: whole_checkpoints(self.place.directory, self.plan.run))
        if whole:
            return whole[0][0]
        part = await self._own_part(files, None)
        return part[0] if part is not None else 0

    def files(self, index: int, layout: StageLayout) -> StageFiles:
        return StageFiles(index, self.plan.n_stages, layout.tensors, layout.tied)

    def _load(self, index: int) -> Holding:
        stage = TorchStage.load(self.directory, self.plan, index, self.recipe)
        recipe = self.recipe
        state = FlatState(stage.params_P, stage.decay_end, recipe.optimizer, recipe.schedule, self.plan.n_steps)
        if stage.tied is None:
            return Holding(stage, state)
        other = self.plan.n_stages - 1 - index
        tied = self.layout(other).tied
        assert tied is not None, "a table is tied at both ends"
        return Holding(stage, state, TiedEnd(other, tied[0]))

    async def restore(self, holding: Holding, version: int | None) -> None:
        index, state, checkpointer = holding.stage.index, holding.state, self._checkpointer
        assert checkpointer is not None
        assert isinstance(state, FlatState)
        files = self.files(index, await self._on_compute(lambda: self.layout(index)))
        # What somebody else put there may say that it is of any step.
        latest = self.plan.n_steps if version is None else version
        found = await on_thread(lambda check: newest(self.place.directory, self.plan.run, check, at_most=latest))
        for reason in found.passed_over:
            self.event("checkpoint.passed_over", reason=reason)
        checkpoint = found.checkpoint
        checkpointer.whole = checkpoint.version if checkpoint is not None else 0
        here: tuple[int, memoryview] | None = None
        if checkpoint is None or (version is not None and checkpoint.version < version):
            # Of no use to a run that begins anew unless nobody has anything whole; but others may wait for this step.
            here = await self._own_part(files, version)
        if checkpoint is not None and (here is None or here[0] < checkpoint.version):
            here = await on_thread(lambda check: read_stage(checkpoint, files, check))
        checkpointer.kept = here[0] if here is not None else 0
        if here is not None:
            at, data = here
            await self._on_compute(lambda: state.load(data, at))
        elif state.version:
            await self._on_compute(lambda: self._reset(index, state))

    async def _own_part(self, files: StageFiles, version: int | None) -> tuple[int, memoryview] | None:
        try:
            return await on_thread(lambda check: read_part(self.place, files, version, check))
        except ConfigError as error:
            self.event("checkpoint.passed_over", reason=str(error))
            return None

    async def store(self, holding: Holding, version: int, data: memoryview) -> None:
        assert self._checkpointer is not None
        files = self.files(holding.stage.index, await self._on_compute(lambda: self.layout(holding.stage.index)))
        await self._checkpointer.add(files, version, data)

    async def archived(self, stage: int, version: int) -> tuple[memoryview, bytes] | None:
        try:
            layout = await on_thread(lambda _: self.layout(stage))
            found = await on_thread(lambda check: newest(self.place.directory, self.plan.run, check, at_most=version))
            checkpoint = found.checkpoint
            if checkpoint is None or checkpoint.version != version:
                return None
            _, data = await on_thread(lambda check: read_stage(checkpoint, self.files(stage, layout), check))
        except ConfigError as error:
            self.event("checkpoint.failed", version=version, stage=stage, reason=str(error))
            return None
        return data, await on_thread(lambda _: hashlib.sha256(data[: 4 * layout.n_elements]).digest())

    def is_due(self, version: int) -> bool:
        return is_due(self.recipe.checkpoint, version, self.plan.n_steps, self.stride)

    def _reset(self, index: int, state: FlatState) -> None:
        """Back to the weights that the run began with."""
        first = TorchStage.load(self.directory, self.plan, index, self.recipe).params_P
        data = bytearray(state.size_bytes)  # moments are zero at the beginning
        torch.frombuffer(data, dtype=torch.float32)[: first.numel()] = first
        state.load(memoryview(data), 0)

    async def open(self, holding: Holding) -> None:
        assert isinstance(holding.stage, TorchStage)
        assert self._checkpointer is not None
        assert self.tasks is not None
        self._writing = trio.CancelScope()
        self.tasks.start_soon(self._write, self._checkpointer, self._writing)
        try:
            span = holding.stage.span()
        except ConfigError as error:
            self.event("serving.off", reason=str(error))
            return
        await self.station.open(span)
        await self.announcer.say()

    async def _write(self, checkpointer: Checkpointer, scope: trio.CancelScope) -> None:
        with scope:
            await checkpointer.run()

    async def after_step(self, holding: Holding, version: int) -> None:
        assert self._checkpointer is not None
        await self._checkpointer.after_step(version, holding.state, self.station.compute)

    async def close(self, holding: Holding) -> None:
        self._writing.cancel()
        await self.station.close(self.station.config.leave_s)

    async def settled(self) -> None:
        """Return once nothing that was taken for a checkpoint waits to be written."""
        if self._checkpointer is not None:
            await self._checkpointer.settled()

    async def _on_compute(self, job: Callable[[], T]) -> T:
        return (await self.station.compute.run(job)).value
