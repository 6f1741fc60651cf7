"""Tiny random models of every tested architecture, written as Hugging Face directories.

`make_tiny_model("llama", directory)` saves config.json and safetensors; `make_tiny_tokenizer(directory)` adds a
byte-level tokenizer. Weights are large enough for blocks to matter: a model whose blocks hardly change the hidden state
would hide a wrong cut.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

VOCAB = 260
HIDDEN = 32

_COMMON: Mapping[str, Any] = {"bos_token_id": 256, "eos_token_id": 257, "pad_token_id": 258, "vocab_size": VOCAB}
_LLAMA: Mapping[str, Any] = {
    "hidden_size": HIDDEN,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "tie_word_embeddings": False,
}
_MOE: Mapping[str, Any] = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
_FALCON: Mapping[str, Any] = {"hidden_size": HIDDEN, "num_attention_heads": 4, "max_position_embeddings": 256}

_WINDOW: Mapping[str, Any] = {"sliding_window": 6}
_GEMMA: Mapping[str, Any] = {"head_dim": 16, "query_pre_attn_scalar": 16, "tie_word_embeddings": True}
_ROUTED: Mapping[str, Any] = {"num_local_experts": 4, "num_experts_per_tok": 2}
_LATENT: Mapping[str, Any] = {
    "num_key_value_heads": 4,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
    "n_routed_experts": 4,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
}
_GPT: Mapping[str, Any] = {"n_embd": HIDDEN, "n_head": 4, "n_positions": 256}
_MIXED: Mapping[str, Any] = {**_WINDOW, "layer_types": ["sliding_attention", "full_attention"]}

# name -> (model_type, its fields)
_VARIANTS: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "llama": ("llama", _LLAMA),
    "llama-tied": ("llama", {**_LLAMA, "tie_word_embeddings": True}),
    "qwen2": ("qwen2", _LLAMA),
    "qwen2-window": ("qwen2", {**_LLAMA, **_WINDOW, "use_sliding_window": True, "max_window_layers": 2}),
    "qwen3": ("qwen3", {**_LLAMA, "head_dim": 16, "tie_word_embeddings": True}),
    "mistral": ("mistral", {**_LLAMA, **_WINDOW}),
    "mixtral": ("mixtral", {**_LLAMA, **_ROUTED}),
    "qwen3_moe": ("qwen3_moe", {**_LLAMA, **_MOE, "head_dim": 16, "decoder_sparse_step": 2}),
    "gemma2": ("gemma2", {**_LLAMA, **_GEMMA, **_WINDOW}),
    "gemma3": ("gemma3_text", {**_LLAMA, **_GEMMA, **_MIXED}),
    "olmo2": ("olmo2", _LLAMA),
    "phi3": ("phi3", {**_LLAMA, **_WINDOW}),
    "falcon": ("falcon", {**_FALCON, "multi_query": True, "alibi": False}),
    "falcon-new": ("falcon", {**_FALCON, "new_decoder_architecture": True, "num_kv_heads": 2, "alibi": False}),
    "falcon-alibi": ("falcon", {**_FALCON, "multi_query": False, "alibi": True, "bias": True}),
    "gpt_neox": ("gpt_neox", {**_FALCON, "intermediate_size": 64}),
    "gpt2": ("gpt2", _GPT),
    "gpt2-depth": ("gpt2", {**_GPT, "scale_attn_by_inverse_layer_idx": True}),
    "bloom": ("bloom", {"hidden_size": HIDDEN, "n_head": 4}),
    "starcoder2": ("starcoder2", {**_LLAMA, **_WINDOW}),
}
# Also in the table of tested architectures; their tests are not in the fast part.
_MORE_VARIANTS: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "cohere2": ("cohere2", {**_LLAMA, **_MIXED, "tie_word_embeddings": True, "logit_scale": 1.0}),
    "deepseek_v3": ("deepseek_v3", {**_LLAMA, **_LATENT}),
    "gemma": ("gemma", {**_LLAMA, "head_dim": 16, "tie_word_embeddings": True}),
    "glm4": ("glm4", {**_LLAMA, "head_dim": 8}),
    "gpt_oss": ("gpt_oss", {**_LLAMA, **_ROUTED, **_MIXED, "head_dim": 8}),
    "gptj": ("gptj", {**_GPT, "rotary_dim": 4}),
    "granite": ("granite", {**_LLAMA, "logits_scaling": 1.5, "residual_multiplier": 0.8, "embedding_multiplier": 3.0}),
    "olmo3": ("olmo3", {**_LLAMA, **_MIXED}),
    "olmoe": ("olmoe", {**_LLAMA, "num_experts": 4, "num_experts_per_tok": 2}),
    "phi": ("phi", _LLAMA),
    "qwen2_moe": ("qwen2_moe", {**_LLAMA, **_MOE, "shared_expert_intermediate_size": 24}),
    "smollm3": ("smollm3", _LLAMA),
    "stablelm": ("stablelm", _LLAMA),
}
TINY_ARCHITECTURES: tuple[str, ...] = tuple(_VARIANTS)
MORE_TINY_ARCHITECTURES: tuple[str, ...] = tuple(_MORE_VARIANTS)


def make_tiny_model(
    architecture: str,
    directory: Path,
    n_blocks: int = 4,
    seed: int = 0,
    *,
    max_shard_size: str = "1GB",
    dtype: str = "float32",
    **overrides: Any,
) -> Path:
    """Writes a random model of `architecture` (see TINY_ARCHITECTURES) into `directory` and returns it."""
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    model_type, fields = ({**_VARIANTS, **_MORE_VARIANTS})[architecture]
    blocks_field = "n_layer" if "n_head" in fields else "num_hidden_layers"
    values = {**_COMMON, **fields, blocks_field: n_blocks, **overrides}
    if "layer_types" in values:
        values["layer_types"] = [values["layer_types"][i % len(values["layer_types"])] for i in range(n_blocks)]
    config = CONFIG_MAPPING[model_type](**values)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config).eval()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                _randomise(name, parameter)
    directory.mkdir(parents=True, exist_ok=True)
    model.to(getattr(torch, dtype)).save_pretrained(directory, max_shard_size=max_shard_size)
    return directory


def _randomise(name: str, parameter: Any) -> None:
    """Norms, biases and tables get noise, since their initial ones and zeros would hide a missing one."""
    if parameter.dim() < 2:
        parameter.add_(parameter.new_empty(parameter.shape).normal_(std=0.2))
    elif any(part in name for part in ("embed", "wte", "wpe")):
        parameter.normal_(std=1.0)
    else:
        parameter.normal_(std=1.5 * parameter.shape[-1] ** -0.5)


def make_tiny_tokenizer(directory: Path) -> Path:
    """Writes a byte-level tokenizer: ids 0 to 255 are bytes, then <s> 256, </s> 257, <pad> 258. Returns `directory`."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={symbol: i for i, symbol in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<s>", "</s>", "<pad>"])
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(directory / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "pad_token": "<pad>",
        "clean_up_tokenization_spaces": False,
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    return directory
