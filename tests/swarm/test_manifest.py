"""The manifest: one encoding, one id, and nothing hostile gets through."""

from __future__ import annotations

import contextlib
import hashlib
import json
import struct

import msgspec
import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given
from hypothesis import strategies as st

from mycel.protocols.errors import RemoteProtocolError
from mycel.security.identity import Identity
from mycel.swarm.manifest import (
    CHUNK_BYTES,
    DTYPES,
    MAX_MANIFEST_BYTES,
    FileSpec,
    Manifest,
    TensorSpec,
    UnitSpec,
    check_unsigned,
    decode_manifest,
    manifest_bytes,
    same_model,
    sign_manifest,
    split_chunk_list,
    swarm_id,
    tensor_order,
    unit_header,
    unit_names,
)

DIGEST = hashlib.sha256(b"x").digest()
FOUNDER = Identity.from_seed(bytes(32))


def unit(name: str, *tensors: TensorSpec) -> UnitSpec:
    ordered = tensor_order(tensors or (TensorSpec(f"{name}.weight", "bfloat16", (4, 8)),))
    return UnitSpec(name, ordered, sum(tensor.size_bytes for tensor in ordered), DIGEST)


def manifest(n_blocks: int = 2, **changes: object) -> Manifest:
    made = Manifest(
        version=2,
        name="tiny",
        founder="",
        source="",
        architecture="llama",
        n_blocks=n_blocks,
        hidden_size=8,
        vocab_size=16,
        dtype="bfloat16",
        max_positions=64,
        eos_token_ids=(1, 2),
        files=(FileSpec("config.json", 3, DIGEST), FileSpec("tokenizer.json", 4, DIGEST)),
        chunks=DIGEST,
        units=tuple(unit(name) for name in unit_names(n_blocks)),
        signature=b"",
    )
    return sign_manifest(msgspec.structs.replace(made, **changes), FOUNDER)


dtypes = st.sampled_from(sorted(DTYPES))
tensor_names = st.from_regex(r"\A[a-z][a-z0-9._]{0,20}\Z")


@st.composite
def manifests(draw: st.DrawFn) -> Manifest:
    n_blocks = draw(st.integers(1, 4))
    units = []
    for position, name in enumerate(unit_names(n_blocks)):
        names = draw(st.lists(tensor_names, min_size=1, max_size=4, unique=True))
        shapes = st.lists(st.integers(0, 5), max_size=3).map(tuple)
        units.append(unit(name, *(TensorSpec(f"u{position}.{n}", draw(dtypes), draw(shapes)) for n in names)))
    return manifest(n_blocks, units=tuple(units), hidden_size=draw(st.integers(1, 99)))


@given(manifests())
def test_a_manifest_survives_its_encoding_and_keeps_its_id(made: Manifest) -> None:
    data = manifest_bytes(made)
    assert decode_manifest(data) == made
    assert decode_manifest(memoryview(data)) == made
    assert swarm_id(made) == hashlib.sha256(data).digest()


@given(st.binary(max_size=300))
def test_any_bytes_are_a_manifest_or_a_remote_protocol_error(data: bytes) -> None:
    try:
        decode_manifest(data)
    except RemoteProtocolError:
        return
    assert manifest_bytes(decode_manifest(data)) == data


@given(st.data())
def test_a_changed_byte_is_refused_or_another_swarm(data: st.DataObject) -> None:
    original = manifest_bytes(manifest())
    at = data.draw(st.integers(0, len(original) - 1))
    changed = original[:at] + bytes([original[at] ^ data.draw(st.integers(1, 255))]) + original[at + 1 :]
    with contextlib.suppress(RemoteProtocolError):
        assert swarm_id(decode_manifest(changed)) != swarm_id(manifest())


def test_a_second_encoding_of_the_same_values_is_refused() -> None:
    data = manifest_bytes(manifest())
    assert data[1] == 2  # the version as a one-byte integer
    with pytest.raises(RemoteProtocolError, match="canonical"):
        decode_manifest(data[:1] + b"\xcc\x02" + data[2:])


def test_a_manifest_over_the_limit_is_refused_before_it_is_read() -> None:
    with pytest.raises(RemoteProtocolError, match="over the limit"):
        decode_manifest(bytes(MAX_MANIFEST_BYTES + 1))


def test_a_short_text_that_promises_four_thousand_million_units_is_refused() -> None:
    lead = manifest_bytes(manifest())[:1]
    with pytest.raises(RemoteProtocolError):
        decode_manifest(lead + b"\x02\xdd" + struct.pack(">I", 2**32 - 1))


