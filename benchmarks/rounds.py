"""What training with few bytes costs in loss: every method and codec on the reference task, beside the bounds it keeps.

    python -m benchmarks.rounds
    python -m benchmarks.rounds --seeds 0 1 2 --steps 400 --only diloco 4-bit

Bytes are one peer's, up and down, as the bodies that would travel measure; ratios are to float32 gradients each step.
Bounds hold for the mean over the seeds; every seed is printed. A run takes 15 to 60 s of one core.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

import torch

from benchmarks.toy_text import Outcome, Setting, alone, float32_data_parallel_bytes, run

_PLAIN = {"codec": "float32", "result_codec": "float32"}
_DILOCO: dict[str, object] = {"name": "diloco", "inner_steps": 20}
_STREAMING: dict[str, object] = {"name": "streaming", "inner_steps": 20, "fragments": 2, "rate": 0.7, "mix": 0.0}
_SPARSE: dict[str, object] = {"name": "sparseloco", "inner_steps": 20}
_PARALLEL: dict[str, object] = {"name": "data-parallel", "rate": 8e-3}

# Row -> the fields of its setting; the rows of the issue first, the others only reported. Each of "alone",
# "data-parallel" and "diloco" has the best learning rate for itself of 1, 2, 4 and 8 thousandths.
ROWS: dict[str, dict[str, object]] = {
    "alone": {"method": {"name": "diloco"}, "rate": 2e-3},
    "data-parallel": {"method": _PARALLEL, **_PLAIN},
    "diloco": {"method": _DILOCO, **_PLAIN},
    "4-bit": {"method": _DILOCO, "codec": "e3m0+zip+ef", "result_codec": "int4+zip"},
    "streaming": {"method": _STREAMING, **_PLAIN},
    "best-codec": {"method": {**_DILOCO, "inner_steps": 30}, "codec": "int2+zip+ef", "result_codec": "int3+zip"},
    # Eight peers, as DiLoCo's own experiment has: of four, some rounds have one contribution, which is noise.
    "diloco-8": {"method": _DILOCO, "n_peers": 8, **_PLAIN},
    "dropped-30": {"method": _DILOCO, "n_peers": 8, "dropped": 0.3, **_PLAIN},
    "top-1-with-feedback": {"method": _SPARSE, "codec": "topk:0.01+ef", "result_codec": "float32"},
    "top-1-without": {"method": _SPARSE, "codec": "topk:0.01", "result_codec": "float32"},
    "streaming-4-bit": {"method": _STREAMING, "codec": "e3m0+zip+ef", "result_codec": "int4+zip"},
    "streaming-as-published": {"method": {**_STREAMING, "rate": 0.4, "mix": 0.5}, **_PLAIN},
    "eager": {"method": {"name": "eager", "inner_steps": 20}, **_PLAIN},
    "sparseloco": {"method": _SPARSE, "result_codec": "int4+zip"},
    "demo": {"method": {"name": "demo"}, "result_codec": "int4+zip"},
    "delay-1": {"method": {**_PARALLEL, "delay": 1}, **_PLAIN},
    "delay-4": {"method": {**_PARALLEL, "delay": 4}, **_PLAIN},
    "dropped-30-streaming": {"method": _STREAMING, "dropped": 0.3, **_PLAIN},
    "dropped-30-of-4": {"method": _DILOCO, "dropped": 0.3, **_PLAIN},
    "dropped-50": {"method": _DILOCO, "n_peers": 8, "dropped": 0.5, **_PLAIN},
    "braking": {"method": {**_DILOCO, "braking": 0.5}, **_PLAIN},
}

Measured = Mapping[str, Sequence[Outcome]]


@dataclass(frozen=True)
class Bound:
    """A claim about the rows it needs: the value must be at most the limit."""

    claim: str
    limit: float
    rows: tuple[str, ...]
    value: Callable[[Measured], float]


def _loss(found: Measured, row: str) -> float:
    return fmean(outcome.loss for outcome in found[row])


def _bytes(found: Measured, row: str) -> float:
    return fmean(outcome.total_bytes for outcome in found[row])


def _peak(found: Measured, row: str) -> float:
    return fmean(outcome.peak_bytes for outcome in found[row])


def _ratio(over: str, under: str) -> Callable[[Measured], float]:
    return lambda found: _loss(found, over) / _loss(found, under)


def _share_of_bytes(row: str, times: float) -> Callable[[Measured], float]:
    return lambda found: _bytes(found, row) * times / _bytes(found, "data-parallel")


BOUNDS = (
    Bound("DiLoCo / data parallel, loss", 1.04, ("diloco", "data-parallel"), _ratio("diloco", "data-parallel")),
    Bound("DiLoCo, 20 times fewer bytes", 1.0, ("diloco", "data-parallel"), _share_of_bytes("diloco", 20.0)),
    Bound(
        "DiLoCo - one peer alone, loss",
        -0.02,
        ("diloco", "alone"),
        lambda found: _loss(found, "diloco") - _loss(found, "alone"),
    ),
    Bound("4 bits / DiLoCo, loss", 1.01, ("4-bit", "diloco"), _ratio("4-bit", "diloco")),
    Bound("4 bits, 160 times fewer bytes", 1.0, ("4-bit", "data-parallel"), _share_of_bytes("4-bit", 160.0)),
    Bound("streaming / DiLoCo, loss", 1.005, ("streaming", "diloco"), _ratio("streaming", "diloco")),
    Bound(
        "streaming / DiLoCo, peak bytes",
        0.55,
        ("streaming", "diloco"),
        lambda found: _peak(found, "streaming") / _peak(found, "diloco"),
    ),
    Bound("best codec / DiLoCo, loss", 1.05, ("best-codec", "diloco"), _ratio("best-codec", "diloco")),
    Bound(
        "best codec / data parallel, loss", 1.05, ("best-codec", "data-parallel"), _ratio("best-codec", "data-parallel")
    ),
    Bound(
        "best codec, 500 times fewer bytes", 1.0, ("best-codec", "data-parallel"), _share_of_bytes("best-codec", 500.0)
    ),
    Bound("30 % dropped / DiLoCo, 8 peers, loss", 1.02, ("dropped-30", "diloco-8"), _ratio("dropped-30", "diloco-8")),
    Bound(
        "top 1 % with feedback - without, loss",
        -0.08,
        ("top-1-with-feedback", "top-1-without"),
        lambda found: _loss(found, "top-1-with-feedback") - _loss(found, "top-1-without"),
    ),
)


def measure(row: str, steps: int, seed: int) -> Outcome:
    """One row of one seed."""
    setting = Setting(**ROWS[row], steps=steps, seed=seed)  # type: ignore[arg-type]
    return alone(setting) if row == "alone" else run(setting)


def verdicts(found: Measured) -> list[tuple[Bound, float]]:
    """The value of every bound whose rows were measured."""
    return [(bound, bound.value(found)) for bound in BOUNDS if all(row in found for row in bound.rows)]


def show_row(row: str, outcomes: Sequence[Outcome], steps: int, seconds: float) -> str:
    """One line: the loss of every seed, bytes, and how many times fewer they are than float32 data parallel's."""
    losses = " ".join(f"{outcome.loss:.4f}" for outcome in outcomes)
    total = fmean(outcome.total_bytes for outcome in outcomes)
    times = f"{float32_data_parallel_bytes(steps) / total:8.1f}" if total else "       -"
    up, down = (fmean(getattr(outcome, name) for outcome in outcomes) for name in ("up_bytes", "down_bytes"))
    peak = fmean(outcome.peak_bytes for outcome in outcomes)
    return f"{row:22s} {losses:>24s} {up:12,.0f} {down:12,.0f} {times} {peak:11,.0f} {seconds:6.0f}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--only", nargs="+", choices=tuple(ROWS), default=list(ROWS), metavar="ROW")
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(
        f"{'row':22s} {'loss, seed by seed':>24s} {'bytes up':>12s} {'bytes down':>12s} "
        f"{'fewer':>8s} {'peak':>11s} {'s':>6s}"
    )
    found: dict[str, list[Outcome]] = {}
    for row in options.only:
        began = time.monotonic()
        found[row] = [measure(row, options.steps, seed) for seed in options.seeds]
        print(show_row(row, found[row], options.steps, time.monotonic() - began), flush=True)
        if any(len(outcome.digests) > 1 for outcome in found[row]):
            print(f"{row}: the peers do not hold the same bits")
            return 1
    failed = 0
    for bound, value in verdicts(found):
        kept = value <= bound.limit + 1e-9
        failed += not kept
        print(f"{'kept' if kept else 'BROKEN':6s}  {bound.claim:40s} {value:8.4f}  at most {bound.limit:g}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
