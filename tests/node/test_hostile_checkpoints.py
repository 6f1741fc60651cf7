"""A directory of checkpoints where others can write: nothing in it is read without an end, or leads elsewhere."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from mycel.node.training.checkpoint_bytes import read_note, verify_files
from mycel.node.training.checkpoint_files import CheckpointPlace, write_part
from mycel.node.training.checkpoint_layout import NOTE_FILE, CheckpointNote, FileNote, StageFiles
from mycel.node.training.checkpoint_read import newest
from mycel.protocols.errors import ConfigError

RUN = bytes(32)


@pytest.mark.parametrize("kind", ["pipe", "device"])
def test_a_note_that_never_ends_is_passed_over(tmp_path: Path, kind: str) -> None:
    note = tmp_path / "step-00000004" / NOTE_FILE
    note.parent.mkdir(parents=True)
    if kind == "pipe":
        os.mkfifo(note)
    else:
        note.symlink_to("/dev/zero")
    with pytest.raises(ConfigError, match="is no file"):
        read_note(note, CheckpointNote)
    found = newest(tmp_path, RUN)
    assert found.checkpoint is None
    assert len(found.passed_over) == 1


def test_a_file_that_is_a_pipe_is_damaged(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "model.safetensors")
    with pytest.raises(ConfigError, match="is no file"):
        verify_files(tmp_path, {"model.safetensors": FileNote("0" * 64, 0)}, lambda: None)


def test_nothing_is_written_through_a_link(tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    place = CheckpointPlace(tmp_path / "checkpoints", tmp_path, RUN, RUN, 2)
    place.directory.mkdir()
    place.partial(4).symlink_to(elsewhere, target_is_directory=True)
    stage = StageFiles(0, 1, (("weight", 0, 4, (4,)),))
    with pytest.raises(ConfigError, match="leads elsewhere"):
        write_part(place, 4, stage, memoryview(bytearray(16)))
    assert list(elsewhere.iterdir()) == []
