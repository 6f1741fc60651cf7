"""What peers of a group say in a round: who contributes, what was reduced, who votes for what, and bytes by their hash.

A group is a run and a scope in it (the whole model, one stage, what a library's caller averages). A round takes one
contribution of each member at most, and ends with one `Certificate` or none. Every statement that others rely on is
signed over its fields and a versioned domain, and so can be shown to a third party.

Two protocols. ROUND: every member tells every other its statements, one way on a stream of its own that begins with
`Joining`. BLOBS: bytes by their SHA-256, and certificates, questions and answers one at a time on a stream.

Ring: pure.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Sequence
from typing import Annotated, Literal

from msgspec import Meta, Struct

from mycel.protocols.messages import MAX_FILE_CHUNK_BYTES, Count, Key, Message, Multiaddr, PeerId, Reason

MAX_GROUP = 256
MAX_SHARDS = 256
MAX_SCALAR_BYTES = 8192
MAX_BODY_BYTES = 1 << 32
MAX_GRAM_BYTES = 4 * MAX_GROUP * (MAX_GROUP + 1) // 2

Scope = Annotated[str, Meta(max_length=32, pattern=r"^[a-z0-9:._-]*\Z")]
Signature = Annotated[bytes, Meta(min_length=64, max_length=64)]
ShardIndex = Annotated[int, Meta(ge=0, lt=MAX_SHARDS)]
Keys = Annotated[tuple[Key, ...], Meta(max_length=MAX_SHARDS)]
Size = Annotated[int, Meta(ge=0, le=MAX_BODY_BYTES)]
Score = Annotated[int, Meta(ge=-(1 << 20), le=1 << 20)]
Peers = Annotated[tuple[PeerId, ...], Meta(max_length=MAX_GROUP)]

NOTHING = bytes(32)
"""A vote for no outcome, and what comes before the first one."""


class Joining(Message, frozen=True):
    """First on a ROUND stream, and again at every change: who I am to this group, and how far.

    `round` is the one that I am in, `last` the digest of the outcome before it, `state` the SHA-256 of the state that
    all members should share then. A peer that is no member asks to become one by being here: `wants` in.
    """

    run: Key
    scope: Scope
    round: Count
    last: Key
    state: Key
    wants: Literal["member", "observer", "leave"] = "member"
    addresses: Annotated[tuple[Multiaddr, ...], Meta(max_length=8)] = ()


class Request(Message, frozen=True):
    """A signed wish that members put into an outcome: to join or leave the group, made in `round`."""

    run: Key
    scope: Scope
    round: Count
    peer: PeerId
    wants: Literal["member", "leave"]
    signature: Signature


class Offer(Message, frozen=True):
    """A contribution, committed to by hash before anybody sees it: one of each peer and round counts.

    `last` and `state` are what it was made from. `bodies` and `sizes` are the SHA-256 and bytes of each shard of a
    coded vector; `scalars` are one-byte updates, which travel in here. `weight` is stated by its author and capped by
    who uses it; `staleness` counts the rounds that it comes late.
    """

    run: Key
    scope: Scope
    round: Count
    peer: PeerId
    last: Key
    state: Key
    weight: Annotated[int, Meta(ge=0, le=2**32)]
    staleness: Annotated[int, Meta(ge=0, le=15)]
    bodies: Keys
    sizes: Annotated[tuple[Size, ...], Meta(max_length=MAX_SHARDS)]
    scalars: Annotated[bytes, Meta(max_length=MAX_SCALAR_BYTES)]
    signature: Signature


class Scalars(Message, frozen=True):
    """An `Offer` of scalars alone by whoever speaks, without what its last `Joining` on this stream has said.

    That is run, scope, outcome and state. Its weight is the number of its scalars less `beside`: so an update of one
    byte travels in little more. The signature is the offer's.
    """

    round: Count
    beside: Annotated[int, Meta(ge=0, le=255)]
    staleness: Annotated[int, Meta(ge=0, le=15)]
    scalars: Annotated[bytes, Meta(max_length=MAX_SCALAR_BYTES)]
    signature: Signature


class Held(Message, frozen=True):
    """Of `shard`, which I may have to reduce, I hold the bodies of these offers (digests). The newest counts."""

    round: Count
    shard: ShardIndex
    offers: Annotated[tuple[Key, ...], Meta(max_length=MAX_GROUP)]


class Plan(Message, frozen=True):
    """The proposer of `attempt`: reduce exactly these offers (digests, in the order of their authors' ids)."""

    run: Key
    scope: Scope
    round: Count
    attempt: Count
    peer: PeerId
    offers: Annotated[tuple[Key, ...], Meta(max_length=MAX_GROUP)]
    signature: Signature


class Claim(Message, frozen=True):
    """What I computed from shard `shard` of the offers of `plan` (`plan_digest`): `value` is the SHA-256 of it.

    "gram": `data` are the float32 Gram matrix's upper triangle, row by row. "sum": the coded result of `size` bytes,
    which I give to whoever asks for `value`.
    """

    run: Key
    scope: Scope
    round: Count
    plan: Key
    kind: Literal["gram", "sum"]
    shard: ShardIndex
    peer: PeerId
    value: Key
    size: Size
    data: Annotated[bytes, Meta(max_length=MAX_GRAM_BYTES)]
    signature: Signature


class Outcome(Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """What a round decides. `offers` count, `results` are the shards' coded results, `decision` what the rule decided.

    `members` are those of the next round, `missed` in how many rounds in a row each of them contributed nothing,
    `convicted` who was proved to lie and is out for good, `standing` what the members' contributions have been worth so
    far, in units of 2^-20 (empty: nothing of anybody). `begun`: there have been enough members to begin.
    """

    run: Key
    scope: Scope
    round: Count
    last: Key
    offers: Annotated[tuple[Key, ...], Meta(max_length=MAX_GROUP)]
    contributors: Peers
    results: Keys
    sizes: Annotated[tuple[Size, ...], Meta(max_length=MAX_SHARDS)]
    decision: Key
    members: Peers
    missed: Annotated[tuple[Count, ...], Meta(max_length=MAX_GROUP)]
    convicted: Peers = ()
    standing: Annotated[tuple[Score, ...], Meta(max_length=MAX_GROUP)] = ()
    begun: bool = False


class Proposal(Message, frozen=True):
    """The proposer of `attempt`: let this be the outcome.

    `valid_attempt` is one in which a quorum prevoted for it, or -1. `requests` are the wishes behind changes of
    membership.
    """

    attempt: Count
    peer: PeerId
    outcome: Outcome
    valid_attempt: Annotated[int, Meta(ge=-1, le=2**31 - 1)]
    requests: Annotated[tuple[Request, ...], Meta(max_length=MAX_GROUP)]
    signature: Signature


class Vote(Message, frozen=True):
    """For the outcome with this digest, or NOTHING. Two precommit votes of one peer for one attempt prove a lie."""

    run: Key
    scope: Scope
    round: Count
    attempt: Count
    kind: Literal["prevote", "precommit"]
    peer: PeerId
    value: Key
    signature: Signature


class Certificate(Message, frozen=True):
    """An outcome with the precommit signatures of a quorum of the round's members, in the order of `signers`."""

    outcome: Outcome
    attempt: Count
    signers: Peers
    signatures: Annotated[tuple[Signature, ...], Meta(max_length=MAX_GROUP)]


RoundMessage = Joining | Request | Offer | Held | Plan | Claim | Proposal | Vote | Certificate

StreamMessage = RoundMessage | Scalars
"""What is sent on a ROUND stream: a statement, or one in short."""

# ---- BLOBS -----------------------------------------------------------------------------------------------------------


class GetBlob(Message, frozen=True):
    """Bytes [start, start + count) of the blob with this SHA-256."""

    run: Key
    scope: Scope
    digest: Key
    start: Size
    count: Annotated[int, Meta(ge=1, le=MAX_FILE_CHUNK_BYTES * 16)]


class Blob(Message, frozen=True):
    """The answer; the bytes are attached as one uint8 tensor."""

    start: Size


class GetCertificates(Message, frozen=True):
    """Certificates of rounds from `start` on, oldest first, as many as fit."""

    run: Key
    scope: Scope
    start: Count


class Certificates(Message, frozen=True):
    newest_round: Count
    certificates: Annotated[tuple[Certificate, ...], Meta(max_length=64)]


class GetOffers(Message, frozen=True):
    """Offers by their digests, of the round in hand or of one kept."""

    run: Key
    scope: Scope
    digests: Annotated[tuple[Key, ...], Meta(max_length=MAX_GROUP)]


class Offers(Message, frozen=True):
    offers: Annotated[tuple[Offer, ...], Meta(max_length=MAX_GROUP)]


class NotHere(Message, frozen=True):
    reason: Reason


BlobMessage = GetBlob | Blob | GetCertificates | Certificates | GetOffers | Offers | NotHere

# ---- what signatures cover -------------------------------------------------------------------------------------------


def signed_part(statement: Request | Offer | Plan | Claim | Proposal | Vote) -> bytes:
    """What the statement's signature covers: domain of its kind, and each field with its length."""
    if isinstance(statement, Request):
        fields = [*_place(statement.run, statement.scope, statement.round), statement.peer.encode()]
        return _covered("request", [*fields, statement.wants.encode()])
    if isinstance(statement, Offer):
        return _covered("offer", _offer_fields(statement))
    if isinstance(statement, Plan):
        fields = [*_place(statement.run, statement.scope, statement.round), _u64(statement.attempt)]
        return _covered("plan", [*fields, statement.peer.encode(), b"".join(statement.offers)])
    if isinstance(statement, Claim):
        fields = [*_place(statement.run, statement.scope, statement.round), statement.plan, statement.kind.encode()]
        shard = [_u64(statement.shard), statement.peer.encode(), statement.value, _u64(statement.size)]
        return _covered("claim", [*fields, *shard])
    if isinstance(statement, Proposal):
        attempt = [_u64(statement.attempt), statement.valid_attempt.to_bytes(8, "little", signed=True)]
        return _covered("proposal", [*attempt, statement.peer.encode(), outcome_digest(statement.outcome)])
    return vote_part(statement, statement.attempt, statement.kind, statement.value)


def shortened(offer: Offer, joining: Joining, peer: str) -> Offer | Scalars:
    """What to send of an offer on a stream of `peer` on which `joining` was said last: all of it if it does not fit."""
    beside = len(offer.scalars) - offer.weight
    said = (joining.run, joining.scope, joining.round, peer, joining.last, joining.state)
    fits = said == (offer.run, offer.scope, offer.round, offer.peer, offer.last, offer.state)
    if not fits or offer.bodies or offer.sizes or not 0 <= beside <= 255:
        return offer
    return Scalars(offer.round, beside, offer.staleness, offer.scalars, offer.signature)


def restored(scalars: Scalars, joining: Joining, peer: str) -> Offer | None:
    """The offer again; None for one of another round than `joining`, or of more beside updates than there is."""
    weight = len(scalars.scalars) - scalars.beside
    if scalars.round != joining.round or weight < 0:
        return None
    made_from = (joining.last, joining.state)
    place = (joining.run, joining.scope, joining.round, peer, *made_from)
    return Offer(*place, weight, scalars.staleness, (), (), scalars.scalars, scalars.signature)


def vote_part(place: Outcome | Vote, attempt: int, kind: str, value: bytes) -> bytes:
    """What a vote's signature covers, without its author: a certificate's signers all signed the same bytes."""
    return _covered("vote", [*_place(place.run, place.scope, place.round), _u64(attempt), kind.encode(), value])


def offer_digest(offer: Offer) -> bytes:
    """Names an offer, whatever signature it carries: SHA-256 of the signed part."""
    return hashlib.sha256(signed_part(offer)).digest()


def plan_digest(offers: Sequence[bytes]) -> bytes:
    """Names what is to be reduced, whoever planned it: SHA-256 of the offers' digests in their order."""
    return hashlib.sha256(b"mycel/plan-set/1\0" + b"".join(offers)).digest()


def outcome_digest(outcome: Outcome) -> bytes:
    """Names an outcome, whoever signed it."""
    fields = [*_place(outcome.run, outcome.scope, outcome.round), outcome.last, b"".join(outcome.offers)]
    fields += [_names(outcome.contributors), b"".join(outcome.results), b"".join(map(_u64, outcome.sizes))]
    fields += [
        outcome.decision,
        _names(outcome.members),
        b"".join(map(_u64, outcome.missed)),
        _names(outcome.convicted),
        struct.pack(f"<{len(outcome.standing)}i", *outcome.standing),
        _u64(outcome.begun),
    ]
    return hashlib.sha256(_covered("outcome", fields)).digest()


def _offer_fields(offer: Offer) -> list[bytes]:
    fields = [*_place(offer.run, offer.scope, offer.round), offer.peer.encode(), offer.last, offer.state]
    fields += [_u64(offer.weight), _u64(offer.staleness), b"".join(offer.bodies), b"".join(map(_u64, offer.sizes))]
    return [*fields, offer.scalars]


def _place(run: bytes, scope: str, number: int) -> list[bytes]:
    return [run, scope.encode(), _u64(number)]


def _names(peers: Sequence[str]) -> bytes:
    return b"".join(_sized(peer.encode()) for peer in peers)


def _covered(kind: str, fields: Sequence[bytes]) -> bytes:
    return b"mycel/round/" + kind.encode() + b"/1\0" + b"".join(map(_sized, fields))


def _sized(field: bytes) -> bytes:
    return struct.pack("<I", len(field)) + field


def _u64(value: int) -> bytes:
    return struct.pack("<Q", value)
