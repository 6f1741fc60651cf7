"""Updates on the lattice: any order, any cut, numpy or torch, one state; and one rounding to float32."""

from __future__ import annotations

import hashlib
import json
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mycel.swarm.zeroth import lattice, on_device
from mycel.swarm.zeroth.directions import signs
from mycel.swarm.zeroth.lattice import MAX_STEP, Reach, add_updates, from_float, state_hash, to_float, write_float
from mycel.swarm.zeroth.replay import State

VECTORS = json.loads((Path(__file__).parent / "vectors.json").read_text())
# More than a tile, and neither a whole number of tiles nor of blocks nor of bytes.
N_ELEMENTS = lattice._TILE + 5003


def made_updates(count, seed=0, largest=1 << 40):
    rng = np.random.default_rng(seed)
    steps = rng.integers(-largest, largest, count).tolist()
    return [(hashlib.sha256(bytes([seed, i])).digest(), step) for i, step in enumerate(steps)]


def made_theta(n_elements=N_ELEMENTS, seed=0):
    return np.random.default_rng(seed).integers(-(1 << 40), 1 << 40, n_elements)


def slowly(theta_P, updates):
    """The definition."""
    found = theta_P.copy()
    for seed, step in updates:
        found -= step * signs(seed, 0, theta_P.size).astype(np.int64)
    return found


@pytest.mark.parametrize("count", [1, 7, 8, 9, 21])
def test_eight_at_once_are_the_same_as_one_after_the_other(count):
    theta, updates = made_theta(), made_updates(count)
    found = theta.copy()
    add_updates(found, updates)
    assert np.array_equal(found, slowly(theta, updates))


@given(st.permutations(range(12)), st.lists(st.integers(0, 12), max_size=3).map(sorted))
@settings(max_examples=30, deadline=None)
def test_any_order_in_any_parts_gives_one_state(order, cuts):
    theta, updates = made_theta(300), made_updates(12)
    found = theta.copy()
    for low, high in zip([0, *cuts], [*cuts, 12], strict=True):
        add_updates(found, [updates[i] for i in order[low:high]])
    assert state_hash(found) == state_hash(slowly(theta, updates))


def test_threads_make_no_difference():
    theta, updates = made_theta(3 * lattice._TILE + 77), made_updates(10)
    alone, together = theta.copy(), theta.copy()
    add_updates(alone, updates)
    with ThreadPoolExecutor(4) as pool:
        add_updates(together, updates, pool.map)
    assert state_hash(alone) == state_hash(together)


def test_updates_are_taken_back_exactly():
    theta, updates = made_theta(), made_updates(5)
    found = theta.copy()
    add_updates(found, updates)
    assert not np.array_equal(found, theta)
    add_updates(found, [(seed, -step) for seed, step in updates])
    assert np.array_equal(found, theta)


def test_torch_gives_the_same_state_and_the_same_floats():
    theta, updates = made_theta(), made_updates(3)
    found = theta.copy()
    add_updates(found, updates)
    by_torch = torch.from_numpy(theta.copy())
    on_device.add_updates(by_torch, updates)
    assert np.array_equal(by_torch.numpy(), found)
    assert np.array_equal(on_device.to_float(by_torch).numpy(), to_float(found))


def test_writing_floats_after_updates_leaves_the_lattice_alone():
    theta, updates = made_theta(), made_updates(2)
    before, out = theta.copy(), np.empty(theta.size, np.float32)
    write_float(theta, out, updates)
    assert np.array_equal(theta, before)
    assert np.array_equal(out, to_float(slowly(theta, updates)))


@given(st.lists(st.integers(-(2**62), 2**62), min_size=1, max_size=20))
def test_float32_is_rounded_once(units):
    # Half-way cases one bit below float64's 53: rounding there first would then round to the wrong side.
    units = [*units, *((1 << 58) + (1 << 34) + delta for delta in (-1, 0, 1)), (3 << 24) + 1]
    found = to_float(np.array(units, np.int64))
    by_torch = on_device.to_float(torch.tensor(units))
    for unit, one, other in zip(units, found.tolist(), by_torch.tolist(), strict=True):
        exact = Fraction(unit, 1 << 30)
        neighbours = [Fraction(float(np.nextafter(np.float32(one), np.float32(side)))) for side in (-np.inf, np.inf)]
        assert other == one
        assert all(abs(Fraction(one) - exact) <= abs(neighbour - exact) for neighbour in neighbours)


@given(st.lists(st.floats(-(2.0**23), 2.0**23, width=32), min_size=1, max_size=20))
def test_floats_become_the_nearest_point(values):
    found = from_float(np.array(values, np.float32))
    assert found.tolist() == [round(Fraction(value) * (1 << 30)) for value in values]


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 2.0**23 * 1.01])
def test_parameters_beyond_the_lattice_are_refused(value):
    with pytest.raises(ValueError, match="not finite, or beyond"):
        from_float(np.array([1.0, value], np.float32))


def test_vectors_and_updates_mix_in_any_order():
    theta, updates = made_theta(500), made_updates(4)
    moved = from_float(np.random.default_rng(1).normal(size=500).astype(np.float32))
    first, last = State(theta), State(theta)
    first.add(moved)
    first.apply(updates)
    last.apply(updates)
    last.add(moved)
    assert first.hash() == last.hash()
    assert first.reach == last.reach
    before = first.hash()
    with pytest.raises(OverflowError):
        first.add(np.array([-(1 << 62)] * 500))
    with pytest.raises(OverflowError):
        first.apply([(bytes(32), MAX_STEP)] * 16)
    assert first.hash() == before


def test_the_lattice_can_not_overflow():
    reach = Reach.of(np.array([5, -(1 << 40)]))
    assert reach.units == 1 << 40
    with pytest.raises(OverflowError, match="beyond the parameters' lattice"):
        reach.after([MAX_STEP] * 16)
    steps = [MAX_STEP, -MAX_STEP, 3]
    assert reach.after(steps) == reach.after(reversed(steps)) == Reach((1 << 40) + 2 * MAX_STEP + 3)
    with pytest.raises(ValueError, match="beyond the lattice's largest"):
        add_updates(made_theta(10), [(bytes(32), MAX_STEP + 1)])
    with pytest.raises(ValueError, match="one row of int64"):
        add_updates(np.zeros(10, np.int32), [])


@pytest.mark.parametrize("vector", VECTORS["states"])
def test_a_state_has_its_digest(vector):
    assert state_hash(np.array(vector["parameters"])).hex() == vector["sha256"]
