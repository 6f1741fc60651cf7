"""What this node asks single peers, and what it makes of their answers: checked records, a table that learns.

Every answer is hostile until checked. Whoever answers stands in the routing table afterwards, whoever does not is on
its dead list.

Ring: shell.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence

import trio

from mycel.dht.addresses import MAX_ADDRESSES, sane
from mycel.dht.calls import Calls
from mycel.dht.routing_table import RoutingTable
from mycel.protocols.errors import PeerError, RemoteProtocolError
from mycel.protocols.messages import FindRecords, Found, PeerAddress, SignedRecord, Stored, StoreRecord
from mycel.protocols.ports import Transport
from mycel.security.envelope import check_lifetime, check_record

_MAX_VERIFIED = 4096


class Questions:
    """FindRecords and StoreRecord as function calls that do not raise."""

    def __init__(
        self, transport: Transport, calls: Calls, table: RoutingTable, clock: Callable[[], float], max_ttl_s: float
    ) -> None:
        self._transport = transport
        self._calls = calls
        self._table = table
        self._clock = clock
        self._max_ttl_s = max_ttl_s
        self._verified: OrderedDict[SignedRecord, None] = OrderedDict()  # a signature is checked once, not at each read

    def own_address(self) -> PeerAddress:
        """What we say about ourselves."""
        return PeerAddress(self._transport.peer_id, self._transport.addresses[:MAX_ADDRESSES])

    async def find(self, address: PeerAddress, key: bytes, *, want_records: bool) -> Found | None:
        """What one peer knows about `key` (32 bytes), checked; None if it does not say."""
        self._introduce(address)
        try:
            answer = await self._calls.call(address.peer, FindRecords(self.own_address(), key, want_records))
            if not isinstance(answer, Found):
                raise RemoteProtocolError(f"{type(answer).__name__} is no answer to FindRecords", address.peer)
            records = tuple(self._believable(answer.records, key, address.peer))
        except PeerError:
            self._table.failed(address, trio.current_time())
            return None
        self._table.heard_from(self._table.address_of(address.peer) or address, trio.current_time())
        return Found(records, tuple(map(sane, answer.closer)))

    async def store(self, address: PeerAddress, record: SignedRecord) -> bool:
        """Whether a peer now holds `record`."""
        self._introduce(address)
        try:
            answer = await self._calls.call(address.peer, StoreRecord(self.own_address(), record))
            if not isinstance(answer, Stored):
                raise RemoteProtocolError(f"{type(answer).__name__} is no answer to StoreRecord", address.peer)
        except PeerError:
            self._table.failed(address, trio.current_time())
            return False
        return answer.accepted

    def _believable(self, records: Sequence[SignedRecord], key: bytes, peer: str) -> Iterator[SignedRecord]:
        """The records that are alive. A forged one, or one of another key, breaks the rules: a holder checks, too."""
        now = self._clock()
        for record in records:
            try:
                check_lifetime(record, now, self._max_ttl_s)
            except RemoteProtocolError:
                continue  # clocks differ, and it may have ended on its way
            if record.key != key:
                raise RemoteProtocolError("a record of another key", peer)
            if record not in self._verified:
                check_record(record, now, self._max_ttl_s)
                self._verified[record] = None
            self._verified.move_to_end(record)
            while len(self._verified) > _MAX_VERIFIED:
                self._verified.popitem(last=False)
            yield record

    def _introduce(self, address: PeerAddress) -> None:
        """Tell the transport where to dial; what others say about a peer does not displace what it said itself."""
        known = self._table.address_of(address.peer)
        self._transport.learn(address.peer, address.addresses if known is None else known.addresses)
