"""Writing checkpoints (their layout: `checkpoint_layout.py`): each stage its part, and a whole of all parts.

Whoever sees that all parts are there checks them and gives the folder its name. Any number of processes may do both at
once: they write equal bytes, replace files whole, and find the folder renamed or gone when another was faster. Calls
block, so make them on a worker thread, and end when `check` raises something. Nothing here knows a peer.

Ring: shell (disk).
"""

from __future__ import annotations

import contextlib
import os
import shutil
import uuid
from dataclasses import dataclass
from pathlib import Path

import msgspec

from mycel.node.blobs import disk_errors
from mycel.node.training.checkpoint_bytes import (
    TEMPORARY,
    Check,
    file_note,
    go_on,
    read_note,
    slices,
    sync_folder,
    verify_files,
    write_file,
)
from mycel.node.training.checkpoint_layout import (
    INDEX_FILE,
    ITEM_BYTES,
    MODEL_FILES,
    NOTE_FILE,
    CheckpointNote,
    PartNote,
    StageFiles,
    folder_name,
    index_file,
    model_file,
    part_note_file,
    safetensors_header,
    state_file,
    version_of,
)
from mycel.node.training.checkpoint_read import read_pieces, whole_checkpoints
from mycel.node.weights_map import read_json
from mycel.protocols.errors import ConfigError
from mycel.swarm.manifest import MAX_SMALL_FILE_BYTES, RECIPE_FILE

__all__ = ["CheckpointPlace", "complete", "missing_parts", "read_part", "write_part"]


@dataclass(frozen=True, slots=True)
class CheckpointPlace:
    """Where a run's checkpoints go, and what its `model` directory is; `keep` of them stay. `recipe` is a SHA-256."""

    directory: Path
    model: Path
    run: bytes
    recipe: bytes
    keep: int

    def whole(self, version: int) -> Path:
        return self.directory / folder_name(version)

    def partial(self, version: int) -> Path:
        """Named after the run, so that another in the same directory takes nothing of it for its own."""
        return self.directory / f"{folder_name(version)}.{self._mark}.partial"

    def removed(self, path: Path) -> Path:
        """A name under which `path` is nobody's any more."""
        return self.directory / f"{path.name.partition('.')[0]}.{self._mark}.removed-{uuid.uuid4().hex}"

    def partials(self) -> list[tuple[int, Path]]:
        paths = self.directory.glob(f"step-*.{self._mark}.partial")
        found = [(version_of(path.name.partition(".")[0]), path) for path in paths]
        return [(version, path) for version, path in found if version is not None]

    def all_removed(self) -> list[Path]:
        return list(self.directory.glob(f"step-*.{self._mark}.removed-*"))

    @property
    def _mark(self) -> str:
        return self.run.hex()[:16]


def write_part(
    place: CheckpointPlace,
    version: int,
    stage: StageFiles,
    snapshot: memoryview,
    check: Check = go_on,
) -> None:
    """Put one stage's state at `version` on disk, unless it is there or a checkpoint as new is whole.

    Raises ConfigError if it cannot be written, for example because the disk is full.
    """
    if _overtaken(place, version):
        return
    moments = stage.moments(snapshot.nbytes)
    contents = {
        file: [memoryview(safetensors_header(pieces)), *slices(pieces, snapshot)]
        for file, pieces in stage.contents(moments).items()
    }
    part = PartNote(
        run=place.run.hex(),
        recipe=place.recipe.hex(),
        version=version,
        stage=stage.index,
        n_stages=stage.n_stages,
        moments=moments,
        table_offset=stage.table_offset(),
        tensors=tuple(piece.name for piece in stage.weights()),
        files={file: file_note(content, check) for file, content in contents.items()},
    )
    folder = place.partial(version)
    note = folder / part_note_file(stage.index)
    if _part_there(place, version, stage.index, stage.n_stages) == part:
        return
    try:
        if folder.is_symlink() or note.parent.is_symlink():
            raise ConfigError(f"{folder} leads elsewhere: nothing is written there")
        with disk_errors("write", folder):
            note.parent.mkdir(parents=True, exist_ok=True)
            note.unlink(missing_ok=True)
        for file, content in contents.items():
            write_file(folder / file, content, check)
        write_file(note, [memoryview(msgspec.json.encode(part))], check)
    except ConfigError:
        # Others were faster: the folder has been renamed, or removed as too old.
        if not _overtaken(place, version):
            raise
        _sweep(place.whole(version))


