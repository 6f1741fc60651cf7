"""A peer's own steps between two rounds, on the whole of what its group shares: forward, backward, optimizer.

Which samples it takes follows from the round's beacon and its own id (swarm/training/assigned.py).

Legend: B sequences, T target tokens of each, P parameters.

Ring: shell.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
import trio
from torch import Tensor

from mycel.node.training.optimizer import FlatState
from mycel.node.training.stage_port import TrainingStage
from mycel.node.training.work_port import Worked
from mycel.protocols.ports import Compute
from mycel.swarm.training.assigned import assigned
from mycel.swarm.training.pipeline import Load
from mycel.swarm.training.plan import RunPlan

__all__ = ["LocalWork"]


@dataclass(eq=False)
class LocalWork:
    """The `Work` of one peer. `params_P` is what `stage` computes with and `state` changes; all on the compute thread.

    `clip` bounds the norm of each inner step's gradient, 0 for not at all.
    """

    me: str
    plan: RunPlan
    stage: TrainingStage
    state: FlatState
    params_P: Tensor  # noqa: N815 - its shape
    compute: Compute
    load: Load
    clip: float

    async def start(self, params_P: Tensor, version: int) -> None:
        def job() -> None:
            self.params_P.copy_(params_P)
            self.state.begin_at(version)

        await self.compute.run(job)

    async def steps(self, beacon: bytes, first: int, count: int) -> tuple[Tensor, Worked]:
        began_s, losses = trio.current_time(), 0.0
        for step in range(first, first + count):
            sum_P = torch.zeros_like(self.params_P)
            losses += await self._add_batch(beacon, step, sum_P)
            await self.compute.run(partial(self._apply, sum_P))
        params_P = (await self.compute.run(self.params_P.clone)).value
        return params_P, Worked(count, losses / max(count, 1), trio.current_time() - began_s)

    async def gradients(self, beacon: bytes, first: int, count: int) -> tuple[Tensor, Worked]:
        began_s, losses, sum_P = trio.current_time(), 0.0, torch.zeros_like(self.params_P)
        for step in range(first, first + count):
            losses += await self._add_batch(beacon, step, sum_P)
        return sum_P, Worked(count, losses / max(count, 1), trio.current_time() - began_s)

    async def forget(self) -> None:
        def job() -> None:
            version = self.state.version
            # All zero, the parameters too: whoever lets go of moments starts from other parameters.
            self.state.load(memoryview(bytearray(self.state.size_bytes)), 0)
            self.state.begin_at(version)

        await self.compute.run(job)

    async def _add_batch(self, beacon: bytes, step: int, sum_P: Tensor) -> float:
        """Add the gradient of one step's batch, unclipped; the mean loss of a target token."""
        loss = 0.0
        for number in range(self.plan.n_microbatches):
            tokens_BT1 = await self.load(assigned(beacon, self.me, step, number), self.plan.n_sequences)
            loss += (await self.compute.run(partial(self._add, tokens_BT1, sum_P))).value
        return loss / self.plan.step_tokens

    def _add(self, tokens_BT1: Tensor, sum_P: Tensor) -> float:
        back = self.stage.backward(b"", tokens_BT1, None, None)
        sum_P += back.grad_P
        return back.loss

    def _apply(self, sum_P: Tensor) -> None:
        norm = float(torch.linalg.vector_norm(sum_P))
        self.state.apply(sum_P, min(1.0, self.clip / (norm + 1e-6)) if self.clip else 1.0)
