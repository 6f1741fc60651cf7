"""What a peer of a run of one-byte updates keeps on disk: the log, the sums of its epochs, and the state.

The log is written before the state: after a crash lines beyond the state are cut off, and come again from the group.

Ring: shell (files). Blocking calls.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path

from mycel.node.blobs import atomic_write, disk_errors
from mycel.protocols.errors import ConfigError, PeerError
from mycel.swarm.zeroth.course import Course, Step
from mycel.swarm.zeroth.run_log import Extent, LogHead, extents, read_head
from mycel.swarm.zeroth.shortcut import Epoch, SumTable, read_epochs

__all__ = ["LOG_FILE", "RunFiles"]

LOG_FILE = "zeroth.log"
_STATE, _SUMS = "zeroth.state", "zeroth.sums"


@dataclass(eq=False)
class RunFiles:
    """Of one peer and run, in `folder`. `open` first.

    `is_whole`: the log begins with the first round; who came by a snapshot or by sums has none.
    """

    folder: Path
    head: LogHead
    sums: SumTable = field(default_factory=SumTable, init=False)
    is_whole: bool = field(default=True, init=False)
    _extents: list[Extent] = field(default_factory=list, init=False)
    _start: int = field(default=0, init=False)

    @property
    def path(self) -> Path:
        return self.folder / LOG_FILE

    def open(self, course: Course) -> None:
        """Have `course` be in the state that was kept. Raises ConfigError for files that cannot be used."""
        with disk_errors("use", self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            state = self.folder / _STATE
            if state.exists():
                data = state.read_bytes()
                try:
                    course.load(data[32:], data[:32])
                except PeerError as error:
                    raise ConfigError(f"{state} is damaged ({error.reason}): remove {self.folder}") from None
            self._open_log(course)
            self._open_sums(course)

    def _open_log(self, course: Course) -> None:
        packed = self.head.pack()
        data = self.path.read_bytes() if self.path.exists() else b""
        if not data and not course.number:
            self.replace(b"", course)
            return
        self.is_whole = data.startswith(packed)
        if data and not self.is_whole:
            head, _ = read_head(data, str(self.path))
            raise ConfigError(f"{self.path} is the log of run {head.run.hex()[:16]}, or of another model")
        self._start, self._extents = len(packed), extents(data[len(packed) :])
        self.is_whole = self.is_whole and len(self._extents) >= course.number
        if self.is_whole:
            self._extents = self._extents[: course.number]
            with self.path.open("r+b") as file:
                file.truncate(self._start + self.n_bytes)

    def _open_sums(self, course: Course) -> None:
        path = self.folder / _SUMS
        if not path.exists():
            return
        try:
            epochs, _ = read_epochs(path.read_bytes(), course)
        except PeerError as error:
            raise ConfigError(f"{path} is damaged ({error.reason}): remove it") from None
        self.sums = SumTable(epoch for epoch in epochs if epoch.sums.last < course.number)
        atomic_write(path, b"".join(epoch.pack() for epoch in self.sums.epochs))

    # ---- writing

    def add(self, lines: bytes, course: Course, step: Step) -> None:
        """A round has been applied: on disk when this returns. Raises ConfigError if the disk refuses it."""
        with disk_errors("write", self.folder):
            if self.is_whole:
                self._append(self.path, lines)
                self._extents.append(Extent(self.n_bytes + len(lines), step.n_updates))
                if (epoch := self.sums.add(course, step)) is not None:
                    self._append(self.folder / _SUMS, epoch.pack())
            self._save(course)

    def replace(self, lines: bytes | None, course: Course, epochs: SumTable | None = None) -> None:
        """The state has come by another way; `lines` are the whole log, or None if that is not here."""
        with disk_errors("write", self.folder):
            self.is_whole, self.sums = lines is not None, epochs or SumTable()
            if lines is None:
                self.path.unlink(missing_ok=True)
                self._extents = []
            else:
                packed = self.head.pack()
                atomic_write(self.path, packed + lines)
                self._start, self._extents = len(packed), extents(lines)
            atomic_write(self.folder / _SUMS, b"".join(epoch.pack() for epoch in self.sums.epochs))
            self._save(course)

    def _save(self, course: Course) -> None:
        atomic_write(self.folder / _STATE, course.digest() + course.pack())

    @staticmethod
    def _append(path: Path, data: bytes) -> None:
        with path.open("ab") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())

    # ---- reading

    @property
    def n_bytes(self) -> int:
        """Of the log without its head."""
        return self._extents[-1].end if self._extents else 0

    def n_updates(self, first: int, last: int) -> int:
        """Of the rounds [first, last]."""
        return sum(extent.n_updates for extent in self._extents[max(first, 1) - 1 : last])

    def size_bytes(self, first: int, last: int) -> int | None:
        """Of the log's lines of the rounds [first, last]; None if they are not here."""
        if not self.is_whole or last > len(self._extents):
            return None
        start, end = self._span(first, last)
        return end - start

    def _span(self, first: int, last: int) -> tuple[int, int]:
        start = self._extents[first - 2].end if first > 1 else 0
        return start, self._extents[last - 1].end if last >= first else start

    def lines(self, first: int, last: int) -> bytes | None:
        """The log's lines of the rounds [first, last]; None if they are not here."""
        if not self.is_whole or last > len(self._extents):
            return None
        start, end = self._span(first, last)
        with disk_errors("read", self.path), self.path.open("rb") as file:
            file.seek(self._start + start)
            return file.read(end - start)

    def epochs_until(self, last: int) -> list[Epoch]:
        """The whole epochs up to round `last`."""
        return [epoch for epoch in self.sums.epochs if epoch.sums.last < last]
