"""Which files a recipe's data part names, of what kind each is, and whether one has changed since.

Ring: shell (looks at files).
"""

from __future__ import annotations

import glob
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import msgspec

from mycel.node.blobs import disk_errors
from mycel.protocols.errors import ConfigError, one_line
from mycel.swarm.training.recipe import DataPart

__all__ = ["Kind", "Source", "check_unchanged", "dataset_shards", "find_sources", "python_topics", "total_bytes"]

Kind = Literal["text", "jsonl", "parquet", "dataset", "python-topics"]

_SUFFIXES: dict[str, Kind] = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".parquet": "parquet",
    ".text": "text",
    ".txt": "text",
    ".md": "text",
    ".rst": "text",
}
# A dataset directory has the one, a directory of several of them the other.
_STATE, _SPLITS = "state.json", "dataset_dict.json"


@dataclass(frozen=True, slots=True)
class Source:
    """A file, a dataset directory, or (`path` is None) the help topics. `field` is where rows have their text.

    `stamp` differs when the content does: places, sizes and times of its files, or a hash.
    """

    kind: Kind
    path: Path | None
    field: str
    size_bytes: int
    stamp: tuple[str | int, ...]


def find_sources(part: DataPart, base: Path) -> tuple[Source, ...]:
    """What the data part of a recipe names, in an order that names alone decide; `base` is where the recipe lies.

    Raises ConfigError for a name or pattern without a file, and for a file whose kind cannot be told.
    """
    if part.kind == "python-topics":
        text = "\0".join(f"{name}\0{text}" for name, text in sorted(python_topics().items())).encode()
        return (Source("python-topics", None, part.field, len(text), (hashlib.sha256(text).hexdigest(),)),)
    found: dict[Path, Path] = {}
    for pattern in part.files:
        with disk_errors("read", base):
            for path in _matches(Path(pattern).expanduser(), base, part.kind):
                found.setdefault(path.resolve(), path)
    return tuple(_source(path, part) for path in found.values())


def check_unchanged(source: Source) -> None:
    """Raises ConfigError if a file of `source` is not the one it was when it was found."""
    if source.path is not None and _source(source.path, DataPart(kind=source.kind)).stamp != source.stamp:
        raise ConfigError(f"{source.path} changed while it was read: try again when nothing writes to it")


def total_bytes(sources: Sequence[Source]) -> int:
    """What there is to read, on disk."""
    return sum(source.size_bytes for source in sources)


def python_topics() -> dict[str, str]:
    """The texts behind Python's own `help("for")`."""
    from pydoc_data.topics import topics

    return topics


def _matches(pattern: Path, base: Path, kind: str) -> list[Path]:
    found = [base / pattern]
    if not found[0].exists():
        whole = pattern if pattern.is_absolute() else Path(glob.escape(str(base))) / pattern
        # Path.glob would enter hidden folders.
        found = [Path(path) for path in glob.glob(str(whole), recursive=True)]  # noqa: PTH207
    files = [file for path in sorted(found, key=Path.as_posix) for file in _files(path, kind)]
    if not files:
        what = "text file" if kind == "auto" else f"{kind} file"
        raise ConfigError(f"data.files: there is no {what} {one_line(str(pattern))!r}, seen from {base}")
    return files


def _files(path: Path, kind: str) -> list[Path]:
    """`path` itself, or what of a directory belongs to `kind` by its name."""
    if not path.is_dir() or kind == "dataset" or (path / _STATE).is_file() or (path / _SPLITS).is_file():
        return [path]
    inside = [
        file
        for file in path.rglob("*")
        if _SUFFIXES.get(file.suffix.lower()) in ({kind} if kind != "auto" else _SUFFIXES.values())
        and not any(part.startswith(".") for part in file.relative_to(path).parts)
        and file.is_file()
    ]
    return sorted(inside, key=Path.as_posix)


def _source(path: Path, part: DataPart) -> Source:
    kind = _kind(path) if part.kind == "auto" else part.kind
    if kind != "dataset" and path.is_dir():
        raise ConfigError(f"{path} is a directory, not a {kind} file")
    with disk_errors("read", path):
        states = [(file.resolve(), file.stat()) for file in (dataset_shards(path) if kind == "dataset" else (path,))]
    stamp = tuple(item for file, at in states for item in (str(file), at.st_size, at.st_mtime_ns, at.st_ino))
    return Source(kind, path, part.field, sum(at.st_size for _, at in states), stamp)


def _kind(path: Path) -> Kind:
    if path.is_dir():
        return "dataset"
    kind = _SUFFIXES.get(path.suffix.lower())
    if kind is None:
        raise ConfigError(f"{path}: its name does not say of what kind it is: say data.kind")
    return kind


def dataset_shards(directory: Path) -> tuple[Path, ...]:
    """The Arrow files of a Hugging Face dataset directory, in its order.

    Raises ConfigError if `directory` is none, or one of several parts.
    """
    if (directory / _SPLITS).is_file():
        splits = _json(directory / _SPLITS).get("splits")
        named = one_line(", ".join(map(str, splits)))[:160] if isinstance(splits, list) else "none is listed"
        raise ConfigError(f"{directory} has several parts ({named}): name the one to train on, {directory.name}/PART")
    if not (directory / _STATE).is_file():
        raise ConfigError(f"{directory} is not a dataset directory: it has no {_STATE}")
    state = _json(directory / _STATE)
    if state.get("_indices_data_files") or state.get("_indices_files"):
        raise ConfigError(f"{directory} is a selection of rows of another dataset: write it with flatten_indices()")
    listed = state.get("_data_files")
    items = listed if isinstance(listed, list) else []
    names = [item.get("filename") if isinstance(item, dict) else None for item in items]
    # File names only: the list must not lead out of the directory.
    if not names or not all(isinstance(name, str) and name and Path(name).name == name for name in names):
        raise ConfigError(f"{directory / _STATE} is damaged: it does not list its data files")
    return tuple(directory / str(name) for name in names)


def _json(path: Path) -> dict[str, Any]:
    with disk_errors("read", path):
        data = path.read_bytes()
    try:
        return msgspec.json.decode(data, type=dict[str, Any])
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        raise ConfigError(f"{path} is damaged: not a JSON object") from None
