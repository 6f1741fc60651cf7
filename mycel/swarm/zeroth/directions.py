"""Directions of +-1 that a 32-byte seed determines, bit for bit the same on every machine.

The generator is Philox4x32-10 (Salmon, Moraes, Dror and Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011).
Block b of a seed's direction is 128 bits, from

    key      k0 k1       = seed[0:8]                  as two little endian u32
    counter  c0          = b
             c1 c2 c3    = seed[8:20] xor seed[20:32] as three little endian u32

The four output words, each little endian, make 16 bytes; element i of the direction is decided by bit i % 8, the least
significant first, of byte i // 8 of all blocks in a row: +1 where the bit is 0, -1 where it is 1. A direction has at
most 2^39 elements. `tests/swarm/zeroth/vectors.json` has examples; on_device.py makes the same bits with torch.

Legend: U updates, B blocks of 128 elements, P elements.

Ring: pure.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

__all__ = ["BLOCK", "MAX_ELEMENTS", "SEED_BYTES", "bits", "philox4x32", "seed_words", "signs"]

SEED_BYTES = 32
BLOCK = 128  # elements that one block of the generator decides
MAX_ELEMENTS = BLOCK << 32
ROUNDS = 10
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
WEYL = (0x9E3779B9, 0xBB67AE85)  # what the two key words grow by from round to round

_LOW = np.uint64(0xFFFFFFFF)
_HALF = np.uint64(32)
_M0, _M1 = (np.uint64(m) for m in MULTIPLIERS)
_PIECE = 512 * BLOCK  # elements at a time in `signs`

Words = NDArray[np.uint64]


def seed_words(seed: bytes) -> tuple[int, int, int, int, int]:
    """The words (k0, k1, c1, c2, c3) of a seed, as the module's docstring says."""
    if len(seed) != SEED_BYTES:
        raise ValueError(f"a seed has {SEED_BYTES} bytes, not {len(seed)}")
    folded = bytes(a ^ b for a, b in zip(seed[8:20], seed[20:32], strict=True))
    raw = seed[:8] + folded
    k0, k1, c1, c2, c3 = (int.from_bytes(raw[i : i + 4], "little") for i in range(0, 20, 4))
    return k0, k1, c1, c2, c3


def philox4x32(counter: Sequence[Words], key: Sequence[Words]) -> list[Words]:
    """Four words for each counter: arrays of uint64 that hold 32 bits each. The key broadcasts.

    x0' = hi(M1 x2) ^ x1 ^ k0    x1' = lo(M1 x2)    x2' = hi(M0 x0) ^ x3 ^ k1    x3' = lo(M0 x0)    ten times
    """
    x0, x1, x2, x3 = (word.copy() for word in counter)
    product0, product1 = np.empty_like(x0), np.empty_like(x0)
    k0, k1 = key
    for _ in range(ROUNDS):
        np.multiply(x0, _M0, out=product0)
        np.multiply(x2, _M1, out=product1)
        np.right_shift(product1, _HALF, out=x0)
        np.bitwise_xor(x0, x1, out=x0)
        np.bitwise_xor(x0, k0, out=x0)
        np.right_shift(product0, _HALF, out=x2)
        np.bitwise_xor(x2, x3, out=x2)
        np.bitwise_xor(x2, k1, out=x2)
        np.bitwise_and(product1, _LOW, out=x1)
        np.bitwise_and(product0, _LOW, out=x3)
        k0, k1 = (k0 + np.uint64(WEYL[0])) & _LOW, (k1 + np.uint64(WEYL[1])) & _LOW
    return [x0, x1, x2, x3]


def bits(seeds: Sequence[bytes], first_block: int, n_blocks: int) -> NDArray[np.uint8]:
    """Blocks [first_block, first_block + n_blocks) of each seed's direction, uint8 [U, 16 B]."""
    if not 0 <= first_block <= first_block + n_blocks <= MAX_ELEMENTS // BLOCK:
        raise ValueError("a direction ends after 2^32 blocks")
    words_U5 = np.array([seed_words(seed) for seed in seeds], np.uint64).reshape(len(seeds), 5)
    shape = (len(seeds), n_blocks)
    block_B = np.arange(first_block, first_block + n_blocks, dtype=np.uint64)
    counter = [np.broadcast_to(word, shape) for word in (block_B, *(words_U5[:, i : i + 1] for i in (2, 3, 4)))]
    out = np.empty((*shape, 4), "<u4")
    for i, word in enumerate(philox4x32(counter, (words_U5[:, 0:1], words_U5[:, 1:2]))):
        out[..., i] = word
    return out.view(np.uint8).reshape(len(seeds), n_blocks * 16)


def signs(seed: bytes, start: int, end: int) -> NDArray[np.int8]:
    """Elements [start, end) of the seed's direction, each +1 or -1.

    >>> signs(bytes(32), 0, 8).tolist()
    [-1, 1, -1, 1, -1, 1, -1, -1]
    """
    out = np.empty(end - start, np.int8)
    for low in range(start - start % BLOCK, end, _PIECE):
        high = min(low + _PIECE, end)
        raw = bits([seed], low // BLOCK, -(-(high - low) // BLOCK))
        piece = np.unpackbits(raw[0], bitorder="little")[max(start - low, 0) : high - low]
        at = max(low, start) - start
        out[at : at + len(piece)] = 1 - 2 * piece.view(np.int8)
    return out
