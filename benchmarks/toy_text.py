"""The reference task of rounds: a transformer of 0.12M parameters that learns Python's help texts by character.

`run` trains it with several peers in one process. Nothing about the bytes is pretended: every contribution and every
result is encoded, counted and decoded, and the rows are aggregated by the rule that a run would use. All peers compute
in one batch of matrices, so that 400 steps of four peers take some 15 s on one core.

Every run goes on from the same warm start, as DiLoCo's own experiments do: in the first steps from random weights any
method that takes one outer step where another takes twenty is as much worse as it likes to be.

Legend: N peers, B batch, T characters, D hidden size, V vocabulary, P parameters, S elements of a round's scope.
"""

from __future__ import annotations

import hashlib
import math
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pydoc_data.topics import topics

import torch
from torch import Tensor
from torch.nn import functional

from mycel.security.aggregators import aggregate, parse_rule
from mycel.swarm.codecs import make_codec
from mycel.swarm.codecs.codec import Codec, Encoder
from mycel.swarm.codecs.layout import Layout
from mycel.swarm.methods.make import make_method
from mycel.swarm.methods.method import Method

D, N_LAYERS, N_HEADS, T, V = 64, 2, 4, 64, 128
_BLOCK = 1024  # characters; every twentieth block is held out
WARM_STEPS = 400
WARM_RATE = 4e-3

_LAYER_SHAPES = ((D,), (D,), (3 * D, D), (3 * D,), (D, D), (D,), (D,), (D,), (4 * D, D), (4 * D,), (D, 4 * D), (D,))
SHAPES: tuple[tuple[int, ...], ...] = ((V, D), (T, D), *(_LAYER_SHAPES * N_LAYERS), (D,), (D,), (V, D))
LAYOUT = Layout(SHAPES)
_SIZES = [math.prod(shape) for shape in SHAPES]

# What the peers' vectors become before they are encoded: round, vectors -> vectors. Liars go here.
Attack = Callable[[int, Sequence[Tensor]], Sequence[Tensor]]


@dataclass(frozen=True)
class Setting:
    """One run. `codec` and `result_codec` default to the method's; `rate` is that of the peers' own AdamW.

    `dropped`: the share of contributions that never arrive.
    """

    method: Mapping[str, object]
    codec: str | None = None
    result_codec: str | None = None
    rule: str = "mean"
    n_liars: int = 0
    n_peers: int = 4
    steps: int = 400
    seed: int = 0
    batch: int = 8
    rate: float = 4e-3
    dropped: float = 0.0
    warm_steps: int = WARM_STEPS
    attack: Attack | None = None


@dataclass
class Outcome:
    """`loss` is the cross entropy on held-out text in nats a character; bytes are one peer's, over the whole run."""

    loss: float
    rounds: int = 0
    up_bytes: float = 0.0
    down_bytes: float = 0.0
    peak_bytes: float = 0.0  # the most in one round, both ways
    digests: set[bytes] = field(default_factory=set)

    @property
    def total_bytes(self) -> float:
        return self.up_bytes + self.down_bytes


def float32_data_parallel_bytes(steps: int) -> float:
    """What one peer sends and receives with a float32 gradient each step: the baseline of all ratios."""
    return steps * 2 * 4.0 * LAYOUT.n_elements


# ------------------------------------------------------------------------------------------------------------ the task


