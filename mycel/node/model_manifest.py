"""The manifest of a model directory: what is in it, hashed once and remembered.

Hashes are remembered by path, size, modification time and inode of the files that they were made of.

Ring: shell (reads files, writes the cache of hashes).
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import msgspec

from mycel.node.blobs import Blob, atomic_write, blob_of, disk_errors, file_blob, hash_blob, memory_blob
from mycel.node.model_info import TensorEntry, inspect_model
from mycel.protocols.errors import ConfigError, RemoteProtocolError
from mycel.swarm.manifest import (
    CHUNK_BYTES,
    HASH_BYTES,
    MAX_SMALL_FILE_BYTES,
    SMALL_FILES,
    VERSION,
    FileSpec,
    Manifest,
    TensorSpec,
    UnitSpec,
    check_unsigned,
    tensor_order,
    unit_names,
)

__all__ = ["Progress", "build_manifest"]

# called with bytes done and bytes in all
Progress = Callable[[int, int], None]

_EMPTY = hashlib.sha256(b"").digest()


def build_manifest(
    directory: Path, cache_dir: Path, *, source: str = "", on_progress: Progress | None = None
) -> tuple[Manifest, dict[bytes, Blob]]:
    """The manifest of a whole model directory, not signed yet, and where each of its blobs lies in it.

    `source` is the repository and revision that the directory is a copy of, "ORG/NAME@REVISION"; the model then has its
    name. Reads every byte once, at the speed of SHA-256; a second call takes the hashes from `cache_dir`. Raises
    ConfigError, one line, for what `inspect_model` refuses, for a file that changes meanwhile, and for a model over the
    limits.
    """
    info = inspect_model(directory)
    small = {name: _small_file(directory / name) for name in sorted(SMALL_FILES) if (directory / name).is_file()}
    specs = {unit: _tensor_specs(info.tensors[unit]) for unit in unit_names(info.n_blocks)}
    blobs = {unit: _unit_blob(info.tensors[unit], specs[unit]) for unit in specs}
    hashes = _hashes(directory, cache_dir, (small, blobs), on_progress)
    digests = {name: hashes[name] or _EMPTY for name in small}
    digests |= {unit: hashlib.sha256(hashes[unit]).digest() for unit in blobs}
    chunk_list = b"".join(hashes[unit] for unit in specs)
    manifest = Manifest(
        version=VERSION,
        name=_plain(source.partition("@")[0].rpartition("/")[2] or info.name),
        founder="",
        source=source,
        architecture=info.architecture,
        n_blocks=info.n_blocks,
        hidden_size=info.hidden_size,
        vocab_size=info.vocab_size,
        dtype=info.dtype,
        max_positions=info.max_positions,
        eos_token_ids=tuple(sorted(set(info.eos_token_ids))),
        files=tuple(FileSpec(name, blob.size_bytes, digests[name]) for name, blob in small.items()),
        chunks=hashlib.sha256(chunk_list).digest(),
        units=tuple(UnitSpec(unit, specs[unit], blobs[unit].size_bytes, digests[unit]) for unit in specs),
        signature=b"",
    )
    try:
        check_unsigned(manifest)
    except RemoteProtocolError as error:
        raise ConfigError(f"{directory} cannot be shared: {error}") from None
    index = {digests[name]: blob for name, blob in (*small.items(), *blobs.items())}
    return manifest, {**index, manifest.chunks: memory_blob(chunk_list)}


def _plain(name: str) -> str:
    """The directory's name in the letters that a manifest allows."""
    return re.sub(r"[^A-Za-z0-9._ +-]", "-", name).lstrip("._ +-")[:64] or "model"


def _small_file(path: Path) -> Blob:
    blob = file_blob(path)
    if blob.size_bytes > MAX_SMALL_FILE_BYTES:
        raise ConfigError(f"{path} is larger than {MAX_SMALL_FILE_BYTES // 2**20} MiB")
    return blob


def _tensor_specs(entries: Sequence[TensorEntry]) -> tuple[TensorSpec, ...]:
    return tensor_order(TensorSpec(entry.name, entry.dtype, tuple(entry.shape)) for entry in entries)


def _unit_blob(entries: Sequence[TensorEntry], specs: Sequence[TensorSpec]) -> Blob:
    by_name = {entry.name: entry for entry in entries}
    ordered = [by_name[spec.name] for spec in specs]
    return blob_of((entry.file, entry.offset, entry.size_bytes) for entry in ordered)


def _hashes(
    directory: Path,
    cache_dir: Path,
    blobs: tuple[Mapping[str, Blob], Mapping[str, Blob]],
    on_progress: Progress | None,
) -> dict[str, bytes]:
    """name -> the one hash of each small file, and those of each unit's chunks; cached where files are unchanged."""
    with disk_errors("read", directory):
        place = hashlib.sha256(os.fsencode(directory.resolve())).hexdigest()[:32]
    path = cache_dir / "digests" / f"{place}.msgpack"
    known = _read_cache(path)
    remembered: dict[str, bytes] = {}
    found: dict[str, bytes] = {}
    total = sum(blob.size_bytes for group in blobs for blob in group.values())
    done = 0
    for group, chunk_bytes in zip(blobs, (MAX_SMALL_FILE_BYTES, CHUNK_BYTES), strict=True):
        for name, blob in group.items():
            key = hashlib.sha256(repr((chunk_bytes, blob.ranges)).encode()).hexdigest()
            n_bytes = HASH_BYTES * -(-blob.size_bytes // chunk_bytes)
            kept = known.get(key)
            found[name] = kept if kept is not None and len(kept) == n_bytes else hash_blob(blob, chunk_bytes)
            remembered[key] = found[name]
            done += blob.size_bytes
            if on_progress is not None:
                on_progress(done, total)
    atomic_write(path, msgspec.msgpack.encode(remembered))
    return found


def _read_cache(path: Path) -> dict[str, bytes]:
    """What is remembered; nothing if it cannot be read, for a cache may always be lost."""
    try:
        return msgspec.msgpack.decode(path.read_bytes(), type=dict[str, bytes])
    except (OSError, ValueError, msgspec.MsgspecError):
        return {}
