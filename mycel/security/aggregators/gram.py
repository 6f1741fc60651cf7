"""The n x n Gram matrix of long rows, exact: every machine gets the same bits, whatever its BLAS and its threads.

    N rows, P parameters of a shard, C columns of a chunk

Each row of a chunk is rounded to integers of 19 bits times a power of two. Sums of 2^14 products of them stay under
2^53, so the matrix product of a chunk is exact in any order of summation; chunks are added one after the other.
The rounding is what float32 would cost: 2^-20 of a row's largest entry in the chunk, and unbiased.

Ring: algorithms.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from mycel.protocols.errors import LocalProtocolError

# No update is this long (1e36); above it, differences of two rows could overflow a float32.
MAX_ABS = 2.0**120
_BITS = 19
_MAX_COLUMNS = 1 << 14
_CHUNK_ELEMENTS = 1 << 18  # 1 MiB of float32 and 2 MiB of float64
# Entries below 2^-119 count as nothing: their scale would overflow.
_MIN_EXPONENT = -100


def finite_rows(rows: Sequence[Tensor]) -> list[bool]:
    """Which rows may be aggregated: all entries finite, and none over MAX_ABS."""
    check_rows(rows, None)
    return [all(_largest(row[start:end]) <= MAX_ABS for start, end in chunks(len(row), 1 << 16)) for row in rows]


def gram(rows: Sequence[Tensor], center: Tensor | None) -> Tensor:
    """G_ij = <x_i - c, x_j - c>, float64 [N, N], of finite rows x_i, float32 [P].

    `center` is a vector that liars had no say in: the last aggregate, or None for zeros; never the mean of the rows,
    which one of them can put anywhere. The nearer it is to the rows, the more digits of their distances are left: rows
    that differ by less than a millionth of their distance to it look alike. Sum the Grams of all shards for `decide`.

    Raises LocalProtocolError for rows that `finite_rows` refuses.
    """
    gram_NN, finite = measure(rows, center)
    if not all(finite):
        raise LocalProtocolError("rows that are not finite go through finite_rows first")
    return gram_NN


def measure(rows: Sequence[Tensor], center: Tensor | None) -> tuple[Tensor, list[bool]]:
    """`gram` and `finite_rows` in one pass; what the Gram says of a row that is not finite means nothing."""
    n_rows, n_columns = check_rows(rows, center)
    width = min(n_columns, _MAX_COLUMNS, _CHUNK_ELEMENTS // max(1, n_rows))
    single, double = torch.empty(n_rows * width), torch.empty(n_rows * width, dtype=torch.float64)
    finite_N = np.ones(n_rows, dtype=np.bool_)
    gram_NN = np.zeros((n_rows, n_rows))
    for start, end in chunks(n_columns, width):
        shape = (n_rows, end - start)
        block_NC = single[: n_rows * (end - start)].view(shape)
        torch.stack([row[start:end] for row in rows], out=block_NC)
        top_N = _tops(block_NC)
        finite_N &= top_N <= MAX_ABS
        if center is not None:
            block_NC.sub_(center[start:end])
            top_N = _tops(block_NC)
        if not finite_N.all():
            block_NC[torch.from_numpy(~finite_N)] = 0.0
            top_N = np.where(finite_N, top_N, np.float32(0.0))
        gram_NN += _exact_product(block_NC, top_N, double[: block_NC.numel()].view(shape))
    return torch.from_numpy(gram_NN), finite_N.tolist()


def check_rows(rows: Sequence[Tensor], center: Tensor | None) -> tuple[int, int]:
    """How many rows there are, and of how many columns. Raises LocalProtocolError for rows of another kind."""
    n_columns = len(rows[0]) if len(rows) else 0
    for row in (*rows, *([] if center is None or not len(rows) else [center])):
        if row.dtype != torch.float32 or row.shape != (n_columns,):
            raise LocalProtocolError(f"rows are float32 of {n_columns}, not {row.dtype} of {tuple(row.shape)}")
    return len(rows), n_columns


def chunks(n_columns: int, width: int) -> Iterator[tuple[int, int]]:
    """Half-open ranges of at most `width` columns that cover all of them."""
    for start in range(0, n_columns, max(1, width)):
        yield start, min(start + max(1, width), n_columns)


def _exact_product(block_NC: Tensor, top_N: npt.NDArray[np.float32], double_NC: Tensor) -> npt.NDArray[np.float64]:
    """block @ block.T after rounding each row to multiples of a power of two; overwrites both."""
    _, exponent_N = np.frexp(top_N)
    exponent_N = np.maximum(exponent_N, _MIN_EXPONENT)
    scale_N = np.ldexp(np.float32(1.0), _BITS - exponent_N)
    double_NC.copy_(block_NC.mul_(torch.from_numpy(scale_N)[:, None]).round_())
    integers_NC = double_NC.numpy()
    # numpy knows this product as symmetric and does half of the work, which torch does not.
    product_NN = integers_NC @ integers_NC.T
    return np.asarray(np.ldexp(product_NN, exponent_N[:, None] + exponent_N[None, :] - 2 * _BITS))


def _tops(block_NC: Tensor) -> npt.NDArray[np.float32]:
    """The largest absolute value of each row; NaN where there is one."""
    # Two passes that are vectorized beat aminmax and the infinity norm, which are not, by 20 times.
    top: npt.NDArray[np.float32] = torch.maximum(block_NC.amax(dim=1), block_NC.amin(dim=1).neg_()).numpy()
    return top


def _largest(values: Tensor) -> float:
    return float(torch.maximum(values.amax(), values.amin().neg()))
