"""The strongest waves of small patches: "dct:32", the codec of DeMo.

    of each patch X of at most 64 x 64:  C = D_h X D_w^T (DCT-II);  keep its k h w / 4096 largest;  X' = D_h^T C D_w

A matrix is divided into equal patches of at most 64 x 64, a vector into pieces of at most 64, of which eight times as
large a share is kept: they are few, and sensitive. Kept coefficients have 8 bits, or with "sign" one bit, and 8 patches
or so share a scale.

The inverse is exact on every machine: D is an integer matrix, round(2^19 D), as are the coefficients, so all products
and sums are integers below 2^53, which float64 holds whatever the order; the scale is multiplied in at the end.

In DeMo the residual is the momentum: m <- 0.999 m + x, then minus what was sent. That is error feedback with a decay,
which `make_codec` adds. Source: Peng et al., arXiv 2411.19870 (DeMo); 1 bit as in Psyche.

    body: positions (positions.py), 16-bit scales (scales.py), coefficients in the order of positions

Legend: P elements, C patches of one tensor, h w a patch, N kept of all, G groups of patches that share a scale.

Ring: algorithms.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache, lru_cache
from math import prod

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from mycel.protocols.errors import RemoteProtocolError
from mycel.swarm.codecs.bits import Array, Reader, pack, packed_bytes
from mycel.swarm.codecs.codec import Encoder, PlainEncoder, check_decoded
from mycel.swarm.codecs.layout import Layout
from mycel.swarm.codecs.positions import Blocks, max_position_bytes, pack_positions, read_positions
from mycel.swarm.codecs.scales import pack_half, read_scales

__all__ = ["Dct", "basis"]

EDGE = 64
_UNIT = 1 << 19  # of the integer basis: 127 * 2^38 * 2 * 64 is 2^52
_MOST = 127
_GROUP = 256  # about so many coefficients share a scale
_PATCHES = 256  # transformed at a time


@dataclass(frozen=True)
class _Tensor:
    """How one tensor is divided: `across` patches of h x w in a row, `n_patches` in all."""

    where: slice
    n: int
    m: int
    h: int
    w: int
    kept: int
    n_groups: int

    @property
    def across(self) -> int:
        return -(-self.m // self.w)

    @property
    def n_patches(self) -> int:
        return -(-self.n // self.h) * self.across

    def patches(self, x_P: Tensor) -> Tensor:
        """[C, h, w], filled up with zeros at the edges."""
        matrix_nm = functional.pad(x_P.view(self.n, self.m), (0, -self.m % self.w, 0, -self.n % self.h))
        split = matrix_nm.view(-1, self.h, self.across, self.w).transpose(1, 2)
        return split.reshape(-1, self.h, self.w)

    def vector(self, patch_Chw: Tensor) -> Tensor:
        split = patch_Chw.view(-1, self.across, self.h, self.w).transpose(1, 2)
        return split.reshape(-1, self.across * self.w)[: self.n, : self.m].reshape(-1)

    @property
    def patches_per_group(self) -> int:
        return -(-self.n_patches // self.n_groups)


class Dct:
    """`k` coefficients of each 64 x 64 patch, in proportion of smaller ones; `sign` keeps their signs alone."""

    layered = True
    repeatable = False  # encoders use matrix products of the library

    def __init__(self, k: int, *, sign: bool = False) -> None:
        self.name = f"dct:{k}" + (",sign" if sign else "")
        self._k = k
        self._sign = sign

    def encoder(self, layout: Layout) -> Encoder:
        return PlainEncoder(lambda x_P, _: self._pack(x_P, layout), layout)

    def max_bytes(self, layout: Layout) -> int:
        tensors = _tensors(layout, self._k)
        n = sum(one.kept * one.n_patches for one in tensors)
        width = 1 if self._sign else 8
        return (
            max_position_bytes(_blocks(tensors)) + 1 + 2 * sum(one.n_groups for one in tensors) + packed_bytes(n, width)
        )

    def _pack(self, x_P: Tensor, layout: Layout) -> bytes:
        tensors = _tensors(layout, self._k)
        chosen = [_strongest(one, x_P[one.where]) for one in tensors]
        starts = np.cumsum([0, *(one.n_patches * one.h * one.w for one in tensors)])
        position_N = np.concatenate([at + start for (at, _), start in zip(chosen, starts, strict=False)])
        levels = [_levels(one, at, value, self._sign) for one, (at, value) in zip(tensors, chosen, strict=True)]
        scales, scale_G = pack_half(np.concatenate(levels))
        value_N = np.concatenate([value for _, value in chosen])
        if self._sign:
            codes, width = (value_N < 0).astype(np.uint8), 1
        else:
            group_N = np.concatenate([at + start for at, start in _groups(tensors, [at for at, _ in chosen])])
            with np.errstate(divide="ignore", invalid="ignore"):
                ratio_N = np.where(scale_G[group_N] > 0, value_N / scale_G[group_N], 0.0)
            codes, width = (np.clip(np.rint(ratio_N), -_MOST, _MOST) + _MOST).astype(np.uint8), 8
        return pack_positions(position_N, _blocks(tensors)) + scales + pack(codes, width)

    def decode(self, body: bytes | memoryview, layout: Layout) -> Tensor:
        tensors, reader = _tensors(layout, self._k), Reader(body)
        blocks = _blocks(tensors)
        position_N = read_positions(reader, blocks)
        scale_G = torch.from_numpy(read_scales(reader, sum(one.n_groups for one in tensors)))
        level_N = self._read_levels(reader, len(position_N))
        x_P = torch.empty(layout.n_elements)
        first_element = first_group = 0
        for one in tensors:
            size = one.n_patches * one.h * one.w
            start, end = np.searchsorted(position_N, (first_element, first_element + size))
            at = position_N[start:end] - first_element
            scales = scale_G[first_group : first_group + one.n_groups]
            x_P[one.where] = _inverse(one, at, level_N[start:end], scales)
            first_element += size
            first_group += one.n_groups
        return check_decoded(x_P)

    def _read_levels(self, reader: Reader, n: int) -> Array:
        codes_N = reader.packed(n, 1 if self._sign else 8)
        reader.end()
        if self._sign:
            return 1.0 - 2.0 * codes_N.astype(np.float64)
        if int(codes_N.max()) > 2 * _MOST:
            raise RemoteProtocolError("an update has a number beyond its scale")
        return codes_N.astype(np.float64) - _MOST


@cache
def basis(size: int) -> Tensor:
    """round(2^19 D), float64 [size, size], of the orthonormal DCT-II: D D^T = 1.

    D[u, x] = sqrt((1 if u == 0 else 2) / size) cos(pi (2 x + 1) u / (2 size))
    """
    rows = [
        [
            round(_UNIT * math.sqrt((2 if u else 1) / size) * math.cos(math.pi * (2 * x + 1) * u / (2 * size)))
            for x in range(size)
        ]
        for u in range(size)
    ]
    return torch.tensor(rows, dtype=torch.float64)


@lru_cache(maxsize=64)
def _tensors(layout: Layout, k: int) -> tuple[_Tensor, ...]:
    return tuple(_divided(where, shape, k) for where, shape in layout.pieces())


def _divided(where: slice, shape: tuple[int, ...], k: int) -> _Tensor:
    n, m = (shape[0], prod(shape[1:])) if len(shape) > 1 else (1, prod(shape))
    h, w = (-(-size // -(-size // EDGE)) for size in (n, m))
    share = k / EDGE**2 * (8 if len(shape) < 2 else 1)
    kept = min(max(1, round(share * h * w)), h * w)
    n_patches = -(-n // h) * -(-m // w)
    per_group = max(1, _GROUP // kept)
    return _Tensor(where, n, m, h, w, kept, -(-n_patches // per_group))


def _blocks(tensors: tuple[_Tensor, ...]) -> Blocks:
    repeats = [one.n_patches for one in tensors]
    return Blocks(
        np.repeat([one.h * one.w for one in tensors], repeats), np.repeat([one.kept for one in tensors], repeats)
    )


def _runs(n_patches: int) -> Iterator[slice]:
    for start in range(0, n_patches, _PATCHES):
        yield slice(start, min(start + _PATCHES, n_patches))


def _strongest(one: _Tensor, x_P: Tensor) -> tuple[Array, Array]:
    """Ascending positions among the tensor's coefficients, and what stands there."""
    patch_Chw = one.patches(x_P)
    left, right = (basis(size).to(torch.float32) / _UNIT for size in (one.h, one.w))
    positions, values = [], []
    for run in _runs(one.n_patches):
        flat = (left @ patch_Chw[run] @ right.T).view(-1, one.h * one.w)
        offsets = flat.abs().topk(one.kept, dim=1, sorted=False).indices.sort(dim=1).values
        values.append(flat.gather(1, offsets).view(-1).numpy())
        starts = torch.arange(run.start, run.stop).unsqueeze(1) * (one.h * one.w)
        positions.append((offsets + starts).view(-1).numpy())
    return np.concatenate(positions), np.concatenate(values)


