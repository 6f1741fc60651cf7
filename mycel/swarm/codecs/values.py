"""The numbers of a sparse update, few and of unlike size: in groups of 256 with scales of their own.

    float32, float16  as they are, float16 under one power of two (scales.py)
    int4, int8        s = max|v| / (2^(b-1) - 1) of the group, v' = s round(v / s)
    int2              a sign, and one of two magnitudes: the means of those below and those above the group's mean |v|
    sign              a sign, and the group's mean |v|

int2 is close to the four bins of SparseLoCo (arXiv 2508.15706): what survives top-k has no middle, but two sides.

Legend: N values, G groups, E = 256 values of a group.

Ring: algorithms.
"""

from __future__ import annotations

import numpy as np

from mycel.protocols.errors import RemoteProtocolError
from mycel.swarm.codecs.bits import Array, Reader, pack, packed_bytes
from mycel.swarm.codecs.scales import pack_half, read_half, read_scales

__all__ = ["GROUP", "VALUE_KINDS", "max_value_bytes", "pack_values", "read_values"]

GROUP = 256
VALUE_KINDS = ("float32", "float16", "int8", "int4", "int2", "sign")
_BITS = {"int8": 8, "int4": 4, "int2": 2, "sign": 1}


def max_value_bytes(n: int, kind: str) -> int:
    """What `n` values take; never less."""
    if kind in ("float32", "float16"):
        return 4 * n if kind == "float32" else 1 + 2 * n
    per_group = 4 if kind == "int2" else 2
    return 1 + per_group * -(-n // GROUP) + packed_bytes(n, _BITS[kind])


def pack_values(values_N: Array, kind: str) -> bytes:
    """The bytes of finite float32 values."""
    if kind == "float32":
        return values_N.astype("<f4", copy=False).tobytes()
    if kind == "float16":
        return pack_half(values_N)[0]
    n = len(values_N)
    group_N = np.arange(n) // GROUP
    magnitude_N = np.abs(values_N)
    sign_N = np.signbit(values_N).astype(np.uint8)
    if kind == "sign":
        scales, _ = pack_half(_mean(magnitude_N, group_N))
        return scales + pack(sign_N, 1)
    if kind == "int2":
        above_N = magnitude_N > _mean(magnitude_N, group_N)[group_N]
        levels, _ = pack_half(_mean(magnitude_N, 2 * group_N + above_N, 2 * (int(group_N[-1]) + 1)))
        return levels + pack(sign_N << 1 | above_N, 2)
    most = (1 << (_BITS[kind] - 1)) - 1
    largest_G = np.maximum.reduceat(magnitude_N, np.arange(0, n, GROUP))
    scales, scale_G = pack_half((largest_G / most).astype(np.float32))
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        ratio_N = np.nan_to_num(values_N / scale_G[group_N])
    codes_N = np.clip(np.rint(ratio_N), -most, most) + most
    return scales + pack(codes_N.astype(np.uint8), _BITS[kind])


def read_values(reader: Reader, n: int, kind: str) -> Array:
    """The float32 values; the caller checks that they are finite where it says so: float32 and int8 may not be."""
    if kind == "float32":
        return reader.array(n, "<f4")
    if kind == "float16":
        return read_half(reader, n)
    n_groups = -(-n // GROUP)
    scale = read_scales(reader, n_groups * (2 if kind == "int2" else 1))
    codes_N = reader.packed(n, _BITS[kind])
    group_N = np.arange(n) // GROUP
    if kind == "sign":
        return np.where(codes_N == 0, scale[group_N], -scale[group_N])
    if kind == "int2":
        level_N = scale[2 * group_N + (codes_N & 1)]
        return np.where(codes_N & 2 == 0, level_N, -level_N)
    most = (1 << (_BITS[kind] - 1)) - 1
    if int(codes_N.max()) > 2 * most:
        raise RemoteProtocolError("an update has a number beyond its scale")
    with np.errstate(over="ignore"):
        return (codes_N.astype(np.float32) - np.float32(most)) * scale[group_N]


def _mean(magnitude_N: Array, group_N: Array, n_groups: int = 0) -> Array:
    """Each group's mean as float32, 0 for an empty one."""
    sums = np.bincount(group_N, magnitude_N, n_groups)
    counts = np.bincount(group_N, minlength=n_groups)
    return np.asarray((sums / np.maximum(counts, 1)).astype(np.float32))
