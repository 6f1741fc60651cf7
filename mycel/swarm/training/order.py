"""The order of a run's samples: every window of the text once an epoch, each epoch in another order, without a list.

A permutation of n windows is a Feistel network on the least power of two that holds them, walked until it comes back
into the range (Black and Rogaway 2002, "Ciphers with arbitrary finite domains"). So any peer finds the window of any
sample in microseconds, at any time in the run.

Ring: pure.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import lru_cache

__all__ = ["Keys", "SampleOrder", "round_keys", "shuffled"]

Keys = tuple[int, ...]

_ROUNDS = 8  # of 64 bits each: one SHA-512
_MASK = (1 << 64) - 1
_ORDER_DOMAIN = b"mycel sample order v1"
_HELD_OUT_DOMAIN = b"mycel held out v1"


@dataclass(frozen=True, slots=True)
class SampleOrder:
    """Which of `n_windows` windows each sample is. `n_held_out` of them no sample is, whatever the seed."""

    n_windows: int
    n_held_out: int
    seed: int

    @property
    def n_train(self) -> int:
        """Windows that samples are drawn from; an epoch."""
        return self.n_windows - self.n_held_out

    def window(self, sample: int) -> int:
        """The window of sample 0, 1, 2, ... without end."""
        epoch, place = divmod(sample, self.n_train)
        drawn = shuffled(place, self.n_train, round_keys(_ORDER_DOMAIN, self.seed, epoch))
        return self._window(self.n_held_out + drawn)

    def held_out(self, index: int) -> int:
        """The window that is number `index` of those held out."""
        if not 0 <= index < self.n_held_out:
            raise IndexError(f"there is no held-out window {index}: {self.n_held_out} are")
        return self._window(index)

    def _window(self, place: int) -> int:
        # One fixed order of all windows; its beginning is held out, so runs of all seeds share what they never saw.
        return shuffled(place, self.n_windows, round_keys(_HELD_OUT_DOMAIN, 0, 0)) if self.n_held_out else place


@lru_cache(maxsize=16)
def round_keys(domain: bytes, seed: int, epoch: int) -> Keys:
    """The keys of one permutation."""
    digest = hashlib.sha512(domain + seed.to_bytes(8, "little") + epoch.to_bytes(8, "little")).digest()
    return tuple(int.from_bytes(digest[8 * i : 8 * i + 8], "little") for i in range(_ROUNDS))


def shuffled(index: int, size: int, keys: Keys) -> int:
    """Where the permutation of range(size) that `keys` name takes `index`: one to one, in two walks on average.

    `sorted(shuffled(i, 5, keys) for i in range(5)) == [0, 1, 2, 3, 4]`
    """
    if not 0 <= index < size:
        raise IndexError(f"{index} is not in range({size})")
    bits = (size - 1).bit_length()
    low_bits = bits // 2
    low_mask, high_mask = (1 << low_bits) - 1, (1 << bits - low_bits) - 1
    while True:
        high, low = index >> low_bits, index & low_mask
        for one, two in zip(keys[::2], keys[1::2], strict=True):
            high ^= _mix(low, one) & high_mask
            low ^= _mix(high, two) & low_mask
        index = high << low_bits | low
        if index < size:
            return index


def _mix(value: int, key: int) -> int:
    """64 bits that look like chance: the finish of splitmix64."""
    value = value + key & _MASK
    value = (value ^ value >> 30) * 0xBF58476D1CE4E5B9 & _MASK
    value = (value ^ value >> 27) * 0x94D049BB133111EB & _MASK
    return value ^ value >> 31
