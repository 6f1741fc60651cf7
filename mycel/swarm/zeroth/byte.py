"""A number in one byte: sign and logarithm, eight steps to the octave, decoded by a table of integers.

    bit 7      1 for a negative number
    bits 0..6  m: 0 for zero, otherwise |g| = 2^((m - 64) / 8), that is 2^-7.875 = 0.0043 to 2^7.875 = 235

A step is 9.05 %, so that a code is within 4.43 % of its number. What rounds to no more than half of the least magnitude
is zero, what is beyond the largest becomes the largest. 0x80, which would be -0, is the code of a measurement that was
not finite: it changes nothing, and an auditor can check it like any other.

No logarithm is ever taken: magnitudes are integers in units of 2^-38, eight mantissas shifted by the octave, and the
code of a number is where it stands among the middles between them. So every machine has the same codes.

Ring: pure.
"""

from __future__ import annotations

import math
from bisect import bisect_left

__all__ = ["LARGEST", "UNIT_BITS", "VOID", "decode", "encode", "ladder", "magnitude", "value"]

UNIT_BITS = 38
VOID = 0x80
LARGEST = 127
_NEGATIVE = 0x80

# round(2^(j/8) * 2^30) and round(2^((j + 1/2)/8) * 2^30) for j = 0 to 7
_MANTISSAS = (1073741824, 1170923762, 1276901417, 1392470869, 1518500250, 1655936265, 1805811301, 1969251188)
_MIDDLES = (1121280436, 1222764986, 1333434672, 1454120821, 1585730000, 1729250827, 1885761398, 2056437387)


def _row(mantissas: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(mantissas[m % 8] << m // 8 for m in range(1, LARGEST + 1))


_MAGNITUDES = (0, *_row(_MANTISSAS))
# _EDGES[m] is the largest number, in units of 2^-38, whose code is m; beyond the last everything is LARGEST.
_EDGES = (_MAGNITUDES[1] // 2, *_row(_MIDDLES)[:-1])


def magnitude(code: int) -> int:
    """|g| of a code in units of 2^-38, an exact integer."""
    return _MAGNITUDES[code & LARGEST]


def value(code: int) -> int:
    """g of a code in units of 2^-38.

    >>> value(64) / 2**38, value(0x80 + 72) / 2**38, value(VOID)
    (1.0, -2.0, 0)
    """
    return -magnitude(code) if code & _NEGATIVE else magnitude(code)


def decode(code: int) -> float:
    """g of a code; exact, since no magnitude has more than 31 significant bits."""
    return value(code) / (1 << UNIT_BITS)


def encode(g: float) -> int:
    """The code nearest to g in the logarithm; VOID for NaN and the infinities.

    >>> [encode(x) for x in (1.0, -1.0, 0.0, -0.0, 1e9, float("nan"))]
    [64, 192, 0, 0, 127, 128]
    """
    if not math.isfinite(g):
        return VOID
    m = bisect_left(_EDGES, abs(g) * float(1 << UNIT_BITS))  # exact, or infinite: a power of two
    return m | _NEGATIVE if g < 0 and m else m


def ladder(code: int) -> int:
    """Codes in the order of their numbers, -127 to 127: neighbours differ by one step. 0 for VOID."""
    return -(code & LARGEST) if code & _NEGATIVE else code
