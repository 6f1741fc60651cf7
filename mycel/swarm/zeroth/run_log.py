"""A run's log as it is kept on disk and shown to third parties: what its peers signed, and what was certified of it.

    head     1 | size u32 | JSON: run, scope, founder, rule, whether the group is open, the recipe | SHA-256 of all that
    entry    2 | member u8 | weight u32 | staleness u8 | n u16 | n scalars | flags u8
             | the state if flags & 1 | hash and size u64 of a body if flags & 2 | signature
    close    3 | size u32 | certificate, as its protocol has it

A line has no number of its own: the first is the head, and each round has the entries in the order of their authors and
then its close. An entry is an offer of the round without what both sides know: its run and scope, the round, its
author's id (`member` counts in the members that the last certificate names), the last outcome, and the state that all
share. The signature is the one that travelled: it covers all of that (protocols/rounds.py, `signed_part`). So there is
one log and one signature, and whoever reads it checks every line with what stands above it. Numbers are little endian.

Ring: pure.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import msgspec
from msgspec import Struct

from mycel.protocols.codec import round_codec
from mycel.protocols.errors import LocalProtocolError, RemoteProtocolError, VerificationError
from mycel.protocols.rounds import MAX_SCALAR_BYTES, Certificate, Offer, Outcome, offer_digest, outcome_digest
from mycel.protocols.rounds import signed_part as covered
from mycel.security.signatures import verify
from mycel.swarm.rounds.certificates import check_certificate
from mycel.swarm.rounds.statements import UNSIGNED, Ledger
from mycel.swarm.rounds.terms import GroupTerms, beacon_of, genesis
from mycel.swarm.zeroth.chain import BadLine, ForgedLine
from mycel.swarm.zeroth.course import Course, Step
from mycel.swarm.zeroth.lattice import Lattice, RunPieces, state_hash
from mycel.swarm.zeroth.rule import HEAD_BYTES, Rule

__all__ = ["Extent", "LogHead", "LoggedRound", "extents", "pack_round", "read_head", "read_rounds", "replay_rounds"]

_HEAD, _ENTRY, _CLOSE = 1, 2, 3
_SIZE, _BODY_SIZE = struct.Struct("<I"), struct.Struct("<Q")
_ENTRY_HEAD = struct.Struct("<BIBH")
_MOST_HEAD = 1 << 17
_MOST_CLOSE = 1 << 18


class LogHead(Struct, frozen=True, forbid_unknown_fields=True):
    """The first line. `rule` is packed; `recipe` is the run's recipe as TOML."""

    run: bytes
    scope: str
    founder: str
    rule: bytes
    open: bool
    recipe: str

    def pack(self) -> bytes:
        raw = msgspec.json.encode(self)
        body = bytes([_HEAD]) + _SIZE.pack(len(raw)) + raw
        return body + hashlib.sha256(body).digest()

    @property
    def unpacked_rule(self) -> Rule:
        """Raises ValueError."""
        return Rule.unpack(self.rule)

    @property
    def genesis(self) -> Outcome:
        return genesis(self.run, self.scope, self.founder)

    @property
    def terms(self) -> GroupTerms:
        """As far as a certificate's quorum depends on them."""
        return GroupTerms(self.unpacked_rule.n_elements, open=self.open, aggregators=0)


@dataclass(frozen=True, slots=True)
class LoggedRound:
    """A round that has been read: its offers in order, and the numbers of its first and its last line."""

    certificate: Certificate
    offers: tuple[Offer, ...]
    first_line: int
    line: int

    @property
    def number(self) -> int:
        return self.certificate.outcome.round


# ---- writing


