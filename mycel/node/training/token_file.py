"""Text becomes one file of tokens, once: a run's documents in order, each framed by the tokens that part texts.

    CACHE/tokens/<key>.tokens     little-endian, 2 bytes a token, or 4 for a vocabulary of more than 65,536
    CACHE/tokens/<key>.json       how many they are and their fingerprint; written last

The key says what went in (files by size and time, tokenizer, settings), the fingerprint what came out. Several nodes of
a machine may share the folder: one makes the file, the others wait for it. Knows no windows.

Ring: shell (reads and writes files).
"""

from __future__ import annotations

import array
import contextlib
import hashlib
import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import msgspec
from tokenizers import Tokenizer

from mycel.node.blobs import atomic_write, disk_errors
from mycel.node.text import TextCodec
from mycel.node.training.documents import PIECE_CHARS, Piece, read_pieces
from mycel.node.training.sources import Source, check_unchanged, total_bytes
from mycel.node.weights_map import read_json
from mycel.protocols.errors import ConfigError, one_line

__all__ = ["Framing", "Progress", "TokenFile", "alone", "framing", "make_token_file"]

# called with bytes of text read and bytes in all; may raise to stop
Progress = Callable[[int, int], None]

# Counts up when the same text and tokenizer would give other tokens.
_VERSION = 1
_DOMAIN = b"mycel tokens v1"
# What is given to the tokenizer at a time.
_BATCH_CHARS = 2 * PIECE_CHARS


@dataclass(frozen=True, slots=True)
class TokenFile:
    """`fingerprint` is the SHA-256 of the tokens, in hex: equal on all machines for the same text and tokenizer."""

    path: Path
    n_tokens: int
    width_bytes: int
    fingerprint: str


