"""What one process alone says to a prompt: a whole Span, and tokens chosen as the last hop of a chain chooses them.

Ring: shell (reads a model directory).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from mycel.node.sampling import sample
from mycel.node.span import Span
from mycel.protocols.messages import SamplingParams


class Reference:
    """A whole model in this process."""

    def __init__(self, directory: Path, n_blocks: int, dtype: str) -> None:
        self._span = Span.load(directory, 0, n_blocks, dtype=getattr(torch, dtype))

    def generate(
        self,
        prompt: Sequence[int],
        n_tokens: int,
        sampling: SamplingParams,
        eos_token_ids: Sequence[int],
        before_token: Callable[[], None] = lambda: None,
    ) -> tuple[int, ...]:
        """Up to `n_tokens` tokens, the end of text included; `before_token` may raise to stop it."""
        cache, tokens, inputs = self._span.new_cache(), list(prompt), list(prompt)
        while len(tokens) < len(prompt) + n_tokens:
            before_token()
            hidden_TD = self._span.forward(torch.tensor(inputs), cache)
            logits_V = self._span.logits(hidden_TD[-1:])[0]
            inputs = [sample(logits_V, tokens, sampling, len(tokens))]
            tokens += inputs
            if inputs[0] in eos_token_ids:
                break
        return tuple(tokens[len(prompt) :])
