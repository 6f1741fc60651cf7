"""Where each tensor of a model directory lies: safetensors headers and the index of sharded checkpoints.

Headers only: no weight is read here. Sizes are capped before anything is parsed, because safetensors takes seconds for
a header of some hundred thousand tensors.

Ring: shell (reads files).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import msgspec

from mycel.protocols.errors import ConfigError

__all__ = ["TensorEntry", "read_json", "read_tensor_entries"]

MAX_HEADER_BYTES = 64 * 2**20
MAX_TENSORS = 200_000
MAX_JSON_BYTES = 64 * 2**20

# safetensors' name -> (our name, bytes an element)
_DTYPES = {
    "F64": ("float64", 8),
    "F32": ("float32", 4),
    "F16": ("float16", 2),
    "BF16": ("bfloat16", 2),
    "I64": ("int64", 8),
    "I32": ("int32", 4),
    "I16": ("int16", 2),
    "I8": ("int8", 1),
    "U8": ("uint8", 1),
    "BOOL": ("bool", 1),
}

Size = Annotated[int, msgspec.Meta(ge=0, le=2**62)]


class _Raw(msgspec.Struct):
    dtype: str
    shape: Annotated[tuple[Size, ...], msgspec.Meta(max_length=8)]
    data_offsets: tuple[Size, Size]


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """One tensor of a checkpoint: `size_bytes` bytes at `offset` of `file`."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    offset: int
    size_bytes: int


def read_json(path: Path) -> dict[str, object]:
    """The JSON object in `path`. Raises ConfigError if it is missing, too large or not an object."""
    try:
        if path.stat().st_size > MAX_JSON_BYTES:
            raise ConfigError(f"{path} is larger than {MAX_JSON_BYTES // 2**20} MiB")
        value = msgspec.json.decode(path.read_bytes())
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        raise ConfigError(f"{path} is damaged: not valid JSON") from None
    if not isinstance(value, dict):
        raise ConfigError(f"{path} is damaged: not a JSON object")
    return value


def _read_header(path: Path) -> Mapping[str, TensorEntry]:
    """The tensors of one safetensors file, each checked to lie inside it and to have the size its shape says."""
    try:
        total = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if total < 8 or length > total - 8:
                raise ConfigError(f"{path} is damaged: truncated, or not a safetensors file")
            if length > MAX_HEADER_BYTES:
                raise ConfigError(f"{path}: its header of {length} bytes is over the limit of {MAX_HEADER_BYTES}")
            raw = file.read(length)
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from None
    try:
        fields = msgspec.json.decode(raw, type=dict[str, msgspec.Raw])
        fields.pop("__metadata__", None)
        if len(fields) > MAX_TENSORS:
            raise ConfigError(f"{path} has {len(fields)} tensors, over the limit of {MAX_TENSORS}")
        tensors = {name: msgspec.json.decode(value, type=_Raw) for name, value in fields.items()}
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        raise ConfigError(f"{path} is damaged: its header is not one of a safetensors file") from None
    return {name: _entry(path, name, tensor, 8 + length, total) for name, tensor in tensors.items()}


def _entry(path: Path, name: str, tensor: _Raw, data_start: int, file_bytes: int) -> TensorEntry:
    if tensor.dtype not in _DTYPES:
        raise ConfigError(f"{path}: tensor {name!r} has dtype {tensor.dtype}, which is not supported")
    dtype, item_bytes = _DTYPES[tensor.dtype]
    begin, end = tensor.data_offsets
    if data_start + end > file_bytes:
        raise ConfigError(f"{path} is truncated: tensor {name!r} reaches past the end of the file")
    if end - begin != math.prod(tensor.shape) * item_bytes:
        raise ConfigError(f"{path} is damaged: tensor {name!r} does not have the size that its shape says")
    return TensorEntry(name, dtype, tensor.shape, path, data_start + begin, end - begin)


def _shards(directory: Path) -> dict[str, str] | None:
    """tensor name -> file name of a sharded checkpoint, or None if it is one file."""
    index_path = directory / "model.safetensors.index.json"
    if (directory / "model.safetensors").is_file() or not index_path.is_file():
        return None
    weight_map = read_json(index_path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ConfigError(f"{index_path} is damaged: it has no weight_map")
    for name, file in weight_map.items():
        # A file name only: the index must not lead out of the model's directory.
        if not isinstance(file, str) or Path(file).name != file or not file.endswith(".safetensors"):
            raise ConfigError(f"{index_path} is damaged: tensor {name!r} is in no safetensors file beside it")
        if not (directory / file).is_file():
            raise ConfigError(f"{index_path} names {file}, which is not there")
    return weight_map


def read_tensor_entries(directory: Path) -> dict[str, TensorEntry]:
    """Every tensor of the checkpoint in `directory` by name.

    Raises ConfigError (one line) if there is no safetensors checkpoint, a file is damaged or truncated, or the index
    names files or tensors that are not there.
    """
    shards = _shards(directory)
    if shards is None:
        path = directory / "model.safetensors"
        if not path.is_file():
            raise ConfigError(f"{directory} holds no model.safetensors and no model.safetensors.index.json")
        return dict(_read_header(path))
    headers = {file: _read_header(directory / file) for file in sorted(set(shards.values()))}
    for name, file in shards.items():
        if name not in headers[file]:
            raise ConfigError(f"{directory / file} lacks tensor {name!r}, which the index says it holds")
    return {name: headers[file][name] for name, file in shards.items()}
