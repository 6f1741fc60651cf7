"""The same directions, sums and floats as directions.py and lattice.py, bit for bit, by torch on any device.

Products of two 32-bit words are made of halves that fit into int64: nothing overflows, so nothing depends on what a
device does then.

Legend: U updates, B blocks of 128 elements, P elements.

Ring: algorithms.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mycel.swarm.zeroth.directions import BLOCK, MULTIPLIERS, ROUNDS, WEYL, seed_words
from mycel.swarm.zeroth.lattice import MAX_STEP, SCALE_BITS, Update

__all__ = ["add_updates", "signs", "to_float"]

_MASK = 0xFFFFFFFF
_PIECE_BLOCKS = 4096


def add_updates(theta_P: Tensor, updates: Sequence[Update]) -> None:
    """theta[i] -= sum over the updates of step * z[i], in place; as lattice.add_updates."""
    if theta_P.dtype != torch.int64 or theta_P.dim() != 1:
        raise ValueError(f"parameters are one row of int64, not {theta_P.dtype} {list(theta_P.shape)}")
    if any(abs(step) > MAX_STEP for _, step in updates):
        raise ValueError("a step is beyond the lattice's largest")
    n_blocks = -(-theta_P.numel() // BLOCK)
    for seed, step in updates:
        for first in range(0, n_blocks, _PIECE_BLOCKS):
            part = theta_P[first * BLOCK : (first + _PIECE_BLOCKS) * BLOCK]
            bits = _bits(seed, first, min(_PIECE_BLOCKS, n_blocks - first), theta_P.device)[: part.numel()]
            part += bits * (2 * step) - step


def signs(seed: bytes, n_elements: int, device: torch.device | str = "cpu") -> Tensor:
    """The first elements of the seed's direction, int64."""
    return 1 - 2 * _bits(seed, 0, -(-n_elements // BLOCK), torch.device(device))[:n_elements]


def to_float(theta_P: Tensor) -> Tensor:
    """float32, rounded once."""
    return theta_P.to(torch.float32).mul_(2.0**-SCALE_BITS)


def _bits(seed: bytes, first_block: int, n_blocks: int, device: torch.device) -> Tensor:
    """0 or 1 for each element of so many blocks, int64 [128 B]."""
    k0, k1, *rest = seed_words(seed)
    x0 = torch.arange(first_block, first_block + n_blocks, dtype=torch.int64, device=device)
    x1, x2, x3 = (torch.full_like(x0, word) for word in rest)
    for _ in range(ROUNDS):
        high0, low0 = _product(x0, MULTIPLIERS[0])
        high1, low1 = _product(x2, MULTIPLIERS[1])
        x0, x1, x2, x3 = high1 ^ x1 ^ k0, low1, high0 ^ x3 ^ k1, low0
        k0, k1 = (k0 + WEYL[0]) & _MASK, (k1 + WEYL[1]) & _MASK
    words_B4 = torch.stack((x0, x1, x2, x3), dim=1)
    shifts = torch.arange(32, dtype=torch.int64, device=device)
    return ((words_B4[:, :, None] >> shifts) & 1).reshape(-1)


def _product(x: Tensor, factor: int) -> tuple[Tensor, Tensor]:
    """The high and the low 32 bits of the product of two words."""
    low = (x & 0xFFFF) * factor
    middle = (x >> 16) * factor + (low >> 16)
    return middle >> 16, ((middle & 0xFFFF) << 16) | (low & 0xFFFF)
