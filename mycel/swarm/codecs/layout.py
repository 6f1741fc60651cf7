"""What a flat float32 vector is made of: tensors laid one after another.

Codecs that use the shape of matrices need to know where they lie, and a round cuts the vector into shards without
tearing a row apart, so that every piece of a matrix is still a matrix.

Ring: pure.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate, pairwise
from math import prod

__all__ = ["Layout"]


@dataclass(frozen=True)
class Layout:
    """The shapes of tensors in the order in which their elements follow each other; () is a single number.

    Raises ValueError for no tensors and for dimensions below 1.
    """

    shapes: tuple[tuple[int, ...], ...]

    def __post_init__(self) -> None:
        if not self.shapes or any(size < 1 for shape in self.shapes for size in shape):
            raise ValueError("a layout has at least one tensor, and every dimension at least one element")

    @property
    def n_elements(self) -> int:
        return sum(prod(shape) for shape in self.shapes)

    def pieces(self) -> Iterator[tuple[slice, tuple[int, ...]]]:
        """Where each tensor lies in the vector, and its shape."""
        start = 0
        for shape in self.shapes:
            end = start + prod(shape)
            yield slice(start, end), shape
            start = end

    def cut(self, n: int) -> tuple[Layout, ...]:
        """`n` consecutive parts of about equal size, cut between rows alone; one for each row if these are fewer.

        A row is what one index of the first dimension names.
        """
        return tuple(Layout(tuple(shape for _, shape in part)) for part in self.cut_pieces(n))

    def cut_pieces(self, n: int) -> tuple[tuple[tuple[int, tuple[int, ...]], ...], ...]:
        """As `cut`, each piece with the index of the tensor that it was cut from."""
        if n < 1:
            raise ValueError("a vector is cut into at least one part")
        rows = [shape[0] if shape else 1 for shape in self.shapes]
        bounds = self._cuts(rows, min(n, sum(rows)))
        first_row = [0, *accumulate(rows)]
        parts = []
        for start, end in pairwise(bounds):
            part = []
            for index in range(bisect_right(first_row, start) - 1, len(rows)):
                from_row, to_row = max(start, first_row[index]), min(end, first_row[index + 1])
                if from_row >= to_row:
                    break
                shape = self.shapes[index]
                part.append((index, (to_row - from_row, *shape[1:]) if shape else shape))
            parts.append(tuple(part))
        return tuple(parts)

    def _cuts(self, rows: list[int], n: int) -> list[int]:
        """The first row of each of `n` parts, and the number of rows at the end: those nearest to an equal division."""
        sizes = [prod(shape) for shape in self.shapes]
        first_row, first_element = [0, *accumulate(rows)], [0, *accumulate(sizes)]
        bounds = [0]
        for number in range(1, n):
            target = number * first_element[-1] // n
            index = bisect_right(first_element, target) - 1
            row_elements = sizes[index] // rows[index]
            row = first_row[index] + (target - first_element[index] + row_elements // 2) // row_elements
            # Every part keeps a row at least, this one and those after it.
            bounds.append(min(max(row, bounds[-1] + 1), first_row[-1] - (n - number)))
        return [*bounds, first_row[-1]]
