"""Groups of round machines on a network in memory, in virtual time: delays, broken streams, partitions, crashes, liars.

No I/O and no trio: a heap of events. Reducing is hashing bodies; signatures are hashes that only their owner can make.
What must never be broken is held against every peer at every event: one outcome a round, results that an honest
reduction gives, and nobody honest accused.
"""

from __future__ import annotations

import hashlib
import heapq
import math
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

from mycel.protocols.errors import RemoteProtocolError
from mycel.protocols.rounds import (
    Certificate,
    Offer,
    Outcome,
    RoundMessage,
    offer_digest,
    outcome_digest,
    plan_digest,
)
from mycel.swarm.rounds.actions import (
    Action,
    Collect,
    Commit,
    Decide,
    FallenBehind,
    FetchOffers,
    Name,
    Reduce,
    Remember,
    Repeat,
    Say,
)
from mycel.swarm.rounds.claims import decision_digest, gram_bytes, needs_gram, sum_key
from mycel.swarm.rounds.machine import RoundMachine, make_offer
from mycel.swarm.rounds.terms import GroupTerms, genesis

RUN, SCOPE = bytes(range(32)), "run"
N_ELEMENTS = 1 << 16  # four shards
TERMS = GroupTerms(N_ELEMENTS, patience_s=20.0, longest_grace_s=4.0, attempt_s=2.0)
FIRST_STATE = hashlib.sha256(b"first").digest()


@dataclass(frozen=True)
class HashSigner:
    """Signs by hashing; in tests nobody signs for another but through this."""

    peer_id: str

    def sign(self, data: bytes) -> bytes:
        return hashlib.sha512(b"secret of " + self.peer_id.encode() + data).digest()


def _verify(peer: str, signature: bytes, data: bytes) -> bool:
    return signature == HashSigner(peer).sign(data)


@contextmanager
def hashed_signatures() -> Iterator[None]:
    """Ed25519 takes longer than all the rest of a round; other tests show that it is asked."""
    with (
        mock.patch("mycel.swarm.rounds.statements.verify", _verify),
        mock.patch("mycel.swarm.rounds.certificates.verify", _verify),
        mock.patch("mycel.swarm.rounds.attempts.verify", _verify),
    ):
        yield


