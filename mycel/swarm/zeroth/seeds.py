"""Seeds that no one can choose: they follow from the run, the round's beacon, the peer and the sample's number.

    seed   = SHA-256("mycel/zeroth/seed/1"   | 0 | run | beacon | peer key | sample as u32)
    beacon = SHA-256("mycel/zeroth/beacon/1" | 0 | run | link of the round before)

all of 32 bytes but the sample, which is little endian. A peer's key stands in the log before the link that the beacon
follows from, so that nobody can try keys until a direction suits. Which samples of the data it is measured on follows
from the seed as well.

With a pool there are only K directions an epoch, and a log comes down to K sums (Qin et al., "Federated full-parameter
tuning of billion-sized language models with communication cost under 18 kilobytes", ICML 2024):

    seed      = pool seed k,  k = SHA-256("mycel/zeroth/pool-index/1" | 0 | seed as above) mod K, its first 8 bytes
    pool seed = SHA-256("mycel/zeroth/pool/1" | 0 | run | beacon of the epoch's first round | k as u32)

Ring: pure.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

__all__ = ["MAX_POOL", "batch_of", "beacon_of", "pool_index", "pool_seed", "seed_of"]

MAX_POOL = 1 << 16

_SEED = b"mycel/zeroth/seed/1\0"
_BEACON = b"mycel/zeroth/beacon/1\0"
_POOL = b"mycel/zeroth/pool/1\0"
_POOL_INDEX = b"mycel/zeroth/pool-index/1\0"
_BATCH = b"mycel/zeroth/batch/1\0"


def beacon_of(run: bytes, link: bytes) -> bytes:
    """The beacon of the round that follows the close of a round with this link; the first follows the log's head."""
    if not len(run) == len(link) == 32:
        raise ValueError("runs and links have 32 bytes each")
    return hashlib.sha256(_BEACON + run + link).digest()


def seed_of(run: bytes, beacon: bytes, key: bytes, sample: int) -> bytes:
    """The seed of a peer's sample; `key` is its 32-byte public key."""
    if not len(run) == len(beacon) == len(key) == 32:
        raise ValueError("runs, beacons and keys have 32 bytes each")
    return hashlib.sha256(_SEED + run + beacon + key + sample.to_bytes(4, "little")).digest()


def pool_seed(run: bytes, beacon: bytes, k: int) -> bytes:
    """Seed k of the epoch that begins at the round of this beacon."""
    if not len(run) == len(beacon) == 32:
        raise ValueError("runs and beacons have 32 bytes each")
    return hashlib.sha256(_POOL + run + beacon + k.to_bytes(4, "little")).digest()


def pool_index(seed: bytes, size: int) -> int:
    """Which of the pool's seeds stands for this one."""
    return int.from_bytes(hashlib.sha256(_POOL_INDEX + seed).digest()[:8], "little") % size


def batch_of(seed: bytes, n_windows: int, size: int) -> Sequence[int]:
    """The numbers of the `size` windows of text that a sample is measured on, each below `n_windows`."""
    if n_windows < 1:
        raise ValueError("there is no window of text")
    head = _BATCH + seed
    return [
        int.from_bytes(hashlib.sha256(head + i.to_bytes(4, "little")).digest()[:16], "little") % n_windows
        for i in range(size)
    ]
