"""Robust aggregation: CPU seconds and memory beside ByzFL, alternating in one process; and ByzFL as an oracle.

    python -m benchmarks.aggregators [--rows 16 64] [--columns 1e6 1e7] [--rules mean nnm+geometric-median] [--repeat 3]
    python -m benchmarks.aggregators --oracle

ByzFL is no dependency of Mycel, since its package pulls in torchvision: `pip install --no-deps byzfl==0.0.11` beside it
(its own import fails next to a CPU torch, so its aggregators are loaded around that). Without it we stand alone.
Memory is the peak of the process during the call, less what it had before and less the result; so Linux alone has it.
One thread: start it with OMP_NUM_THREADS=1.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import importlib
import importlib.util
import statistics
import sys
import time
import types
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor

from mycel.security.aggregators import aggregate, parse_rule
from mycel.security.aggregators.subsets import n_subsets

RULES = (
    "mean",
    "median",
    "trimmed-mean",
    "krum",
    "geometric-median",
    "centered-clip",
    "caf",
    "mda",
    "nnm+trimmed-mean",
    "nnm+geometric-median",
)
# A run of ByzFL that would take longer, going by what it took for fewer columns, is skipped.
PATIENCE_S = 240.0
# ByzFL tries the subsets in Python.
MAX_SUBSETS = 5_000
MIB = 1024.0 * 1024.0


@dataclass(frozen=True, slots=True)
class Cost:
    """What calls took: CPU seconds (the median), and the most memory beyond inputs and result, in bytes."""

    cpu_s: float
    extra_bytes: float


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rows", type=int, nargs="+", default=[16, 64])
    parser.add_argument("--columns", type=float, nargs="+", default=[1e6, 1e7])
    parser.add_argument("--rules", nargs="+", default=list(RULES))
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--only-ours", action="store_true", help="leave ByzFL out")
    parser.add_argument("--oracle", action="store_true", help="compare results instead of measuring")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    byzfl = None if options.only_ours else load_byzfl()
    if byzfl is None and not options.only_ours:
        print("ByzFL is not installed (pip install --no-deps byzfl==0.0.11): our figures alone")
    if options.oracle:
        sys.exit(compare(byzfl, options.seed))
    last: dict[tuple[int, str], tuple[int, float]] = {}
    for n in options.rows:
        for columns in map(int, options.columns):
            measure_group(byzfl, n, columns, options, last)


def measure_group(
    byzfl: Any, n: int, columns: int, options: argparse.Namespace, last: dict[tuple[int, str], tuple[int, float]]
) -> None:
    """All rules on one set of rows, each in turn ours and theirs."""
    f = n // 5
    rows_NP = draw(n, columns, f, options.seed)
    rows = list(rows_NP)
    input_bytes = rows_NP.numel() * 4
    print(f"\nn = {n}, d = {columns:,}, f = {f}, seed {options.seed}; inputs {input_bytes / MIB:,.0f} MiB")
    head = f"{'rule':22} {'ours s':>8} {'MiB':>7} {'of in':>6} {'x torch mean':>12}"
    print(f"{head}   {'ByzFL s':>8} {'MiB':>8} {'ratio':>6}")
    plain = measure([lambda: rows_NP.mean(dim=0)], columns, options.repeat)[0]
    print(f"{'torch.mean':22} {plain.cpu_s:8.3f} {plain.extra_bytes / MIB:7.1f}")
    for name in options.rules:
        rule = parse_rule(name)
        if n_subsets(n, f) > MAX_SUBSETS and rule.base in ("mda", "smea"):
            print(f"{name:22} skipped: {n_subsets(n, f):,} subsets")
            continue

        def ours(rule: Any = rule) -> Tensor:
            return aggregate(rows, rule, f).vector

        theirs = None if byzfl is None else byzfl_rule(byzfl, name, f)
        skip = why_not(name, n, columns, last) if theirs else "has no such rule" if byzfl else ""
        calls: list[Callable[[], object]] = [ours]
        if theirs and not skip:
            calls.append(lambda theirs=theirs: theirs(rows_NP))  # type: ignore[misc]
        ours_cost, *their_cost = measure(calls, columns, options.repeat)
        line = f"{name:22} {ours_cost.cpu_s:8.3f} {ours_cost.extra_bytes / MIB:7.1f} "
        line += f"{ours_cost.extra_bytes / input_bytes:6.1%} {ours_cost.cpu_s / plain.cpu_s:11.1f}x   "
        if their_cost:
            (cost,) = their_cost
            last[n, name] = (columns, cost.cpu_s)
            line += f"{cost.cpu_s:8.3f} {cost.extra_bytes / MIB:8.1f} {cost.cpu_s / ours_cost.cpu_s:5.1f}x"
        elif skip:
            line += f"ByzFL {skip}"
        print(line, flush=True)


def draw(n: int, columns: int, f: int, seed: int) -> Tensor:
    """Honest rows about a common vector, and `f` that are elsewhere; float32 [n, columns]."""
    generator = torch.Generator().manual_seed(seed)
    rows_NP = torch.randn(n, columns, generator=generator)
    rows_NP.add_(torch.randn(columns, generator=generator))
    rows_NP[:f].add_(2.0)
    return rows_NP


def measure(calls: Sequence[Callable[[], object]], columns: int, repeat: int) -> list[Cost]:
    """The calls in turn, `repeat` times."""
    seconds: list[list[float]] = [[] for _ in calls]
    extra = [0.0 for _ in calls]
    for _ in range(repeat):
        for i, call in enumerate(calls):
            gc.collect()
            before = reset_peak()
            start = time.process_time()
            result = call()
            seconds[i].append(time.process_time() - start)
            extra[i] = max(extra[i], peak() - before - columns * 4)
            del result
    return [Cost(statistics.median(s), max(0.0, e)) for s, e in zip(seconds, extra, strict=True)]


def reset_peak() -> float:
    """Make the process forget its peak; its memory now, in bytes (0 where there is no /proc)."""
    clear = Path("/proc/self/clear_refs")
    if not clear.exists():
        return 0.0
    if sys.platform == "linux":  # what earlier calls freed, and the allocator kept, must not count as there before
        ctypes.CDLL(None).malloc_trim(0)
    clear.write_text("5")
    return status("VmRSS")


def peak() -> float:
    """The most memory since `reset_peak`."""
    return status("VmHWM") if Path("/proc/self/clear_refs").exists() else 0.0


def status(field: str) -> float:
    """A field of this process's status, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return float(line.split()[1]) * 1024.0
    return 0.0