def _levels(one: _Tensor, at: Array, value: Array, sign: bool) -> Array:
    """The scale of each group: the mean for signs, else such that the largest becomes 127."""
    group = at // (one.h * one.w * one.patches_per_group)
    if sign:
        sums = np.bincount(group, np.abs(value), one.n_groups)
        return np.asarray((sums / np.bincount(group, minlength=one.n_groups)).astype(np.float32))
    firsts = np.flatnonzero(np.diff(group, prepend=-1))
    return np.asarray(np.maximum.reduceat(np.abs(value), firsts) / np.float32(_MOST))


def _groups(tensors: tuple[_Tensor, ...], positions: list[Array]) -> Iterator[tuple[Array, int]]:
    """For each tensor the groups of its coefficients, and the number of its first group."""
    first = 0
    for one, at in zip(tensors, positions, strict=True):
        yield at // (one.h * one.w * one.patches_per_group), first
        first += one.n_groups


def _inverse(one: _Tensor, at: Array, level: Array, scale_G: Tensor) -> Tensor:
    """The tensor's elements: integers times a power of two and their group's scale."""
    left, right = basis(one.h), basis(one.w)
    area = one.h * one.w
    scale_C = scale_G.repeat_interleave(one.patches_per_group)[: one.n_patches]
    patch_Chw = torch.empty(one.n_patches, one.h, one.w)
    for run in _runs(one.n_patches):
        start, end = np.searchsorted(at, (run.start * area, run.stop * area))
        flat = torch.zeros((run.stop - run.start) * area, dtype=torch.float64)
        flat[torch.from_numpy(at[start:end] - run.start * area)] = torch.from_numpy(level[start:end])
        exact_Chw = left.T @ flat.view(-1, one.h, one.w) @ right
        patch_Chw[run] = exact_Chw.mul_(1.0 / _UNIT**2).to(torch.float32) * scale_C[run].view(-1, 1, 1)
    return one.vector(patch_Chw)