def pack_round(members: Sequence[str], certificate: Certificate, offers: Sequence[Offer], state: bytes) -> bytes:
    """The lines of a round. `members` are those of the round, `state` is the one before it, which all share.

    A body counts for nothing here, but an offer is what its author signed. Raises LocalProtocolError for offers that
    are not the certificate's, or with several bodies.
    """
    if tuple(map(offer_digest, offers)) != certificate.outcome.offers or any(len(o.bodies) > 1 for o in offers):
        raise LocalProtocolError("a log has the offers of its certificate, with a body each at most")
    lines = []
    for offer in offers:
        member = members.index(offer.peer)
        head = _ENTRY_HEAD.pack(member, offer.weight, offer.staleness, len(offer.scalars))
        other = offer.state if offer.state != state else b""
        body = offer.bodies[0] + _BODY_SIZE.pack(offer.sizes[0]) if offer.bodies else b""
        flags = bool(other) | bool(body) << 1
        lines.append(bytes([_ENTRY]) + head + offer.scalars + bytes([flags]) + other + body + offer.signature)
    close = b"".join(round_codec.encode(certificate))
    return b"".join(lines) + bytes([_CLOSE]) + _SIZE.pack(len(close)) + close


# ---- reading


class _Reader:
    """Takes bytes off the front; what is missing is a BadLine of the line in hand."""

    def __init__(self, data: bytes | memoryview, line: int, source: str) -> None:
        self.view, self.line, self.source = memoryview(data), line, source

    def take(self, size: int) -> bytes:
        if len(self.view) < size:
            raise self.bad("the log ends inside of it")
        raw, self.view = bytes(self.view[:size]), self.view[size:]
        return raw

    def sized(self, most: int) -> bytes:
        (size,) = _SIZE.unpack(self.take(_SIZE.size))
        if size > most:
            raise self.bad(f"it says that it has {size} bytes")
        return self.take(size)

    def bad(self, reason: str) -> BadLine:
        return BadLine(reason, self.line, self.source)

    def forged(self, reason: str, evidence: bytes = b"") -> ForgedLine:
        return ForgedLine(reason, self.line, self.source, evidence)


def read_head(data: bytes | memoryview, source: str = "") -> tuple[LogHead, int]:
    """The head and its length. Raises BadLine."""
    reader = _Reader(data, 1, source)
    if reader.take(1) != bytes([_HEAD]):
        raise reader.bad("a log begins with its head")
    raw = reader.sized(_MOST_HEAD)
    body = bytes([_HEAD]) + _SIZE.pack(len(raw)) + raw
    if reader.take(32) != hashlib.sha256(body).digest():
        raise reader.bad("the head is damaged")
    try:
        head = msgspec.json.decode(raw, type=LogHead)
        if len(head.run) != 32 or len(head.rule) != HEAD_BYTES:
            raise ValueError("hashes have 32 bytes")
        head.unpacked_rule  # noqa: B018 - it raises for what is no rule
    except (ValueError, msgspec.MsgspecError) as error:
        raise reader.bad(f"the head is refused: {error}") from None
    return head, len(body) + 32


def read_rounds(
    head: LogHead,
    data: bytes | memoryview,
    state_before: Callable[[], bytes],
    previous: Outcome | None = None,
    *,
    line: int = 2,
    source: str = "",
) -> Iterator[LoggedRound]:
    """The rounds after `previous` (by default the first ones), each checked against all before it.

    `state_before` is asked at the beginning of each round for the state that all share then: entries leave it out.
    Raises BadLine or ForgedLine, which name the line; nothing of its round is given then.
    """
    reader, terms, last = _Reader(data, line, source), head.terms, previous or head.genesis
    while reader.view:
        first, offers, state = reader.line, [], state_before()
        while (kind := reader.take(1)[0]) == _ENTRY:
            offers.append(_entry(reader, last, state))
            reader.line += 1
        if kind != _CLOSE:
            raise reader.bad(f"no line begins with {kind}")
        certificate = _close(reader, last, terms)
        if tuple(map(offer_digest, offers)) != certificate.outcome.offers:
            raise reader.forged("the certificate is of other entries than stand before it")
        yield LoggedRound(certificate, tuple(offers), first, reader.line)
        last = certificate.outcome
        reader.line += 1


