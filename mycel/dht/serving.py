"""The record service: answers other peers' questions from the store and the routing table.

A stream carries any number of requests, answered in order. A peer that asks faster than its budget is answered later; a
peer that breaks the protocol loses the stream.

Ring: shell.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

import trio

from mycel.dht.addresses import sane
from mycel.dht.budget import BudgetLimits, Budgets
from mycel.dht.routing_table import RoutingTable
from mycel.dht.store import ExpiringStore
from mycel.protocols.codec import record_codec
from mycel.protocols.errors import PeerRefused, PeerUnreachable, RemoteProtocolError
from mycel.protocols.messages import FindRecords, Found, RecordMessage, Stored, StoreRecord
from mycel.protocols.ports import Stream


@dataclass(frozen=True, slots=True)
class ServingLimits:
    """closer: how many peers an answer names; idle_s: how long an asking peer may be silent before its stream ends."""

    closer: int = 16
    idle_s: float = 120.0
    send_s: float = 10.0
    streams_per_peer: int = 16
    budget: BudgetLimits = field(default_factory=BudgetLimits)


class RecordService:
    """Handles inbound streams of the records protocol."""

    def __init__(
        self, store: ExpiringStore, table: RoutingTable, clock: Callable[[], float], limits: ServingLimits
    ) -> None:
        self._store = store
        self._table = table
        self._clock = clock
        self._limits = limits
        self._budgets = Budgets(limits.budget)
        self._streams: Counter[str] = Counter()

    async def handle(self, stream: Stream) -> None:
        """Serve one stream until its peer ends it, falls silent or breaks the rules."""
        if self._streams[stream.peer] >= self._limits.streams_per_peer:
            raise PeerRefused(stream.peer, f"{self._limits.streams_per_peer} record streams are open already")
        self._streams[stream.peer] += 1
        try:
            await self._serve(stream)
        except PeerUnreachable:
            pass  # an asking peer that goes away is no event of ours
        finally:
            self._streams[stream.peer] -= 1
            if not self._streams[stream.peer]:
                del self._streams[stream.peer]

    async def _serve(self, stream: Stream) -> None:
        while True:
            frame = None
            with trio.move_on_after(self._limits.idle_s):
                frame = await stream.receive()
            if frame is None:
                return
            await trio.sleep(self._budgets.spend(stream.peer, trio.current_time()))
            try:
                answer = self.answer(stream.peer, record_codec.decode_only(frame), trio.current_time())
            except RemoteProtocolError as error:
                raise RemoteProtocolError(error.reason, stream.peer) from None
            with trio.move_on_after(self._limits.send_s) as patience:
                await stream.send(*record_codec.encode(answer))
            if patience.cancelled_caught:
                raise PeerUnreachable(stream.peer, f"did not take an answer within {self._limits.send_s:g} s")

    def answer(self, peer: str, request: RecordMessage, now: float) -> Found | Stored:
        """The answer to a request of `peer` (authenticated) at `now` (monotonic).

        Raises RemoteProtocolError for a message that is not a request, or that names another sender.
        """
        if not isinstance(request, FindRecords | StoreRecord):
            raise RemoteProtocolError(f"{type(request).__name__} is not a request", peer)
        if request.sender.peer != peer:
            raise RemoteProtocolError("a request names a sender other than its own", peer)
        self._table.heard_from(sane(request.sender), now)
        if isinstance(request, StoreRecord):
            decision = self._store.put(request.record, self._clock())
            return Stored(decision.accepted, decision.reason)
        records = self._store.get(request.key, self._clock()) if request.want_records else ()
        return Found(records, self._table.closest(request.key, self._limits.closer, without=(peer,)))
