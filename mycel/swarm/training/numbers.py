"""Sets of microbatch numbers, as integers whose bits are members and as bytes on the wire.

Ring: pure.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

__all__ = ["all_numbers", "from_bytes", "members", "of", "to_bytes"]


def all_numbers(count: int) -> int:
    """{0, ..., count - 1}."""
    return (1 << count) - 1


def of(numbers: Iterable[int]) -> int:
    """The set of these. `of([0, 2]) == 0b101`."""
    bits = 0
    for number in numbers:
        bits |= 1 << number
    return bits


def members(bits: int) -> Iterator[int]:
    """In rising order."""
    while bits:
        lowest = bits & -bits
        yield lowest.bit_length() - 1
        bits ^= lowest


def to_bytes(bits: int) -> bytes:
    """Little-endian, without leading zeros: equal sets have equal bytes."""
    return bits.to_bytes((bits.bit_length() + 7) // 8, "little")


def from_bytes(data: bytes) -> int:
    return int.from_bytes(data, "little")
