"""What was computed from a set of offers, whom to believe about it, and who lied.

Each shard is reduced by several members. A value is accepted when every one of its jury claims it and nobody claims
another; whoever holds back is replaced by the next in order after a while. Where two claims differ I compute the shard
myself, and whoever said otherwise has lied. So as long as one member of a jury is honest nothing false is accepted,
however quick the others are; a majority of the jury would not do: liars need not compute, and claim first.

A claim about a sum is about a set of offers and the decision on them (`sum_key`): a peer that was deceived about the
decision is not taken for a liar.

Ring: pure.
"""

from __future__ import annotations

import hashlib
import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from mycel.protocols.rounds import NOTHING, Claim, Offer
from mycel.swarm.rounds.terms import GroupTerms

# What a rule is called that also goes by what contributions have been worth so far.
STANDING = "standing+"
_MOST_STANDING = 1 << 20
_COORDINATE_RULES = frozenset({"mean", "median", "trimmed-mean", "meamed"})
Kind = Literal["gram", "sum"]
Value = tuple[bytes, int]
"""SHA-256 and bytes."""


def needs_gram(rule: str) -> bool:
    """Whether the rule decides from distances; those that look at coordinates alone need no decision."""
    return rule not in _COORDINATE_RULES


def decision_digest(decision: bytes) -> bytes:
    """As it stands in an outcome; no decision is NOTHING."""
    return hashlib.sha256(decision).digest() if decision else NOTHING


def standing_after(decision: bytes, n_rows: int) -> tuple[int, ...]:
    """The standing of the rows' authors, with which a decision begins; nothing of one that is empty or too short."""
    if len(decision) < 4 * n_rows:
        return ()
    scores = struct.unpack_from(f"<{n_rows}i", decision)
    return tuple(max(-_MOST_STANDING, min(score, _MOST_STANDING)) for score in scores)


def sum_key(plan: bytes, decision: bytes) -> bytes:
    """Names the sum over the offers of `plan` under `decision`."""
    return hashlib.sha256(b"mycel/round-sum/1\0" + plan + decision_digest(decision)).digest()


def gram_bytes(n_rows: int) -> int:
    """The size of the upper triangle of a Gram matrix in float32."""
    return 4 * n_rows * (n_rows + 1) // 2


