"""The bodies that this peer may have to reduce: fetched from their authors or whoever holds them, and computed from.

Ring: shell.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Protocol

import trio

from mycel.node.events import EventSink
from mycel.node.rounds.blobs import BlobStore
from mycel.protocols.errors import RemoteProtocolError, RouteUnavailable
from mycel.protocols.ports import Compute
from mycel.protocols.rounds import MAX_GROUP, Held, Offer, offer_digest
from mycel.swarm.rounds.actions import Decide, Reduce
from mycel.swarm.rounds.reducer import Row, ShardWork
from mycel.swarm.training.bell import Bell

FIRST_REST_S, LONGEST_REST_S = 0.25, 8.0


class Reducer(Protocol):
    """What a group computes, on the compute thread: equal arguments give equal bytes on every machine."""

    @property
    def needs_before(self) -> bool:
        """Whether `ShardWork.before` matters."""
        ...

    def max_bytes(self, shard: int, n_shards: int) -> int:
        """The longest body of a shard that is worth fetching."""
        ...

    def gram(self, work: ShardWork) -> bytes:
        """float32 upper triangle of the rows' Gram matrix, row by row."""
        ...

    def decide(self, rows: Sequence[Row], grams: Sequence[bytes], plan: bytes) -> bytes:
        """What the rule decides from all shards' matrices; the rows come without bodies."""
        ...

    def reduce(self, work: ShardWork, decision: bytes) -> bytes:
        """The coded result."""
        ...


@dataclass(frozen=True, slots=True)
class Computed:
    """What came of a `Reduce`."""

    value: bytes
    data: bytes
    size_bytes: int


@dataclass(eq=False)
class Bodies:
    """Of one round of a group. `held` is told each body that has arrived: (shard, digest of the offer)."""

    number: int
    n_shards: int
    store: BlobStore
    reducer: Reducer
    compute: Compute
    event: EventSink
    held: Callable[[int, bytes], None]
    _told: set[tuple[int, bytes]] = field(default_factory=set, init=False)
    # Who says that it holds a body, besides its author: (shard, digest of the offer) -> peers.
    _holders: dict[tuple[int, bytes], set[str]] = field(default_factory=dict, init=False)
    _n_first: Counter[str] = field(default_factory=Counter, init=False)
    _known: Bell = field(default_factory=Bell, init=False)

    def note(self, peer: str, held: Held) -> None:
        """`peer` says what it holds."""
        if held.round != self.number or held.shard >= self.n_shards:
            return
        for digest in held.offers:
            holders = self._holders.get((held.shard, digest))
            if holders is None:
                # Who names what nobody offers fills its own share alone.
                self._n_first[peer] += 1
                if self._n_first[peer] > MAX_GROUP * self.n_shards:
                    return
                holders = self._holders[held.shard, digest] = set()
            if peer not in holders and len(holders) < MAX_GROUP:
                holders.add(peer)
                self._known.ring()

    async def hold(self, shard: int, offer: Offer) -> memoryview | None:
        """The body, once somebody gives it: until then tried ever more seldom. None for one that is too long."""
        digest, size_bytes = offer_digest(offer), offer.sizes[shard]
        if size_bytes > self.reducer.max_bytes(shard, self.n_shards):
            reason = f"offers {size_bytes} bytes for shard {shard}, more than the codec makes"
            self.event("offer.refused", peer=offer.peer, round=self.number, reason=reason)
            return None
        rest_s = FIRST_REST_S
        while True:
            seen = self._known.count
            peers = [offer.peer, *sorted(self._holders.get((shard, digest), ()))]
            try:
                body = await self.store.fetch(offer.bodies[shard], size_bytes, peers, self.number)
                break
            except RouteUnavailable as error:
                self.event("body.missing", peer=offer.peer, round=self.number, shard=shard, reason=str(error))
            with trio.move_on_after(rest_s):
                while set(peers) >= self._holders.get((shard, digest), set()):
                    await self._known.after(seen)
                    seen = self._known.count
            rest_s = min(2 * rest_s, LONGEST_REST_S)
        if (shard, digest) not in self._told:
            self._told.add((shard, digest))
            self.held(shard, digest)
        return body

    async def collect(self, shard: int, offers: Sequence[Offer]) -> list[memoryview | None]:
        """The bodies of these offers, in their order."""
        found: dict[int, memoryview | None] = {}

        async def one(number: int, offer: Offer) -> None:
            found[number] = await self.hold(shard, offer)

        async with trio.open_nursery() as nursery:
            for number, offer in enumerate(offers):
                nursery.start_soon(one, number, offer)
        return [found[number] for number in range(len(offers))]

    async def reduce(self, action: Reduce, before: Sequence[memoryview]) -> Computed:
        """Collect what is missing, and compute; a result is kept for who asks for it."""
        offers = with_bodies(action.offers)
        bodies = await self.collect(action.shard, offers)
        # A body that is too long is as good as one that cannot be decoded.
        rows = tuple(
            Row(b"" if body is None else body, offer.weight, offer.staleness)
            for body, offer in zip(bodies, offers, strict=True)
        )
        work = ShardWork(action.plan, action.shard, self.n_shards, rows, tuple(before))
        if action.kind == "gram":
            gram = (await self.compute.run(partial(self.reducer.gram, work))).value
            return Computed(hashlib.sha256(gram).digest(), gram, len(gram))
        try:
            result = (await self.compute.run(partial(self.reducer.reduce, work, action.decision))).value
        except RemoteProtocolError as error:
            # The decision is our own.
            raise AssertionError(f"shard {action.shard} of round {self.number}: {error.reason}") from error
        return Computed(await self.store.put(result, self.number + 1), b"", len(result))

    async def decide(self, action: Decide) -> bytes:
        rows = [
            Row(b"", offer.weight, offer.staleness, offer.peer, standing)
            for offer, standing in zip(with_bodies(action.offers), action.standing, strict=True)
        ]
        return (await self.compute.run(partial(self.reducer.decide, rows, action.grams, action.plan))).value


def with_bodies(offers: Sequence[Offer]) -> list[Offer]:
    """Those that contribute a vector; the others bring scalars alone."""
    return [offer for offer in offers if offer.bodies]
