"""Signed statements of a round: made, checked once, and kept so that nobody can say two things.

Whatever a peer may say once has a slot. The first statement in a slot counts; another one by the same peer is a proof
of a lie that anybody can check. What is kept of a peer is bounded, so that a liar can only crowd out itself.

Ring: pure.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import msgspec

from mycel.protocols.errors import RemoteProtocolError
from mycel.protocols.rounds import (
    Claim,
    Offer,
    Outcome,
    Plan,
    Proposal,
    Request,
    Vote,
    outcome_digest,
    signed_part,
)
from mycel.security.signatures import Signer, verify

Signed = Request | Offer | Plan | Claim | Proposal | Vote
_S = TypeVar("_S", Request, Offer, Plan, Claim, Proposal, Vote)
Slot = tuple[str | int | bytes, ...]

UNSIGNED = bytes(64)
# Statements kept of one peer and round. An honest one needs two votes and at most a proposal an attempt.
_MOST = {"vote": 128, "plan": 16, "proposal": 16, "offer": 1, "request": 1}
# Of a round that is over: nothing but one of two that prove a lie is of use any more.
_MOST_OLD = 2
# Proofs are said again in later rounds, and whoever was away may check them for so long.
KEPT_ROUNDS = 8


def sign(signer: Signer, statement: _S) -> _S:
    """The statement with the signature of its author, who is `signer`."""
    return msgspec.structs.replace(statement, signature=signer.sign(signed_part(statement)))


def make_offer(  # noqa: PLR0913  (an offer's fields, by name)
    signer: Signer,
    outcome: Outcome,
    state: bytes,
    *,
    weight: int = 1,
    bodies: Sequence[bytes] = (),
    sizes: Sequence[int] = (),
    scalars: bytes = b"",
    staleness: int = 0,
) -> Offer:
    """My contribution to the round after `outcome`, made from the state with the digest `state`."""
    run, scope, number, last = outcome.run, outcome.scope, outcome.round + 1, outcome_digest(outcome)
    mine = (signer.peer_id, last, state, weight, staleness, tuple(bodies), tuple(sizes), scalars)
    return sign(signer, Offer(run, scope, number, *mine, UNSIGNED))


def round_of(statement: Signed) -> int:
    """The round that it is about."""
    return statement.outcome.round if isinstance(statement, Proposal) else statement.round


def kind_of(statement: Signed) -> str:
    """What it is called."""
    return type(statement).__name__.lower()


def place_of(statement: Signed) -> tuple[bytes, str]:
    """The run and scope that it is about."""
    place = statement.outcome if isinstance(statement, Proposal) else statement
    return place.run, place.scope


def slot_of(statement: Signed) -> Slot:
    """What its author may fill once: kind, round, and what tells apart several of that kind."""
    if isinstance(statement, Vote):
        return "vote", statement.round, statement.attempt, statement.kind
    if isinstance(statement, Claim):
        return "claim", statement.round, statement.plan, statement.kind, statement.shard
    if isinstance(statement, Plan):
        return "plan", statement.round, statement.attempt
    if isinstance(statement, Proposal):
        return "proposal", statement.outcome.round, statement.attempt
    if isinstance(statement, Offer):
        return "offer", statement.round
    return "request", statement.round, statement.wants


@dataclass(frozen=True, slots=True)
class Fresh:
    """The first in its slot: it counts."""


@dataclass(frozen=True, slots=True)
class Known:
    """Said before, or one too many of its author: nothing new."""


@dataclass(frozen=True, slots=True)
class Contradicted:
    """Its author has said `first` in the same slot."""

    first: Signed


Admission = Fresh | Known | Contradicted


@dataclass(slots=True)
class Ledger:
    """The first statement in each slot of each peer, signatures checked once."""

    most_claims: int
    _first: dict[str, dict[Slot, Signed]] = field(default_factory=dict)
    _n: Counter[tuple[str, str | int | bytes, str | int | bytes]] = field(default_factory=Counter)

    def admit(self, sender: str, statement: Signed, *, is_old: bool = False) -> Admission:
        """Take up a statement that `sender` says or passes on. RemoteProtocolError if its signature is false."""
        said, slot = self._first.setdefault(statement.peer, {}), slot_of(statement)
        first = said.get(slot)
        if first is not None and (first == statement or signed_part(first) == signed_part(statement)):
            return Known()
        kind = (statement.peer, slot[0], slot[1])
        if first is None and self._n[kind] >= (_MOST_OLD if is_old else _MOST.get(str(slot[0]), self.most_claims)):
            return Known()
        if not verify(statement.peer, statement.signature, signed_part(statement)):
            raise RemoteProtocolError(f"a {kind_of(statement)} with a false signature", sender)
        if first is not None:
            return Contradicted(first)
        said[slot] = statement
        self._n[kind] += 1
        return Fresh()

    def keep(self, statement: Signed) -> None:
        """Take up what I have signed myself."""
        self._first.setdefault(statement.peer, {}).setdefault(slot_of(statement), statement)

    def find(self, peer: str, slot: Slot) -> Signed | None:
        return self._first.get(peer, {}).get(slot)

    def claims(self, peer: str, number: int) -> list[Claim]:
        """All claims of a peer in round `number`."""
        said = self._first.get(peer, {}).values()
        return [statement for statement in said if isinstance(statement, Claim) and statement.round == number]

    def holds(self, statement: Vote) -> bool:
        """Whether this very vote has been checked."""
        return self.find(statement.peer, slot_of(statement)) == statement

    def prune(self, oldest_round: int) -> None:
        """Forget what is about rounds before `oldest_round`."""
        for peer in list(self._first):
            kept = {slot: said for slot, said in self._first[peer].items() if round_of(said) >= oldest_round}
            if kept:
                self._first[peer] = kept
            else:
                del self._first[peer]
        self._n = Counter((peer, slot[0], slot[1]) for peer, said in self._first.items() for slot in said)
