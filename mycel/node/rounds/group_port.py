"""What a group of peers is used with: which group, with what, what goes in and what comes out.

Ring: shell (carries ports).
"""

from __future__ import annotations

from dataclasses import dataclass

from mycel.node.events import EventSink
from mycel.node.rounds.blobs import BlobExchange
from mycel.node.rounds.round_streams import RoundDoor
from mycel.protocols.ports import Compute, Transport
from mycel.protocols.rounds import Certificate, Offer
from mycel.security.signatures import Signer
from mycel.swarm.rounds.terms import GroupTerms

__all__ = ["Committed", "Contribution", "GroupPlace", "GroupPorts", "NeedState", "Standing"]


@dataclass(frozen=True, slots=True)
class GroupPlace:
    """Which group: equal for all its members."""

    run: bytes
    scope: str
    terms: GroupTerms
    founder: str

    @property
    def key(self) -> tuple[bytes, str]:
        return self.run, self.scope


@dataclass(frozen=True, slots=True)
class GroupPorts:
    """What a group works with. `door` and `blobs` are the node's own, shared by all its groups; `disk` writes files."""

    door: RoundDoor
    blobs: BlobExchange
    signer: Signer
    compute: Compute
    disk: Compute
    event: EventSink

    @property
    def transport(self) -> Transport:
        return self.door.transport


@dataclass(frozen=True, slots=True)
class Standing:
    """The state that a peer begins with: its SHA-256, and the round after which it is, 0 before any.

    NOTHING for who has no state: it will be told to fetch one. `keeps_rounds`: what rounds bring stays on disk until
    the user says `Group.saved`, so that a group goes on from older states, too, if all of it died at once.
    """

    state: bytes
    round: int = 0
    keeps_rounds: bool = False


@dataclass(frozen=True, slots=True)
class Contribution:
    """`bodies`: a coded vector, one for each of `Group.n_shards`, or none. They must not change for two rounds."""

    bodies: tuple[bytes | bytearray | memoryview, ...] = ()
    weight: int = 1
    scalars: bytes = b""
    staleness: int = 0


@dataclass(frozen=True, slots=True)
class Committed:
    """A round is over: its offers in canonical order, and the coded results of the shards, verified by hash.

    `accepted`: this peer's own contribution is in it.
    """

    certificate: Certificate
    offers: tuple[Offer, ...]
    results: tuple[memoryview, ...]
    accepted: bool

    @property
    def round(self) -> int:
        return self.certificate.outcome.round


@dataclass(frozen=True, slots=True)
class NeedState:
    """The rounds missed cannot be had any more, or this peer's state is another than most have.

    Fetch the state after round `round`, or after a later one, of one of `peers` and say so with `Group.resume`.
    `states`: the hashes of their states that they say, by peer.
    """

    round: int
    peers: tuple[str, ...]
    states: dict[str, bytes]
    reason: str
