"""A span of a model: blocks [start, end) with the embedding before the first and the norm and head after the last.

Built on the base model's own forward (see `structure.py` and docs/decisions/0003-model-spans.md): the same code as the
unsplit model's, over a shorter list of blocks. It knows nothing of sessions, peers or batches.

Legend: B sequences, T tokens of this step, D hidden, V vocabulary.

Ring: shell (`load` reads a model directory; the rest is torch alone).
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from mycel.node.architectures import ARCHITECTURES, EMBED
from mycel.node.fast_linear import use_fast_linear
from mycel.node.model_info import ModelInfo, inspect_model, load_config, span_tensors
from mycel.node.span_cache import SpanCache
from mycel.node.span_port import StatePiece
from mycel.node.span_state import SpanIntake, state_bytes, state_pieces
from mycel.node.structure import Passed, base_of, cut, empty_model, meta_tensors, part_of
from mycel.node.weights_load import WeightFiles, load_unit, release_free_memory
from mycel.protocols.errors import ConfigError

__all__ = ["Span", "SpanCache", "load_weights"]

# Known to transformers as nobody's mask: with it the base model builds none.
_NO_MASK = "mycel_no_mask"


class Span:
    """Blocks [start, end) of the model that `info` describes, ready to compute. Make one with `load`."""

    def __init__(self, info: ModelInfo, start: int, end: int, model: PreTrainedModel, whole: PreTrainedConfig) -> None:
        self.info = info
        self.start = start
        self.end = end
        self.is_first = start == 0
        self.is_last = end == info.n_blocks
        self.tensors: tuple[Tensor, ...] = (*model.parameters(), *model.buffers())
        self.nbytes = sum({tensor.data_ptr(): tensor.nbytes for tensor in self.tensors}.values())
        self._base = base_of(model)
        self._head: nn.Module | None = None
        if self.is_last:
            setattr(model, model.base_model_prefix, Passed())
            self._head = model
        self._windows = _windows(whole)[start:end]
        self._masked_config = self._base.config
        self._bare_config = copy.copy(self._base.config)
        if info.architecture in ARCHITECTURES and not ARCHITECTURES[info.architecture].own_mask:
            self._bare_config._attn_implementation_internal = _NO_MASK
        self._positions = torch.arange(256)

    @classmethod
    def load(cls, directory: Path, start: int, end: int, *, dtype: torch.dtype | None = None) -> Span:
        """Loads blocks [start, end) from a model directory; weights already in `dtype` stay mapped from their files.

        `dtype` is the one to compute in, by default the files' own. Raises ConfigError (one line) for what
        `inspect_model` refuses and for weights that do not fit the configuration, ValueError if [start, end) is not a
        span of the model.
        """
        info = inspect_model(directory)
        config = load_config(directory)
        model = load_weights(directory, info, config, (start, end), dtype or getattr(torch, info.dtype))
        cut(model, start, end)
        if missing := meta_tensors(model):
            raise ConfigError(f"{directory} is incomplete: its checkpoint has no tensor for {missing[0]!r}")
        use_fast_linear(model)
        release_free_memory()
        return cls(info, start, end, model, config)

    def part(self, start: int, end: int) -> Span:
        """Blocks [start, end) of this span as a span of its own, over the same weights. Else ValueError."""
        if not self.start <= start < end <= self.end:
            raise ValueError(f"blocks [{start}, {end}) are not within [{self.start}, {self.end})")
        if (start, end) == (self.start, self.end):
            return self
        part = copy.copy(self)
        first, last = start - self.start, end - self.start
        base = copy.copy(self._base)
        base.config = self._masked_config
        part.start, part.end = start, end
        part.is_first, part.is_last = start == 0, end == self.info.n_blocks
        part._base = part_of(base, first, last, keep_norm=part.is_last or not self.is_last)
        part._head = self._head if part.is_last else None
        part._windows = self._windows[first:last]
        part._masked_config = part._base.config
        part._bare_config = copy.copy(part._masked_config)
        part._bare_config._attn_implementation_internal = self._bare_config._attn_implementation_internal
        return part

    def new_cache(self) -> SpanCache:
        """An empty cache for one session."""
        return SpanCache(self.start, self._windows)

    @torch.inference_mode()
    def forward(self, inputs: Tensor, cache: SpanCache) -> Tensor:
        """One step: the hidden states of `inputs` at positions cache.length, cache.length + 1, ...; the cache grows.

        `inputs` are token ids [T] (int64) on the first span, hidden_TD of the span before on any other. Returns
        hidden_TD; the last span's has the model's final norm applied. Raises ValueError for a wrong shape; whatever is
        raised, the cache is as it was.
        """
        self._check(inputs)
        past, n_tokens = cache.length, inputs.shape[0]
        if past + n_tokens > self._positions.shape[0]:
            self._positions = torch.arange(2 * (past + n_tokens))
        # The newest token sees everything that the cache returns, so only steps of several tokens need a mask.
        self._base.config = self._bare_config if n_tokens == 1 else self._masked_config
        key = "input_ids" if self.is_first else "inputs_embeds"
        try:
            output = self._base(
                **{key: inputs.unsqueeze(0)},
                position_ids=self._positions[past : past + n_tokens].unsqueeze(0),
                past_key_values=cache,
                use_cache=True,
            )
        except BaseException:
            cache.restore(past)
            raise
        hidden_TD: Tensor = output[0].squeeze(0)
        return hidden_TD

    @torch.inference_mode()
    def logits(self, hidden_TD: Tensor) -> Tensor:
        """logits_TV of what the last span's `forward` returned, through the model's own head (with its soft caps).

        The final norm is part of `forward`. Pass only the rows that are needed. Raises ValueError on another span.
        """
        if self._head is None:
            raise ValueError(f"blocks [{self.start}, {self.end}) have no head: it is with the last block")
        logits_TV: Tensor = self._head(inputs_embeds=hidden_TD.unsqueeze(0), use_cache=False)[0].squeeze(0)
        return logits_TV

    def hidden(self, inputs: Tensor) -> Tensor:
        """hidden_BTD of whole sequences, from their first position and without a cache; what training computes.

        `inputs` are token ids [B, T] on the first span, hidden_BTD on any other. Gradients are recorded if the caller
        records them. As in `forward`, the last span's result has the final norm applied.
        """
        self._base.config = self._masked_config
        key = "input_ids" if self.is_first else "inputs_embeds"
        positions_1T = torch.arange(inputs.shape[1]).unsqueeze(0)
        output_BTD: Tensor = self._base(**{key: inputs}, position_ids=positions_1T, use_cache=False)[0]
        return output_BTD

    def head(self, hidden_BTD: Tensor) -> Tensor:
        """logits_BTV as `logits` gives them, with gradients if the caller records them. Last span only."""
        assert self._head is not None, "the head is with the last block"
        logits_BTV: Tensor = self._head(inputs_embeds=hidden_BTD, use_cache=False)[0]
        return logits_BTV

    def state_bytes(self, cache: SpanCache, count: int) -> int:
        """The size of what `state_pieces` gives."""
        return state_bytes(cache, count)

    def state_pieces(self, cache: SpanCache, count: int) -> Iterator[StatePiece]:
        """What another node needs to go on after `count` tokens (`mycel.node.span_state`)."""
        return state_pieces(cache, count)

    def state_intake(self, count: int, usable: int) -> SpanIntake:
        """Takes a cache of `count` tokens over. Computes a token first, which shows what a cache looks like."""
        like = self.new_cache()
        token = torch.zeros(1, dtype=torch.int64)
        self.forward(token if self.is_first else torch.zeros(1, self.info.hidden_size, dtype=self.dtype), like)
        return SpanIntake(self.new_cache(), like, count, usable)

    @property
    def dtype(self) -> torch.dtype:
        """The one computed in."""
        return next(tensor.dtype for tensor in self.tensors if tensor.is_floating_point())

    def _check(self, inputs: Tensor) -> None:
        if self.is_first:
            if inputs.dim() != 1 or inputs.shape[0] == 0 or inputs.dtype != torch.int64:
                raise ValueError(f"the first span takes token ids [T] of int64, not {_describe(inputs)}")
        elif inputs.dim() != 2 or inputs.shape[0] == 0 or inputs.shape[1] != self.info.hidden_size:
            raise ValueError(f"this span takes hidden states [T, {self.info.hidden_size}], not {_describe(inputs)}")


def load_weights(
    directory: Path, info: ModelInfo, config: PreTrainedConfig, span: tuple[int, int], dtype: torch.dtype
) -> PreTrainedModel:
    """The whole model with the weights of one span in it, not cut yet: names are those of the unsplit model.

    Everything else is on the meta device. Raises as `Span.load` does.
    """
    units = span_tensors(info, *span)
    model = empty_model(config, dtype)
    files = WeightFiles()
    for entries in units.values():
        load_unit(model, files, entries, dtype)
    if info.tied_embeddings and EMBED in units and span[1] == info.n_blocks:
        model.get_output_embeddings().weight = model.get_input_embeddings().weight
    return model


def _describe(tensor: Tensor) -> str:
    return f"{list(tensor.shape)} of {str(tensor.dtype).removeprefix('torch.')}"


def _windows(config: PreTrainedConfig) -> tuple[int | None, ...]:
    """The sliding window of each block, None where it sees everything; by transformers' own rule."""
    window: int | None = getattr(config, "sliding_window", None)
    n_blocks: int = config.num_hidden_layers
    kinds = getattr(config, "layer_types", None)
    if kinds is None:
        return (window,) * n_blocks
    return tuple(window if kind == "sliding_attention" else None for kind in kinds)
