"""One byte per update on a small character transformer: what a code costs, what a replay costs, what liars cost.

    python -m benchmarks.zeroth                     # everything, two seeds
    python -m benchmarks.zeroth codes --rounds 200
    python -m benchmarks.zeroth replay attack --seeds 1

A transformer of 0.12 million parameters is trained on Python's help texts in the ordinary way; then the texts change
(vowels take each other's places) and eight peers tune it with scalars. Everything goes through the log: each update is
a code of an entry that its peer signed, each state follows from the log alone, and what is printed of replay and
audits comes from reading the same bytes back.

  codes   the loss with float32 scalars, with one byte, and with the sign alone (8 peers, one sample each a round)
  replay  nanoseconds per update and parameter; equal SHA-256 in order, shuffled and with two threads; flipped bits
  wire    bytes at the socket for an offer of 64, 256 and 1024 updates (zeroth_wire.py)
  attack  2 of 8 peers send -20 g: no defence, clipping, clipping with audits of 10 %

Slopes, and so the losses, differ in their last digits between machines; hashes do not, given the same log.
"""

from __future__ import annotations

import argparse
import hashlib
import math
import random
import statistics
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pydoc_data import topics

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.zeroth_wire import show_wire
from mycel.security.identity import Identity
from mycel.swarm.zeroth.byte import VOID, decode
from mycel.swarm.zeroth.chain import BadLine, ForgedLine
from mycel.swarm.zeroth.defence import Measured, drawn, verdict
from mycel.swarm.zeroth.lattice import SCALE_BITS, Lattice, state_hash
from mycel.swarm.zeroth.lines import parse
from mycel.swarm.zeroth.log import Log, all_updates
from mycel.swarm.zeroth.replay import State, replay
from mycel.swarm.zeroth.rule import NO_CLIP, Rule, in_rate, in_units
from mycel.swarm.zeroth.scalars import Batch, load, measure, start
from mycel.swarm.zeroth.seeds import batch_of
from mycel.swarm.zeroth.tunables import FullParameters

N_CHARS = 128
WIDTH = 64
WINDOW = 64
BATCH = 8
N_PEERS = 8
N_LIARS = 2
EPSILON = 1e-3
RATE = 6e-3
# Vowels that take each other's places: a shift that tuning can follow, as it never could a new language.
SHIFT = str.maketrans("aeiou", "eioua")

Sending = Callable[[Measured], int]
"""From what a peer measured to the code that it sends."""


