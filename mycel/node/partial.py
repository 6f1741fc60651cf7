"""Units on their way to disk: written in order, verified whole, and only then given their name.

    <model>/partial/<n>/lock           held by the one download that uses the folder; the system frees it if that dies
    <model>/partial/<n>/<unit>.part    safetensors header and the bytes that arrived so far

Two processes that fetch the same unit write to two folders and rename equal files to one name, so neither can harm the
other. A download first takes over what the dead left behind; an interrupted one leaves its parts for the next.

Ring: shell (disk).
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from mycel.node.blobs import disk_errors
from mycel.protocols.errors import ConfigError, LocalProtocolError
from mycel.swarm.manifest import Manifest, UnitSpec, unit_header

__all__ = ["PartialFolder", "PartialUnit", "partial_bytes", "partial_folder"]

MAX_FOLDERS = 64
_BUFFER_BYTES = 1 << 20


class PartialUnit:
    """One unit, `received` bytes of which are here. Append, then finish; close keeps the bytes for another time."""

    def __init__(self, path: Path, target: Path, unit: UnitSpec) -> None:
        """Takes up what is in `path`. Raises ConfigError if it cannot be written."""
        self.unit = unit
        self.received = 0
        self._path = path
        self._target = target
        self._header = unit_header(unit)
        self._digest = hashlib.sha256()
        with disk_errors("write", path):
            self._file: BinaryIO = path.open("a+b", buffering=0)
            try:
                self._take_up()
            except BaseException:
                self._file.close()
                raise

    def _take_up(self) -> None:
        self._file.seek(0)
        size_bytes = os.fstat(self._file.fileno()).st_size - len(self._header)
        if self._file.read(len(self._header)) != self._header or size_bytes > self.unit.size_bytes:
            self._start_over()
            return
        while chunk := self._file.read(_BUFFER_BYTES):
            self._digest.update(chunk)
            self.received += len(chunk)

    def _start_over(self) -> None:
        self._file.truncate(0)
        self._digest = hashlib.sha256()
        self.received = 0
        _write_all(self._file, self._header)

    def append(self, data: bytes | memoryview) -> None:
        """Write the next bytes of the blob.

        Raises LocalProtocolError for more than the unit has, and ConfigError if the disk is full or broken; what was
        here is then removed.
        """
        if self.received + len(data) > self.unit.size_bytes:
            raise LocalProtocolError(f"{self.unit.name} has {self.unit.size_bytes} bytes, no more")
        try:
            with disk_errors("write", self._path):
                _write_all(self._file, data)
        except ConfigError:
            self.discard()
            raise
        self._digest.update(data)
        self.received += len(data)

    def finish(self) -> bool:
        """Give the whole unit its name, if its digest is right; if not, start over empty and return False."""
        if self.received != self.unit.size_bytes:
            raise LocalProtocolError(f"{self.unit.name} is not whole: {self.received} of {self.unit.size_bytes} bytes")
        if self._digest.digest() != self.unit.sha256:
            self.restart()
            return False
        with disk_errors("write", self._target):
            os.fsync(self._file.fileno())
            self._file.close()
            try:
                self._path.replace(self._target)
            except PermissionError:
                # Windows does not replace a file that somebody maps. Then the same verified bytes are there already.
                if not self._target.is_file():
                    raise
                self._path.unlink()
            _sync_folder(self._target.parent)
        return True

    def restart(self) -> None:
        """Forget what arrived."""
        with disk_errors("write", self._path):
            self._start_over()

    def close(self) -> None:
        """Stop for now. Idempotent."""
        self._file.close()

    def discard(self) -> None:
        """Stop and remove what arrived. Idempotent."""
        self._file.close()
        with contextlib.suppress(FileNotFoundError):
            self._path.unlink()


class PartialFolder:
    """The folder of one download."""

    def __init__(self, model: Path, folder: Path) -> None:
        self._model = model
        self._folder = folder

    @contextlib.contextmanager
    def unit(self, manifest: Manifest, name: str) -> Iterator[PartialUnit]:
        """The unit as far as it is here, to be continued. Raises ConfigError if it cannot be written."""
        part = PartialUnit(self._folder / f"{name}.part", self._model / f"{name}.safetensors", manifest.unit(name))
        try:
            yield part
        finally:
            part.close()


def partial_bytes(model: Path) -> dict[str, int]:
    """unit -> bytes on disk of its longest unfinished copy, for the model in directory `model`."""
    found: dict[str, int] = {}
    for path in sorted((model / "partial").glob("*/*.part")):
        with contextlib.suppress(FileNotFoundError):
            found[path.stem] = max(found.get(path.stem, 0), path.stat().st_size)
    return found


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
    """Take over the parts of downloads that are no more: the longest of each unit."""
    for other in sorted(parent.iterdir()):
        if other == mine or not other.is_dir():
            continue
        lock = _claim(other)
        if lock is None:
            continue
        for part in other.glob("*.part"):
            ours = mine / part.name
            if ours.exists() and ours.stat().st_size >= part.stat().st_size:
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
