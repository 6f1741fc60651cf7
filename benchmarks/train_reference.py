"""What runs are measured against: one process that trains the same model on the same microbatches with no network.

    python -m benchmarks.train_reference transformers 2 RECIPE DATA
    python -m benchmarks.train_reference own 2 RECIPE DATA
    python -m benchmarks.train_reference bookkeeping 1 PARAMETERS REPEATS

The first two answer each line of standard input, a number of steps, with a JSON line. "transformers" is what anybody
would write: the model as transformers has it, torch's AdamW. "own" is Mycel's only stage of a run with one stage, with
the sums and hashes that a step has, called straight. The third measures what a step costs besides the model.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from mycel.node.training.founding import FoundedRun, found_run, plan_of
from mycel.node.training.ledger import Ledger
from mycel.node.training.optimizer import FlatState
from mycel.node.training.stage import TorchStage
from mycel.node.training.sum_table import SumTable, digest, sum_of_squares
from mycel.node.training.sums import pieces
from mycel.node.weights_load import no_progress_bar
from mycel.protocols.training import Reduced
from mycel.swarm.training.lattice import check_partial, to_float
from mycel.swarm.training.plan import RunPlan
from mycel.swarm.training.recipe import OptimizerPart, Recipe, SchedulePart

# One step: its version in, its loss per token out.
Step = Callable[[int], float]


def transformers_step(founded: FoundedRun, plan: RunPlan) -> Step:
    """transformers' model, torch's optimizer."""
    from transformers import AutoModelForCausalLM

    with no_progress_bar():
        model: Any = AutoModelForCausalLM.from_pretrained(founded.directory, dtype=torch.float32).eval()
    recipe = founded.recipe.optimizer
    parameters = list(model.parameters())
    groups: list[dict[str, Any]] = [
        {"params": [p for p in parameters if p.dim() >= 2]},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(
        groups, recipe.learning_rate, recipe.betas, recipe.epsilon, weight_decay=recipe.weight_decay
    )

    def step(version: int) -> float:
        total = 0.0
        for number in range(plan.n_microbatches):
            tokens_BT1 = samples(founded, plan, version, number)
            logits_BTV = model(input_ids=tokens_BT1[:, :-1], use_cache=False).logits
            loss = functional.cross_entropy(logits_BTV.flatten(0, 1), tokens_BT1[:, 1:].flatten(), reduction="sum")
            torch.autograd.backward(loss / plan.step_tokens)
            total += float(loss.detach())
        torch.nn.utils.clip_grad_norm_(parameters, recipe.clip)
        optimizer.step()
        optimizer.zero_grad()
        return total / plan.step_tokens

    return step


def own_step(founded: FoundedRun, plan: RunPlan) -> Step:
    """The whole model as one stage: all that a peer computes, and nothing that it says."""
    recipe = founded.recipe
    stage = TorchStage.load(founded.directory, plan, 0, recipe)
    state = FlatState(stage.params_P, stage.decay_end, recipe.optimizer, recipe.schedule, plan.n_steps)
    ledger = Ledger(stage.n_elements)

    def step(version: int) -> float:
        for number in range(plan.n_microbatches):
            tokens_BT1 = samples(founded, plan, version, number)
            backpass = stage.backward(plan.work(version, number).id, tokens_BT1, None, None)
            ledger.count(version, number, backpass.grad_P, backpass.loss)
        loss = sum(ledger.losses.values())
        sum_P = to_float(ledger.sum.sum_P)
        digest(sum_P)
        norm = sum_of_squares(sum_P, None) ** 0.5
        state.apply(sum_P, min(1.0, recipe.optimizer.clip / (norm + 1e-6)))
        ledger.advance(version + 1)
        state.params_digest()
        return loss / plan.step_tokens

    return step


def samples(founded: FoundedRun, plan: RunPlan, version: int, number: int) -> Tensor:
    """The tokens of one microbatch."""
    work = plan.work(version, number)
    return founded.dataset.tokens(work.first, work.count).to(torch.int64)


def answer(make: Callable[[FoundedRun, RunPlan], Step], recipe: Path, data: Path) -> None:
    """Steps on request, the run going on from one request to the next."""
    founded = found_run(recipe, data)
    plan = plan_of(founded.recipe, bytes(32), founded.directory)
    step, version = make(founded, plan), 0
    print("ready", flush=True)
    for line in sys.stdin:
        began_s, losses = time.perf_counter(), []
        for _ in range(int(line)):
            losses.append(step(version))
            version += 1
        seconds = time.perf_counter() - began_s
        print(json.dumps({"seconds": seconds, "tokens": len(losses) * plan.step_tokens, "losses": losses}), flush=True)


# ---- what a step costs besides the model


def bookkeeping(n_elements: int, repeats: int) -> None:
    """Prints one JSON object: for each job its seconds, of which the median of `repeats`, and how often it is done."""
    recipe = Recipe("bench", optimizer=OptimizerPart(), schedule=SchedulePart("constant"))
    params_P = torch.randn(n_elements) * 0.02
    state = FlatState(params_P, n_elements, recipe.optimizer, recipe.schedule, 1 << 20)
    ledger, grad_P = Ledger(n_elements), torch.randn(n_elements) * 1e-4
    ledger.count(0, 0, grad_P, 1.0)
    table, other = SumTable(n_elements, None), Ledger(n_elements)
    other.count(0, 1, grad_P, 1.0)
    sum_P = to_float(ledger.sum.sum_P)

    def reduce_alone() -> None:
        """As Reducer does, piece by piece: a copy of the own share, added to nothing, made float32."""
        table.restart(0)
        for low, high in pieces(0, n_elements):
            total_N = torch.zeros(high - low, dtype=torch.int64)
            part_N = ledger.partial(0, 1, low, high - low)
            assert part_N is not None
            total_N += part_N
            table.write(low, to_float(total_N))

    def add_peer() -> None:
        """Another peer's share of all elements, as if it had just come."""
        for low, high in pieces(0, n_elements):
            part_N = other.partial(0, 2, low, high - low)
            assert part_N is not None
            check_partial(part_N, high - low, 1, "other")
            ledger.sum.sum_P[low:high] += part_N

    def seal() -> None:
        Reduced(0, digest(sum_P), sum_of_squares(sum_P, None))

    jobs: list[tuple[str, str, Callable[[], object]]] = [
        ("gradient set to zero", "microbatch", grad_P.zero_),
        ("gradient added on the lattice", "microbatch", lambda: ledger.sum.add(grad_P)),
        ("a peer's share answered, checked, added", "step and peer", add_peer),
        ("the stage's own sum, as float32", "step", reduce_alone),
        ("hash and norm of the sum", "step", seal),
        ("AdamW", "step", lambda: state.apply(sum_P, 1.0)),
        ("hash of the parameters", "step", state.params_digest),
        ("the lattice set to zero", "step", ledger.sum.clear),
        ("copy of the state", "checkpoint", state.snapshot),
    ]
    said = []
    for name, per, job in jobs:
        job()
        times_s = []
        for _ in range(repeats):
            began_s = time.perf_counter()
            job()
            times_s.append(time.perf_counter() - began_s)
        said.append({"job": name, "per": per, "best_s": min(times_s), "median_s": median(times_s)})
    print(json.dumps(said), flush=True)


def main() -> None:
    what, threads, *rest = sys.argv[1:]
    torch.set_num_threads(int(threads))
    if what == "bookkeeping":
        bookkeeping(int(rest[0]), int(rest[1]))
    else:
        answer({"transformers": transformers_step, "own": own_step}[what], Path(rest[0]), Path(rest[1]))


if __name__ == "__main__":
    main()
