"""Which elements a sparse update names: offsets in blocks, or the gaps between them, whichever takes fewer bytes.

    offsets   12 bits for each, in blocks of at most 4096 with an agreed number of each
    gaps      Rice code: gap = q 2^b + r, r in b bits, q in unary; b is chosen by counting

    body: one byte, 0 for offsets or 1 + b; then the offsets, or all r, the length of the unary part (4 bytes), and that

Gaps cost about log2(e / density) bits: 8.1 at 1 %, where offsets cost 12; at one of 4096 offsets win. Both are read and
written for all positions at once. Golomb and Rice codes are the best prefix codes of geometric gaps (Gallager and van
Voorhis, 1975).

Ring: algorithms.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from mycel.protocols.errors import RemoteProtocolError
from mycel.swarm.codecs.bits import Array, Reader, pack, packed_bytes

__all__ = ["BLOCK_BITS", "Blocks", "max_position_bytes", "pack_positions", "read_positions"]

BLOCK_BITS = 12
_MAX_RICE = 24


@dataclass(frozen=True)
class Blocks:
    """How many positions lie in each of consecutive blocks of at most 4096 elements."""

    sizes: Array
    counts: Array

    @property
    def n_elements(self) -> int:
        return int(self.sizes.sum())

    @property
    def n_positions(self) -> int:
        return int(self.counts.sum())

    @property
    def starts(self) -> Array:
        return np.asarray(np.cumsum(self.sizes) - self.sizes)

    @property
    def narrow(self) -> bool:
        """Whether offsets fit into 12 bits; gaps are the only way otherwise."""
        return int(self.sizes.max()) <= 1 << BLOCK_BITS


def max_position_bytes(blocks: Blocks) -> int:
    n = blocks.n_positions
    if blocks.narrow:
        return 1 + packed_bytes(n, BLOCK_BITS)
    b = _safe_parameter(blocks)
    return 1 + packed_bytes(n, b) + 4 + packed_bytes(n + (blocks.n_elements >> b), 1)


def pack_positions(positions: Array, blocks: Blocks) -> bytes:
    """Ascending int64 `positions`, as many of each block as it says."""
    n = len(positions)
    gaps = np.diff(positions, prepend=-1) - 1
    typical = max(int(gaps.mean() * 0.69).bit_length() - 1, 0)
    parameters = {*range(max(typical - 1, 0), min(typical + 2, _MAX_RICE) + 1), _safe_parameter(blocks)}
    size_bytes, b = min((packed_bytes(n, b) + 4 + packed_bytes(int((gaps >> b).sum()) + n, 1), b) for b in parameters)
    if blocks.narrow and size_bytes >= packed_bytes(n, BLOCK_BITS):
        return b"\x00" + pack(positions - np.repeat(blocks.starts, blocks.counts), BLOCK_BITS)
    ends = np.cumsum((gaps >> b) + 1) - 1
    unary = np.zeros(int(ends[-1]) + 1, np.uint8)
    unary[ends] = 1
    stream = np.packbits(unary, bitorder="little").tobytes()
    remainders = pack(gaps & ((1 << b) - 1), b) if b else b""
    return bytes([1 + b]) + remainders + len(stream).to_bytes(4, "little") + stream


def read_positions(reader: Reader, blocks: Blocks) -> Array:
    """int64 positions, ascending, none twice, as many as `blocks` has in all.

    In gap coding a block may have got more or fewer than its count. Raises RemoteProtocolError for anything else.
    """
    mode, n = reader.number(1), blocks.n_positions
    if mode > 1 + _MAX_RICE or not (mode or blocks.narrow):
        raise RemoteProtocolError(f"an update codes its positions in way {mode}")
    if mode:
        positions = _read_gaps(reader, mode - 1, n, blocks.n_elements)
    else:
        offsets = reader.packed(n, BLOCK_BITS).astype(np.int64)
        if (offsets >= np.repeat(blocks.sizes, blocks.counts)).any():
            raise RemoteProtocolError("an update names elements outside of their block")
        positions = offsets + np.repeat(blocks.starts, blocks.counts)
        if (np.diff(positions) <= 0).any():
            raise RemoteProtocolError("an update names elements twice or out of order")
    if int(positions[-1]) >= blocks.n_elements:
        raise RemoteProtocolError("an update names elements that do not exist")
    return positions


def _read_gaps(reader: Reader, b: int, n: int, n_elements: int) -> Array:
    remainders = reader.packed(n, b).astype(np.int64) if b else np.zeros(n, np.int64)
    length = reader.number(4)
    # Before the bits are spread out into bytes.
    if length > packed_bytes(n + (n_elements >> b), 1):
        raise RemoteProtocolError("an update spaces its elements beyond the end")
    stream = np.frombuffer(reader.take(length), np.uint8)
    ends = np.flatnonzero(np.unpackbits(stream, bitorder="little"))
    if len(ends) != n or ends[-1] // 8 != length - 1:
        raise RemoteProtocolError(f"an update names {len(ends)} elements, not {n}")
    gaps = (np.diff(ends, prepend=-1) - 1 << b) + remainders
    return np.asarray(np.cumsum(gaps + 1) - 1)


def _safe_parameter(blocks: Blocks) -> int:
    """The Rice parameter whose longest code is the shortest."""
    n, n_elements = blocks.n_positions, blocks.n_elements
    return min(range(_MAX_RICE + 1), key=lambda b: n * b + (n_elements >> b))
