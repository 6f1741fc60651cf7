"""Can others dial me? A peer that asks is dialled back, on the host that it is seen to come from and on no other.

So nobody can have a third party dialled or scanned in our name: what an asker learns is which ports of its own host
lead to a peer. Each look is a connection of its own whose other end proves its peer id, so that a listener of somebody
else is not taken for the asker. The rules stand in reach_rules.py.

Ring: shell.
"""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field

import trio

from mycel.node.endpoints import parse_endpoint
from mycel.node.events import EventSink, no_events
from mycel.node.reach_rules import NOT_TRIED, Asks, ReachLimits, refusal
from mycel.protocols.codec import reach_codec
from mycel.protocols.errors import PeerError, PeerTimeout, PeerUnreachable, RemoteProtocolError
from mycel.protocols.ids import REACH
from mycel.protocols.messages import Dialled, DialMe, DialResult, ReachMessage
from mycel.protocols.ports import Handler, Stream, Transport

__all__ = ["ReachLimits", "ask_to_dial", "serve_reach"]

_MAX_REASON_CHARS = 400

CameFrom = Callable[[str], Sequence[str]]
Probe = Callable[[str, str, float], Awaitable[None]]


@dataclass(slots=True)
class _Service:
    came_from: CameFrom
    probe: Probe
    limits: ReachLimits
    clock: Callable[[], float]
    event: EventSink
    asks: Asks
    open_streams: dict[str, int] = field(default_factory=dict)

    async def handle(self, stream: Stream) -> None:
        """One question, one answer."""
        peer = stream.peer
        mine = self.open_streams.get(peer, 0)
        if mine >= self.limits.streams_per_peer or sum(self.open_streams.values()) >= self.limits.streams:
            return  # an end before any answer
        self.open_streams[peer] = mine + 1
        try:
            answer = await self._answer(peer, await self._question(stream))
            with trio.move_on_after(self.limits.message_s):
                await stream.send(*reach_codec.encode(answer))
        finally:
            self.open_streams[peer] -= 1
            if not self.open_streams[peer]:
                del self.open_streams[peer]

    async def _question(self, stream: Stream) -> DialMe:
        frame = None
        with trio.move_on_after(self.limits.message_s) as patience:
            frame = await stream.receive()
        if patience.cancelled_caught:
            raise PeerTimeout(stream.peer, f"opened {REACH} and asked nothing")
        message = _decoded(frame, stream.peer)
        if not isinstance(message, DialMe):
            raise RemoteProtocolError(f"{type(message).__name__} is not a question", stream.peer)
        return message

    async def _answer(self, peer: str, question: DialMe) -> Dialled:
        seen = list(self.came_from(peer))
        addresses = list(dict.fromkeys(question.addresses))
        refused = {address: why for address in addresses if (why := refusal(address, seen))}
        todo = [address for address in addresses if address not in refused]
        if todo and (why := self.asks.admit(peer, trio.current_time())):
            refused |= dict.fromkeys(todo, why)
            todo = []
        failures = {address: NOT_TRIED + why for address, why in refused.items()}
        if todo:
            failures |= await self._dial(peer, todo)
            n_found = sum(not failures[address] for address in todo)
            self.event("reach.dialled", peer=peer, addresses=" ".join(todo), found=n_found)
        results = tuple(DialResult(address, failures[address][:_MAX_REASON_CHARS]) for address in addresses)
        return Dialled(results, seen[0] if seen else "", self.clock())

    async def _dial(self, peer: str, addresses: Sequence[str]) -> dict[str, str]:
        """Why the peer was not found, by address; "" where it was."""
        failures: dict[str, str] = {}
        lanes = trio.CapacityLimiter(self.limits.dials_at_once)

        async def look(address: str) -> None:
            endpoint = parse_endpoint(address)
            assert endpoint is not None
            async with lanes:
                try:
                    await self.probe(endpoint.peer or peer, endpoint.multiaddr, self.limits.dial_s)
                    failures[address] = ""
                except PeerError as error:
                    failures[address] = error.reason or type(error).__name__

        self.asks.running += 1
        try:
            async with trio.open_nursery() as nursery:
                for address in addresses:
                    nursery.start_soon(look, address)
        finally:
            self.asks.running -= 1
        return failures


def serve_reach(
    came_from: CameFrom,
    probe: Probe,
    *,
    limits: ReachLimits | None = None,
    clock: Callable[[], float] = time.time,
    event: EventSink = no_events,
) -> tuple[str, Handler]:
    """Protocol and handler for `Transport.serve`.

    `came_from(peer)` gives the multiaddrs that a peer's own connections come from, and `probe(peer, address, within_s)`
    proves that the peer answers there or raises a PeerError; the libp2p adapter has both. `clock` is unix time.
    """
    limits = limits or ReachLimits()
    return REACH, _Service(came_from, probe, limits, clock, event, Asks(limits)).handle


async def ask_to_dial(
    transport: Transport, peer: str, addresses: Sequence[str] = (), *, clock: Callable[[], float] = time.time
) -> tuple[Dialled, float]:
    """Ask a peer to dial `addresses` (8 at most); its answer, and how far its clock is ahead of ours in seconds.

    An address may name the peer that has to answer there (/p2p/<peer id>); else it is the asker. Without addresses the
    answer still says where we were seen and what time it is there. Patience is the caller's. Raises PeerError.
    """
    asked = tuple(dict.fromkeys(addresses))
    stream = await transport.open(peer, REACH)
    try:
        await stream.send(*reach_codec.encode(DialMe(asked)))
        answer = _decoded(await stream.receive(), peer)
        received_at = clock()
        if not isinstance(answer, Dialled) or tuple(result.address for result in answer.results) != asked:
            raise RemoteProtocolError("did not answer what it was asked", peer)
        # It wrote the time down last, half a round trip ago.
        return answer, answer.unix_time_s - (received_at - (transport.rtt_s(peer) or 0.0) / 2)
    finally:
        await stream.reset()  # one question, one answer: nothing more is to come


def _decoded(frame: memoryview | None, peer: str) -> ReachMessage:
    if frame is None:
        raise PeerUnreachable(peer, "ended the stream before it had said everything")
    try:
        return reach_codec.decode_only(frame)
    except RemoteProtocolError as error:
        raise RemoteProtocolError(error.reason, peer) from None