@dataclass(slots=True)
class Task:
    """One thing to compute: `kind` of one shard under `key`. `ring` are the members in the order of their turns."""

    kind: Kind
    key: bytes
    shard: int
    ring: tuple[str, ...]
    opened_at: float
    size: int | None = None  # a gram's; a claim of another size is false
    claims: dict[str, Claim] = field(default_factory=dict)
    first_claim_at: float | None = None
    own: Value | None = None
    own_data: bytes = b""
    asked: bool = False
    accepted: Value | None = None

    def add(self, claim: Claim, now: float) -> None:
        self.claims.setdefault(claim.peer, claim)
        if self.first_claim_at is None:
            self.first_claim_at = now

    def disputed(self) -> bool:
        """Whether two claims differ, or one cannot be true."""
        values = {value_of(claim) for claim in self.claims.values()}
        return len(values) > 1 or (self.size is not None and any(size != self.size for _, size in values))

    def overdue_at(self, terms: GroupTerms) -> float:
        """From then on the next in the ring step in: a while after somebody has shown that it can be done by now."""
        if self.first_claim_at is None:
            return self.opened_at + terms.patience_s / 2
        return self.first_claim_at + terms.attempt_s

    def own_at(self, terms: GroupTerms) -> float:
        """From then on I compute it myself, whoever's turn it is: claims may be lost between others and me."""
        return self.overdue_at(terms) + 2 * terms.attempt_s

    def window(self, present: frozenset[str], terms: GroupTerms, now: float) -> tuple[str, ...]:
        """Whose turn it is by now: the first that are there, and more of them as time passes."""
        late_s = now - self.overdue_at(terms)
        turns = 1 if late_s < 0 else 2 + int(late_s // terms.attempt_s)
        return tuple(peer for peer in self.ring if peer in present)[: terms.aggregators * turns]

    def judge(self, present: frozenset[str], terms: GroupTerms, now: float) -> None:
        """Accept a value, or take back what was accepted."""
        if self.own is not None:
            self.accepted = self.own
            return
        if self.disputed():
            self.accepted = None
            return
        window = self.window(present, terms, now)
        jury = [self.claims[peer] for peer in window if peer in self.claims]
        if self.accepted is None and window and len(jury) >= min(terms.aggregators, len(window)):
            self.accepted = value_of(jury[0])

    def data(self) -> bytes:
        """The accepted Gram matrix."""
        if self.own is not None:
            return self.own_data
        return next(claim.data for claim in self.claims.values() if value_of(claim) == self.accepted)

    def liars(self) -> list[Claim]:
        """Claims that my own computation refutes."""
        if self.own is None:
            return []
        return [claim for claim in self.claims.values() if value_of(claim) != self.own]


def value_of(claim: Claim) -> Value:
    return claim.value, claim.size


class Reduction:
    """All that is computed from one set of offers: Grams, the decision, sums."""

    def __init__(
        self, plan: bytes, offers: tuple[Offer, ...], rings: Sequence[tuple[str, ...]], rule: str, now: float
    ) -> None:
        self.plan = plan
        self.offers = offers
        self.rows = tuple(offer for offer in offers if offer.bodies)
        self.decision: bytes | None = None
        self.decided_from: tuple[bytes, ...] | None = None
        """The SHA-256 of the Grams that the decision follows from; `asked_from` while the rule is `deciding`."""
        self.asked_from: tuple[bytes, ...] | None = None
        self.deciding = False
        self.done_at: float | None = None
        self._rings = rings
        size = gram_bytes(len(self.rows))
        self.grams: list[Task] = []
        self.sums: list[Task] = []
        if self.rows and needs_gram(rule):
            self.grams = [Task("gram", plan, shard, ring, now, size) for shard, ring in enumerate(rings)]
        else:
            self.decide(b"", now)

    @property
    def tasks(self) -> list[Task]:
        return self.grams + self.sums

    def decide(self, decision: bytes, now: float) -> None:
        """The rule has decided; the sums follow from it. A decision that changes begins them anew."""
        if self.decision == decision:
            return
        self.decision = decision
        self.done_at = None
        if self.rows:
            key = sum_key(self.plan, decision)
            self.sums = [Task("sum", key, shard, ring, now) for shard, ring in enumerate(self._rings)]

    def agreed_grams(self) -> tuple[bytes, ...] | None:
        """The digests of the accepted Grams of all shards, if all are."""
        return _all_accepted(self.grams)

    def results(self) -> tuple[Value, ...] | None:
        """The accepted sums of all shards; none without rows. None while something is open."""
        if self.decision is None or any(task.accepted is None for task in self.tasks):
            return None
        if self.grams and self.agreed_grams() != self.decided_from:
            return None
        return tuple(task.accepted for task in self.sums if task.accepted is not None)

    def refutes(self, decision: bytes, results: Sequence[bytes], sizes: Sequence[int]) -> bool:
        """Whether I know better, by what I computed myself: other results, or Grams that lead to another decision."""
        if self.decision is None or len(results) != len(self.sums) or len(sizes) != len(self.sums):
            return False
        if decision_digest(self.decision) != decision:
            return any(task.liars() for task in self.grams) and self.decided_from == self.agreed_grams()
        return any(
            task.own is not None and task.own != value
            for task, value in zip(self.sums, zip(results, sizes, strict=True), strict=True)
        )

    def wake_at(self, terms: GroupTerms, now: float) -> float:
        """When somebody's turn may be over."""
        soonest = math.inf
        for task in self.tasks:
            if task.accepted is None:
                due = task.overdue_at(terms)
                soonest = min(soonest, due if due > now else now + terms.attempt_s)
        return soonest


def _all_accepted(tasks: Sequence[Task]) -> tuple[bytes, ...] | None:
    values = tuple(task.accepted[0] for task in tasks if task.accepted is not None)
    return values if len(values) == len(tasks) else None