def _entry(reader: _Reader, last: Outcome, state: bytes) -> Offer:
    member, weight, staleness, size = _ENTRY_HEAD.unpack(reader.take(_ENTRY_HEAD.size))
    if member >= len(last.members) or size > MAX_SCALAR_BYTES:
        raise reader.bad(f"there is no member {member}, or no entry of {size} bytes")
    scalars, flags = reader.take(size), reader.take(1)[0]
    if flags > 3:
        raise reader.bad("a flag that there is not")
    if flags & 1:
        state = reader.take(32)
    bodies = (reader.take(32),) if flags & 2 else ()
    sizes = _BODY_SIZE.unpack(reader.take(_BODY_SIZE.size)) if flags & 2 else ()
    place = (last.run, last.scope, last.round + 1, last.members[member], outcome_digest(last), state)
    offer = Offer(*place, weight, staleness, bodies, sizes, scalars, UNSIGNED)
    signature = reader.take(64)
    if not verify(offer.peer, signature, covered(offer)):
        raise reader.forged(f"the signature is not that of {offer.peer}", scalars + signature)
    return msgspec.structs.replace(offer, signature=signature)


def _close(reader: _Reader, last: Outcome, terms: GroupTerms) -> Certificate:
    raw = reader.sized(_MOST_CLOSE)
    try:
        certificate = round_codec.decode_only(raw)
    except RemoteProtocolError as error:
        raise reader.bad(error.reason) from None
    if not isinstance(certificate, Certificate):
        raise reader.bad("a round closes with a certificate")
    try:
        check_certificate(certificate, last, terms, Ledger(0))
    except VerificationError as error:
        raise reader.forged(error.reason, raw) from None
    return certificate


def replay_rounds(
    head: LogHead,
    data: bytes | memoryview,
    theta0_P: Lattice,
    *,
    upto: int | None = None,
    on_step: Callable[[Course, LoggedRound, Step], object] = lambda course, logged, step: None,
    run_pieces: RunPieces = map,
    source: str = "",
) -> Course:
    """The state after the last round of a log (`data` follows its head), or after round `upto`.

    Raises BadLine for other first parameters, and BadLine or ForgedLine at the first line that is not right: also where
    the rounds lead to another state than most entries of the next one were signed for.
    """
    rule = head.unpacked_rule
    if state_hash(theta0_P) != rule.theta or theta0_P.size != rule.n_elements:
        raise BadLine("the log begins with other parameters", 1, source)
    course, last = Course(rule, head.run, theta0_P), head.genesis
    for logged in read_rounds(head, data, course.digest, source=source):
        digest = course.digest()
        others = sum(offer.state != digest for offer in logged.offers)
        if 2 * others > len(logged.offers):
            reason = f"the rounds before lead to another state than {others} of {len(logged.offers)} peers signed"
            raise ForgedLine(reason, logged.first_line, source)
        step = course.step(logged.number, beacon_of(last), logged.offers)
        course.apply(step, run_pieces)
        on_step(course, logged, step)
        last = logged.certificate.outcome
        if course.number == upto:
            break
    return course


@dataclass(frozen=True, slots=True)
class Extent:
    """Where a round's lines end in a log without its head, and how many updates they say."""

    end: int
    n_updates: int


def extents(data: bytes | memoryview) -> list[Extent]:
    """Of each whole round, by the lines' lengths alone: nothing is checked. What is torn off at the end is left out."""
    view, at, n_updates, found = memoryview(data), 0, 0, []
    while at < len(view):
        kind, body = view[at], at + 1
        if kind == _ENTRY and body + _ENTRY_HEAD.size <= len(view):
            _, weight, _, size = _ENTRY_HEAD.unpack_from(view, body)
            flag_at = body + _ENTRY_HEAD.size + size
            if flag_at >= len(view):
                break
            more = 32 * (view[flag_at] & 1) + (40 if view[flag_at] & 2 else 0)
            at, n_updates = flag_at + 1 + more + 64, n_updates + weight
        elif kind == _CLOSE and body + _SIZE.size <= len(view):
            at = body + _SIZE.size + _SIZE.unpack_from(view, body)[0]
            if at > len(view):
                break
            found.append(Extent(at, n_updates))
            n_updates = 0
        else:
            break
    return found
