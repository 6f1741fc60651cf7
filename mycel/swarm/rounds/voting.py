"""How members agree on one outcome of a round: Tendermint's rules with locks, for one peer.

    propose -> prevote -> precommit, attempt after attempt, until a quorum of precommits names one outcome

A peer that precommits an outcome is locked on it, and prevotes another only if a quorum prevoted that in a later
attempt. Any two quorums share an honest member, so at most one outcome gets a quorum of precommits, whatever the
network does. Source: Buchman, Kwon, Milosevic, The latest gossip on BFT consensus, arXiv 1807.04938, algorithm 1.

This file counts and decides; who signs, says and judges an outcome stands in machine.py.

Ring: pure.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from enum import IntEnum
from typing import Literal

from mycel.protocols.rounds import NOTHING, Proposal, Vote, outcome_digest
from mycel.swarm.rounds.terms import GroupTerms

Kind = Literal["prevote", "precommit"]
Cast = tuple[Kind, bytes]
WAITING = -1
_QUICK_ATTEMPTS = 8


class Step(IntEnum):
    PROPOSE = 0
    PREVOTE = 1
    PRECOMMIT = 2


class Voting:
    """Votes and proposals of one round, and the rules of my own votes."""

    def __init__(self, members: Sequence[str], terms: GroupTerms) -> None:
        self._terms = terms
        self.quorum = terms.quorum(len(members))
        self.n_faulty = len(members) - self.quorum if terms.open else 0
        self.attempt = WAITING
        self.step = Step.PROPOSE
        self.locked: tuple[int, bytes] = (WAITING, NOTHING)
        self.valid: tuple[int, Proposal] | None = None
        self.proposals: dict[int, Proposal] = {}
        self.digests: dict[int, bytes] = {}
        self.votes: defaultdict[tuple[int, str], dict[str, Vote]] = defaultdict(dict)
        self.decided: tuple[int, bytes] | None = None
        """The first vote of each peer, by attempt and kind."""
        self._for: defaultdict[tuple[int, str], defaultdict[bytes, dict[str, Vote]]] = defaultdict(_voters)
        self._quorums: dict[tuple[int, str], bytes] = {}
        self._newest: dict[str, int] = {}
        self._prevote_until = math.inf
        self._precommit_until = math.inf

    def attempt_s(self, attempt: int) -> float:
        """Every wait of an attempt; later ones wait longer, until the network keeps up."""
        return self._terms.attempt_s * (1 + attempt / 2)

    # ---- what comes in: each vote and proposal once, its signature checked -----------------------------------------

    def add(self, vote: Vote) -> None:
        """Count a vote. Who votes for two values counts for both, or it could show each half of us another quorum.

        The second counts only for what was proposed, so that what is kept of a peer is bounded.
        """
        place = (vote.attempt, vote.kind)
        first = self.votes[place].setdefault(vote.peer, vote)
        if first is not vote and vote.value != NOTHING and vote.value not in self.digests.values():
            return
        voters = self._for[place][vote.value]
        voters.setdefault(vote.peer, vote)
        self._newest[vote.peer] = max(self._newest.get(vote.peer, WAITING), vote.attempt)
        if len(voters) >= self.quorum:
            self._quorums[place] = vote.value
            if vote.kind == "precommit" and vote.value != NOTHING:
                self.decided = (vote.attempt, vote.value)

    def propose(self, proposal: Proposal) -> None:
        if proposal.attempt not in self.proposals:
            self.proposals[proposal.attempt] = proposal
            self.digests[proposal.attempt] = outcome_digest(proposal.outcome)

    def restore(self, votes: Sequence[Vote], proposals: Sequence[Proposal]) -> None:
        """What I said in this round before I was restarted: I stand by it."""
        for proposal in proposals:
            self.propose(proposal)
        for vote in sorted(votes, key=lambda vote: (vote.attempt, vote.kind == "precommit")):
            self.add(vote)
            if vote.attempt > self.attempt:
                self.enter(vote.attempt)
            self.step = Step.PREVOTE if vote.kind == "prevote" else Step.PRECOMMIT
            if vote.kind == "precommit" and vote.value != NOTHING:
                self.locked = (vote.attempt, vote.value)
                locked = self.find(vote.value)
                self.valid = (vote.attempt, locked) if locked is not None else self.valid

    # ---- questions ---------------------------------------------------------------------------------------------------

    def find(self, value: bytes) -> Proposal | None:
        """A proposal of the outcome with this digest."""
        return next((self.proposals[attempt] for attempt, digest in self.digests.items() if digest == value), None)

    def polka(self, attempt: int) -> bytes | None:
        """What a quorum prevoted in `attempt`, if it agreed; NOTHING counts as a value."""
        return self._quorums.get((attempt, "prevote"))

    def prevoted(self, attempt: int) -> set[bytes]:
        """All that anybody prevoted in `attempt`."""
        return {value for value, voters in self._for.get((attempt, "prevote"), {}).items() if voters}

    def later_attempt(self) -> int | None:
        """An attempt after mine that at least one honest member has come to."""
        newest = sorted(self._newest.values(), reverse=True)
        if len(newest) <= self.n_faulty:
            return None
        reached = newest[self.n_faulty]
        return reached if reached > self.attempt else None

    def proof(self, attempt: int, value: bytes) -> list[Vote]:
        """The prevotes for `value` in `attempt`."""
        return list(self._for[attempt, "prevote"][value].values())

    def precommits(self, attempt: int, value: bytes) -> list[Vote]:
        """The precommits for `value` in `attempt`."""
        return list(self._for[attempt, "precommit"][value].values())

    @property
    def wake_at(self) -> float:
        prevotes_over = self._prevote_until if self.step == Step.PREVOTE else math.inf
        return min(prevotes_over, self._precommit_until)

    # ---- rules -------------------------------------------------------------------------------------------------------

    def enter(self, attempt: int) -> None:
        self.attempt = attempt
        self.step = Step.PROPOSE
        self._prevote_until = self._precommit_until = math.inf

    def prevote(self, verdict: bool | None, *, refuted: bool, out_of_time: bool) -> bytes | None:
        """What to prevote now, if anything. `verdict`: whether I accept the proposal of this attempt, None not yet.

        A quorum that prevoted it before stands in for my own verdict, unless I computed that it is false.
        """
        proposal = self.proposals.get(self.attempt)
        if proposal is not None:
            value, earlier = self.digests[self.attempt], proposal.valid_attempt
            free = self.locked[0] == WAITING or self.locked[1] == value
            if earlier == WAITING:
                if verdict is False or not free:
                    return NOTHING
                if verdict:
                    return value
            elif earlier >= self.attempt:
                return NOTHING
            elif self.polka(earlier) == value:
                return value if (free or self.locked[0] <= earlier) and not refuted else NOTHING
        return NOTHING if out_of_time else None

    def precommit(self, refuted: frozenset[bytes], now: float) -> bytes | None:
        """What to precommit now, if anything, locking on it; also when only the time is up."""
        value = self.polka(self.attempt)
        proposal = self.proposals.get(self.attempt)
        agreed = proposal is not None and value == self.digests[self.attempt] and value not in refuted
        if proposal is not None and value is not None and agreed and self.step >= Step.PREVOTE:
            if self.valid is None or self.valid[0] < self.attempt:
                self.valid = (self.attempt, proposal)
            if self.step == Step.PREVOTE:
                self.locked = (self.attempt, value)
                return value
        if self.step != Step.PREVOTE:
            return None
        if value == NOTHING or now >= self._prevote_until:
            return NOTHING
        if self._prevote_until == math.inf and len(self.votes[self.attempt, "prevote"]) >= self.quorum:
            self._prevote_until = now + self.attempt_s(self.attempt)
        return None

    def attempt_over(self, now: float) -> bool:
        """Whether this attempt has failed: a quorum precommits nothing, or a quorum has spoken and time is up.

        After a few attempts that failed at once time has to pass: what they lack comes with it.
        """
        if self.attempt == WAITING:
            return False
        is_void = self._quorums.get((self.attempt, "precommit")) == NOTHING and self.attempt < _QUICK_ATTEMPTS
        if is_void or now >= self._precommit_until:
            return True
        if self._precommit_until == math.inf and len(self.votes[self.attempt, "precommit"]) >= self.quorum:
            self._precommit_until = now + self.attempt_s(self.attempt)
        return False


def _voters() -> defaultdict[bytes, dict[str, Vote]]:
    return defaultdict(dict)
