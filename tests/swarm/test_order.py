"""The order of samples: every window once an epoch, another order each epoch, what is held out never drawn."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mycel.swarm.training.order import SampleOrder, round_keys, shuffled

SEEDS = st.integers(0, 2**63 - 1)


@given(size=st.integers(1, 300), seed=SEEDS, epoch=st.integers(0, 2**60))
def test_a_shuffle_is_one_to_one(size, seed, epoch):
    keys = round_keys(b"any", seed, epoch)
    assert sorted(shuffled(index, size, keys) for index in range(size)) == list(range(size))


@given(size=st.integers(1, 2**50), seed=SEEDS, data=st.data())
def test_different_places_of_a_huge_range_stay_different_and_inside(size, seed, data):
    keys = round_keys(b"any", seed, 0)
    places = data.draw(st.sets(st.integers(0, size - 1), max_size=20))
    taken = [shuffled(place, size, keys) for place in places]
    assert len(set(taken)) == len(places)
    assert all(0 <= place < size for place in taken)


@given(n_windows=st.integers(1, 120), seed=SEEDS, data=st.data())
def test_an_epoch_draws_each_window_once_and_none_that_is_held_out(n_windows, seed, data):
    order = SampleOrder(n_windows, data.draw(st.integers(0, n_windows - 1)), seed)
    epoch = data.draw(st.integers(0, 1000))
    held_out = [order.held_out(index) for index in range(order.n_held_out)]
    drawn = [order.window(epoch * order.n_train + place) for place in range(order.n_train)]
    assert sorted(held_out + drawn) == list(range(n_windows))


def test_epochs_and_seeds_have_orders_of_their_own():
    one, other = SampleOrder(1000, 0, 1), SampleOrder(1000, 0, 2)
    first = [one.window(i) for i in range(1000)]
    for orders in ([one.window(1000 + i) for i in range(1000)], [other.window(i) for i in range(1000)]):
        # Two unrelated orders agree in one place on average; ten has a chance of one in a million.
        assert sum(a == b for a, b in zip(first, orders, strict=True)) < 10


def test_runs_of_all_seeds_hold_out_the_same():
    held_out = [[SampleOrder(500, 25, seed).held_out(i) for i in range(25)] for seed in (0, 1, 2**63 - 1)]
    assert held_out[0] == held_out[1] == held_out[2]
    assert max(held_out[0]) - min(held_out[0]) > 250  # from all over the text


def test_every_window_comes_first_about_equally_often():
    counts = Counter(SampleOrder(10, 0, 7).window(10 * epoch) for epoch in range(5000))
    # 500 each expected, with a standard deviation of 21
    assert len(counts) == 10
    assert all(400 < count < 600 for count in counts.values())


def test_neighbours_are_spread():
    order = SampleOrder(100, 0, 7)
    steps = Counter((order.window(100 * epoch + 1) - order.window(100 * epoch)) % 100 for epoch in range(5000))
    assert len(steps) == 99
    assert max(steps.values()) < 100  # 50 expected, standard deviation 7


def test_the_order_is_the_same_in_every_version():
    order = SampleOrder(1000, 50, 42)
    assert [order.window(i) for i in (0, 1, 2, 949, 950, 10**12)] == [17, 434, 926, 89, 692, 126]
    assert [order.held_out(i) for i in range(3)] == [422, 799, 896]


def test_what_is_not_there_is_an_error():
    with pytest.raises(IndexError, match="held-out window 2: 2 are"):
        SampleOrder(10, 2, 0).held_out(2)
    with pytest.raises(IndexError, match=r"not in range\(4\)"):
        shuffled(4, 4, round_keys(b"any", 0, 0))
