"""Matrices as products of two thin ones: "powersgd:2" sends 2 (n + m) numbers for a matrix of n x m.

    P = orthonormal(M Q);  Q = M^T P;  M' = P Q^T        Q starts from the last update's: the power iteration goes on

What a rank leaves out is fed back with "+ef", which PowerSGD needs. Vectors, and matrices that would not get at least
twice as short, travel as float32; P and Q as float16 (scales.py). M' is made of elementwise products and sums in a
fixed order, not by a library's matrix product, so that all get the same bits. Source: Vogels et al., arXiv 1905.13727,
algorithm 1; here each contributor factors its own M, as contributions are looked at one by one.

Legend: P elements; n, m the dimensions of a matrix, R its rank.

Ring: algorithms.
"""

from __future__ import annotations

from math import prod

import torch
from torch import Tensor

from mycel.swarm.codecs.bits import Reader
from mycel.swarm.codecs.codec import Encoder, Turn, check_decoded, check_vector
from mycel.swarm.codecs.layout import Layout
from mycel.swarm.codecs.scales import pack_half, read_half

__all__ = ["PowerSgd"]


class PowerSgd:
    """Of tensors with more than two dimensions the first is a row, the others together a column."""

    layered = True
    repeatable = False  # encoders use matrix products of the library

    def __init__(self, rank: int) -> None:
        self.name = f"powersgd:{rank}"
        self.rank = rank

    def encoder(self, layout: Layout) -> Encoder:
        return _PowerSgdEncoder(self, layout)

    def max_bytes(self, layout: Layout) -> int:
        return sum(self._tensor_bytes(shape) for shape in layout.shapes)

    def _tensor_bytes(self, shape: tuple[int, ...]) -> int:
        return 2 + 2 * self.rank * sum(_matrix(shape)) if self.factors(shape) else 4 * prod(shape)

    def factors(self, shape: tuple[int, ...]) -> bool:
        """Whether a tensor travels as two factors."""
        return len(shape) > 1 and 2 * self.rank * sum(_matrix(shape)) <= prod(shape)

    def decode(self, body: bytes | memoryview, layout: Layout) -> Tensor:
        reader = Reader(body)
        x_P = torch.empty(layout.n_elements)
        for where, shape in layout.pieces():
            if self.factors(shape):
                n, m = _matrix(shape)
                left_Rn = torch.from_numpy(read_half(reader, n * self.rank)).view(self.rank, n)
                right_Rm = torch.from_numpy(read_half(reader, m * self.rank)).view(self.rank, m)
                _product(left_Rn, right_Rm, out_nm=x_P[where].view(n, m))
            else:
                x_P[where] = torch.tensor(reader.array(prod(shape), "<f4"))
        reader.end()
        return check_decoded(x_P)


class _PowerSgdEncoder:
    def __init__(self, codec: PowerSgd, layout: Layout) -> None:
        self._codec = codec
        self._layout = layout
        self._warm = {
            index: _start(index, _matrix(shape)[1], codec.rank)
            for index, shape in enumerate(layout.shapes)
            if codec.factors(shape)
        }
        self._turn = Turn()

    def encode(self, x_P: Tensor, seed: bytes) -> bytes:
        self._turn.check_settled()
        x_P = check_vector(x_P, self._layout)
        parts = []
        for index, (where, shape) in enumerate(self._layout.pieces()):
            if index not in self._warm:
                parts.append(x_P[where].numpy().astype("<f4", copy=False).tobytes())
                continue
            # In float64, where squares of any float32 are finite.
            matrix_nm = x_P[where].view(_matrix(shape)).to(torch.float64)
            left_nR = _orthonormal(matrix_nm @ self._warm[index])
            left, left_Rn = pack_half(left_nR.T.to(torch.float32).contiguous().numpy().reshape(-1))
            sent_nR = torch.from_numpy(left_Rn).view(self._codec.rank, -1).T.to(torch.float64)
            right_mR = matrix_nm.T @ sent_nR
            parts += [left, pack_half(right_mR.T.to(torch.float32).contiguous().numpy().reshape(-1))[0]]
            self._warm[index] = _next_start(right_mR, index)
        self._turn.encoded()
        return b"".join(parts)

    def settle(self, accepted: bool) -> None:
        self._turn.settled()


def _matrix(shape: tuple[int, ...]) -> tuple[int, int]:
    return shape[0], prod(shape[1:])


def _product(left_Rn: Tensor, right_Rm: Tensor, out_nm: Tensor) -> None:
    """P Q^T, a rank after the other."""
    torch.mul(left_Rn[0].unsqueeze(1), right_Rm[0], out=out_nm)
    # Rows that fit into the processor's cache, as each is written once for each rank.
    rows = max(1, (1 << 16) // out_nm.shape[1])
    for r in range(1, len(left_Rn)):
        for start in range(0, out_nm.shape[0], rows):
            # A product and then a sum: one fused operation would round once, and not on every machine.
            out_nm[start : start + rows] += left_Rn[r, start : start + rows].unsqueeze(1) * right_Rm[r]


def _start(index: int, m: int, rank: int) -> Tensor:
    """The first Q, float64 [m, R]: from a generator that everybody has, though nobody needs the same."""
    generator = torch.Generator().manual_seed(index)
    return torch.randn(m, rank, dtype=torch.float64, generator=generator)


def _next_start(right_mR: Tensor, index: int) -> Tensor:
    """Q of unit columns, as only directions matter; where M had no more rank, a fresh one."""
    norm_R = torch.linalg.vector_norm(right_mR, dim=0)
    m, rank = right_mR.shape
    return torch.where(norm_R > 0, right_mR / norm_R.clamp(min=1e-300), _start(index, m, rank))


def _orthonormal(left_nR: Tensor) -> Tensor:
    """Gram-Schmidt, twice for each column as once loses digits; a column without anything new becomes zero."""
    columns: list[Tensor] = []
    for column_n in left_nR.T:
        norm = float(torch.linalg.vector_norm(column_n))
        rest_n = column_n
        for _ in range(2):
            for done_n in columns:
                rest_n = rest_n - done_n * (done_n @ rest_n)
        left = float(torch.linalg.vector_norm(rest_n))
        columns.append(rest_n / left if left > 1e-9 * norm else torch.zeros_like(rest_n))
    return torch.stack(columns, dim=1)