@cache
def text() -> tuple[Tensor, Tensor]:
    """Training characters, and held-out windows [B, T + 1]."""
    raw = "\n".join(topics[name] for name in sorted(topics)).encode("ascii", "replace")
    blocks = torch.frombuffer(bytearray(raw[: len(raw) // _BLOCK * _BLOCK]), dtype=torch.uint8).view(-1, _BLOCK)
    held_out = torch.arange(len(blocks)) % 20 == 10
    windows = blocks[held_out][:, : _BLOCK // (T + 1) * (T + 1)].reshape(-1, T + 1)
    return blocks[~held_out].flatten().long(), windows.long()


def batch(seed: int, peer: int, step: int, size: int) -> Tensor:
    """[B, T + 1] characters that follow from the numbers alone, the same distribution for all peers."""
    train, _ = text()
    drawn = hashlib.shake_256(f"{seed}/{peer}/{step}".encode()).digest(8 * size)
    starts = [int.from_bytes(drawn[8 * i : 8 * i + 8], "big") % (len(train) - T - 1) for i in range(size)]
    return torch.stack([train[start : start + T + 1] for start in starts])


def initial(seed: int) -> Tensor:
    """Random parameters [P], as torch's own modules draw them."""
    rng = torch.Generator().manual_seed(seed)
    norms = {2 + 12 * layer + place for layer in range(N_LAYERS) for place in (0, 6)} | {2 + 12 * N_LAYERS}
    parts = []
    for index, shape in enumerate(SHAPES):
        if len(shape) == 1:
            parts.append(torch.full(shape, 1.0 if index in norms else 0.0))
        elif index < 2:
            parts.append(torch.randn(shape, generator=rng).flatten())
        else:
            parts.append(((torch.rand(shape, generator=rng) * 2.0 - 1.0) * shape[1] ** -0.5).flatten())
    return torch.cat(parts)


def losses(theta_NP: Tensor, tokens_NBT1: Tensor) -> Tensor:
    """The mean loss [N] of each peer's parameters on its own batch."""
    n, b, _ = tokens_NBT1.shape
    tensors = iter([part.view(n, *shape) for part, shape in zip(torch.split(theta_NP, _SIZES, 1), SHAPES, strict=True)])
    inputs, targets = tokens_NBT1[..., :-1], tokens_NBT1[..., 1:]
    characters = next(tensors).reshape(n * V, D)
    hidden = functional.embedding(inputs + torch.arange(n)[:, None, None] * V, characters)
    hidden = (hidden + next(tensors)[:, None]).reshape(n, b * T, D)
    for _ in range(N_LAYERS):
        hidden = _layer(hidden, n * b, [next(tensors) for _ in _LAYER_SHAPES])
    hidden = _norm(hidden, next(tensors), next(tensors))
    logits = torch.bmm(hidden, next(tensors).transpose(1, 2))
    return functional.cross_entropy(logits.reshape(-1, V), targets.reshape(-1), reduction="none").view(n, -1).mean(1)


def _layer(hidden: Tensor, n_rows: int, t: list[Tensor]) -> Tensor:
    heads = _linear(_norm(hidden, t[0], t[1]), t[2], t[3]).view(n_rows, T, 3, N_HEADS, D // N_HEADS)
    query, key, value = heads.permute(2, 0, 3, 1, 4)
    mixed = functional.scaled_dot_product_attention(query, key, value, is_causal=True).transpose(1, 2)
    hidden = hidden + _linear(mixed.reshape(hidden.shape), t[4], t[5])
    return hidden + _linear(functional.gelu(_linear(_norm(hidden, t[6], t[7]), t[8], t[9])), t[10], t[11])


def _linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return torch.baddbmm(bias[:, None], x, weight.transpose(1, 2))


def _norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return functional.layer_norm(x, (D,)) * weight[:, None] + bias[:, None]


def gradients(theta_NP: Tensor, tokens_NBT1: Tensor) -> Tensor:
    """Each peer's gradient [N, P]."""
    theta_NP = theta_NP.detach().requires_grad_()
    return torch.autograd.grad(losses(theta_NP, tokens_NBT1).sum(), theta_NP)[0]


@torch.no_grad()
def evaluate(theta_P: Tensor) -> float:
    """The loss on held-out text."""
    return float(losses(theta_P[None], text()[1][None])[0])


class AdamW:
    """The peers' own optimizers [N, P], each with its own moments."""

    def __init__(self, shape: torch.Size, rate: float, warmup: int) -> None:
        self._mean, self._square = torch.zeros(shape), torch.zeros(shape)
        self._rate, self._warmup, self._count = rate, warmup, 0

    def step(self, theta_NP: Tensor, gradient_NP: Tensor) -> None:
        self._count += 1
        rate = self._rate * min(1.0, self._count / self._warmup)
        self._mean.mul_(0.9).add_(gradient_NP, alpha=0.1)
        self._square.mul_(0.95).addcmul_(gradient_NP, gradient_NP, value=0.05)
        scale = (self._square / (1.0 - 0.95**self._count)).sqrt_().add_(1e-8)
        theta_NP.mul_(1.0 - 0.1 * rate).addcdiv_(self._mean, scale, value=-rate / (1.0 - 0.9**self._count))


@cache
def warm_start(seed: int, steps: int) -> Tensor:
    """Parameters after `steps` of one peer with batches of 32, on other batches than any run's."""
    theta_1P = initial(seed)[None]
    optimizer = AdamW(theta_1P.shape, WARM_RATE, 20)
    for step in range(steps):
        optimizer.step(theta_1P, gradients(theta_1P, batch(seed, -1, step, 32)[None]))
    return theta_1P[0]


# ----------------------------------------------------------------------------------------------------------- the peers


@dataclass(frozen=True)
class _Due:
    step: int
    number: int
    result: Tensor
    contributors: int


class _Swarm:
    """The peers of one run, with everything that travels between them."""

    def __init__(self, setting: Setting) -> None:
        self.setting = setting
        start_P = warm_start(setting.seed, setting.warm_steps)
        self.peers: list[Method] = [
            make_method(setting.method, LAYOUT, start_P, lambda version: min(1.0, (version + 1) / 20))
            for _ in range(setting.n_peers)
        ]
        first = self.peers[0]
        self.codec: Codec = make_codec(setting.codec or first.codec)
        self.result_codec: Codec = make_codec(setting.result_codec or first.result_codec)
        self.encoders: list[list[Encoder]] = [
            [self.codec.encoder(first.layout(scope)) for scope in range(first.n_scopes)] for _ in self.peers
        ]
        self.results: dict[int, Tensor] = {}  # the last one of each scope, the centre of robust rules
        self.outcome = Outcome(math.nan)

    def round(self, number: int, vectors: Sequence[Tensor]) -> _Due | None:
        """Contributions to a result, every byte of it; None if nothing arrived."""
        setting, outcome = self.setting, self.outcome
        scope = number % self.peers[0].n_scopes
        layout = self.peers[0].layout(number)
        if setting.attack is not None:
            vectors = setting.attack(number, vectors)
        rows, sent = [], 0
        for peer, (encoders, vector_S) in enumerate(zip(self.encoders, vectors, strict=True)):
            body = encoders[scope].encode(vector_S, _hash(setting.seed, number, peer))
            arrives = _lot(setting.seed, number, peer) >= setting.dropped
            encoders[scope].settle(arrives)
            sent += len(body)
            if arrives:
                rows.append(self.codec.decode(body, layout))
        outcome.rounds += 1
        outcome.up_bytes += sent / len(self.peers)
        if not rows:
            return None
        beacon = _hash(setting.seed, number, -1)
        center = self.results.get(scope)
        found = aggregate(rows, parse_rule(setting.rule), setting.n_liars, center=center, seed=beacon)
        body = self.result_codec.encoder(layout).encode(found.vector, beacon)
        outcome.down_bytes += len(body)
        outcome.peak_bytes = max(outcome.peak_bytes, sent / len(self.peers) + len(body))
        self.results[scope] = self.result_codec.decode(body, layout)
        return _Due(0, number, self.results[scope], len(rows))

    def apply(self, due: _Due, local_NP: Tensor) -> None:
        for method, local_P in zip(self.peers, local_NP, strict=True):
            method.apply(due.number, due.result, due.contributors)
            local_P.copy_(method.merge(due.number, local_P))


def run(setting: Setting) -> Outcome:
    """Train, and tell the loss of what all peers hold, with the bytes that it took."""
    swarm = _Swarm(setting)
    method, n = swarm.peers[0], setting.n_peers
    local_NP = torch.stack([peer.restart() for peer in swarm.peers])
    optimizer = AdamW(local_NP.shape, setting.rate, 20)
    gathered_NP = torch.zeros_like(local_NP)
    due: deque[_Due] = deque()
    for step in range(1, setting.steps + 1):
        tokens = torch.stack([batch(setting.seed, peer, step, setting.batch) for peer in range(n)])
        gradient_NP = gradients(local_NP, tokens)
        if method.sends == "gradient":
            gathered_NP += gradient_NP / method.inner_steps
        else:
            optimizer.step(local_NP, gradient_NP)
        if step % method.inner_steps == 0:
            number = step // method.inner_steps - 1
            source_NP = gathered_NP if method.sends == "gradient" else local_NP
            found = swarm.round(
                number, [p.contribution(number, x) for p, x in zip(swarm.peers, source_NP, strict=True)]
            )
            gathered_NP.zero_()
            if found is not None:
                due.append(_Due(step + method.delay, found.number, found.result, found.contributors))
        while due and due[0].step <= step:
            swarm.apply(due.popleft(), local_NP)
    while due:
        swarm.apply(due.popleft(), local_NP)
    swarm.outcome.loss = evaluate(method.state.theta_P)
    swarm.outcome.digests = {peer.state.digest() for peer in swarm.peers}
    return swarm.outcome


def alone(setting: Setting) -> Outcome:
    """One peer with its own batches and nobody to talk to."""
    theta_1P = warm_start(setting.seed, setting.warm_steps)[None].clone()
    optimizer = AdamW(theta_1P.shape, setting.rate, 20)
    for step in range(1, setting.steps + 1):
        optimizer.step(theta_1P, gradients(theta_1P, batch(setting.seed, 0, step, setting.batch)[None]))
    return Outcome(evaluate(theta_1P[0]))


def _hash(seed: int, round_number: int, peer: int) -> bytes:
    return hashlib.sha256(f"{seed}/{round_number}/{peer}".encode()).digest()


def _lot(seed: int, round_number: int, peer: int) -> float:
    return int.from_bytes(_hash(seed, round_number, peer)[:6], "big") / 2.0**48
