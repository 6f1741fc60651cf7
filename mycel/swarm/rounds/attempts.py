"""The attempts of a round to agree on an outcome: what I plan and propose in my turn, what I accept, how I vote.

I prevote only for an outcome that I could have proposed myself: its set of offers leaves out none that was complete for
long, its results are those that I accepted, its members follow from them, and whom it convicts I have named. voting.py
holds the rules that make sure that at most one outcome is certified.

Ring: pure.
"""

from __future__ import annotations

import math

from mycel.protocols.rounds import (
    MAX_GROUP,
    NOTHING,
    Certificate,
    Outcome,
    Plan,
    Proposal,
    Request,
    Vote,
    plan_digest,
    signed_part,
)
from mycel.security.signatures import verify
from mycel.swarm.rounds.actions import Remember
from mycel.swarm.rounds.claims import Reduction, decision_digest, standing_after
from mycel.swarm.rounds.membership import next_members
from mycel.swarm.rounds.round import Round
from mycel.swarm.rounds.statements import UNSIGNED, Signed
from mycel.swarm.rounds.terms import GroupTerms
from mycel.swarm.rounds.voting import WAITING, Kind, Step, Voting

# Of an attempt's time, for a proposer who is not there: its stream may only just have broken.
_ABSENT_SHARE = 0.1


