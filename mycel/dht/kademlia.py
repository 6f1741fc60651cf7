"""A Kademlia network of record holders over the Transport port: the `RecordStore` of a node.

Records go to the peers nearest to their key, are read from several of them and merged by newest. The decisions are in
`lookup`, `routing_table` and `store`, the talking is in `search` and `questions`; this file says what happens when.

Ring: shell.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from hashlib import sha256

import trio

from mycel.dht.addresses import sane
from mycel.dht.calls import CallLimits, Calls
from mycel.dht.keys import key_in_bucket, position_of
from mycel.dht.lookup import Lookup, LookupLimits
from mycel.dht.questions import Questions
from mycel.dht.records import newer
from mycel.dht.routing_table import RoutingTable, TableLimits
from mycel.dht.search import Patience, Search
from mycel.dht.serving import RecordService, ServingLimits
from mycel.dht.store import ExpiringStore, StoreLimits
from mycel.protocols import ids
from mycel.protocols.errors import LocalProtocolError, RemoteProtocolError
from mycel.protocols.messages import PeerAddress, SignedRecord
from mycel.protocols.ports import Transport
from mycel.security.envelope import check_record
from mycel.security.signatures import Signer


@dataclass(frozen=True, slots=True)
class KademliaParams:
    """replicas: holders of a record; parallel: questions at once; enough_replicas: answers that a read waits for.

    refresh_s: how often the routing table is renewed (rejoin_s while it is empty); quiet_s: when to probe a quiet peer.
    """

    replicas: int = 8
    parallel: int = 6
    enough_replicas: int = 3
    refresh_s: float = 30.0
    rejoin_s: float = 3.0
    quiet_s: float = 60.0
    tick_s: float = 1.0
    patience: Patience = field(default_factory=Patience)
    calls: CallLimits = field(default_factory=CallLimits)
    serving: ServingLimits = field(default_factory=ServingLimits)
    table: TableLimits = field(default_factory=TableLimits)
    store: StoreLimits = field(default_factory=StoreLimits)


DEFAULTS = KademliaParams()
_MAX_BOOTSTRAP = 16  # of all joins together, the newest first


class Kademlia:
    """This node's part of the record network. `clock` gives unix time in seconds.

    `run` serves, refreshes and repeats; without it (as while a node shuts down) the verbs of the port still work.
    """

    def __init__(
        self,
        transport: Transport,
        identity: Signer,
        clock: Callable[[], float],
        params: KademliaParams = DEFAULTS,
    ) -> None:
        self._transport = transport
        self._own_peer = identity.peer_id
        self._clock = clock
        self.params = params
        self.table = RoutingTable(self._own_peer, params.table)
        self.held = ExpiringStore(self.table.own_position, params.store)
        self._service = RecordService(self.held, self.table, clock, params.serving)
        self._calls = Calls(transport, params.calls)
        self._questions = Questions(transport, self._calls, self.table, clock, params.store.max_ttl_s)
        self._search = Search(self._questions, self._calls, self.table, params.patience)
        self._nursery: trio.Nursery | None = None
        self._bootstrap: tuple[PeerAddress, ...] = ()
        # Our records, when (unix time) to repeat them, and who was nearest to their keys when they were last given out.
        self._own: dict[bytes, tuple[SignedRecord, float, frozenset[str]]] = {}
        self._n_refreshes = 0

    # ---- the port --------------------------------------------------------------------------------------------------

    async def put(self, record: SignedRecord) -> int:
        """Store a record with the peers nearest to its key; the number of peers that now hold it, this one included.

        Our own records are repeated every third of their lifetime, and to newcomers near the key within tick_s.
        Raises LocalProtocolError for a record that is not valid.
        """
        try:
            check_record(record, self._clock(), self.params.store.max_ttl_s)
        except RemoteProtocolError as error:
            raise LocalProtocolError(f"not stored: {error.reason}") from None
        if record.writer == self._own_peer:
            mine = self._own[record.key][0] if record.key in self._own else record
            if newer(mine, record) == record:
                self._schedule(record)
        return await self._replicate(record)

    async def get(self, key: bytes) -> tuple[SignedRecord, ...]:
        """The newest valid record of each writer under `key`, in order of writer id."""
        lookup = await self._look_up(key, want_records=True)
        merged = dict(lookup.records)
        now = self._clock()
        for record in self.held.get(key, now):
            merged[record.writer] = newer(merged.get(record.writer, record), record)
        return tuple(merged[writer] for writer in sorted(merged) if merged[writer].expires_at > now)

    async def find_peer(self, peer: str) -> PeerAddress | None:
        """Where a peer can be dialled, or None unless it answers."""
        if peer == self._own_peer:
            return self._questions.own_address()
        lookup = await self._look_up(position_of(peer), want_records=False)
        found = next((address for address in lookup.closest() if address.peer == peer), None)
        return found and (self.table.address_of(peer) or found)

    # ---- life ------------------------------------------------------------------------------------------------------

    async def join(self, bootstrap: Sequence[PeerAddress]) -> int:
        """Enter the network through known peers, this one's own id ignored; how many of them answered.

        Once one has answered, the slow ones are not waited for. All are asked again for as long as `run` runs whenever
        they are missing from the routing table, also those of earlier joins, so a node that starts before its bootstrap
        peers, or is cut off from them, finds them later.
        """
        joined = {address.peer: sane(address) for address in bootstrap if address.peer != self._own_peer}
        earlier = (address for address in self._bootstrap if address.peer not in joined)
        self._bootstrap = (*joined.values(), *earlier)[: max(len(joined), _MAX_BOOTSTRAP)]
        if self._nursery is not None:
            await self._meet(tuple(joined.values()), self._nursery)
        else:
            await self._ask_all(tuple(joined.values()))
        answered = sum(peer in self.table for peer in joined)
        if len(self.table):
            await self._explore(n_buckets=4)
        return answered

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Serve, refresh, repeat and expire until cancelled; started once the service is registered."""
        if self._nursery is not None:
            raise LocalProtocolError("this record store is running already")
        self._transport.serve(ids.RECORDS, self._service.handle)
        try:
            async with trio.open_nursery() as nursery:
                self._nursery = nursery
                try:
                    task_status.started()
                    nursery.start_soon(self._refresh_for_ever)
                    await self._tick(nursery)
                finally:
                    self._nursery = None  # before its last tasks have ended: it can start no others
        finally:
            with trio.CancelScope(deadline=trio.current_time() + 2.0, shield=True):
                await self._calls.close_idle(older_than_s=0.0)

    async def _tick(self, nursery: trio.Nursery) -> None:
        while True:
            await trio.sleep(self.params.tick_s)
            self.held.sweep(self._clock())
            self._repeat_own(nursery)
            await self._calls.close_idle()

    def _repeat_own(self, nursery: trio.Nursery) -> None:
        now = self._clock()
        for key, (record, due, nearest) in tuple(self._own.items()):
            if record.expires_at <= now:
                del self._own[key]
            elif due <= now or self._nearest(key) - nearest:  # a newcomer may be asked before it is told
                self._schedule(record)
                nursery.start_soon(self._replicate, record)

    def _schedule(self, record: SignedRecord) -> None:
        """Remember a record of ours, to be repeated after a third of what is left of it, or to new holders."""
        now = self._clock()
        due = now + max(self.params.tick_s, (record.expires_at - now) / 3)
        self._own[record.key] = (record, due, self._nearest(record.key))

    def _nearest(self, key: bytes) -> frozenset[str]:
        """The peers that should hold the records under `key`, as far as this node knows."""
        return frozenset(address.peer for address in self.table.closest(key, self.params.replicas))

    async def _refresh_for_ever(self) -> None:
        due = self._next_refresh()
        while True:
            await trio.sleep(self.params.rejoin_s)
            if len(self.table) and trio.current_time() < due:
                continue
            due = self._next_refresh()
            await self._ask_bootstrap()
            await self._ask_all(self.table.to_probe(trio.current_time(), self.params.quiet_s, count=16))
            if len(self.table):
                await self._explore(n_buckets=1)

    def _next_refresh(self) -> float:
        """When to refresh again: spread by a hash, so that nodes that started together do not refresh together."""
        self._n_refreshes += 1
        spread = sha256(f"{self._own_peer}/{self._n_refreshes}".encode()).digest()[0] / 256
        return trio.current_time() + self.params.refresh_s * (0.75 + spread / 2)

    async def _explore(self, n_buckets: int) -> None:
        """Meet the peers around our own position, and those of the next `n_buckets` buckets in turn."""
        await self._look_up(self.table.own_position, want_records=False)
        buckets = self.table.farthest_buckets(16)
        for turn in range(min(n_buckets, len(buckets))):
            index = buckets[(self._n_refreshes + turn) % len(buckets)]
            key = key_in_bucket(self.table.own_position, index, salt=self._n_refreshes)
            await self._look_up(key, want_records=False)

    async def _ask_bootstrap(self) -> None:
        await self._ask_all([address for address in self._bootstrap if address.peer not in self.table])

    async def _meet(self, addresses: Sequence[PeerAddress], nursery: trio.Nursery) -> None:
        """Say hello to each, until all have answered or failed, or one has answered and the others are slow."""
        send, receive = trio.open_memory_channel[None](len(addresses))

        async def hello(address: PeerAddress) -> None:
            try:
                await self._say_hello(address)
            finally:  # cancelled with `run`, too, or we would wait for ever
                with suppress(trio.BrokenResourceError):
                    send.send_nowait(None)

        for address in addresses:
            nursery.start_soon(hello, address)
        patience = trio.CancelScope()
        with receive, patience:
            for _ in addresses:
                await receive.receive()
                if any(address.peer in self.table for address in addresses):
                    patience.deadline = min(patience.deadline, trio.current_time() + self.params.patience.hedge_s)

    async def _ask_all(self, addresses: Sequence[PeerAddress]) -> None:
        """A sign of life from each; whoever gives none goes to the dead list."""
        async with trio.open_nursery() as nursery:
            for address in addresses:
                nursery.start_soon(self._say_hello, address)

    async def _say_hello(self, address: PeerAddress) -> None:
        await self._questions.find(address, self.table.own_position, want_records=False)

    # ---- asking ----------------------------------------------------------------------------------------------------

    async def _look_up(self, key: bytes, *, want_records: bool) -> Lookup:
        """Everything that a lookup of `key` finds, starting from the routing table."""
        params = self.params
        enough = params.enough_replicas if want_records else 0
        limits = LookupLimits(wanted=params.replicas, parallel=params.parallel, enough_replicas=enough)
        if (tasks := self._nursery) is not None:
            lookup = Lookup(key, self._own_peer, limits, self.table.closest(key, 2 * params.replicas))
            await self._search.run(lookup, tasks, want_records=want_records)
            if self._nursery is tasks:
                return lookup
        # Not running, or not any more, which ended the questions: the last word of a node still has to get out.
        lookup = Lookup(key, self._own_peer, limits, self.table.closest(key, 2 * params.replicas))
        async with trio.open_nursery() as nursery:
            await self._search.run(lookup, nursery, want_records=want_records)
            nursery.cancel_scope.cancel()
        return lookup

    async def _replicate(self, record: SignedRecord) -> int:
        """Give a record to this node and to the nearest peers that accept it; how many hold it."""
        here = self.held.put(record, self._clock()).accepted
        lookup = await self._look_up(record.key, want_records=False)
        targets = iter(lookup.closest())
        accepted: list[str] = []

        async def give() -> None:
            for address in targets:  # shared: the next holder in place of one that failed or refused
                if await self._questions.store(address, record):
                    accepted.append(address.peer)
                    return

        async with trio.open_nursery() as nursery:
            for _ in range(self.params.replicas):
                nursery.start_soon(give)
        return here + len(accepted)
