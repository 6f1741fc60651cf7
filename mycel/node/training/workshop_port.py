"""Where a peer's stages come from: a real model's directory and disk in life, a few numbers in a simulation.

Ring: shell (signatures only).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from mycel.node.training.reducing import TiedEnd
from mycel.node.training.stage_port import StateHolder, TrainingStage

__all__ = ["Holding", "Workshop"]


@dataclass(frozen=True, slots=True)
class Holding:
    """A stage and its state, the parameters being shared by both. `tied_end` as in Reducer."""

    stage: TrainingStage
    state: StateHolder
    tied_end: TiedEnd | None = None


class Workshop(Protocol):
    """Where a stage comes from, and what is done with it besides training it."""

    async def choose(self, index: int) -> None:
        """This peer is about to hold that stage: let others know who look for us."""
        ...

    async def make(self, index: int) -> Holding:
        """A stage with the weights that the run began with, version 0. `kept` then says what is on the disk."""
        ...

    async def restore(self, holding: Holding, version: int | None) -> None:
        """Load the newest state that is on this machine, not after `version`; at last that of version 0."""
        ...

    async def store(self, holding: Holding, version: int, data: memoryview) -> None:
        """Write a state of this stage down that came from another machine."""
        ...

    async def archived(self, stage: int, version: int) -> tuple[memoryview, bytes] | None:
        """The state of any stage, out of a whole checkpoint on this machine, and the hash of its parameters."""
        ...

    def is_due(self, version: int) -> bool:
        """Whether there is a checkpoint after so many steps."""
        ...

    async def open(self, holding: Holding) -> None:
        """The stage has its state: it may be shown to others."""
        ...

    async def after_step(self, holding: Holding, version: int) -> None:
        """The state is that after `version` steps, until this returns."""
        ...

    async def close(self, holding: Holding) -> None:
        """The peer leaves this stage."""
        ...

    @property
    def kept(self) -> int:
        """The newest version of the stage on this machine's disk."""
        ...

    @property
    def whole(self) -> int:
        """The newest version of which all stages are."""
        ...
