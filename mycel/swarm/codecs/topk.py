"""The largest numbers of each block of 4096, with their positions: "topk:0.01".

    keep of each block of n elements the max(1, round(density n)) of largest |x|

By blocks, as in SparseLoCo (arXiv 2508.15706), rather than over the whole vector: a tensor of small gradients is not
starved by one of large ones, blocks are chosen from in parallel, and positions may be coded in 12 bits. Nothing is lost
for good only with error feedback ("+ef"), which top-k needs (training study, R10).

    body: positions (positions.py), values in the order of positions (values.py)

Legend: P elements, N kept.

Ring: algorithms.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from mycel.swarm.codecs.bits import Array, Reader
from mycel.swarm.codecs.codec import Encoder, PlainEncoder, check_decoded
from mycel.swarm.codecs.layout import Layout
from mycel.swarm.codecs.positions import BLOCK_BITS, Blocks, max_position_bytes, pack_positions, read_positions
from mycel.swarm.codecs.values import max_value_bytes, pack_values, read_values

__all__ = ["TOPK_BLOCK", "TopK", "largest", "max_sparse_bytes", "pack_sparse", "read_sparse", "topk_blocks"]

TOPK_BLOCK = 1 << BLOCK_BITS


class TopK:
    """`density` of the elements, at least one of each block; values as `values.VALUE_KINDS` say."""

    layered = False
    repeatable = False  # which of equal numbers is kept is the library's choice

    def __init__(self, density: float, values: str = "float16") -> None:
        self.name = f"topk:{density}" + (f",values={values}" if values != "float16" else "")
        self._density = density
        self._values = values

    def encoder(self, layout: Layout) -> Encoder:
        return PlainEncoder(self._pack, layout)

    def _pack(self, x_P: Tensor, _: bytes) -> bytes:
        return pack_sparse(x_P, largest(x_P, self._density), self._density, self._values)

    def decode(self, body: bytes | memoryview, layout: Layout) -> Tensor:
        reader = Reader(body)
        x_P = read_sparse(reader, layout.n_elements, self._density, self._values)
        reader.end()
        return x_P

    def max_bytes(self, layout: Layout) -> int:
        return max_sparse_bytes(layout.n_elements, self._density, self._values)


def _kept(size: int, density: float) -> int:
    return max(1, round(density * size))


def topk_blocks(n_elements: int, density: float) -> Blocks:
    whole, last = divmod(n_elements, TOPK_BLOCK)
    sizes = [TOPK_BLOCK] * whole + [last] * bool(last)
    counts = [_kept(TOPK_BLOCK, density)] * whole + [_kept(last, density)] * bool(last)
    return Blocks(np.array(sizes, np.int64), np.array(counts, np.int64))


def largest(x_P: Tensor, density: float) -> Array:
    """Ascending int64 positions of the elements to keep."""
    magnitude_P = x_P.abs()
    whole = x_P.numel() // TOPK_BLOCK * TOPK_BLOCK
    found = []
    if whole:
        rows = magnitude_P[:whole].view(-1, TOPK_BLOCK)
        offsets = rows.topk(_kept(TOPK_BLOCK, density), dim=1, sorted=False).indices.sort(dim=1).values
        found.append((offsets + torch.arange(0, whole, TOPK_BLOCK).unsqueeze(1)).view(-1))
    if whole < x_P.numel():
        last = magnitude_P[whole:]
        found.append(last.topk(_kept(last.numel(), density), sorted=False).indices.sort().values + whole)
    return np.asarray(torch.cat(found).numpy())


def pack_sparse(x_P: Tensor, positions: Array, density: float, values: str) -> bytes:
    """The elements of `x_P` at `positions`, which `largest` chose at that density."""
    kept_N = x_P.numpy()[positions]
    return pack_positions(positions, topk_blocks(x_P.numel(), density)) + pack_values(kept_N, values)


def read_sparse(reader: Reader, n_elements: int, density: float, values: str) -> Tensor:
    """The vector of a sparse body, zeros elsewhere. Raises RemoteProtocolError."""
    blocks = topk_blocks(n_elements, density)
    positions = read_positions(reader, blocks)
    kept_N = torch.tensor(read_values(reader, blocks.n_positions, values))
    x_P = torch.zeros(n_elements)
    x_P[torch.from_numpy(positions)] = check_decoded(kept_N)
    return x_P


def max_sparse_bytes(n_elements: int, density: float, values: str) -> int:
    blocks = topk_blocks(n_elements, density)
    return max_position_bytes(blocks) + max_value_bytes(blocks.n_positions, values)
