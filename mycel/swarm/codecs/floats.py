"""Updates in float32, float16 and bfloat16: 32, 16 and 16 bits a number.

float16 numbers share a power of two (scales.py), so that small updates do not vanish; one byte says which.

Ring: algorithms.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mycel.swarm.codecs.bits import Reader
from mycel.swarm.codecs.codec import Encoder, PlainEncoder, check_decoded
from mycel.swarm.codecs.layout import Layout
from mycel.swarm.codecs.scales import exponent_byte, read_exponent, shared_exponent

__all__ = ["BFloat16", "Float16", "Float32"]


class Float32:
    """The numbers as they are."""

    name = "float32"
    layered = False
    repeatable = True

    def encoder(self, layout: Layout) -> Encoder:
        return PlainEncoder(lambda x_P, _: x_P.numpy().astype("<f4", copy=False).tobytes(), layout)

    def decode(self, body: bytes | memoryview, layout: Layout) -> Tensor:
        return check_decoded(_numbers(Reader(body), layout, torch.float32))

    def max_bytes(self, layout: Layout) -> int:
        return 4 * layout.n_elements


class BFloat16:
    """Rounded to 8 bits of mantissa, at full range."""

    name = "bfloat16"
    layered = False
    repeatable = True

    def encoder(self, layout: Layout) -> Encoder:
        return PlainEncoder(_pack_bfloat16, layout)

    def decode(self, body: bytes | memoryview, layout: Layout) -> Tensor:
        return check_decoded(_numbers(Reader(body), layout, torch.bfloat16).to(torch.float32))

    def max_bytes(self, layout: Layout) -> int:
        return 2 * layout.n_elements


class Float16:
    """Rounded to 11 bits of mantissa, in units of a power of two that all share."""

    name = "float16"
    layered = False
    repeatable = True

    def encoder(self, layout: Layout) -> Encoder:
        return PlainEncoder(_pack_float16, layout)

    def decode(self, body: bytes | memoryview, layout: Layout) -> Tensor:
        reader = Reader(body)
        unit = 2.0 ** read_exponent(reader)
        return check_decoded(_numbers(reader, layout, torch.float16).to(torch.float32).mul_(unit))

    def max_bytes(self, layout: Layout) -> int:
        return 1 + 2 * layout.n_elements


def _numbers(reader: Reader, layout: Layout, dtype: torch.dtype) -> Tensor:
    """All that is left, which has to be one number for each element."""
    data = reader.take(layout.n_elements * dtype.itemsize)
    reader.end()
    # A copy, as torch warns of memory that is not to be written to.
    return torch.frombuffer(bytearray(data), dtype=dtype)


def _raw(x_P: Tensor) -> bytes:
    return bytes(x_P.view(torch.uint8).numpy().data)


def _pack_bfloat16(x_P: Tensor, _: bytes) -> bytes:
    # The last half step before float32 ends would round to infinity.
    limit = torch.finfo(torch.bfloat16).max
    return _raw(x_P.clamp(-limit, limit).to(torch.bfloat16))


def _pack_float16(x_P: Tensor, _: bytes) -> bytes:
    least, most = torch.aminmax(x_P)
    exponent = shared_exponent(max(-float(least), float(most)))
    return exponent_byte(exponent) + _raw((x_P * 2.0**-exponent).to(torch.float16))
