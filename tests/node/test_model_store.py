"""The model store: digests, blobs served from where they lie, and units that are whole and verified or not there."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import pytest
import safetensors.torch
import torch

from mycel.node import blobs, model_info, model_manifest, partial
from mycel.node.model_info import inspect_model, span_tensors
from mycel.node.model_store import ModelStore, build_manifest
from mycel.node.span import Span
from mycel.node.stored_weights import is_stored, stored_entries
from mycel.protocols.errors import ConfigError, LocalProtocolError
from mycel.security.identity import Identity
from mycel.swarm.manifest import (
    CHUNK_BYTES,
    Manifest,
    decode_manifest,
    manifest_bytes,
    sign_manifest,
    split_chunk_list,
    swarm_id,
    unit_names,
)
from tests.tiny_models import make_tiny_model, make_tiny_tokenizer

N_BLOCKS = 3
FOUNDER = Identity.from_seed(bytes(32))


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model directory with a tokenizer, its blocks three chunks each. Tests that change it make a copy."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    return make_tiny_tokenizer(make_tiny_model("llama", folder, n_blocks=N_BLOCKS, intermediate_size=24_000))


@pytest.fixture
def owned(tiny: Path, tmp_path: Path) -> tuple[Manifest, ModelStore]:
    """The manifest, and the store of the node that has the whole model."""
    store = ModelStore(tmp_path / "owner")
    unsigned, index = build_manifest(tiny, store.cache_dir)
    manifest = sign_manifest(unsigned, FOUNDER)
    store.share(manifest, index)
    return manifest, store


@pytest.fixture
def inspects_stored(monkeypatch: pytest.MonkeyPatch) -> None:
    """`inspect_model` takes a stored model's tensors from its manifest."""
    whole = model_info.read_tensor_entries
    monkeypatch.setattr(
        model_info, "read_tensor_entries", lambda path: stored_entries(path) if is_stored(path) else whole(path)
    )


def blob(owner: ModelStore, manifest: Manifest, unit: str) -> bytes:
    spec = manifest.unit(unit)
    return owner.read(swarm_id(manifest), spec.sha256, 0, spec.size_bytes)


def chunk(owner: ModelStore, manifest: Manifest, unit: str, index: int) -> bytes:
    spec = manifest.unit(unit)
    extent = spec.chunk(index)
    return owner.read(swarm_id(manifest), spec.sha256, extent.start, len(extent))


def chunk_list(owner: ModelStore, manifest: Manifest) -> bytes:
    return owner.read(swarm_id(manifest), manifest.chunks, 0, manifest.chunk_list_bytes)


def hashes(owner: ModelStore, manifest: Manifest) -> dict[str, bytes]:
    return split_chunk_list(manifest, chunk_list(owner, manifest))


def fill(target: ModelStore, owner: ModelStore, manifest: Manifest, units: tuple[str, ...]) -> Path:
    """Bring small files and units over by hand."""
    directory = target.save_manifest(manifest)
    for file in target.missing_files(manifest):
        target.save_file(manifest, file, owner.read(swarm_id(manifest), file.sha256, 0, file.size_bytes))
    target.save_chunk_list(manifest, chunk_list(owner, manifest))
    with target.downloading(manifest, units) as folder:
        for unit in units:
            part = folder.unit(manifest.unit(unit), hashes(owner, manifest)[unit])
            for index in sorted(part.missing):
                assert part.keep(index, chunk(owner, manifest, unit, index))
            part.finish()
    return directory


def leftovers(directory: Path) -> list[str]:
    return sorted(str(path.relative_to(directory)) for path in directory.rglob("*") if path.suffix in {".part", ".tmp"})


# ---- manifest and digests


def test_the_manifest_describes_the_directory(tiny: Path, owned: tuple[Manifest, ModelStore]) -> None:
    manifest, store = owned
    info = inspect_model(tiny)
    assert decode_manifest(manifest_bytes(manifest)) == manifest
    assert tuple(unit.name for unit in manifest.units) == unit_names(N_BLOCKS)
    assert [unit.size_bytes for unit in manifest.units] == [info.embed_bytes, *info.block_bytes, info.head_bytes]
    assert {"config.json", "tokenizer.json"} <= {file.name for file in manifest.files}
    assert all(hashlib.sha256((tiny / file.name).read_bytes()).digest() == file.sha256 for file in manifest.files)
    tensors = safetensors.torch.load_file(tiny / "model.safetensors")
    for unit in manifest.units:
        raw = b"".join(tensors[tensor.name].numpy().tobytes() for tensor in unit.tensors)
        assert blob(store, manifest, unit.name) == raw
        own = b"".join(hashlib.sha256(raw[at : at + 2**20]).digest() for at in range(0, len(raw), 2**20))
        assert hashes(store, manifest)[unit.name] == own
        assert hashlib.sha256(own).digest() == unit.sha256
    assert manifest.unit("block.0").n_chunks == 9
    assert (manifest.founder, manifest.name, manifest.source) == (FOUNDER.peer_id, "tiny", "")


