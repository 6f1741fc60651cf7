"""The blocks that this node serves: what a session over a stretch of them needs, and how fast they are.

Ring: shell (reads the clock, to measure).
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field

import torch

from mycel.node.model_info import DTYPE_BYTES, ModelInfo
from mycel.node.span import Span

MEASURED_STEPS = 5
EMA_SHARE = 0.1
# A step of so many tokens tells how long a token takes among many; one of a few is hardly longer than one of one.
PREFILL_TOKENS = 16


@dataclass(eq=False, slots=True)
class ServedSpan:
    """A loaded span, its parts, and the measured seconds of a token through one block: alone, and among many."""

    whole: Span
    dtype: torch.dtype
    block_time_s: float = 0.0
    prefill_block_s: float = 0.0
    _parts: dict[tuple[int, int], Span] = field(default_factory=dict, init=False)

    @property
    def start(self) -> int:
        return self.whole.start

    @property
    def end(self) -> int:
        return self.whole.end

    @property
    def n_blocks(self) -> int:
        return self.whole.info.n_blocks

    @property
    def max_positions(self) -> int:
        return self.whole.info.max_positions

    @property
    def vocab_size(self) -> int:
        return self.whole.info.vocab_size

    @property
    def hidden_size(self) -> int:
        return self.whole.info.hidden_size

    def part(self, start: int, end: int) -> Span:
        """Blocks [start, end) of this span, over the same weights."""
        if (start, end) not in self._parts:
            self._parts[start, end] = self.whole.part(start, end)
        return self._parts[start, end]

    def session_bytes(self, start: int, end: int, max_tokens: int) -> int:
        """KV cache and output history of a session over blocks [start, end)."""
        return max_tokens * token_bytes(self.whole.info, start, end, self.dtype.itemsize)

    def step_cost_s(self, start: int, end: int, count: int) -> float:
        return self.block_time_s * (end - start) * count

    def prefill_cost_s(self, start: int, end: int, count: int) -> float:
        """Expected seconds to compute `count` tokens in long steps; before the first of those, as if one by one."""
        return (self.prefill_block_s or self.block_time_s) * (end - start) * count

    def observe(self, start: int, end: int, count: int, compute_s: float) -> None:
        """Learn from a step that was computed; steps of several tokens say little about decoding."""
        seen_s = compute_s / (end - start) / count
        if count == 1:
            self.block_time_s += EMA_SHARE * (seen_s - self.block_time_s)
        elif count >= PREFILL_TOKENS:
            self.prefill_block_s += EMA_SHARE * (seen_s - self.prefill_block_s) if self.prefill_block_s else seen_s

    def measure(self) -> None:
        """Time decode steps, to have a figure to announce before the first session. Runs on the compute thread."""
        span, cache = self.whole, self.whole.new_cache()
        inputs = torch.zeros(1, dtype=torch.int64)
        if not span.is_first:
            inputs = torch.zeros(1, span.info.hidden_size, dtype=self.dtype)
        times_s = []
        for _ in range(MEASURED_STEPS):
            began = time.perf_counter()
            hidden_TD = span.forward(inputs, cache)
            if span.is_last:
                span.logits(hidden_TD)
            times_s.append(time.perf_counter() - began)
        self.block_time_s = sorted(times_s)[MEASURED_STEPS // 2] / (span.end - span.start)


def token_bytes(info: ModelInfo, start: int, end: int, itemsize_bytes: int) -> int:
    """Session memory of one token: keys and values of blocks [start, end), and the output kept for resending."""
    kv_bytes = sum(info.kv_bytes_per_token[start:end]) * itemsize_bytes // DTYPE_BYTES[info.dtype]
    history_bytes = info.hidden_size * itemsize_bytes if end < info.n_blocks else 0
    # Caches grow by halves (span_cache), so up to half as much again is allocated.
    return kv_bytes * 3 // 2 + history_bytes
