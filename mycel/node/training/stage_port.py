"""What training needs of a stage's blocks: torch modules in life, a few numbers in a simulation.

Legend: B sequences, T target tokens of each, W width at a border, P the stage's parameters, flattened in a fixed order.

Ring: algorithms (signatures only).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor


@dataclass(frozen=True, slots=True)
class Backpass:
    """What one backward gives: flat gradient [P] (float32, valid until the next call), that of the input, the loss.

    `grad_BTW` is None on the first stage. `loss` is the sum over all target tokens on the last stage, else 0. Gradients
    are those of the loss sum divided by the target tokens of a whole step (`RunPlan.step_tokens`).
    """

    grad_P: Tensor  # noqa: N815 - its shape
    grad_BTW: Tensor | None  # noqa: N815
    loss: float


class TrainingStage(Protocol):
    """One stage with its present parameters. All calls are made on the compute thread, one at a time."""

    @property
    def index(self) -> int: ...
    @property
    def n_elements(self) -> int: ...

    @property
    def tied(self) -> tuple[int, int] | None:
        """Elements [start, end) of the flat parameters that are a table shared with the other end of the pipeline.

        Set on the first and the last stage of a model with tied embeddings and more than one stage.
        """
        ...

    @property
    def input_shape(self) -> tuple[int, int, int] | None:
        """(B, T, W) of what the stage before sends; None on the first stage."""
        ...

    @property
    def output_shape(self) -> tuple[int, int, int] | None:
        """(B, T, W) of what this stage sends on; None on the last stage."""
        ...

    def forward(self, work: bytes, tokens_BT1: Tensor, input_BTW: Tensor | None) -> Tensor:
        """output_BTW for the next stage; not called on the last. May keep the graph of `work` for its backward.

        `tokens_BT1` are int64 ids [B, T + 1]: inputs and, one to the right, targets.
        """
        ...

    def backward(self, work: bytes, tokens_BT1: Tensor, input_BTW: Tensor | None, grad_BTW: Tensor | None) -> Backpass:
        """From the kept graph, or recomputed from the input: the same to the bit. `grad_BTW` is None on the last stage.

        The parameters' own gradients stay as they were: what this gives is this microbatch's alone.
        """
        ...

    def forget(self, work: bytes) -> None:
        """Drop what is kept of `work`, if anything."""
        ...

    def cost_s(self, *, backward: bool) -> float:
        """What a simulated processor charges for one call; a real one ignores it."""
        ...


class StateHolder(Protocol):
    """The stage's parameters with their optimizer. All calls are made on the compute thread."""

    @property
    def version(self) -> int:
        """Steps made."""
        ...

    @property
    def size_bytes(self) -> int:
        """Of `snapshot`."""
        ...

    def apply(self, sum_P: Tensor, scale: float) -> None:
        """Make one step with `sum_P * scale` as the gradient; `version` grows by one."""
        ...

    def params_digest(self) -> bytes:
        """SHA-256 of the parameters' bytes."""
        ...

    def snapshot(self) -> memoryview:
        """A copy of parameters and optimizer state as bytes, the same for equal states."""
        ...

    def load(self, data: memoryview, version: int) -> None:
        """Become the state that `snapshot` gave. Raises RemoteProtocolError for a wrong size or values not finite."""
        ...


class Samples(Protocol):
    """The run's endless order of samples. Called on a worker thread; must be quick and thread-safe."""

    def tokens(self, first: int, count: int) -> Tensor:
        """Token ids of sequences [first, first + count): int64 [count, T + 1]."""
        ...
