"""Content by its SHA-256: hashing the parts of a model directory once, and reading any piece of them later.

A blob is a sequence of file ranges, so a unit whose tensors lie scattered over the owner's safetensors files is served
from where it lies, without a copy. Digests are remembered by path, size, modification time and inode.

Ring: shell (reads files, writes the digest cache).
"""

from __future__ import annotations

import bisect
import contextlib
import errno
import hashlib
import os
import re
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

import msgspec

from mycel.node.model_info import ModelInfo, TensorEntry, inspect_model
from mycel.protocols.errors import ConfigError, RemoteProtocolError
from mycel.swarm.manifest import (
    MAX_SMALL_FILE_BYTES,
    SMALL_FILES,
    VERSION,
    FileSpec,
    Manifest,
    TensorSpec,
    UnitSpec,
    decode_manifest,
    manifest_bytes,
    tensor_order,
    unit_names,
)

__all__ = [
    "Blob",
    "BlobIndex",
    "FileRange",
    "atomic_write",
    "build_manifest",
    "disk_errors",
    "read_blob",
    "stored_blob",
]

_BUFFER_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class _Stamp:
    """What tells that a file is still the one that was hashed."""

    size_bytes: int
    mtime_ns: int
    inode: int

    @classmethod
    def of(cls, status: os.stat_result) -> _Stamp:
        return cls(status.st_size, status.st_mtime_ns, status.st_ino)


@dataclass(frozen=True, slots=True)
class FileRange:
    """Bytes [offset, offset + size_bytes) of a file, which must still be as `stamp` says; None: whatever it is."""

    path: Path
    offset: int
    size_bytes: int
    stamp: _Stamp | None


@dataclass(frozen=True, slots=True)
class Blob:
    """File ranges in order; range i starts at byte `starts[i]` of the blob."""

    size_bytes: int
    ranges: tuple[FileRange, ...]
    starts: tuple[int, ...]


# SHA-256 -> where the bytes lie
BlobIndex = Mapping[bytes, Blob]
# called with bytes done and bytes in all
Progress = Callable[[int, int], None]


def blob_of(ranges: Iterable[tuple[Path, int, int]]) -> Blob:
    """A blob of (path, offset, size in bytes), neighbours in a file joined.

    Raises ConfigError for an unreadable file.
    """
    joined: list[FileRange] = []
    stamps: dict[Path, _Stamp] = {}
    for path, offset, size_bytes in ranges:
        if path not in stamps:
            with disk_errors("read", path):
                stamps[path] = _Stamp.of(path.stat())
        last = joined[-1] if joined else None
        if last is not None and last.path == path and last.offset + last.size_bytes == offset:
            joined[-1] = FileRange(path, last.offset, last.size_bytes + size_bytes, stamps[path])
        elif size_bytes:
            joined.append(FileRange(path, offset, size_bytes, stamps[path]))
    sizes = [part.size_bytes for part in joined]
    return Blob(sum(sizes), tuple(joined), tuple(accumulate(sizes[:-1], initial=0)))


def file_blob(path: Path, offset: int = 0) -> Blob:
    """A file from `offset` to its end. Raises ConfigError if it cannot be read."""
    with disk_errors("read", path):
        size_bytes = path.stat().st_size
    return blob_of([(path, offset, size_bytes - offset)])


def stored_blob(path: Path, offset: int, size_bytes: int) -> Blob:
    """Part of a file that has its name only because it was verified: another process may replace it by an equal one."""
    return Blob(size_bytes, (FileRange(path, offset, size_bytes, None),) if size_bytes else (), (0,))


def read_blob(blob: Blob, offset: int, size_bytes: int) -> bytes:
    """Bytes [offset, offset + size_bytes) of a blob.

    Raises ConfigError if they are not in it, or if a file is gone or is not the one that was hashed any more.
    """
    if offset < 0 or size_bytes < 0 or offset + size_bytes > blob.size_bytes:
        raise ConfigError(f"bytes [{offset}, {offset + size_bytes}) are not in a blob of {blob.size_bytes}")
    parts: list[bytes] = []
    index = bisect.bisect_right(blob.starts, offset) - 1
    while size_bytes:
        part, skip = blob.ranges[index], offset - blob.starts[index]
        take = min(size_bytes, part.size_bytes - skip)
        parts.append(_read_range(part, skip, take))
        offset, size_bytes, index = offset + take, size_bytes - take, index + 1
    return parts[0] if len(parts) == 1 else b"".join(parts)


def _read_range(part: FileRange, skip: int, size_bytes: int) -> bytes:
    with disk_errors("read", part.path), part.path.open("rb", buffering=0) as file:
        if part.stamp is not None and part.stamp != _Stamp.of(os.fstat(file.fileno())):
            raise ConfigError(f"{part.path} has changed since this node read it: start the node again")
        file.seek(part.offset + skip)
        data = file.read(size_bytes)
    if data is None or len(data) != size_bytes:
        raise ConfigError(f"{part.path} is truncated")
    return data


