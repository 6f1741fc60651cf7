"""What a group agreed on before its first round, and who does what in one: all of it follows from the last outcome.

The beacon of a round is a hash of the outcome before it, which nobody knew when the members were admitted; the order
of the members for a task is the order of the hashes of beacon, task and peer id (MoDeST, arXiv 2302.13837, section 3).

Ring: pure.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass

from mycel.protocols.rounds import NOTHING, Outcome, outcome_digest

_BEACON_DOMAIN = b"mycel beacon v1"
_ORDER_DOMAIN = b"mycel order v1"


@dataclass(frozen=True, slots=True)
class GroupTerms:
    """The same for all members, from the recipe.

    `aggregators` reduce each shard independently; 0: every member reduces everything itself, from all bodies. `open`:
    more than two thirds of the members sign a certificate, fewer than one third may lie; otherwise a majority does and
    members are trusted not to. `contributors`: the share of members that a round waits for before its grace begins.
    `liars` is the share of contributions that the rule withstands. Who contributes nothing to `absences` rounds in a
    row is no member any more. `audits` members recompute one shard each, unannounced. A vector is cut into `shards`,
    fewer if they would have less than 16 Ki elements.
    """

    n_elements: int
    rule: str = "mean"
    codec: str = "float32"
    result_codec: str = "float32"
    liars: float = 0.0
    aggregators: int = 3
    open: bool = True
    min_members: int = 1
    contributors: float = 2 / 3
    absences: int = 3
    audits: int = 1
    shards: int = 16
    patience_s: float = 60.0
    longest_grace_s: float = 30.0
    attempt_s: float = 5.0

    def quorum(self, n_members: int) -> int:
        """Signatures that make a certificate."""
        return (2 * n_members) // 3 + 1 if self.open else n_members // 2 + 1

    @property
    def n_shards(self) -> int:
        """Into how many shards a vector is cut, whoever comes and goes: what was not sent is kept by shard."""
        return 1 if self.aggregators == 0 else max(1, min(self.shards, self.n_elements >> 14))

    def n_liars(self, n_rows: int) -> int:
        """How many of so many contributions the rule is to withstand."""
        return min(math.ceil(self.liars * n_rows), max(n_rows - 1, 0) // 2)


def genesis(run: bytes, scope: str, founder: str) -> Outcome:
    """The outcome of round 0, which needs no signature: the founder is alone."""
    return Outcome(run, scope, 0, NOTHING, (), (), (), (), NOTHING, (founder,), (0,))


def beacon_of(outcome: Outcome) -> bytes:
    """The beacon of the round after `outcome`."""
    return hashlib.sha256(_BEACON_DOMAIN + outcome_digest(outcome)).digest()


def order(beacon: bytes, task: str, peers: Sequence[str]) -> tuple[str, ...]:
    """The peers by their lot for `task`."""

    def lot(peer: str) -> bytes:
        return hashlib.sha256(b"|".join((_ORDER_DOMAIN, beacon, task.encode(), peer.encode()))).digest()

    return tuple(sorted(peers, key=lot))


def reducers(beacon: bytes, shard: int, members: Sequence[str]) -> tuple[str, ...]:
    """Who reduces `shard`, the first `aggregators` of them that are there; every member is first for its share."""
    ring = order(beacon, "reduce", members)
    turn = shard % len(ring)
    return ring[turn:] + ring[:turn]


def proposer(beacon: bytes, attempt: int, members: Sequence[str]) -> str:
    """Whose turn it is to propose in `attempt`."""
    return order(beacon, "propose", members)[attempt % len(members)]
