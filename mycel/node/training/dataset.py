"""The samples of a run: windows of its token file, in the run's order, and those held out.

A window is T + 1 tokens, and the last of one is the first of the next, so that every token is a target once an epoch.

Legend: B sequences, T target tokens of each.

Ring: shell (maps a file).
"""

from __future__ import annotations

import mmap
import sys
from pathlib import Path

import msgspec
import torch
from torch import Tensor

from mycel.node.blobs import disk_errors
from mycel.node.model_info import load_config
from mycel.node.text import TextCodec
from mycel.node.training.sources import find_sources
from mycel.node.training.token_file import Progress, TokenFile, framing, make_token_file
from mycel.protocols.errors import ConfigError
from mycel.swarm.training.order import SampleOrder
from mycel.swarm.training.recipe import Recipe

__all__ = ["TokenDataset", "open_dataset", "with_files"]


class TokenDataset:
    """`Samples` (stage_port.py) over a mapped file of tokens; any thread may read."""

    def __init__(self, file: TokenFile, sequence: int, seed: int, held_out: float = 0.0) -> None:
        """`held_out` is the fraction of windows that are no samples, at least one if it is not 0.

        Raises ConfigError if the text is too short.
        """
        n_windows = max(0, file.n_tokens - 1) // sequence
        n_held_out = max(1, round(n_windows * held_out)) if held_out else 0
        if n_windows - n_held_out < 1:
            kept = " beside those held out" if held_out else ""
            raise ConfigError(
                f"the text has {file.n_tokens} tokens, too few for one sample of {sequence + 1}{kept}: "
                "add text, or lower data.sequence"
            )
        self.n_tokens = file.n_tokens
        self.sequence = sequence
        self.order = SampleOrder(n_windows, n_held_out, seed)
        self._fingerprint = file.fingerprint
        self._tokens = _mapped(file)

    @property
    def n_held_out(self) -> int:
        """Windows that `held_out` reads."""
        return self.order.n_held_out

    def fingerprint(self) -> str:
        """SHA-256 of all tokens, in hex: equal on every machine with the same text and tokenizer."""
        return self._fingerprint

    def tokens(self, first: int, count: int) -> Tensor:
        """Token ids of samples [first, first + count): int64 [B, T + 1]. The order has no end."""
        return self._windows([self.order.window(sample) for sample in range(first, first + count)])

    def held_out(self, first: int, count: int) -> Tensor:
        """Token ids of held-out windows [first, first + count): int64 [B, T + 1]. Raises IndexError past the last."""
        return self._windows([self.order.held_out(index) for index in range(first, first + count)])

    def _windows(self, windows: list[int]) -> Tensor:
        length = self.sequence + 1
        tokens_BT1 = torch.empty((len(windows), length), dtype=torch.int64)
        for row, window in zip(tokens_BT1, windows, strict=True):
            start = window * self.sequence
            row.copy_(self._tokens[start : start + length])
        return tokens_BT1


def _mapped(file: TokenFile) -> Tensor:
    """All tokens, over the file's own pages. The file has its name only because it was whole."""
    with disk_errors("read", file.path), file.path.open("rb") as opened:
        # Copy-on-write rather than read-only: torch warns about memory that it could not write to.
        pages = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_COPY)
    dtype = torch.uint16 if file.width_bytes == 2 else torch.uint32
    if sys.byteorder == "big":
        raise ConfigError("training reads tokens on little-endian machines only")
    return torch.frombuffer(pages, dtype=dtype)


def open_dataset(
    recipe: Recipe, model: Path, base: Path, cache_dir: Path, on_progress: Progress | None = None
) -> TokenDataset:
    """The samples that a recipe names, tokenised with the tokenizer of directory `model`, at the first time. Blocks.

    `base` is what its files are relative to. Raises ConfigError if there is no such text, if the tokenizer does not fit
    the model, and if the recipe's fingerprint is of other tokens.
    """
    vocab_size = int(load_config(model).vocab_size)
    codec = TextCodec.load(model, vocab_size)
    sources = find_sources(recipe.data, base)
    if not sources:
        raise ConfigError("data.files: must name the text to train on")
    file = make_token_file(sources, codec, framing(codec, model), vocab_size, cache_dir, on_progress)
    if recipe.data.fingerprint not in ("", file.fingerprint):
        raise ConfigError(
            f"this is not the text of run {recipe.name}: its fingerprint is {file.fingerprint[:16]}..., "
            f"the run's is {recipe.data.fingerprint[:16]}..."
        )
    return TokenDataset(file, recipe.data.sequence, recipe.seed, recipe.data.held_out)


def with_files(recipe: Recipe, files: tuple[str, ...]) -> Recipe:
    """A run's recipe, which names no place, with where its text lies on this machine."""
    return msgspec.structs.replace(recipe, data=msgspec.structs.replace(recipe.data, files=files))
