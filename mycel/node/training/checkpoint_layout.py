"""What a checkpoint consists of: its files by name, the tensors in each and their order, and what is said of them.

    step-00000100/config.json, tokenizer.json, ...              as in the run's model directory, but weights are float32
    step-00000100/model-00001-of-00002.safetensors, ...         the weights of each stage, and their index
    step-00000100/training/stage-0.safetensors, ...             its optimizer's moments, and what training alone has
    step-00000100/training/checkpoint.json                      CheckpointNote
    step-00000100.RUN.partial/training/stage-0.json             PartNote, written last of a stage's part

Legend: P parameters of a stage, M moments of its optimizer; its snapshot is (1 + M) * P float32, parameters first.

Ring: pure.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Literal

import msgspec
from msgspec import Meta, Struct

from mycel.protocols.messages import Count
from mycel.protocols.training import MAX_STAGES, StageIndex
from mycel.swarm.manifest import RECIPE_FILE, SMALL_FILES

__all__ = [
    "INDEX_FILE",
    "ITEM_BYTES",
    "MODEL_FILES",
    "NOTE_FILE",
    "CheckpointNote",
    "FileNote",
    "PartNote",
    "Piece",
    "StageFiles",
    "folder_name",
    "index_file",
    "model_file",
    "part_note_file",
    "safetensors_header",
    "state_file",
    "version_of",
    "wrong_files",
]

ITEM_BYTES = 4
MAX_MOMENTS = 4
# Parameters that training adds to a model, such as bottlenecks: transformers would not know what to do with them.
OWN_PREFIX = "mycel."
INDEX_FILE = "model.safetensors.index.json"
NOTE_FILE = "training/checkpoint.json"
# Copied from the run's model directory. Not its recipe, which would make the checkpoint's model a training run again.
MODEL_FILES = SMALL_FILES - {RECIPE_FILE}
_FOLDER = re.compile(r"step-(\d{8,12})\Z")

Hex = Annotated[str, Meta(pattern=r"^[0-9a-f]{64}\Z")]
Size = Annotated[int, Meta(ge=0, le=2**44)]


class FileNote(Struct, frozen=True, forbid_unknown_fields=True):
    sha256: Hex
    size_bytes: Size


Files = Annotated[dict[str, FileNote], Meta(max_length=4 * MAX_STAGES + 64)]


class PartNote(Struct, frozen=True, forbid_unknown_fields=True):
    """One stage's part. `table_offset` is where the first stage's file holds a table shared with the last; else 0."""

    run: Hex
    recipe: Hex
    version: Count
    stage: StageIndex
    n_stages: Annotated[int, Meta(ge=1, le=MAX_STAGES)]
    moments: Annotated[int, Meta(ge=0, le=MAX_MOMENTS)]
    table_offset: Size
    tensors: tuple[str, ...]
    files: Files


class CheckpointNote(Struct, frozen=True, forbid_unknown_fields=True):
    """All stages at one version, and every file but this one."""

    format: Literal[1]
    run: Hex
    recipe: Hex
    version: Count
    n_stages: Annotated[int, Meta(ge=1, le=MAX_STAGES)]
    moments: Annotated[int, Meta(ge=0, le=MAX_MOMENTS)]
    table_offset: Size
    files: Files


@dataclass(frozen=True, slots=True)
class Piece:
    """A tensor: elements [start, end) of a snapshot."""

    name: str
    shape: tuple[int, ...]
    start: int
    end: int


@dataclass(frozen=True, slots=True)
class StageFiles:
    """A stage as its files know it: `tensors` are (Hugging Face name, start, end, shape) and fill [0, P) in any order.

    `tied` is the one of them that is a table shared by the first and the last stage; it is written by the first alone.
    """

    index: int
    n_stages: int
    tensors: tuple[tuple[str, int, int, tuple[int, ...]], ...]
    tied: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        at = 0
        for piece in self.parameters:
            if piece.start != at or math.prod(piece.shape) != piece.end - piece.start:
                raise ValueError(f"{piece.name}: elements [{piece.start}, {piece.end}) of {piece.shape} after {at}")
            at = piece.end
        if self.tied is not None and self.tied not in {(piece.start, piece.end) for piece in self.parameters}:
            raise ValueError(f"no tensor is the tied table {self.tied}")

    @property
    def parameters(self) -> tuple[Piece, ...]:
        """In their order in the flat tensor."""
        pieces = (Piece(name, tuple(shape), start, end) for name, start, end, shape in self.tensors)
        return tuple(sorted(pieces, key=lambda piece: (piece.start, piece.end)))

    @property
    def n_elements(self) -> int:
        """P."""
        return max((end for _, _, end, _ in self.tensors), default=0)

    @property
    def borrows_table(self) -> bool:
        """Whether its tied table lies in the first stage's file."""
        return self.tied is not None and self.index > 0

    def moments(self, size_bytes: int) -> int:
        """M of a snapshot of this size. ValueError if no snapshot of this stage can have it."""
        share = self.n_elements * ITEM_BYTES
        if share == 0 or size_bytes % share or not 1 <= size_bytes // share <= 1 + MAX_MOMENTS:
            raise ValueError(f"{size_bytes} bytes are no snapshot of {self.n_elements} parameters")
        return size_bytes // share - 1

    def weights(self) -> tuple[Piece, ...]:
        """What the model file holds."""
        borrowed = self.tied if self.borrows_table else None
        return tuple(p for p in self.parameters if not p.name.startswith(OWN_PREFIX) and (p.start, p.end) != borrowed)

    def contents(self, moments: int) -> dict[str, tuple[Piece, ...]]:
        """This stage's files and the tensors in each, in order."""
        own = [piece for piece in self.parameters if piece.name.startswith(OWN_PREFIX)]
        for i in range(moments):
            shift = (1 + i) * self.n_elements
            own += [Piece(f"moment.{i}.{p.name}", p.shape, p.start + shift, p.end + shift) for p in self.parameters]
        return {model_file(self.index, self.n_stages): self.weights(), state_file(self.index): tuple(own)}

    def table_offset(self) -> int:
        """Where in the model file the tied table begins that the last stage reads here; 0 on any other stage."""
        if self.tied is None or self.borrows_table:
            return 0
        before = sum(p.end - p.start for p in self.weights() if p.start < self.tied[0])
        return len(safetensors_header(self.weights())) + before * ITEM_BYTES


