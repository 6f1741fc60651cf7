"""Training: what stages cost against one process, what crosses the wire, and what 8 bits there do to the loss.

    python -m benchmarks.train [PART ...] [--rounds 3] [--json] [--quick]

Real node processes over libp2p on loopback with one torch thread each; random Llamas on Python's help texts, float32.
speed: runs of 2 and 4 stages, a peer each, against one process on the same two cores, taking turns within each round.
  The goal is 0.85 of one process. There are two such: "transformers" is transformers' model with torch's AdamW;
  "one stage" is Mycel's own stage without a network, with the kernels that it chooses and a step's sums and hashes.
  "2 x one stage" are two of those side by side, with a thread each: what these cores could do if nothing had to wait.
wire: bytes for each trained token, by the codec of the borders; with two peers a stage the sums come on top.
width: the time that a microbatch takes on a link of 20 Mbit/s over the time that it takes a stage to compute, by hidden
  size, and how much slower steps get by that link. Compute grows with the square of the width: the share falls as
  1/width.
loss: the same run with borders of float32 and of int8; the mean of the last ten steps.
bookkeeping: what a step costs a stage besides the model, for each parameter.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean, median
from typing import Any

import trio

from benchmarks.train_runs import WARM_UP_STEPS, Asked, Size, Window, make_model, train, write_recipe

GOAL = 0.85
LINK_BYTES_PER_S = 20e6 / 8
CODECS = ("float32", "bfloat16", "int8")
SEEDS = (0, 1)
LAST_STEPS = 10
SLOPE = (-1.3, -0.7)
# So much may two runs of the same steps differ: 8-bit borders, and the order of sums.
SAME_LOSS = 0.02


@dataclass(frozen=True, slots=True)
class Plan:
    """Sizes, and how long each part looks. Seven blocks and a head weigh as much as eight: even stages."""

    rounds: int
    speed: Size
    wire: Size
    width: Size
    loss: Size
    widths: tuple[int, ...] = (256, 512, 1024, 1536)
    speed_steps: int = 3
    wire_steps: int = 5
    width_steps: int = 3
    loss_steps: int = 50
    parameters: int = 10_000_000


FULL = Plan(
    rounds=3,
    speed=Size(256, 7, 16),
    wire=Size(128, 4, 8, sequence=64),
    width=Size(0, 2, 4, 16, 32, vocabulary="bytes"),
    loss=Size(192, 8, 8, sequence=64),
)
QUICK = Plan(
    rounds=1,
    speed=Size(32, 7, 4, sequence=32),
    wire=Size(32, 2, 4, sequence=32),
    width=Size(0, 2, 4, sequence=32, vocabulary="bytes"),
    loss=Size(192, 8, 2, sequence=32),
    widths=(32, 64),
    speed_steps=2,
    wire_steps=2,
    width_steps=2,
    loss_steps=12,
    parameters=100_000,
)


class Reference:
    """A process of benchmarks.train_reference, which ends when its standard input does."""

    def __init__(self, what: str, threads: int, recipe: Path, data: Path, stack: ExitStack) -> None:
        self.threads = threads
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.train_reference", what, str(threads), str(recipe), str(data)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        stack.callback(self.close)

    def hear(self) -> str:
        assert self._process.stdout is not None
        answer = self._process.stdout.readline()
        if not answer:
            raise SystemExit(f"a process of the benchmark ended with {self._process.wait()}")
        return answer.strip()

    def ask(self, n_steps: int) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(f"{n_steps}\n")
        self._process.stdin.flush()

    def close(self) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        try:
            self._process.wait(20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()


def ask(references: Sequence[Reference], n_steps: int) -> tuple[float, list[float]]:
    """Tokens a second of all of them together, working at the same time, and the losses of the first."""
    for reference in references:
        reference.ask(n_steps)
    said = [json.loads(reference.hear()) for reference in references]
    return sum(one["tokens"] for one in said) / max(one["seconds"] for one in said), said[0]["losses"]


def tell(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def run(recipe: Path, directory: Path, n_nodes: int, n_steps: int, shape: str = "") -> Window:
    return trio.run(lambda: train(recipe, directory, n_nodes, n_steps, shape=shape))


# ---- speed


TRANSFORMERS_2 = "transformers, 2 threads"
OWN_1, OWN_2, OWN_PAIR = "one stage, 1 thread", "one stage, 2 threads", "2 x one stage, 1 thread"
STAGES = (2, 4)


def speed(plan: Plan, root: Path) -> dict[str, Any]:
    """Rates of all cases, round by round."""
    make_model(root / "model", plan.speed)
    recipes = {n: write_recipe(root / f"{n}.toml", plan.speed, n, Asked()) for n in (1, *STAGES)}
    rates: dict[str, list[float]] = {}
    compute_s: dict[str, list[tuple[float, ...]]] = {}
    losses: dict[str, list[float]] = {}
    with ExitStack() as stack:
        references: dict[str, list[Reference]] = {}
        for name, what, threads in (
            (TRANSFORMERS_2, "transformers", 2),
            (OWN_1, "own", 1),
            (OWN_2, "own", 2),
        ):
            references[name] = [Reference(what, threads, recipes[1], root / "data", stack)]
        references[OWN_PAIR] = [*references[OWN_1], Reference("own", 1, recipes[1], root / "data", stack)]
        for reference in {one for pair in references.values() for one in pair}:
            reference.hear()
        for name, pair in references.items():
            losses.setdefault(name, []).extend(ask(pair, 2)[1])  # the first two are not measured
        for number in range(plan.rounds):
            for name, pair in references.items():
                rate, said = ask(pair, plan.speed_steps)
                rates.setdefault(name, []).append(rate)
                losses[name] += said
            for n in STAGES:
                window = run(recipes[n], root / f"speed-{n}-{number}", n, plan.speed_steps)
                name = f"{n} stages, 1 thread each"
                rates.setdefault(name, []).append(window.tokens_per_s)
                compute_s.setdefault(name, []).append(window.compute_s)
                losses[name] = list(window.losses)
            tell(f"speed {number + 1}/{plan.rounds}: " + ", ".join(f"{k} {v[-1]:.0f}" for k, v in rates.items()))
    for name in (OWN_1, OWN_2, *(f"{n} stages, 1 thread each" for n in STAGES)):
        # One process of the pair is also the one that is alone: from its third step on it is further than the others.
        check_losses(losses[TRANSFORMERS_2], losses[name][:2] if name == OWN_1 else losses[name], name)
    return {"rates": rates, "compute_s": compute_s, "step_tokens": plan.speed.step_tokens}


def check_losses(expected: Sequence[float], got: Sequence[float], name: str) -> None:
    """All cases must do the same work. Ends the program otherwise."""
    worst = max(abs(one - other) for one, other in zip(expected, got, strict=False))
    if not worst <= SAME_LOSS:
        raise SystemExit(f"{name} trains something else: its losses are up to {worst:.3f} off")


def show_speed(said: dict[str, Any]) -> None:
    rates: dict[str, list[float]] = said["rates"]
    print(f"{'tokens/s of training':<26} {'min':>8} {'median':>8} {'best':>8}  seconds a step")
    for name, values in rates.items():
        middle = median(values)
        # Two single processes make two steps in that time.
        print(f"{name:<26} {min(values):8.0f} {middle:8.0f} {max(values):8.0f}  {said['step_tokens'] / middle:.2f}")
    bases = (TRANSFORMERS_2, OWN_2, OWN_PAIR)
    print(f"\n{'round by round':<26} {'min':>8} {'median':>8} {'best':>8}")
    for n in STAGES:
        name = f"{n} stages, 1 thread each"
        for base in bases:
            shares = [one / other for one, other in zip(rates[name], rates[base], strict=True)]
            goal = "" if base == OWN_PAIR else f"  goal {GOAL}: {'met' if median(shares) >= GOAL else 'NOT MET'}"
            what = f"{n} stages / {base}"
            print(f"{what:<34} {min(shares):.2f} {median(shares):8.2f} {max(shares):8.2f}{goal}")
    for name, each in said["compute_s"].items():
        middle_ms = [f"{median(stage) * 1e3:.1f}" for stage in zip(*each, strict=True)]
        print(f"{name}: compute of a microbatch {' + '.join(middle_ms)} ms")


# ---- bytes


def wire(plan: Plan, root: Path) -> dict[str, Any]:
    make_model(root / "model", plan.wire)
    cases = []
    for codec in CODECS:
        recipe = write_recipe(root / f"{codec}.toml", plan.wire, 2, Asked(codec=codec))
        # The sums are the same whatever crosses the borders.
        for n_nodes in (2, 4) if codec == CODECS[-1] else (2,):
            window = run(recipe, root / f"wire-{codec}-{n_nodes}", n_nodes, plan.wire_steps)
            per_token = window.sent_bytes / window.tokens
            cases.append({"codec": codec, "nodes": n_nodes, "bytes_per_token": per_token})
            tell(f"wire: {codec}, {n_nodes} nodes: {per_token:.0f} bytes a token")
    return {"cases": cases, "hidden": plan.wire.hidden, "step_tokens": plan.wire.step_tokens}


def show_wire(said: dict[str, Any]) -> None:
    print(f"bytes for each trained token, 2 stages, hidden {said['hidden']}, {said['step_tokens']} tokens a step")
    print(f"{'borders':<10} {'peers a stage':>14} {'bytes':>8} {'of float32':>11} {'of it sums, MB a step':>22}")
    by_case = {(case["codec"], case["nodes"]): case["bytes_per_token"] for case in said["cases"]}
    for (codec, n_nodes), value in by_case.items():
        borders = by_case[codec, 2]
        share = f"{value / by_case['float32', 2]:11.2f}" if n_nodes == 2 else " " * 11
        sums = f"{(value - borders) * said['step_tokens'] / 1e6:22.2f}" if n_nodes > 2 else ""
        print(f"{codec:<10} {n_nodes // 2:14} {value:8.0f} {share} {sums}".rstrip())


# ---- width


def width(plan: Plan, root: Path) -> dict[str, Any]:
    cases = []
    for hidden in plan.widths:
        size = replace(plan.width, hidden=hidden)
        make_model(root / f"model-{hidden}", size)
        recipe = write_recipe(root / f"{hidden}.toml", size, 2, Asked(f"model-{hidden}"))
        free = run(recipe, root / f"width-{hidden}-free", 2, plan.width_steps)
        shape = f"bytes_per_s={LINK_BYTES_PER_S}"
        slow = run(recipe, root / f"width-{hidden}-slow", 2, plan.width_steps, shape)
        # Each end sends half: one forward, the other backward.
        n_microbatches = size.n_microbatches * slow.n_steps
        link_s = slow.sent_bytes / 2 / n_microbatches / LINK_BYTES_PER_S
        compute_s = fmean(free.compute_s)
        cases.append(
            {
                "hidden": hidden,
                "link_s": link_s,
                "compute_s": compute_s,
                "flop_per_s": flop(size) / 2 / compute_s,
                "share": link_s / compute_s,
                "step_s": free.step_s,
                "shaped_step_s": slow.step_s,
            }
        )
        tell(f"width {hidden}: {link_s * 1e3:.1f} ms on the link, {compute_s * 1e3:.1f} ms of compute")
    return {
        "cases": cases,
        "exponent": slope([(case["hidden"], case["share"]) for case in cases]),
        # Larger products are faster ones, which is a matter of the processor and not of the network.
        "exponent_of_flop": slope([(case["hidden"], case["share"] / case["flop_per_s"]) for case in cases]),
    }


def flop(size: Size) -> float:
    """Of a microbatch in all blocks' matrices, forward and backward: six for each of their elements and token."""
    elements = size.n_blocks * (4 * size.hidden + 3 * size.intermediate) * size.hidden
    return 6.0 * elements * size.n_sequences * size.sequence


