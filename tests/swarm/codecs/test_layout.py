"""Layouts: where tensors lie, and cuts that tear no row apart."""

from __future__ import annotations

from math import prod

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mycel.swarm.codecs import Layout

shapes = st.lists(st.lists(st.integers(1, 9), max_size=3).map(tuple), min_size=1, max_size=6).map(tuple)


def rows_of(layout: Layout) -> list[tuple[int, ...]]:
    """The shape of every row, in order."""
    return [shape[1:] for shape in layout.shapes for _ in range(shape[0] if shape else 1)]


@given(shapes, st.integers(1, 40))
def test_parts_are_the_rows_in_order(shapes, n):
    layout = Layout(shapes)
    parts = layout.cut(n)
    assert len(parts) == min(n, len(rows_of(layout)))
    assert [row for part in parts for row in rows_of(part)] == rows_of(layout)
    assert sum(part.n_elements for part in parts) == layout.n_elements
    for part, pieces in zip(parts, layout.cut_pieces(n), strict=True):
        assert part.shapes == tuple(shape for _, shape in pieces)
        assert all(shape[1:] == layout.shapes[index][1:] for index, shape in pieces)


@given(shapes, st.integers(1, 6))
def test_parts_are_equal_up_to_a_row(shapes, n):
    layout = Layout(shapes)
    parts = layout.cut(n)
    if len(parts) < n:
        return
    longest_row = max(prod(shape[1:]) for shape in shapes)
    for part in parts:
        # A part too large is one whose neighbours had to keep a row each.
        assert part.n_elements <= layout.n_elements / n + n * longest_row


def test_a_large_matrix_is_cut_evenly() -> None:
    parts = Layout(((1000, 64), (64,), (500, 128))).cut(4)
    assert [part.shapes for part in parts] == [((500, 64),), ((500, 64), (32,)), ((32,), (250, 128)), ((250, 128),)]


def test_pieces_follow_each_other() -> None:
    assert list(Layout(((2, 3), (), (4,))).pieces()) == [
        (slice(0, 6), (2, 3)),
        (slice(6, 7), ()),
        (slice(7, 11), (4,)),
    ]


def test_no_part_is_empty_and_no_layout() -> None:
    assert Layout(((2, 5),)).cut(7) == (Layout(((1, 5),)),) * 2
    for shapes in ((), ((0,),), ((3, -1),)):
        with pytest.raises(ValueError, match="at least one"):
            Layout(shapes)
    with pytest.raises(ValueError, match="at least one"):
        Layout(((1,),)).cut(0)
