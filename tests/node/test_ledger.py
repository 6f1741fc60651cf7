"""What a peer has counted: every number once, of one version alone, and taken back without a trace."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mycel.node.training.ledger import Ledger
from mycel.swarm.training.numbers import of

N = 6


def grad_of(number: int) -> torch.Tensor:
    """The gradient of one microbatch, the same bits whenever it is computed."""
    return torch.randn(N, generator=torch.Generator().manual_seed(number))


def ledger(*numbers: int, version: int = 3) -> Ledger:
    made = Ledger(N)
    made.advance(version)
    for number in numbers:
        assert made.count(version, number, grad_of(number), float(number))
    return made


def state(of_ledger: Ledger) -> tuple[object, ...]:
    return (of_ledger.version, of_ledger.counted, of_ledger.sum.sum_P.tolist(), dict(of_ledger.losses))


def test_a_number_comes_in_once():
    once = ledger(0, 5)
    assert once.counted == of([0, 5])
    assert once.losses == {0: 0.0, 5: 5.0}
    before = state(once)
    assert not once.count(3, 5, grad_of(5), 5.0)
    assert state(once) == before


@pytest.mark.parametrize("version", [0, 2, 4])
def test_another_version_does_not_come_in_or_out(version):
    one = ledger(1)
    before = state(one)
    assert not one.count(version, 2, grad_of(2), 2.0)
    assert not one.uncount(version, 1, grad_of(1))
    assert one.partial(version, one.counted, 0, N) is None
    assert state(one) == before


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 7)), max_size=30))
def test_whatever_was_counted_and_taken_back_the_sum_is_that_of_what_is_counted(moves):
    walked, held = ledger(), set()
    for comes, number in moves:
        if comes:
            assert walked.count(3, number, grad_of(number), float(number)) == (number not in held)
            held.add(number)
        else:
            assert walked.uncount(3, number, grad_of(number)) == (number in held)
            held.discard(number)
    assert state(walked) == state(ledger(*sorted(held)))


@pytest.mark.parametrize("bad", [torch.full((N,), float("nan")), torch.zeros(N + 1), torch.full((N,), 100.0)])
def test_a_bad_gradient_counts_nothing(bad):
    one = ledger(1)
    before = state(one)
    with pytest.raises(ValueError, match="gradient"):
        one.count(3, 2, bad, 2.0)
    assert state(one) == before


@pytest.mark.parametrize("bad", [torch.full((N,), float("nan")), torch.zeros(N + 1), torch.full((N,), 100.0)])
def test_a_bad_gradient_takes_nothing_back(bad):
    one = ledger(1)
    before = state(one)
    with pytest.raises(ValueError, match="gradient"):
        one.uncount(3, 1, bad)
    assert state(one) == before


def test_a_partial_sum_is_given_for_exactly_what_is_counted():
    two = ledger(1, 2)
    assert two.partial(3, of([1]), 0, N) is None
    assert two.partial(3, of([1, 2, 3]), 0, N) is None
    part = two.partial(3, of([1, 2]), 2, 3)
    assert part is not None
    assert torch.equal(part, two.sum.sum_P[2:5])


def test_a_partial_sum_is_a_copy():
    one = ledger(1)
    part = one.partial(3, of([1]), 0, N)
    assert part is not None
    before = part.clone()
    one.count(3, 2, grad_of(2), 2.0)
    assert torch.equal(part, before)


def test_the_next_step_begins_with_nothing():
    one = ledger(1, 4)
    one.advance(4)
    assert state(one) == state(ledger(version=4))
    assert one.count(4, 1, grad_of(1), 1.0)
