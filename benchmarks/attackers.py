"""What liars do to a real training run under each aggregation rule and each codec: accuracies, and the worst cell.

    python -m benchmarks.attackers [--parts iid20,dir20,iid40,dir40,codecs] [--rules R,R] [--attacks A,A]
        [--seeds 2] [--first-seed 0] [--steps 120] [--json FILE]

Twenty peers train an MLP of 4,810 parameters on 1,797 handwritten digits of 8 x 8 pixels (digits.csv.gz), each sending
its gradient with worker momentum 0.9. iid: each step's batch is drawn from all data, as the beacon does it; dir: a
peer has its own Dirichlet(0.3) share of each class. 20 or 40 % of the peers lie. The oracle is the mean of the honest
rows alone. A cell is the accuracy in percent, mean of the seeds (nan: the run ended in numbers that are not finite).

Ring: shell.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import json
import math
import os
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

# On matrices this small a second thread of BLAS costs a hundred times what it does, and numpy asks before its import.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import numpy as np
import torch
from torch import Tensor

from mycel.security.aggregators import aggregate, combine, finite_rows, gram, parse_rule
from mycel.security.aggregators.local import own_cosine
from mycel.security.aggregators.standing import Standing, decide_standing
from mycel.security.attacks import DATA_ATTACKS, Scene, attack, flip_labels
from mycel.security.attacks.scene import Memory
from mycel.swarm.codecs import Encoder, Layout, make_codec

N_PEERS = 20
N_CLASSES = 10
HIDDEN = 64
SHAPES = ((64, HIDDEN), (HIDDEN,), (HIDDEN, N_CLASSES), (N_CLASSES,))
LEARNING_RATE = 0.1
MOMENTUM = 0.9
BATCH = 32
N_TRAIN = 1297
# The last so many steps are averaged: single accuracies of a moving model jump by a point.
EVALUATED_STEPS = 5

STANDING = "standing+"
DEFAULT_RULE = "standing+caf"
CLASSICAL = ("median", "trimmed-mean", "meamed", "krum", "multi-krum", "geometric-median", "centered-clip")
RULES = (
    "mean",
    *CLASSICAL,
    "flag",
    "caf",
    "nnm+trimmed-mean",
    "nnm+geometric-median",
    "nnm+caf",
    "arc+nnm+trimmed-mean",
    "bucketing:2+caf",
    "own-cosine",
    DEFAULT_RULE,
)
RULES_AT_40 = (
    "mean",
    "trimmed-mean",
    "geometric-median",
    "centered-clip",
    "caf",
    "nnm+trimmed-mean",
    "own-cosine",
    DEFAULT_RULE,
)
SEARCHES = ("opt-alie", "opt-ipm", "opt-shift")
# The twelve of the issue and more; 'none' shows what a rule costs without any liar.
MATRIX_ATTACKS = (
    *("none", "label-flip", "sign-flip", "x1000", "ipm-0.1", "alie", "mimic", "delayed", "min-max"),
    *("copies", "replay", "nan", "huge", "traitor", *SEARCHES),
)
# Where twice as many lie, what is harmless at 20 % is left out.
ATTACKS_AT_40 = (
    *("none", "label-flip", "sign-flip", "x1000", "mimic", "delayed", "min-max", "nan", "traitor"),
    *SEARCHES,
)
CODECS = ("float32", "float16", "int8", "int4", "e3m0", "topk:0.05+ef", "dgc:0.05", "powersgd:2+ef", "dct:4+ef")
CODEC_ATTACKS = ("none", "sign-flip", "x1000", "opt-alie", "opt-ipm")
PARTS = ("iid20", "dir20", "iid40", "dir40", "codecs")


@dataclass(frozen=True, slots=True)
class Run:
    """One training run. `alpha` is the Dirichlet parameter, None for iid."""

    rule: str
    attack: str
    alpha: float | None
    n_liars: int
    seed: int
    steps: int = 120
    codec: str = "float32"


# ------------------------------------------------------------------------------------------------------------ the task


@cache
def digits() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Images and labels to train on, images and labels to test with."""
    with gzip.open(Path(__file__).with_name("digits.csv.gz")) as file:
        table = np.loadtxt(file, delimiter=",")
    order = torch.randperm(len(table), generator=torch.Generator().manual_seed(1234))
    images = torch.tensor(table[:, :-1] / 16.0, dtype=torch.float32)[order]
    labels = torch.tensor(table[:, -1], dtype=torch.long)[order]
    return images[:N_TRAIN], labels[:N_TRAIN], images[N_TRAIN:], labels[N_TRAIN:]