class Attempts:
    """Of one round. `round` collects and reduces; `voting` counts."""

    def __init__(self, round_in_hand: Round, terms: GroupTerms) -> None:
        self.round, self.terms, self.voice = round_in_hand, terms, round_in_hand.voice
        self.voting = Voting(self.round.members, terms)
        self.entered_at = math.inf
        self.closed_because = ""
        self.reason = ""
        """Why I did not accept the last proposal that I refused."""
        self._refused: set[bytes] = set()
        self._accepted: set[bytes] = set()
        self._relayed = WAITING
        self._shown: set[int] = set()
        self._checked: set[Request] = set()

    # ---- what comes in

    def restore(self, said: list[Signed], now: float) -> None:
        """Go on from what I said in this round before a restart."""
        for plan in said:
            if isinstance(plan, Plan):
                self.take_plan(self.round.me, plan, now)
        votes = [vote for vote in said if isinstance(vote, Vote)]
        self.voting.restore(votes, [proposal for proposal in said if isinstance(proposal, Proposal)])
        if self.voting.attempt != WAITING:
            self.entered_at = now
            self._take_sets(now)

    def take_plan(self, sender: str, plan: Plan, now: float) -> None:
        self.round.take_plan(plan, now)
        if plan.attempt <= max(self.voting.attempt, 0):
            self.round.take_set(sender, plan.offers, now)

    def take_proposal(self, sender: str, proposal: Proposal, now: float) -> None:
        self.voting.propose(proposal)
        if proposal.attempt <= max(self.voting.attempt, 0):
            self.round.take_set(sender, proposal.outcome.offers, now)

    def _take_sets(self, now: float) -> None:
        """What is to be reduced for this attempt. Not before: a liar has plans for all its turns at once."""
        attempt = self.voting.attempt
        plan, proposal = self.round.plans.get(attempt), self.voting.proposals.get(attempt)
        if plan is not None:
            self.round.take_set(plan.peer, plan.offers, now)
        if proposal is not None:
            self.round.take_set(proposal.peer, proposal.outcome.offers, now)

    def take_vote(self, vote: Vote) -> None:
        self.voting.add(vote)

    # ---- what follows

    def progress(self, now: float) -> None:
        """Do all that can be done now."""
        if not self.round.is_member:
            return
        if self.voting.attempt == WAITING and (self.round.closed(now) or self.voting.later_attempt() is not None):
            self.round.ask_for_heard_of()
            self._enter(0, now)
        while self.voting.attempt != WAITING and self.voting.decided is None and self._turn(now):
            pass

    def _turn(self, now: float) -> bool:
        """One change, or False if nothing can change before something comes in or time passes."""
        later = self.voting.later_attempt()
        if later is not None:
            self._enter(later, now)
            return True
        attempt = self.voting.attempt
        if self.round.proposers[attempt % len(self.round.proposers)] == self.round.me:
            self._propose(attempt, now)
        if self.voting.step == Step.PROPOSE:
            verdict, refuted = self._judge(now)
            self._show(attempt)
            out_of_time = now >= self.deadline(now)
            value = self.voting.prevote(verdict, refuted=refuted, out_of_time=out_of_time)
            if value is not None:
                self._cast("prevote", value)
                return True
        value = self.voting.precommit(self._refuted(), now)
        if value is not None:
            self._cast("precommit", value)
            return True
        if self.voting.attempt_over(now):
            self._enter(attempt + 1, now)
            return True
        return False

    def _enter(self, attempt: int, now: float) -> None:
        """Begin an attempt. Who is locked tells the others why, if a whole attempt has passed since."""
        self.voting.enter(attempt)
        self.entered_at = now
        self._refused.clear()  # what was unfair to those who came in late may be fair by now
        self._take_sets(now)
        valid = self.voting.valid
        if valid is not None and self._relayed < valid[0] < attempt:
            self._relayed = valid[0]
            for message in self.proof():
                self.voice.say(message)

    def _show(self, attempt: int) -> None:
        """Say on a proposal that I refuse, or instead of which others vote for another: two of one turn prove a lie."""
        proposal = self.voting.proposals.get(attempt)
        if proposal is None or proposal.peer == self.round.me or attempt in self._shown:
            return
        value = self.voting.digests[attempt]
        if value in self._refused or self.voting.prevoted(attempt) - {value, NOTHING}:
            self._shown.add(attempt)
            self.voice.say(proposal)

    def proof(self) -> list[Proposal | Vote]:
        """The proposal that I hold to, and the prevotes that a quorum gave it."""
        if self.voting.valid is None:
            return []
        attempt, proposal = self.voting.valid
        return [proposal, *self.voting.proof(attempt, self.voting.digests[proposal.attempt])]

    def _cast(self, kind: Kind, value: bytes) -> None:
        """Vote, once. What I am locked on is written down before: a vote for what nobody knows would bind for ever."""
        place = (self.round.run, self.round.scope, self.round.number, self.voting.attempt)
        self.voting.step = Step.PREVOTE if kind == "prevote" else Step.PRECOMMIT
        proposal = self.voting.proposals.get(self.voting.attempt)
        if kind == "precommit" and value != NOTHING and proposal is not None and proposal.peer != self.round.me:
            self.voice.do(Remember(proposal))
        self.voting.add(self.voice.utter(Vote(*place, kind, self.round.me, value, UNSIGNED)))

    def deadline(self, now: float) -> float:
        """Until when to wait for a proposal of this attempt that I accept.

        The proposer needs an attempt's time to plan, all need up to `patience_s` to reduce, and then an attempt's time
        to propose. A plan of too few offers has to wait until my own patience is over. One of offers that nobody gives
        is not waited for so long, and who is not there and has said nothing hardly at all.
        """
        del now
        attempt, round_ = self.voting.attempt, self.round
        wait_s = self.voting.attempt_s(attempt)
        until = self.entered_at + wait_s
        reduction = self._reduction_of(attempt)
        if attempt in round_.plans or attempt in self.voting.proposals:
            seen_at = max(self.entered_at, round_.plan_at.get(attempt, self.entered_at))
            until = seen_at + (2 * wait_s if reduction is None else self.terms.patience_s)
        elif round_.proposers[attempt % len(round_.proposers)] not in round_.present:
            until = self.entered_at + _ABSENT_SHARE * wait_s
        if reduction is not None and reduction.done_at is not None:
            until = max(self.entered_at, reduction.done_at) + wait_s
            if len(reduction.offers) < round_.need and not round_.gathering:
                until = max(until, round_.started_at + self.terms.patience_s + wait_s)
        return until

    def wake_at(self, now: float) -> float:
        if not self.round.is_member or self.voting.decided is not None:
            return math.inf
        if self.voting.attempt == WAITING:
            return self.round.close_at()
        soonest = self.voting.wake_at
        if self.voting.step == Step.PROPOSE:
            soonest = min(soonest, self.deadline(now))
            patience_over = self.round.started_at + self.terms.patience_s
            if now < patience_over and not self.round.gathering:
                soonest = min(soonest, patience_over)
        return soonest

    def certificate(self) -> Certificate | None:
        """The proof that the round is decided, if a quorum has precommitted an outcome that I know."""
        if self.voting.decided is None:
            return None
        attempt, value = self.voting.decided
        proposal = self.voting.find(value)
        if proposal is None:
            return None
        votes = sorted(self.voting.precommits(attempt, value), key=lambda vote: vote.peer)
        signers = tuple(vote.peer for vote in votes)
        return Certificate(proposal.outcome, attempt, signers, tuple(vote.signature for vote in votes))

    # ---- proposing

    def _propose(self, attempt: int, now: float) -> None:
        """My turn: hold to what a quorum prevoted, or plan a set, have it reduced, and propose what comes of it."""
        if attempt in self.voting.proposals:
            return
        if self.voting.valid is not None:
            earlier, held = self.voting.valid
            proposal = Proposal(attempt, self.round.me, held.outcome, earlier, held.requests, UNSIGNED)
            self.voting.propose(self.voice.utter(proposal))
            for vote in self.voting.proof(earlier, self.voting.digests[attempt]):
                self.voice.say(vote)
            return
        if attempt not in self.round.plans:
            place = (self.round.run, self.round.scope, self.round.number, attempt)
            plan = self.voice.utter(Plan(*place, self.round.me, self._choose(attempt, now), UNSIGNED))
            self.take_plan(self.round.me, plan, now)
        reduction = self._reduction_of(attempt)
        if reduction is None or reduction.results() is None:
            return
        requests = self._wishes()
        outcome = self._outcome(reduction, requests, self._convicts())
        if outcome is not None:
            proposal = Proposal(attempt, self.round.me, outcome, WAITING, requests, UNSIGNED)
            self.voting.propose(self.voice.utter(proposal))

    def _choose(self, attempt: int, now: float) -> tuple[bytes, ...]:
        """A set that is being reduced already, if it is fair and does not stand still; otherwise all that is complete.

        In every other attempt nothing is planned that an aggregator misses: its author may give it to some alone, or
        the aggregator may lie. When everybody has had a turn others do not find fair what I do: what is complete by now
        nobody can complain about.
        """
        if self.round.gathering:
            return ()
        n_turns = len(self.round.members)
        for earlier in sorted(self.round.plans, reverse=True) if attempt < n_turns else ():
            offers = self.round.plans[earlier].offers
            reduction = self.round.reductions.get(plan_digest(offers))
            if reduction is None or self._fair(reduction, now) is False:
                continue
            if reduction.results() is not None or now < self.round.plan_at[earlier] + self.terms.patience_s:
                return offers
        complete = self.round.countable()
        if attempt % 2:
            complete = [digest for digest in complete if self.round.is_firm(digest)]
        return tuple(sorted(complete, key=lambda digest: self.round.offers[digest].peer))

    def _wishes(self) -> tuple[Request, ...]:
        """Who asks to join or leave, and is here."""
        wishes = [request for request in self.round.requests.values() if self.round.grantable(request)]
        # Of too many that want in some wait: nobody takes a proposal with more requests than a group has members.
        wishes.sort(key=lambda request: (request.wants != "leave", request.peer))
        return tuple(sorted(wishes[:MAX_GROUP], key=lambda request: request.peer))

    def _convicts(self) -> tuple[str, ...]:
        """Members whom I have seen lie."""
        return tuple(peer for peer in self.round.members if peer in self.voice.named)

    def _outcome(
        self, reduction: Reduction, requests: tuple[Request, ...], convicted: tuple[str, ...]
    ) -> Outcome | None:
        """What follows from a set that is reduced."""
        results = reduction.results()
        if results is None or reduction.decision is None:
            return None
        contributors = tuple(offer.peer for offer in reduction.offers)
        names = tuple(self.round.sets[reduction.plan])
        authors = [offer.peer for offer in reduction.rows]
        scores = dict(zip(authors, standing_after(reduction.decision, len(authors)), strict=False))
        following = next_members(self.round.outcome, contributors, requests, convicted, self.terms, scores)
        place = (self.round.run, self.round.scope, self.round.number, self.round.last)
        values, sizes = tuple(value for value, _ in results), tuple(size for _, size in results)
        decided = decision_digest(reduction.decision)
        return Outcome(
            *place,
            names,
            contributors,
            values,
            sizes,
            decided,
            following.members,
            following.missed,
            following.convicted,
            following.standing,
            following.begun,
        )

    def _reduction_of(self, attempt: int) -> Reduction | None:
        """What the proposer of `attempt` wants reduced."""
        proposal, plan = self.voting.proposals.get(attempt), self.round.plans.get(attempt)
        if proposal is not None:
            return self.round.reductions.get(plan_digest(proposal.outcome.offers))
        return self.round.reductions.get(plan_digest(plan.offers)) if plan is not None else None

    # ---- judging

    def _judge(self, now: float) -> tuple[bool | None, bool]:
        """Whether I accept the proposal of this attempt (None: not yet), and whether I know that it is false."""
        proposal = self.voting.proposals.get(self.voting.attempt)
        if proposal is None:
            return None, False
        value = self.voting.digests[proposal.attempt]
        if value not in self._accepted and value not in self._refused:
            verdict, why = self._verdict(proposal, now)
            if verdict is not None:
                (self._accepted if verdict else self._refused).add(value)
            self.reason = why
        verdict = True if value in self._accepted else False if value in self._refused else None
        return verdict, self._is_refuted(proposal)

    def _verdict(self, proposal: Proposal, now: float) -> tuple[bool | None, str]:
        outcome = proposal.outcome
        reduction = self.round.reductions.get(plan_digest(outcome.offers))
        if reduction is None:
            known = all(digest in self.round.offers for digest in outcome.offers)
            return (False, "its offers cannot stand together") if known else (None, "some of its offers are unknown")
        fair = self._fair(reduction, now)
        if fair is not True:
            return fair, "it leaves out contributions that were there in time"
        if reduction.results() is None:
            return None, "its results are not accepted yet"
        convicted = tuple(peer for peer in outcome.convicted if peer not in self.round.outcome.convicted)
        if any(peer not in self.voice.named for peer in convicted):
            return None, "it convicts a peer that I have seen no lie of"
        if not all(self._is_genuine(request) for request in proposal.requests):
            return False, "it carries a request that was never made"
        if outcome != self._outcome(reduction, proposal.requests, convicted):
            return False, "it is not what follows from its offers"
        if self.round.gathering and outcome.members == self.round.members:
            return False, "it changes nothing"
        return True, "accepted"

    def _fair(self, reduction: Reduction, now: float) -> bool | None:
        """Whether the set could be an honest proposer's; None while it is too early for so few."""
        if self.round.gathering:
            return not reduction.offers
        if len(reduction.offers) < self.round.need:
            if sum(map(self.round.is_firm, self.round.countable())) >= self.round.need:
                return False
            if not self.round.is_patience_over(now):
                return None
        known_since = self.round.seen_at[reduction.plan] - self.voting.attempt_s(max(self.voting.attempt, 0))
        planned = set(self.round.sets[reduction.plan])
        return not any(
            self.round.holdings.since[digest] < known_since and digest not in planned and self.round.is_firm(digest)
            for digest in self.round.countable()
        )

    def _is_genuine(self, request: Request) -> bool:
        """Signed by whoever wishes it, for this very round."""
        if (request.run, request.scope, request.round) != (self.round.run, self.round.scope, self.round.number):
            return False
        if request not in self._checked:
            if not verify(request.peer, request.signature, signed_part(request)):
                return False
            self._checked.add(request)
        return True

    def _is_refuted(self, proposal: Proposal) -> bool:
        outcome = proposal.outcome
        reduction = self.round.reductions.get(plan_digest(outcome.offers))
        return reduction is not None and reduction.refutes(outcome.decision, outcome.results, outcome.sizes)

    def _refuted(self) -> frozenset[bytes]:
        """The value of this attempt, if I know that it is false."""
        proposal = self.voting.proposals.get(self.voting.attempt)
        if proposal is None or not self._is_refuted(proposal):
            return frozenset()
        return frozenset({self.voting.digests[proposal.attempt]})
