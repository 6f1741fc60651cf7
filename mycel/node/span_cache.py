"""Keys and values of one session in one span.

Appended in place into buffers that grow by halves, so that a decode step copies one token and not the history. A block
with a sliding window keeps no more than its window (and a margin). Plugs into transformers as a `Cache`, whose masks
follow `get_mask_sizes`; blocks address it by their index in the whole model.

Legend: B batch (always 1), H key-value heads, T tokens, D head dimension.

Ring: algorithms.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

__all__ = ["SpanCache"]

_PAGE_TOKENS = 64
_MAX_GROWTH_TOKENS = 4096
# How far a block with a sliding window can be rolled back once it has dropped older tokens.
ROLLBACK_TOKENS = 32


def _capacity(tokens: int) -> int:
    """Tokens to make room for when `tokens` are needed: half as many again, in whole pages."""
    wanted = tokens + min(tokens // 2, _MAX_GROWTH_TOKENS)
    return -(-wanted // _PAGE_TOKENS) * _PAGE_TOKENS


class _Buffer:
    """Tokens [first, end) of one block, in room for `capacity` tokens."""

    __slots__ = ("capacity", "data_BHTD", "end", "first")

    def __init__(self) -> None:
        self.data_BHTD: Tensor | None = None
        self.first = self.end = self.capacity = 0

    def append(self, new_BHTD: Tensor, keep_from: int) -> Tensor:
        """Adds tokens and returns those in [keep_from, end); older ones may be dropped, up to the rollback margin."""
        n_new = new_BHTD.shape[2]
        end = self.end + n_new
        if end - self.first > self.capacity:
            self._make_room(new_BHTD, max(self.first, keep_from - ROLLBACK_TOKENS))
        assert self.data_BHTD is not None
        self.data_BHTD.narrow(2, self.end - self.first, n_new).copy_(new_BHTD)
        self.end = end
        return self.data_BHTD.narrow(2, keep_from - self.first, end - keep_from)

    def _make_room(self, new_BHTD: Tensor, first: int) -> None:
        batch, heads, n_new, dim = new_BHTD.shape
        kept = self.end - first
        capacity = max(_capacity(kept + n_new), _PAGE_TOKENS)
        # Also where the old buffer is large enough: moving within it would read what it has just overwritten.
        data_BHTD = new_BHTD.new_empty(batch, heads, capacity, dim)
        if kept:
            assert self.data_BHTD is not None
            data_BHTD.narrow(2, 0, kept).copy_(self.data_BHTD.narrow(2, first - self.first, kept))
        self.data_BHTD, self.first, self.capacity = data_BHTD, first, capacity

    def begin(self, first: int, count: int, like: _Buffer) -> None:
        """Empty, with room for tokens [first, count), which look as those of `like` do."""
        assert like.data_BHTD is not None
        batch, heads, _, dim = like.data_BHTD.shape
        self.first, self.end, self.capacity = first, first, max(_capacity(count - first), _PAGE_TOKENS)
        self.data_BHTD = torch.empty(batch, heads, self.capacity, dim, dtype=like.data_BHTD.dtype)

    def rows(self, end: int) -> Tensor:
        """Tokens [first, end). What they hold is never written again, not even when the buffer moves."""
        assert self.data_BHTD is not None
        return self.data_BHTD[0].narrow(1, 0, end - self.first)

    @property
    def nbytes(self) -> int:
        return 0 if self.data_BHTD is None else self.data_BHTD.nbytes


class BlockCache(CacheLayerMixin):
    """One block's keys and values; `window` tokens are visible to a query (itself included), None means all."""

    is_croppable = True

    def __init__(self, window: int | None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.is_sliding = window is not None
        self.window = window
        self.length = 0
        self.key_buffer, self.value_buffer = _Buffer(), _Buffer()

    def visible_from(self, length: int) -> int:
        """The oldest token that a query at position `length` sees."""
        return 0 if self.window is None else max(length - self.window + 1, 0)

    def update(self, key_states: Tensor, value_states: Tensor, *_args: Any, **_kwargs: Any) -> tuple[Tensor, Tensor]:
        """Adds the step's keys and values, and returns all that its first query can see, up to the newest."""
        keep_from = 0 if self.window is None else self.visible_from(self.length)
        keys = self.key_buffer.append(key_states, keep_from)
        values = self.value_buffer.append(value_states, keep_from)
        self.length += key_states.shape[2]
        return keys, values

    @property
    def first(self) -> int:
        """The oldest token that is kept."""
        return self.key_buffer.first

    def begin(self, first: int, count: int, like: BlockCache) -> None:
        """Expect tokens [first, count) of another node's cache (`put`); `like` shows what tokens look like here."""
        self.key_buffer.begin(first, count, like.key_buffer)
        self.value_buffer.begin(first, count, like.value_buffer)
        self.length = first

    def skip_to(self, position: int) -> None:
        """Nothing older than `position` comes."""
        for buffer in (self.key_buffer, self.value_buffer):
            buffer.first = buffer.end = position
        self.length = position

    def put(self, keys_HTD: Tensor, values_HTD: Tensor) -> None:
        """Adds tokens that were computed elsewhere, into the room that `begin` made."""
        for buffer, rows_HTD in ((self.key_buffer, keys_HTD), (self.value_buffer, values_HTD)):
            buffer.append(rows_HTD.unsqueeze(0), buffer.first)
        self.length += keys_HTD.shape[1]

    def rows(self, end: int) -> tuple[Tensor, Tensor]:
        """Keys and values of tokens [first, end).

        While a step appends on another thread, too, unless there is a window: then `first` moves.
        """
        return self.key_buffer.rows(end), self.value_buffer.rows(end)

    def needed_from(self, length: int) -> int:
        """The oldest token that another node gets, to go on from position `length`: with the rollback margin."""
        return 0 if self.window is None else max(self.visible_from(length) - ROLLBACK_TOKENS, 0)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        offset = self.visible_from(self.length)
        return self.length - offset + query_length, offset

    def get_seq_length(self) -> int:
        return self.length

    def get_max_length(self) -> int:
        return -1 if self.window is None else self.window

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing: buffers are made at the first token."""


class SpanCache(Cache):
    """The keys and values of one session for blocks [start, start + len(windows)).

    `windows[i]` is the sliding window of block start + i in tokens, or None where every token is visible.
    """

    def __init__(self, start: int, windows: Sequence[int | None]) -> None:
        self._blocks = [BlockCache(window) for window in windows]
        super().__init__(layers=[*self._blocks])
        self._start = start

    @property
    def by_block(self) -> dict[int, BlockCache]:
        """Each block's keys and values, by its index in the whole model."""
        return {self._start + index: layer for index, layer in enumerate(self._blocks)}

    @property
    def length(self) -> int:
        """Tokens of the session so far; the next step's position."""
        return self._blocks[0].length

    @property
    def nbytes(self) -> int:
        """Bytes allocated, with the room for tokens to come."""
        return sum(layer.key_buffer.nbytes + layer.value_buffer.nbytes for layer in self._blocks)

    def crop(self, n: int) -> None:
        """Rolls back to the first `n` tokens.

        Raises ValueError if there are fewer, or if a sliding window has dropped tokens that would be visible again
        (always possible for the last `ROLLBACK_TOKENS` tokens of single-token steps); the cache is then unchanged.
        """
        length = self.length
        if not 0 <= n <= length:
            raise ValueError(f"cannot roll back to {n} tokens: the cache holds {length}")
        for layer in self._blocks:
            if layer.visible_from(n) < layer.first:
                raise ValueError(f"cannot roll back to {n} tokens: a sliding window has dropped what they would see")
        self.restore(n)

    def restore(self, n: int) -> None:
        """Takes back an unfinished step: every block to `n` tokens, at most what it held before that step."""
        for layer in self._blocks:
            layer.length = layer.key_buffer.end = layer.value_buffer.end = min(n, layer.length)

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_args: Any, **_kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Called by block `layer_idx` (its index in the whole model) with the step's keys and values."""
        return self._blocks[layer_idx - self._start].update(key_states, value_states)
