"""What a model directory holds and what each part of it weighs, from its JSON files and safetensors headers alone.

Ring: shell (reads files). It reads no weights.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mycel.node.architectures import ARCHITECTURES, EMBED, HEAD, block_unit, is_output, refusal, token_table, unit_of
from mycel.node.stored_weights import is_stored, stored_entries
from mycel.node.weights_map import TensorEntry, read_json, read_tensor_entries
from mycel.protocols.errors import ConfigError
from mycel.protocols.messages import MAX_BLOCKS

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

__all__ = ["ModelInfo", "TensorEntry", "inspect_model", "load_config", "span_bytes", "span_tensors"]

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
# A model with position biases has no table that ends; this only has to be larger than any session.
_NO_POSITION_LIMIT = 2**20


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """A model as its directory describes it. Sizes are bytes in the files' own dtype."""

    name: str
    architecture: str
    n_blocks: int
    hidden_size: int
    vocab_size: int
    max_positions: int
    dtype: str
    tied_embeddings: bool
    embed_bytes: int
    block_bytes: tuple[int, ...]
    head_bytes: int
    # Keys and values of one token, for each block, at `dtype`. Blocks with a sliding window stop growing at it.
    kv_bytes_per_token: tuple[int, ...]
    eos_token_ids: tuple[int, ...]
    # unit ("embed", "block.0", ..., "head") -> its tensors
    tensors: Mapping[str, tuple[TensorEntry, ...]]


def inspect_model(directory: Path) -> ModelInfo:
    """Reads what there is to know about the model in `directory`, without its weights.

    Raises ConfigError, one line, if the directory or a file is missing, damaged or truncated, or if the architecture is
    unknown or cannot be split at its blocks (the line says why).
    """
    config = load_config(directory)
    entries = stored_entries(directory) if is_stored(directory) else read_tensor_entries(directory)
    n_blocks = int(config.num_hidden_layers)
    units = _units(directory, entries, n_blocks)
    has_output = any(is_output(entry.name) for entry in units[HEAD])
    tied = bool(config.tie_word_embeddings) and not has_output
    if not tied and not has_output:
        raise ConfigError(f"{directory} has no output projection (lm_head), and its embeddings are not tied")
    dtype = _dominant_dtype(directory, entries)
    if config.model_type not in ARCHITECTURES:
        # Only a model outside the table pays for building its (empty) modules here.
        from mycel.node.structure import check_structure

        check_structure(config)
    return ModelInfo(
        name=directory.resolve().name,
        architecture=config.model_type,
        n_blocks=n_blocks,
        hidden_size=int(config.hidden_size),
        vocab_size=int(config.vocab_size),
        max_positions=_max_positions(config),
        dtype=dtype,
        tied_embeddings=tied,
        embed_bytes=_size(units[EMBED]),
        block_bytes=tuple(_size(units[block_unit(i)]) for i in range(n_blocks)),
        head_bytes=_size(units[HEAD]),
        kv_bytes_per_token=(_kv_values_per_token(config) * DTYPE_BYTES[dtype],) * n_blocks,
        eos_token_ids=_eos_token_ids(directory, config),
        tensors=units,
    )


def span_tensors(info: ModelInfo, start: int, end: int) -> dict[str, tuple[TensorEntry, ...]]:
    """unit -> tensors that the span [start, end) holds. With tied embeddings the last span holds the token table too.

    Raises ValueError if [start, end) is not a span of the model.
    """
    if not 0 <= start < end <= info.n_blocks:
        raise ValueError(f"[{start}, {end}) is not a span of {info.n_blocks} blocks")
    needed = {block_unit(i): info.tensors[block_unit(i)] for i in range(start, end)}
    if start == 0:
        needed[EMBED] = info.tensors[EMBED]
    if end == info.n_blocks:
        needed[HEAD] = info.tensors[HEAD]
        if info.tied_embeddings and start > 0:
            needed[EMBED] = tuple(entry for entry in info.tensors[EMBED] if token_table(entry.name))
    return needed


def span_bytes(info: ModelInfo, start: int, end: int) -> int:
    """Bytes of weights that a node must hold for blocks [start, end), at the files' dtype."""
    return sum(_size(entries) for entries in span_tensors(info, start, end).values())


