"""Finding and reading checkpoints: the newest that verifies, and one stage's state out of it.

A checkpoint may come from anywhere: its files are named by us and not by it, and have their SHA-256 or are refused.
Calls block, and end when `check` raises something.

Ring: shell (disk).
"""

from __future__ import annotations

import contextlib
import hashlib
import uuid
from dataclasses import dataclass
from pathlib import Path

from mycel.node.blobs import disk_errors
from mycel.node.training.checkpoint_bytes import (
    Check,
    check_is_file,
    go_on,
    portions,
    read_note,
    slice_of,
    slices,
    verify_files,
)
from mycel.node.training.checkpoint_layout import (
    ITEM_BYTES,
    NOTE_FILE,
    CheckpointNote,
    FileNote,
    Piece,
    StageFiles,
    model_file,
    safetensors_header,
    version_of,
    wrong_files,
)
from mycel.protocols.errors import ConfigError

__all__ = ["Checkpoint", "Found", "newest", "read_pieces", "read_stage", "whole_checkpoints"]


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A whole one that was verified when it was found."""

    path: Path
    note: CheckpointNote

    @property
    def version(self) -> int:
        return self.note.version


@dataclass(frozen=True, slots=True)
class Found:
    """The newest that verifies, and a line for each newer one that does not."""

    checkpoint: Checkpoint | None
    passed_over: tuple[str, ...] = ()


def newest(directory: Path, run: bytes, check: Check = go_on, *, at_most: int | None = None) -> Found:
    """The newest whole checkpoint of this run in `directory` of which every file has its SHA-256.

    With `at_most`, the newest of those that are not newer than this version. A damaged one is renamed, so that its
    version can be written again. Raises ConfigError if `directory` is unreadable.
    """
    passed_over: list[str] = []
    with disk_errors("read", directory):
        paths = list(directory.iterdir()) if directory.is_dir() else []
    folders = [(version, path) for path in paths if (version := version_of(path.name)) is not None]
    for version, path in sorted(folders, reverse=True):
        if at_most is not None and version > at_most:
            continue
        try:
            note = read_note(path / NOTE_FILE, CheckpointNote)
        except ConfigError as error:
            # Perhaps nothing of ours, or another process has just removed it.
            passed_over.append(str(error))
            continue
        if note.run != run.hex():
            continue
        try:
            _check(path, version, note, check)
        except ConfigError as error:
            passed_over.append(_set_aside(path, str(error)))
            continue
        return Found(Checkpoint(path, note), tuple(passed_over))
    return Found(None, tuple(passed_over))


def _check(path: Path, version: int, note: CheckpointNote, check: Check) -> None:
    if note.version != version:
        raise ConfigError(f"{path} is damaged: it holds step {note.version}")
    if reason := wrong_files(note):
        raise ConfigError(f"{path / NOTE_FILE} is damaged: {reason}")
    verify_files(path, note.files, check)


def _set_aside(path: Path, reason: str) -> str:
    aside = path.with_name(f"{path.name}.damaged-{uuid.uuid4().hex[:8]}")
    try:
        path.rename(aside)
    except OSError:  # of a medium that cannot be written, or another process was faster
        return reason
    return f"{reason} (set aside as {aside.name})"


def read_stage(checkpoint: Checkpoint, stage: StageFiles, check: Check = go_on) -> tuple[int, memoryview]:
    """(version, snapshot) of one stage, as it was written; verified once more while it is read.

    Raises ConfigError if the checkpoint is of another cut of the model, or damaged.
    """
    note = checkpoint.note
    if note.n_stages != stage.n_stages:
        raise ConfigError(f"{checkpoint.path} has {note.n_stages} stages, not {stage.n_stages}")
    snapshot = memoryview(bytearray((1 + note.moments) * stage.n_elements * ITEM_BYTES))
    for file, pieces in stage.contents(note.moments).items():
        read_pieces(checkpoint.path / file, pieces, note.files[file], snapshot, check)
    if stage.borrows_table and stage.tied is not None:
        file = model_file(0, stage.n_stages)
        verify_files(checkpoint.path, {file: note.files[file]}, check)
        table = slice_of(stage.tied, snapshot)
        with disk_errors("read", checkpoint.path / file), (checkpoint.path / file).open("rb") as opened:
            opened.seek(note.table_offset)
            if not note.table_offset or opened.readinto(table) != table.nbytes:
                raise ConfigError(f"{checkpoint.path / file} does not hold the table that the last stage shares")
    return note.version, snapshot


def read_pieces(path: Path, pieces: tuple[Piece, ...], expected: FileNote, snapshot: memoryview, check: Check) -> None:
    """Fill `snapshot` from a file that holds exactly these. The header is compared, never parsed."""
    header = safetensors_header(pieces)
    digest = hashlib.sha256(header)
    with disk_errors("read", path):
        check_is_file(path)
    with disk_errors("read", path), path.open("rb") as file:
        if file.read(len(header)) != header:
            raise ConfigError(
                f"{path} does not hold this stage's tensors: it is of another cut of the model, or damaged"
            )
        for portion in portions(slices(pieces, snapshot)):
            check()
            if file.readinto(portion) != portion.nbytes:
                raise ConfigError(f"{path} is truncated")
            digest.update(portion)
        if file.read(1) or digest.hexdigest() != expected.sha256:
            raise ConfigError(f"{path} is damaged: it does not have its SHA-256")


def whole_checkpoints(directory: Path, run: bytes) -> list[tuple[int, Path]]:
    """The whole checkpoints of this run, the newest first; by their notes alone."""
    found: list[tuple[int, Path]] = []
    for path in directory.glob("step-*"):
        version = version_of(path.name)
        if version is not None:
            with contextlib.suppress(ConfigError):
                if read_note(path / NOTE_FILE, CheckpointNote).run == run.hex():
                    found.append((version, path))
    return sorted(found, reverse=True)