def build_manifest(
    directory: Path, cache_dir: Path, *, on_progress: Progress | None = None
) -> tuple[Manifest, dict[bytes, Blob]]:
    """The manifest of a whole model directory, and where each of its blobs lies in it.

    Reads every byte once, at the speed of SHA-256; a second call takes the digests from `cache_dir`. Raises
    ConfigError, one line, for what `inspect_model` refuses, for a file that changes meanwhile, and for a model over the
    limits.
    """
    info = inspect_model(directory)
    small = {name: _small_file(directory / name) for name in sorted(SMALL_FILES) if (directory / name).is_file()}
    specs = {unit: _tensor_specs(info.tensors[unit]) for unit in unit_names(info.n_blocks)}
    blobs = {unit: _unit_blob(info.tensors[unit], specs[unit]) for unit in specs}
    digests = _digests(directory, cache_dir, {**small, **blobs}, on_progress)
    units = tuple(UnitSpec(unit, specs[unit], blobs[unit].size_bytes, digests[unit]) for unit in specs)
    files = tuple(FileSpec(name, blob.size_bytes, digests[name]) for name, blob in small.items())
    manifest = _manifest_of(info, files, units)
    try:
        # What no joiner would take must not get an id: encoding alone checks no limit.
        decode_manifest(manifest_bytes(manifest))
    except RemoteProtocolError as error:
        raise ConfigError(f"{directory} cannot be shared: {error}") from None
    return manifest, {digests[name]: blob for name, blob in (*small.items(), *blobs.items())}


def _manifest_of(info: ModelInfo, files: tuple[FileSpec, ...], units: tuple[UnitSpec, ...]) -> Manifest:
    return Manifest(
        version=VERSION,
        name=_plain(info.name),
        architecture=info.architecture,
        n_blocks=info.n_blocks,
        hidden_size=info.hidden_size,
        vocab_size=info.vocab_size,
        dtype=info.dtype,
        max_positions=info.max_positions,
        eos_token_ids=tuple(sorted(set(info.eos_token_ids))),
        files=files,
        units=units,
    )


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


def _digests(
    directory: Path, cache_dir: Path, blobs: Mapping[str, Blob], on_progress: Progress | None
) -> dict[str, bytes]:
    """name -> SHA-256 of each blob, from the cache where its files are unchanged."""
    with disk_errors("read", directory):
        place = hashlib.sha256(os.fsencode(directory.resolve())).hexdigest()[:32]
    path = cache_dir / "digests" / f"{place}.json"
    known = _read_cache(path)
    found: dict[str, bytes] = {}
    total = sum(blob.size_bytes for blob in blobs.values())
    done = 0
    for name, blob in blobs.items():
        key = hashlib.sha256(repr(blob.ranges).encode()).hexdigest()
        found[name] = known.get(key) or _hash(blob)
        known[key] = found[name]
        done += blob.size_bytes
        if on_progress is not None:
            on_progress(done, total)
    keys = {hashlib.sha256(repr(blob.ranges).encode()).hexdigest() for blob in blobs.values()}
    text = msgspec.json.encode({key: digest.hex() for key, digest in sorted(known.items()) if key in keys})
    atomic_write(path, text)
    return found


def _read_cache(path: Path) -> dict[str, bytes]:
    """What is remembered; nothing if it cannot be read, for a cache may always be lost."""
    try:
        texts = msgspec.json.decode(path.read_bytes(), type=dict[str, str])
        digests = {key: bytes.fromhex(text) for key, text in texts.items()}
    except (OSError, ValueError, msgspec.MsgspecError):
        return {}
    return {key: digest for key, digest in digests.items() if len(digest) == 32}


def _hash(blob: Blob) -> bytes:
    digest = hashlib.sha256()
    buffer = memoryview(bytearray(_BUFFER_BYTES))
    for part in blob.ranges:
        with disk_errors("read", part.path), part.path.open("rb", buffering=0) as file:
            file.seek(part.offset)
            left = part.size_bytes
            while left:
                count = file.readinto(buffer[: min(left, _BUFFER_BYTES)])
                if not count:
                    raise ConfigError(f"{part.path} is truncated")
                digest.update(buffer[:count])
                left -= count
            if _Stamp.of(os.fstat(file.fileno())) != part.stamp:
                raise ConfigError(f"{part.path} changed while it was read: try again when nothing writes to it")
    return digest.digest()


def atomic_write(path: Path, data: bytes) -> None:
    """Replace `path` by `data`, whole or not at all, also if the machine stops. Raises ConfigError."""
    with disk_errors("write", path):
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            Path(name).replace(path)
        except BaseException:
            with contextlib.suppress(OSError):
                Path(name).unlink()
            raise


@contextlib.contextmanager
def disk_errors(verb: str, path: Path) -> Iterator[None]:
    """Turns what the file system says into one line for the user: ConfigError."""
    try:
        yield
    except OSError as error:
        if error.errno in {errno.ENOSPC, errno.EDQUOT}:
            raise ConfigError(f"no space left on the disk of {path}") from None
        raise ConfigError(f"cannot {verb} {path}: {error.strerror or error}") from None
