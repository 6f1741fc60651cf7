"""Puts a span's tensors into an empty model: mapped from the files where they fit as they are, read where not.

Names and layouts of checkpoints differ from those of modules (experts are fused, prefixes come and go): transformers'
own loader does that conversion, here on the tensors of one unit at a time.

Ring: shell (reads files).
"""

from __future__ import annotations

import ctypes
import io
import mmap
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    convert_and_load_state_dict_in_model,
    rename_source_key,
)
from transformers.modeling_utils import LoadStateDictConfig
from transformers.utils import logging as transformers_logging

from mycel.node.weights_map import TensorEntry
from mycel.protocols.errors import ConfigError

__all__ = ["WeightFiles", "load_unit", "no_progress_bar", "release_free_memory"]


class WeightFiles:
    """The mapped files of one checkpoint; a mapping lives as long as a tensor over it does."""

    def __init__(self) -> None:
        self._mappings: dict[Path, mmap.mmap] = {}

    def mapped(self, entry: TensorEntry) -> Tensor:
        """The tensor over the file's own pages, private to this process. Falls back to reading if it is not aligned."""
        dtype: torch.dtype = getattr(torch, entry.dtype)
        if entry.size_bytes == 0 or entry.offset % dtype.itemsize:
            return self.read(entry)
        if entry.file not in self._mappings:
            with self._open(entry) as file:
                # Copy-on-write rather than read-only: torch warns about memory that it could not write to.
                self._mappings[entry.file] = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        count = entry.size_bytes // dtype.itemsize
        flat = torch.frombuffer(self._mappings[entry.file], dtype=dtype, count=count, offset=entry.offset)
        return flat.view(entry.shape)

    def read(self, entry: TensorEntry) -> Tensor:
        """The tensor in memory of its own, which goes when the tensor goes: for what is converted and then dropped."""
        dtype: torch.dtype = getattr(torch, entry.dtype)
        if not entry.size_bytes:
            return torch.empty(entry.shape, dtype=dtype)
        # Pages of its own rather than the heap's, which would keep the holes between what is dropped and what stays.
        pages = mmap.mmap(-1, entry.size_bytes)
        with self._open(entry) as file, memoryview(pages) as target:
            file.seek(entry.offset)
            done = 0
            # One call reads at most 2 GiB.
            while done < entry.size_bytes:
                count = file.readinto(target[done:])
                if not count:
                    raise ConfigError(f"{entry.file} is truncated: tensor {entry.name!r} reaches past the end")
                done += count
        return torch.frombuffer(pages, dtype=dtype).view(entry.shape)

    @contextmanager
    def _open(self, entry: TensorEntry) -> Iterator[io.FileIO]:
        try:
            with io.FileIO(entry.file) as file:
                yield file
        except OSError as error:
            raise ConfigError(f"cannot read {entry.file}: {error.strerror}") from None


class _Deferred:
    """A tensor that is read only when the loader asks for it, so that one conversion is in memory at a time."""

    def __init__(self, files: WeightFiles, entry: TensorEntry) -> None:
        self._files, self._entry = files, entry

    def __getitem__(self, _everything: object) -> Tensor:
        return self._files.read(self._entry)


def load_unit(model: PreTrainedModel, files: WeightFiles, entries: Sequence[TensorEntry], dtype: torch.dtype) -> None:
    """Assigns one unit's tensors to `model`, in `dtype`; the whole model's other tensors stay as they are.

    Raises ConfigError if a tensor has no place in the model or not the shape that the configuration says.
    """
    mapping = [
        item for item in get_model_conversion_mapping(model) if isinstance(item, WeightRenaming | WeightConverter)
    ]
    renamings = [item for item in mapping if isinstance(item, WeightRenaming)]
    converters = [item for item in mapping if isinstance(item, WeightConverter)]
    dtype_plan = model._get_dtype_plan(dtype)
    names = model.state_dict()
    sources: dict[str, Tensor | _Deferred] = {}
    for entry in entries:
        name, converted = rename_source_key(entry.name, renamings, converters, model.base_model_prefix, names)
        as_is = converted is None and name in names and names[name].dtype == getattr(torch, entry.dtype)
        sources[entry.name] = files.mapped(entry) if as_is else _Deferred(files, entry)
    with no_progress_bar():
        result, _ = convert_and_load_state_dict_in_model(
            model, sources, LoadStateDictConfig(dtype=dtype, dtype_plan=dtype_plan, weight_mapping=mapping)
        )
    if result.mismatched_keys:
        name, found, expected = min(result.mismatched_keys)
        raise ConfigError(f"tensor {name!r} has shape {tuple(found)}, but the configuration says {tuple(expected)}")
    if result.unexpected_keys:
        raise ConfigError(f"tensor {min(result.unexpected_keys)!r} has no place in {model.config.model_type}")
    if result.conversion_errors:
        raise ConfigError(
            f"tensor {min(result.conversion_errors)!r} could not be converted for {model.config.model_type}"
        )


def release_free_memory() -> None:
    """Gives back to the system what conversions have left free in the heap; without it glibc keeps most of it."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(ctypes.c_size_t(0))


@contextmanager
def no_progress_bar() -> Iterator[None]:
    """One bar for each block would be noise; the caller reports progress by the block."""
    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()
