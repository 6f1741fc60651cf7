"""The work of the round in hand: which contributions are there, and what becomes of a set of them.

    offers -> complete (closing.py) -> plan -> claims -> accepted results (claims.py)

What comes in here is signed, checked, and of this round. What is proposed from it, and who votes how, stands in
attempts.py.

Ring: pure.
"""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import pairwise

from mycel.protocols.rounds import (
    Claim,
    Held,
    Offer,
    Outcome,
    Plan,
    Request,
    outcome_digest,
    plan_digest,
)
from mycel.swarm.rounds.actions import Collect, Decide, FetchOffers, Reduce
from mycel.swarm.rounds.claims import Kind, Reduction, Task
from mycel.swarm.rounds.closing import Grace, Holdings
from mycel.swarm.rounds.membership import gathering, standing_in
from mycel.swarm.rounds.statements import UNSIGNED
from mycel.swarm.rounds.terms import GroupTerms, beacon_of, order, reducers
from mycel.swarm.rounds.voice import Voice


class Round:
    """The round after `outcome`, as one peer sees it. Time is given with every call; wishes go to `voice`."""

    def __init__(self, voice: Voice, terms: GroupTerms, outcome: Outcome, state: bytes, grace: Grace) -> None:
        self.voice, self.terms, self.outcome, self.state, self.grace = voice, terms, outcome, state, grace
        self.me = voice.me
        self.run, self.scope, self.number = outcome.run, outcome.scope, outcome.round + 1
        self.last = outcome_digest(outcome)
        self.beacon = beacon_of(outcome)
        self.members = outcome.members
        self.is_member = self.me in self.members
        self.gathering = gathering(outcome, terms)
        self.n_shards = terms.n_shards
        ring = reducers(self.beacon, 0, self.members)
        turns = [shard % len(ring) for shard in range(self.n_shards)]
        self.rings = tuple(ring[turn:] + ring[:turn] for turn in turns)
        self.need = max(1, math.ceil(terms.contributors * len(self.members) - 1e-9))
        self.present: frozenset[str] = frozenset({self.me})
        self.offers: dict[bytes, Offer] = {}
        self.by_author: dict[str, bytes] = {}
        self.doubled: set[str] = set()
        self.requests: dict[str, Request] = {}
        self.holdings = Holdings(self.rings, terms.aggregators)
        self.proposers = order(self.beacon, "propose", self.members)
        self.plans: dict[int, Plan] = {}
        self.seen_at: dict[bytes, float] = {}
        self.sets: dict[bytes, tuple[bytes, ...]] = {}
        self.reductions: dict[bytes, Reduction] = {}
        self.wanted: dict[bytes, str] = {}
        self.started_at = math.inf
        self.threshold_at: float | None = None
        self.look_at = math.inf
        self.plan_at: dict[int, float] = {}
        self._claims: dict[bytes, list[Claim]] = {}
        self._by_key: dict[bytes, Reduction] = {}
        self._audited: dict[bytes, int] = {}
        self._collected: set[tuple[int, bytes]] = set()
        self._mine: bytes | None = None
        self._arrived_at: dict[bytes, float] = {}
        self._n_held: Counter[str] = Counter()
        self._heard_of: dict[bytes, str] = {}
        self._ask_at = math.inf
        self._n_asked = 0

    # ---- collecting --------------------------------------------------------------------------------------------------

    def begin(self, present: frozenset[str], now: float) -> None:
        self.started_at = now
        self.meet(present, now)

    def meet(self, peers: frozenset[str], now: float) -> None:
        """These members are there, and I."""
        present = frozenset(self.members) & (peers | {self.me})
        if self.present == present and self.holdings.aggregators:
            return  # a stranger has come or gone
        self.present = present
        self.holdings.present(self.present, now)
        for reduction in self.reductions.values():
            self._attend(reduction, reduction.tasks, now)
        self._collect(self.offers)
        self._hold_mine(now)

    def take_offer(self, offer: Offer, digest: bytes, now: float) -> None:
        """An offer of a member; the second of one author only if a plan names it."""
        wanted = self.wanted.pop(digest, None) is not None
        if digest in self.offers or (offer.peer in self.by_author and not wanted):
            return
        self.offers[digest] = offer
        self.by_author.setdefault(offer.peer, digest)
        self._arrived_at.setdefault(digest, now)
        if not offer.bodies:
            self.holdings.complete(digest, now)
        self._collect([digest])
        if self.sets:
            self._reduce_sets(now)

    def offer_mine(self, offer: Offer, digest: bytes, now: float) -> None:
        """My own bodies are here."""
        self._collected.update((shard, digest) for shard in range(self.n_shards))
        self._mine = digest if offer.bodies else None
        self.take_offer(offer, digest, now)
        self._hold_mine(now)

    def _hold_mine(self, now: float) -> None:
        """Say that my own bodies are here, also of shards that are mine to reduce only since somebody is gone."""
        mine = self._mine
        for shard in range(self.n_shards) if mine is not None else ():
            is_told = mine in self.holdings.of(self.me, shard)
            if self.me in self.holdings.aggregators[shard] and not is_told and mine is not None:
                self.hold(shard, mine, now)

    def hold(self, shard: int, digest: bytes, now: float) -> None:
        """The body of `shard` is here."""
        self.holdings.hold(self.me, shard, [digest], now)
        self.voice.say(self.held(shard))

    def held(self, shard: int) -> Held:
        return Held(self.number, shard, tuple(sorted(self.holdings.of(self.me, shard))))

    def take_held(self, peer: str, held: Held, now: float) -> bool:
        """Whether an offer has become complete by what `peer` says to hold."""
        before = self.holdings.of(peer, held.shard)
        new = [digest for digest in held.offers if digest not in before]
        self._n_held[peer] += len(new)
        # Nobody aggregates more, also for others who are gone; a liar would fill our memory.
        share = -(-self.n_shards * max(self.terms.aggregators, 1) // len(self.members))
        if self._n_held[peer] > min(self.n_shards, 4 * share + 16) * (len(self.members) + 1):
            return False
        for digest in new:
            if digest not in self.offers and len(self._heard_of) < 2 * len(self.members):
                self._heard_of[digest] = peer
        complete = len(self.holdings.since)
        self.holdings.hold(peer, held.shard, new, now)
        return len(self.holdings.since) > complete

    def ask_for_heard_of(self) -> None:
        """Others hold offers that I have not seen: mine were lost, or their author told us different things."""
        unseen: dict[str, list[bytes]] = {}
        for digest, peer in self._heard_of.items():
            if digest not in self.offers:
                unseen.setdefault(peer, []).append(digest)
        for peer, digests in unseen.items():
            self.voice.do(FetchOffers(peer, tuple(digests)))
        self._heard_of.clear()

    def countable(self) -> list[bytes]:
        """Complete offers that I would plan: of members who made one, from the state that I share."""
        return [digest for digest in self.holdings.since if digest in self.offers and self._counts(self.offers[digest])]

    def _counts(self, offer: Offer) -> bool:
        return offer.peer not in self.doubled and offer.peer not in self.voice.named and offer.state == self.state

    def is_firm(self, digest: bytes) -> bool:
        """Whether no aggregator that holds anything of a shard misses this offer's."""
        return not self.offers[digest].bodies or all(
            digest in held
            for shard, aggregators in enumerate(self.holdings.aggregators)
            for held in (self.holdings.of(peer, shard) for peer in aggregators)
            if held
        )

    def _collect(self, digests: Iterable[bytes]) -> None:
        """Ask for the bodies of the shards that I aggregate."""
        if not self.is_member or self.started_at == math.inf:
            return
        coded = [digest for digest in digests if self.offers[digest].bodies]
        for shard, aggregators in enumerate(self.holdings.aggregators):
            new = [digest for digest in coded if (shard, digest) not in self._collected]
            if new and self.me in aggregators:
                self._collected.update((shard, digest) for digest in new)
                self.voice.do(Collect(shard, tuple(self.offers[digest] for digest in new)))

    # ---- closing -----------------------------------------------------------------------------------------------------

    def closed(self, now: float) -> bool:
        """Whether to go on with what is there."""
        if any(self._is_known(plan) for plan in self.plans.values()):
            return True
        if self.gathering:
            return any(self.grantable(request) for request in self.requests.values())
        here = self.countable()
        if len(here) >= self.need:
            if self.threshold_at is None:
                self.threshold_at = now
            if self.present <= {self.offers[digest].peer for digest in here}:
                return True
            if now >= self.threshold_at + self.grace.seconds:
                return True
        return self.is_patience_over(now)

    def _is_known(self, plan: Plan) -> bool:
        """Whether somebody whose turn it may be has seen enough; what only it has ever heard of shows nothing."""
        return sum(digest in self.offers for digest in plan.offers) >= self.need

    def is_patience_over(self, now: float) -> bool:
        """Whether to make do with what is there; a gathering waits for as long as nobody comes."""
        return not self.gathering and now >= self.started_at + self.terms.patience_s

    def close_at(self) -> float:
        """When `closed` changes if nothing happens."""
        if self.gathering:
            return math.inf
        grace_over = math.inf if self.threshold_at is None else self.threshold_at + self.grace.seconds
        return min(grace_over, self.started_at + self.terms.patience_s)

    def grantable(self, request: Request) -> bool:
        """Whether the wish would change anything."""
        if request.wants == "leave":
            return request.peer in self.members
        return request.peer not in self.members and request.peer not in self.outcome.convicted

    def learn_spread(self) -> None:
        """The round is over: how long after the first enough did the last contribution come, if only its offer?"""
        if self.threshold_at is not None:
            since = self.holdings.since
            arrivals = [since.get(digest, at) for digest, at in self._arrived_at.items()]
            spread_s = max(0.0, max(arrivals, default=0.0) - self.threshold_at)
            self.grace.learn(spread_s, self.threshold_at - self.started_at)

    # ---- plans -------------------------------------------------------------------------------------------------------

    def take_plan(self, plan: Plan, now: float) -> None:
        self.plans.setdefault(plan.attempt, plan)
        self.plan_at.setdefault(plan.attempt, now)

    def take_set(self, sender: str, offers: tuple[bytes, ...], now: float) -> None:
        """Somebody whose turn it is wants this set reduced: two in an attempt at most, its plan and its proposal."""
        digest = plan_digest(offers)
        if digest in self.sets:
            return
        self.sets[digest] = offers
        self.seen_at[digest] = now
        self.want_offers(sender, offers, now)
        self._reduce_sets(now)

    def want_offers(self, sender: str, offers: Sequence[bytes], now: float) -> None:
        """Ask `sender`, who named them, for offers that I have not seen."""
        unknown = tuple(digest for digest in offers if digest not in self.offers and digest not in self.wanted)
        if unknown:
            self.wanted |= dict.fromkeys(unknown, sender)
            self._ask_at = min(self._ask_at, now + self.terms.attempt_s)
            self.voice.do(FetchOffers(sender, unknown))

    @property
    def wake_at(self) -> float:
        return min(self.look_at, self._ask_at if self.wanted else math.inf)

    def look(self, now: float) -> None:
        """Time has passed: ask others for what nobody gave, and see whose turn it is by now."""
        self._ask_again(now)
        if now >= self.look_at:
            self.look_at = math.inf
            for reduction in self.reductions.values():
                if reduction.results() is None:
                    self._attend(reduction, reduction.tasks, now)
                    self._look_again(reduction, now)

    def _look_again(self, reduction: Reduction, now: float) -> None:
        """In the round that is over nobody waits for a shard any more, so the clock may stand still there."""
        self.look_at = min(self.look_at, reduction.wake_at(self.terms, now))

    def _ask_again(self, now: float) -> None:
        """Who named an offer has not given it: ask the others in turn."""
        others = sorted(self.present - {self.me})
        if now < self._ask_at or not self.wanted:
            return
        self._ask_at = now + self.terms.attempt_s
        if others:
            self._n_asked += 1
            self.voice.do(FetchOffers(others[self._n_asked % len(others)], tuple(self.wanted)))

    def _reduce_sets(self, now: float) -> None:
        """Begin to reduce the sets whose offers are all known and may stand together."""
        for digest, names in self.sets.items():
            if digest in self.reductions or any(name not in self.offers for name in names):
                continue
            offers = tuple(self.offers[name] for name in names)
            authors = [offer.peer for offer in offers]
            if all(a < b for a, b in pairwise(authors)):
                reduction = Reduction(digest, offers, self.rings, self.terms.rule, now)
                self.reductions[digest] = reduction
                self._by_key[digest] = reduction
                self._audited[digest] = self._audit(digest)
                self._open(reduction, reduction.tasks, now)

    def _audit(self, plan: bytes) -> int:
        """The shard that I recompute unannounced, or -1. My signature draws the lot: nobody else knows it before."""
        lot = hashlib.sha256(self.voice.signer.sign(b"mycel audit v1\0" + plan)).digest()
        drawn = int.from_bytes(lot[:8], "little") / 2**64 < self.terms.audits / len(self.members)
        return int.from_bytes(lot[8:16], "little") % self.n_shards if drawn else -1

    # ---- reducing ----------------------------------------------------------------------------------------------------

    def take_claim(self, claim: Claim, now: float) -> None:
        self._claims.setdefault(claim.plan, []).append(claim)
        task = self._task(claim.kind, claim.plan, claim.shard)
        if task is not None:
            reduction = self._by_key[claim.plan]
            task.add(claim, now)
            self._attend(reduction, [task], now)
            self.look_at = min(self.look_at, max(task.overdue_at(self.terms), now + self.terms.attempt_s))

    def computed(self, kind: Kind, key: bytes, shard: int, value: tuple[bytes, int], data: bytes, now: float) -> None:
        """I computed a shard myself: that is what I believe, and say where it is my turn."""
        task = self._task(kind, key, shard)
        if task is None or task.own is not None:
            return
        task.own, task.own_data = value, data
        reduction = self._by_key[key]
        if self.terms.aggregators and (self._my_turn(task, now) or shard == self._audited[reduction.plan]):
            place = (self.run, self.scope, self.number, key, kind, shard)
            claim = self.voice.utter(Claim(*place, self.me, *value, data, UNSIGNED))
            task.add(claim, now)
        self._attend(reduction, [task], now)

    def decided(self, plan: bytes, decision: bytes, now: float) -> None:
        reduction = self.reductions.get(plan)
        if reduction is None or not reduction.grams:
            return
        reduction.deciding = False
        if reduction.asked_from == reduction.agreed_grams():
            reduction.decided_from = reduction.asked_from
            if decision != reduction.decision:
                reduction.decide(decision, now)
                self._open(reduction, reduction.sums, now)
        self._pursue(reduction, now)

    def _task(self, kind: Kind, key: bytes, shard: int) -> Task | None:
        reduction = self._by_key.get(key)
        if reduction is None or shard >= self.n_shards:
            return None
        tasks = reduction.grams if kind == "gram" else reduction.sums
        return tasks[shard] if tasks and tasks[shard].key == key else None

    def _open(self, reduction: Reduction, tasks: Sequence[Task], now: float) -> None:
        """Take up tasks with what was claimed about them before."""
        for task in tasks:
            self._by_key[task.key] = reduction
        for key in {task.key for task in tasks}:
            for claim in self._claims.get(key, ()):
                claimed = self._task(claim.kind, key, claim.shard)
                if claimed is not None:
                    claimed.add(claim, now)
        self._attend(reduction, tasks, now)
        self._look_again(reduction, now)

    def _attend(self, reduction: Reduction, tasks: Sequence[Task], now: float) -> None:
        """Judge these tasks, compute what is mine or disputed, name who lied, and go on to what follows."""
        for task in tasks:
            task.judge(self.present, self.terms, now)
            for claim in task.liars():
                if claim.peer not in self.voice.named:
                    self.voice.name(claim.peer, f"claimed a false {task.kind} of shard {task.shard}")
                    self.voice.say(claim)
            if task.own is None and not task.asked and self._must_compute(reduction, task, now):
                task.asked = True
                decision = b"" if task.kind == "gram" else reduction.decision or b""
                self.voice.do(Reduce(task.kind, task.key, task.shard, reduction.rows, decision))
        self._pursue(reduction, now)

    def _must_compute(self, reduction: Reduction, task: Task, now: float) -> bool:
        if not self.is_member:
            return False
        if self.terms.aggregators == 0 or task.disputed() or task.shard == self._audited[reduction.plan]:
            return True
        return task.accepted is None and (self._my_turn(task, now) or now >= task.own_at(self.terms))

    def _my_turn(self, task: Task, now: float) -> bool:
        return self.me in task.window(self.present, self.terms, now)

    def _pursue(self, reduction: Reduction, now: float) -> None:
        """From agreed Grams to the decision; note when all is accepted."""
        agreed = reduction.agreed_grams()
        if reduction.grams and agreed is not None and agreed != reduction.decided_from and not reduction.deciding:
            reduction.deciding, reduction.asked_from = True, agreed
            known = standing_in(self.outcome)
            standing = tuple(known.get(offer.peer, 0) for offer in reduction.rows)
            grams = tuple(task.data() for task in reduction.grams)
            self.voice.do(Decide(reduction.plan, reduction.rows, grams, standing))
        if reduction.results() is None:
            reduction.done_at = None
        elif reduction.done_at is None:
            reduction.done_at = now
