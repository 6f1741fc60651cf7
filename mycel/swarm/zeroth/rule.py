"""The rule of a log: what, beside its bytes, decides which steps they mean. Integers throughout.

A round's updates are averaged, after each was bounded at `clip` code steps above the median of the round (8 of them are
a factor of 2): liars below one half cannot move the median out of what the others measured, and none counts for more
than a few of them. With n measurements that are not void, in units of 2^-30, halves rounded away from zero:

    step = sign * round(learning_rate * |g| / n)

Ring: pure.
"""

from __future__ import annotations

import hashlib
import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from mycel.protocols.errors import ConfigError
from mycel.swarm.zeroth.byte import LARGEST, UNIT_BITS, VOID, magnitude
from mycel.swarm.zeroth.directions import MAX_ELEMENTS
from mycel.swarm.zeroth.lattice import SCALE_BITS
from mycel.swarm.zeroth.seeds import MAX_POOL

__all__ = ["HEAD_BYTES", "NO_CLIP", "RATE_BITS", "Rule", "in_rate", "in_units"]

RATE_BITS = 40
NO_CLIP = LARGEST
HEAD_BYTES = 32 + 32 + 8 + 8 + 8 + 1 + 2 + 4 + 4 + 4
_MAX_RATE = 64 << RATE_BITS
_MAX_SPREAD = 16 << SCALE_BITS
_LAYOUT = struct.Struct("<32s32sQQQBHIII")
_SHIFT = RATE_BITS + UNIT_BITS - SCALE_BITS
_RUN = b"mycel/zeroth/run/1\0"


def in_rate(learning_rate: float) -> int:
    """A learning rate as a rule has it. Raises ConfigError for what is no number."""
    return _in_units(learning_rate, RATE_BITS)


def in_units(length: float) -> int:
    """A length, as epsilon, in units of the lattice. Raises ConfigError for what is no number."""
    return _in_units(length, SCALE_BITS)


def _in_units(number: float, unit_bits: int) -> int:
    if not math.isfinite(number):
        raise ConfigError(f"{number} is no length")
    return round(math.ldexp(number, unit_bits))


@dataclass(frozen=True)
class Rule:
    """`recipe` is the hash of all that measuring needs: model, text, which parameters. `theta` is the first state's.

    `learning_rate` is in units of 2^-40, `spread` (epsilon) in units of 2^-30. `clip` is in code steps, NO_CLIP for
    none. A peer may send `samples` updates a round. There are `pool` directions an epoch of `epoch` rounds, or 0 for
    one of its own for each update. The state's hash is stated by every `hash_every`-th round.
    """

    recipe: bytes
    theta: bytes
    n_elements: int
    learning_rate: int
    spread: int
    clip: int = 16
    samples: int = 256
    pool: int = 0
    epoch: int = 0
    hash_every: int = 1

    def checked(self) -> Rule:
        """The rule itself, for one that a user wrote. Raises ConfigError."""
        wrong = self.wrong()
        if wrong:
            raise ConfigError(wrong)
        return self

    def wrong(self) -> str:
        """What no rule may say, or ""."""
        checks = (
            (len(self.recipe) == 32 and len(self.theta) == 32, "hashes have 32 bytes"),
            (1 <= self.n_elements <= MAX_ELEMENTS, f"{self.n_elements} parameters"),
            (1 <= self.learning_rate < _MAX_RATE, "the learning rate must be between 2^-40 and 64"),
            (1 <= self.spread < _MAX_SPREAD, "epsilon must be between 2^-30 and 16"),
            (0 <= self.clip <= NO_CLIP, f"clip is 0 to {NO_CLIP} code steps"),
            (1 <= self.samples < 1 << 16, "a peer may send 1 to 65535 updates a round"),
            (0 <= self.pool <= MAX_POOL, f"a pool has at most {MAX_POOL} directions"),
            ((self.epoch > 0) == (self.pool > 0), "a pool needs epochs, and epochs a pool"),
            (0 <= self.epoch < 1 << 32, "an epoch is too long"),
            (1 <= self.hash_every < 1 << 32, "the state's hash must be stated some time"),
        )
        return next((text for holds, text in checks if not holds), "")

    def pack(self) -> bytes:
        scales = (self.n_elements, self.learning_rate, self.spread, self.clip, self.samples)
        return _LAYOUT.pack(self.recipe, self.theta, *scales, self.pool, self.epoch, self.hash_every)

    @classmethod
    def unpack(cls, data: bytes) -> Rule:
        """Raises ValueError."""
        if len(data) != HEAD_BYTES:
            raise ValueError(f"a rule has {HEAD_BYTES} bytes, not {len(data)}")
        rule = cls(*_LAYOUT.unpack(data))
        wrong = rule.wrong()
        if wrong:
            raise ValueError(wrong)
        return rule

    @cached_property
    def run(self) -> bytes:
        """The run's id: no two rules share one."""
        return hashlib.sha256(_RUN + self.pack()).digest()

    def cap(self, codes: Sequence[int]) -> int:
        """The largest magnitude, as a code, that counts in a round of these codes."""
        magnitudes = sorted(code & LARGEST for code in codes if code != VOID)
        if not magnitudes or self.clip == NO_CLIP:
            return LARGEST
        return min(LARGEST, max(magnitudes[(len(magnitudes) - 1) // 2], 1) + self.clip)

    def steps(self, codes: Sequence[int]) -> list[int]:
        """The steps, in units of 2^-30, of all the codes of one round.

        >>> rule = Rule(bytes(32), bytes(32), 1, learning_rate=1 << RATE_BITS, spread=1, clip=8)
        >>> [step / 2**30 for step in rule.steps([64, 64 + 0x80, 127, VOID])]
        [0.3333333330228925, -0.3333333330228925, 0.6666666669771075, 0.0]
        """
        count = sum(code != VOID for code in codes)
        cap = self.cap(codes)
        table = [self._step(min(m, cap), count) for m in range(LARGEST + 1)] if count else [0] * (LARGEST + 1)
        return [-table[code & LARGEST] if code & VOID else table[code] for code in codes]

    def _step(self, code: int, count: int) -> int:
        divisor = count << _SHIFT
        return (2 * self.learning_rate * magnitude(code) + divisor) // (2 * divisor)