def load_config(directory: Path) -> PreTrainedConfig:
    """The model's configuration with its defaults filled in. Raises ConfigError, one line."""
    if not directory.is_dir():
        raise ConfigError(f"there is no model directory {directory}")
    if not (directory / "config.json").is_file():
        raise ConfigError(f"{directory} is not a model directory: it has no config.json")
    raw = read_json(directory / "config.json")
    model_type = raw.get("model_type")
    if not isinstance(model_type, str):
        raise ConfigError(f"{directory / 'config.json'} names no model_type")

    from huggingface_hub.errors import StrictDataclassError
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING, CONFIG_MAPPING_NAMES
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    if model_type not in CONFIG_MAPPING_NAMES:
        raise ConfigError(f"{directory} cannot be split: architecture {model_type!r} is not known to transformers")
    # Before building it, so that a reason is given rather than a detail of some other kind of model.
    if reason := refusal({"num_attention_heads": 1, **raw}):
        raise ConfigError(f"{directory} cannot be split: {reason}")
    if model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        raise ConfigError(f"{directory} cannot be split: {model_type} is not a causal language model")
    try:
        config = CONFIG_MAPPING[model_type].from_dict(raw)
        normalised = config.to_dict() | {"num_attention_heads": getattr(config, "num_attention_heads", None)}
        blocks = config.num_hidden_layers
    except (StrictDataclassError, ValueError, TypeError, AttributeError, KeyError, ZeroDivisionError) as error:
        raise ConfigError(f"{directory / 'config.json'} is not valid for {model_type}: {_one_line(error)}") from None
    if reason := refusal(normalised):
        raise ConfigError(f"{directory} cannot be split: {reason}")
    if not isinstance(blocks, int) or not 1 <= blocks <= MAX_BLOCKS:
        raise ConfigError(f"{directory / 'config.json'} is not valid for {model_type}: {blocks!r} blocks")
    return config


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]


def _units(directory: Path, entries: Mapping[str, TensorEntry], n_blocks: int) -> dict[str, tuple[TensorEntry, ...]]:
    """Every tensor under its unit. Raises ConfigError for a tensor of no unit and for a unit without tensors."""
    names = [EMBED, *(block_unit(i) for i in range(n_blocks)), HEAD]
    units: dict[str, list[TensorEntry]] = {name: [] for name in names}
    for entry in entries.values():
        unit = unit_of(entry.name)
        if unit is None:
            raise ConfigError(f"{directory} cannot be split: tensor {entry.name!r} belongs to no part that is known")
        # Blocks past the last belong to heads that predict further tokens; the model does not use them.
        if unit in units:
            units[unit].append(entry)
    for name, found in units.items():
        if not found:
            raise ConfigError(f"{directory} is incomplete: its checkpoint has no tensor of {name}")
    if not any(token_table(entry.name) for entry in units[EMBED]):
        raise ConfigError(f"{directory} is incomplete: its checkpoint has no token embedding")
    return {name: tuple(found) for name, found in units.items()}


def _size(entries: tuple[TensorEntry, ...]) -> int:
    return sum(entry.size_bytes for entry in entries)


def _dominant_dtype(directory: Path, entries: Mapping[str, TensorEntry]) -> str:
    """The dtype of most of the bytes: what can be computed with while the files stay mapped."""
    sizes: Counter[str] = Counter()
    for entry in entries.values():
        sizes[entry.dtype] += entry.size_bytes
    dtype = sizes.most_common(1)[0][0]
    if dtype not in DTYPE_BYTES:
        raise ConfigError(f"{directory} cannot be split: its weights are {dtype}, not float32, bfloat16 or float16")
    return dtype


def _max_positions(config: PreTrainedConfig) -> int:
    for field in ("max_position_embeddings", "seq_length"):
        value = getattr(config, field, None)
        if isinstance(value, int) and value > 0:
            return value
    return _NO_POSITION_LIMIT


def _kv_values_per_token(config: PreTrainedConfig) -> int:
    """Numbers that one block's cache keeps for a token: keys and values of every key-value head."""
    heads = int(config.num_attention_heads)
    if getattr(config, "kv_lora_rank", None):
        # Latent attention keeps one compressed vector and one rotated key for all heads.
        return int(config.kv_lora_rank + config.qk_rope_head_dim)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    if config.model_type == "falcon":
        # One shared head, or as many as queries: the new decoder repeats its grouped ones before they are cached.
        kv_heads = 1 if config.multi_query and not config.new_decoder_architecture else heads
    return 2 * int(kv_heads) * int(head_dim)


def _eos_token_ids(directory: Path, config: PreTrainedConfig) -> tuple[int, ...]:
    """Every id that ends a text: of config.json and of generation_config.json, which chat models extend."""
    sources: list[Any] = [getattr(config, "eos_token_id", None)]
    if (directory / "generation_config.json").is_file():
        sources.append(read_json(directory / "generation_config.json").get("eos_token_id"))
    ids: set[int] = set()
    for source in sources:
        ids.update(item for item in (source if isinstance(source, list) else [source]) if isinstance(item, int))
    return tuple(sorted(ids))