class _Note(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What stands beside the tokens."""

    n_tokens: int
    width_bytes: int
    fingerprint: str


@dataclass(frozen=True, slots=True)
class Framing:
    """Tokens before and after every document."""

    before: tuple[int, ...]
    after: tuple[int, ...]


def framing(codec: TextCodec, directory: Path) -> Framing:
    """How the model of `directory` tells texts apart.

    A tokenizer that begins every text with BOS begins documents with it, and an EOS ends them; where the two are one
    token, it stands once between documents. Raises ConfigError if the files name neither.
    """
    begin = _special(codec, directory, "bos")
    if begin is not None and codec.encode("a")[:1] != [begin]:
        begin = None
    end = _special(codec, directory, "eos")
    if begin is None and end is None:
        raise ConfigError(f"{directory} names no token that ends a text (eos_token in tokenizer_config.json)")
    before = () if begin is None else (begin,)
    return Framing(before, () if end is None or end == begin else (end,))


def _special(codec: TextCodec, directory: Path, name: str) -> int | None:
    """The id of a special token, as the tokenizer's files or else the model's name it."""
    value = codec.config.get(f"{name}_token")
    text = value.get("content") if isinstance(value, dict) else value
    if isinstance(text, str) and (token := codec.tokenizer.token_to_id(text)) is not None:
        return token
    for file in ("generation_config.json", "config.json"):
        ids = read_json(directory / file).get(f"{name}_token_id") if (directory / file).is_file() else None
        first = ids[0] if isinstance(ids, list) and ids else ids
        if isinstance(first, int) and 0 <= first < codec.tokenizer.get_vocab_size():
            return first
    return None


def make_token_file(
    sources: Sequence[Source],
    codec: TextCodec,
    frame: Framing,
    vocab_size: int,
    cache_dir: Path,
    on_progress: Progress | None = None,
) -> TokenFile:
    """The tokens of all documents, from the cache or made now. Blocks, also while another process makes the same.

    Raises ConfigError for text that cannot be read and for a disk that cannot be written.
    """
    width_bytes = 2 if vocab_size <= 1 << 16 else 4
    tokenizer = Tokenizer.from_str(codec.tokenizer.to_str())
    tokenizer.no_truncation()
    tokenizer.no_padding()
    rules = (_VERSION, PIECE_CHARS, hashlib.sha256(tokenizer.to_str().encode()).hexdigest(), width_bytes)
    inputs = [(source.kind, source.field, source.stamp) for source in sources]
    key = hashlib.sha256(msgspec.json.encode((rules, frame.before, frame.after, inputs))).hexdigest()[:32]
    folder = cache_dir / "tokens"
    with disk_errors("write", folder):
        folder.mkdir(parents=True, exist_ok=True)
    if (found := _cached(folder, key)) is not None:
        return found
    with alone(folder, key) as sure:
        if (found := _cached(folder, key)) is not None:
            return found
        if sure:
            _remove_leftovers(folder, key)
        batches = _batches(sources, on_progress)
        made = _write(folder / f"{key}.tokens", _tokens(tokenizer, frame, batches), width_bytes)
        note = _Note(made.n_tokens, made.width_bytes, made.fingerprint)
        atomic_write(folder / f"{key}.json", msgspec.json.encode(note))
        return made


def _cached(folder: Path, key: str) -> TokenFile | None:
    """What is here, if it is whole; a damaged note counts as missing, for a cache may always be lost."""
    path = folder / f"{key}.tokens"
    try:
        note = msgspec.json.decode((folder / f"{key}.json").read_bytes(), type=_Note)
        whole = path.stat().st_size == note.n_tokens * note.width_bytes
    except (OSError, ValueError, msgspec.MsgspecError):
        return None
    return TokenFile(path, note.n_tokens, note.width_bytes, note.fingerprint) if whole else None


def _batches(sources: Sequence[Source], on_progress: Progress | None) -> Iterator[list[Piece]]:
    """Pieces of all sources, some at a time."""
    batch: list[Piece] = []
    chars = before_bytes = 0
    total = total_bytes(sources)
    for source in sources:
        for piece in read_pieces(source):
            batch.append(piece)
            chars += len(piece.text)
            if chars >= _BATCH_CHARS:
                yield batch
                batch, chars = [], 0
                if on_progress is not None:
                    on_progress(min(before_bytes + piece.done_bytes, total), total)
        check_unchanged(source)
        before_bytes += source.size_bytes
    if batch:
        yield batch
    if on_progress is not None:
        on_progress(total, total)


def _tokens(tokenizer: Tokenizer, frame: Framing, batches: Iterator[list[Piece]]) -> Iterator[list[int]]:
    begins = True
    for batch in batches:
        encoded = _encode(tokenizer, [piece.text for piece in batch])
        ids: list[int] = []
        for piece, one in zip(batch, encoded, strict=True):
            ids += (*(frame.before if begins else ()), *one.ids, *(frame.after if piece.ends else ()))
            begins = piece.ends
        yield ids


def _encode(tokenizer: Tokenizer, texts: list[str]) -> list[Any]:
    try:
        return tokenizer.encode_batch_fast(texts, add_special_tokens=False)
    except BaseException as error:
        # Its Rust code panics on some damaged files, which arrives as an exception that is none of `Exception`.
        if isinstance(error, Exception) or type(error).__name__ == "PanicException":
            raise ConfigError(f"the tokenizer refused the text: {one_line(str(error))[:160]}") from None
        raise


def _write(path: Path, tokens: Iterator[list[int]], width_bytes: int) -> TokenFile:
    """`path`, whole or not at all."""
    digest, n_tokens = hashlib.sha256(_DOMAIN), 0
    with disk_errors("write", path), _temporary(path) as (file, temporary):
        for ids in tokens:
            data = array.array("H" if width_bytes == 2 else "I", ids)
            if sys.byteorder == "big":
                data.byteswap()
            digest.update(data)
            file.write(data)
            n_tokens += len(ids)
        file.flush()
        os.fsync(file.fileno())
        file.close()
        temporary.replace(path)
    return TokenFile(path, n_tokens, width_bytes, digest.hexdigest())


def _remove_leftovers(folder: Path, key: str) -> None:
    """What processes that are no more did not finish."""
    for left in folder.glob(f".{key}.*.tmp"):
        with contextlib.suppress(OSError):
            left.unlink()


@contextlib.contextmanager
def _temporary(path: Path) -> Iterator[tuple[BinaryIO, Path]]:
    descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
    with os.fdopen(descriptor, "wb") as file:
        try:
            yield file, Path(name)
        finally:
            file.close()
            with contextlib.suppress(OSError):
                Path(name).unlink()


@contextlib.contextmanager
def alone(folder: Path, key: str) -> Iterator[bool]:
    """One process at a time makes what `key` names in `folder`; the system frees the lock of one that dies.

    Gives whether that is sure. Windows has no lock that waits: there all who want it make it, and equals replace each
    other.
    """
    if sys.platform == "win32":
        yield False
        return
    import fcntl

    with disk_errors("write", folder), (folder / f".{key}.lock").open("ab") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield True
