"""Sums of gradients on the integer lattice: exact whatever the order, and taken back to the bit."""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mycel.protocols.errors import RemoteProtocolError
from mycel.protocols.training import MAX_MICROBATCHES
from mycel.swarm.training import lattice
from mycel.swarm.training.lattice import SCALE_BITS, GradientSum, check_partial, to_float

UNIT = Fraction(1, 1 << SCALE_BITS)

elements = st.floats(-32.0, 32.0, width=32)
# Gradients of microbatches lie many orders of magnitude apart.
small = st.floats(-(2.0**-10), 2.0**-10, width=32)


def gradients(n_elements: int):
    one = st.lists(elements | small, min_size=n_elements, max_size=n_elements)
    return st.lists(one.map(lambda values: torch.tensor(values, dtype=torch.float32)), min_size=1, max_size=12)


def sum_of(grads) -> GradientSum:
    total = GradientSum(grads[0].numel())
    for grad in grads:
        total.add(grad)
    return total


def on_lattice(value: float) -> int:
    """round(value * 2^44), halves to even, in exact arithmetic."""
    return round(Fraction(value) / UNIT)


@given(gradients(5), st.randoms(use_true_random=False))
def test_any_order_gives_the_same_bits(grads, rng):
    shuffled = list(grads)
    rng.shuffle(shuffled)
    assert torch.equal(sum_of(grads).sum_P, sum_of(shuffled).sum_P)


@given(gradients(3), st.data())
def test_any_grouping_gives_the_same_bits(grads, data):
    """Some microbatches at one peer and some at another: the partial sums add up to the whole."""
    peers = data.draw(st.lists(st.integers(0, 3), min_size=len(grads), max_size=len(grads)))
    parts = [
        sum_of([torch.zeros(3), *(g for g, where in zip(grads, peers, strict=True) if where == peer)]).sum_P
        for peer in range(4)
    ]
    assert torch.equal(torch.stack(parts).sum(dim=0), sum_of(grads).sum_P)


@given(gradients(4))
def test_the_sum_is_the_exact_one(grads):
    expected = [sum(on_lattice(float(grad[i])) for grad in grads) for i in range(4)]
    assert sum_of(grads).sum_P.tolist() == expected


@given(gradients(6), st.lists(elements, min_size=6, max_size=6))
def test_what_was_added_is_taken_back_to_the_bit(grads, more):
    total = sum_of(grads)
    before = total.sum_P.clone()
    grad = torch.tensor(more, dtype=torch.float32)
    total.add(grad)
    total.subtract(grad)
    assert torch.equal(total.sum_P, before)


def test_pieces_do_not_show(monkeypatch):
    grad = torch.randn(1000, generator=torch.Generator().manual_seed(1))
    whole = sum_of([grad, grad]).sum_P
    monkeypatch.setattr(lattice, "_PIECE", 7)
    assert torch.equal(sum_of([grad, grad]).sum_P, whole)


@given(elements | small)
def test_a_gradient_is_off_by_half_a_step_of_the_lattice_at_most(value):
    error = Fraction(int(sum_of([torch.tensor([value])]).sum_P)) * UNIT - Fraction(value)
    assert abs(error) <= UNIT / 2


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf"), 32.1, -33.0, 1e38])
@pytest.mark.parametrize("place", [0, 1, 8, 16])
def test_what_is_not_finite_or_has_exploded_is_refused_and_changes_nothing(bad, place):
    total = sum_of([torch.full((17,), 0.5)])
    before = total.sum_P.clone()
    grad = torch.zeros(17)
    grad[place] = bad
    for accumulate in (total.add, total.subtract):
        with pytest.raises(ValueError, match="not finite, or has exploded"):
            accumulate(grad)
    assert torch.equal(total.sum_P, before)


@pytest.mark.parametrize("grad", [torch.zeros(3), torch.zeros(2, 2), torch.zeros(4, dtype=torch.float64)])
def test_another_shape_or_dtype_is_refused(grad):
    with pytest.raises(ValueError, match="is needed"):
        GradientSum(4).add(grad)


def test_the_most_of_the_largest_gradients_fit():
    """Summed by halves: doubling the sum of 1 gradient 13 times is the sum of 8192."""
    sum_1 = sum_of([torch.tensor([32.0, -32.0])]).sum_P
    most = sum_1 * MAX_MICROBATCHES
    assert most.tolist() == [int(sum_1[0]) * MAX_MICROBATCHES, -int(sum_1[0]) * MAX_MICROBATCHES]
    assert to_float(most).tolist() == [32.0 * MAX_MICROBATCHES, -32.0 * MAX_MICROBATCHES]
    check_partial(most, 2, MAX_MICROBATCHES, "peer")


def test_a_cleared_sum_is_empty():
    total = sum_of([torch.ones(3)])
    total.clear()
    assert total.sum_P.tolist() == [0, 0, 0]


@given(st.lists(st.integers(-(2**62), 2**62), min_size=1, max_size=40))
def test_the_float_is_the_nearest_one(sums):
    floats = to_float(torch.tensor(sums, dtype=torch.int64))
    for exact, rounded in zip(sums, floats, strict=True):
        error = abs(Fraction(float(rounded)) - exact * UNIT)
        for neighbour in (torch.nextafter(rounded, torch.tensor(s)) for s in (float("inf"), -float("inf"))):
            assert error <= abs(Fraction(float(neighbour)) - exact * UNIT)


def test_a_sum_is_rounded_once():
    """In float64 this one would become a tie, and then round to the other side."""
    halfway = (1 << 60) + (1 << 36)  # between two float32
    assert to_float(torch.tensor([halfway + 1])) == ((1 << 60) + (1 << 37)) / (1 << SCALE_BITS)


@given(st.integers(1, MAX_MICROBATCHES), st.integers(0, 2**63 - 1), st.booleans())
def test_a_partial_sum_is_taken_exactly_if_so_many_gradients_can_have_it(n_numbers, size, negative):
    value = -size - 1 if negative else size
    fits = abs(value) <= n_numbers * 32 << SCALE_BITS
    partial = torch.tensor([0, value])
    if fits:
        assert check_partial(partial, 2, n_numbers, "peer") is partial
    else:
        with pytest.raises(RemoteProtocolError, match="have such a sum"):
            check_partial(partial, 2, n_numbers, "peer")


@pytest.mark.parametrize(
    "partial", [torch.zeros(2), torch.zeros(3, dtype=torch.int64), torch.zeros(2, dtype=torch.int32)]
)
def test_a_partial_sum_of_another_dtype_or_size_is_the_peers_fault(partial):
    with pytest.raises(RemoteProtocolError) as caught:
        check_partial(partial, 2, 4, "peer")
    assert caught.value.peer == "peer"


def test_no_gradients_have_no_sum():
    assert check_partial(torch.zeros(2, dtype=torch.int64), 2, 0, "peer").tolist() == [0, 0]
    with pytest.raises(RemoteProtocolError):
        check_partial(torch.tensor([0, 1]), 2, 0, "peer")
