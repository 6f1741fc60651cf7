"""The models that this node has downloaded, and what it lets others read.

    CACHE/models/<swarm id>/manifest.mycel, config.json, tokenizer.json, ..., model.safetensors.index.json
    CACHE/models/<swarm id>/chunks.mycel           the hash of every chunk of every unit
    CACHE/models/<swarm id>/<unit>.safetensors     whole and verified, or not there
    CACHE/models/<swarm id>/partial/<n>/           what is still arriving (see partial.py); resumed by the next download

Such a directory is a Hugging Face model directory of which some weights may be missing. Calls block: run them behind a
Compute port. Knows no peer.

Ring: shell (disk).
"""

from __future__ import annotations

import contextlib
import hashlib
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

import msgspec

from mycel.node.blobs import Blob, BlobIndex, atomic_write, disk_errors, read_blob, stored_blob
from mycel.node.model_manifest import build_manifest
from mycel.node.partial import PartialFolder, partial_bytes, partial_folder
from mycel.node.stored_weights import MANIFEST_FILE
from mycel.protocols.errors import ConfigError, LocalProtocolError, RemoteProtocolError
from mycel.swarm.manifest import (
    FileSpec,
    Manifest,
    decode_manifest,
    manifest_bytes,
    split_chunk_list,
    swarm_id,
    unit_header,
)

__all__ = ["BlobIndex", "ModelStore", "build_manifest"]

INDEX_FILE = "model.safetensors.index.json"
CHUNKS_FILE = "chunks.mycel"
# Left free on the disk when a download is planned.
SPARE_BYTES = 64 * 2**20


