"""A model made of arithmetic, to run whole swarms in virtual time: exact, instant, and sensitive to every mistake.

A block's output at a position depends on all inputs up to it, in order, so that a gap, a repetition, a swap or a lost
cache changes every later token.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

VOCAB = 97
HIDDEN = 4
MODULUS = 1009


@dataclass
class ToyCache:
    """The running state of each block, one row a block."""

    states_LD: Tensor  # noqa: N815 (shape suffix)
    length: int = 0


@dataclass(frozen=True)
class ToyPart:
    """Blocks [start, end) of the toy."""

    start: int
    end: int
    n_blocks: int

    def new_cache(self) -> ToyCache:
        return ToyCache(torch.zeros(self.end - self.start, HIDDEN))

    def forward(self, inputs: Tensor, cache: ToyCache) -> Tensor:
        hidden_TD = inputs
        if self.start == 0:
            hidden_TD = (inputs[:, None] * torch.arange(1, HIDDEN + 1) % MODULUS).float()
        outputs = []
        for hidden_D in hidden_TD.unbind():
            for row in range(self.end - self.start):
                mixed_D = cache.states_LD[row] * 31 + hidden_D * 17 + (self.start + row + 1) * 7
                cache.states_LD[row] = mixed_D % MODULUS
                hidden_D = cache.states_LD[row].clone()  # noqa: PLW2901
            outputs.append(hidden_D)
            cache.length += 1
        return torch.stack(outputs)

    def logits(self, hidden_TD: Tensor) -> Tensor:
        favourite_T = hidden_TD.sum(dim=1).long() % VOCAB
        return torch.nn.functional.one_hot(favourite_T, VOCAB).float() * 9


@dataclass
class ToySpan:
    """What a simulated node serves: blocks [start, end) at `block_time_s` of virtual time each."""

    start: int
    end: int
    n_blocks: int
    block_time_s: float = 0.01
    max_positions: int = 4096
    vocab_size: int = VOCAB
    hidden_size: int = HIDDEN
    dtype: torch.dtype = torch.float32
    observed: list[float] = field(default_factory=list)

    def part(self, start: int, end: int) -> ToyPart:
        return ToyPart(start, end, self.n_blocks)

    def session_bytes(self, start: int, end: int, max_tokens: int) -> int:
        return (end - start) * HIDDEN * 4 * max_tokens

    def step_cost_s(self, start: int, end: int, count: int) -> float:
        return self.block_time_s * (end - start) * count**0.5

    def observe(self, start: int, end: int, count: int, compute_s: float) -> None:
        self.observed.append(compute_s)


def reference(prompt: list[int], n_new: int, n_blocks: int) -> list[int]:
    """What one process alone would generate, greedily."""
    part = ToyPart(0, n_blocks, n_blocks)
    cache, tokens, inputs = part.new_cache(), list(prompt), list(prompt)
    for _ in range(n_new):
        hidden_TD = part.forward(torch.tensor(inputs), cache)
        inputs = [int(part.logits(hidden_TD[-1:])[0].argmax())]
        tokens += inputs
    return tokens[len(prompt) :]
