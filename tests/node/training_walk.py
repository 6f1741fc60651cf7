"""Stages of a tiny model in one process, a microbatch's walk through them, and the unsplit model beside them."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch.nn import functional
from transformers import AutoModelForCausalLM

from mycel.node.span import Span
from mycel.node.training.stage import TorchStage
from mycel.protocols.borders import decode_border, encode_border
from mycel.swarm.training.plan import RunPlan
from mycel.swarm.training.recipe import BorderPart, Recipe

# More tokens than the windows of the tiny models are wide.
N_SEQUENCES, N_TOKENS = 2, 12
SPANS = {1: ((0, 4),), 2: ((0, 2), (2, 4)), 3: ((0, 1), (1, 3), (3, 4))}
FLOAT32 = BorderPart(codec="float32")
WORK = b"w" * 32


def plan_of(n_stages: int) -> RunPlan:
    return RunPlan(bytes(32), SPANS[n_stages], 10, 3, N_SEQUENCES, N_TOKENS)


def tokens_of(seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (N_SEQUENCES, N_TOKENS + 1), generator=generator)


def load(
    directory: Path,
    n_stages: int,
    border: BorderPart = FLOAT32,
    *,
    recompute: str = "auto",
    seed: int = 5,
    keep_bytes: int = 1 << 30,
) -> list[TorchStage]:
    recipe = Recipe("test", border=border, stages=n_stages, seed=seed, recompute=recompute)
    return [TorchStage.load(directory, plan_of(n_stages), i, recipe, keep_bytes=keep_bytes) for i in range(n_stages)]


@dataclass
class Walk:
    """What a walk gave: the loss, each stage's gradient, what came in at each stage and what it sent back."""

    loss: float
    grads: list[torch.Tensor]
    inputs: list[torch.Tensor | None]
    input_grads: list[torch.Tensor | None]

    def tensors(self) -> list[torch.Tensor]:
        return [*self.grads, *(t for t in (*self.inputs, *self.input_grads) if t is not None)]


def crossed(tensor: torch.Tensor, border: BorderPart) -> torch.Tensor:
    return decode_border(encode_border(tensor, border.codec), tuple(tensor.shape), border.codec)


def walk(stages: Sequence[TorchStage], tokens: torch.Tensor, border: BorderPart = FLOAT32, work: bytes = WORK) -> Walk:
    inputs: list[torch.Tensor | None] = [None]
    for stage in stages[:-1]:
        output = stage.forward(work, tokens, inputs[-1])
        assert tuple(output.shape) == stage.output_shape
        inputs.append(crossed(output, border))
    walked, grad = Walk(0.0, [], inputs, []), None
    for stage, given in zip(reversed(stages), reversed(inputs), strict=True):
        passed = stage.backward(work, tokens, given, grad)
        grad = None if passed.grad_BTW is None else crossed(passed.grad_BTW, border)
        walked.loss += passed.loss
        walked.grads.insert(0, passed.grad_P.clone())
        walked.input_grads.insert(0, passed.grad_BTW)
    return walked


def same(a: Walk, b: Walk) -> bool:
    """Equal to the bit."""
    return a.loss == b.loss and all(torch.equal(x, y) for x, y in zip(a.tensors(), b.tensors(), strict=True))


def by_name(stages: Sequence[TorchStage], grads: Sequence[torch.Tensor]) -> dict[str, torch.Tensor]:
    """Gradients of the whole model; those of both ends of a tied table added up."""
    total: dict[str, torch.Tensor] = {}
    for stage, grad_P in zip(stages, grads, strict=True):
        for name, start, end, shape in stage.layout.parameters:
            part = grad_P[start:end].view(shape)
            total[name] = total[name] + part if name in total else part
    return total


def unsplit(directory: Path, tokens: torch.Tensor, step_tokens: int) -> tuple[float, dict[str, torch.Tensor]]:
    """The loss sum of transformers' own model, and torch's gradients of it."""
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    logits = model(tokens[:, :-1], use_cache=False).logits
    loss = functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction="sum")
    (loss / step_tokens).backward()
    grads = {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in model.named_parameters()}
    return loss.item(), grads


def assert_equals_unsplit(directory: Path, n_stages: int) -> None:
    tokens = tokens_of()
    stages = load(directory, n_stages)
    walked = walk(stages, tokens)
    loss, expected = unsplit(directory, tokens, plan_of(n_stages).step_tokens)
    assert abs(walked.loss - loss) <= 1e-5 * loss
    actual = by_name(stages, walked.grads)
    assert expected.keys() <= actual.keys()
    assert not any(bool(actual[name].any()) for name in actual.keys() - expected.keys()), "constants have no gradient"
    largest = max(float(grad.abs().max()) for grad in expected.values())
    assert largest > 1e-3
    for name, grad in expected.items():
        # Relative to the tensor's own largest element; where a softmax cancels a bias, its gradient is noise.
        scale = max(float(grad.abs().max()), 1e-2 * largest)
        assert float((actual[name] - grad).abs().max()) <= 1e-5 * scale, name


def step(stages: Sequence[TorchStage], grads: Sequence[torch.Tensor], rate: float) -> None:
    """Plain gradient descent; both ends of a tied table get the sum."""
    grads = [grad.clone() for grad in grads]
    if stages[0].tied is not None:
        (a, b), (c, d) = stages[0].tied, stages[-1].tied
        total = grads[0][a:b] + grads[-1][c:d]
        grads[0][a:b] = grads[-1][c:d] = total
    for stage, grad_P in zip(stages, grads, strict=True):
        stage.params_P.sub_(rate * grad_P)


def saved(stages: Sequence[TorchStage], directory: Path, target: Path) -> Path:
    """A Hugging Face directory of what the stages hold, written by nothing but their tables of tensors."""
    target.mkdir()
    shutil.copy(directory / "config.json", target)
    tensors = {
        name: stage.params_P[start:end].view(shape).clone()
        for stage in stages
        for name, start, end, shape in stage.tensors
    }
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    return target


def logits_of(spans: Sequence[Span], ids: torch.Tensor) -> torch.Tensor:
    state = ids
    for span in spans:
        state = span.forward(state, span.new_cache())
    return spans[-1].logits(state)


def assert_serves_what_it_trains(directory: Path, n_stages: int, target: Path) -> None:
    """After two steps: the live spans, spans loaded from a saved copy, and transformers on that copy say the same."""
    stages = load(directory, n_stages)
    before = logits_of([stage.span() for stage in stages], tokens_of(9)[0])
    for seed in range(2):
        step(stages, walk(stages, tokens_of(seed)).grads, 0.05)
    saved(stages, directory, target)
    ids = tokens_of(9)[0]
    live = logits_of([stage.span() for stage in stages], ids)
    assert float((live - before).abs().max()) > 1e-3
    fresh = logits_of([Span.load(target, start, end) for start, end in SPANS[n_stages]], ids)
    assert float((live - fresh).abs().max()) <= 1e-5 * max(1.0, float(fresh.abs().max()))
    with torch.inference_mode():
        model = AutoModelForCausalLM.from_pretrained(target, dtype=torch.float32).eval()
        whole = model(ids.unsqueeze(0), use_cache=False).logits[0]
    assert float((live - whole).abs().max()) <= 1e-4
