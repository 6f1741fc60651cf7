"""A model made of a few numbers, to train in virtual time: honest gradients, the same bits for the same inputs.

    x = table[token]            first stage          V = 11 tokens, W = 4 wide
    x = x + softsign(x w + b)   each block           w, b: [W]
    loss = cross-entropy of x . head, summed over all target tokens, last stage

A stage's parameters are one flat float32 vector: the table first, then the blocks in order, then the head. With
`tied` the head is the table; over several stages the first and the last then hold a copy each, and `stage.tied` says
where. How a test uses it:

    plan = toy_plan(n_stages=3)
    state = ToyState(plan, 1)                 # its parameters and optimizer: a StateHolder
    stage = ToyStage(plan, 1, state)          # computes with exactly these: a TrainingStage
    wanted = toy_reference(plan, n_steps=4)   # wanted.digests[version][stage], wanted.sums[version][stage], ...

`stage.calls` counts what was computed, `stage.kept` what is kept; `stage` complains when it is used against its rules
(a graph of another version or input). Every result of `backward` lies in one buffer, which the next call overwrites.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from mycel.node.training.stage_port import Backpass, Samples
from mycel.protocols.errors import RemoteProtocolError
from mycel.swarm.training.lattice import GradientSum, to_float
from mycel.swarm.training.plan import RunPlan

VOCAB = 11
WIDTH = 4
TABLE = VOCAB * WIDTH
LEARNING_RATE = 0.3
MOMENTUM = 0.5
RUN = bytes(range(32))


def toy_plan(
    n_stages: int = 3,
    *,
    n_steps: int = 4,
    n_microbatches: int = 6,
    n_sequences: int = 2,
    n_tokens: int = 3,
    blocks_per_stage: int = 1,
) -> RunPlan:
    spans = tuple((i * blocks_per_stage, (i + 1) * blocks_per_stage) for i in range(n_stages))
    return RunPlan(RUN, spans, n_steps, n_microbatches, n_sequences, n_tokens)


@dataclass(frozen=True)
class ToySamples:
    """The same text for everybody: each token follows from the one before, but for one in seven."""

    n_tokens: int = 3

    def tokens(self, first: int, count: int) -> Tensor:
        rows = []
        for sample in range(first, first + count):
            row = [sample * 7919 % VOCAB]
            for at in range(self.n_tokens):
                odd = (sample * 31 + at * 17) % 7 == 0
                row.append((row[-1] * 3 + 1 + 5 * odd) % VOCAB)
            rows.append(row)
        return torch.tensor(rows, dtype=torch.int64)


class ToyState:
    """Parameters and optimizer (SGD with momentum) of one stage; one `seed` is one model, however it is cut."""

    def __init__(self, plan: RunPlan, index: int, *, tied: bool = False, seed: int = 0) -> None:
        parts = [_drawn(seed, block, 2 * WIDTH) for block in range(*plan.spans[index])]
        is_last = index == plan.n_stages - 1
        if index == 0:
            parts.insert(0, _drawn(seed, 1 << 20, TABLE))
        if is_last and not (tied and index == 0):
            parts.append(_drawn(seed, (1 << 20) + (0 if tied else 1), TABLE))
        self.tied = tied
        self.params_P = np.concatenate(parts)
        self._momentum_P = np.zeros_like(self.params_P)
        self._version = 0

    @property
    def version(self) -> int:
        return self._version

    @property
    def size_bytes(self) -> int:
        return 2 * self.params_P.nbytes

    def apply(self, sum_P: Tensor, scale: float) -> None:
        self._momentum_P *= np.float32(MOMENTUM)
        self._momentum_P += sum_P.numpy() * np.float32(scale)
        self.params_P -= np.float32(LEARNING_RATE) * self._momentum_P
        self._version += 1

    def params_digest(self) -> bytes:
        return hashlib.sha256(self.params_P.tobytes()).digest()

    def snapshot(self) -> memoryview:
        return memoryview(self.params_P.tobytes() + self._momentum_P.tobytes())

    def load(self, data: memoryview, version: int) -> None:
        if len(data) != self.size_bytes:
            raise RemoteProtocolError(f"a state of {len(data)} bytes; {self.size_bytes} are needed")
        both = np.frombuffer(data, dtype=np.float32)
        if not np.isfinite(both).all():
            raise RemoteProtocolError("a state with numbers that are not finite")
        self.params_P[:], self._momentum_P[:] = np.split(both, 2)
        self._version = version


@dataclass(slots=True)
class _Graph:
    """What a backward needs of its forward."""

    version: int
    inputs_NW: list[np.ndarray]  # noqa: N815 - of each block
    output_NW: np.ndarray  # noqa: N815


@dataclass(eq=False)
class ToyStage:
    """One stage of the toy. `calls["forward" or "backward", work]` counts; `keeps`: whether it keeps graphs at all."""

    plan: RunPlan
    index: int
    state: ToyState
    forward_s: float = 0.01
    backward_s: float = 0.02
    keeps: bool = True
    calls: Counter[tuple[str, bytes]] = field(default_factory=Counter)
    kept: dict[bytes, _Graph] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._grad_P = np.zeros_like(self.state.params_P)
        self._is_last = self.index == self.plan.n_stages - 1
        self._blocks_at = TABLE if self.index == 0 else 0
        # Where the head is: a tied table of a single stage is the first thing, else the last.
        self._head_at = 0 if self.state.tied and self.plan.n_stages == 1 else self.n_elements - TABLE

    @property
    def n_elements(self) -> int:
        return len(self.state.params_P)

    @property
    def tied(self) -> tuple[int, int] | None:
        if not self.state.tied or self.plan.n_stages == 1 or not (self.index == 0 or self._is_last):
            return None
        return (0, TABLE) if self.index == 0 else (self.n_elements - TABLE, self.n_elements)

    @property
    def _border_shape(self) -> tuple[int, int, int]:
        return self.plan.n_sequences, self.plan.n_tokens, WIDTH

    @property
    def input_shape(self) -> tuple[int, int, int] | None:
        return None if self.index == 0 else self._border_shape

    @property
    def output_shape(self) -> tuple[int, int, int] | None:
        return None if self._is_last else self._border_shape

    @np.errstate(all="ignore")  # as torch: what overflows is infinite
    def forward(self, work: bytes, tokens_BT1: Tensor, input_BTW: Tensor | None) -> Tensor:
        assert not self._is_last, "the last stage computes in backward alone"
        self.calls["forward", work] += 1
        graph = self._run(tokens_BT1, input_BTW)
        if self.keeps:
            self.kept[work] = graph
        return torch.from_numpy(graph.output_NW.reshape(self._border_shape).copy())

    @np.errstate(all="ignore")
    def backward(self, work: bytes, tokens_BT1: Tensor, input_BTW: Tensor | None, grad_BTW: Tensor | None) -> Backpass:
        self.calls["backward", work] += 1
        graph = self.kept.pop(work, None) or self._run(tokens_BT1, input_BTW)
        assert graph.version == self.state.version, "a graph of an older version was not forgotten"
        if input_BTW is not None:
            assert np.array_equal(graph.inputs_NW[0], input_BTW.reshape(-1, WIDTH).numpy()), "another input"
        self._grad_P[:] = 0
        loss = 0.0
        if self._is_last:
            assert grad_BTW is None
            loss, grad_NW = self._loss(graph.output_NW, tokens_BT1[:, 1:].reshape(-1).numpy())
        else:
            assert grad_BTW is not None
            grad_NW = grad_BTW.reshape(-1, WIDTH).numpy()
        grad_NW = self._back(graph, grad_NW)
        grad_P = torch.from_numpy(self._grad_P)
        if self.index > 0:
            return Backpass(grad_P, torch.from_numpy(grad_NW.reshape(self._border_shape).copy()), loss)
        np.add.at(self._grad_P[:TABLE].reshape(VOCAB, WIDTH), tokens_BT1[:, :-1].reshape(-1).numpy(), grad_NW)
        return Backpass(grad_P, None, loss)

    def forget(self, work: bytes) -> None:
        self.kept.pop(work, None)

    def cost_s(self, *, backward: bool) -> float:
        return self.backward_s if backward else self.forward_s

    # ---- arithmetic: elementwise and in a fixed order, N = B * T tokens

    def _block(self, vector_P: np.ndarray, row: int) -> tuple[np.ndarray, np.ndarray]:
        start = self._blocks_at + row * 2 * WIDTH
        return vector_P[start : start + WIDTH], vector_P[start + WIDTH : start + 2 * WIDTH]

    @property
    def _n_blocks(self) -> int:
        start, end = self.plan.spans[self.index]
        return end - start

    def _run(self, tokens_BT1: Tensor, input_BTW: Tensor | None) -> _Graph:
        if self.index == 0:
            assert input_BTW is None
            table_VW = self.state.params_P[:TABLE].reshape(VOCAB, WIDTH)
            hidden_NW = table_VW[tokens_BT1[:, :-1].reshape(-1).numpy()]
        else:
            assert input_BTW is not None
            hidden_NW = input_BTW.reshape(-1, WIDTH).numpy().copy()
        inputs = []
        for row in range(self._n_blocks):
            inputs.append(hidden_NW)
            w_W, b_W = self._block(self.state.params_P, row)
            z_NW = hidden_NW * w_W + b_W
            hidden_NW = hidden_NW + z_NW / (1 + np.abs(z_NW))
        return _Graph(self.state.version, inputs, hidden_NW)

    def _back(self, graph: _Graph, grad_NW: np.ndarray) -> np.ndarray:
        for row in reversed(range(self._n_blocks)):
            input_NW = graph.inputs_NW[row]
            w_W, b_W = self._block(self.state.params_P, row)
            grad_w_W, grad_b_W = self._block(self._grad_P, row)
            grad_z_NW = grad_NW / np.square(1 + np.abs(input_NW * w_W + b_W))
            grad_w_W += (grad_z_NW * input_NW).sum(0)
            grad_b_W += grad_z_NW.sum(0)
            grad_NW = grad_NW + grad_z_NW * w_W
        return grad_NW

    def _loss(self, output_NW: np.ndarray, targets_N: np.ndarray) -> tuple[float, np.ndarray]:
        """The loss summed over the tokens, and the gradient of what the blocks gave."""
        head = slice(self._head_at, self._head_at + TABLE)
        head_VW = self.state.params_P[head].reshape(VOCAB, WIDTH)
        logits_NV = (output_NW[:, None, :] * head_VW[None]).sum(-1)
        logits_NV -= logits_NV.max(-1, keepdims=True)
        exp_NV = np.exp(logits_NV)
        total_N = exp_NV.sum(-1)
        rows = np.arange(len(targets_N))
        loss = float((np.log(total_N) - logits_NV[rows, targets_N]).astype(np.float64).sum())
        grad_NV = exp_NV / total_N[:, None]
        grad_NV[rows, targets_N] -= 1
        grad_NV /= np.float32(self.plan.step_tokens)
        self._grad_P[head] += (grad_NV[:, :, None] * output_NW[:, None, :]).sum(0).reshape(-1)
        return loss, (grad_NV[:, :, None] * head_VW[None]).sum(1)


@dataclass
class ToyReference:
    """What one process alone gets. Versions count from 0; `sums` and `losses` are of the step that begins there.

    `sums` are int64 on the lattice, of each stage alone: the share of the other end of a tied table is not in them.
    """

    digests: list[tuple[bytes, ...]] = field(default_factory=list)
    sums: list[tuple[Tensor, ...]] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)


def same(border_BTW: Tensor) -> Tensor:
    return border_BTW


def toy_reference(
    plan: RunPlan,
    samples: Samples | None = None,
    n_steps: int | None = None,
    *,
    tied: bool = False,
    seed: int = 0,
    clip: float = 0.0,
    border: Callable[[Tensor], Tensor] = same,
) -> ToyReference:
    """Train in one place. `border` is what crossing a border does to a tensor: the codec, there and back."""
    samples = samples or ToySamples(plan.n_tokens)
    states = [ToyState(plan, index, tied=tied, seed=seed) for index in range(plan.n_stages)]
    stages = [ToyStage(plan, index, state) for index, state in enumerate(states)]
    reference = ToyReference()
    reference.digests.append(tuple(state.params_digest() for state in states))
    for version in range(plan.n_steps if n_steps is None else n_steps):
        sums = [GradientSum(stage.n_elements) for stage in stages]
        losses: dict[int, float] = {}
        for number in range(plan.n_microbatches):
            work = plan.work(version, number)
            losses[number] = _walk(stages, sums, work.id, samples.tokens(work.first, work.count), border)
        reference.sums.append(tuple(total.sum_P for total in sums))
        reference.losses.append(sum(losses.values()))
        _step(stages, [to_float(total.sum_P) for total in sums], clip)
        reference.digests.append(tuple(state.params_digest() for state in states))
    return reference


def _walk(
    stages: list[ToyStage],
    sums: list[GradientSum],
    work: bytes,
    tokens_BT1: Tensor,
    border: Callable[[Tensor], Tensor],
) -> float:
    """One microbatch through all stages and back; its loss."""
    inputs: list[Tensor | None] = [None]
    for stage in stages[:-1]:
        inputs.append(border(stage.forward(work, tokens_BT1, inputs[-1])))
    grad_BTW, loss = None, 0.0
    for stage in reversed(stages):
        backpass = stage.backward(work, tokens_BT1, inputs[stage.index], grad_BTW)
        sums[stage.index].add(backpass.grad_P)
        loss += backpass.loss
        grad_BTW = border(backpass.grad_BTW) if backpass.grad_BTW is not None else None
    return loss


def _step(stages: list[ToyStage], sums: list[Tensor], clip: float) -> None:
    """As a step of the swarm: both ends of a tied table get the sum of both shares, which counts once in the norm."""
    first, last = stages[0].tied, stages[-1].tied
    if first is not None and last is not None:
        shared = sums[0][slice(*first)] + sums[-1][slice(*last)]
        sums[0][slice(*first)] = shared
        sums[-1][slice(*last)] = shared
    sum_sq = 0.0
    for stage, total_P in zip(stages, sums, strict=True):
        own_P = total_P if stage.index == 0 or stage.tied is None else total_P[: stage.tied[0]]
        sum_sq += float(own_P.double().square().sum())
    scale = min(1.0, clip / (sum_sq**0.5 + 1e-6)) if clip else 1.0
    for stage, total_P in zip(stages, sums, strict=True):
        stage.state.apply(total_P, scale)


def _drawn(seed: int, part: int, count: int) -> np.ndarray:
    return np.random.default_rng([seed, part]).normal(0, 0.5, count).astype(np.float32)
