"""Activations and their gradients as they cross from one stage to the next: float32, bfloat16, or blocks of int8.

    int8: of each 128 elements of the last dimension  s = max|x| / 127,  q = round(x / s),  x' = q s,  |x' - x| <= s/2

Blockwise absmax as in SWARM (Ryabinin et al., arXiv 2301.11913), with one float32 scale for a block: 528 bytes for 512
elements, 3.88 times less than float32. Rounding is to the nearest, ties to even, so equal inputs give equal bytes.

Legend: B sequences, T tokens, W width at the border, G blocks of 128 elements that a width makes.

Ring: algorithms.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

from mycel.protocols.errors import RemoteProtocolError
from mycel.protocols.tensors import from_wire, to_wire
from mycel.protocols.wire import WireTensor

__all__ = ["BLOCK", "BorderCodec", "border_bytes", "decode_border", "encode_border"]

BorderCodec = Literal["int8", "bfloat16", "float32"]
Shape = tuple[int, int, int]

BLOCK = 128
_LARGEST = torch.finfo(torch.float32).max
_LARGEST_BFLOAT16 = torch.finfo(torch.bfloat16).max
# Below the first, x / s would not be exact to half a step; above the second, q s would overflow.
_SCALES = (torch.finfo(torch.float32).tiny, _LARGEST / 128)


def encode_border(tensor_BTW: Tensor, codec: BorderCodec) -> tuple[WireTensor, ...]:
    """The wire tensors of one float32 border tensor; "float32" shares its memory.

    Raises ValueError for values that are not finite (or that the codec cannot hold: beyond 3.3e38), and for another
    dtype or number of dimensions.
    """
    if tensor_BTW.dtype != torch.float32 or tensor_BTW.dim() != 3 or not tensor_BTW.numel():
        raise ValueError(f"a border takes float32 [B, T, W], not {list(tensor_BTW.shape)} {tensor_BTW.dtype}")
    tensor_BTW = tensor_BTW.detach()
    if codec == "int8":
        return _encode_int8(tensor_BTW)
    if not _finite(tensor_BTW, _LARGEST if codec == "float32" else _LARGEST_BFLOAT16):
        raise ValueError("a border tensor is not finite")
    return (to_wire(tensor_BTW if codec == "float32" else tensor_BTW.to(torch.bfloat16)),)


def decode_border(wires: Sequence[WireTensor], shape: Shape, codec: BorderCodec) -> Tensor:
    """The float32 tensor of `shape` that a peer sent; "float32" is a view of the received bytes.

    Raises RemoteProtocolError for another number of tensors, dtype, shape or codec than `codec` makes of `shape`, and
    for values that are not finite, or scales that are negative or not finite.
    """
    expected = _expected(shape, codec)
    if len(wires) != len(expected):
        raise RemoteProtocolError(f"{len(wires)} tensors where a border of {codec} has {len(expected)}")
    tensors: list[Tensor] = []
    for wire, (dtype, needed) in zip(wires, expected, strict=True):
        # Before a byte is read: what does not fit costs nothing.
        if (wire.header.dtype, wire.header.shape) != (dtype, needed):
            raise RemoteProtocolError(
                f"a border tensor of {wire.header.dtype} {list(wire.header.shape)}, not {dtype} {list(needed)}"
            )
        tensors.append(from_wire(wire))
    if codec == "int8":
        return _decode_int8(tensors[0], tensors[1])
    tensor_BTW = tensors[0].to(torch.float32)
    if not _finite(tensor_BTW, _LARGEST):
        raise RemoteProtocolError("a border tensor is not finite")
    return tensor_BTW


def border_bytes(shape: Shape, codec: BorderCodec) -> int:
    """What one border tensor weighs on the wire, without its headers."""
    item_bytes = {"int8": 1, "bfloat16": 2, "float32": 4}
    return sum(b * t * w * item_bytes[dtype] for dtype, (b, t, w) in _expected(shape, codec))


def _expected(shape: Shape, codec: BorderCodec) -> tuple[tuple[str, Shape], ...]:
    if codec != "int8":
        return ((codec, shape),)
    return (("int8", shape), ("float32", (*shape[:2], _n_blocks(shape[2]))))


def _finite(tensor_BTW: Tensor, limit: float) -> bool:
    # Vectorised, where isfinite().all() takes fifteen times as long; NaN comes out as NaN, and fails.
    lowest, highest = torch.aminmax(tensor_BTW)
    return -limit <= float(lowest) and float(highest) <= limit


def _n_blocks(width: int) -> int:
    return -(-width // BLOCK)


def _encode_int8(tensor_BTW: Tensor) -> tuple[WireTensor, WireTensor]:
    n_sequences, n_tokens, width = tensor_BTW.shape
    blocks_BTGE = functional.pad(tensor_BTW, (0, -width % BLOCK)).view(n_sequences, n_tokens, -1, BLOCK)
    largest_BTG = blocks_BTGE.abs().amax(dim=-1)
    divisor_BTG = (largest_BTG / 127).clamp(min=_SCALES[0])
    if not bool((divisor_BTG <= _SCALES[1]).all()):  # also for NaN
        raise ValueError("a border tensor is not finite")
    scale_BTG = torch.where(largest_BTG > 0, divisor_BTG, 0.0)
    values_BTW = (blocks_BTGE / divisor_BTG.unsqueeze(-1)).round_().to(torch.int8)
    return to_wire(values_BTW.view(n_sequences, n_tokens, -1)[..., :width]), to_wire(scale_BTG)


def _decode_int8(values_BTW: Tensor, scale_BTG: Tensor) -> Tensor:
    # Written so that NaN fails too. One minimum and maximum of the scales bounds every value.
    if not (float(scale_BTG.min()) >= 0.0 and float(scale_BTG.max()) <= _SCALES[1]):
        raise RemoteProtocolError("a border tensor has a scale that is negative, not finite or too large")
    width = values_BTW.shape[-1]
    if width % BLOCK:
        return values_BTW.to(torch.float32).mul_(scale_BTG.repeat_interleave(BLOCK, dim=-1)[..., :width])
    blocks_BTGE = values_BTW.to(torch.float32).view(*scale_BTG.shape, BLOCK)
    return blocks_BTGE.mul_(scale_BTG.unsqueeze(-1)).view(values_BTW.shape)
