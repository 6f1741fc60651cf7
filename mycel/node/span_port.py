"""What a session needs of the blocks that it runs: torch modules in life, arithmetic in a simulation.

Ring: algorithms (signatures only).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

# Block, position of the first token, tensors: a part of a cache as it travels.
StatePiece = tuple[int, int, tuple[Tensor, ...]]


class StateIntake(Protocol):
    """A cache that is being filled with what another node hands over. Whatever it is given is hostile until checked."""

    def take(self, block: int, position: int, tensors: Sequence[Tensor]) -> None:
        """Add a piece. Raises RemoteProtocolError for a wrong block, order, shape, dtype, or numbers not finite."""
        ...

    def finish(self) -> Any:
        """The cache. Raises RemoteProtocolError if anything is missing, PeerRefused if it is of no use here."""
        ...


class SpanModel(Protocol):
    """Some blocks, ready to compute."""

    def new_cache(self) -> Any: ...

    def forward(self, inputs: Tensor, cache: Any) -> Tensor:
        """Token ids [T] (first span) or hidden_TD -> hidden_TD."""
        ...

    def logits(self, hidden_TD: Tensor) -> Tensor:
        """logits_TV; last span only."""
        ...

    def state_bytes(self, cache: Any, count: int) -> int:
        """The size of what `state_pieces` gives."""
        ...

    def state_pieces(self, cache: Any, count: int) -> Iterator[StatePiece]:
        """What another node needs to go on after the first `count` tokens, which stay as they are while steps go on.

        Called between two steps; read while later ones are computed.
        """
        ...

    def state_intake(self, count: int, usable: int) -> StateIntake:
        """The other end of `state_pieces`, for a cache of `count` tokens of which the first `usable` are wanted.

        May compute a step, to know the shapes. Raises PeerRefused if the cache could not be rolled back so far.
        """
        ...


class SpanSource(Protocol):
    """The blocks that this node serves, and what a stretch of them costs."""

    @property
    def start(self) -> int: ...
    @property
    def end(self) -> int: ...
    @property
    def n_blocks(self) -> int: ...
    @property
    def max_positions(self) -> int: ...
    @property
    def vocab_size(self) -> int: ...
    @property
    def hidden_size(self) -> int: ...
    @property
    def dtype(self) -> torch.dtype: ...

    def part(self, start: int, end: int) -> SpanModel: ...

    def session_bytes(self, start: int, end: int, max_tokens: int) -> int:
        """KV cache and output history of a session over blocks [start, end)."""
        ...

    def step_cost_s(self, start: int, end: int, count: int) -> float:
        """Expected seconds of compute for `count` tokens."""
        ...

    def prefill_cost_s(self, start: int, end: int, count: int) -> float:
        """Expected seconds to compute `count` tokens in steps of many."""
        ...

    def observe(self, start: int, end: int, count: int, compute_s: float) -> None:
        """Learn from a step that was computed."""
        ...
