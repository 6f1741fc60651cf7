"""The lines of a log in bytes, and what their writers sign. All numbers are little endian.

    head    1 | rule (103 bytes) | run 32
    join    2 | peer u16 | key 32 | signature 64
    entry   3 | peer u16 | round u32 | count - 1 as u8 | base tag 4 | previous tag 4 | count codes | signature 64
    ban     4 | peer u16 | auditor u16 | round u32 | sample u32 | code u8 | signature 64
    close   5 | round u32 | updates u32 | state 32 | certificate 32 | link 32

An entry is what travels, and all that does: 80 bytes and one for each update, 336 for 256 of them. What both sides know
already is signed and not sent: the run, the peer's key, the link of the last round and the peer's previous entry, of
which four bytes each tell a fork from a forgery. Knows no log: whether a line fits into one is decided in log.py.

Ring: pure.
"""

from __future__ import annotations

import hashlib
import struct
from dataclasses import dataclass

from mycel.protocols.errors import RemoteProtocolError
from mycel.swarm.zeroth.rule import HEAD_BYTES, Rule

__all__ = [
    "MAX_CODES",
    "MAX_PEERS",
    "TAG_BYTES",
    "Ban",
    "Close",
    "Entry",
    "Head",
    "Join",
    "Line",
    "ban_text",
    "entry_text",
    "join_text",
    "parse",
    "text_hash",
]

MAX_CODES = 256
MAX_PEERS = (1 << 16) - 1
TAG_BYTES = 4

_JOIN = struct.Struct("<H32s64s")
_ENTRY = struct.Struct("<HIB4s4s")
_BAN = struct.Struct("<HHIIB64s")
_CLOSE = struct.Struct("<II32s32s32s")
_JOIN_DOMAIN = b"mycel/zeroth/join/1\0"
_ENTRY_DOMAIN = b"mycel/zeroth/entry/1\0"
_BAN_DOMAIN = b"mycel/zeroth/ban/1\0"


@dataclass(frozen=True, slots=True)
class Head:
    """The first line. The run's id at its end follows from the rule: a damaged head shows here, not further down."""

    KIND = 1
    rule: Rule

    def pack(self) -> bytes:
        return bytes([self.KIND]) + self.rule.pack() + self.rule.run


@dataclass(frozen=True, slots=True)
class Join:
    """A peer with the next free number may contribute from the next round on."""

    KIND = 2
    peer: int
    key: bytes
    signature: bytes

    def pack(self) -> bytes:
        return bytes([self.KIND]) + _JOIN.pack(self.peer, self.key, self.signature)


@dataclass(frozen=True, slots=True)
class Entry:
    """A peer's updates in a round; the numbers of the samples go on from its entry before, or begin at 0."""

    KIND = 3
    peer: int
    round: int
    base_tag: bytes
    previous_tag: bytes
    codes: bytes
    signature: bytes

    def pack(self) -> bytes:
        head = _ENTRY.pack(self.peer, self.round, len(self.codes) - 1, self.base_tag, self.previous_tag)
        return bytes([self.KIND]) + head + self.codes + self.signature


@dataclass(frozen=True, slots=True)
class Ban:
    """`auditor` says that this sample of `peer` measures `code`, which is not what the peer said.

    From the next round on the peer is out. Whoever has the data can measure again; whether one auditor is believed, or
    how many have to agree before the line is written, is for the round to decide.
    """

    KIND = 4
    peer: int
    auditor: int
    round: int
    sample: int
    code: int
    signature: bytes

    def pack(self) -> bytes:
        fields = (self.peer, self.auditor, self.round, self.sample, self.code, self.signature)
        return bytes([self.KIND]) + _BAN.pack(*fields)


@dataclass(frozen=True, slots=True)
class Close:
    """The end of a round: the state after it (zeros where the rule demands none), and the link to what came before."""

    KIND = 5
    round: int
    n_updates: int
    state: bytes
    certificate: bytes
    link: bytes

    def pack(self) -> bytes:
        return bytes([self.KIND]) + _CLOSE.pack(self.round, self.n_updates, self.state, self.certificate, self.link)


Line = Head | Join | Entry | Ban | Close


def parse(data: memoryview) -> tuple[Line, int]:
    """The line that `data` begins with, and its length. Raises RemoteProtocolError, in all cases but a whole line."""
    if not data:
        raise RemoteProtocolError("nothing is left")
    body = data[1:]
    match data[0]:
        case Head.KIND:
            raw = bytes(_taken(body, HEAD_BYTES + 32, "head"))
            return Head(_rule(raw)), 1 + len(raw)
        case Join.KIND:
            return Join(*_JOIN.unpack(_taken(body, _JOIN.size, "join"))), 1 + _JOIN.size
        case Entry.KIND:
            peer, round_, count, base, previous = _ENTRY.unpack(_taken(body, _ENTRY.size, "entry"))
            rest = bytes(_taken(body[_ENTRY.size :], count + 1 + 64, "entry"))
            return Entry(peer, round_, base, previous, rest[:-64], rest[-64:]), 1 + _ENTRY.size + len(rest)
        case Ban.KIND:
            return Ban(*_BAN.unpack(_taken(body, _BAN.size, "ban"))), 1 + _BAN.size
        case Close.KIND:
            return Close(*_CLOSE.unpack(_taken(body, _CLOSE.size, "close"))), 1 + _CLOSE.size
        case kind:
            raise RemoteProtocolError(f"no line begins with {kind}")


def _taken(data: memoryview, size: int, what: str) -> memoryview:
    if len(data) < size:
        raise RemoteProtocolError(f"the {what} ends after {len(data)} of {size} bytes")
    return data[:size]


def _rule(raw: bytes) -> Rule:
    try:
        rule = Rule.unpack(raw[:HEAD_BYTES])
    except ValueError as error:
        raise RemoteProtocolError(f"the rule is refused: {error}") from None
    if rule.run != raw[HEAD_BYTES:]:
        raise RemoteProtocolError("the run's id does not follow from the rule")
    return rule


def join_text(run: bytes, round_: int, peer: int, key: bytes) -> bytes:
    """What a newcomer signs: it holds the key, and wants this number in this round's list."""
    return _JOIN_DOMAIN + run + struct.pack("<IH", round_, peer) + key


def entry_text(run: bytes, key: bytes, base: bytes, previous: bytes, first_sample: int, entry: Entry) -> bytes:
    """What an entry's signature covers: more than travels, and every field of a fixed length but the codes at the end.

    `base` is the link of the round before; `previous` the SHA-256 of this text of the peer's entry before, or of its
    join's.
    """
    numbers = struct.pack("<IIH", entry.round, first_sample, len(entry.codes))
    return _ENTRY_DOMAIN + run + key + base + previous + numbers + entry.codes


def ban_text(run: bytes, auditor_key: bytes, key: bytes, ban: Ban) -> bytes:
    """What an auditor signs: which update it recomputed, and what it found."""
    return _BAN_DOMAIN + run + auditor_key + key + struct.pack("<IIB", ban.round, ban.sample, ban.code)


def text_hash(text: bytes) -> bytes:
    """By which a peer's next entry names this one."""
    return hashlib.sha256(text).digest()