class CharTransformer(nn.Module):
    """Two blocks of width 64 with learned positions: 0.12 million parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.characters = nn.Embedding(N_CHARS, WIDTH)
        self.places = nn.Embedding(WINDOW, WIDTH)
        self.blocks = nn.ModuleList(_Block() for _ in range(2))
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, N_CHARS)

    def forward(self, tokens_BT: Tensor) -> Tensor:
        x = self.characters(tokens_BT) + self.places.weight[: tokens_BT.shape[1]]
        for block in self.blocks:
            x = block(x)
        logits_BTV: Tensor = self.head(self.norm(x))
        return logits_BTV


class _Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.before, self.between = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x_BTD: Tensor) -> Tensor:
        B, T, D = x_BTD.shape
        q, k, v = (part.view(B, T, 4, D // 4).transpose(1, 2) for part in self.qkv(self.before(x_BTD)).split(D, dim=-1))
        seen = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x_BTD = x_BTD + self.out(seen.transpose(1, 2).reshape(B, T, D))
        return x_BTD + self.down(functional.gelu(self.up(self.between(x_BTD))))


def loss_of(model: nn.Module, batch: Batch) -> float:
    return _loss(model, batch).item()


def _loss(model: nn.Module, batch: Batch) -> Tensor:
    return functional.cross_entropy(model(batch.tokens).flatten(0, 1), batch.targets.flatten())


@dataclass(frozen=True)
class Task:
    """A model that knows the texts, and the windows of the changed ones: to tune it on, and held out."""

    weights: dict[str, Tensor]
    windows: Tensor
    held_out: Batch

    @classmethod
    def make(cls, seed: int, steps: int = 400) -> Task:
        torch.manual_seed(seed)
        text = "\n".join(topics.topics[name] for name in sorted(topics.topics))
        model = CharTransformer()
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
        windows = _windows(text)
        for _ in range(steps):
            optimizer.zero_grad()
            _loss(model, _batch(windows[torch.randint(len(windows), (16,))])).backward()
            optimizer.step()
        changed = _windows(text.translate(SHIFT))
        order = torch.randperm(len(changed))
        weights = {name: value.detach().clone() for name, value in model.state_dict().items()}
        return cls(weights, changed[order[128:]], _batch(changed[order[:128]]))

    def tunable(self) -> FullParameters:
        model = CharTransformer()
        model.load_state_dict(self.weights)
        return FullParameters(model, loss_of)

    def batch(self, seed: bytes) -> Batch:
        return _batch(self.windows[torch.tensor(batch_of(seed, len(self.windows), BATCH))])


def _windows(text: str) -> Tensor:
    codes = np.frombuffer(text.encode("ascii", "replace"), np.uint8)
    usable = len(codes) // (WINDOW + 1) * (WINDOW + 1)
    return torch.from_numpy(codes[:usable].astype(np.int64)).view(-1, WINDOW + 1)


def _batch(windows_BT: Tensor) -> Batch:
    return Batch(windows_BT[:, :-1], windows_BT[:, 1:])


# ------------------------------------------------------------------------------------------------------------- one run


class Run:
    """Eight peers in one process, and the log that they write."""

    def __init__(self, task: Task, *, rate: float = RATE, clip: int = NO_CLIP) -> None:
        self.task = task
        self.tunable = task.tunable()
        theta_P = start(self.tunable)
        rule = Rule(
            hashlib.sha256(b"benchmarks/zeroth").digest(),
            state_hash(theta_P),
            theta_P.size,
            in_rate(rate),
            in_units(EPSILON),
            clip=clip,
        )
        self.theta0_P: Lattice = theta_P.copy()
        self.log = Log(rule.checked())
        self.state = State(theta_P)
        self.peers = [Identity.from_seed(bytes([number]) * 32) for number in range(N_PEERS)]
        self.bans: dict[int, int] = {}
        for peer in self.peers:
            self.log.append(self.log.make_join(peer))
        self.log.close_round(self.state.hash())

    def round(self, sending: Sequence[Sending]) -> None:
        """Every peer that is not banned measures one sample, and sends of it what it sends."""
        for number, peer in enumerate(self.peers):
            if not self.log.members[number].banned:
                seed = self.log.seeds(number, range(1))[0]
                self.log.append(self.log.make_entry(peer, [sending[number](self.measured(seed))]))
        self.close()

    def close(self) -> None:
        self.state.apply(self.log.updates())
        self.log.close_round(self.state.hash())

    def measured(self, seed: bytes) -> Measured:
        direction = self.log.directions([seed])[0]
        return measure(self.tunable, self.state.theta_P, direction, self.log.rule.spread, self.task.batch(seed))

    def audit(self, share: float, liars: range) -> int:
        """Measures a part of the last round again, at the state of then. Returns how many honest peers are accused."""
        closed = self.log.rounds[-1]
        auditors = [number for number in range(N_PEERS) if number not in liars and number not in self.bans]
        found = [d for d in drawn(self.log, closed, self.log.beacon, share, auditors) if d.peer not in self.bans]
        false = 0
        if found:
            self.state.take_back(self.log.updates(closed))
            for one in found:
                again = self.measured(self.log.seeds(one.peer, range(one.sample, one.sample + 1), closed)[0])
                if not verdict(one.code, again, EPSILON).ok and one.peer not in self.bans:
                    false += one.peer not in liars
                    self.bans[one.peer] = closed.number
                    ban = (one.peer, one.round, one.sample, again.code)
                    self.log.append(self.log.make_ban(self.peers[one.auditor], *ban))
            self.state.apply(self.log.updates(closed))
        return false

    def loss(self) -> float:
        load(self.tunable, self.state.theta_P)
        with torch.no_grad():
            return self.tunable.loss(self.task.held_out)


def float_run(task: Task, n_rounds: int, *, rate: float = RATE) -> float:
    """The same peers and samples with float32 scalars, which no log has: the loss."""
    run = Run(task, rate=rate)
    for _ in range(n_rounds):
        slopes = []
        for number in range(N_PEERS):
            seed = run.log.seeds(number, range(1))[0]
            slopes.append((run.log.directions([seed])[0], float(np.float32(run.measured(seed).g))))
        run.state.apply([(d, round(rate * g / N_PEERS * 2**SCALE_BITS)) for d, g in slopes if math.isfinite(g)])
        # Without entries, the beacons of the next rounds follow from the states.
        run.log.close_round(run.state.hash())
    return run.loss()


def sign_only(magnitude: int) -> Sending:
    return lambda found: VOID if math.isnan(found.g) else magnitude | (0x80 if found.g < 0 else 0)


def honest(found: Measured) -> int:
    return found.code


def liar(found: Measured) -> int:
    return replace(found, g=-20.0 * found.g).code


# --------------------------------------------------------------------------------------------------------------- parts


def codes(task: Task, n_rounds: int, seed: int) -> None:
    before = Run(task).loss()
    floats = float_run(task, n_rounds)
    run = Run(task)
    for _ in range(n_rounds):
        run.round([honest] * N_PEERS)
    byte = run.loss()
    sizes = [abs(decode(code)) for closed in run.log.rounds[1:6] for part in closed.parts for code in part.codes]
    typical = replace(Measured(0.0, 0.0, 0.0), g=1.25 * statistics.fmean(sizes)).code
    signs = Run(task)
    for _ in range(n_rounds):
        signs.round([sign_only(typical)] * N_PEERS)
    print(
        f"codes   seed {seed}: start {before:.4f}; after {n_rounds} rounds of {N_PEERS}: float32 {floats:.4f}, "
        f"one byte {byte:.4f} ({byte / floats:.4f} of it), one bit {signs.loss():.4f}"
    )


def timed_replay(run: Run) -> None:
    data = run.log.pack()
    n_updates = sum(closed.close.n_updates for closed in run.log.rounds)
    size = n_updates * run.theta0_P.size
    log = Log.read(data, run.log.run)
    begun = time.perf_counter()
    expected = replay(run.theta0_P, log).hash()
    checked_s = time.perf_counter() - begun
    shuffled = list(all_updates(log))
    random.Random(1).shuffle(shuffled)
    state = State(run.theta0_P)
    begun = time.perf_counter()
    state.apply(shuffled)
    bare_s = time.perf_counter() - begun
    with ThreadPoolExecutor(2) as pool:
        begun = time.perf_counter()
        threaded = State(run.theta0_P)
        threaded.apply(shuffled, pool.map)
        two_s = time.perf_counter() - begun
    equal = expected == state.hash() == threaded.hash() == run.state.hash()
    print(
        f"replay  {n_updates} updates of {run.theta0_P.size} parameters, a log of {len(data)} bytes: "
        f"{bare_s / size * 1e9:.2f} ns per update and parameter at once, {two_s / size * 1e9:.2f} with two threads, "
        f"{checked_s / size * 1e9:.2f} with a hash every {N_PEERS} updates; in order, shuffled, two threads "
        f"{'equal' if equal else 'DIFFERENT'}: {expected.hex()[:16]}"
    )


def flipped_bits(run: Run, n_bits: int) -> None:
    data = run.log.pack()
    lines: list[int] = []
    view = memoryview(data)
    number = 1
    while view:
        _, size = parse(view)
        lines += [number] * size
        view, number = view[size:], number + 1
    located = 0
    rng = random.Random(2)
    for bit in rng.sample(range(8 * len(data)), n_bits):
        damaged = bytearray(data)
        damaged[bit // 8] ^= 1 << bit % 8
        try:
            replay(run.theta0_P, Log.read(bytes(damaged)))
        except (BadLine, ForgedLine) as error:
            located += error.line == lines[bit // 8]
    print(f"replay  {located} of {n_bits} flipped bits located to their line of {number - 1}")


def attack(task: Task, n_rounds: int, seed: int) -> None:
    before = Run(task).loss()
    liars = range(N_LIARS)
    lying: list[Sending] = [liar if number in liars else honest for number in range(N_PEERS)]
    # A tight bound slows the honest as well: where liars are found, a wider one is the better.
    clean, bare, clipped, audited = Run(task), Run(task), Run(task, clip=8), Run(task, clip=16)
    false = 0
    for _ in range(n_rounds):
        clean.round([honest] * N_PEERS)
        bare.round(lying)
        clipped.round(lying)
        audited.round(lying)
        false += audited.audit(0.1, liars)
    gain = before - clean.loss()
    kept = {name: (before - run.loss()) / gain for name, run in (("clipped", clipped), ("audited", audited))}
    banned = sorted(audited.bans[liar] for liar in liars if liar in audited.bans)
    print(
        f"attack  seed {seed}: start {before:.4f}, honest {clean.loss():.4f}; {N_LIARS} of {N_PEERS} lie: no defence "
        f"{bare.loss():.4f}, clipped at twice the median {clipped.loss():.4f} ({kept['clipped']:.0%} of the decrease), "
        f"clipped at 4 times and audited "
        f"{audited.loss():.4f} ({kept['audited']:.0%}); liars banned after rounds {banned}, {false} honest accused"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", help="codes, replay, attack, wire; all by default")
    parser.add_argument("--rounds", type=int, default=150)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--bits", type=int, default=100)
    options = parser.parse_args()
    parts = options.parts or ["codes", "replay", "attack", "wire"]
    if not set(parts) <= {"codes", "replay", "attack", "wire"}:
        parser.error("the parts are codes, replay, attack and wire")
    torch.set_num_threads(1)
    if "wire" in parts:
        show_wire()
    for seed in range(options.seeds if set(parts) - {"wire"} else 0):
        begun = time.perf_counter()
        task = Task.make(seed)
        print(f"task    seed {seed}: trained in {time.perf_counter() - begun:.0f} s", flush=True)
        if "codes" in parts:
            codes(task, options.rounds, seed)
        if "replay" in parts and seed == 0:
            run = Run(task)
            for _ in range(min(options.rounds, 25)):
                run.round([honest] * N_PEERS)
            timed_replay(run)
            flipped_bits(run, options.bits)
        if "attack" in parts:
            attack(task, options.rounds, seed)
        print(f"        {time.perf_counter() - begun:.0f} s", flush=True)


if __name__ == "__main__":
    main()
