"""Bytes that an offer of one-byte updates takes at the socket: libp2p over TCP, counted by a proxy between two peers.

Counted is all that the sender's transport writes for the message: its own framing, yamux, noise and the signature.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field

import trio

from mycel.node.events import no_events
from mycel.node.libp2p_transport import open_transport
from mycel.node.rounds.round_streams import RoundDoor, RoundStreams
from mycel.protocols.messages import PeerAddress
from mycel.protocols.rounds import Joining, Offer, Outcome, RoundMessage, outcome_digest
from mycel.security.identity import Identity
from mycel.security.signatures import verify
from mycel.swarm.rounds.statements import make_offer, signed_part
from mycel.swarm.rounds.terms import genesis
from mycel.swarm.training.bell import Bell

__all__ = ["wire_bytes"]

RUN, SCOPE = bytes(range(32)), "run"


@dataclass(eq=False)
class _Counter:
    """A TCP proxy in front of a port; `n_bytes` have gone to it."""

    port: int
    n_bytes: int = 0

    async def carry(self, near: trio.SocketStream) -> None:
        with suppress(trio.BrokenResourceError, trio.ClosedResourceError):
            far = await trio.open_tcp_stream("127.0.0.1", self.port)
            async with near, far, trio.open_nursery() as nursery:
                nursery.start_soon(self._pump, near, far, True)
                nursery.start_soon(self._pump, far, near, False)

    async def _pump(self, source: trio.SocketStream, sink: trio.SocketStream, counts: bool) -> None:
        with suppress(trio.BrokenResourceError, trio.ClosedResourceError):
            async for data in source:
                self.n_bytes += len(data) * counts
                await sink.send_all(data)


@dataclass(eq=False)
class _Peer:
    """One end: what it says first, and what it has heard."""

    joining: Joining
    heard: list[RoundMessage] = field(default_factory=list)
    bell: Bell = field(default_factory=Bell)

    def hear(self, _: str, message: RoundMessage) -> None:
        self.heard.append(message)
        self.bell.ring()

    async def until(self, count: int) -> None:
        while len(self.heard) < count:
            await self.bell.after(self.bell.count)

    def streams(self, door: RoundDoor) -> RoundStreams:
        return RoundStreams(
            door, (RUN, SCOPE), no_events, lambda: [self.joining], self.hear, self.bell.ring, lambda _: True
        )


async def wire_bytes(n_updates: int, n_messages: int = 20) -> Sequence[int]:
    """What each of so many offers of `n_updates` updates takes, one a round, each checked by the peer that gets it."""
    found: list[int] = []
    sender, receiver = Identity.from_seed(bytes([1]) * 32), Identity.from_seed(bytes([2]) * 32)
    first = genesis(RUN, SCOPE, sender.peer_id)
    near, far = _Peer(_joining(first, bytes(32))), _Peer(_joining(first, bytes(32)))
    async with open_transport(receiver) as there, open_transport(sender) as here, trio.open_nursery() as nursery:
        listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
        counter = _Counter(int(there.addresses[0].split("/")[4]))
        nursery.start_soon(trio.serve_listeners, counter.carry, listeners)
        saying, hearing = near.streams(RoundDoor(here)), far.streams(RoundDoor(there))
        nursery.start_soon(saying.run)
        nursery.start_soon(hearing.run)
        port = listeners[0].socket.getsockname()[1]
        saying.meet(PeerAddress(receiver.peer_id, (f"/ip4/127.0.0.1/tcp/{port}",)))
        await far.until(1)
        outcome, codes = first, bytes(range(256)) * (n_updates // 256 + 1)
        for number in range(1, n_messages + 1):
            state = number.to_bytes(32, "little")
            near.joining = _joining(outcome, state)
            saying.say(near.joining)
            await far.until(2 * number)
            before = counter.n_bytes
            offer = make_offer(sender, outcome, state, weight=n_updates, scalars=codes[:n_updates])
            saying.say(offer)
            await far.until(2 * number + 1)
            found.append(counter.n_bytes - before)
            got = far.heard[-1]
            if not (isinstance(got, Offer) and got == offer and verify(got.peer, got.signature, signed_part(got))):
                raise AssertionError("another offer arrived than was said")
            outcome = Outcome(
                RUN, SCOPE, number, outcome_digest(outcome), (), (), (), (), bytes(32), first.members, (0,)
            )
        nursery.cancel_scope.cancel()
    return found


def _joining(outcome: Outcome, state: bytes) -> Joining:
    return Joining(RUN, SCOPE, outcome.round + 1, outcome_digest(outcome), state)


def show_wire() -> None:
    for n_updates in (64, 256, 1024):
        sizes = trio.run(wire_bytes, n_updates)
        typical = statistics.median(sizes)
        print(
            f"wire    {n_updates} updates a message: payload {n_updates} bytes, at the socket {typical:.0f} "
            f"(least {min(sizes)}, most {max(sizes)} of {len(sizes)} messages), {typical / n_updates:.3f} an update",
            flush=True,
        )
