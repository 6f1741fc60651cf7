"""Directions: the published answers of the generator, our own vectors, the same bits by torch, and fair coins."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mycel.swarm.zeroth import on_device, seeds
from mycel.swarm.zeroth.directions import BLOCK, MAX_ELEMENTS, bits, philox4x32, seed_words, signs

VECTORS = json.loads((Path(__file__).parent / "vectors.json").read_text())


def words(texts):
    return [np.array([[int(text, 16)]], np.uint64) for text in texts]


@pytest.mark.parametrize("vector", VECTORS["philox4x32_10"]["vectors"])
def test_the_generator_gives_the_published_answers(vector):
    found = philox4x32(words(vector["counter"]), words(vector["key"]))
    assert [f"{int(word[0, 0]):08x}" for word in found] == vector["output"]


@pytest.mark.parametrize("vector", VECTORS["directions"])
def test_our_vectors_hold_for_numpy_and_for_torch(vector):
    seed, block = bytes.fromhex(vector["seed"]), vector["block"]
    assert bits([seed], block, 1)[0].tobytes().hex() == vector["bits"]
    made = on_device._bits(seed, block, 1, torch.device("cpu")).numpy().astype(np.uint8)
    assert np.packbits(made, bitorder="little").tobytes().hex() == vector["bits"]


@pytest.mark.parametrize("vector", VECTORS["digests"])
def test_a_long_direction_has_its_digest(vector):
    seed = bytes.fromhex(vector["seed"])
    made = signs(seed, 0, vector["elements"])
    assert hashlib.sha256(made.tobytes()).hexdigest() == vector["sha256_of_signs"]
    assert torch.equal(on_device.signs(seed, vector["elements"]), torch.from_numpy(made).to(torch.int64))


@given(st.binary(min_size=32, max_size=32), st.integers(0, 70_000), st.integers(0, 1000))
def test_a_part_is_cut_out_of_the_whole(seed, start, count):
    whole = np.unpackbits(bits([seed], 0, -(-(start + count) // BLOCK) + 1)[0], bitorder="little").astype(np.int8)
    assert np.array_equal(signs(seed, start, start + count), 1 - 2 * whole[start : start + count])


def test_every_byte_of_a_seed_counts():
    base = bytes(range(32))
    found = {bits([base], 0, 1).tobytes()}
    for index in range(32):
        changed = bytearray(base)
        changed[index] ^= index + 1  # bytes 12 apart are folded into one
        found.add(bits([bytes(changed)], 0, 1).tobytes())
    assert len(found) == 33


def test_signs_are_fair_and_independent():
    rows = np.stack([signs(hashlib.sha256(bytes([i])).digest(), 0, 1 << 16).astype(np.int64) for i in range(16)])
    gram = rows @ rows.T
    deviation = 1 << 8  # of a sum of 2^16 fair coins
    assert np.abs(rows.sum(axis=1)).max() < 5 * deviation
    assert np.abs(gram[~np.eye(16, dtype=bool)]).max() < 5 * deviation


def test_a_seed_has_32_bytes_and_a_direction_an_end():
    with pytest.raises(ValueError, match="32 bytes"):
        seed_words(bytes(31))
    with pytest.raises(ValueError, match="ends"):
        bits([bytes(32)], MAX_ELEMENTS // BLOCK, 1)


@pytest.mark.parametrize("vector", VECTORS["seeds"])
def test_seeds_follow_from_run_link_key_and_sample(vector):
    run, link, key = (bytes.fromhex(vector[name]) for name in ("run", "link", "key"))
    beacon = seeds.beacon_of(run, link)
    seed = seeds.seed_of(run, beacon, key, vector["sample"])
    assert (beacon.hex(), seed.hex()) == (vector["beacon"], vector["seed"])
    assert seeds.pool_index(seed, vector["pool"]) == vector["index"]
    assert seeds.pool_seed(run, beacon, vector["index"]).hex() == vector["pool_seed"]
    assert seeds.batch_of(seed, 1000, 4) == vector["batch"]


def test_whatever_a_seed_is_made_of_changes_it():
    a, b = bytes(32), bytes([1]) * 32
    made = {seeds.seed_of(*fields) for fields in ((a, a, a, 0), (b, a, a, 0), (a, b, a, 0), (a, a, b, 0), (a, a, a, 1))}
    assert len(made) == 5
    with pytest.raises(ValueError, match="32 bytes"):
        seeds.seed_of(a, a, b"", 0)
