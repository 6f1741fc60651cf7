"""Against peers that lie about what they measured: some updates are measured again, chosen when it is too late to mend.

What a round's updates count for is bounded already (rule.py: a liar gets a factor over the median, a number that is not
finite nothing). For the rest, every closed round's updates are drawn by a beacon that its own close determines: nobody
knew while they were measured which would be. An auditor needs the data and two forward passes; what it finds differs
from what was said by a code step at most, or by what float32 leaves uncertain of a difference of two losses.

    drawn    when SHA-256("mycel/zeroth/audit/1" | 0 | beacon of the next round | key | sample u32) < share * 2^64
    auditor  whose SHA-256("mycel/zeroth/auditor/1" | 0 | beacon | key | sample u32 | own key) is the least

by the first 8 bytes of each hash. A liar of n updates stays unseen with probability (1 - share)^n: at 10 % two in three
are found within 10 updates, 99.5 % within 50.

Ring: pure.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

from mycel.swarm.zeroth.byte import decode, encode, ladder
from mycel.swarm.zeroth.chain import Part

__all__ = ["Drawn", "Measured", "Verdict", "auditor_of", "drawn", "verdict"]

_DRAW = b"mycel/zeroth/audit/1\0"
_AUDITOR = b"mycel/zeroth/auditor/1\0"
_UNCERTAIN = 8 * 2.0**-23  # of each loss: float32 sums in another order, on another device


@dataclass(frozen=True, slots=True)
class Measured:
    """An estimate of the slope along a direction, and the two losses that it comes from."""

    g: float
    loss_plus: float
    loss_minus: float

    @property
    def code(self) -> int:
        return encode(self.g)


class Keyed(Protocol):
    """A peer, by its key."""

    @property
    def key(self) -> bytes: ...


class Listed(Protocol):
    """Whoever numbers peers: a log, or a step of a course."""

    @property
    def members(self) -> Sequence[Keyed]: ...


class Closed(Protocol):
    """A round that is over."""

    @property
    def number(self) -> int: ...

    @property
    def parts(self) -> tuple[Part, ...]: ...


@dataclass(frozen=True, slots=True)
class Drawn:
    """An update to be measured again, by whom."""

    peer: int
    round: int
    sample: int
    code: int
    auditor: int


@dataclass(frozen=True, slots=True)
class Verdict:
    ok: bool
    reason: str


def drawn(log: Listed, closed: Closed, beacon: bytes, share: float, auditors: Sequence[int]) -> list[Drawn]:
    """The updates of a closed round that are measured again; `beacon` is that of the next one.

    `auditors` are the numbers of those who can. None where nobody but its author could: a peer does not audit itself.
    """
    bound = int(share * 2.0**64)
    found: list[Drawn] = []
    for part in closed.parts:
        key = log.members[part.peer].key
        for sample, code in enumerate(part.codes, part.first_sample):
            text = beacon + key + sample.to_bytes(4, "little")
            if _number(_DRAW + text) < bound:
                auditor = auditor_of(log, text, (peer for peer in auditors if peer != part.peer))
                if auditor is not None:
                    found.append(Drawn(part.peer, closed.number, sample, code, auditor))
    return found


def auditor_of(log: Listed, text: bytes, candidates: Iterable[int]) -> int | None:
    ranked = ((_number(_AUDITOR + text + log.members[peer].key), peer) for peer in candidates)
    return min(ranked, default=(0, None))[1]


def verdict(code: int, again: Measured, spread: float) -> Verdict:
    """Whether a peer that measured honestly can have said `code` where the auditor measured `again`; spread is epsilon.

    >>> verdict(64, Measured(1.04, 2.0, 1.9), 1e-3).ok, verdict(64, Measured(-1.0, 1.9, 2.0), 1e-3).ok
    (True, False)
    """
    said, found = decode(code), again.code
    if abs(ladder(code) - ladder(found)) <= 1 and math.isfinite(again.g) == (code != 0x80):
        return Verdict(True, f"said {said:.4g}, measured {again.g:.4g}: within a code step")
    uncertain = _UNCERTAIN * (abs(again.loss_plus) + abs(again.loss_minus)) / (2.0 * spread)
    half_step = 0.05 * abs(said)
    if code != 0x80 and abs(said - again.g) <= uncertain + half_step:
        return Verdict(True, f"said {said:.4g}, measured {again.g:.4g}: float32 does not tell them apart")
    return Verdict(False, f"said {said:.4g}, measured {again.g:.4g}")


def _number(text: bytes) -> int:
    return int.from_bytes(hashlib.sha256(text).digest()[:8], "little")
