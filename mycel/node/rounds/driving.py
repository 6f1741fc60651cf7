"""Does what the machine of the round in hand wants, in its order, and tells it what came of it.

What carries our signature is on disk before anybody hears it. Work for a round ends with the round.

Ring: shell.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from functools import partial

import trio

from mycel.node.rounds.bodies import Bodies, Reducer
from mycel.node.rounds.group_port import GroupPlace, GroupPorts
from mycel.node.rounds.history import History
from mycel.node.rounds.round_streams import RoundStreams
from mycel.node.rounds.shelf import Shelf
from mycel.node.rounds.vote_book import Books, Signed
from mycel.protocols.errors import RemoteProtocolError, RouteUnavailable
from mycel.protocols.messages import PeerAddress
from mycel.protocols.rounds import NOTHING, Certificate, Held, Joining, Offer, Outcome, RoundMessage
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
from mycel.swarm.rounds.machine import RoundMachine, Wants
from mycel.swarm.rounds.terms import genesis, reducers
from mycel.swarm.training.bell import Bell

__all__ = ["FIRST_REST_S", "LONGEST_REST_S", "Driver"]

FIRST_REST_S, LONGEST_REST_S = 0.5, 8.0
# Offers that are asked for of others besides the one that named them.
MAX_ASKED = 3


class Driver:
    """Of one group. `bell` rings when a round begins or is over, and when somebody comes, goes or falls behind.

    `commits` are rounds that are over: certificate, and offers as far as the machine has them. `differs` says that most
    share another state, until somebody looks at it. `times`: when the round in hand got how far, by trio's clock.
    """

    def __init__(self, place: GroupPlace, ports: GroupPorts, books: Books, shelf: Shelf, reducer: Reducer) -> None:
        self.bell = Bell()
        self.times: dict[str, float] = {}
        self.commits: dict[int, tuple[Certificate, tuple[Offer, ...]]] = {}
        self.differs: FallenBehind | None = None
        self.joinings: dict[str, Joining] = {}
        self._wants: Wants = "member"
        # What this peer computes is on disk before it says so.
        self.keeps_results = False
        store = ports.blobs.store(*place.key)
        self.history = History(place.key, store, books, ports.event, self._check, lambda: self.machine.offers, shelf)
        self.streams = RoundStreams(
            ports.door,
            place.key,
            ports.event,
            self._greeting,
            self._hear,
            self._presence_changed,
            lambda peer: peer in self.machine.members,
        )
        self._place, self._ports, self._store, self._books, self._reducer = place, ports, store, books, reducer
        self._shelf = shelf
        self._me = ports.signer.peer_id
        self.machine = self._machine(genesis(place.run, place.scope, place.founder), NOTHING)
        self._bodies = self._new_bodies()
        # The coded results of the last round, or None while they are not here.
        self._before: tuple[memoryview, ...] | None = ()
        # Rung for what is to be done, and for an earlier time to wake up at.
        self._work, self._alarm = Bell(), Bell()
        self._sleeps_until = math.inf
        # (round in which it was wanted, action), in the order to be done in.
        self._todo: deque[tuple[int, Action]] = deque()
        self._tasks: trio.Nursery | None = None
        self._scopes: set[trio.CancelScope] = set()

    def launch(self, tasks: trio.Nursery, outcome: Outcome, state: bytes) -> None:
        """Take part, as long as `tasks` live, from the round after `outcome` on."""
        self._tasks = tasks
        self.start_from(outcome, state)
        for task in (self.streams.run, self._perform, self._watch_clock):
            tasks.start_soon(task)

    # ---- rounds

    def start_from(self, outcome: Outcome, state: bytes) -> None:
        """The state after this outcome is here: be in the round that follows, whatever came before."""
        now = trio.current_time()
        self._before = None if outcome.results else ()
        self.machine = self._machine(outcome, state)
        self._begin()
        self.act(self.machine.start(now))
        self.act(self.machine.present(self.streams.present, now))
        for peer, joining in self.joinings.items():
            self.act(self.machine.receive(peer, joining, now))

    def enter(self, certificate: Certificate, results: tuple[memoryview, ...], state: bytes) -> None:
        """The results are applied: go on to the round after this certificate."""
        self._before = results
        actions = self.machine.advance(certificate, state, trio.current_time())
        self._begin()
        self.act(actions)

    def _begin(self) -> None:
        """A new round is in hand: nothing of an older one is of use any more."""
        for scope in list(self._scopes):
            scope.cancel()
        number = self.machine.round
        self.times = {"begun": trio.current_time()}
        self._bodies = self._new_bodies()
        self.commits = {over: commit for over, commit in self.commits.items() if over >= number}
        self.differs = None
        self._store.drop_before(number)
        for member in self.machine.members:
            self.streams.meet(PeerAddress(member))
        self._ports.event("round.begun", round=number, members=len(self.machine.members))
        self._start(self._books.write, partial(self._books.votes.enter, number))
        if self._before is None:
            self._start(self._fetch_before, self.machine.outcome)
        self.bell.ring()

    def _machine(self, outcome: Outcome, state: bytes) -> RoundMachine:
        said = self._books.votes.of_round(outcome.round + 1)
        addresses = self._ports.transport.addresses[:8]
        machine = RoundMachine(self._ports.signer, self._place.terms, outcome, state, said, addresses=addresses)
        machine.want(self._wants, -math.inf)
        return machine

    def _check(self, outcome: Outcome, certificate: Certificate) -> None:
        RoundMachine(self._ports.signer, self._place.terms, outcome, NOTHING).check(certificate)

    def _new_bodies(self) -> Bodies:
        number, n_shards = self.machine.round, self._place.terms.n_shards
        ports = self._ports
        return Bodies(number, n_shards, self._store, self._reducer, ports.compute, ports.event, self._held)

    def mark(self, what: str) -> None:
        """The round in hand got so far."""
        self.times.setdefault(what, trio.current_time())

    # ---- what comes in

    def want(self, wants: Wants) -> None:
        """Be a member, look on, or leave; also after the state of others was taken."""
        self._wants = wants
        self.act(self.machine.want(wants, trio.current_time()))

    def offer(self, offer: Offer) -> None:
        """Contribute this to the round in hand."""
        self.mark("offered")
        self.act(self.machine.offer(offer, trio.current_time()))

    def _greeting(self) -> Sequence[RoundMessage]:
        """What of ours is not in the book yet is on its way through `_perform`, and said when it is there."""
        greeting: list[RoundMessage] = []
        for message in self.machine.repeat():
            if isinstance(message, Signed) and message.peer == self._me and self._books.votes.said(message) is None:
                continue
            greeting.append(message)
        return greeting

    def _hear(self, peer: str, message: RoundMessage) -> None:
        """Raises RemoteProtocolError for what breaks the rules."""
        if isinstance(message, Joining):
            self.joinings[peer] = message
            self.bell.ring()
        elif isinstance(message, Held) and peer in self.machine.members:
            self._bodies.note(peer, message)
        self.act(self.machine.receive(peer, message, trio.current_time()))

    def _held(self, shard: int, digest: bytes) -> None:
        self.act(self.machine.held(shard, digest, trio.current_time()))

    def _presence_changed(self) -> None:
        present = self.streams.present
        self.joinings = {peer: joining for peer, joining in self.joinings.items() if peer in present}
        self.act(self.machine.present(present, trio.current_time()))
        self.bell.ring()

    async def _watch_clock(self) -> None:
        while True:
            seen = self._alarm.count
            self._sleeps_until = self.machine.wake_at()
            with trio.move_on_at(self._sleeps_until):
                await self._alarm.after(seen)
            await trio.lowlevel.checkpoint()
            if trio.current_time() >= self.machine.wake_at():
                self.act(self.machine.expired(trio.current_time()))

    # ---- what is to be done

    def act(self, actions: Sequence[Action]) -> None:
        """Do these after all that was to be done before."""
        if actions:
            self._todo.extend((self.machine.round, action) for action in actions)
            self._work.ring()
        if self.machine.wake_at() < self._sleeps_until:
            self._alarm.ring()

    async def _perform(self) -> None:
        try:
            while True:
                seen = self._work.count
                while self._todo:
                    await self._do(*self._todo.popleft())
                await self._work.after(seen)
        finally:
            self._tasks = None  # whoever still uses the group starts nothing any more

    async def _do(self, number: int, action: Action) -> None:
        if isinstance(action, Say):
            self.streams.say(action.message)
        elif isinstance(action, Repeat):
            self.streams.repeat(action.peer)
        elif isinstance(action, Remember):
            await self._books.write(partial(self._books.votes.add, action.vote))
        elif isinstance(action, Commit):
            await self._commit(action)
        elif isinstance(action, Name):
            self._ports.event("peer.named", peer=action.peer, round=number, reason=action.reason)
        elif isinstance(action, FallenBehind):
            if action.joining.round == self.machine.round:
                self.differs = action
            self.bell.ring()
        elif number == self.machine.round:
            self._start_work(action)

    def _start_work(self, action: Collect | FetchOffers | Reduce | Decide) -> None:
        if isinstance(action, Collect):
            self._start(self._bodies.collect, action.shard, action.offers)
        elif isinstance(action, FetchOffers):
            self._start(self._fetch_offers, action)
        elif isinstance(action, Reduce):
            self._start(self._reduce, self._bodies, action)
        else:
            self._start(self._decide, self._bodies, action)

    def _start(self, task: Callable[..., Awaitable[object]], *args: object) -> None:
        """Let it run until it is done or the round is over."""
        if self._tasks is not None:
            self._tasks.start_soon(self._in_round, task, args)

    async def _in_round(self, task: Callable[..., Awaitable[object]], args: Sequence[object]) -> None:
        with trio.CancelScope() as scope:
            self._scopes.add(scope)
            try:
                await task(*args)
            finally:
                self._scopes.discard(scope)

    async def _commit(self, action: Commit) -> None:
        number = action.certificate.outcome.round
        self.mark("certified")
        await self._books.write(partial(self._books.certificates.add, [action.certificate]))
        if number >= self.machine.round:
            self.commits.setdefault(number, (action.certificate, action.offers))
        self.bell.ring()

    async def _fetch_offers(self, action: FetchOffers) -> None:
        others = [peer for peer in sorted(self.streams.present) if peer != action.peer]
        # The machine may name ourselves: whoever proposed what all others have agreed on.
        asked = [peer for peer in (action.peer, *others[:MAX_ASKED]) if peer != self._me]
        found = await self.history.fetch_offers(asked, action.digests)
        for offer in found.values():
            try:
                self.act(self.machine.receive(action.peer, offer, trio.current_time()))
            except RemoteProtocolError as error:
                self._ports.event("offer.refused", peer=action.peer, reason=error.reason)

    async def _reduce(self, bodies: Bodies, action: Reduce) -> None:
        while self._reducer.needs_before and self._before is None:
            await self.bell.after(self.bell.count)
        done = await bodies.reduce(action, self._before or ())
        if action.kind == "sum" and self.keeps_results and (result := self._store.get(done.value)) is not None:
            await self._books.write(partial(self._shelf.put_result, bodies.number, done.value, result))
        value = (done.value, done.data, done.size_bytes)
        self.act(self.machine.computed(action.kind, action.plan, action.shard, *value, trio.current_time()))

    async def _decide(self, bodies: Bodies, action: Decide) -> None:
        decision = await bodies.decide(action)
        self.act(self.machine.decided(action.plan, decision, trio.current_time()))

    async def _fetch_before(self, outcome: Outcome) -> None:
        """The results of the last round, in which this peer had no part: the rule measures from them."""
        rest_s = FIRST_REST_S
        while self._before is None:
            try:
                self._before = await self.history.fetch_results(outcome, partial(self.givers, outcome))
                self.bell.ring()
            except RouteUnavailable as error:
                self._ports.event("results.missing", round=outcome.round, reason=str(error))
                await trio.sleep(rest_s)
                rest_s = min(2 * rest_s, LONGEST_REST_S)

    # ---- who has what

    def ahead(self, number: int) -> list[str]:
        """Peers here that say to have applied round `number`, members first; certificates alone prove it."""
        members = self.machine.members
        claims = [peer for peer, joining in self.joinings.items() if joining.round > number]
        return sorted(claims, key=lambda peer: (peer not in members, peer))

    def givers(self, outcome: Outcome, shard: int) -> list[str]:
        """Who should have the result of a shard: its reducers, each asked first by some, then whoever else is here."""
        first: list[str] = []
        members, present = self.machine.members, self.streams.present
        if outcome.round == self.machine.round and self._place.terms.aggregators:
            ring = [peer for peer in reducers(self.machine.beacon, shard, members) if peer in present]
            n_first = min(len(ring), self._place.terms.aggregators)
            turn = members.index(self._me) % n_first if n_first and self._me in members else 0
            first = [*ring[turn:n_first], *ring[:turn]]
        ahead = self.ahead(outcome.round)
        rest = sorted(present, key=lambda peer: (peer not in ahead, peer not in outcome.contributors, peer))
        return [peer for peer in dict.fromkeys([*first, *rest]) if peer != self._me]