def slope(points: Sequence[tuple[float, float]]) -> float:
    """The exponent e of y = c x^e by least squares of the logarithms. slope([(1, 8), (2, 4), (4, 2)]) == -1.0"""
    logs = [(math.log(x), math.log(y)) for x, y in points]
    mean_x, mean_y = fmean(x for x, _ in logs), fmean(y for _, y in logs)
    return sum((x - mean_x) * (y - mean_y) for x, y in logs) / sum((x - mean_x) ** 2 for x, _ in logs)


def show_width(said: dict[str, Any]) -> None:
    print(f"2 stages, a link of {LINK_BYTES_PER_S * 8e-6:.0f} Mbit/s for each peer, 8-bit borders")
    print(f"{'hidden':>6} {'link, ms':>9} {'compute, ms':>12} {'GFLOP/s':>8} {'share':>7} {'step, s':>8} {'slowed':>7}")
    for case in said["cases"]:
        times = f"{case['link_s'] * 1e3:9.1f} {case['compute_s'] * 1e3:12.1f} {case['flop_per_s'] * 1e-9:8.0f}"
        slowed = case["shaped_step_s"] / case["step_s"]
        print(f"{case['hidden']:6} {times} {case['share']:7.3f} {case['step_s']:8.2f} {slowed:6.2f}x")
    low, high = SLOPE
    verdict = "met" if low <= said["exponent"] <= high else "NOT MET"
    print(f"share ~ width^{said['exponent']:.2f}; goal {low} to {high}: {verdict}")
    print(f"at one rate of multiplications for all widths: width^{said['exponent_of_flop']:.2f}")


