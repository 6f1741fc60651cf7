"""Units on their way to disk: each chunk verified before it is written, and the whole only then given its name.

    <model>/partial/<n>/lock           held by the one download that uses the folder; the system frees it if that dies
    <model>/partial/<n>/<unit>.part    safetensors header, and behind it the chunks that arrived, each at its place

Two processes that fetch the same unit write to two folders and rename equal files to one name, so neither can harm the
other. A download first takes over what the dead left behind; an interrupted one leaves its parts for the next.

Ring: shell (disk).
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from mycel.node.blobs import disk_errors
from mycel.protocols.errors import ConfigError, LocalProtocolError
from mycel.swarm.manifest import HASH_BYTES, UnitSpec, unit_header

__all__ = ["PartialFolder", "PartialUnit", "partial_bytes", "partial_folder"]

MAX_FOLDERS = 64


class PartialUnit:
    """One unit, of which the chunks in `missing` are not here. Keep them all, in any order, then finish.

    Several threads may keep chunks at once. Nothing stays open between two calls, and no record is written of what
    arrived: a chunk on disk is one whose hash is right, so a process may die at any moment.
    """

    def __init__(self, path: Path, target: Path, unit: UnitSpec, hashes: bytes) -> None:
        """Takes up what is in `path`, as far as it is right. Raises ConfigError if it cannot be read or written."""
        self.unit = unit
        self._path = path
        self._target = target
        self._header = unit_header(unit)
        self._hashes = hashes
        self._lock = threading.Lock()
        self._finished = False
        with disk_errors("write", path):
            self.missing = self._take_up()

    def _take_up(self) -> set[int]:
        missing = set(range(self.unit.n_chunks))
        size_bytes = len(self._header) + self.unit.size_bytes
        try:
            with self._path.open("rb", buffering=0) as file:
                on_disk = os.fstat(file.fileno()).st_size
                if file.read(len(self._header)) == self._header and on_disk <= size_bytes:
                    for index in range(self.unit.n_chunks):
                        data = file.read(len(self.unit.chunk(index)))
                        if not data:
                            break
                        if self.is_chunk(index, data):
                            missing.remove(index)
                    return missing
        except FileNotFoundError:
            return missing
        self._path.unlink()
        return missing

    def is_chunk(self, index: int, data: bytes | memoryview) -> bool:
        """Whether `data` is chunk `index`."""
        at = HASH_BYTES * index
        return hashlib.sha256(data).digest() == self._hashes[at : at + HASH_BYTES]

    def keep(self, index: int, data: bytes | memoryview) -> bool:
        """Write chunk `index` if `data` is right; False, and nothing is written, if it is wrong.

        Raises ConfigError if the disk is full or broken; what was here is then removed.
        """
        if not self.is_chunk(index, data):
            return False
        with self._lock:
            if not self._finished:
                self._write(len(self._header) + self.unit.chunk(index).start, data)
                self.missing.discard(index)
        return True

    def _write(self, offset: int, data: bytes | memoryview) -> None:
        try:
            with disk_errors("write", self._path), self._open() as file:
                file.seek(offset)
                _write_all(file, data)
        except ConfigError:
            self.discard()
            raise

    def _open(self) -> BinaryIO:
        try:
            return self._path.open("r+b", buffering=0)
        except FileNotFoundError:
            self._path.write_bytes(self._header)
            return self._path.open("r+b", buffering=0)

    def finish(self) -> None:
        """Give the whole unit its name. Raises LocalProtocolError if a chunk is missing, ConfigError for the disk."""
        with self._lock:
            if self._finished:
                return
            if self.missing:
                raise LocalProtocolError(f"{self.unit.name} is not whole: {len(self.missing)} chunks are missing")
            with disk_errors("write", self._target):
                with self._open() as file:
                    os.fsync(file.fileno())
                try:
                    self._path.replace(self._target)
                except PermissionError:
                    # Windows does not replace a file that somebody maps. Then the same verified bytes are there.
                    if not self._target.is_file():
                        raise
                    self._path.unlink()
                _sync_folder(self._target.parent)
            self._finished = True

    def discard(self) -> None:
        """Remove what arrived. Idempotent."""
        with contextlib.suppress(FileNotFoundError):
            self._path.unlink()


class PartialFolder:
    """The folder of one download."""

    def __init__(self, model: Path, folder: Path) -> None:
        self._model = model
        self._folder = folder

    def unit(self, unit: UnitSpec, hashes: bytes) -> PartialUnit:
        """The unit as far as it is here, to be continued; `hashes` are those of its chunks. Raises ConfigError."""
        path, target = self._folder / f"{unit.name}.part", self._model / f"{unit.name}.safetensors"
        return PartialUnit(path, target, unit, hashes)


def partial_bytes(model: Path) -> dict[str, int]:
    """unit -> bytes on disk of its longest unfinished copy, for the model in directory `model`."""
    found: dict[str, int] = {}
    for path in sorted((model / "partial").glob("*/*.part")):
        with contextlib.suppress(FileNotFoundError):
            found[path.stem] = max(found.get(path.stem, 0), _bytes_on_disk(path))
    return found


def _bytes_on_disk(path: Path) -> int:
    """Without the holes that chunks leave which have not arrived, where the system tells."""
    status = path.stat()
    blocks: int | None = getattr(status, "st_blocks", None)
    return status.st_size if blocks is None else min(status.st_size, blocks * 512)


@contextlib.contextmanager
def partial_folder(model: Path, units: frozenset[str]) -> Iterator[PartialFolder]:
    """A folder that is this caller's alone, with what the dead left of `units`; what they left of others is removed.

    Raises ConfigError if none can be made.
    """
    parent = model / "partial"
    with disk_errors("write", parent):
        folder, lock = _claim_any(parent)
    try:
        with disk_errors("write", parent):
            _adopt(parent, folder)
            _tidy(model, folder, units)
        yield PartialFolder(model, folder)
    finally:
        with contextlib.suppress(OSError):
            _tidy(model, folder, units)
        _leave(folder, lock)


def _claim_any(parent: Path) -> tuple[Path, BinaryIO]:
    for number in range(MAX_FOLDERS):
        folder = parent / str(number)
        # Whoever leaves last removes the folders, perhaps just now.
        with contextlib.suppress(FileNotFoundError):
            folder.mkdir(parents=True, exist_ok=True)
        lock = _claim(folder)
        if lock is not None:
            return folder, lock
    raise ConfigError(f"{MAX_FOLDERS} downloads are at work in {parent} already")


def _claim(folder: Path) -> BinaryIO | None:
    """The lock of a folder, or None if it is held or the folder is just going away."""
    path = folder / "lock"
    try:
        lock = path.open("ab")
    except FileNotFoundError:
        return None
    if _try_lock(lock):
        # Whoever leaves a folder removes its lock file: what we locked may have no name any more.
        with contextlib.suppress(FileNotFoundError):
            if path.stat().st_ino == os.fstat(lock.fileno()).st_ino:
                return lock
    lock.close()
    return None


def _adopt(parent: Path, mine: Path) -> None:
    """Take over the parts of downloads that are no more: the fullest of each unit."""
    for other in sorted(parent.iterdir()):
        if other == mine or not other.is_dir():
            continue
        lock = _claim(other)
        if lock is None:
            continue
        for part in other.glob("*.part"):
            ours = mine / part.name
            if ours.exists() and _bytes_on_disk(ours) >= _bytes_on_disk(part):
                part.unlink()
            else:
                part.replace(ours)
        _leave(other, lock)


def _tidy(model: Path, folder: Path, units: frozenset[str]) -> None:
    """Remove the parts that nobody will finish: of units that are here whole, or are not wanted."""
    for part in folder.glob("*.part"):
        if part.stem not in units or (model / f"{part.stem}.safetensors").exists():
            part.unlink()


def _leave(folder: Path, lock: BinaryIO) -> None:
    """Free a folder; it goes unless it holds parts that may be resumed."""
    if sys.platform == "win32":
        lock.close()  # an open file cannot be removed there
    with contextlib.suppress(OSError):
        if not any(folder.glob("*.part")):
            (folder / "lock").unlink()
            folder.rmdir()
            folder.parent.rmdir()
    lock.close()


def _try_lock(file: BinaryIO) -> bool:
    try:
        if sys.platform == "win32":
            import msvcrt

            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        else:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def _write_all(file: BinaryIO, data: bytes | memoryview) -> None:
    view = memoryview(data)
    while view:
        view = view[file.write(view) :]


def _sync_folder(folder: Path) -> None:
    """Make a rename survive a power cut, where the system can."""
    if sys.platform == "win32":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
