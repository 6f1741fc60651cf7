"""A group's rounds on a real network: contribute, wait for what the round brings, apply it, go on.

Who uses a group contributes to the round in hand, waits for `committed`, applies what it brings and says `applied` with
the hash of its state. Who has been away gets the rounds that it missed in the same way, one after the other, or is told
that it needs the state of another.

Ring: shell.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import trio

from mycel.node.rounds.bodies import Reducer
from mycel.node.rounds.driving import FIRST_REST_S, LONGEST_REST_S, Driver
from mycel.node.rounds.group_port import Committed, Contribution, GroupPlace, GroupPorts, NeedState, Standing
from mycel.node.rounds.history import KEPT_ROUNDS, Decided
from mycel.node.rounds.shelf import Shelf
from mycel.node.rounds.vote_book import Books
from mycel.protocols.errors import LocalProtocolError, RouteUnavailable
from mycel.protocols.messages import PeerAddress
from mycel.protocols.rounds import NOTHING, Certificate, Offer, Outcome
from mycel.swarm.rounds.actions import FallenBehind
from mycel.swarm.rounds.membership import gathering
from mycel.swarm.rounds.statements import make_offer
from mycel.swarm.rounds.terms import genesis
from mycel.swarm.training.bell import Bell

__all__ = ["Committed", "Contribution", "Group", "GroupPlace", "GroupPorts", "NeedState", "Standing"]

# Tries to get what a round was about before the state of somebody who has it is asked for instead.
MAX_TRIES = 4
# Who is one round behind waits so long for the certificate that is probably on its way.
CERTIFICATE_GRACE_S = 1.0
# Who says to be ahead is asked for certificates alone for so long; then the next one, too.
CHAIN_TURN_S = 2.0


class Group:
    """One peer's part in a group. Everything happens while `run` does.

    `folder` outlives the process: what we signed, and the certificates. A folder is one peer's, for one group.
    """

    def __init__(
        self, place: GroupPlace, ports: GroupPorts, reducer: Reducer, folder: Path, standing: Standing
    ) -> None:
        self.place = place
        self._ports, self._standing = ports, standing
        self._store = ports.blobs.store(*place.key)
        self._books = Books.of(folder, genesis(place.run, place.scope, place.founder), ports.disk)
        self._shelf = Shelf(folder / "rounds")
        self._driver = Driver(place, ports, self._books, self._shelf, reducer)
        # The rule measures from the last results: without them a group could not go on after all of it died.
        self._needs_shelf = self._driver.keeps_results = standing.keeps_rounds or reducer.needs_before
        self._handed: Committed | NeedState | None = None

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Take part until cancelled. Raises ConfigError if what is in the folder cannot be used."""
        try:
            await self._books.open()
            newest = self._books.certificates.newest
            # A state after a round of which no certificate is left is as good as none until others give it.
            known = self._standing if self._standing.round <= newest else Standing(NOTHING, newest)
            async with trio.open_nursery() as tasks:
                self._driver.launch(tasks, self._books.certificates.outcome(known.round), known.state)
                tasks.start_soon(self._follow)
                task_status.started()
        finally:
            self._books.close()
            self._store.close()

    # ---- what is seen from outside

    @property
    def bell(self) -> Bell:
        """Rings when a round begins or is over, what `committed` gives changes, and somebody comes or goes."""
        return self._driver.bell

    @property
    def round(self) -> int:
        """The round in hand."""
        return self._driver.machine.round

    @property
    def phase(self) -> str:
        return self._driver.machine.phase

    @property
    def beacon(self) -> bytes:
        return self._driver.machine.beacon

    @property
    def members(self) -> tuple[str, ...]:
        return self._driver.machine.members

    @property
    def is_member(self) -> bool:
        return self._driver.machine.is_member

    @property
    def state(self) -> bytes:
        """The SHA-256 of the state that this peer has."""
        return self._driver.machine.state

    @property
    def has_begun(self) -> bool:
        """Whether there have been enough members for rounds to take contributions."""
        return not gathering(self._driver.machine.outcome, self.place.terms)

    @property
    def n_shards(self) -> int:
        """Into how many bodies a vector is cut."""
        return self.place.terms.n_shards

    @property
    def is_over(self) -> bool:
        """Whether the round in hand takes no contribution any more."""
        return self.round in self._driver.commits or self._handed is not None

    @property
    def present(self) -> frozenset[str]:
        """Peers that speak to us."""
        return self._driver.streams.present

    @property
    def addresses(self) -> dict[str, tuple[str, ...]]:
        """Where peers that speak to us say that they can be dialled."""
        return {peer: joining.addresses for peer, joining in self._driver.joinings.items() if joining.addresses}

    @property
    def times(self) -> dict[str, float]:
        """When the round in hand got how far: "begun", "offered", "certified", "fetched" (trio's clock)."""
        return dict(self._driver.times)

    @property
    def said_bytes(self) -> int:
        """Statements sent, to all peers together."""
        return self._driver.streams.sent_bytes

    @property
    def given_bytes(self) -> int:
        """Bodies and results given, to all peers together."""
        return self._store.given_bytes

    @property
    def fetched_bytes(self) -> int:
        """Bodies and results fetched."""
        return self._store.fetched_bytes

    @property
    def states(self) -> dict[str, tuple[int, bytes]]:
        """Of the peers here: the round that their state is after, and its SHA-256, as they say."""
        return {peer: (joining.round - 1, joining.state) for peer, joining in self._driver.joinings.items()}

    def meet(self, address: PeerAddress) -> None:
        """Speak to this peer from now on."""
        self._driver.streams.meet(address)

    def look_on(self) -> None:
        """Be no member: hear all that is said, and have nobody wait for what we do not contribute."""
        self._driver.want("observer")

    # ---- a round

    async def next_round(self, after: int) -> int:
        """The round in hand, once it is one after that."""
        while self.round <= after:
            await self.bell.after(self.bell.count)
        return self.round

    async def contribute(self, contribution: Contribution, number: int) -> bool:
        """Offer this for round `number`; False if it is not wanted: another round is in hand, or one was offered.

        Raises LocalProtocolError for bodies of another number than `n_shards`.
        """
        if contribution.bodies and len(contribution.bodies) != self.n_shards:
            raise LocalProtocolError(f"{len(contribution.bodies)} bodies for {self.n_shards} shards")
        if not self._is_wanted(number):
            return False
        digests = [await self._store.put(body, number + 1) for body in contribution.bodies]
        if not self._is_wanted(number):
            return False
        offer = make_offer(
            self._ports.signer,
            self._driver.machine.outcome,
            self.state,
            weight=contribution.weight,
            bodies=digests,
            sizes=[memoryview(body).nbytes for body in contribution.bodies],
            scalars=contribution.scalars,
            staleness=contribution.staleness,
        )
        self._driver.offer(offer)
        return True

    def _is_wanted(self, number: int) -> bool:
        # What was offered in a life before this one stands: another offer would be a lie.
        return number == self.round and self.is_member and self._driver.machine.my_offer is None and not self.is_over

    async def committed(self) -> Committed | NeedState:
        """The next round that is over, until it is `applied`; or why there is none to apply before `resume`."""
        while self._handed is None:
            await self.bell.after(self.bell.count)
        return self._handed

    def applied(self, state: bytes) -> None:
        """What `committed` gave is applied; `state` is the SHA-256 of the state after it."""
        done = self._handed
        if not isinstance(done, Committed):
            raise LocalProtocolError("there is nothing to apply")
        self._handed = None
        self._driver.enter(done.certificate, done.results, state)

    async def saved(self, number: int) -> None:
        """The state after round `number` is on disk: earlier rounds need not be."""
        await self._books.write(partial(self._shelf.drop, number - 1))

    async def resume(self, number: int, state: bytes) -> None:
        """The state after round `number`, with this SHA-256, is here: go on from it.

        Raises RouteUnavailable if nobody gives the certificates up to that round.
        """
        if not isinstance(self._handed, NeedState):
            raise LocalProtocolError("no state was asked for")
        await self._driver.history.fetch_chain(self._driver.ahead(number), number)
        self._handed = None
        self._driver.start_from(self._books.certificates.outcome(number), state)

    def accuse(self, peer: str, reason: str) -> None:
        """Have this round convict a member: for what every honest one knows of it. Again in each round."""
        self._driver.act(self._driver.machine.accuse(peer, reason, trio.current_time()))

    async def outcome_of(self, number: int) -> Outcome:
        """What round `number` decided, certified. Raises RouteUnavailable if nobody gives the certificates up to it."""
        await self._driver.history.fetch_chain(self._driver.ahead(number), number)
        return self._books.certificates.outcome(number)

    async def leave(self) -> None:
        """Ask the others to go on without us: done once we are no member any more."""
        self._driver.want("leave")
        while self.is_member:
            await self.bell.after(self.bell.count)

    # ---- rounds that are over

    async def _follow(self) -> None:
        """Hand over each round that is over, and have those that were missed."""
        while True:
            seen = self.bell.count
            if self._handed is not None:
                await self.bell.after(seen)
            elif (commit := self._commit()) is not None:
                await self._hand_over(*commit)
            elif self._driver.differs is not None:
                self._look_at_state(self._driver.differs)
            elif self._driver.ahead(self.round):
                await self._catch_up()
            else:
                await self.bell.after(seen)

    def _commit(self) -> tuple[Certificate, tuple[Offer, ...]] | None:
        """Of the round in hand, if it is over; the certificate may have been in the book for long."""
        commits, number = self._driver.commits, self.round
        if number not in commits and number <= self._books.certificates.newest:
            [certificate] = self._books.certificates.read(number, 1)
            commits[number] = (certificate, ())
        return commits.get(number)

    async def _hand_over(self, certificate: Certificate, offers: tuple[Offer, ...]) -> None:
        """Let the user have a round once all of it is here."""
        outcome, rest_s, tries = certificate.outcome, FIRST_REST_S, 0
        self._driver.mark("certified")
        while True:
            ahead = self._driver.ahead(outcome.round)
            newest = self._books.certificates.newest
            is_lost = self.state == NOTHING or tries >= MAX_TRIES or newest >= self.round + KEPT_ROUNDS
            if ahead and is_lost:
                self._need_state(ahead, f"round {outcome.round} cannot be made up for")
                return
            if self.state != NOTHING and (decided := await self._fetch_round(certificate, offers)) is not None:
                break
            tries += 1
            with trio.move_on_after(rest_s):
                while self._driver.ahead(outcome.round) == ahead:
                    await self.bell.after(self.bell.count)
            rest_s = min(2 * rest_s, LONGEST_REST_S)
        self._driver.mark("fetched")
        self._driver.history.keep(decided)
        if self._needs_shelf:
            await self._driver.history.shelve(decided)
        if not self._standing.keeps_rounds:
            await self.saved(outcome.round - 1)
        accepted = self._ports.signer.peer_id in outcome.contributors
        self._handed = Committed(certificate, decided.offers, decided.results, accepted)
        self._ports.event("round.committed", round=outcome.round, offers=len(outcome.offers), **self._took())
        self.bell.ring()

    async def _fetch_round(self, certificate: Certificate, offers: tuple[Offer, ...]) -> Decided | None:
        outcome = certificate.outcome
        try:
            return await self._driver.history.fetch_round(certificate, offers, partial(self._driver.givers, outcome))
        except RouteUnavailable as error:
            self._ports.event("results.missing", round=outcome.round, reason=str(error))
            return None

    def _took(self) -> dict[str, float]:
        """Seconds from the beginning of the round to each mark."""
        times = self._driver.times
        return {f"{what}_s": round(at_s - times["begun"], 6) for what, at_s in times.items() if what != "begun"}

    def _look_at_state(self, differing: FallenBehind) -> None:
        """Most members share another state than mine, and are in this round."""
        self._driver.differs = None
        if (differing.joining.round, differing.joining.state) != (self.round, self.state):
            self._need_state([differing.peer, *self._of_state(differing.joining.state)], differing.reason)

    async def _catch_up(self) -> None:
        """Have the certificates up to where others are; each is then handed over as if it had come in time.

        Whoever says to be ahead may be a liar who keeps us waiting: that ends as soon as this round is over here.
        """
        async with trio.open_nursery() as nursery:

            async def until_over() -> None:
                while not self.is_over:
                    await self.bell.after(self.bell.count)
                nursery.cancel_scope.cancel()

            nursery.start_soon(until_over)
            if not self._driver.ahead(self.round + 1):
                await trio.sleep(CERTIFICATE_GRACE_S)
            ahead = self._driver.ahead(self.round)
            for peer in ahead:
                done = trio.Event()
                nursery.start_soon(self._follow_peer, peer, done)
                with trio.move_on_after(CHAIN_TURN_S):
                    await done.wait()
                if self._books.certificates.newest >= self.round:
                    break
            if self._books.certificates.newest < self.round:
                await trio.sleep(LONGEST_REST_S / 4)
            nursery.cancel_scope.cancel()

    async def _follow_peer(self, peer: str, done: trio.Event) -> None:
        """Have the certificates of the rounds that this peer says are over."""
        try:
            if (joining := self._driver.joinings.get(peer)) is not None:
                await self._driver.history.fetch_chain([peer], joining.round - 1)
        except RouteUnavailable as error:
            self._ports.event("certificates.missing", round=self.round, reason=str(error))
        done.set()

    def _of_state(self, state: bytes) -> list[str]:
        """Peers in the round in hand that say to have it."""
        joinings = self._driver.joinings.items()
        return sorted(peer for peer, joining in joinings if (joining.round, joining.state) == (self.round, state))

    def _need_state(self, peers: Sequence[str], reason: str) -> None:
        joinings = self._driver.joinings
        peers = [peer for peer in dict.fromkeys(peers) if peer in joinings]
        if not peers:
            return  # gone meanwhile
        said = Counter((joinings[peer].round, joinings[peer].state) for peer in peers)
        peers.sort(key=lambda peer: -said[joinings[peer].round, joinings[peer].state])
        # Of rounds that no certificate here is of nobody knows whether they have been.
        number = min(max(joinings[peer].round - 1 for peer in peers), self._books.certificates.newest)
        self._handed = NeedState(number, tuple(peers), {peer: joinings[peer].state for peer in peers}, reason)
        self._ports.event("round.state_needed", round=number, reason=reason)
        self.bell.ring()
