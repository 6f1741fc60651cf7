"""A group's rounds, decided without I/O: what its members say goes in, what is to be done comes out.

    machine = RoundMachine(signer, terms, genesis(...), state)
    machine.start(now) -> [Say(Joining)]      machine.receive(peer, offer, now) -> [Collect(...)]
    ... -> [Commit(certificate, ...)]         machine.advance(certificate, state, now)

One machine lives through all rounds. It checks signatures, places and turns, and hands on what is of the round in hand
(round.py, attempts.py); what is of the next is kept, what is of the last ones is looked at for lies alone.

Ring: pure.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Literal

from mycel.protocols.errors import LocalProtocolError, RemoteProtocolError, VerificationError
from mycel.protocols.rounds import (
    Certificate,
    Claim,
    Held,
    Joining,
    Offer,
    Outcome,
    Plan,
    Proposal,
    Request,
    RoundMessage,
    Vote,
    offer_digest,
    outcome_digest,
)
from mycel.security.signatures import Signer
from mycel.swarm.rounds.actions import Action, Commit, FallenBehind, Repeat
from mycel.swarm.rounds.attempts import Attempts
from mycel.swarm.rounds.certificates import check_certificate
from mycel.swarm.rounds.claims import gram_bytes
from mycel.swarm.rounds.closing import Grace
from mycel.swarm.rounds.forms import Early, check_claim, check_offer, check_turn
from mycel.swarm.rounds.round import Round
from mycel.swarm.rounds.statements import (
    KEPT_ROUNDS,
    UNSIGNED,
    Contradicted,
    Fresh,
    Ledger,
    Signed,
    make_offer,
    place_of,
    round_of,
    slot_of,
)
from mycel.swarm.rounds.terms import GroupTerms
from mycel.swarm.rounds.voice import Voice
from mycel.swarm.rounds.voting import WAITING

__all__ = ["RoundMachine", "make_offer"]

Wants = Literal["member", "observer", "leave"]
# So many of the members, in the order in which they propose, hand the certificate round; the others have the votes.
_CRIERS = 4
_MOST_JOININGS = 1024
_MOST_REPEATS = 3


class RoundMachine:
    """One peer's part in a group. Every method says what is to be done, in that order."""

    def __init__(
        self,
        signer: Signer,
        terms: GroupTerms,
        outcome: Outcome,
        state: bytes,
        votes: Sequence[Vote | Offer | Plan | Proposal] = (),
        *,
        addresses: Sequence[str] = (),
    ) -> None:
        """`outcome` is the last certified one; `votes` what I had said in the round after it before a restart."""
        self.terms = terms
        self._addresses = tuple(addresses)
        self._ledger = Ledger(most_claims=8 * terms.n_shards + 8)
        self._voice = Voice(signer, self._ledger)
        self._grace = Grace(terms.longest_grace_s)
        self._wants: Wants = "member"
        self._peers: frozenset[str] = frozenset()
        self._joinings: dict[str, Joining] = {}
        self._followed: dict[str, int] = {}
        self._behind: set[str] = set()
        """Who was too far behind to keep what I have said in this round."""
        self._n_repeats: Counter[str] = Counter()
        self._early = Early()
        self._certificate: Certificate | None = None
        self._committed = False
        self._checked: Certificate | None = None
        self._now = -math.inf
        self._enter(outcome, state)
        self._restored: list[Signed] = [said for said in votes if round_of(said) == self.round]
        for said in self._restored:
            self._ledger.keep(said)

    def _enter(self, outcome: Outcome, state: bytes) -> None:
        self._round = Round(self._voice, self.terms, outcome, state, self._grace)
        self._attempts = Attempts(self._round, self.terms)
        self._my_offer: Offer | None = None

    # ---- how far ---------------------------------------------------------------------------------------------------

    @property
    def round(self) -> int:
        return self._round.number

    @property
    def outcome(self) -> Outcome:
        """The last certified one."""
        return self._round.outcome

    @property
    def state(self) -> bytes:
        return self._round.state

    @property
    def beacon(self) -> bytes:
        return self._round.beacon

    @property
    def members(self) -> tuple[str, ...]:
        return self._round.members

    @property
    def is_member(self) -> bool:
        return self._round.is_member

    @property
    def n_shards(self) -> int:
        return self._round.n_shards

    @property
    def attempt(self) -> int:
        """-1 while contributions are waited for."""
        return self._attempts.voting.attempt

    @property
    def offers(self) -> Mapping[bytes, Offer]:
        """All offers of this round that are known, by digest."""
        return self._round.offers

    @property
    def my_offer(self) -> Offer | None:
        """Mine of this round; also one of before a restart, which stands."""
        return self._my_offer

    @property
    def named(self) -> Mapping[str, str]:
        """Who was seen to lie, and how."""
        return self._voice.named

    @property
    def phase(self) -> str:
        if self._certificate is not None:
            return "committed"
        if not self.is_member:
            return "observing"
        if self.attempt == WAITING:
            return "gathering" if self._round.gathering else "collecting"
        return "voting" if self.attempt in self._attempts.voting.proposals else "reducing"

    @property
    def reason(self) -> str:
        """Why the last proposal was not accepted, if it was not."""
        return self._attempts.reason

    @property
    def joining(self) -> Joining:
        place = (self._round.run, self._round.scope, self.round, self._round.last, self.state)
        return Joining(*place, self._wants, self._addresses)

    def wake_at(self) -> float:
        """When to call `expired`; infinite if only others can change anything."""
        if self._round.started_at == math.inf:
            return math.inf
        if self._certificate is not None:
            return math.inf if self._committed else self._round.wake_at
        return min(self._round.wake_at, self._attempts.wake_at(self._now))

    # ---- what happens here -----------------------------------------------------------------------------------------

    def start(self, now: float) -> list[Action]:
        """Open the round."""
        self._now = now
        self._round.begin(self._peers, now)
        self._voice.say(self.joining)
        for peer, proof in self._voice.proofs.items():
            if peer in self.members:
                for statement in proof:
                    self._voice.say(statement)
        for said in self._restored:
            if isinstance(said, Offer):
                self._my_offer = said
                self._round.take_offer(said, offer_digest(said), now)
        self._attempts.restore(self._restored, now)
        self._restored = []
        self._ask()
        self._replay(now)
        return self._done(now)

    def offer(self, offer: Offer, now: float) -> list[Action]:
        """Contribute, once in a round. The bodies are here, and given to whoever asks."""
        if not self.is_member or self._my_offer is not None:
            raise LocalProtocolError("a member contributes once to a round")
        if (offer.peer, *place_of(offer), offer.round, offer.last) != (
            self._voice.me,
            self._round.run,
            self._round.scope,
            self.round,
            self._round.last,
        ):
            raise LocalProtocolError(f"an offer of round {offer.round} in round {self.round}")
        check_offer(self._voice.me, offer, self.terms, self.n_shards)
        self._my_offer = offer
        if self._certificate is None:
            self._voice.publish(offer)
            self._round.offer_mine(offer, offer_digest(offer), now)
        return self._done(now)

    def held(self, shard: int, offer_digest: bytes, now: float) -> list[Action]:
        """The body of `shard` of this offer is here."""
        if offer_digest in self._round.offers and self._certificate is None:
            self._round.hold(shard, offer_digest, now)
        return self._done(now)

    def computed(
        self, kind: Literal["gram", "sum"], plan: bytes, shard: int, value: bytes, data: bytes, size: int, now: float
    ) -> list[Action]:
        """What a `Reduce` came to; `plan` as it stood there."""
        if self._certificate is None:
            self._round.computed(kind, plan, shard, (value, size), data, now)
        return self._done(now)

    def decided(self, plan: bytes, decision: bytes, now: float) -> list[Action]:
        """What a `Decide` came to."""
        if self._certificate is None:
            self._round.decided(plan, decision, now)
        return self._done(now)

    def present(self, peers: frozenset[str], now: float) -> list[Action]:
        """To whom, and from whom, there is a stream."""
        self._peers = peers
        self._joinings = {peer: joining for peer, joining in self._joinings.items() if peer in peers}
        self._followed = {peer: number for peer, number in self._followed.items() if peer in peers or not peer}
        self._early.forget_all_but(peers)
        self._round.requests = {
            peer: request for peer, request in self._round.requests.items() if peer in peers or peer == self._voice.me
        }
        if self._round.started_at < math.inf and self._certificate is None:
            self._round.meet(peers, now)
        return self._done(now)

    def accuse(self, peer: str, reason: str, now: float) -> list[Action]:
        """What all of us know of the shared state shows that `peer` lies: convict it. Of this round alone."""
        if peer in self.members and self._certificate is None:
            self._voice.name(peer, reason)
        return self._done(now)

    def want(self, wants: Wants, now: float) -> list[Action]:
        """Be a member, look on, or leave."""
        if wants != self._wants:
            self._wants = wants
            if self._round.started_at < math.inf:
                self._voice.say(self.joining)
                self._ask()
        return self._done(now)

    def expired(self, now: float) -> list[Action]:
        """Time has passed."""
        self._round.look(now)
        return self._done(now)

    def repeat(self) -> list[RoundMessage]:
        """All that I have to say in this round, for whoever has heard nothing of it."""
        me, voting = self._voice.me, self._attempts.voting
        said: list[RoundMessage] = [self.joining]
        if self._certificate is not None:
            return [*said, self._certificate]
        said += [request for peer, request in self._round.requests.items() if peer == me]
        said += [self._my_offer] if self._my_offer is not None else []
        said += [self._round.held(shard) for shard in range(self.n_shards) if self._round.holdings.of(me, shard)]
        said += [plan for plan in self._round.plans.values() if plan.peer == me]
        said += self._ledger.claims(me, self.round)
        said += [proposal for proposal in voting.proposals.values() if proposal.peer == me]
        proof = self._attempts.proof()
        said += [message for message in proof if message.peer != me]
        said += [votes[me] for votes in voting.votes.values() if me in votes]
        said += [statement for statements in self._voice.proofs.values() for statement in statements]
        return said

    # ---- what others say -------------------------------------------------------------------------------------------

    def receive(self, peer: str, message: RoundMessage, now: float) -> list[Action]:
        """What `peer` says on its stream, or passes on. RemoteProtocolError if it breaks the rules."""
        if peer == self._voice.me:
            return []
        if isinstance(message, Joining):
            self._meet(peer, message)
        elif isinstance(message, Held):
            if not self._take_held(peer, message, now):
                return self._voice.taken()
        elif isinstance(message, Certificate):
            self._take_certificate(peer, message, now)
        else:
            self._take_signed(peer, message, now)
        return self._done(now)

    def _meet(self, peer: str, joining: Joining) -> None:
        """Who is here, and how far."""
        self._check_place(peer, joining.run, joining.scope)
        if peer not in self._joinings and len(self._joinings) >= _MOST_JOININGS:
            return
        self._joinings[peer] = joining
        if joining.round < self.round - 1:
            self._behind.add(peer)
        if joining.round > self.round + (self._certificate is not None):
            if self._followed.get(peer) != joining.round:
                self._followed[peer] = joining.round
                self._voice.do(FallenBehind(peer, joining, f"it is in round {joining.round}, I in {self.round}"))
        elif joining.round == self.round:
            if peer in self._behind and self._n_repeats[peer] < _MOST_REPEATS:
                self._behind.remove(peer)
                self._n_repeats[peer] += 1
                self._voice.do(Repeat(peer))
            self._compare_states(peer, joining)

    def _compare_states(self, peer: str, joining: Joining) -> None:
        """Whether most members share another state than mine."""
        states = Counter(
            said.state
            for member, said in self._joinings.items()
            if member in self.members and (said.round, said.last) == (self.round, self._round.last)
        )
        differs = joining.state != self.state and states[joining.state] > len(self.members) // 2
        if differs and self._followed.get("") != self.round:
            self._followed[""] = self.round
            reason = f"{states[joining.state]} of {len(self.members)} members share another state"
            self._voice.do(FallenBehind(peer, joining, reason))

    def _take_held(self, peer: str, held: Held, now: float) -> bool:
        if held.round == self.round + 1:
            self._early.keep(peer, held, is_member=peer in self.members)
        if held.round != self.round or peer not in self.members or self._certificate is not None:
            return False
        if held.shard >= self.n_shards:
            raise RemoteProtocolError(f"shard {held.shard} of {self.n_shards}", peer)
        return self._round.take_held(peer, held, now)

    def _take_signed(self, peer: str, statement: Signed, now: float) -> None:
        self._check_place(peer, *place_of(statement))
        number, author = round_of(statement), statement.peer
        if number == self.round + 1:
            self._early.keep(peer, statement, is_member=peer in self.members)
        if author == self._voice.me or not self.round - KEPT_ROUNDS <= number <= self.round:
            return
        if isinstance(statement, Request):
            self._take_request(peer, statement)
            return
        if author not in self.members or not self._in_form(peer, statement):
            return
        admission = self._ledger.admit(peer, statement, is_old=number < self.round)
        if isinstance(admission, Contradicted):
            self._voice.contradiction(admission.first, statement)
            if isinstance(statement, Offer) and number == self.round:
                self._round.doubled.add(author)
        if number != self.round or (self._certificate is not None and not isinstance(statement, Offer)):
            return
        if isinstance(statement, Offer):
            # Of two offers of one author the second is taken where somebody has planned it.
            self._round.take_offer(statement, offer_digest(statement), now)
        elif isinstance(statement, Vote) and isinstance(admission, Contradicted):
            self._attempts.take_vote(statement)
        elif isinstance(admission, Fresh):
            self._take_fresh(peer, statement, now)

    def _take_fresh(self, peer: str, statement: Plan | Claim | Proposal | Vote, now: float) -> None:
        if isinstance(statement, Plan):
            self._attempts.take_plan(peer, statement, now)
        elif isinstance(statement, Claim):
            self._round.take_claim(statement, now)
        elif isinstance(statement, Proposal):
            self._attempts.take_proposal(peer, statement, now)
        else:
            self._attempts.take_vote(statement)

    def _take_request(self, peer: str, request: Request) -> None:
        """Only from the one who wishes it: others could bring as many made-up peers as they like."""
        is_due = peer == request.peer and request.round == self.round and self._round.grantable(request)
        if is_due and isinstance(self._ledger.admit(peer, request), Fresh):
            self._round.requests[peer] = request

    def _in_form(self, peer: str, statement: Offer | Plan | Claim | Proposal | Vote) -> bool:
        """Whether it can be of this round. Of older ones two that differ are all that matters."""
        if round_of(statement) != self.round:
            return not isinstance(statement, Claim) or len(statement.data) <= gram_bytes(len(self.members))
        if isinstance(statement, Offer):
            check_offer(peer, statement, self.terms, self.n_shards)
            return statement.last == self._round.last
        if isinstance(statement, Claim):
            check_claim(peer, statement, len(self.members), self.n_shards, self.terms)
        elif isinstance(statement, Plan | Proposal):
            check_turn(peer, statement, self._round.proposers)
        return True

    def _check_place(self, peer: str, run: bytes, scope: str) -> None:
        if (run, scope) != (self._round.run, self._round.scope):
            raise RemoteProtocolError("a statement about another group", peer)

    def _replay(self, now: float) -> None:
        """What others said of this round before I was in it."""
        for peer, message in self._early.taken():
            # Its stream has gone on; if this broke the rules, so will what it says next, if anything does.
            with suppress(RemoteProtocolError):
                if isinstance(message, Held):
                    self._take_held(peer, message, now)
                elif isinstance(message, Certificate):
                    self._take_certificate(peer, message, now)
                elif not isinstance(message, Joining):
                    self._take_signed(peer, message, now)

    # ---- the end of a round ----------------------------------------------------------------------------------------

    def check(self, certificate: Certificate) -> None:
        """VerificationError unless it certifies the round in hand."""
        if certificate != self._checked:
            check_certificate(certificate, self.outcome, self.terms, self._ledger)
            self._checked = certificate

    def advance(self, certificate: Certificate, state: bytes, now: float) -> list[Action]:
        """The results are applied, and this is the digest of the state now: begin the next round."""
        outcome = certificate.outcome
        if outcome.round != self.round:
            raise LocalProtocolError(f"round {outcome.round} is applied in round {self.round}")
        if certificate != self._certificate:
            self.check(certificate)
        self._round.learn_spread()
        for peer in outcome.convicted:
            if peer not in self.outcome.convicted:
                self._voice.name(peer, f"convicted by the certificate of round {self.round}")
        self._certificate, self._committed, self._checked = None, False, None
        self._followed.clear()
        self._n_repeats.clear()
        self._enter(outcome, state)
        self._behind = {peer for peer, joining in self._joinings.items() if joining.round < self.round - 1}
        self._ledger.prune(self.round - 1)
        self._voice.forget(self.members)
        return self.start(now)

    def _take_certificate(self, peer: str, certificate: Certificate, now: float) -> None:
        self._check_place(peer, certificate.outcome.run, certificate.outcome.scope)
        if certificate.outcome.round == self.round + 1:
            self._early.keep(peer, certificate, is_member=peer in self.members)
        if certificate.outcome.round == self.round and self._certificate is None:
            try:
                self.check(certificate)
            except VerificationError as error:
                raise RemoteProtocolError(error.reason, peer) from None
            self._certify(peer, certificate, now)
        elif certificate.outcome.round in (self.round, self.round - 1):
            self._compare_votes(peer, certificate)

    def _compare_votes(self, peer: str, certificate: Certificate) -> None:
        """Whether a signer has precommitted something else to me: a certificate shows what others were told."""
        outcome, value = certificate.outcome, outcome_digest(certificate.outcome)
        place = (outcome.run, outcome.scope, outcome.round, certificate.attempt)
        for signer, signature in zip(certificate.signers, certificate.signatures, strict=False):
            vote = Vote(*place, "precommit", signer, value, signature)
            heard = self._ledger.find(signer, slot_of(vote))
            differs = isinstance(heard, Vote) and heard.value != value and signer in self.members
            if heard is not None and differs and isinstance(self._ledger.admit(peer, vote), Contradicted):
                self._voice.contradiction(heard, vote)

    def _certify(self, peer: str, certificate: Certificate, now: float) -> None:
        self._certificate = certificate
        self._compare_votes(peer, certificate)
        if self._voice.me in self._round.proposers[:_CRIERS]:
            self._voice.say(certificate)
        self._round.want_offers(peer, certificate.outcome.offers, now)

    def _done(self, now: float) -> list[Action]:
        """Go on as far as possible, and hand over what is to be done."""
        self._now = now
        if self._certificate is None and self._round.started_at < math.inf:
            self._attempts.progress(now)
            certificate = self._attempts.certificate()
            if certificate is not None:
                self._certify(self._round.proposers[0], certificate, now)
        if self._certificate is not None and not self._committed:
            names, known = self._certificate.outcome.offers, self._round.offers
            if all(digest in known for digest in names):
                self._committed = True
                offers = tuple(known[digest] for digest in names)
                reason = f"{len(self._certificate.signers)} of {len(self.members)} members signed {len(offers)} offers"
                self._voice.do(Commit(self._certificate, offers, reason))
        return self._voice.taken()

    def _ask(self) -> None:
        """Sign my wish to join or leave, for this round."""
        joins = self._wants == "member" and not self.is_member
        leaves = self._wants == "leave" and self.is_member
        if (joins or leaves) and self._voice.me not in self.outcome.convicted:
            place = (self._round.run, self._round.scope, self.round, self._voice.me)
            request = self._voice.utter(Request(*place, "member" if joins else "leave", UNSIGNED))
            self._round.requests[self._voice.me] = request