# ---- loss


def loss(plan: Plan, root: Path) -> dict[str, Any]:
    cases = []
    for seed in SEEDS:
        ends = {}
        for codec in ("float32", "int8"):
            asked = Asked("demo", codec, seed, 3e-3, plan.loss_steps)
            recipe = write_recipe(root / f"{codec}-{seed}.toml", plan.loss, 2, asked)
            window = run(recipe, root / f"loss-{codec}-{seed}", 2, plan.loss_steps - WARM_UP_STEPS - 1)
            losses = window.losses
            if len(losses) != plan.loss_steps:
                raise SystemExit(f"the loss of {len(losses)} of {plan.loss_steps} steps is known")
            ends[codec] = fmean(losses[-LAST_STEPS:])
            tell(f"loss: seed {seed}, {codec}: {losses[0]:.3f} to {ends[codec]:.4f} in {len(losses)} steps")
        cases.append({"seed": seed, **ends})
    return {"cases": cases, "steps": plan.loss_steps}


def show_loss(said: dict[str, Any]) -> None:
    print(f"loss a token, mean of the last {LAST_STEPS} of {said['steps']} steps, the demo's model, 2 stages")
    print(f"{'seed':>4} {'float32':>9} {'int8':>9} {'difference':>11}")
    for case in said["cases"]:
        print(f"{case['seed']:4} {case['float32']:9.4f} {case['int8']:9.4f} {case['int8'] - case['float32']:+11.4f}")