# ---------------------------------------------------------------------------------------------------------------- ByzFL


def load_byzfl() -> Any:
    """byzfl.aggregators without the rest of its package, which imports torchvision; None where it is not installed."""
    spec = importlib.util.find_spec("byzfl")
    if spec is None or spec.submodule_search_locations is None:
        return None
    package = types.ModuleType("byzfl")
    package.__path__ = list(spec.submodule_search_locations)
    sys.modules["byzfl"] = package
    return importlib.import_module("byzfl.aggregators")


def byzfl_rule(byzfl: Any, name: str, f: int) -> Callable[[Tensor], Tensor] | None:
    """The rule in ByzFL, with its own defaults; None where it has none."""
    made: dict[str, Callable[[], Any]] = {
        "mean": byzfl.Average,
        "median": byzfl.Median,
        "trimmed-mean": lambda: byzfl.TrMean(f=f),
        "meamed": lambda: byzfl.Meamed(f=f),
        "krum": lambda: byzfl.Krum(f=f),
        "multi-krum": lambda: byzfl.MultiKrum(f=f),
        "geometric-median": byzfl.GeometricMedian,
        "centered-clip": lambda: byzfl.CenteredClipping(L=3, tau=1.0),
        "caf": lambda: byzfl.CAF(f=f),
        "mda": lambda: byzfl.MDA(f=f),
        "smea": lambda: byzfl.SMEA(f=f),
        "nnm": lambda: byzfl.NNM(f=f),
        "arc": lambda: byzfl.ARC(f=f),
    }
    steps = name.split("+")
    if any(step not in made for step in steps):
        return None
    parts = [made[step]() for step in steps]

    def call(rows: Tensor) -> Tensor:
        for part in parts:
            rows = part(rows)
        return rows

    return call


def why_not(name: str, n: int, columns: int, last: dict[tuple[int, str], tuple[int, float]]) -> str:
    """Why ByzFL is not asked for this one: the memory it would take, or the time going by fewer columns; or ""."""
    f = n // 5
    # It gathers n - f neighbours for each row: an n x (n - f) x d tensor; sorting and clipping copy the rows, too.
    needed = n * columns * 4.0 * ((n - f) * 1.25 if "nnm" in name else 4.0)
    free = psutil.virtual_memory().available
    if needed > free:
        return f"skipped: it would need {needed / MIB / 1024:,.0f} GiB, and {free / MIB / 1024:,.0f} are free"
    fewer, seconds = last.get((n, name), (0, 0.0))
    if fewer and seconds * columns / fewer > PATIENCE_S:
        return f"skipped: {seconds:.1f} s at d = {fewer:,}"
    return ""


def compare(byzfl: Any, seed: int) -> int:
    """Results beside ByzFL's where it is right: the largest difference, in units of the honest rows' deviation."""
    if byzfl is None:
        print("nothing to compare with")
        return 1
    # Where their defaults differ from ours, or are wrong, there is nothing to compare (tests/security/aggregators).
    same = ["mean", "median", "trimmed-mean", "meamed", "krum", "multi-krum", "mda", "nnm+mean", "nnm+trimmed-mean"]
    same += ["nnm+median", "nnm+krum", "arc+median", "arc+trimmed-mean", "arc+nnm+trimmed-mean"]
    worst = 0.0
    for name in [*same, "geometric-median", "nnm+geometric-median"]:
        apart = 0.0
        for n, columns in ((9, 1), (9, 7), (12, 1000), (15, 1000)):
            f = n // 5
            rows_NP = draw(n, columns, f, seed)
            theirs = byzfl_rule(byzfl, name, f)
            if name.endswith("geometric-median"):  # theirs stops after 3 steps: given enough of them it converges
                theirs = converged(byzfl, name, f)
            assert theirs is not None
            ours = aggregate(list(rows_NP), parse_rule(name), f).vector
            apart = max(apart, float((ours - theirs(rows_NP.clone().double())).abs().max()))
        worst = max(worst, apart)
        print(f"{name:24} {apart:.1e}")
    print(f"worst {worst:.1e}: {'the same' if worst < 1e-4 else 'NOT the same'}")
    return int(worst >= 1e-4)


def converged(byzfl: Any, name: str, f: int) -> Callable[[Tensor], Tensor]:
    """ByzFL's geometric median with 2000 steps and next to no smoothing."""
    median = byzfl.GeometricMedian(nu=1e-9, T=2000)
    mix = byzfl.NNM(f=f) if name.startswith("nnm") else None
    return lambda rows: median(rows if mix is None else mix(rows))  # type: ignore[no-any-return]


if __name__ == "__main__":
    main()
