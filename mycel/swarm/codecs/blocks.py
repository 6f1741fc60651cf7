"""Blocks of 128 numbers with a scale each: integers of 2 to 8 bits, and signs with 3 bits of exponent (E3M0).

    int b:  s = max|x| / (2^(b-1) - 1),  q = round(x / s),       x' = q s,              |x' - x| <= s (1/2 + 2^-5)
    e3m0:   s = max|x|,                  c = 0 or 1 + log2 + 6,  x' = +-s 2^(c-7) or 0,  c in 0..7, to the nearest

Scales are float16 under one common power of two (scales.py): b + 1/8 bits a number. Rounding is to the nearest, or
stochastic: up or down by chance such that the mean is right, where no error feedback makes up for a bias.

Sources: blockwise absmax as in SWARM (arXiv 2301.11913); E3M0 of outer gradients, Streaming DiLoCo (arXiv 2501.18512,
3.3).

Legend: P elements, G blocks, E = 128 elements of a block.

Ring: algorithms.
"""

from __future__ import annotations

import hashlib
from typing import Protocol

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from mycel.swarm.codecs.bits import Array, Reader, pack, packed_bytes, unpack
from mycel.swarm.codecs.codec import Encoder, PlainEncoder, check_decoded
from mycel.swarm.codecs.layout import Layout
from mycel.swarm.codecs.scales import pack_half, read_scales

__all__ = ["BLOCK", "BlockCodec", "E3M0Grid", "Grid", "IntGrid", "seeded"]

BLOCK = 128
_PIECE = (
    1 << 17
)  # elements that pass through the processor's cache at a time; whole blocks, and whole bytes when packed
_LEAST_SCALE = 2.0**-120  # below, x / s would leave float32's normal numbers


class Grid(Protocol):
    """The numbers that one code can stand for, in units of the block's scale."""

    name: str
    bits: int
    largest: float  # the largest number of a block is so many scales

    def codes(self, ratio_GE: Tensor, generator: torch.Generator | None) -> Tensor:
        """uint8 codes of x / s; may write to `ratio_GE`. A generator asks for stochastic rounding."""
        ...

    def values(self, codes_P: Array) -> Tensor:
        """x' / s as float32. NaN for codes that no encoder makes: the vector is refused for it."""
        ...


