"""The voting rules alone, on a network that loses and reorders, with a peer that votes for everything: one decision.

Here every proposer proposes something else unless the rules bind it, and no message is said again: many attempts fail
half-way, which is what locks are for. (In a real round most attempts propose the same.)
"""

from __future__ import annotations

import random

import pytest

from mycel.protocols.rounds import NOTHING, Outcome, Proposal, Vote, outcome_digest
from mycel.swarm.rounds.terms import GroupTerms
from mycel.swarm.rounds.voting import WAITING, Step, Voting

RUN = bytes(32)
TERMS = GroupTerms(1 << 14, attempt_s=1.0)


def value_of(attempt: int, proposer: str) -> Outcome:
    name = f"{attempt} {proposer}".encode().ljust(32)
    return Outcome(RUN, "run", 1, NOTHING, (), (), (), (), name, ("a",), (0,))


class Parliament:
    """Four members, the last of which lies. `pending` are messages on their way: (to, message)."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        self.names = ("a", "b", "c", "d")
        self.honest = {name: Voting(self.names, TERMS) for name in self.names[:3]}
        self.pending: list[tuple[str, Proposal | Vote]] = []
        self.known: dict[bytes, Proposal] = {}
        self.now = 0.0
        self.loss = self.rng.choice((0.0, 0.2, 0.4))
        for voting in self.honest.values():
            voting.enter(0)

    def say(self, message: Proposal | Vote) -> None:
        self.pending += [(name, message) for name in self.honest if self.rng.random() >= self.loss]

    def propose(self, name: str, voting: Voting) -> None:
        attempt = voting.attempt
        if self.names[attempt % 4] != name or attempt in voting.proposals:
            return
        earlier, outcome = WAITING, value_of(attempt, name)
        if voting.valid is not None:
            earlier, outcome = voting.valid[0], voting.valid[1].outcome
            for vote in voting.proof(earlier, outcome_digest(outcome)):
                self.say(vote)
        proposal = Proposal(attempt, name, outcome, earlier, (), bytes(64))
        voting.propose(proposal)
        self.known[outcome_digest(outcome)] = proposal
        self.say(proposal)

    def cast(self, name: str, voting: Voting, kind: str, value: bytes) -> None:
        voting.step = Step.PREVOTE if kind == "prevote" else Step.PRECOMMIT
        vote = Vote(RUN, "run", 1, voting.attempt, kind, name, value, bytes(64))
        voting.add(vote)
        self.say(vote)

    def turn(self, name: str) -> None:
        voting = self.honest[name]
        self.propose(name, voting)
        if voting.step == Step.PROPOSE:
            value = voting.prevote(True, refuted=False, out_of_time=self.rng.random() < 0.05)
            if value is not None:
                self.cast(name, voting, "prevote", value)
        value = voting.precommit(frozenset(), self.now)
        if value is not None:
            self.cast(name, voting, "precommit", value)
        later = voting.later_attempt()
        if later is not None:
            voting.enter(later)
        elif voting.attempt_over(self.now) or self.rng.random() < 0.01:
            voting.enter(voting.attempt + 1)

    def lie(self) -> None:
        """Propose two things, and vote for whatever there is, each to some."""
        attempt = self.rng.choice([voting.attempt for voting in self.honest.values()])
        if self.names[attempt % 4] == "d":
            outcome = value_of(attempt, self.rng.choice("de"))
            proposal = Proposal(attempt, "d", outcome, self.rng.choice((WAITING, attempt - 1)), (), bytes(64))
            self.known[outcome_digest(outcome)] = proposal
            self.pending.append((self.rng.choice(list(self.honest)), proposal))
        value = self.rng.choice([NOTHING, *self.known])
        kind = self.rng.choice(("prevote", "precommit"))
        vote = Vote(RUN, "run", 1, attempt, kind, "d", value, bytes(64))
        self.pending.append((self.rng.choice(list(self.honest)), vote))

    def run(self, steps: int) -> set[bytes]:
        for _ in range(steps):
            self.now += self.rng.uniform(0.0, 0.2)
            for _ in range(2):
                if self.pending:
                    place = self.rng.randrange(len(self.pending))
                    self.pending[place], self.pending[-1] = self.pending[-1], self.pending[place]
                    target, message = self.pending.pop()
                    if isinstance(message, Proposal):
                        self.honest[target].propose(message)
                    else:
                        self.honest[target].add(message)
            if self.rng.random() < 0.3:
                self.lie()
            self.turn(self.rng.choice(list(self.honest)))
        return {voting.decided[1] for voting in self.honest.values() if voting.decided is not None}


def test_whatever_is_lost_and_whoever_votes_for_everything_at_most_one_outcome_is_decided():
    decided = [Parliament(seed).run(250) for seed in range(300)]
    assert max(map(len, decided)) == 1
    assert sum(map(len, decided)) > 100


def test_without_locks_there_would_be_two(monkeypatch: pytest.MonkeyPatch):
    """The test above can fail: this is what the rule is for."""
    prevote = Voting.prevote

    def forgetful(self: Voting, *args, **kwargs):
        self.locked = (WAITING, NOTHING)
        self.valid = None
        return prevote(self, *args, **kwargs)

    monkeypatch.setattr(Voting, "prevote", forgetful)
    assert any(len(Parliament(seed).run(250)) > 1 for seed in range(300))
