"""The last rounds of a group, for those that were away: certificates, offers, results; and the way forward from there.

A chain of certificates is believed from the genesis on, each by the members that the one before it names.

Ring: shell.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import trio

from mycel.node.events import EventSink
from mycel.node.rounds.blobs import BlobStore
from mycel.node.rounds.shelf import Shelf
from mycel.node.rounds.vote_book import Books
from mycel.protocols.errors import PeerError, PeerRefused, RemoteProtocolError, RouteUnavailable
from mycel.protocols.rounds import (
    Certificate,
    Certificates,
    GetCertificates,
    GetOffers,
    NotHere,
    Offer,
    Offers,
    Outcome,
    offer_digest,
)

# Rounds whose offers and results are kept for others, and how many bytes of results those before the last two may have.
KEPT_ROUNDS = 8
MAX_KEPT_BYTES = 256 << 20
# Certificates in one answer: of the largest groups they have 30 KB each.
ANSWER_CERTIFICATES = 64
# Offers in one answer: of one with scalars at most 8 KB, of one with bodies 10 KB.
ANSWER_OFFERS = 256
# Questions for certificates that one peer may ask at once, and then a second.
ASK_BURST, ASKS_PER_SECOND, MOST_ASKERS = 64.0, 8.0, 1024

Check = Callable[[Outcome, Certificate], None]


@dataclass(frozen=True, slots=True)
class Decided:
    """A round that is over: its certificate, and what it is about as far as it was had."""

    certificate: Certificate
    offers: tuple[Offer, ...]
    results: tuple[memoryview, ...]


@dataclass(eq=False)
class History:
    """Answers for one group, and asks others.

    `check` raises VerificationError for a certificate that does not follow an outcome; `offers` are those of the round
    in hand, by their digests.
    """

    place: tuple[bytes, str]
    store: BlobStore
    books: Books
    event: EventSink
    check: Check
    offers: Callable[[], Mapping[bytes, Offer]]
    shelf: Shelf
    _kept: dict[int, Decided] = field(default_factory=dict, init=False)
    _offers: dict[bytes, Offer] = field(default_factory=dict, init=False)
    _asked: dict[str, tuple[float, float]] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        self.store.hook = self._answer

    def keep(self, decided: Decided) -> None:
        """Let others have this round's offers and results for some rounds."""
        number = decided.certificate.outcome.round
        self._kept[number] = decided
        n_bytes = 0
        for older in sorted(self._kept, reverse=True):
            n_bytes += sum(map(len, self._kept[older].results))
            if older <= number - KEPT_ROUNDS or (older < number - 1 and n_bytes > MAX_KEPT_BYTES):
                del self._kept[older]
            else:
                for digest in self._kept[older].certificate.outcome.results:
                    self.store.keep(digest, number + 1)
        kept = self._kept.values()
        self._offers = {digest: o for round_ in kept for digest, o in _named(round_)}

    def _answer(self, peer: str, question: GetCertificates | GetOffers) -> Certificates | Offers | NotHere:
        if isinstance(question, GetCertificates):
            if not self._may_ask(peer):
                return NotHere("asks too often")
            # A short read from a file that is being used: it is in the system's memory.
            return Certificates(
                self.books.certificates.newest, self.books.certificates.read(question.start, ANSWER_CERTIFICATES)
            )
        in_hand, asked = self.offers(), dict.fromkeys(question.digests)
        offers = [self._offers.get(digest) or in_hand.get(digest) for digest in asked]
        found = tuple(offer for offer in offers[:ANSWER_OFFERS] if offer is not None)
        return Offers(found) if found else NotHere("none of these offers is kept here")

    def _may_ask(self, peer: str) -> bool:
        """Certificates are read from a file: whoever asked without end would keep this node from all else."""
        now = trio.current_time()
        if len(self._asked) > MOST_ASKERS:
            self._asked.clear()
        allowed, at_s = self._asked.get(peer, (ASK_BURST, now))
        allowed = min(ASK_BURST, allowed + (now - at_s) * ASKS_PER_SECOND) - 1
        self._asked[peer] = (max(allowed, 0.0), now)
        return allowed >= 0

    # ---- asking

    async def fetch_chain(self, peers: Sequence[str], end: int) -> None:
        """Have certificates up to round `end` in the book, checked. Raises RouteUnavailable if nobody gives them."""
        for peer in peers:
            try:
                while self.books.certificates.newest < end:
                    await self._fetch_some(peer)
                return
            except PeerError as error:
                self.event("certificates.failed", peer=peer, reason=error.reason, kind=type(error).__name__)
        if self.books.certificates.newest < end:
            raise RouteUnavailable((), f"no peer gave the certificate of round {self.books.certificates.newest + 1}")

    async def _fetch_some(self, peer: str) -> None:
        start = self.books.certificates.newest + 1
        answer = await self.store.ask(peer, GetCertificates(*self.place, start))
        if not isinstance(answer, Certificates):
            raise RemoteProtocolError("gave something else than certificates", peer)
        if not answer.certificates:
            raise PeerRefused(peer, f"has no certificate of round {start}")
        if answer.certificates[0].outcome.round != start:
            raise RemoteProtocolError(f"gave other certificates than from round {start} on", peer)
        try:
            await self.books.write(partial(self._add_checked, answer.certificates))
        except PeerError as error:  # whoever signed what, this peer says that it follows
            raise RemoteProtocolError(f"gave a chain that does not hold: {error.reason}", peer) from None

    def _add_checked(self, certificates: Sequence[Certificate]) -> None:
        last = self.books.certificates.outcome(self.books.certificates.newest)
        for certificate in certificates:
            if certificate.outcome.round <= self.books.certificates.newest:
                continue  # another task was quicker
            self.check(last, certificate)
            self.books.certificates.add([certificate])
            last = certificate.outcome

    async def fetch_offers(self, peers: Sequence[str], digests: Sequence[bytes]) -> dict[bytes, Offer]:
        """Offers by their digests, as many as these peers give. Their signatures are not looked at."""
        found: dict[bytes, Offer] = {}
        for peer in peers:
            missing = tuple(digest for digest in digests if digest not in found)
            if not missing:
                break
            try:
                answer = await self.store.ask(peer, GetOffers(*self.place, missing))
            except PeerError as error:
                self.event("offers.failed", peer=peer, reason=error.reason, kind=type(error).__name__)
                continue
            given = answer.offers if isinstance(answer, Offers) else ()
            found |= {digest: offer for offer in given if (digest := offer_digest(offer)) in missing}
        return found

    async def fetch_round(
        self, certificate: Certificate, known: Sequence[Offer], givers: Callable[[int], Sequence[str]]
    ) -> Decided:
        """All that a round is about, the results of each shard from its givers. Raises RouteUnavailable."""
        outcome = certificate.outcome
        offers = {offer_digest(offer): offer for offer in known}
        offers |= {d: offer for d in outcome.offers if d not in offers and (offer := self.offers().get(d)) is not None}
        if not offers.keys() >= set(outcome.offers):
            offers |= {offer_digest(offer): offer for offer in await self._from_shelf(outcome)}
        if missing := [digest for digest in outcome.offers if digest not in offers]:
            offers |= await self.fetch_offers(givers(0), missing)
        if not offers.keys() >= set(outcome.offers):
            raise RouteUnavailable((), f"no peer gave the offers of round {outcome.round}")
        results = await self.fetch_results(outcome, givers)
        return Decided(certificate, tuple(offers[digest] for digest in outcome.offers), results)

    async def _from_shelf(self, outcome: Outcome) -> tuple[Offer, ...]:
        """The offers of a round that is on disk; its results are then in the store."""
        found = (await self.books.disk.run(partial(self.shelf.take, outcome))).value
        if found is None:
            return ()
        for digest, result in zip(outcome.results, found[1], strict=True):
            self.store.put_hashed(digest, result, outcome.round + 1)
        return found[0]

    async def _own_results(self, outcome: Outcome) -> None:
        """Those that this peer computed in a life before this one, for itself and for whoever asks."""
        for digest in outcome.results:
            if self.store.get(digest) is None:
                result = (await self.books.disk.run(partial(self.shelf.result, outcome.round, digest))).value
                if result is not None:
                    self.store.put_hashed(digest, memoryview(result), outcome.round + 1)

    async def shelve(self, decided: Decided) -> None:
        """Have a round on disk."""
        outcome = decided.certificate.outcome
        await self.books.write(partial(self.shelf.put, outcome, decided.offers, decided.results))

    async def fetch_results(self, outcome: Outcome, givers: Callable[[int], Sequence[str]]) -> tuple[memoryview, ...]:
        """The coded results of all shards, from here or from others. Raises RouteUnavailable."""
        if any(self.store.get(digest) is None for digest in outcome.results):
            await self._from_shelf(outcome)
            await self._own_results(outcome)
        found: dict[int, memoryview] = {}
        failures: list[RouteUnavailable] = []

        async def one(shard: int, digest: bytes, size_bytes: int) -> None:
            try:
                found[shard] = await self.store.fetch(digest, size_bytes, givers(shard), outcome.round + 1)
            except RouteUnavailable as error:
                failures.append(error)

        async with trio.open_nursery() as nursery:
            for shard, (digest, size_bytes) in enumerate(zip(outcome.results, outcome.sizes, strict=True)):
                nursery.start_soon(one, shard, digest, size_bytes)
        if failures:
            raise failures[0]
        return tuple(found[shard] for shard in range(len(outcome.results)))


def _named(decided: Decided) -> list[tuple[bytes, Offer]]:
    """A round's offers with their digests, as the outcome lists them."""
    return list(zip(decided.certificate.outcome.offers, decided.offers, strict=True))
