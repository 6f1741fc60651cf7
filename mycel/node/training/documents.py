"""The text of files, document by document, and never more of it in memory than a document and a few pieces.

Knows text, JSON lines, Parquet, Hugging Face dataset directories, and the help topics inside Python; no tokens.

Ring: shell (reads files).
"""

from __future__ import annotations

import codecs
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import msgspec

from mycel.node.blobs import disk_errors
from mycel.node.training.sources import Kind, Source, dataset_shards, python_topics
from mycel.protocols.errors import ConfigError, one_line

__all__ = ["PIECE_CHARS", "Piece", "read_pieces"]

# A longer document is given in pieces: no book is too large for a tokenizer.
PIECE_CHARS = 1 << 18
MAX_LINE_BYTES = 64 * 2**20
_BLOCK_BYTES = 1 << 20
_ROWS = 64

# Text as it was read, and how many bytes of the source were read by then. A document is one or more of them.
_Chunk = tuple[str, int]


@dataclass(frozen=True, slots=True)
class Piece:
    """A document, or a part of a long one; `ends` where the document does. `done_bytes` of its source are read."""

    text: str
    ends: bool
    done_bytes: int


def read_pieces(source: Source) -> Iterator[Piece]:
    """Every document of a source that is not empty, in order.

    Raises ConfigError that names file and line (or row) where no text can be read: no such field, not text, not UTF-8.
    """
    for document in _READERS[source.kind](source):
        yield from _pieces(document)


def _pieces(document: Iterable[_Chunk]) -> Iterator[Piece]:
    """The same pieces of the same document, whatever chunks it came in."""
    held, done_bytes = "", 0
    for chunk, done_bytes in document:
        held += chunk
        start = 0
        while len(held) - start > PIECE_CHARS:
            cut = _cut(held, start)
            yield Piece(held[start:cut], False, done_bytes)
            start = cut
        held = held[start:]
    if held:
        yield Piece(held, True, done_bytes)


def _cut(text: str, start: int) -> int:
    """Where the piece at `start` ends: before a line, or else a word, so that tokens stay what they are."""
    end = start + PIECE_CHARS
    for space in "\n ":
        if (at := text.rfind(space, start + 1, end + 1)) > 0:
            return at
    return end


# ---- one reader for each kind


def _read_topics(_source: Source) -> Iterator[Iterable[_Chunk]]:
    done_bytes = 0
    for _, text in sorted(python_topics().items()):
        done_bytes += len(text.encode())
        yield [(text, done_bytes)]


def _read_text(source: Source) -> Iterator[Iterable[_Chunk]]:
    yield _decoded(_path(source))


def _decoded(path: Path) -> Iterator[_Chunk]:
    decoder, line, done_bytes = codecs.getincrementaldecoder("utf-8-sig")(), 1, 0
    try:
        with disk_errors("read", path), path.open("rb", buffering=0) as file:
            while block := file.read(_BLOCK_BYTES):
                text = decoder.decode(block)
                done_bytes += len(block)
                yield text, done_bytes
                line += text.count("\n")
            yield decoder.decode(b"", final=True), done_bytes
    except UnicodeDecodeError as error:
        line += error.object[: error.start].count(b"\n")
        raise ConfigError(f"{path}, line {line}: not valid UTF-8") from None


def _read_jsonl(source: Source) -> Iterator[Iterable[_Chunk]]:
    path, number, done_bytes = _path(source), 0, 0
    with disk_errors("read", path), path.open("rb") as file:
        while line := file.readline(MAX_LINE_BYTES + 1):
            number += 1
            done_bytes += len(line)
            if len(line) > MAX_LINE_BYTES:
                raise ConfigError(f"{path}, line {number}: longer than {MAX_LINE_BYTES // 2**20} MiB")
            if number == 1:
                line = line.removeprefix(codecs.BOM_UTF8)
            if line.strip():
                yield [(_row_text(line, source.field, f"{path}, line {number}"), done_bytes)]


