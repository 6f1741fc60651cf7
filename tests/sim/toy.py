"""A model made of arithmetic, to run whole swarms in virtual time: exact, instant, and sensitive to every mistake.

A block's output at a position depends on all inputs up to it, in order, so that a gap, a repetition, a swap or a lost
cache changes every later token.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from mycel.protocols.errors import RemoteProtocolError

VOCAB = 97
HIDDEN = 4
MODULUS = 1009
PIECE_TOKENS = 16


@dataclass
class ToyCache:
    """The running state of each block after each token: the last is what counts, the others are for rolling back."""

    states_TLD: list[Tensor]  # noqa: N815 (shape suffix)

    @property
    def length(self) -> int:
        return len(self.states_TLD)


@dataclass
class ToyIntake:
    """A cache that is handed over, block by block and in order."""

    part: ToyPart
    count: int
    usable: int
    rows: dict[int, list[Tensor]] = field(init=False)

    def __post_init__(self) -> None:
        self.rows = {block: [] for block in range(self.part.start, self.part.end)}

    def take(self, block: int, position: int, tensors: Sequence[Tensor]) -> None:
        if len(tensors) != 1 or tensors[0].shape[1:] != (HIDDEN,) or tensors[0].dtype != torch.float32:
            raise RemoteProtocolError(f"block {block} with tensors of another kind")
        rows = self.rows.get(block)
        if rows is None or position != len(rows) or not 0 < len(tensors[0]) <= self.count - position:
            raise RemoteProtocolError(f"block {block} at token {position}")
        if not bool(torch.isfinite(tensors[0]).all()):
            raise RemoteProtocolError(f"block {block} with numbers that are not finite")
        rows += tensors[0].unbind()

    def finish(self) -> ToyCache:
        if any(len(rows) != self.count for rows in self.rows.values()):
            raise RemoteProtocolError("tokens are missing")
        return ToyCache([torch.stack(rows_LD) for rows_LD in zip(*self.rows.values(), strict=True)][: self.usable])


@dataclass(frozen=True)
class ToyPart:
    """Blocks [start, end) of the toy."""

    start: int
    end: int
    n_blocks: int

    def new_cache(self) -> ToyCache:
        return ToyCache([])

    def forward(self, inputs: Tensor, cache: ToyCache) -> Tensor:
        hidden_TD = inputs
        if self.start == 0:
            hidden_TD = (inputs[:, None] * torch.arange(1, HIDDEN + 1) % MODULUS).float()
        outputs = []
        states_LD = cache.states_TLD[-1] if cache.states_TLD else torch.zeros(self.end - self.start, HIDDEN)
        for hidden_D in hidden_TD.unbind():
            states_LD = states_LD.clone()
            for row in range(self.end - self.start):
                mixed_D = states_LD[row] * 31 + hidden_D * 17 + (self.start + row + 1) * 7
                states_LD[row] = mixed_D % MODULUS
                hidden_D = states_LD[row].clone()  # noqa: PLW2901
            outputs.append(hidden_D)
            cache.states_TLD.append(states_LD)
        return torch.stack(outputs)

    def logits(self, hidden_TD: Tensor) -> Tensor:
        favourite_T = hidden_TD.sum(dim=1).long() % VOCAB
        return torch.nn.functional.one_hot(favourite_T, VOCAB).float() * 9

    def state_bytes(self, cache: ToyCache, count: int) -> int:
        return count * (self.end - self.start) * HIDDEN * 4

    def state_pieces(self, cache: ToyCache, count: int) -> Iterator[tuple[int, int, tuple[Tensor, ...]]]:
        for row in range(self.end - self.start):
            for at in range(0, count, PIECE_TOKENS):
                states = cache.states_TLD[at : min(at + PIECE_TOKENS, count)]
                yield self.start + row, at, (torch.stack([states_LD[row] for states_LD in states]),)

    def state_intake(self, count: int, usable: int) -> ToyIntake:
        return ToyIntake(self, count, usable)


@dataclass
class ToySpan:
    """What a simulated node serves: blocks [start, end) at `block_time_s` of virtual time each."""

    start: int
    end: int
    n_blocks: int
    block_time_s: float = 0.01
    prefill_block_s: float = 0.001
    max_positions: int = 4096
    vocab_size: int = VOCAB
    hidden_size: int = HIDDEN
    dtype: torch.dtype = torch.float32
    observed: list[float] = field(default_factory=list)

    def part(self, start: int, end: int) -> ToyPart:
        return ToyPart(start, end, self.n_blocks)

    def session_bytes(self, start: int, end: int, max_tokens: int) -> int:
        """As in life: the cache, and the output history of all but the last span."""
        return (end - start + (end < self.n_blocks)) * HIDDEN * 4 * max_tokens

    def step_cost_s(self, start: int, end: int, count: int) -> float:
        return self.block_time_s * (end - start) * count**0.5

    def prefill_cost_s(self, start: int, end: int, count: int) -> float:
        return self.prefill_block_s * (end - start) * count

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
