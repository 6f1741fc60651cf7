"""What a log consists of when its lines have been read, and the hashes that tie its rounds together.

    history = SHA-256("mycel/zeroth/history/1" | 0 | link before | SHA-256(the round's lines))
    link    = SHA-256("mycel/zeroth/link/1" | 0 | run | history | roster | the close: round to certificate)
    roster  = SHA-256(epoch's beacon | for each peer: key, its last text's hash, round it joined u32, banned u8)

The run's id stands for the link before the first round; numbers are little endian, and the close's fields follow each
other as in its line.

Ring: pure.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Sequence
from dataclasses import dataclass

from mycel.protocols.errors import RemoteProtocolError, VerificationError
from mycel.security.signatures import peer_id_of
from mycel.swarm.zeroth.lines import Close

__all__ = ["NO_HASH", "BadLine", "ForgedLine", "Member", "Part", "Round", "history_of", "link_of", "roster_of"]

NO_HASH = bytes(32)
_HISTORY = b"mycel/zeroth/history/1\0"
_LINK = b"mycel/zeroth/link/1\0"


class BadLine(RemoteProtocolError):
    """A line that no log may have there; `line` counts from 1."""

    def __init__(self, reason: str, line: int, source: str = "") -> None:
        super().__init__(f"line {line} of the log: {reason}", source)
        self.line = line


class ForgedLine(VerificationError):
    """A line that says something false; `line` counts from 1, the evidence is the line."""

    def __init__(self, reason: str, line: int, source: str = "", evidence: bytes = b"") -> None:
        super().__init__(source, f"line {line} of the log: {reason}", evidence)
        self.line = line


@dataclass(slots=True)
class Member:
    """A peer of the log: `last` is the hash of the text it signed last, `joined` the round of its join."""

    key: bytes
    last: bytes
    joined: int
    banned: bool = False

    @property
    def peer_id(self) -> str:
        return peer_id_of(self.key)


@dataclass(frozen=True, slots=True)
class Part:
    """One entry's updates: samples [first_sample, first_sample + len(codes)) of a peer."""

    peer: int
    first_sample: int
    codes: bytes


@dataclass(frozen=True, slots=True)
class Round:
    """A round that is closed, and the number of its last line."""

    number: int
    beacon: bytes
    epoch_beacon: bytes
    parts: tuple[Part, ...]
    close: Close
    line: int


def history_of(link: bytes, lines: Sequence[bytes]) -> bytes:
    """`lines` are those of a round in canonical order, `link` that of the round before."""
    return hashlib.sha256(_HISTORY + link + hashlib.sha256(b"".join(lines)).digest()).digest()


def link_of(run: bytes, history: bytes, roster: bytes, close: Close) -> bytes:
    numbers = struct.pack("<II", close.round, close.n_updates)
    return hashlib.sha256(_LINK + run + history + roster + numbers + close.state + close.certificate).digest()


def roster_of(epoch_beacon: bytes, members: Sequence[Member], banned: set[int]) -> bytes:
    digest = hashlib.sha256(epoch_beacon)
    for number, member in enumerate(members):
        digest.update(member.key + member.last + struct.pack("<IB", member.joined, number in banned))
    return digest.digest()
