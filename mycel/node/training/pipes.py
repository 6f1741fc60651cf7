"""Streams to the neighbours: one for each peer, kept open, with a queue and a task of its own.

So a neighbour that is slow holds up nobody else. A stream that broke is opened anew for the parcel at hand, once; what
cannot be sent is handed back with the reason.

Ring: shell.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import trio

from mycel.protocols import ids
from mycel.protocols.errors import PeerError
from mycel.protocols.messages import PeerAddress
from mycel.protocols.ports import Stream, Transport

# Parcels that wait for one neighbour; they hold no tensors of their own.
MAX_WAITING = 256
# A way may name anybody: so many neighbours at once, and those that get nothing are let go.
MAX_PIPES = 256
IDLE_S = 60.0
_CLOSING_S = 2.0


@dataclass(frozen=True, slots=True)
class Parcel:
    """`pack` makes the frame when its turn comes, or None if nobody wants it any more."""

    pack: Callable[[], list[bytes | memoryview] | None]
    failed: Callable[[str], None]


@dataclass(eq=False, slots=True)
class _Pipe:
    address: PeerAddress
    queue: trio.MemorySendChannel[Parcel]
    waiting: trio.MemoryReceiveChannel[Parcel]
    stream: Stream | None = None


@dataclass(eq=False, slots=True)
class Pipes:
    """All streams to neighbours. Nothing is sent outside of `run`."""

    transport: Transport
    sent_bytes: int = field(default=0, init=False)
    _pipes: dict[str, _Pipe] = field(default_factory=dict, init=False)
    _nursery: trio.Nursery | None = field(default=None, init=False)

    async def run(self) -> None:
        """Send what is posted, until cancelled; then all streams end."""
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            try:
                await trio.sleep_forever()
            finally:
                self._nursery = None  # closed to new arrivals, and what computes may still want to send

    def post(self, address: PeerAddress, parcel: Parcel) -> None:
        """Leave a parcel for a peer."""
        if self._nursery is None:
            return
        pipe = self._pipes.get(address.peer)
        if pipe is None:
            if len(self._pipes) >= MAX_PIPES:
                parcel.failed(f"this peer sends to {MAX_PIPES} others already")
                return
            pipe = _Pipe(address, *trio.open_memory_channel[Parcel](MAX_WAITING))
            self._pipes[address.peer] = pipe
            self._nursery.start_soon(self._serve, pipe)
        if address.addresses:
            pipe.address = address
        try:
            pipe.queue.send_nowait(parcel)
        except trio.WouldBlock:
            parcel.failed(f"takes nothing in: {MAX_WAITING} messages wait for it")

    async def _serve(self, pipe: _Pipe) -> None:
        """One neighbour's task, for as long as there is something to send now and then."""
        try:
            while True:
                with trio.move_on_after(IDLE_S) as patience:
                    parcel = await pipe.waiting.receive()
                if patience.cancelled_caught:
                    return
                await self._deliver(pipe, parcel)
        finally:
            del self._pipes[pipe.address.peer]
            with trio.move_on_after(_CLOSING_S) as closing:
                closing.shield = True
                await _close(pipe)

    async def _deliver(self, pipe: _Pipe, parcel: Parcel) -> None:
        while (parts := parcel.pack()) is not None:
            is_fresh = pipe.stream is None
            try:
                if pipe.stream is None:
                    self.transport.learn(pipe.address.peer, pipe.address.addresses)
                    pipe.stream = await self.transport.open(pipe.address.peer, ids.PIPE)
                await pipe.stream.send(*parts)
            except PeerError as error:
                await _close(pipe)
                if is_fresh:
                    _give_back(pipe, parcel, error.reason)
                    return
            else:
                self.sent_bytes += sum(len(part) for part in parts)
                return


def _give_back(pipe: _Pipe, parcel: Parcel, reason: str) -> None:
    """The neighbour cannot be reached: what else waits for it fares no better."""
    parcel.failed(reason)
    while True:
        try:
            pipe.waiting.receive_nowait().failed(reason)
        except trio.WouldBlock:
            return


async def _close(pipe: _Pipe) -> None:
    stream, pipe.stream = pipe.stream, None
    if stream is not None:
        await stream.reset()