def gram_of(offers: tuple[Offer, ...], shard: int) -> bytes:
    """As long as a Gram matrix, and another for other bodies."""
    seed = hashlib.sha256(b"gram" + b"".join(offer.bodies[shard] for offer in offers)).digest()
    size = gram_bytes(len(offers))
    return (seed * (size // 32 + 1))[:size]


def decision_of(grams: tuple[bytes, ...]) -> bytes:
    return hashlib.sha256(b"decision" + b"".join(grams)).digest()


def sum_of(offers: tuple[Offer, ...], shard: int, key: bytes) -> tuple[bytes, int]:
    bodies = b"".join(offer.bodies[shard] for offer in offers)
    return hashlib.sha256(b"sum" + key + bodies).digest(), sum(offer.sizes[shard] for offer in offers)


def true_results(offers: tuple[Offer, ...], terms: GroupTerms) -> tuple[bytes, tuple[bytes, ...], tuple[int, ...]]:
    """Decision, results and sizes of an honest reduction."""
    rows = tuple(offer for offer in offers if offer.bodies)
    if not rows:
        return decision_digest(b""), (), ()
    n_shards = len(rows[0].bodies)
    decision = decision_of(tuple(gram_of(rows, s) for s in range(n_shards))) if needs_gram(terms.rule) else b""
    key = sum_key(plan_digest([offer_digest(offer) for offer in offers]), decision)
    sums = [sum_of(rows, shard, key) for shard in range(n_shards)]
    return decision_digest(decision), tuple(value for value, _ in sums), tuple(size for _, size in sums)


def next_state(state: bytes, outcome: Outcome) -> bytes:
    return hashlib.sha256(state + outcome_digest(outcome)).digest()


@dataclass
class Node:
    """One peer: machine, and the disk that outlives it."""

    net: Net
    peer: str
    wants: str = "member"
    liar: Any = None
    machine: RoundMachine | None = None
    chain: list[Certificate] = field(default_factory=list)  # on disk
    states: list[bytes] = field(default_factory=lambda: [FIRST_STATE])
    book: list[Any] = field(default_factory=list)
    offers: dict[bytes, Offer] = field(default_factory=dict)
    named: dict[str, str] = field(default_factory=dict)
    commits: dict[int, float] = field(default_factory=dict)
    generation: int = 0
    slow: float = 1.0
    contributes: bool = True

    @property
    def is_up(self) -> bool:
        return self.machine is not None

    def boot(self) -> None:
        net = self.net
        outcome = self.chain[-1].outcome if self.chain else net.genesis
        self.generation += 1
        self.machine = RoundMachine(HashSigner(self.peer), net.terms, outcome, self.states[-1], self.book)
        self.machine.want(self.wants, net.now)  # type: ignore[arg-type]
        self.act(self.machine.start(net.now))
        self.act(self.machine.present(net.neighbours(self.peer), net.now))
        self.work()

    def crash(self) -> None:
        self.machine = None
        self.generation += 1

    # ---- work

    def work(self) -> None:
        """Contribute to the round in hand, after a while."""
        assert self.machine is not None
        if not self.contributes or not self.machine.is_member:
            return
        number = self.machine.round
        self.later(self.net.rng.uniform(0.2, 1.0) * self.slow, lambda: self._contribute(number))

    def _contribute(self, number: int) -> None:
        machine = self.machine
        assert machine is not None
        gathering = len(machine.members) < self.net.terms.min_members
        if machine.round != number or machine.my_offer is not None or not machine.is_member or gathering:
            return
        bodies = [
            hashlib.sha256(f"{self.peer} {number} {shard} {self.generation}".encode()).digest()
            for shard in range(machine.n_shards)
        ]
        scalars = b""
        if self.net.scalars and int(self.peer[1:]) % 2:
            bodies, scalars = [], f"{self.peer} {number}".encode()
        offer = make_offer(
            HashSigner(self.peer),
            machine.outcome,
            machine.state,
            bodies=bodies,
            sizes=[100] * len(bodies),
            scalars=scalars,
        )
        for body in bodies:
            self.net.holders.setdefault(body, set()).add(self.peer)
        self.act(machine.offer(offer, self.net.now))

    def later(self, delay: float, do: Callable[[], None]) -> None:
        generation = self.generation

        def unless_crashed() -> None:
            if self.generation == generation:
                do()

        self.net.at(self.net.now + delay, unless_crashed)

    # ---- the machine

    def hear(self, peer: str, message: RoundMessage) -> None:
        machine = self.machine
        if machine is None:
            return
        if isinstance(message, Offer):
            self.offers[offer_digest(message)] = message
        try:
            self.act(machine.receive(peer, message, self.net.now))
        except RemoteProtocolError as error:
            self.net.broke_rules(self.peer, peer, str(error))

    def act(self, actions: list[Action]) -> None:
        for action in actions:
            self._do(action)
        self.net.observe(self)
        machine = self.machine
        if machine is not None and (wake := machine.wake_at()) < math.inf:
            self.net.wake(self, wake)

    def _do(self, action: Action) -> None:
        net, machine = self.net, self.machine
        assert machine is not None
        if isinstance(action, Say):
            for other in sorted(net.neighbours(self.peer)):
                net.send(self.peer, other, action.message)
        elif isinstance(action, Repeat):
            for message in machine.repeat():
                net.send(self.peer, action.peer, message)
        elif isinstance(action, Remember):
            self.book.append(action.vote)
        elif isinstance(action, Name):
            self.named[action.peer] = action.reason
        elif isinstance(action, Commit):
            self._commit(action)
        elif isinstance(action, FallenBehind):
            self.later(net.delay(), lambda: self._catch_up(action.peer))
        else:
            self._begin(action, machine.round)

    def _begin(self, action: Collect | FetchOffers | Reduce | Decide, number: int) -> None:
        """Work that takes a while."""
        if isinstance(action, Collect):
            for offer in action.offers:
                self._collect(action.shard, offer, number)
        elif isinstance(action, FetchOffers):
            self.later(self.net.delay(), lambda: self._fetch_offers(action))
        elif isinstance(action, Reduce):
            self._reduce(action, number)
        else:
            self.later(self.net.delay(), lambda: self._decided(action))

    def _has(self, body: bytes) -> bool:
        holders = self.net.holders.get(body, set())
        if self.peer in holders:
            return True
        if any(self.net.is_linked(self.peer, other) and self.net.gives(other, self.peer, body) for other in holders):
            holders.add(self.peer)
            return True
        return False

    def _collect(self, shard: int, offer: Offer, number: int) -> None:
        def fetched() -> None:
            machine = self.machine
            assert machine is not None
            if machine.round == number and self._has(offer.bodies[shard]):
                self.act(machine.held(shard, offer_digest(offer), self.net.now))
            elif machine.round == number:
                self.later(0.5, fetched)

        self.later(self.net.delay(), fetched)

    def _fetch_offers(self, action: FetchOffers) -> None:
        for peer in [action.peer, *sorted(self.net.neighbours(self.peer))]:
            other = self.net.nodes.get(peer)
            if other is None or not other.is_up or not self.net.is_linked(self.peer, peer):
                continue
            for digest in action.digests:
                if digest in other.offers:
                    self.hear(peer, other.offers[digest])

    def _reduce(self, action: Reduce, number: int) -> None:
        def collected() -> None:
            machine = self.machine
            assert machine is not None
            if machine.round != number:
                return
            if not all(self._has(offer.bodies[action.shard]) for offer in action.offers):
                self.later(0.5, collected)
                return
            if action.kind == "gram":
                data = gram_of(action.offers, action.shard)
                value, size = hashlib.sha256(data).digest(), len(data)
            else:
                data = b""
                value, size = sum_of(action.offers, action.shard, action.plan)
            done = machine.computed(action.kind, action.plan, action.shard, value, data, size, self.net.now)
            self.act(done)

        self.later(self.net.rng.uniform(0.05, 0.3) * self.slow, collected)

    def _decided(self, action: Decide) -> None:
        assert self.machine is not None
        self.act(self.machine.decided(action.plan, decision_of(action.grams), self.net.now))

    def _commit(self, action: Commit) -> None:
        certificate = action.certificate
        self.net.certified(self, certificate, action.offers)
        self.later(self.net.delay(), lambda: self._apply(certificate))

    def _apply(self, certificate: Certificate) -> None:
        machine = self.machine
        assert machine is not None
        if certificate.outcome.round != machine.round:
            return
        self.chain.append(certificate)
        self.states.append(next_state(machine.state, certificate.outcome))
        self.book.clear()
        self.commits[certificate.outcome.round] = self.net.now
        self.act(machine.advance(certificate, self.states[-1], self.net.now))
        self.work()

    def _catch_up(self, peer: str) -> None:
        """Follow the certificates of another."""
        machine, other = self.machine, self.net.nodes.get(peer)
        assert machine is not None
        if other is None or not self.net.is_linked(self.peer, peer) or other.liar is not None:
            return
        for certificate in other.chain[machine.round - 1 :]:
            machine.check(certificate)
            offers = tuple(self.net.all_offers[digest] for digest in certificate.outcome.offers)
            self.net.certified(self, certificate, offers)
            self._apply(certificate)


class Net:
    """Peers, links between them, and the clock."""

    def __init__(self, seed: int, n_peers: int, terms: GroupTerms = TERMS, *, founders: int = 0) -> None:
        """`founders` of them are members from the beginning (all: 0); the first founds alone if it is 1."""
        self.rng = random.Random(seed)
        self.now, self.terms, self.scalars = 0.0, terms, False
        names = [f"p{number:03}" for number in range(n_peers)]
        first = genesis(RUN, SCOPE, names[0])
        members = tuple(names[: founders or n_peers])
        self.genesis = Outcome(
            *(RUN, SCOPE, 0, first.last, (), (), (), (), first.decision), members, (0,) * len(members)
        )
        self.nodes = {name: Node(self, name) for name in names}
        self.links: dict[tuple[str, str], bool] = {}
        self.epoch: dict[tuple[str, str], int] = {}
        self.cut: set[frozenset[str]] = set()
        self.holders: dict[bytes, set[str]] = {}
        self.withheld: Callable[[str, str, bytes], bool] = lambda giver, taker, body: False
        self.all_offers: dict[bytes, Offer] = {}
        self.outcomes: dict[int, Outcome] = {}
        self.rules_broken: list[tuple[str, str, str]] = []
        self.longest_delay_s = 0.1
        self.n_messages = 0
        self._last: dict[tuple[str, str], float] = {}
        self._heap: list[tuple[float, int, Callable[[], None]]] = []
        self._n = 0
        self._waking: dict[str, float] = {}

    # ---- the clock

    def at(self, time: float, do: Callable[[], None]) -> None:
        self._n += 1
        heapq.heappush(self._heap, (time, self._n, do))

    def wake(self, node: Node, time: float) -> None:
        if self._waking.get(node.peer) == time:
            return
        self._waking[node.peer] = time
        generation = node.generation

        def ring() -> None:
            if self._waking.get(node.peer) == time:
                del self._waking[node.peer]
            machine = node.machine
            if machine is not None and node.generation == generation and machine.wake_at() <= self.now:
                node.act(machine.expired(self.now))
                assert machine.wake_at() > self.now, f"{node.peer} in {machine.phase} wakes for ever"

        self.at(max(time, self.now), ring)

    def run(self, until: Callable[[], bool], deadline_s: float) -> bool:
        """Let time pass until something holds; False if it did not by then."""
        end = self.now + deadline_s
        while self._heap and not until():
            time, _, do = heapq.heappop(self._heap)
            if time > end:
                self.at(time, do)
                self.now = end
                return until()
            self.now = time
            do()
        return until()

    # ---- links

    def delay(self) -> float:
        return self.rng.uniform(0.005, self.longest_delay_s)

    def is_linked(self, a: str, b: str) -> bool:
        one, other = self.nodes.get(a), self.nodes.get(b)
        if one is None or other is None or not one.is_up or not other.is_up:
            return False
        return self.links.get((a, b), True) and frozenset((a, b)) not in self.cut

    def neighbours(self, peer: str) -> frozenset[str]:
        return frozenset(other for other in self.nodes if other != peer and self.is_linked(peer, other))

    def send(self, source: str, target: str, message: RoundMessage) -> None:
        liar = self.nodes[source].liar
        messages = [message] if liar is None else liar(target, message)
        for said in messages:
            self.n_messages += 1
            self._send(source, target, said)

    def _send(self, source: str, target: str, message: RoundMessage) -> None:
        if isinstance(message, Offer):
            self.all_offers[offer_digest(message)] = message
            self.nodes[source].offers[offer_digest(message)] = message
        link = (source, target)
        epoch = self.epoch.get(link, 0)
        time = max(self._last.get(link, 0.0), self.now + self.delay())  # a stream keeps its order
        self._last[link] = time

        def arrive() -> None:
            if self.epoch.get(link, 0) == epoch and self.is_linked(source, target):
                self.nodes[target].hear(source, message)

        self.at(time, arrive)

    def _changed(self, pairs: list[tuple[str, str]]) -> None:
        """What was on its way is lost; who is linked says everything again."""
        for a, b in pairs:
            for link in ((a, b), (b, a)):
                self.epoch[link] = self.epoch.get(link, 0) + 1
        for peer in sorted({peer for pair in pairs for peer in pair}):
            node = self.nodes[peer]
            if node.machine is not None:
                node.act(node.machine.present(self.neighbours(peer), self.now))
        for a, b in pairs:
            for source, target in ((a, b), (b, a)):
                machine = self.nodes[source].machine
                if machine is not None and self.is_linked(source, target):
                    for message in machine.repeat():
                        self.send(source, target, message)

    def break_stream(self, a: str, b: str, for_s: float) -> None:
        """A connection is lost, with what is on its way, and comes back."""
        self.links[a, b] = self.links[b, a] = False
        self._changed([(a, b)])

        def back() -> None:
            self.links[a, b] = self.links[b, a] = True
            self._changed([(a, b)])

        self.at(self.now + for_s, back)

    def partition(self, side: set[str]) -> None:
        pairs = [(a, b) for a in sorted(side) for b in sorted(self.nodes) if b not in side]
        self.cut |= {frozenset(pair) for pair in pairs}
        self._changed(pairs)

    def heal(self) -> None:
        pairs = [tuple(sorted(pair)) for pair in self.cut]
        self.cut.clear()
        self._changed(sorted(pairs))  # type: ignore[arg-type]

    def start(self, peer: str) -> None:
        node = self.nodes[peer]
        if not node.is_up:
            node.boot()
            self._changed([(peer, other) for other in sorted(self.nodes) if self.is_linked(peer, other)])

    def kill(self, peer: str) -> None:
        self.nodes[peer].crash()
        self._changed([(peer, other) for other in sorted(self.nodes) if other != peer])

    def gives(self, giver: str, taker: str, body: bytes) -> bool:
        return not self.withheld(giver, taker, body)

    # ---- what must hold

    @property
    def honest(self) -> list[Node]:
        return [node for node in self.nodes.values() if node.liar is None]

    def broke_rules(self, judge: str, peer: str, reason: str) -> None:
        assert self.nodes[peer].liar is not None, f"{judge} says that {peer}, who is honest, {reason}"
        self.rules_broken.append((judge, peer, reason))

    def certified(self, node: Node, certificate: Certificate, offers: tuple[Offer, ...]) -> None:
        outcome = certificate.outcome
        first = self.outcomes.setdefault(outcome.round, outcome)
        assert first == outcome, f"two outcomes of round {outcome.round}"
        assert tuple(offer_digest(offer) for offer in offers) == outcome.offers
        assert (outcome.decision, outcome.results, outcome.sizes) == true_results(offers, self.terms)
        honest = {other.peer for other in self.honest}
        assert not honest & set(outcome.convicted), f"{node.peer} agreed to convict {honest & set(outcome.convicted)}"

    def observe(self, node: Node) -> None:
        if node.liar is None and node.named:
            wronged = [peer for peer in node.named if self.nodes[peer].liar is None]
            assert not wronged, f"{node.peer} accuses {wronged}: {node.named}"

    def rounds_done(self, count: int) -> bool:
        """Whether all honest peers that are up have seen so many rounds."""
        return all(len(node.chain) >= count for node in self.honest if node.is_up)

    def describe(self) -> str:
        """How far everybody is, for a test that fails."""
        lines = []
        for node in self.nodes.values():
            machine, habit = node.machine, getattr(node.liar, "habit", "")
            far = (machine.phase, machine.round, machine.attempt, machine.reason) if machine is not None else "down"
            lines.append(f"{node.peer} {habit} {far} {node.named}")
        return "\n".join([f"at {self.now:.1f} s, members {self.members}", *lines])

    @property
    def members(self) -> tuple[str, ...]:
        """Of the newest outcome."""
        return self.outcomes[max(self.outcomes)].members if self.outcomes else self.genesis.members
