"""Model architectures: the tested ones, their few exceptions, and which part a tensor belongs to.

Everything else follows one generic way (see `span.py`). This module knows names only; it reads no file and no tensor.

Ring: pure.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

__all__ = [
    "ARCHITECTURES",
    "EMBED",
    "HEAD",
    "Architecture",
    "block_unit",
    "is_output",
    "refusal",
    "token_table",
    "unit_of",
]

EMBED = "embed"
HEAD = "head"


@dataclass(frozen=True, slots=True)
class Architecture:
    """How one architecture departs from the generic way.

    `first_only`: parts of the base model that act between the embedding and the first block; a later span, whose input
    has passed them already, gets a neutral stand-in ("zero" is added, "same" is applied, "one" is multiplied by).
    `own_mask`: attention reads its mask even for one token (position biases live in it), so it is always built.
    """

    first_only: Mapping[str, Literal["zero", "same", "one"]] | None = None
    own_mask: bool = False


_GENERIC = Architecture()

# Tested block by block against the unsplit model. One that is not here is tried on its structure (`structure.py`)
# and refused where that does not hold.
ARCHITECTURES: Mapping[str, Architecture] = {
    "llama": _GENERIC,
    "qwen2": _GENERIC,
    "qwen3": _GENERIC,
    "mistral": _GENERIC,
    "mixtral": _GENERIC,
    "qwen3_moe": _GENERIC,
    "gemma2": _GENERIC,
    "gemma3_text": _GENERIC,
    "olmo2": _GENERIC,
    "phi3": _GENERIC,
    "gpt_neox": _GENERIC,
    "starcoder2": _GENERIC,
    "cohere2": _GENERIC,
    "deepseek_v3": _GENERIC,
    "gemma": _GENERIC,
    "glm4": _GENERIC,
    "gpt_oss": _GENERIC,
    "gptj": _GENERIC,
    "granite": Architecture(first_only={"embedding_multiplier": "one"}),
    "olmo3": _GENERIC,
    "olmoe": _GENERIC,
    "phi": _GENERIC,
    "qwen2_moe": _GENERIC,
    "smollm3": _GENERIC,
    "stablelm": _GENERIC,
    "falcon": Architecture(own_mask=True),
    "gpt2": Architecture(first_only={"wpe": "zero"}),
    "bloom": Architecture(first_only={"word_embeddings_layernorm": "same"}, own_mask=True),
}

_BLOCK = re.compile(r"(?:^|\.)(?:layers|h|blocks)\.(\d{1,6})\.")
# Buffers that old checkpoints carry and nobody reads (causal masks, rotary frequencies).
_IGNORED = re.compile(r"(?:\.(?:attn|attention|self_attention)\.(?:masked_)?bias|rotary_emb\.inv_freq)$")
_TABLE = re.compile(r"(?:^|\.)(?:embed_tokens|wte|word_embeddings|embed_in)\.weight$")
_EMBED = re.compile(r"(?:^|\.)(?:embed_tokens|wte|wpe|word_embeddings|word_embeddings_layernorm|embed_in)\.\w+$")
_OUTPUT = re.compile(r"(?:^|\.)(?:lm_head|embed_out)\.\w+$")
_NORM = re.compile(r"(?:^|\.)(?:norm|ln_f|final_layer_norm|final_layernorm|final_norm)\.\w+$")

# From a cache's point of view these are plain keys and values by position; every other kind keeps something else.
_KV_LAYER_TYPES = frozenset({"full_attention", "sliding_attention"})


def block_unit(index: int) -> str:
    """The unit name of block `index`: "block.0", "block.1", ..."""
    return f"block.{index}"


def unit_of(tensor_name: str) -> str | None:
    """The unit ("embed", "block.i" or "head") a checkpoint tensor belongs to; "" if unused, None if unknown.

    >>> unit_of("model.layers.3.mlp.up_proj.weight"), unit_of("lm_head.weight"), unit_of("vision.patch.weight")
    ('block.3', 'head', None)
    """
    if _IGNORED.search(tensor_name):
        return ""
    if match := _BLOCK.search(tensor_name):
        return block_unit(int(match.group(1)))
    if _EMBED.search(tensor_name):
        return EMBED
    if _OUTPUT.search(tensor_name) or _NORM.search(tensor_name):
        return HEAD
    return None


def token_table(tensor_name: str) -> bool:
    """Whether the tensor is the token embedding itself, which a model with tied embeddings also uses as its head."""
    return _TABLE.search(tensor_name) is not None


def is_output(tensor_name: str) -> bool:
    """Whether the tensor belongs to the projection onto the vocabulary."""
    return _OUTPUT.search(tensor_name) is not None


def refusal(config: Mapping[str, Any]) -> str | None:
    """Why a model with this (normalised) configuration cannot be split at its blocks, or None if nothing forbids it."""
    name = config.get("model_type")
    if config.get("is_encoder_decoder"):
        return f"{name} is an encoder-decoder: every decoder block reads the encoder's output, which spans do not carry"
    if config.get("text_config") is not None:
        return f"{name} is a multimodal model: only text models are split"
    if config.get("quantization_config"):
        method = config["quantization_config"].get("quant_method", "unknown")
        return f"the weights are quantised ({method}): only float32, bfloat16 and float16 checkpoints are split"
    if not config.get("num_attention_heads"):
        return f"{name} has no attention heads: its blocks keep a recurrent state that cannot be rolled back"
    kinds = config.get("layer_types") or ()
    if other := sorted(set(kinds) - _KV_LAYER_TYPES):
        return f"{name} has blocks of kind {other[0]!r}, whose state is not keys and values by position"
    if config.get("attention_chunk_size"):
        return f"{name} attends in chunks, and its cache cannot be cut at a block"
    if config.get("num_kv_shared_layers") or "reuse" in (config.get("kv_sharing_modes") or ()):
        return f"{name} shares keys and values between blocks, so a block cannot leave the one it reads from"
    return None
