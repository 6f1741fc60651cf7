"""The bytes of a checkpoint: files written whole, checked by their SHA-256, read into a snapshot.

Ring: shell (disk).
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import stat
import sys
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TypeVar

import msgspec

from mycel.node.blobs import disk_errors
from mycel.node.training.checkpoint_layout import ITEM_BYTES, CheckpointNote, FileNote, PartNote, Piece
from mycel.protocols.errors import ConfigError

__all__ = [
    "TEMPORARY",
    "Check",
    "check_is_file",
    "file_note",
    "go_on",
    "portions",
    "read_note",
    "slice_of",
    "slices",
    "sync_folder",
    "verify_files",
    "write_file",
]

# Called between portions of work; what it raises ends the work.
Check = Callable[[], None]
N = TypeVar("N", PartNote, CheckpointNote)

# How the name of a file ends that is not whole yet.
TEMPORARY = ".tmp"
_PORTION_BYTES = 8 << 20
# Tensor names of a stage are in it.
_MAX_NOTE_BYTES = 64 << 20


def go_on() -> None:
    """The `Check` that never ends the work."""


def check_is_file(path: Path) -> None:
    """Raises ConfigError for a pipe or a device, which others may have put there: reading it would never end."""
    if not stat.S_ISREG(path.stat().st_mode):
        raise ConfigError(f"{path} is no file")


def read_note(path: Path, kind: type[N]) -> N:
    with disk_errors("read", path):
        check_is_file(path)
        with path.open("rb") as file:
            data = file.read(_MAX_NOTE_BYTES + 1)
    if len(data) > _MAX_NOTE_BYTES:
        raise ConfigError(f"{path} is larger than {_MAX_NOTE_BYTES // 2**20} MiB")
    try:
        return msgspec.json.decode(data, type=kind)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        raise ConfigError(f"{path} is damaged, or of another Mycel") from None


def verify_files(folder: Path, files: Mapping[str, FileNote], check: Check) -> None:
    """Raises ConfigError for the first file that does not have its size and SHA-256."""
    for name, expected in files.items():
        path = folder / name
        digest = hashlib.sha256()
        with disk_errors("read", path):
            check_is_file(path)
        with disk_errors("read", path), path.open("rb", buffering=0) as file:
            size_bytes = path.stat().st_size
            while size_bytes == expected.size_bytes and (data := file.read(_PORTION_BYTES)):
                check()
                digest.update(data)
        if digest.hexdigest() != expected.sha256:
            raise ConfigError(f"{path} is damaged: it does not have its SHA-256")


def slices(pieces: Iterable[Piece], snapshot: memoryview) -> list[memoryview]:
    """The bytes of tensors that lie in this order in a snapshot, neighbours joined."""
    joined: list[tuple[int, int]] = []
    for piece in pieces:
        if joined and joined[-1][1] == piece.start:
            joined[-1] = (joined[-1][0], piece.end)
        else:
            joined.append((piece.start, piece.end))
    return [slice_of(elements, snapshot) for elements in joined]


def slice_of(elements: tuple[int, int], snapshot: memoryview) -> memoryview:
    return snapshot.cast("B")[elements[0] * ITEM_BYTES : elements[1] * ITEM_BYTES]


def portions(content: Iterable[memoryview]) -> Iterator[memoryview]:
    for part in content:
        for start in range(0, part.nbytes, _PORTION_BYTES):
            yield part[start : start + _PORTION_BYTES]


def file_note(content: Iterable[memoryview], check: Check) -> FileNote:
    digest, size_bytes = hashlib.sha256(), 0
    for portion in portions(content):
        check()
        digest.update(portion)
        size_bytes += portion.nbytes
    return FileNote(digest.hexdigest(), size_bytes)


def write_file(path: Path, content: Iterable[memoryview], check: Check) -> None:
    """Replace a file, whole or not at all. Its folder must be there: another process may have moved it away."""
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}{TEMPORARY}")
    with disk_errors("write", path):
        try:
            with temporary.open("xb") as file:
                for portion in portions(content):
                    check()
                    file.write(portion)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
            sync_folder(path.parent)
        except BaseException:
            with contextlib.suppress(OSError):
                temporary.unlink()
            raise


def sync_folder(folder: Path) -> None:
    """Make a rename survive a power cut, where the system can."""
    if sys.platform == "win32":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
