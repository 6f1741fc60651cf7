"""Packed numbers and positions: exact, as short as they say, and nothing else is read."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mycel.protocols.errors import RemoteProtocolError
from mycel.swarm.codecs.bits import Reader, pack, packed_bytes, unpack
from mycel.swarm.codecs.positions import Blocks, max_position_bytes, pack_positions, read_positions


@given(st.integers(1, 24), st.integers(1, 67), st.randoms(use_true_random=False))
def test_packed_numbers_come_back_and_lie_where_they_are_said_to(width, n, rng):
    values = [rng.randrange(1 << width) for _ in range(n)]
    data = pack(np.array(values, np.uint32), width)
    assert len(data) == packed_bytes(n, width)
    stream = int.from_bytes(data, "little")
    assert [stream >> i * width & ((1 << width) - 1) for i in range(n)] == values
    assert unpack(memoryview(data), n, width).tolist() == values


@pytest.mark.parametrize("width", [1, 3, 4, 7, 12])
def test_bits_behind_the_last_number_are_refused(width: int) -> None:
    data = bytearray(pack(np.zeros(5, np.uint8), width))
    data[-1] |= 0x80
    with pytest.raises(RemoteProtocolError, match="behind"):
        unpack(memoryview(data), 5, width)


def random_positions(blocks: Blocks, rng: np.random.Generator) -> np.ndarray:
    kept = [rng.choice(size, count, replace=False) for size, count in zip(blocks.sizes, blocks.counts, strict=True)]
    return np.sort(np.concatenate([one + start for one, start in zip(kept, blocks.starts, strict=True)]))


@given(st.lists(st.integers(1, 4096), min_size=1, max_size=4), st.floats(0.0002, 1.0), st.integers(0, 2**32))
def test_positions_come_back_within_their_limit(sizes, density, seed):
    blocks = Blocks(np.array(sizes), np.array([max(1, round(density * size)) for size in sizes]))
    positions = random_positions(blocks, np.random.default_rng(seed))
    body = pack_positions(positions, blocks)
    assert len(body) <= max_position_bytes(blocks)
    reader = Reader(body)
    assert read_positions(reader, blocks).tolist() == positions.tolist()
    reader.end()


@given(st.integers(4097, 100_000), st.floats(0.00001, 1.0), st.integers(0, 2**32), st.booleans())
def test_one_wide_block_has_gaps_within_their_limit(size, density, seed, clustered):
    """Also where all lie together at the end: the longest code that there is."""
    blocks = Blocks(np.array([size]), np.array([max(1, int(density * size))]))
    n = blocks.n_positions
    positions = np.arange(size - n, size) if clustered else random_positions(blocks, np.random.default_rng(seed))
    body = pack_positions(positions, blocks)
    assert len(body) <= max_position_bytes(blocks)
    assert read_positions(Reader(body), blocks).tolist() == positions.tolist()


@pytest.mark.parametrize(("kept", "way"), [(41, "gaps"), (4, "gaps"), (1, "offsets")])
def test_the_shorter_way_is_taken(kept: int, way: str) -> None:
    """At 1 % a gap takes close to its entropy of 8.1 bits; at one of 4096 an offset is at its entropy of 12."""
    blocks = Blocks(np.full(500, 4096), np.full(500, kept))
    body = pack_positions(random_positions(blocks, np.random.default_rng(1)), blocks)
    assert (body[0] == 0) == (way == "offsets")
    density = kept / 4096
    entropy = (-density * math.log2(density) - (1 - density) * math.log2(1 - density)) / density
    bits = 8 * len(body) / blocks.n_positions
    assert bits <= (12.1 if way == "offsets" else entropy + 0.15)


@pytest.mark.parametrize(
    ("offsets", "reason"), [([5, 5], "twice"), ([5, 4], "out of order"), ([5, 100], "outside of their block")]
)
def test_offsets_that_name_no_elements_are_refused(offsets: list[int], reason: str) -> None:
    blocks = Blocks(np.array([100]), np.array([2]))
    with pytest.raises(RemoteProtocolError, match=reason):
        read_positions(Reader(b"\x00" + pack(np.array(offsets), 12)), blocks)


def test_gaps_beyond_the_end_cost_nothing() -> None:
    """A long unary part is refused by its length, before its bits are looked at."""
    blocks = Blocks(np.array([4096]), np.array([1]))
    body = b"\x01" + (10**6).to_bytes(4, "little") + bytes(10**6 - 1) + b"\x01"
    with pytest.raises(RemoteProtocolError, match="beyond the end"):
        read_positions(Reader(body), blocks)
    with pytest.raises(RemoteProtocolError, match="0 elements, not 1"):
        read_positions(Reader(b"\x01" + bytes(4)), blocks)
