"""Drives a lookup to its end: asks whom it names, feeds it the answers, and tells it who has been silent for too long.

Questions run in a nursery that outlives the lookup, so that it ends without a silent peer and that peer's own deadline
still ends in the dead list.

Ring: shell.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass

import trio

from mycel.dht.calls import OVERSLEPT_S, Calls
from mycel.dht.lookup import Lookup
from mycel.dht.questions import Questions
from mycel.dht.routing_table import RoutingTable
from mycel.protocols.messages import Found, PeerAddress

_Answer = tuple[str, Found | None]


@dataclass(frozen=True, slots=True)
class Patience:
    """A peer silent for hedge_s is passed over; after give_up_s the lookup goes on without it, if others answered."""

    hedge_s: float = 0.15
    give_up_s: float = 0.8


@dataclass(frozen=True, slots=True)
class Search:
    """How lookups are driven on this node."""

    questions: Questions
    calls: Calls
    table: RoutingTable
    patience: Patience

    async def run(self, lookup: Lookup, nursery: trio.Nursery, *, want_records: bool) -> Lookup:
        """The same lookup, done."""
        asked_at: dict[str, float] = {}
        # Room for every answer: a question of a finished lookup must not wait for a reader.
        send, receive = trio.open_memory_channel[_Answer](lookup.limits.queries)
        with receive:
            while not lookup.done:
                for address in lookup.next_queries():
                    now = trio.current_time()
                    silent_s = self.calls.silent_s(address.peer)
                    if self.table.is_dead(address.peer, now) or silent_s >= self.patience.give_up_s:
                        lookup.failed(address.peer)
                        continue
                    if silent_s >= self.patience.hedge_s:
                        lookup.slow(address.peer)
                    asked_at[address.peer] = now
                    nursery.start_soon(self._ask, address, lookup.key, want_records, send)
                if asked_at and not lookup.done:
                    await self._next_answer(lookup, asked_at, receive)
        return lookup

    async def _next_answer(
        self, lookup: Lookup, asked_at: dict[str, float], receive: trio.MemoryReceiveChannel[_Answer]
    ) -> None:
        """Wait until a peer answers or has been silent for a step too long."""
        patience = self.patience
        # While nobody has answered, a slow peer is all there is: its own deadline ends the wait.
        steps_s = [patience.hedge_s] + [patience.give_up_s] * bool(lookup.closest())
        now = trio.current_time()
        due = [at + step_s for at in asked_at.values() for step_s in steps_s if at + step_s > now]
        wake_at = min(due, default=float("inf"))
        with trio.move_on_at(wake_at):
            peer, found = await receive.receive()
            asked_at.pop(peer, None)
            if found is None:
                lookup.failed(peer)
            else:
                lookup.answered(peer, found.closer, found.records)
        now = trio.current_time()
        if now - wake_at > OVERSLEPT_S:  # we stood still ourselves: their answers may be there, unread
            for peer in asked_at:
                asked_at[peer] += now - wake_at
        for peer, at in tuple(asked_at.items()):
            if now >= at + patience.give_up_s and len(steps_s) == 2:
                lookup.failed(peer)
                del asked_at[peer]
            elif now >= at + patience.hedge_s:
                lookup.slow(peer)

    async def _ask(
        self, address: PeerAddress, key: bytes, want_records: bool, send: trio.MemorySendChannel[_Answer]
    ) -> None:
        found = None
        try:
            found = await self.questions.find(address, key, want_records=want_records)
        finally:  # a question that was cancelled is an answer, too, or its lookup would wait for ever
            with suppress(trio.BrokenResourceError):  # the lookup has ended without this one
                send.send_nowait((address.peer, found))