def read_part(
    place: CheckpointPlace, stage: StageFiles, at_most: int | None = None, check: Check = go_on
) -> tuple[int, memoryview] | None:
    """(version, snapshot) of the newest part of this stage that no whole checkpoint was made of, not after `at_most`.

    Verified while it is read. None if there is none that can be read alone: the last stage of a tied model borrows its
    table from the first one's file. Raises ConfigError if one is damaged.
    """
    if stage.borrows_table:
        return None
    for version, folder in sorted(place.partials(), reverse=True):
        if at_most is not None and version > at_most:
            continue
        part = _part_there(place, version, stage.index, stage.n_stages)
        if isinstance(part, str):
            continue
        snapshot = memoryview(bytearray((1 + part.moments) * stage.n_elements * ITEM_BYTES))
        for file, pieces in stage.contents(part.moments).items():
            read_pieces(folder / file, pieces, part.files[file], snapshot, check)
        return version, snapshot
    return None


def missing_parts(place: CheckpointPlace, version: int, n_stages: int) -> dict[int, str]:
    """The stages whose parts at `version` are not on disk, and why; none if a checkpoint as new is whole."""
    if _overtaken(place, version):
        return {}
    parts = {stage: _part_there(place, version, stage, n_stages) for stage in range(n_stages)}
    return {stage: part for stage, part in parts.items() if isinstance(part, str)}


def complete(place: CheckpointPlace, version: int, n_stages: int, check: Check = go_on) -> dict[int, str]:
    """Make a whole checkpoint of the parts, if all are there and verify, and remove what is too old.

    Returns the stages that are missing, and why: none if the checkpoint is whole now. A part that does not verify is
    missing from then on. Raises ConfigError for the disk.
    """
    try:
        missing = _make_whole(place, version, n_stages, check)
    except ConfigError:
        if not _overtaken(place, version):
            raise
        _sweep(place.whole(version))
        missing = {}
    _prune(place)
    return missing


def _make_whole(place: CheckpointPlace, version: int, n_stages: int, check: Check) -> dict[int, str]:
    if _overtaken(place, version):
        return {}
    folder = place.partial(version)
    parts: dict[int, PartNote] = {}
    missing: dict[int, str] = {}
    for stage in range(n_stages):
        part = _part_there(place, version, stage, n_stages)
        if isinstance(part, str):
            missing[stage] = part
        else:
            parts[stage] = part
    if missing:
        return missing
    for stage, part in parts.items():
        try:
            if part.moments != parts[0].moments:
                raise ConfigError(f"it has {part.moments} moments, and stage 0 has {parts[0].moments}")
            verify_files(folder, part.files, check)
        except ConfigError as error:
            missing[stage] = str(error)
            with contextlib.suppress(OSError):
                (folder / part_note_file(stage)).unlink()
    if not missing:
        _write_model_files(place, folder, parts)
        with disk_errors("write", place.whole(version)):
            folder.rename(place.whole(version))
            sync_folder(place.directory)
        _sweep(place.whole(version))
    return missing