def folder_name(version: int) -> str:
    """`step-00000100`."""
    return f"step-{version:08d}"


def version_of(folder: str) -> int | None:
    """The version of a whole checkpoint by its folder's name; None for any other name."""
    match = _FOLDER.match(folder)
    return int(match[1]) if match and folder == folder_name(int(match[1])) else None


def model_file(stage: int, n_stages: int) -> str:
    return "model.safetensors" if n_stages == 1 else f"model-{stage + 1:05d}-of-{n_stages:05d}.safetensors"


def state_file(stage: int) -> str:
    return f"training/stage-{stage}.safetensors"


def part_note_file(stage: int) -> str:
    return f"training/stage-{stage}.json"


def safetensors_header(pieces: tuple[Piece, ...]) -> bytes:
    """What stands before the tensors, one after the other; the same for the same tensors, and a multiple of 8 bytes."""
    fields: dict[str, object] = {"__metadata__": {"format": "pt"}}  # transformers asks for it
    at = 0
    for piece in pieces:
        end = at + (piece.end - piece.start) * ITEM_BYTES
        fields[piece.name] = {"dtype": "F32", "shape": piece.shape, "data_offsets": (at, end)}
        at = end
    text = msgspec.json.encode(fields)
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def index_file(parts: Mapping[int, PartNote]) -> bytes:
    """Which file each tensor of the model is in, as Hugging Face writes it."""
    files = {k: model_file(k, len(parts)) for k in sorted(parts)}
    weight_map = {name: files[k] for k in sorted(parts) for name in parts[k].tensors}
    total = sum(parts[k].files[files[k]].size_bytes for k in parts)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    return msgspec.json.format(msgspec.json.encode(index), indent=2)


def wrong_files(note: CheckpointNote) -> str | None:
    """Why these cannot be the files of a checkpoint, or None. So no note leads out of its folder."""
    stages = range(note.n_stages)
    needed = {"config.json", *(model_file(k, note.n_stages) for k in stages), *(state_file(k) for k in stages)}
    if note.n_stages > 1:
        needed.add(INDEX_FILE)
    if missing := needed - note.files.keys():
        return f"it does not name {min(missing)}"
    if strange := note.files.keys() - needed - MODEL_FILES - {f"training/{RECIPE_FILE}"}:
        return f"it names {min(strange)[:80]!r}"
    return None