def _row_text(line: bytes, field: str, place: str) -> str:
    try:
        row = msgspec.json.decode(line)
    except UnicodeDecodeError:
        raise ConfigError(f"{place}: not valid UTF-8") from None
    except (msgspec.MsgspecError, RecursionError):
        raise ConfigError(f"{place}: not valid JSON") from None
    if not isinstance(row, dict) or field not in row:
        raise ConfigError(f"{place}: no field {one_line(field)!r}: data.field says where the text is")
    return _checked(row[field], field, place)


def _read_parquet(source: Source) -> Iterator[Iterable[_Chunk]]:
    parquet, path = _pyarrow("pyarrow.parquet"), _path(source)
    row = 0
    with _arrow_errors(path), parquet.ParquetFile(path, memory_map=True) as file:
        _column(file.schema_arrow, source.field, path)
        n_rows = file.metadata.num_rows
        for batch in file.iter_batches(batch_size=_ROWS, columns=[source.field], use_threads=False):
            for text in _texts(batch.column(0), source.field, path, row):
                row += 1
                yield [(text, source.size_bytes * row // n_rows)]


def _read_dataset(source: Source) -> Iterator[Iterable[_Chunk]]:
    arrow, ipc = _pyarrow("pyarrow"), _pyarrow("pyarrow.ipc")
    before_bytes = 0
    for path in dataset_shards(_path(source)):
        row = 0
        with _arrow_errors(path), arrow.memory_map(str(path)) as mapped:
            for batch in _record_batches(ipc, mapped):
                column = batch.column(_column(batch.schema, source.field, path))
                for text in _texts(column, source.field, path, row):
                    row += 1
                    yield [(text, before_bytes + mapped.tell())]
            before_bytes += mapped.size()


def _record_batches(ipc: Any, mapped: Any) -> Iterator[Any]:
    """Of a stream, as the datasets library writes it, or of an Arrow file, which says what it is."""
    is_file = mapped.read(6) == b"ARROW1"
    mapped.seek(0)
    if not is_file:
        yield from ipc.open_stream(mapped)
        return
    file = ipc.open_file(mapped)
    for index in range(file.num_record_batches):
        yield file.get_batch(index)


def _column(schema: Any, field: str, path: Path) -> int:
    index: int = schema.get_field_index(field)
    if index < 0:
        known = one_line(", ".join(schema.names))[:160]
        raise ConfigError(f"{path}: no field {one_line(field)!r}: data.field says where the text is (there is {known})")
    return index


def _texts(column: Any, field: str, path: Path, row: int) -> Iterator[str]:
    """The texts of a column, after `row` rows."""
    for number, value in enumerate(column, row + 1):
        try:
            text = value.as_py()
        except UnicodeDecodeError:
            raise ConfigError(f"{path}, row {number}: not valid UTF-8") from None
        yield _checked(text, field, f"{path}, row {number}")


def _checked(value: object, field: str, place: str) -> str:
    if not isinstance(value, str):
        raise ConfigError(f"{place}: {one_line(field)!r} is {'empty' if value is None else 'not text'}")
    return value


def _path(source: Source) -> Path:
    assert source.path is not None, "only the help topics have no path"
    return source.path


def _pyarrow(module: str) -> Any:
    try:
        return import_module(module)
    except ImportError:
        raise ConfigError('Parquet and dataset directories need pyarrow: pip install "mycel[train]"') from None


@contextmanager
def _arrow_errors(path: Path) -> Iterator[None]:
    """What pyarrow says of a damaged file, as one line."""
    lib = _pyarrow("pyarrow.lib")
    try:
        yield
    except (lib.ArrowException, OSError) as error:
        reason = getattr(error, "strerror", None) or one_line(" ".join(str(error).split()))[:160]
        raise ConfigError(f"cannot read {path}: {reason}") from None


_READERS: dict[Kind, Callable[[Source], Iterator[Iterable[_Chunk]]]] = {
    "text": _read_text,
    "jsonl": _read_jsonl,
    "parquet": _read_parquet,
    "dataset": _read_dataset,
    "python-topics": _read_topics,
}