def _write_model_files(place: CheckpointPlace, folder: Path, parts: dict[int, PartNote]) -> None:
    """Everything that no stage writes: configuration and tokenizer, index, and the note of the whole."""
    contents = {"config.json": _float32_config(place.model)}
    for name in sorted(MODEL_FILES - {"config.json"}):
        if (place.model / name).is_file():
            contents[name] = _small_file(place.model / name)
    if (place.model / RECIPE_FILE).is_file():
        contents[f"training/{RECIPE_FILE}"] = _small_file(place.model / RECIPE_FILE)
    if len(parts) > 1:
        contents[INDEX_FILE] = index_file(parts)
    files = {name: file_note([memoryview(data)], go_on) for name, data in contents.items()}
    for part in parts.values():
        files.update(part.files)
    first = parts[0]
    note = CheckpointNote(
        format=1,
        run=first.run,
        recipe=first.recipe,
        version=first.version,
        n_stages=first.n_stages,
        moments=first.moments,
        table_offset=first.table_offset,
        files=files,
    )
    contents[NOTE_FILE] = msgspec.json.format(msgspec.json.encode(note), indent=2)
    for name, data in contents.items():
        write_file(folder / name, [memoryview(data)], go_on)


def _float32_config(model: Path) -> bytes:
    """The model's configuration, saying the dtype that its weights have now; loaders would round them to another."""
    config = read_json(model / "config.json")
    config.pop("torch_dtype", None)
    return msgspec.json.format(msgspec.json.encode(config | {"dtype": "float32"}), indent=2)


def _small_file(path: Path) -> bytes:
    with disk_errors("read", path):
        if path.stat().st_size > MAX_SMALL_FILE_BYTES:
            raise ConfigError(f"{path} is larger than {MAX_SMALL_FILE_BYTES // 2**20} MiB")
        return path.read_bytes()


def _part_there(place: CheckpointPlace, version: int, stage: int, n_stages: int) -> PartNote | str:
    """A stage's part as its note has it, its files having their sizes; or why it is not there."""
    folder = place.partial(version)
    try:
        part = read_note(folder / part_note_file(stage), PartNote)
        if part.files.keys() != {model_file(stage, n_stages), state_file(stage)}:
            return "its note names other files"
        for file, note in part.files.items():
            with disk_errors("read", folder / file):
                if (folder / file).stat().st_size != note.size_bytes:
                    return f"{file} does not have its size"
    except ConfigError as error:
        return str(error)
    expected = (place.run.hex(), place.recipe.hex(), version, stage, n_stages)
    if (part.run, part.recipe, part.version, part.stage, part.n_stages) != expected:
        return "its note is of another stage"
    return part


def _sweep(whole: Path) -> None:
    """Remove files that were being written when the folder got its name, by processes too late or killed.

    Who is too late does this, too: its file may come into being after the first has swept.
    """
    for folder, _, files in os.walk(whole):
        for name in files:
            if name.endswith(TEMPORARY):
                with contextlib.suppress(OSError):
                    Path(folder, name).unlink()


def _overtaken(place: CheckpointPlace, version: int) -> bool:
    """Whether a checkpoint of this run is whole that is as new. ConfigError if something else has the name."""
    if any(found >= version for found, _ in whole_checkpoints(place.directory, place.run)):
        return True
    with disk_errors("read", place.whole(version)):
        if place.whole(version).exists():
            raise ConfigError(f"{place.whole(version)} is in the way: it is no checkpoint of this run")
    return False


def _prune(place: CheckpointPlace) -> None:
    """Remove whole checkpoints beyond the newest `keep`, and parts that are older than those or too many."""
    whole = whole_checkpoints(place.directory, place.run)
    old = [path for _, path in whole[place.keep :]]
    partials = sorted(place.partials(), reverse=True)
    newest_whole = whole[0][0] if whole else 0
    # One more stays than of whole ones: others may still write theirs of the last but one.
    old += [path for at, (version, path) in enumerate(partials) if version <= newest_whole or at > place.keep]
    for path in old:
        # Another name first, so that nobody takes what is half removed for damaged. Another process may be faster.
        with disk_errors("remove", path), contextlib.suppress(FileNotFoundError):
            path.rename(place.removed(path))
    for path in place.all_removed():
        shutil.rmtree(path, ignore_errors=True)
