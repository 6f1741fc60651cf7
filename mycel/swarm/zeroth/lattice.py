"""Parameters on an integer lattice, int64 in units of 2^-30: updates in any order give one state, bit for bit.

    theta[i] -= step * z[i]          z from directions.py, step an integer

A float sum depends on its order; this one does not, whoever adds in whatever threads, and it is taken back exactly. As
float32 a parameter is the float32 nearest to theta * 2^-30, ties to even, which is one correct rounding.

Nothing may ever wrap, nor saturate, which would depend on the order again: `Reach` adds up how far the updates can have
moved any parameter, and refuses what could pass 2^62. The sum of absolute steps does not depend on the order either.

Eight updates are added at once: the bits that eight directions have for one element make a byte, and a table of 256
sums answers it, so that one look-up and one addition serve eight updates.

Legend: U updates, P parameters.

Ring: pure.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mycel.swarm.zeroth.directions import BLOCK, MAX_ELEMENTS, bits

__all__ = [
    "MAX_PARAMETER",
    "MAX_STEP",
    "SCALE_BITS",
    "Lattice",
    "Reach",
    "RunPieces",
    "Update",
    "add_updates",
    "from_float",
    "state_hash",
    "to_float",
    "write_float",
]

SCALE_BITS = 30
MAX_PARAMETER = float(1 << 23)  # float32 has no fraction beyond it
MAX_STEP = 1 << 58  # of an update, or of many with the same direction
_LIMIT = 1 << 62
_GROUP = 8
_TILE = 512 * BLOCK  # elements at a time: their parameters and sums stay in a core's own cache
_STATE_DOMAIN = b"mycel/zeroth/state/1\0"

Lattice = NDArray[np.int64]
Update = tuple[bytes, int]
"""A seed of 32 bytes, and the step in units of 2^-30."""
RunPieces = Callable[[Callable[[Any], Any], Iterable[Any]], Iterable[Any]]
"""`map`, or that of a pool of threads: the pieces share nothing."""


@dataclass(frozen=True, slots=True)
class Reach:
    """How far from zero any parameter can be, in units of 2^-30."""

    units: int

    @classmethod
    def of(cls, theta_P: Lattice) -> Reach:
        return cls(max(int(theta_P.max(initial=0)), -int(theta_P.min(initial=0))))

    def after(self, steps: Iterable[int]) -> Reach:
        """Raises OverflowError where the lattice could overflow."""
        units = self.units + sum(abs(step) for step in steps)
        if units >= _LIMIT:
            raise OverflowError(f"updates add up to {units / 2**SCALE_BITS:.3g}, beyond the parameters' lattice")
        return Reach(units)


def from_float(values_P: NDArray[np.float32]) -> Lattice:
    """The nearest points of the lattice, ties to even. Raises ValueError for what is not finite, or beyond 2^23."""
    if values_P.dtype != np.float32:
        raise ValueError(f"parameters are float32, not {values_P.dtype}")
    if values_P.size and not float(np.abs(values_P).max()) <= MAX_PARAMETER:  # also false for NaN
        raise ValueError("a parameter is not finite, or beyond +-2^23")
    out = np.empty(values_P.shape, np.int64)
    for low in range(0, values_P.size, _TILE):
        part = values_P[low : low + _TILE].astype(np.float64) * float(1 << SCALE_BITS)  # exact
        out[low : low + _TILE] = np.rint(part)
    return out


def to_float(theta_P: Lattice) -> NDArray[np.float32]:
    """Not by way of float64, which would round a first time.

    >>> to_float(np.array([1 << 30, -(3 << 28)])).tolist()
    [1.0, -0.75]
    """
    return theta_P.astype(np.float32) * np.float32(2.0**-SCALE_BITS)


def state_hash(theta_P: Lattice) -> bytes:
    """SHA-256 of "mycel/zeroth/state/1" | 0 | P as u64 | the parameters as i64, all little endian."""
    digest = hashlib.sha256(_STATE_DOMAIN + theta_P.size.to_bytes(8, "little"))
    digest.update(np.ascontiguousarray(theta_P, "<i8").data)
    return digest.digest()


def add_updates(theta_P: Lattice, updates: Sequence[Update], run_pieces: RunPieces = map) -> None:
    """theta[i] -= sum over the updates of step * z[i], in place. The caller has asked `Reach`.

    Raises ValueError for a step beyond +-MAX_STEP, or more elements than a direction has; then nothing is added.
    """
    if theta_P.ndim != 1 or theta_P.dtype != np.int64 or theta_P.size > MAX_ELEMENTS:
        raise ValueError(f"parameters are one row of int64, not {theta_P.dtype} {list(theta_P.shape)}")
    if any(abs(step) > MAX_STEP for _, step in updates):
        raise ValueError("a step is beyond the lattice's largest")
    tables = _tables(updates)
    if tables:
        starts = range(0, theta_P.size, _TILE)
        for _ in run_pieces(lambda low: _add_tile(theta_P[low : low + _TILE], low // BLOCK, tables), starts):
            pass


def write_float(theta_P: Lattice, out_P: NDArray[np.float32], updates: Sequence[Update] = ()) -> None:
    """The parameters as float32, as they would be after these updates: theta itself stays what it is."""
    tables = _tables(updates)
    for low in range(0, theta_P.size, _TILE):
        part = theta_P[low : low + _TILE]
        if tables:
            part = part.copy()
            _add_tile(part, low // BLOCK, tables)
        out_P[low : low + _TILE] = to_float(part)


def _tables(updates: Sequence[Update]) -> list[tuple[list[bytes], Lattice]]:
    wanted = [update for update in updates if update[1]]
    groups = [wanted[i : i + _GROUP] for i in range(0, len(wanted), _GROUP)]
    return [([seed for seed, _ in group], _sums([step for _, step in group])) for group in groups]


def _sums(steps: Sequence[int]) -> Lattice:
    """What a byte of eight directions' bits adds to a parameter: -step for a bit 0, +step for a bit 1."""
    table = np.zeros(256, np.int64)
    codes = np.arange(256)
    for bit, step in enumerate(steps):
        table += np.where(codes >> bit & 1, step, -step)
    return table


def _add_tile(part_P: Lattice, first_block: int, tables: Sequence[tuple[list[bytes], Lattice]]) -> None:
    n_blocks = -(-part_P.size // BLOCK)
    added = np.empty(n_blocks * BLOCK, np.int64)
    for seeds, table in tables:
        codes = _transposed(bits(seeds, first_block, n_blocks))
        np.take(table, codes, out=added, mode="clip")  # no code is out of range; "raise" would take a copy
        part_P += added[: part_P.size]


def _transposed(bits_U: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Byte i of the result has element i's bits of up to eight directions: 8 x 8 bits turned at a time.

    Three exchanges of ever larger squares (Warren, "Hacker's Delight", section 7-3).
    """
    n_bytes = bits_U.shape[1]
    rows = np.zeros((n_bytes, _GROUP), np.uint8)
    rows[:, : bits_U.shape[0]] = bits_U.T
    x = rows.view("<u8").reshape(n_bytes)
    for shift, mask in ((7, 0x00AA00AA00AA00AA), (14, 0x0000CCCC0000CCCC), (28, 0x00000000F0F0F0F0)):
        swap = (x ^ (x >> np.uint64(shift))) & np.uint64(mask)
        x = x ^ swap ^ (swap << np.uint64(shift))
    return x.astype("<u8", copy=False).view(np.uint8)
