"""A peer's own steps against transformers and torch's AdamW, on the batches that the beacon says."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch
import trio
from torch.nn import functional
from transformers import AutoModelForCausalLM

from mycel.node.compute import DeviceCompute
from mycel.node.training.local_work import LocalWork
from mycel.node.training.optimizer import FlatState
from mycel.node.training.stage import TorchStage
from mycel.swarm.training.assigned import assigned
from mycel.swarm.training.recipe import OptimizerPart, SchedulePart
from tests.node.training_walk import N_SEQUENCES, load, plan_of, tokens_of
from tests.tiny_models import make_tiny_model

BEACON, ME = bytes(range(32)), "12D3KooWme"
PLAN = plan_of(1)
RATE, DECAY, CLIP = 1e-2, 0.1, 0.5
# AdamW divides by the gradient's size: with a larger epsilon noise in tiny gradients does not become a whole step.
OPTIMIZER = OptimizerPart(learning_rate=RATE, weight_decay=DECAY, epsilon=1e-4, clip=CLIP)
FLAT = SchedulePart("constant")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    return make_tiny_model("llama", tmp_path_factory.mktemp("models") / "llama")


def work_of(model: Path, schedule: SchedulePart = FLAT) -> tuple[LocalWork, TorchStage]:
    [stage] = load(model, 1)
    state = FlatState(stage.params_P, stage.decay_end, OPTIMIZER, schedule, 10)

    async def tokens(first: int, count: int) -> torch.Tensor:
        assert count == N_SEQUENCES
        return tokens_of(first)

    return LocalWork(ME, PLAN, stage, state, stage.params_P, DeviceCompute(), tokens, CLIP), stage


def reference(directory: Path, steps: range) -> tuple[dict[str, torch.Tensor], float]:
    """The parameters after these steps, and the mean loss of a target token in them."""
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    groups = [
        {"params": [p for p in model.parameters() if p.dim() >= 2], "weight_decay": DECAY},
        {"params": [p for p in model.parameters() if p.dim() < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, RATE, betas=OPTIMIZER.betas, eps=OPTIMIZER.epsilon)
    total = 0.0
    for step in steps:
        optimizer.zero_grad()
        for number in range(PLAN.n_microbatches):
            tokens = tokens_of(assigned(BEACON, ME, step, number))
            logits = model(tokens[:, :-1], use_cache=False).logits
            loss = functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction="sum")
            (loss / PLAN.step_tokens).backward()
            total += loss.item() / PLAN.step_tokens
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
    return {name: parameter.detach() for name, parameter in model.named_parameters()}, total / len(steps)


def assert_equal(stage: TorchStage, params_P: torch.Tensor, expected: dict[str, torch.Tensor]) -> None:
    for name, start, end, shape in stage.layout.parameters:
        assert float((params_P[start:end].view(shape) - expected[name]).abs().max()) <= 1e-6, name


def test_inner_steps_are_those_of_torch(model: Path) -> None:
    work, stage = work_of(model)
    before_P = stage.params_P.clone()
    params_P, worked = trio.run(work.steps, BEACON, 0, 3)
    expected, loss = reference(model, range(3))
    assert_equal(stage, params_P, expected)
    assert float((params_P - before_P).abs().max()) > RATE, "nothing has moved"
    assert abs(worked.loss - loss) <= 1e-5 * loss
    assert worked.n_steps == 3
    assert worked.seconds > 0
    # A copy: what the peer does next does not change what it offers.
    assert params_P.data_ptr() != stage.params_P.data_ptr()


def test_steps_in_two_portions_are_the_same_steps(model: Path) -> None:
    async def steps(work: LocalWork, portions: tuple[tuple[int, int], ...]) -> torch.Tensor:
        for first, count in portions:
            params_P, _ = await work.steps(BEACON, first, count)
        return params_P

    whole = trio.run(steps, work_of(model)[0], ((0, 3),))
    assert torch.equal(whole, trio.run(steps, work_of(model)[0], ((0, 1), (1, 2))))
    assert not torch.equal(whole, trio.run(steps, work_of(model)[0], ((0, 1), (5, 2)))), "the batches matter"


def test_gradients_leave_the_parameters_alone(model: Path) -> None:
    work, stage = work_of(model)
    before_P = stage.params_P.clone()

    async def both() -> tuple[torch.Tensor, torch.Tensor]:
        sum_P, worked = await work.gradients(BEACON, 0, 2)
        assert worked.n_steps == 2
        return sum_P, (await work.gradients(BEACON, 1, 1))[0]

    sum_P, second_P = trio.run(both)
    assert torch.equal(stage.params_P, before_P)
    first_P, _ = trio.run(work_of(model)[0].gradients, BEACON, 0, 1)
    assert torch.allclose(sum_P, first_P + second_P, atol=1e-7)
    assert float(torch.linalg.vector_norm(sum_P)) > CLIP, "it is not clipped"


def test_the_rate_goes_by_the_run_and_moments_can_be_let_go(model: Path) -> None:
    """Steps of a peer that begins at the end of a run are small; after `forget` they are those of a fresh optimizer."""
    warm = SchedulePart("linear", final=0.0)

    async def moved(version: int, *, spoil: bool = False) -> torch.Tensor:
        work, stage = work_of(model, warm)
        start_P = stage.params_P.clone()
        if spoil:
            await work.steps(BEACON, 7, 2)
            await work.forget()
        await work.start(start_P, version)
        params_P, _ = await work.steps(BEACON, 0, 1)
        return params_P - start_P

    early, late = trio.run(moved, 0), trio.run(moved, 9)
    assert float(early.abs().max()) > 0
    assert not bool(late.any())
    assert torch.equal(trio.run(partial(moved, 0, spoil=True)), early)


def test_nobody_has_the_batches_of_another() -> None:
    drawn = {
        assigned(beacon, peer, step, number)
        for beacon in (BEACON, bytes(32))
        for peer in ("a", "b")
        for step in range(4)
        for number in range(3)
    }
    assert len(drawn) == 48
    assert all(0 <= first < 1 << 40 for first in drawn)
