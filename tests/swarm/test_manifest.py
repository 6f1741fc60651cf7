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
from mycel.swarm.manifest import (
    DTYPES,
    MAX_MANIFEST_BYTES,
    FileSpec,
    Manifest,
    TensorSpec,
    UnitSpec,
    decode_manifest,
    manifest_bytes,
    swarm_id,
    tensor_order,
    unit_header,
    unit_names,
)

DIGEST = hashlib.sha256(b"x").digest()


def unit(name: str, *tensors: TensorSpec) -> UnitSpec:
    ordered = tensor_order(tensors or (TensorSpec(f"{name}.weight", "bfloat16", (4, 8)),))
    return UnitSpec(name, ordered, sum(tensor.size_bytes for tensor in ordered), DIGEST)


def manifest(n_blocks: int = 2, **changes: object) -> Manifest:
    made = Manifest(
        version=1,
        name="tiny",
        architecture="llama",
        n_blocks=n_blocks,
        hidden_size=8,
        vocab_size=16,
        dtype="bfloat16",
        max_positions=64,
        eos_token_ids=(1, 2),
        files=(FileSpec("config.json", 3, DIGEST), FileSpec("tokenizer.json", 4, DIGEST)),
        units=tuple(unit(name) for name in unit_names(n_blocks)),
    )
    return msgspec.structs.replace(made, **changes)


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
    assert data[1] == 1  # the version as a one-byte integer
    with pytest.raises(RemoteProtocolError, match="canonical"):
        decode_manifest(data[:1] + b"\xcc\x01" + data[2:])


def test_a_manifest_over_the_limit_is_refused_before_it_is_read() -> None:
    with pytest.raises(RemoteProtocolError, match="over the limit"):
        decode_manifest(bytes(MAX_MANIFEST_BYTES + 1))


def test_a_short_text_that_promises_four_thousand_million_units_is_refused() -> None:
    lead = manifest_bytes(manifest())[:1]
    with pytest.raises(RemoteProtocolError):
        decode_manifest(lead + b"\x01\xdd" + struct.pack(">I", 2**32 - 1))


T = TensorSpec
FLAWS = [
    ({"version": 2}, "version 2"),
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
]


@pytest.mark.parametrize(("changes", "reason"), FLAWS, ids=[reason for _, reason in FLAWS])
def test_what_cannot_be_true_is_refused_with_a_reason(changes: dict[str, object], reason: str) -> None:
    with pytest.raises(RemoteProtocolError, match=reason):
        decode_manifest(manifest_bytes(manifest(**changes)))


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
