"""Whether a statement can be of a round at all, before anything is spent on it; and what is kept of one to come.

Ring: pure.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection

from mycel.protocols.errors import RemoteProtocolError
from mycel.protocols.rounds import Certificate, Claim, Held, Offer, Plan, Proposal, RoundMessage
from mycel.swarm.rounds.certificates import malformed
from mycel.swarm.rounds.claims import gram_bytes
from mycel.swarm.rounds.terms import GroupTerms

# Kept of a peer that is a round ahead, until I am there; of one that is no member yet only what it says first.
_MOST_EARLY, _MOST_EARLY_OF_STRANGERS = 512, 128
_MOST_EARLY_BYTES, _MOST_EARLY_BYTES_OF_STRANGERS = 1 << 20, 128 << 10


def check_offer(peer: str, offer: Offer, terms: GroupTerms, n_shards: int) -> None:
    """RemoteProtocolError by `peer`, who says it, unless it offers a vector of this group, or scalars."""
    if len(offer.bodies) not in (0, n_shards) or len(offer.sizes) != len(offer.bodies):
        raise RemoteProtocolError(f"an offer of {len(offer.bodies)} bodies, not {n_shards}", peer)
    if sum(offer.sizes) > _most_bytes(terms) or not (offer.bodies or offer.scalars):
        raise RemoteProtocolError("an offer of nothing, or of more than a vector takes", peer)


def check_claim(peer: str, claim: Claim, n_members: int, n_shards: int, terms: GroupTerms) -> None:
    """RemoteProtocolError unless what it carries is what it claims."""
    if claim.shard >= n_shards:
        raise RemoteProtocolError(f"shard {claim.shard} of {n_shards}", peer)
    if claim.kind == "sum" and (claim.data or claim.size > _most_bytes(terms)):
        raise RemoteProtocolError("a claim of a sum with data, or of more than a vector takes", peer)
    if claim.kind == "gram":
        if claim.size != len(claim.data) or claim.size > gram_bytes(n_members):
            raise RemoteProtocolError("a Gram matrix of another size", peer)
        if hashlib.sha256(claim.data).digest() != claim.value:
            raise RemoteProtocolError("a Gram matrix with another hash", peer)


def check_turn(peer: str, statement: Plan | Proposal, proposers: tuple[str, ...]) -> None:
    """RemoteProtocolError unless its author was to plan and propose in that attempt, and it is well-formed."""
    if proposers[statement.attempt % len(proposers)] != statement.peer:
        raise RemoteProtocolError("a proposal of a peer whose turn it is not", peer)
    if isinstance(statement, Plan) and len(set(statement.offers)) != len(statement.offers):
        raise RemoteProtocolError("a plan that counts an offer twice", peer)
    if isinstance(statement, Proposal) and (reason := malformed(statement.outcome)):
        raise RemoteProtocolError(f"a proposal of an outcome with {reason}", peer)


class Early:
    """What peers that are a round ahead have said, within bounds for each of them."""

    def __init__(self) -> None:
        self._kept: dict[str, list[RoundMessage]] = {}
        self._bytes: dict[str, int] = {}

    def keep(self, peer: str, message: RoundMessage, *, is_member: bool) -> None:
        """Unless it is one too many: what is missed so is made up for by the certificate of that round."""
        kept, size = self._kept.setdefault(peer, []), self._bytes.get(peer, 0) + _weight(message)
        most = _MOST_EARLY if is_member else _MOST_EARLY_OF_STRANGERS
        if len(kept) < most and size <= (_MOST_EARLY_BYTES if is_member else _MOST_EARLY_BYTES_OF_STRANGERS):
            kept.append(message)
            self._bytes[peer] = size

    def count(self, peer: str) -> int:
        return len(self._kept.get(peer, ()))

    def forget_all_but(self, peers: Collection[str]) -> None:
        """Who comes back says everything again."""
        self._kept = {peer: kept for peer, kept in self._kept.items() if peer in peers}
        self._bytes = {peer: size for peer, size in self._bytes.items() if peer in peers}

    def taken(self) -> list[tuple[str, RoundMessage]]:
        """All of it, each peer's in the order in which it came."""
        kept, self._kept, self._bytes = self._kept, {}, {}
        return [(peer, message) for peer, messages in kept.items() for message in messages]


def _most_bytes(terms: GroupTerms) -> int:
    """More than any codec makes of a vector."""
    return 8 * terms.n_elements + (1 << 16)


def _weight(message: RoundMessage) -> int:
    """About how many bytes it takes to keep."""
    if isinstance(message, Claim):
        return 400 + len(message.data)
    if isinstance(message, Offer):
        return 400 + len(message.scalars) + 40 * len(message.bodies)
    if isinstance(message, Plan | Held):
        return 400 + 32 * len(message.offers)
    if isinstance(message, Proposal | Certificate):
        outcome = message.outcome
        lists = (outcome.offers, outcome.contributors, outcome.results, outcome.members, outcome.convicted)
        of_peers = message.requests if isinstance(message, Proposal) else message.signatures
        return 1000 + 200 * sum(map(len, lists)) + 500 * len(of_peers)
    return 400
