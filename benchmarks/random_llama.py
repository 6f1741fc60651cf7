"""The model that benchmarks of whole swarms run: a random Llama of 58M parameters, 8 blocks, float32."""

from __future__ import annotations

from pathlib import Path

N_BLOCKS = 8


def make_model(directory: Path, max_positions: int) -> None:
    """Weights, and a tokenizer that has nothing to do: benchmarks speak in token ids."""
    import torch
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=512,
        intermediate_size=1376,
        num_hidden_layers=N_BLOCKS,
        num_attention_heads=8,
        num_key_value_heads=4,
        vocab_size=32000,
        max_position_embeddings=max_positions,
        bos_token_id=1,
        eos_token_id=None,
        tie_word_embeddings=False,
    )
    LlamaForCausalLM(config).save_pretrained(directory)
    tokenizer = Tokenizer(WordLevel({"<unk>": 0}, unk_token="<unk>"))  # noqa: S106
    tokenizer.save(str(directory / "tokenizer.json"))