# ---- bookkeeping


def bookkeeping(plan: Plan, _: Path) -> dict[str, Any]:
    arguments = ["bookkeeping", "1", str(plan.parameters), str(2 * plan.rounds + 1)]
    command = [sys.executable, "-m", "benchmarks.train_reference", *arguments]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return {"jobs": json.loads(done.stdout), "parameters": plan.parameters}


def show_bookkeeping(said: dict[str, Any]) -> None:
    print(f"besides the model, a stage of {said['parameters']:,} parameters, 1 thread")
    print(f"{'':<42} {'best, ms':>9} {'median':>8} {'ns a parameter':>15}  for each")
    for job in said["jobs"]:
        per_parameter = job["median_s"] / said["parameters"] * 1e9
        times = f"{job['best_s'] * 1e3:9.2f} {job['median_s'] * 1e3:8.2f} {per_parameter:15.2f}"
        print(f"{job['job']:<42} {times}  {job['per']}")


# ---- all


@dataclass(frozen=True, slots=True)
class Part:
    measure: Callable[[Plan, Path], dict[str, Any]]
    show: Callable[[dict[str, Any]], None]


PARTS = {
    "speed": Part(speed, show_speed),
    "wire": Part(wire, show_wire),
    "width": Part(width, show_width),
    "loss": Part(loss, show_loss),
    "bookkeeping": Part(bookkeeping, show_bookkeeping),
}


def machine() -> dict[str, Any]:
    """What this was measured on."""
    import torch
    import transformers

    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text("utf-8").splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return {
        "processor": names[0] if names else platform.processor(),
        "cores": os.cpu_count(),
        "load": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0] if __doc__ else None, usage="%(prog)s [PART ...] [options]"
    )
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)}; all if none is named")
    parser.add_argument("--rounds", type=int, default=3, help="of speed")
    parser.add_argument(
        "--quick", action="store_true", help="tiny sizes, to see that it works: the figures say nothing"
    )
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    if unknown := set(options.parts) - PARTS.keys():
        parser.error(f"no such part: {', '.join(sorted(unknown))}")
    plan = QUICK if options.quick else replace(FULL, rounds=options.rounds)
    facts = machine()
    tell(", ".join(f"{name} {value}" for name, value in facts.items()))
    result: dict[str, Any] = {"machine": facts}
    for name in options.parts or PARTS:
        began_s = time.monotonic()
        with tempfile.TemporaryDirectory(prefix="mycel-train-") as temporary:
            result[name] = PARTS[name].measure(plan, Path(temporary))
        result[name]["took_s"] = time.monotonic() - began_s
        tell(f"{name} took {result[name]['took_s']:.0f} s")
    if options.json:
        print(json.dumps(result, indent=2))
        return
    print(", ".join(f"{name} {value}" for name, value in facts.items()))
    for name in options.parts or PARTS:
        print(f"\n== {name}")
        PARTS[name].show(result[name])


if __name__ == "__main__":
    main()