def test_a_copy_of_a_repository_has_its_name_and_says_where_it_came_from(tiny: Path, tmp_path: Path) -> None:
    manifest, _ = build_manifest(tiny, tmp_path, source="org/Tiny-1B@0123abc")
    assert (manifest.name, manifest.source) == ("Tiny-1B", "org/Tiny-1B@0123abc")
    with pytest.raises(ConfigError, match="cannot be shared: manifest refused"):
        build_manifest(tiny, tmp_path, source="org/Tiny-1B")


def test_the_swarm_does_not_depend_on_how_the_files_are_cut(tiny: Path, tmp_path: Path) -> None:
    fields = {"n_blocks": N_BLOCKS, "intermediate_size": 24_000}
    sharded = make_tiny_model("llama", tmp_path / "x" / "tiny", max_shard_size="4MB", **fields)
    make_tiny_tokenizer(sharded)
    assert len(list(sharded.glob("*.safetensors"))) > 2
    assert build_manifest(sharded, tmp_path)[0] == build_manifest(tiny, tmp_path)[0]


def test_one_changed_weight_makes_another_swarm(tiny: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(tiny, tmp_path / "tiny")
    before, _ = build_manifest(copy, tmp_path / "cache")
    data = bytearray((copy / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (copy / "model.safetensors").write_bytes(data)
    after, _ = build_manifest(copy, tmp_path / "cache")
    changed = [old.name for old, new in zip(before.units, after.units, strict=True) if old != new]
    assert len(changed) == 1
    assert swarm_id(before) != swarm_id(after)


def test_digests_are_remembered_until_a_file_changes(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = shutil.copytree(tiny, tmp_path / "tiny")
    first, _ = build_manifest(copy, tmp_path / "cache")
    hashed: list[blobs.Blob] = []
    real = model_manifest.hash_blob
    monkeypatch.setattr(model_manifest, "hash_blob", lambda blob, size: hashed.append(blob) or real(blob, size))
    assert build_manifest(copy, tmp_path / "cache")[0] == first
    assert not hashed
    os.utime(copy / "config.json", ns=(1, 1))
    assert build_manifest(copy, tmp_path / "cache")[0] == first
    assert [blob.ranges[0].path.name for blob in hashed] == ["config.json"]
    (cache,) = (tmp_path / "cache" / "digests").iterdir()
    cache.write_bytes(cache.read_bytes()[:-5])
    assert build_manifest(copy, tmp_path / "cache")[0] == first


def test_a_file_that_changes_while_it_is_hashed_is_noticed(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = shutil.copytree(tiny, tmp_path / "tiny")
    real = model_manifest.hash_blob

    def hash_and_touch(part: blobs.Blob, chunk_bytes: int) -> bytes:
        os.utime(part.ranges[0].path, ns=(1, 1))
        return real(part, chunk_bytes)

    monkeypatch.setattr(model_manifest, "hash_blob", hash_and_touch)
    with pytest.raises(ConfigError, match="changed while it was read"):
        build_manifest(copy, tmp_path / "cache")


def test_progress_ends_with_everything(tiny: Path, tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    manifest, _ = build_manifest(tiny, tmp_path, on_progress=lambda done, total: seen.append((done, total)))
    total = sum(unit.size_bytes for unit in manifest.units) + sum(file.size_bytes for file in manifest.files)
    assert seen[-1] == (total, total)
    assert seen == sorted(seen)


@pytest.mark.parametrize("damage", ["cut", "header", "gone"])
def test_a_damaged_model_gives_one_line(tiny: Path, tmp_path: Path, damage: str) -> None:
    copy = shutil.copytree(tiny, tmp_path / "tiny")
    weights = copy / "model.safetensors"
    if damage == "cut":
        os.truncate(weights, weights.stat().st_size - 100)
    elif damage == "header":
        weights.write_bytes(b"\xff" * 8 + weights.read_bytes()[8:])
    else:
        weights.unlink()
    with pytest.raises(ConfigError) as caught:
        build_manifest(copy, tmp_path / "cache")
    assert "\n" not in str(caught.value)


def test_a_strange_directory_name_becomes_a_plain_one(tiny: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(tiny, tmp_path / "..modèle\n(1)")
    assert build_manifest(copy, tmp_path / "cache")[0].name == "mod-le--1-"


# ---- reading


def test_any_piece_of_a_blob_is_what_lies_there(owned: tuple[Manifest, ModelStore]) -> None:
    manifest, store = owned
    for unit in manifest.units:
        whole = blob(store, manifest, unit.name)
        for start, end in ((0, 1), (1, 1000), (unit.size_bytes - 1, unit.size_bytes), (3, unit.size_bytes - 3)):
            assert store.read(swarm_id(manifest), unit.sha256, start, end - start) == whole[start:end]


def test_what_is_not_in_a_blob_is_refused(owned: tuple[Manifest, ModelStore]) -> None:
    manifest, store = owned
    unit = manifest.unit("head")
    for offset, size_bytes in ((unit.size_bytes, 1), (0, unit.size_bytes + 1), (-1, 1), (2**50, 1 << 20)):
        with pytest.raises(ConfigError, match="not in a blob"):
            store.read(swarm_id(manifest), unit.sha256, offset, size_bytes)


def test_a_model_that_changes_underneath_is_not_served_as_the_old_one(tiny: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(tiny, tmp_path / "tiny")
    manifest, index = build_manifest(copy, tmp_path / "cache")
    store = ModelStore(tmp_path / "cache")
    store.share(manifest, index)
    os.utime(copy / "model.safetensors", ns=(1, 1))
    with pytest.raises(ConfigError, match="has changed"):
        blob(store, manifest, "block.0")


def test_only_shared_swarms_can_be_read(owned: tuple[Manifest, ModelStore], tmp_path: Path) -> None:
    manifest, owner = owned
    store = ModelStore(tmp_path / "joiner")
    fill(store, owner, manifest, ("block.1",))
    again = ModelStore(tmp_path / "joiner")
    assert again.shared_manifest(swarm_id(manifest)) is None
    assert not again.has(swarm_id(manifest), manifest.unit("block.1").sha256)
    again.share(manifest)
    assert again.shared_manifest(swarm_id(manifest)) == manifest_bytes(manifest)
    assert blob(again, manifest, "block.1") == blob(owner, manifest, "block.1")
    assert not again.has(swarm_id(manifest), manifest.unit("block.0").sha256)
    assert all(again.has(swarm_id(manifest), file.sha256) for file in manifest.files)


# ---- the stored model


@pytest.mark.usefixtures("inspects_stored")
def test_a_span_loads_from_a_store_that_lacks_the_rest(
    tiny: Path, owned: tuple[Manifest, ModelStore], tmp_path: Path
) -> None:
    manifest, owner = owned
    store = ModelStore(tmp_path / "joiner")
    units = tuple(span_tensors(inspect_model(tiny), 1, N_BLOCKS))
    assert units == ("block.1", "block.2", "head")
    directory = fill(store, owner, manifest, units)
    assert store.missing_units(manifest, unit_names(N_BLOCKS)) == ("embed", "block.0")
    hidden = torch.randn(5, 32, generator=torch.Generator().manual_seed(0))
    outputs = []
    for source in (tiny, directory):
        span = Span.load(source, 1, N_BLOCKS)
        outputs.append(span.logits(span.forward(hidden, span.new_cache())))
    assert torch.equal(*outputs)
    with pytest.raises(ConfigError):
        Span.load(directory, 0, 1)


@pytest.mark.usefixtures("inspects_stored")
def test_a_model_without_weights_can_be_inspected_before_the_download(
    tiny: Path, owned: tuple[Manifest, ModelStore], tmp_path: Path
) -> None:
    manifest, owner = owned
    directory = fill(ModelStore(tmp_path / "joiner"), owner, manifest, ())
    ours, theirs = inspect_model(directory), inspect_model(tiny)
    assert (ours.embed_bytes, ours.block_bytes, ours.head_bytes) == (
        theirs.embed_bytes,
        theirs.block_bytes,
        theirs.head_bytes,
    )
    assert ours.kv_bytes_per_token == theirs.kv_bytes_per_token


def test_stored_files_are_plain_safetensors(tiny: Path, owned: tuple[Manifest, ModelStore], tmp_path: Path) -> None:
    manifest, owner = owned
    directory = fill(ModelStore(tmp_path / "joiner"), owner, manifest, unit_names(N_BLOCKS))
    expected = safetensors.torch.load_file(tiny / "model.safetensors")
    loaded: dict[str, torch.Tensor] = {}
    for path in directory.glob("*.safetensors"):
        loaded |= safetensors.torch.load_file(path)
    assert loaded.keys() == expected.keys()
    assert all(torch.equal(loaded[name], expected[name]) for name in expected)
    for entry in stored_entries(directory).values():
        raw = entry.file.read_bytes()[entry.offset : entry.offset + entry.size_bytes]
        assert raw == expected[entry.name].numpy().tobytes()


def test_a_store_of_the_first_version_is_refused_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "manifest.mycel").write_bytes(bytes.fromhex("9b01") + b"the rest of an old manifest")
    with pytest.raises(ConfigError, match="version 1; this Mycel knows version 2") as caught:
        stored_entries(tmp_path)
    assert "\n" not in str(caught.value)


def test_the_chunk_list_is_kept_checked_and_shared(owned: tuple[Manifest, ModelStore], tmp_path: Path) -> None:
    manifest, owner = owned
    store = ModelStore(tmp_path / "joiner")
    directory = store.save_manifest(manifest)
    assert store.chunk_list(manifest) is None
    with pytest.raises(LocalProtocolError):
        store.save_chunk_list(manifest, b"wrong")
    data = chunk_list(owner, manifest)
    store.save_chunk_list(manifest, data)
    assert store.chunk_list(manifest) == hashes(owner, manifest)
    store.share(manifest)
    assert chunk_list(store, manifest) == data
    (directory / "chunks.mycel").write_bytes(bytes(len(data)))
    assert store.chunk_list(manifest) is None


def test_a_damaged_manifest_counts_as_missing(owned: tuple[Manifest, ModelStore], tmp_path: Path) -> None:
    manifest, _ = owned
    store = ModelStore(tmp_path / "joiner")
    assert store.manifest(swarm_id(manifest)) is None
    directory = store.save_manifest(manifest)
    assert store.manifest(swarm_id(manifest)) == manifest
    (directory / "manifest.mycel").write_bytes(manifest_bytes(manifest)[:-1])
    assert store.manifest(swarm_id(manifest)) is None
    with pytest.raises(ConfigError, match="damaged"):
        stored_entries(directory)


def test_a_small_file_with_wrong_bytes_is_not_stored(owned: tuple[Manifest, ModelStore], tmp_path: Path) -> None:
    manifest, _ = owned
    store = ModelStore(tmp_path / "joiner")
    with pytest.raises(LocalProtocolError):
        store.save_file(manifest, manifest.files[0], b"wrong")
    assert store.missing_files(manifest) == manifest.files


# ---- arriving units


@contextlib.contextmanager
def arriving(store: ModelStore, owned: tuple[Manifest, ModelStore], unit: str) -> Iterator[partial.PartialUnit]:
    manifest, owner = owned
    with store.downloading(manifest, (unit,)) as folder:
        yield folder.unit(manifest.unit(unit), hashes(owner, manifest)[unit])


def test_an_interrupted_unit_is_resumed_chunk_by_chunk_and_leaves_nothing(
    owned: tuple[Manifest, ModelStore], tmp_path: Path
) -> None:
    manifest, owner = owned
    store = ModelStore(tmp_path / "joiner")
    directory = store.save_manifest(manifest)
    with arriving(store, owned, "block.0") as part:
        for index in (1, 8, 4):
            assert part.keep(index, chunk(owner, manifest, "block.0", index))
    assert leftovers(directory) == ["partial/0/block.0.part"]
    assert store.missing_units(manifest, ("block.0",)) == ("block.0",)
    with arriving(store, owned, "block.0") as part:
        assert part.missing == {0, 2, 3, 5, 6, 7}
        for index in (7, 6, 5, 3, 2, 0):
            assert part.keep(index, chunk(owner, manifest, "block.0", index))
        part.finish()
        part.finish()
        assert part.keep(0, chunk(owner, manifest, "block.0", 0))  # from a second source, too late
    assert store.missing_units(manifest, ("block.0",)) == ()
    assert not (directory / "partial").exists()
    store.share(manifest)
    assert blob(store, manifest, "block.0") == blob(owner, manifest, "block.0")


def test_wrong_bytes_are_never_written(owned: tuple[Manifest, ModelStore], tmp_path: Path) -> None:
    manifest, owner = owned
    store = ModelStore(tmp_path / "joiner")
    directory = store.save_manifest(manifest)
    right = chunk(owner, manifest, "block.0", 0)
    with arriving(store, owned, "block.0") as part:
        for wrong in (bytes([right[0] ^ 1]) + right[1:], right[:-1], b"", chunk(owner, manifest, "block.0", 1)):
            assert not part.keep(0, wrong)
        assert leftovers(directory) == []
        assert part.keep(0, right)
        assert not part.keep(1, right)
        with pytest.raises(LocalProtocolError, match="8 chunks are missing"):
            part.finish()
        assert not (directory / "block.0.safetensors").exists()


def test_what_a_torn_write_or_a_worn_disk_left_does_not_count(
    owned: tuple[Manifest, ModelStore], tmp_path: Path
) -> None:
    manifest, owner = owned
    store = ModelStore(tmp_path / "joiner")
    directory = store.save_manifest(manifest)
    with arriving(store, owned, "block.0") as part:
        for index in range(6):
            assert part.keep(index, chunk(owner, manifest, "block.0", index))
    (path,) = directory.rglob("*.part")
    os.truncate(path, path.stat().st_size - 1000)  # chunk 5 was being written
    with path.open("r+b") as file:
        file.seek(path.stat().st_size - 3 * CHUNK_BYTES)
        file.write(b"worn")  # in chunk 3, of which chunk 2 has a part behind this place
    with arriving(store, owned, "block.0") as part:
        assert part.missing == {2, 5, 6, 7, 8}


def test_a_part_with_a_foreign_beginning_is_thrown_away(owned: tuple[Manifest, ModelStore], tmp_path: Path) -> None:
    manifest, owner = owned
    store = ModelStore(tmp_path / "joiner")
    folder = store.save_manifest(manifest) / "partial" / "0"
    for junk in (b"", b"junk", bytes(10**6), bytes(10**7)):
        folder.mkdir(parents=True)
        (folder / "block.0.part").write_bytes(junk)
        with arriving(store, owned, "block.0") as part:
            assert len(part.missing) == 9
    with arriving(store, owned, "block.0") as part:
        for index in sorted(part.missing):
            assert part.keep(index, chunk(owner, manifest, "block.0", index))
        part.finish()


def test_parts_of_units_that_are_not_wanted_any_more_are_removed(
    owned: tuple[Manifest, ModelStore], tmp_path: Path
) -> None:
    manifest, owner = owned
    store = ModelStore(tmp_path / "joiner")
    directory = store.save_manifest(manifest)
    with arriving(store, owned, "block.0") as part:
        assert part.keep(0, chunk(owner, manifest, "block.0", 0))
    with store.downloading(manifest, ("block.1",)):
        assert leftovers(directory) == []
    assert not (directory / "partial").exists()


def test_two_downloads_of_one_unit_do_not_meet(owned: tuple[Manifest, ModelStore], tmp_path: Path) -> None:
    manifest, owner = owned
    one, two = ModelStore(tmp_path / "joiner"), ModelStore(tmp_path / "joiner")
    directory = one.save_manifest(manifest)
    whole = blob(owner, manifest, "block.0")
    with arriving(one, owned, "block.0") as first, arriving(two, owned, "block.0") as second:
        for index in range(9):
            assert first.keep(index, chunk(owner, manifest, "block.0", index))
            assert second.keep(index, chunk(owner, manifest, "block.0", index))
        first.finish()
        two.share(manifest)
        second.finish()
        assert blob(two, manifest, "block.0") == whole
    assert safetensors.torch.load_file(directory / "block.0.safetensors")
    assert not (directory / "partial").exists()


CRASH = """
import sys
from pathlib import Path
from mycel.node.model_store import ModelStore
store = ModelStore(Path(sys.argv[1]))
manifest = store.manifest(bytes.fromhex(sys.argv[2]))
with store.downloading(manifest, ("block.0",)) as folder:
    part = folder.unit(manifest.unit("block.0"), store.chunk_list(manifest)["block.0"])
    for index in range(2):
        assert part.keep(index, sys.stdin.buffer.read(2**20))
    print("half", flush=True)
    sys.stdin.buffer.read()
"""


@pytest.mark.loopback
@pytest.mark.skipif(sys.platform == "win32", reason="needs SIGKILL")
def test_what_a_killed_process_left_is_taken_over_and_what_a_living_one_writes_is_not(
    owned: tuple[Manifest, ModelStore], tmp_path: Path
) -> None:
    manifest, owner = owned
    store = ModelStore(tmp_path / "joiner")
    directory = store.save_manifest(manifest)
    store.save_chunk_list(manifest, chunk_list(owner, manifest))
    arguments = [sys.executable, "-c", CRASH, str(tmp_path / "joiner"), swarm_id(manifest).hex()]
    with subprocess.Popen(arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(blob(owner, manifest, "block.0")[: 2 * CHUNK_BYTES])
        process.stdin.flush()
        assert process.stdout.readline() == b"half\n"
        with arriving(store, owned, "block.0") as part:
            assert len(part.missing) == 9  # the other one lives, so this is a folder of our own
            assert part.keep(8, chunk(owner, manifest, "block.0", 8))
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert not (directory / "block.0.safetensors").exists()
    assert leftovers(directory) == ["partial/0/block.0.part", "partial/1/block.0.part"]
    with arriving(store, owned, "block.0") as part:
        assert part.missing == set(range(2, 9))  # the fuller of the two, though not the longer one
        assert leftovers(directory) == ["partial/0/block.0.part"]
        for index in sorted(part.missing):
            assert part.keep(index, chunk(owner, manifest, "block.0", index))
        part.finish()
    assert not (directory / "partial").exists()


def test_a_lock_that_was_removed_before_it_was_taken_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = partial._try_lock

    def taken_just_after_its_owner_left(file: BinaryIO) -> bool:
        (tmp_path / "lock").unlink()
        return real(file)

    monkeypatch.setattr(partial, "_try_lock", taken_just_after_its_owner_left)
    assert partial._claim(tmp_path) is None
    monkeypatch.undo()
    lock = partial._claim(tmp_path)
    assert lock is not None
    assert partial._claim(tmp_path) is None
    lock.close()


# ---- the disk


def test_too_little_disk_is_said_before_anything_is_written(
    owned: tuple[Manifest, ModelStore], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest, owner = owned
    store = ModelStore(tmp_path / "joiner")
    size_bytes = manifest.unit("block.0").size_bytes
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=64 * 2**20 + size_bytes))
    assert store.require_space(manifest, ("block.0",)) == size_bytes
    assert not store.cache_dir.exists()
    with pytest.raises(ConfigError, match=r"not enough disk: 2 of the 5 parts of tiny need 0\.086 GB, and 0\.076 GB"):
        store.require_space(manifest, ("block.0", "block.1"))
    fill(store, owner, manifest, ("block.0",))
    assert store.require_space(manifest, ("block.0", "block.1")) == size_bytes
    # what is half here does not have to come again
    with arriving(store, owned, "block.1") as part:
        assert part.keep(5, chunk(owner, manifest, "block.1", 5))  # with a hole before it
    assert abs(store.require_space(manifest, ("block.1",)) - (size_bytes - CHUNK_BYTES)) < 10_000


def test_a_disk_that_is_full_in_the_middle_gives_one_line_and_leaves_nothing(
    owned: tuple[Manifest, ModelStore], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest, owner = owned
    store = ModelStore(tmp_path / "joiner")
    directory = store.save_manifest(manifest)
    real = partial._write_all

    def full(file: object, data: bytes) -> None:
        real(file, data[:10])  # type: ignore[arg-type]
        raise OSError(errno.ENOSPC, "No space left on device")

    with arriving(store, owned, "block.0") as part:
        assert part.keep(0, chunk(owner, manifest, "block.0", 0))
        monkeypatch.setattr(partial, "_write_all", full)
        with pytest.raises(ConfigError, match="no space left"):
            part.keep(1, chunk(owner, manifest, "block.0", 1))
    assert leftovers(directory) == []
    assert not (directory / "partial").exists()


def test_atomic_write_leaves_the_old_or_the_new(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "file"
    blobs.atomic_write(target, b"old")

    def broken(_: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "fsync", broken)
    with pytest.raises(ConfigError, match="Input/output error"):
        blobs.atomic_write(target, b"new")
    assert target.read_bytes() == b"old"
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write anywhere")
def test_a_cache_that_cannot_be_written_gives_one_line(tiny: Path, tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(ConfigError, match="cannot write"):
        build_manifest(tiny, tmp_path / "cache")