class ModelStore:
    """The downloaded models under `cache_dir`, and the blobs of the swarms that this process shares."""

    def __init__(self, cache_dir: Path) -> None:
        self.cache_dir = cache_dir
        self._shared: dict[bytes, tuple[bytes, dict[bytes, Blob]]] = {}

    def directory(self, swarm: bytes) -> Path:
        """Where the model of the swarm with this id lies, or would lie."""
        return self.cache_dir / "models" / swarm.hex()

    # ---- what is here

    def manifest(self, swarm: bytes) -> Manifest | None:
        """The manifest if it was stored here; a damaged one counts as missing."""
        try:
            data = (self.directory(swarm) / MANIFEST_FILE).read_bytes()
        except FileNotFoundError:
            return None
        except OSError as error:
            raise ConfigError(f"cannot read {self.directory(swarm)}: {error.strerror}") from None
        if hashlib.sha256(data).digest() != swarm:
            return None
        try:
            return decode_manifest(data)
        except RemoteProtocolError:
            return None

    def save_manifest(self, manifest: Manifest) -> Path:
        """Start a model's directory; its path. The index names every unit's file, there or not."""
        directory = self.directory(swarm_id(manifest))
        weight_map = {tensor.name: f"{unit.name}.safetensors" for unit in manifest.units for tensor in unit.tensors}
        total = sum(unit.size_bytes for unit in manifest.units)
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        atomic_write(directory / INDEX_FILE, msgspec.json.encode(index))
        atomic_write(directory / MANIFEST_FILE, manifest_bytes(manifest))
        return directory

    def missing_files(self, manifest: Manifest) -> tuple[FileSpec, ...]:
        """The small files that are not here."""
        directory = self.directory(swarm_id(manifest))
        return tuple(file for file in manifest.files if not _has_size(directory / file.name, file.size_bytes))

    def save_file(self, manifest: Manifest, file: FileSpec, data: bytes) -> None:
        """Store a small file. Raises LocalProtocolError if `data` is not what the manifest says: check before."""
        if hashlib.sha256(data).digest() != file.sha256:
            raise LocalProtocolError(f"{file.name} does not have the digest of the manifest")
        atomic_write(self.directory(swarm_id(manifest)) / file.name, data)

    def chunk_list(self, manifest: Manifest) -> dict[str, bytes] | None:
        """unit -> the hashes of its chunks, or None if the list is not here or damaged."""
        path = self.directory(swarm_id(manifest)) / CHUNKS_FILE
        try:
            with disk_errors("read", path):
                return split_chunk_list(manifest, path.read_bytes()) if path.is_file() else None
        except RemoteProtocolError:
            return None

    def save_chunk_list(self, manifest: Manifest, data: bytes) -> None:
        """Store the list of all chunks. Raises LocalProtocolError if it is not the manifest's: check before."""
        if hashlib.sha256(data).digest() != manifest.chunks:
            raise LocalProtocolError("the chunk list does not have the digest of the manifest")
        atomic_write(self.directory(swarm_id(manifest)) / CHUNKS_FILE, data)

    def missing_units(self, manifest: Manifest, units: Iterable[str]) -> tuple[str, ...]:
        """Those of `units` whose file is not here. A file with a unit's name was verified before it got the name."""
        directory = self.directory(swarm_id(manifest))
        missing = []
        for name in units:
            unit = manifest.unit(name)
            if not _has_size(directory / f"{name}.safetensors", len(unit_header(unit)) + unit.size_bytes):
                missing.append(name)
        return tuple(missing)

    # ---- what arrives

    def require_space(self, manifest: Manifest, units: Iterable[str]) -> int:
        """The bytes still to download for `units`. Raises ConfigError if the disk has not room for them."""
        directory = self.directory(swarm_id(manifest))
        missing = self.missing_units(manifest, units)
        arrived = partial_bytes(directory)
        todo = sum(max(0, manifest.unit(name).size_bytes - arrived.get(name, 0)) for name in missing)
        place = directory
        while not place.exists():
            place = place.parent
        with disk_errors("measure the disk of", place):
            free = shutil.disk_usage(place).free
        if todo and todo + SPARE_BYTES > free:
            raise ConfigError(
                f"not enough disk: {len(missing)} of the {manifest.n_blocks + 2} parts of {manifest.name} need "
                f"{_gb(todo + SPARE_BYTES)} GB, and {_gb(free)} GB are free at {place}"
            )
        return todo

    @contextlib.contextmanager
    def downloading(self, manifest: Manifest, units: Iterable[str]) -> Iterator[PartialFolder]:
        """A folder for arriving units that no other download uses, with what earlier ones left unfinished of `units`.

        Raises ConfigError if it cannot be written.
        """
        with partial_folder(self.directory(swarm_id(manifest)), frozenset(units)) as folder:
            yield folder

    # ---- what others may read

    def share(self, manifest: Manifest, index: BlobIndex | None = None) -> None:
        """Let peers read this swarm's manifest, the blobs of `index` (`build_manifest`) and all that was downloaded.

        Call again after a download. Swarms that are stored but not shared here are nobody's business.
        """
        swarm = swarm_id(manifest)
        _, blobs = self._shared.get(swarm, (b"", {}))
        self._shared[swarm] = (manifest_bytes(manifest), {**blobs, **self._stored_blobs(manifest), **(index or {})})

    def shared_manifest(self, swarm: bytes) -> bytes | None:
        """The manifest's bytes, or None if the swarm is not shared here."""
        shared = self._shared.get(swarm)
        return shared[0] if shared else None

    def has(self, swarm: bytes, digest: bytes) -> bool:
        """Whether `read` finds this blob."""
        shared = self._shared.get(swarm)
        return shared is not None and digest in shared[1]

    def read(self, swarm: bytes, digest: bytes, offset: int, size_bytes: int) -> bytes:
        """Bytes [offset, offset + size_bytes) of a shared blob.

        Raises KeyError if it is not shared, ConfigError if the range is not in it or its file changed underneath.
        """
        return read_blob(self._shared[swarm][1][digest], offset, size_bytes)

    def _stored_blobs(self, manifest: Manifest) -> dict[bytes, Blob]:
        directory = self.directory(swarm_id(manifest))
        lacking = {file.name for file in self.missing_files(manifest)}
        present = [file for file in manifest.files if file.name not in lacking]
        blobs = {file.sha256: stored_blob(directory / file.name, 0, file.size_bytes) for file in present}
        if _has_size(directory / CHUNKS_FILE, manifest.chunk_list_bytes):
            blobs[manifest.chunks] = stored_blob(directory / CHUNKS_FILE, 0, manifest.chunk_list_bytes)
        absent = set(self.missing_units(manifest, (unit.name for unit in manifest.units)))
        for unit in manifest.units:
            if unit.name not in absent:
                path = directory / f"{unit.name}.safetensors"
                blobs[unit.sha256] = stored_blob(path, len(unit_header(unit)), unit.size_bytes)
        return blobs


def _has_size(path: Path, size_bytes: int) -> bool:
    try:
        return path.stat().st_size == size_bytes
    except FileNotFoundError:
        return False
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from None


def _gb(size_bytes: int) -> str:
    """Gigabytes with the digits that matter."""
    gb = size_bytes / 1e9
    return f"{gb:.1f}" if gb >= 0.1 else f"{gb:.3f}"
