"""The account of session memory: never over what there is, and back to nothing whatever ends a session."""

from __future__ import annotations

from contextlib import ExitStack

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mycel.node.kv_budget import KVBudget
from mycel.protocols.errors import PeerRefused


@given(total=st.integers(0, 200), wishes=st.lists(st.tuples(st.integers(0, 120), st.booleans()), max_size=20))
def test_never_more_than_there_is_and_all_of_it_comes_back(total: int, wishes: list[tuple[int, bool]]) -> None:
    budget = KVBudget(total)
    held: list[tuple[int, ExitStack]] = []
    for size, ends in wishes:
        if ends and held:
            held.pop(size % len(held))[1].close()
        free = budget.free_bytes
        stack = ExitStack()
        if size <= free:
            stack.enter_context(budget.reserve(size))
            held.append((size, stack))
        else:
            with pytest.raises(PeerRefused):
                stack.enter_context(budget.reserve(size))
            assert budget.free_bytes == free, "a refusal reserves nothing"
        assert budget.reserved_bytes == sum(size for size, _ in held) <= total
    for _, stack in held:
        stack.close()
    assert (budget.reserved_bytes, budget.free_bytes) == (0, total)


def test_the_last_byte_can_be_had() -> None:
    budget = KVBudget(10)
    with budget.reserve(10), pytest.raises(PeerRefused, match="1 bytes wanted, 0 bytes free"), budget.reserve(1):
        pass
    assert budget.free_bytes == 10


def test_a_refusal_names_sizes_that_differ() -> None:
    budget = KVBudget(65_536)
    for size_bytes, reason in ((7_000_000, "7.0 MB wanted, 66 kB free"), (65_600, "65,600 bytes wanted, 65,536 free")):
        with pytest.raises(PeerRefused, match=reason), budget.reserve(size_bytes):
            pass


def test_a_failure_inside_gives_it_back() -> None:
    budget = KVBudget(10)
    with pytest.raises(RuntimeError), budget.reserve(10):
        raise RuntimeError
    assert budget.free_bytes == 10
