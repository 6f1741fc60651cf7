"""A file that records are added to and that survives a crash at any byte: what `add` returned from is there for good.

Each record is `length (u32) | CRC-32 of it | CRC-32 of the record | record`, after a first record that names what the
file is of. What a crash left unfinished at the end was never relied on and is cut off; damage anywhere else is an error
that somebody has to look at, for a log that forgets is worse than none.

Ring: shell (files).
"""

from __future__ import annotations

import os
import struct
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

from mycel.protocols.errors import AccessDenied, ConfigError

_LEAD = struct.Struct("<III")
# Larger than anything that is written; a length beyond it is damage.
MAX_RECORD_BYTES = 16 * 1024 * 1024
# No record of ours ends in so many zeros: the last thing in it is a signature.
_UNWRITTEN_BYTES = 16


@dataclass(eq=False, slots=True)
class RecordLog:
    """Records of `what` in the file at `path`, one process at a time. Blocking calls: they run on a thread.

    `whose` is the first record: a file of another group is refused.
    """

    path: Path
    what: str
    whose: bytes
    # Where each record's bytes begin, and how many there are.
    _places: list[tuple[int, int]] = field(default_factory=list, init=False)
    _file: BinaryIO | None = field(default=None, init=False)

    def __len__(self) -> int:
        return len(self._places)

    @property
    def size_bytes(self) -> int:
        return sum(size_bytes for _, size_bytes in self._places)

    def open(self) -> None:
        """Make the file, or check all of it. Raises ConfigError for one that is damaged, of others, or in use."""
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self.path.open("r+b" if self.path.exists() else "x+b")
            self._lock(self._file)
            self._read_all(self._file)
        except OSError as error:
            self.close()
            kind = AccessDenied if isinstance(error, PermissionError) else ConfigError
            raise kind(f"cannot open the {self.what} {self.path}: {error.strerror}") from None
        except ConfigError:
            self.close()
            raise

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def records(self, start: int = 0, end: int | None = None) -> Iterator[bytes]:
        """Records [start, end) in the order they came; another thread may add to them meanwhile."""
        places = self._places[start:end]
        if not places:
            return
        with self.path.open("rb") as file:
            for place, size_bytes in places:
                file.seek(place)
                yield file.read(size_bytes)

    def add(self, record: bytes) -> None:
        """Write a record down; it is on disk when this returns. Raises ConfigError if the disk refuses it."""
        self._write(self._opened(), [record])

    def replace(self, records: Sequence[bytes]) -> None:
        """Let these be all the records, or, after a crash, those from before."""
        self._opened()
        fresh = self.path.with_name(f".{self.path.name}.new")
        try:
            fresh.unlink(missing_ok=True)
            file = fresh.open("x+b")
        except OSError as error:
            raise self._unwritable(error) from None
        try:
            self._lock(file)
            places, self._places = self._places, []
            self._write(file, [self.whose, *records])
            self.close()  # some systems do not replace a file that is open
            fresh.replace(self.path)
            _sync_folder(self.path.parent)
        except (OSError, ConfigError) as error:
            file.close()
            self._places = places
            raise self._unwritable(error) if isinstance(error, OSError) else error from None
        self._file = file
        del self._places[0]

    # ---- the file

    def _opened(self) -> BinaryIO:
        assert self._file is not None, "the log is not open"
        return self._file

    def _write(self, file: BinaryIO, records: Sequence[bytes]) -> None:
        try:
            end = file.seek(0, os.SEEK_END)
            places = []
            for record in records:
                length = len(record).to_bytes(4, "little")
                file.write(_LEAD.pack(len(record), zlib.crc32(length), zlib.crc32(record)) + record)
                places.append((end + _LEAD.size, len(record)))
                end += _LEAD.size + len(record)
            file.flush()
            os.fsync(file.fileno())
        except OSError as error:
            raise self._unwritable(error) from None
        self._places += places

    def _read_all(self, file: BinaryIO) -> None:
        size_bytes = file.seek(0, os.SEEK_END)
        places, end = [], 0
        while end < size_bytes and (record := self._read_one(file, end, size_bytes)) is not None:
            places.append((end + _LEAD.size, len(record)))
            if len(places) == 1 and record != self.whose:
                raise ConfigError(f"the {self.what} {self.path} is of another group: use another folder")
            end += _LEAD.size + len(record)
        file.truncate(end)
        if places:
            self._places = places[1:]
        else:
            self._write(file, [self.whose])
            _sync_folder(self.path.parent)
            del self._places[0]

    def _read_one(self, file: BinaryIO, start: int, size_bytes: int) -> bytes | None:
        """The record at `start`, or None if from there on there is only what a crash left."""
        file.seek(start)
        lead = file.read(_LEAD.size)
        if len(lead) < _LEAD.size or not any(lead):
            self._check_unwritten(file, start)
            return None
        length, length_crc, crc = _LEAD.unpack(lead)
        if length > MAX_RECORD_BYTES or zlib.crc32(lead[:4]) != length_crc:
            raise self._damaged(start)
        record = file.read(length)
        if len(record) < length:
            return None
        if zlib.crc32(record) != crc:
            # Of the last record a crash may have left a place whose bytes never came: they read as zeros.
            if start + _LEAD.size + length == size_bytes and not any(record[-_UNWRITTEN_BYTES:]):
                return None
            raise self._damaged(start)
        return record

    def _check_unwritten(self, file: BinaryIO, start: int) -> None:
        """Less than the lead of a record, or nothing but zeros."""
        file.seek(start)
        rest = file.read()
        if len(rest) >= _LEAD.size and any(rest):
            raise self._damaged(start)

    def _damaged(self, start: int) -> ConfigError:
        return ConfigError(
            f"the {self.what} {self.path} is damaged at byte {start}; a peer that goes on without it "
            "could contradict what it signed: restore it, or join with a new identity"
        )

    def _unwritable(self, error: OSError) -> ConfigError:
        return ConfigError(f"cannot write the {self.what} {self.path}: {error.strerror}")

    def _lock(self, file: BinaryIO) -> None:
        """For as long as the file is open. Two processes with one book would contradict each other."""
        if os.name != "posix":
            return
        import fcntl

        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(f"the {self.what} {self.path} is in use by another process") from None


def _sync_folder(folder: Path) -> None:
    """A new name is on disk once its folder is."""
    if os.name != "posix":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
