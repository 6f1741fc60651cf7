"""A few centroids for each tensor, and entropy codes: "kmeans:15", after FedZip.

    keep the share `keep` of largest |x| of each tensor;  k centroids of them by Lloyd's rule in one dimension;
    positions in gap codes, the numbers of centroids in Huffman codes

    body: the centroids of each tensor in turn (scales.py), positions (positions.py) unless all is kept, and the symbols
    as deflate with Huffman codes alone, one byte a symbol before

Lloyd's rule on sorted numbers needs but prefix sums and bisection: at most 64 rounds of k log N. Source: Malekijoo et
al., arXiv 2102.01593 (top-z, 3 centroids, Huffman or position codes).

Legend: P elements, N kept, K centroids.

Ring: algorithms.
"""

from __future__ import annotations

from math import prod

import numpy as np
import torch
from torch import Tensor

from mycel.protocols.errors import RemoteProtocolError
from mycel.swarm.codecs.bits import Array, Reader
from mycel.swarm.codecs.codec import Encoder, PlainEncoder, check_decoded
from mycel.swarm.codecs.layout import Layout
from mycel.swarm.codecs.positions import Blocks, max_position_bytes, pack_positions, read_positions
from mycel.swarm.codecs.scales import pack_half, read_half
from mycel.swarm.codecs.wrapping import deflated, inflated

__all__ = ["KMeans"]

_ROUNDS = 64


class KMeans:
    """`k` centroids a tensor for the `keep` of its elements that are largest; all others decode to zero."""

    layered = True
    repeatable = False  # deflate streams differ with the library

    def __init__(self, k: int, keep: float = 0.1) -> None:
        self.name = f"kmeans:{k}" + (f",keep={keep}" if keep != 0.1 else "")
        self._k = k
        self._keep = keep

    def encoder(self, layout: Layout) -> Encoder:
        return PlainEncoder(lambda x_P, _: self._pack(x_P, layout), layout)

    def max_bytes(self, layout: Layout) -> int:
        blocks = self._blocks(layout)
        positions = 0 if self._keep == 1.0 else max_position_bytes(blocks)
        return 1 + 2 * int(self._table_sizes(blocks).sum()) + positions + 1 + blocks.n_positions

    def _blocks(self, layout: Layout) -> Blocks:
        sizes = [prod(shape) for shape in layout.shapes]
        return Blocks(np.array(sizes), np.array([max(1, round(self._keep * size)) for size in sizes]))

    def _table_sizes(self, blocks: Blocks) -> Array:
        """How many centroids each tensor has: no more than numbers to stand for."""
        return np.minimum(self._k, blocks.counts)

    def _pack(self, x_P: Tensor, layout: Layout) -> bytes:
        blocks = self._blocks(layout)
        position_N = self._largest(x_P, layout, blocks)
        kept_N, ends = x_P.numpy()[position_N], np.cumsum(blocks.counts)
        parts = [
            (kept_N[end - count : end], _centroids(kept_N[end - count : end], int(size)))
            for end, count, size in zip(ends, blocks.counts, self._table_sizes(blocks), strict=True)
        ]
        tables, sent = pack_half(np.concatenate([centroid_K for _, centroid_K in parts]))
        symbols, first = [], 0
        for kept, centroid_K in parts:
            # By what the reader will have: float16 rounding keeps their order.
            borders = _middles(sent[first : first + len(centroid_K)])
            symbols.append(np.searchsorted(borders, kept).astype(np.uint8))
            first += len(centroid_K)
        positions = b"" if self._keep == 1.0 else pack_positions(position_N, blocks)
        return tables + positions + deflated(np.concatenate(symbols).tobytes())

    def _largest(self, x_P: Tensor, layout: Layout, blocks: Blocks) -> Array:
        """Ascending positions of what is kept of each tensor."""
        if self._keep == 1.0:
            return np.arange(layout.n_elements)
        found = []
        for (where, _), count in zip(layout.pieces(), blocks.counts, strict=True):
            chosen = x_P[where].abs().topk(int(count), sorted=False).indices.sort().values
            found.append(chosen.numpy() + where.start)
        return np.concatenate(found)

    def decode(self, body: bytes | memoryview, layout: Layout) -> Tensor:
        blocks, reader = self._blocks(layout), Reader(body)
        n, table_sizes = blocks.n_positions, self._table_sizes(blocks)
        centroids = read_half(reader, int(table_sizes.sum()))
        position_N = np.arange(n) if self._keep == 1.0 else read_positions(reader, blocks)
        symbol_N = np.frombuffer(inflated(reader.rest(), n), np.uint8).astype(np.int64)
        if len(symbol_N) != n:
            raise RemoteProtocolError(f"an update has {len(symbol_N)} numbers, not {n}")
        tensor_N = np.searchsorted(np.cumsum(blocks.sizes), position_N, side="right")
        if (symbol_N >= table_sizes[tensor_N]).any():
            raise RemoteProtocolError("an update names a centroid that does not exist")
        first = np.cumsum(table_sizes) - table_sizes
        x_P = torch.zeros(layout.n_elements)
        x_P[torch.from_numpy(position_N)] = torch.from_numpy(centroids[first[tensor_N] + symbol_N])
        return check_decoded(x_P)


def _centroids(kept: Array, k: int) -> Array:
    """Ascending float32 [K]: Lloyd's rule from the quantiles on."""
    ordered = np.sort(kept)
    sums = np.concatenate([[0.0], np.cumsum(ordered, dtype=np.float64)])
    centroid_K = ordered[((np.arange(k) + 0.5) * len(ordered) / k).astype(np.int64)].astype(np.float64)
    for _ in range(_ROUNDS):
        bounds = np.concatenate([[0], np.searchsorted(ordered, _middles(centroid_K)), [len(ordered)]])
        counts = np.diff(bounds)
        # One that stands for nothing stays where it is.
        means = np.diff(sums[bounds]) / np.maximum(counts, 1)
        before_K, centroid_K = centroid_K, np.sort(np.where(counts > 0, means, centroid_K))
        if np.array_equal(before_K, centroid_K):
            break
    return centroid_K.astype(np.float32)


def _middles(centroid_K: Array) -> Array:
    return (centroid_K[1:].astype(np.float64) + centroid_K[:-1]) / 2
