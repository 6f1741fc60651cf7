"""Checkpoints while training goes on: the state is copied between two steps and written behind the next ones.

One is written at a time. If the disk is slower than the steps, the newest copy waits and an older one that waits is
dropped, so that no more than two are ever in memory. A disk that fails costs a checkpoint and an event, never the run.

Ring: shell.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Protocol, TypeVar

import trio

from mycel.node.events import EventSink, no_events
from mycel.node.training.checkpoint_bytes import Check
from mycel.node.training.checkpoint_files import CheckpointPlace, complete, missing_parts, read_part, write_part
from mycel.node.training.checkpoint_layout import StageFiles
from mycel.node.training.checkpoint_read import Checkpoint, Found, newest, read_stage, whole_checkpoints
from mycel.node.training.stage_port import StateHolder
from mycel.protocols.errors import ConfigError
from mycel.protocols.ports import Compute
from mycel.swarm.training.bell import Bell
from mycel.swarm.training.recipe import CheckpointPart

__all__ = [
    "Checkpoint",
    "CheckpointPlace",
    "Checkpointer",
    "Found",
    "StageFiles",
    "complete",
    "is_due",
    "missing_parts",
    "newest",
    "read_part",
    "read_stage",
    "write_part",
]

T = TypeVar("T")


class Blocking(Protocol):
    """Runs a job that waits for the disk, handing it a `check` that ends it when its caller is cancelled."""

    def __call__(self, job: Callable[[Check], T], /) -> Awaitable[T]: ...


async def on_thread(job: Callable[[Check], T]) -> T:
    """On a worker thread. Cancelled, the job ends at its next `check`."""
    return await trio.to_thread.run_sync(job, trio.from_thread.check_cancelled)


def is_due(part: CheckpointPart, version: int, n_steps: int, stride: int = 1) -> bool:
    """Whether there is a checkpoint after `version` steps: at every multiple of `every`, and at the end.

    Versions go by `stride`: the first one at or after a multiple is meant.
    """
    is_multiple = part.every > 0 and version // part.every > (version - stride) // part.every
    return version > 0 and (version == n_steps or is_multiple)


class Checkpointer:
    """One peer's checkpoints of its stage. `run` has to run for anything to be written.

    `kept` is the newest version of this stage that is on disk, `whole` the newest of which all stages are; both are 0
    for the weights that the run began with.
    """

    def __init__(
        self,
        place: CheckpointPlace,
        stage: StageFiles,
        is_due: Callable[[int], bool],
        *,
        whole: int = 0,
        event: EventSink = no_events,
        blocking: Blocking = on_thread,
    ) -> None:
        """`whole` is the version of the checkpoint that was found at the start."""
        self._place = place
        self._stage = stage
        self._is_due = is_due
        self._event = event
        self._blocking = blocking
        self._bell = Bell()
        self._waiting: tuple[int, memoryview] | None = None
        self._writing = False
        self.kept = whole
        self.whole = whole
        self._perhaps_whole = False
        self._lock = trio.Lock()

    async def after_step(self, version: int, state: StateHolder, compute: Compute) -> None:
        """Take a copy of the state if a checkpoint is due. Await it before anything changes the state again."""
        if self.whole < self.kept:
            self._perhaps_whole = True
            self._bell.ring()
        if not self._is_due(version) or version <= self.kept:
            return
        snapshot = (await compute.run(state.snapshot)).value
        if self._waiting is not None:
            self._event("checkpoint.dropped", version=self._waiting[0], reason="the disk is slower than the steps")
        self._waiting = version, snapshot
        self._bell.ring()

    async def run(self) -> None:
        """Write what waits, until cancelled; what is then half written stays away."""
        while True:
            seen = self._bell.count
            if self._waiting is not None:
                self._writing = True
                try:
                    await self._write_waiting()
                finally:
                    self._writing = False
                    self._bell.ring()
            elif self._perhaps_whole:
                self._perhaps_whole = False
                await self._look()
            else:
                await self._bell.after(seen)

    async def settled(self) -> None:
        """Return once every copy that was taken is on disk, dropped or has failed."""
        while self._waiting is not None or self._writing:
            await self._bell.after(self._bell.count)

    async def add(self, stage: StageFiles, version: int, snapshot: memoryview) -> bool:
        """Write a part, be it of another stage that was fetched from its peers; whether it is on disk now."""
        place, n_stages = self._place, stage.n_stages
        async with self._lock:
            try:
                await self._blocking(lambda check: write_part(place, version, stage, snapshot, check))
                if stage.index == self._stage.index:
                    self.kept = max(self.kept, version)
                self._event("checkpoint.written", version=version, stage=stage.index, size_bytes=snapshot.nbytes)
                missing = await self._blocking(lambda check: complete(place, version, n_stages, check))
                if reason := missing.get(stage.index):
                    raise ConfigError(reason)
            except ConfigError as error:
                self._event("checkpoint.failed", version=version, stage=stage.index, reason=str(error))
                return False
        if not missing:
            self._see_whole(version)
        return True

    async def missing_parts(self, version: int) -> dict[int, str]:
        """The stages whose parts at `version` are not on this disk, and why. Raises ConfigError if it is unreadable."""
        return await self._blocking(lambda _: missing_parts(self._place, version, self._stage.n_stages))

    async def _write_waiting(self) -> None:
        """In a function of its own, so that nothing holds the copy when it is written."""
        assert self._waiting is not None
        (version, snapshot), self._waiting = self._waiting, None
        await self.add(self._stage, version, snapshot)

    async def _look(self) -> None:
        """Another process may have found the last part."""
        found = await self._blocking(lambda _: whole_checkpoints(self._place.directory, self._place.run))
        if found:
            self._see_whole(found[0][0])

    def _see_whole(self, version: int) -> None:
        if version > self.whole:
            self.whole = version
            self._event("checkpoint.whole", version=version, path=str(self._place.whole(version)))
