"""Charters that others made up: a group, or one line about what is wrong, and never much work."""

from __future__ import annotations

import math
from typing import Any

import msgspec
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mycel.node.averaging import AverageOptions
from mycel.node.averaging.charter import Charter, charter_of, check_tensors, encode_charter, flat, read_charter, unflat
from mycel.protocols.errors import ConfigError

TENSORS = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.tensor(7.0, dtype=torch.float64)}
GOOD = charter_of(TENSORS, AverageOptions(), "12D3KooWPeer")
BYTES = encode_charter(GOOD)


def reads(data: bytes) -> Charter | None:
    try:
        return read_charter(data)
    except ConfigError:
        return None


@given(st.binary(max_size=400))
def test_any_bytes(data: bytes) -> None:
    reads(data)


@given(st.lists(st.tuples(st.integers(0, len(BYTES) - 1), st.integers(0, 255)), min_size=1, max_size=4))
def test_changed_bytes(changes: list[tuple[int, int]]) -> None:
    data = bytearray(BYTES)
    for place, value in changes:
        data[place] = value
    charter = reads(bytes(data))
    if charter is not None:
        assert charter.terms().n_elements == charter.layout().n_elements < 2**34


@pytest.mark.parametrize(
    "wrong",
    [
        {"shapes": ((2, 3),)},
        {"shapes": ((2**34,) * 16, ())},
        {"shapes": ((0, 3), ())},
        {"dtypes": ("float32", "int64")},
        {"names": ()},
        {"codec": "powersgd:-1"},
        {"codec": "topk:0.01+" * 15},
        {"rule": "mean+mean+mean"},
        {"rule": "(" * 199},
        {"liars": math.nan},
        {"quorum": math.nan},
        {"patience_s": math.inf},
        {"longest_grace_s": math.nan},
        {"min_members": 0},
        {"shards": 0},
        {"shards": 10**9},
        {"aggregators": -1},
        {"kind": "mycel average 2"},
    ],
    ids=str,
)
def test_fields_that_say_nothing(wrong: dict[str, Any]) -> None:
    data = encode_charter(msgspec.structs.replace(GOOD, **wrong))
    with pytest.raises(ConfigError, match=r"^[^\n]*$"):
        read_charter(data)


def test_tensors_come_back_as_they_went() -> None:
    charter = read_charter(BYTES)
    check_tensors(charter, TENSORS)
    room_P = torch.full((7,), math.nan)
    vector_P = flat(charter, TENSORS, room_P)
    assert vector_P.data_ptr() == room_P.data_ptr()
    assert torch.equal(vector_P, flat(charter, TENSORS, None))
    back = unflat(charter, vector_P)
    assert all(torch.equal(back[name], TENSORS[name]) and back[name].dtype == TENSORS[name].dtype for name in TENSORS)