T = TensorSpec
FLAWS: list[tuple[dict[str, object], str]] = [
    ({"version": 9}, "version 9"),
    ({"dtype": "float3"}, "unknown dtype"),
    ({"eos_token_ids": (2, 1)}, "eos_token_ids"),
    ({"files": (FileSpec("tokenizer.json", 4, DIGEST), FileSpec("config.json", 3, DIGEST))}, "files are not sorted"),
    ({"files": (FileSpec("config.json", 3, DIGEST),) * 2}, "files are not sorted or not unique"),
    ({"files": (FileSpec("tokenizer.json", 4, DIGEST),)}, "no config.json"),
    ({"units": manifest(3).units}, "units are not those of 2 blocks"),
    ({"units": tuple(unit(name) for name in ("embed", "block.1", "block.0", "head"))}, "in order"),
    ({"units": tuple(unit(name, T("same", "int8", (1,))) for name in unit_names(2))}, "twice"),
    ({"name": "a\x1b[2J"}, "regex"),
    ({"name": "tiny\n"}, "regex"),
    ({"files": (FileSpec("config.json", 2**40, DIGEST),)}, "<="),
    ({"source": "tiny/model"}, "regex"),
    ({"source": "../../etc@main"}, "regex"),
    ({"source": "a/b/c@main"}, "regex"),
    ({"source": "tiny/model@refs/pr/1"}, "regex"),
    ({"units": tuple(unit(name, T("w", "int8", (2**40,))) for name in unit_names(2))}, "<="),
]


@pytest.mark.parametrize(("changes", "reason"), FLAWS, ids=[reason for _, reason in FLAWS])
def test_what_cannot_be_true_is_refused_with_a_reason(changes: dict[str, object], reason: str) -> None:
    with pytest.raises(RemoteProtocolError, match=reason):
        decode_manifest(manifest_bytes(manifest(**changes)))


@given(st.data())
def test_nobody_but_the_founder_can_change_a_manifest(data: st.DataObject) -> None:
    good = manifest()
    assert good.founder == FOUNDER.peer_id
    assert decode_manifest(manifest_bytes(good)) == good
    changes = {
        "name": "other",
        "founder": Identity.from_seed(bytes(31) + b"1").peer_id,
        "source": "org/other@main",
        "eos_token_ids": (3,),
        "chunks": bytes(32),
        "signature": bytes(64),
    }
    field = data.draw(st.sampled_from(sorted(changes)))
    with pytest.raises(RemoteProtocolError, match="not signed by the founder"):
        decode_manifest(manifest_bytes(msgspec.structs.replace(good, **{field: changes[field]})))


def test_a_manifest_whose_founder_is_nobody_is_refused() -> None:
    good = manifest()
    for founder in ("", "nobody", "x" * 128, good.founder[:-1]):
        with pytest.raises(RemoteProtocolError, match="not signed by the founder"):
            decode_manifest(manifest_bytes(msgspec.structs.replace(good, founder=founder)))
    unsigned = msgspec.structs.replace(good, founder="", signature=b"")
    check_unsigned(unsigned)
    with pytest.raises(RemoteProtocolError, match="not signed by the founder"):
        decode_manifest(manifest_bytes(unsigned))


def test_a_founder_that_comes_back_has_the_same_swarm_and_another_founder_another_of_the_same_model() -> None:
    mine, again = manifest(), manifest()
    theirs = sign_manifest(
        msgspec.structs.replace(mine, name="mine", dtype="float32", source="org/model@main"),
        Identity.from_seed(bytes(31) + b"1"),
    )
    assert swarm_id(mine) == swarm_id(again)
    assert swarm_id(mine) != swarm_id(theirs)
    assert same_model(mine, theirs)
    assert not same_model(manifest(vocab_size=17), theirs)
    assert not same_model(manifest(3), theirs)


def test_a_manifest_of_the_first_version_is_named_as_such() -> None:
    with pytest.raises(RemoteProtocolError, match="version 1; this Mycel knows version 2"):
        decode_manifest(msgspec.msgpack.encode([1, "tiny", "llama", 2, 8, 16, "bfloat16", 64, [1], [], []]))


def listed(sizes: list[int]) -> tuple[Manifest, bytes]:
    """A manifest of units of these sizes, and its chunk list; chunk n of the model has the hash of n."""
    hashes = iter(hashlib.sha256(bytes([n])).digest() for n in range(256))
    units, chunk_list = [], b""
    for name, size in zip(unit_names(len(sizes) - 2), sizes, strict=True):
        made = unit(name, T(f"{name}.w", "int8", (size,)))
        own = b"".join(next(hashes) for _ in range(made.n_chunks))
        chunk_list += own
        units.append(msgspec.structs.replace(made, sha256=hashlib.sha256(own).digest()))
    chunks = hashlib.sha256(chunk_list).digest()
    return manifest(len(sizes) - 2, units=tuple(units), chunks=chunks), chunk_list