def shares(alpha: float | None, seed: int, labels: Tensor) -> list[Tensor]:
    """The samples that each peer draws its batches from."""
    if alpha is None:
        return [torch.arange(len(labels))] * N_PEERS
    rng = np.random.default_rng(seed)
    while True:
        of_peer: list[list[int]] = [[] for _ in range(N_PEERS)]
        for label in range(N_CLASSES):
            samples = np.flatnonzero(labels.numpy() == label)
            rng.shuffle(samples)
            cuts = (np.cumsum(rng.dirichlet([alpha] * N_PEERS)) * len(samples)).astype(int)[:-1]
            for own, part in zip(of_peer, np.split(samples, cuts), strict=True):
                own.extend(int(i) for i in part)
        if min(map(len, of_peer)) >= 8:
            return [torch.tensor(own) for own in of_peer]


def initial(seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    parts = [torch.randn(s, generator=generator) / 8.0 if len(s) == 2 else torch.zeros(s) for s in SHAPES]
    return torch.cat([part.flatten() for part in parts])


def _unpacked(theta_P: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    parts = torch.split(theta_P, [math.prod(shape) for shape in SHAPES])
    w1, b1, w2, b2 = (part.view(shape) for part, shape in zip(parts, SHAPES, strict=True))
    return w1, b1, w2, b2


def gradients(theta_P: Tensor, images: Tensor, labels: Tensor) -> Tensor:
    """The gradient [N, P] of each peer's mean cross-entropy over its batch; images [N, B, 64], labels [N, B]."""
    w1, b1, w2, b2 = _unpacked(theta_P)
    hidden = (images @ w1 + b1).relu()
    predicted = (hidden @ w2 + b2).softmax(-1)
    wrong = (predicted - torch.nn.functional.one_hot(labels, N_CLASSES)) / labels.shape[1]
    back = (wrong @ w2.T) * (hidden > 0)
    parts = (images.mT @ back, back.sum(1), hidden.mT @ wrong, wrong.sum(1))
    return torch.cat([part.flatten(1) for part in parts], dim=1)


def accuracy(theta_P: Tensor) -> float:
    _, _, images, labels = digits()
    w1, b1, w2, b2 = _unpacked(theta_P)
    predicted = ((images @ w1 + b1).relu() @ w2 + b2).argmax(-1)
    return 100.0 * float((predicted == labels).float().mean())


# --------------------------------------------------------------------------------------------------------- the defence


class Defence:
    """A rule over the rows of a run, with what it keeps from round to round: the last aggregate and the standing."""

    def __init__(self, name: str, n_liars: int, seed: int) -> None:
        self._name = name
        self._rule = None if name in ("own-cosine", "oracle") else parse_rule(name.removeprefix(STANDING))
        self._n_liars = n_liars
        self._seed = seed
        self._round = 0
        self._center: Tensor | None = None
        self._standing = Standing()
        self._peers = [str(i) for i in range(N_PEERS)]

    def __call__(self, rows_NP: Tensor) -> Tensor:
        """What the swarm would make of these rows now; nothing is kept."""
        return self._aggregate(rows_NP)[0]

    def commit(self, rows_NP: Tensor) -> Tensor:
        """The aggregate of the round; the next round begins."""
        self._center, self._standing = self._aggregate(rows_NP)
        self._round += 1
        return self._center

    def _aggregate(self, rows_NP: Tensor) -> tuple[Tensor, Standing]:
        rows, seed = list(rows_NP), f"{self._seed} {self._round}".encode()
        if self._rule is None:  # one honest peer's view; each peer of a swarm would have its own
            return own_cosine(rows, rows[0]), self._standing
        if not self._name.startswith(STANDING):
            made = aggregate(rows, self._rule, self._n_liars, center=self._center, seed=seed)
            return made.vector, self._standing
        kept = [i for i, finite in enumerate(finite_rows(rows)) if finite]
        rows, f = [rows[i] for i in kept], max(0, self._n_liars - len(rows) + len(kept))
        peers = [self._peers[i] for i in kept]
        gram_NN = gram(rows, None)
        decision, after = decide_standing(self._rule, gram_NN, f, peers=peers, standing=self._standing, seed=seed)
        return combine(self._rule, rows, decision, None, f), after


class Wire:
    """What arrives of the rows: each goes through its peer's encoder and the one decoder."""

    def __init__(self, spec: str) -> None:
        self._codec = make_codec(spec)
        self._plain = spec == "float32"
        self._layout = Layout(SHAPES)
        self._encoders = [self._codec.encoder(self._layout) for _ in range(N_PEERS)]
        self.n_bytes = 0

    def honest(self, rows_NP: Tensor, step: int) -> Tensor:
        """The rows of honest peers, whose encoders keep what was not sent."""
        if self._plain:
            return rows_NP
        return torch.stack([self._sent(self._encoders[i], row_P, step) for i, row_P in enumerate(rows_NP)])

    def liars(self, rows_FP: Tensor, step: int) -> Tensor:
        """The rows of liars, who owe nothing to what they sent before. Equal ones are coded once."""
        if self._plain:
            return rows_FP
        coded: dict[bytes, Tensor] = {}
        for row_P in rows_FP:
            key = row_P.numpy().tobytes()
            if key not in coded:
                coded[key] = self._sent(self._codec.encoder(self._layout), row_P, step)
        return torch.stack([coded[row_P.numpy().tobytes()] for row_P in rows_FP])

    def _sent(self, encoder: Encoder, row_P: Tensor, step: int) -> Tensor:
        body = encoder.encode(row_P, hashlib.sha256(b"%d" % step).digest())
        encoder.settle(True)
        self.n_bytes = len(body)
        return self._codec.decode(body, self._layout)


class Liars:
    """The peers that lie: what they send in a round, knowing the honest rows and the defence."""

    def __init__(self, name: str, seed: int) -> None:
        self._attack = attack(name)
        self._memory = Memory()
        self._rng = torch.Generator().manual_seed(seed)

    def join(self, honest_NP: Tensor, own_FP: Tensor, defence: Defence, wire: Wire, step: int) -> Tensor:
        """All rows as they arrive, the honest ones first."""

        def arrived(rows_FP: Tensor) -> Tensor:
            return torch.cat([honest_NP, wire.liars(rows_FP, step)])

        scene = Scene(honest_NP, own_FP, lambda rows_FP: defence(arrived(rows_FP)), self._memory, self._rng)
        rows_NP = arrived(self._attack(scene))
        self._memory.remember(scene.mean)
        return rows_NP


# ------------------------------------------------------------------------------------------------------------ the runs


def train(run: Run) -> float:
    """The accuracy that `run` ends with, in percent; nan if parameters are not finite. Rule "oracle": honest only."""
    images, labels, _, _ = digits()
    own = shares(run.alpha, run.seed, labels)
    chance, theta_P = torch.Generator().manual_seed(run.seed), initial(run.seed)
    n_honest, momentum_NP = N_PEERS - run.n_liars, torch.zeros(N_PEERS, len(theta_P))
    defence, wire = Defence(run.rule, run.n_liars, run.seed), Wire(run.codec)
    liars = None if run.attack == "none" else Liars(run.attack, run.seed)
    seen = []
    for step in range(run.steps):
        drawn = torch.stack([part[torch.randint(len(part), (BATCH,), generator=chance)] for part in own])
        says = labels[drawn]
        if run.attack in DATA_ATTACKS:
            says = torch.cat([says[:n_honest], flip_labels(says[n_honest:], N_CLASSES)])
        gradient_NP = gradients(theta_P, images[drawn], says)
        momentum_NP = gradient_NP if step == 0 else MOMENTUM * momentum_NP + (1 - MOMENTUM) * gradient_NP
        if run.rule == "oracle":
            aggregate_P = wire.honest(momentum_NP[:n_honest], step).mean(dim=0)
        elif liars is None:
            aggregate_P = defence.commit(wire.honest(momentum_NP, step))
        else:
            honest_NP = wire.honest(momentum_NP[:n_honest], step)
            aggregate_P = defence.commit(liars.join(honest_NP, momentum_NP[n_honest:], defence, wire, step))
        theta_P = theta_P - LEARNING_RATE * aggregate_P
        if not bool(torch.isfinite(theta_P).all()):
            return math.nan
        if step >= run.steps - EVALUATED_STEPS:
            seen.append(accuracy(theta_P))
    return statistics.fmean(seen)


def seeds_of(options: argparse.Namespace) -> range:
    return range(options.first_seed, options.first_seed + options.seeds)


def cell(run: Run, seeds: range) -> float:
    """The mean accuracy over seeds."""
    return statistics.fmean(train(replace(run, seed=seed)) for seed in seeds)


def worst(cells: dict[str, float]) -> float:
    """The least accuracy under an attack; a run that ended in nan is worse than any."""
    return min(
        (-1.0 if math.isnan(value) else value for name, value in cells.items() if name != "none"), default=math.nan
    )


def table(rows: dict[str, dict[str, float]], oracle: float) -> str:
    """A line a rule: its worst cell, its cost without liars, how many attacks it survives (5 points), all cells."""
    attacks = list(next(iter(rows.values())))
    lines = [
        f"  {'oracle':22s} {oracle:6.1f}",
        f"  {'':22s} {'worst':>6s} {'tax':>5s} {'kept':>6s}  {' '.join(attacks)}",
    ]
    for name, cells in rows.items():
        lies = [value for key, value in cells.items() if key != "none"]
        survived = sum(value >= oracle - 5.0 for value in lies)
        tax = oracle - cells.get("none", math.nan)
        shown = " ".join(f"{value:{len(key)}.0f}" for key, value in cells.items())
        lines.append(f"  {name:22s} {worst(cells):6.1f} {tax:5.1f} {survived:3d}/{len(lies):<2d}  {shown}")
    return "\n".join(lines)


def part(name: str, options: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Runs and prints one part of the matrix, a line as soon as its cells are there."""
    alpha = 0.3 if name.startswith("dir") else None
    n_liars = N_PEERS * (40 if name.endswith("40") else 20) // 100
    by_codec = name == "codecs"
    base = Run("oracle", "none", alpha, n_liars, 0, options.steps)
    oracle = cell(base, seeds_of(options))
    rules = options.rules or (RULES_AT_40 if name.endswith("40") else RULES)
    usual = CODEC_ATTACKS if by_codec else ATTACKS_AT_40 if name.endswith("40") else MATRIX_ATTACKS
    attacks = options.attacks or usual
    rows: dict[str, dict[str, float]] = {}
    for line in CODECS if by_codec else rules:
        told = replace(base, rule=DEFAULT_RULE, codec=line) if by_codec else replace(base, rule=line)
        rows[line] = {
            # Flag takes its time to decide: it is not searched against.
            lie: cell(replace(told, attack=lie), seeds_of(options))
            for lie in attacks
            if not (line == "flag" and lie in SEARCHES and lie != "opt-ipm")
        }
        print(json.dumps({"part": name, "row": line, "worst": round(worst(rows[line]), 1)}), flush=True)
    data = "iid" if alpha is None else f"Dirichlet({alpha})"
    print(
        f"{name}: {data}, {n_liars} of {N_PEERS} lie, "
        f"seeds {', '.join(map(str, seeds_of(options)))}, {options.steps} steps"
    )
    print(table(rows, oracle), flush=True)
    return {"oracle": {"none": oracle}, **rows}


def _listed(text: str) -> tuple[str, ...]:
    return tuple(text.split(","))


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", type=_listed, default=PARTS)
    parser.add_argument("--rules", type=_listed, default=())
    parser.add_argument("--attacks", type=_listed, default=())
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--first-seed", type=int, default=0, help="rule and decay of standing were chosen on 0 and 1")
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--json", help="a file for all cells")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    started = time.process_time()
    cells = {name: part(name, options) for name in options.parts}
    print(f"{time.process_time() - started:.0f} CPU seconds")
    if options.json:
        Path(options.json).write_text(json.dumps(cells, indent=1))


if __name__ == "__main__":
    main()
