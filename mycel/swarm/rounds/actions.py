"""What a round's machine wants done. The node does it in the order given, and tells the machine what came of it.

Ring: pure.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from mycel.protocols.rounds import Certificate, Joining, Offer, Plan, Proposal, RoundMessage, Vote


@dataclass(frozen=True, slots=True)
class Say:
    """Tell every member and whoever listens."""

    message: RoundMessage


@dataclass(frozen=True, slots=True)
class Remember:
    """Write this down, on disk, before anything after it is done: a restarted peer must not say otherwise.

    Everything that must be said once is written, not votes alone: an honest peer that offers or plans anew after a
    crash would look like a liar; and a vote without the proposal that it locks could never be made good.
    """

    vote: Vote | Offer | Plan | Proposal


@dataclass(frozen=True, slots=True)
class Collect:
    """Fetch the bodies of `shard` of these offers from their authors or from whoever holds them; tell `held`."""

    shard: int
    offers: tuple[Offer, ...]


@dataclass(frozen=True, slots=True)
class FetchOffers:
    """Ask `peer` for offers that it named and we have not seen; they come in by `receive`."""

    peer: str
    digests: tuple[bytes, ...]


@dataclass(frozen=True, slots=True)
class Reduce:
    """Compute from the bodies of `shard`, collecting what is missing of them first; tell `computed`.

    "gram" needs no decision, "sum" that of the plan (empty for a rule that needs none).
    """

    kind: Literal["gram", "sum"]
    plan: bytes
    shard: int
    offers: tuple[Offer, ...]
    decision: bytes


@dataclass(frozen=True, slots=True)
class Decide:
    """Let the rule decide from the sum of these shards' Gram matrices, in order; tell `decided`.

    `standing` is that of the offers' authors. The decision begins with their standing after it, int32 each.
    """

    plan: bytes
    offers: tuple[Offer, ...]
    grams: tuple[bytes, ...]
    standing: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Commit:
    """The round is over: fetch the results, apply them, and tell `advance`. `reason` is for people."""

    certificate: Certificate
    offers: tuple[Offer, ...]
    reason: str


@dataclass(frozen=True, slots=True)
class Name:
    """`peer` has lied, and how; the machine has told the others what proves it, where something does."""

    peer: str
    reason: str


@dataclass(frozen=True, slots=True)
class FallenBehind:
    """Others are in a later round, or share another state: fetch certificates, results or the state from `peer`."""

    peer: str
    joining: Joining
    reason: str


@dataclass(frozen=True, slots=True)
class Repeat:
    """Tell `peer` alone what `repeat()` says: it has come into this round late, and let go what was said before."""

    peer: str


Action = Say | Repeat | Remember | Collect | FetchOffers | Reduce | Decide | Commit | Name | FallenBehind