class BlockCodec:
    """Bodies of the blocks' scales and then all the codes."""

    layered = False

    def __init__(self, grid: Grid, *, stochastic: bool = False) -> None:
        self.name = grid.name + (":stochastic" if stochastic else "")
        self.repeatable = not stochastic
        self._grid = grid
        self._bits = grid.bits
        self._stochastic = stochastic

    def encoder(self, layout: Layout) -> Encoder:
        return PlainEncoder(self._pack, layout)

    def max_bytes(self, layout: Layout) -> int:
        n = layout.n_elements
        return 1 + 2 * -(-n // BLOCK) + packed_bytes(n, self._bits)

    def _pack(self, x_P: Tensor, seed: bytes) -> bytes:
        n = x_P.numel()
        largest_G = torch.cat([_in_blocks(x_P[i : i + _PIECE]).abs().amax(dim=1) for i in range(0, n, _PIECE)])
        scales, scale_G = pack_half((largest_G / self._grid.largest).numpy())
        scale_G1 = torch.from_numpy(scale_G).unsqueeze(1)
        generator = seeded(seed) if self._stochastic else None
        stream = []
        for start in range(0, n, _PIECE):
            blocks_GE = _in_blocks(x_P[start : start + _PIECE])
            scale_g1 = scale_G1[start // BLOCK :][: len(blocks_GE)]
            # Blocks whose scale vanished: so do their numbers.
            ratio_GE = torch.where(scale_g1 > _LEAST_SCALE, blocks_GE / scale_g1, 0.0)
            codes_P = self._grid.codes(ratio_GE, generator).view(-1)[: n - start]
            stream.append(pack(codes_P.numpy(), self._bits))
        return b"".join([scales, *stream])

    def decode(self, body: bytes | memoryview, layout: Layout) -> Tensor:
        n, reader = layout.n_elements, Reader(body)
        scale_G1 = torch.from_numpy(read_scales(reader, -(-n // BLOCK))).unsqueeze(1)
        stream = reader.take(packed_bytes(n, self._bits))
        reader.end()
        x_P = torch.empty(n)
        for start in range(0, n, _PIECE):
            count = min(_PIECE, n - start)
            part = stream[start * self._bits // 8 :][: packed_bytes(count, self._bits)]
            value_P = self._grid.values(unpack(part, count, self._bits))
            scale_g1 = scale_G1[start // BLOCK :][: -(-count // BLOCK)]
            x_P[start : start + count] = _in_blocks(value_P).mul(scale_g1).view(-1)[:count]
        return check_decoded(x_P)


class IntGrid:
    """Integers of `bits` bits, symmetric around zero: the code of -2^(bits-1) is not used."""

    def __init__(self, bits: int) -> None:
        self.name, self.bits = f"int{bits}", bits
        self.largest = float((1 << (bits - 1)) - 1)

    def codes(self, ratio_GE: Tensor, generator: torch.Generator | None) -> Tensor:
        if generator is None:
            ratio_GE.round_()
        else:
            ratio_GE.add_(torch.rand(ratio_GE.shape, generator=generator)).floor_()
        # float16 scales may be a little too small for the largest number.
        return ratio_GE.clamp_(-self.largest, self.largest).add_(self.largest).to(torch.uint8)

    def values(self, codes_P: Array) -> Tensor:
        value_P = np.subtract(codes_P, np.float32(self.largest), dtype=np.float32)
        if int(codes_P.max()) > 2 * self.largest:
            value_P[codes_P > 2 * self.largest] = np.nan
        return torch.from_numpy(value_P)


class E3M0Grid:
    """A sign (8) and an exponent: 0 stands for zero, c in 1..7 for 2^(c - 7); a negative zero is not used."""

    name, bits, largest = "e3m0", 4, 1.0
    _HALF = 1 << 22  # half a step of the exponent, in the bits of a float32
    _ZERO = (127 - 7) << 23  # the bits of 2^-7: from there on 2^-6 is nearer than zero

    def __init__(self) -> None:
        magnitudes = [0.0, *(2.0 ** (code - 7) for code in range(1, 8))]
        self._table = torch.tensor([*magnitudes, float("nan"), *(-m for m in magnitudes[1:])])

    def codes(self, ratio_GE: Tensor, generator: torch.Generator | None) -> Tensor:
        bits_GE = ratio_GE.view(torch.int32)
        sign_GE = (bits_GE >> 28) & 8
        magnitude_GE = ratio_GE.abs_()
        if generator is None:
            # An exponent goes up from the middle of the mantissas on; 2^-7 to 1.5 * 2^-7 goes to 2^-6 all the same.
            above_GE = bits_GE - self._ZERO
            code_GE = above_GE.clamp(min=self._HALF).add_(self._HALF).bitwise_right_shift_(23).mul_(above_GE >= 0)
        else:
            # The mantissa is the way from one power of two to the next; below 2^-6 the way from zero is linear too.
            chance_GE = torch.rand(ratio_GE.shape, generator=generator)
            mantissas_GE = (chance_GE * (1 << 23)).to(torch.int32)
            code_GE = ((bits_GE + mantissas_GE) >> 23) - (127 - 7)
            code_GE = torch.where(magnitude_GE < 2.0**-6, (chance_GE * 2.0**-6 < magnitude_GE).to(torch.int32), code_GE)
        return code_GE.clamp_(max=7).add_(sign_GE.mul_(code_GE > 0)).to(torch.uint8)

    def values(self, codes_P: Array) -> Tensor:
        return self._table.index_select(0, torch.from_numpy(codes_P.astype(np.int32)))


def seeded(seed: bytes) -> torch.Generator:
    """Chance that follows from `seed` alone."""
    return torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(seed).digest()[:8], "little"))


def _in_blocks(x_P: Tensor) -> Tensor:
    """[G, E], the last block filled up with zeros."""
    return functional.pad(x_P, (0, -x_P.numel() % BLOCK)).view(-1, BLOCK)
