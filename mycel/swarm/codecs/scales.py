"""float16 numbers under one common power of two: the scales of blocks, and values, of any magnitude.

    x' = f * 2^e,  f float16, e one byte for all of them, chosen so that the largest lies in [2^14, 2^15)

Updates are often so small (1e-9 after a late outer step) that a bare float16 would round them to zero. Numbers 2^38
times smaller than the largest still do become zero.

Ring: algorithms.
"""

from __future__ import annotations

import math

import numpy as np

from mycel.protocols.errors import RemoteProtocolError
from mycel.swarm.codecs.bits import Array, Reader

__all__ = ["exponent_byte", "pack_half", "read_exponent", "read_half", "read_scales", "shared_exponent"]

_LOWEST, _HIGHEST = -126, 113  # 2^e and 2^-e are normal float32, and 2^15 * 2^e is finite
_BIAS = 126


def shared_exponent(largest: float) -> int:
    return min(max(math.frexp(largest)[1] - 15, _LOWEST), _HIGHEST) if largest else 0


def pack_half(values: Array) -> tuple[bytes, Array]:
    """1 + 2 n bytes for n finite float32 `values`, and as float32 what a reader makes of them."""
    exponent = shared_exponent(float(np.abs(values).max(initial=0.0)))
    halves = (values * np.float32(2.0**-exponent)).astype("<f2")
    return exponent_byte(exponent) + halves.tobytes(), halves.astype(np.float32) * np.float32(2.0**exponent)


def read_half(reader: Reader, n: int) -> Array:
    """The float32 numbers of `pack_half`. Raises RemoteProtocolError for any that are not finite."""
    exponent = read_exponent(reader)
    halves = reader.array(n, "<f2")
    # Its bits tell, without a comparison for each: all ones in the exponent are infinity and NaN.
    if int((halves.view("<u2") & 0x7FFF).max(initial=0)) >= 0x7C00:
        raise RemoteProtocolError("an update has scales that are not finite")
    with np.errstate(over="ignore"):
        values = halves.astype(np.float32) * np.float32(2.0**exponent)
    if not np.isfinite(values).all():
        raise RemoteProtocolError("an update has scales that are not finite")
    return values


def read_exponent(reader: Reader) -> int:
    exponent = reader.number(1) - _BIAS
    if not _LOWEST <= exponent <= _HIGHEST:
        raise RemoteProtocolError(f"an update has numbers in units of 2^{exponent}")
    return exponent


def exponent_byte(exponent: int) -> bytes:
    return bytes([exponent + _BIAS])


def read_scales(reader: Reader, n: int) -> Array:
    """As `read_half`, none below zero."""
    scales = read_half(reader, n)
    if np.signbit(scales).any():
        raise RemoteProtocolError("an update has a negative scale")
    return scales