def test_the_chunk_list_gives_every_unit_its_hashes() -> None:
    made, chunk_list = listed([1, CHUNK_BYTES, CHUNK_BYTES + 1, 0, 5 * CHUNK_BYTES])
    split = split_chunk_list(made, chunk_list)
    assert [len(split[unit.name]) // 32 for unit in made.units] == [1, 1, 2, 0, 5]
    assert b"".join(split.values()) == chunk_list
    assert [len(made.unit("block.1").chunk(index)) for index in range(2)] == [CHUNK_BYTES, 1]
    for wrong in (b"", chunk_list[:-32], chunk_list + bytes(32), bytes(32) + chunk_list[32:]):
        with pytest.raises(RemoteProtocolError, match="not the chunk list"):
            split_chunk_list(made, wrong)


def test_a_founder_that_lists_other_chunks_than_its_units_have_is_found_out() -> None:
    made, _ = listed([1, CHUNK_BYTES + 1, 2])
    other = bytes(32 * 4)
    made = manifest(1, units=made.units, chunks=hashlib.sha256(other).digest())
    with pytest.raises(RemoteProtocolError, match="other chunks of embed"):
        split_chunk_list(made, other)


def test_the_manifest_of_a_model_of_four_hundred_gigabytes_stays_small() -> None:
    """126 blocks of 9 tensors, as the largest Llama has."""
    shape = (3_170, 16_384 * 7)
    units = tuple(
        unit(name, *(T(f"model.layers.{name}.mlp.weights_of_part_{part}", "int8", shape) for part in range(9)))
        for name in unit_names(126)
    )
    made = manifest(126, units=units)
    assert sum(unit.size_bytes for unit in units) > 400e9
    assert len(manifest_bytes(made)) < 150_000
    assert made.chunk_list_bytes < 14e6
    assert decode_manifest(manifest_bytes(made)) == made


@pytest.mark.parametrize("name", ["../config.json", "/etc/passwd", "..", "modeling.py", "a\\b", "CONFIG.JSON", ""])
def test_a_file_that_no_swarm_carries_is_refused(name: str) -> None:
    files = tuple(sorted((FileSpec("config.json", 3, DIGEST), FileSpec(name, 3, DIGEST)), key=lambda file: file.name))
    with pytest.raises(RemoteProtocolError, match="carries no file"):
        decode_manifest(manifest_bytes(manifest(files=files)))


def test_sizes_and_order_of_a_unit_follow_from_its_tensors() -> None:
    good = unit("embed", T("b", "float32", (2,)), T("a", "int8", (3,)), T("a2", "float32", ()))
    assert [tensor.name for tensor in good.tensors] == ["a2", "b", "a"]
    rest = manifest().units[1:]
    for bad, reason in (
        (msgspec.structs.replace(good, size_bytes=good.size_bytes + 1), "not what its tensors take"),
        (msgspec.structs.replace(good, tensors=good.tensors[::-1]), "not in order"),
        (msgspec.structs.replace(good, tensors=(T("a", "complex64", (1,)),)), "unknown dtype"),
        (msgspec.structs.replace(good, tensors=(), size_bytes=0), "length"),
    ):
        with pytest.raises(RemoteProtocolError, match=reason):
            decode_manifest(manifest_bytes(manifest(units=(bad, *rest))))


def test_units_are_found_by_name() -> None:
    made = manifest(3)
    assert [made.unit(name).name for name in unit_names(3)] == list(unit_names(3))
    for name in ("block.3", "block.-1", "block.", "tail", "block.x"):
        with pytest.raises(KeyError):
            made.unit(name)


def test_header_and_blob_are_a_safetensors_file() -> None:
    values = {"w": np.arange(6, dtype=np.float32).reshape(2, 3), "a": np.array([7, 8, 9], dtype=np.int8)}
    made = unit("embed", T("a", "int8", (3,)), T("w", "float32", (2, 3)))
    blob = b"".join(values[tensor.name].tobytes() for tensor in made.tensors)
    header = unit_header(made)
    assert len(header) % 8 == 0
    assert json.loads(header[8:])["w"]["data_offsets"] == [0, 24]
    loaded = safetensors.numpy.load(header + blob)
    assert loaded.keys() == values.keys()
    assert all(np.array_equal(loaded[name], values[name]) for name in values)
