"""Content by its digest: where the bytes of a blob lie, reading any piece of them, and hashing them by the chunk.

A blob is a sequence of file ranges, so a unit whose tensors lie scattered over the owner's safetensors files is served
from where it lies, without a copy. It knows by size, modification time and inode whether a file is still the same.

Ring: shell (files).
"""

from __future__ import annotations

import bisect
import contextlib
import errno
import hashlib
import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

from mycel.protocols.errors import ConfigError

__all__ = [
    "Blob",
    "BlobIndex",
    "FileRange",
    "atomic_write",
    "blob_of",
    "disk_errors",
    "file_blob",
    "hash_blob",
    "memory_blob",
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
    """File ranges in order; range i starts at byte `starts[i]` of the blob. Or bytes that lie in memory."""

    size_bytes: int
    ranges: tuple[FileRange, ...]
    starts: tuple[int, ...]
    data: bytes | None = None


# digest, as the manifest has it -> where the bytes lie
BlobIndex = Mapping[bytes, Blob]


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


def memory_blob(data: bytes) -> Blob:
    """Bytes that lie in no file."""
    return Blob(len(data), (), (), data)


def read_blob(blob: Blob, offset: int, size_bytes: int) -> bytes:
    """Bytes [offset, offset + size_bytes) of a blob.

    Raises ConfigError if they are not in it, or if a file is gone or is not the one that was hashed any more.
    """
    if offset < 0 or size_bytes < 0 or offset + size_bytes > blob.size_bytes:
        raise ConfigError(f"bytes [{offset}, {offset + size_bytes}) are not in a blob of {blob.size_bytes}")
    if blob.data is not None:
        return blob.data[offset : offset + size_bytes]
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


def hash_blob(blob: Blob, chunk_bytes: int) -> bytes:
    """The SHA-256 of each `chunk_bytes` of a blob, one after the other; the last chunk may be short.

    Raises ConfigError for a file that cannot be read or changes meanwhile.
    """
    hashes: list[bytes] = []
    digest, room = hashlib.sha256(), chunk_bytes
    buffer = memoryview(bytearray(_BUFFER_BYTES))
    for part in blob.ranges:
        with disk_errors("read", part.path), part.path.open("rb", buffering=0) as file:
            file.seek(part.offset)
            left = part.size_bytes
            while left:
                count = file.readinto(buffer[: min(left, room, _BUFFER_BYTES)])
                if not count:
                    raise ConfigError(f"{part.path} is truncated")
                digest.update(buffer[:count])
                left, room = left - count, room - count
                if not room:
                    hashes.append(digest.digest())
                    digest, room = hashlib.sha256(), chunk_bytes
            if _Stamp.of(os.fstat(file.fileno())) != part.stamp:
                raise ConfigError(f"{part.path} changed while it was read: try again when nothing writes to it")
    if room < chunk_bytes:
        hashes.append(digest.digest())
    return b"".join(hashes)


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
