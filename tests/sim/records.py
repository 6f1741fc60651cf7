"""The `RecordStore` port as an oracle: nodes nearest to a key hold its records, without any protocol between them.

For tests of what stands above records. The real store, `mycel.dht.kademlia`, runs in a world too, over `SimTransport`.
"""

from __future__ import annotations

from collections.abc import Iterator

import trio

from mycel.dht.keys import distance, position_of
from mycel.dht.records import newer
from mycel.dht.store import ExpiringStore, StoreLimits
from mycel.protocols.errors import LocalProtocolError, RemoteProtocolError
from mycel.protocols.messages import PeerAddress, SignedRecord
from mycel.security.envelope import check_record
from tests.sim.transport import SimTransport
from tests.sim.world import World


class SimRecords:
    """Who holds what in a world. `staleness_s`: a holder takes up to this long to show what it was given."""

    def __init__(self, world: World, *, copies: int = 8, staleness_s: float = 0.0) -> None:
        self.world, self.copies, self.staleness_s = world, copies, staleness_s
        self.limits = StoreLimits()
        self._held: dict[SimTransport, ExpiringStore] = {}  # by life: a restarted node holds nothing

    def held(self, node: SimTransport) -> ExpiringStore:
        return self._held.setdefault(node, ExpiringStore(position_of(node.peer_id), self.limits))

    def reachable(self, name: str) -> Iterator[SimTransport]:
        """The nodes that node `name` can talk to, itself included."""
        for node in self.world.nodes():
            if not node.crashed and (node.name == name or not self.world.is_cut(name, node.name)):
                yield node


class SimRecordStore:
    """The store as node `name` sees it."""

    def __init__(self, records: SimRecords, name: str) -> None:
        self._records, self._world, self._name = records, records.world, name

    async def put(self, record: SignedRecord) -> int:
        now_s = self._world.unix_time_s()
        try:
            check_record(record, now_s, self._records.limits.max_ttl_s)
        except RemoteProtocolError as error:
            raise LocalProtocolError(f"not stored: {error.reason}") from None
        await self._round_trip()
        nearest = sorted(
            self._records.reachable(self._name), key=lambda node: distance(position_of(node.peer_id), record.key)
        )
        holders = nearest[: self._records.copies]
        for holder in holders:
            delay_s = self._records.staleness_s * self._world.chances(1)[0]
            self._world.agenda.after(delay_s, lambda holder=holder: self._show(holder, record))
        await trio.lowlevel.checkpoint()
        return len(holders)

    def _show(self, holder: SimTransport, record: SignedRecord) -> None:
        decision = self._records.held(holder).put(record, self._world.unix_time_s())
        self._world.record("stored", holder.name, record.key[:4].hex(), str(record.seq), decision.reason)

    async def get(self, key: bytes) -> tuple[SignedRecord, ...]:
        await self._round_trip()
        merged: dict[str, SignedRecord] = {}
        for holder in self._records.reachable(self._name):
            for record in self._records.held(holder).get(key, self._world.unix_time_s()):
                merged[record.writer] = newer(merged.get(record.writer, record), record)
        return tuple(merged[writer] for writer in sorted(merged))

    async def find_peer(self, peer: str) -> PeerAddress | None:
        await self._round_trip()
        for node in self._records.reachable(self._name):
            if node.peer_id == peer:
                return PeerAddress(peer, node.addresses)
        return None

    async def _round_trip(self) -> None:
        await trio.sleep(2 * self._world.options.link.latency_s)
