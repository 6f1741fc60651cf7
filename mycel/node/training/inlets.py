"""Streams that peers open to a stage: of trainers, which hear reports on them, and of neighbours, which hear nothing.

What is said on them is handed on, message by message. Who breaks a rule loses the stream, and nothing else happens.

Ring: shell.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

import trio

from mycel.protocols.codec import pipe_codec
from mycel.protocols.errors import PeerError, PeerRefused, PeerTimeout, RemoteProtocolError
from mycel.protocols.ports import Stream
from mycel.protocols.training import Drive, Passed, PipeMessage, WorkFailed
from mycel.protocols.wire import WireTensor

OPENING_PATIENCE_S = 10.0
MAX_STREAMS = 1024
MAX_STREAMS_PER_PEER = 8
# Whose return is noticed; of others, the walks that they left are only found to be old when they walk again.
MAX_TRAINERS = 4096
# Reports that wait for one trainer. Who does not read that many is none.
MAX_REPORTS = 4096

TrainerReport = Passed | WorkFailed
Wires = tuple[WireTensor, ...]


class Listener(Protocol):
    """Whose inlets these are."""

    def take(self, peer: str, message: PipeMessage, wires: Wires, n_bytes: int, *, drives: bool) -> None:
        """A frame of `n_bytes` came, from a trainer if `drives`. Raises RemoteProtocolError to end its stream."""
        ...

    def trainer_returned(self, peer: str) -> None:
        """A peer that drove before begins to drive anew."""
        ...


@dataclass(eq=False, slots=True)
class _Inlet:
    """One stream. `reports` goes back on it if the peer drives."""

    stream: Stream
    reports: trio.MemorySendChannel[TrainerReport] | None = None
    error: PeerError | None = None
    scope: trio.CancelScope = field(default_factory=trio.CancelScope)

    def end(self, error: PeerError) -> None:
        self.error = self.error or error
        self.scope.cancel()


@dataclass(eq=False, slots=True)
class Inlets:
    """All of them; after `close` there are no more."""

    run: bytes
    listener: Listener
    _inlets: set[_Inlet] = field(default_factory=set, init=False)
    _trainers: dict[str, _Inlet] = field(default_factory=dict, init=False)
    _drove: set[str] = field(default_factory=set, init=False)
    _closed: bool = field(default=False, init=False)

    async def serve(self, stream: Stream) -> None:
        """One stream, to its end. Raises PeerError for how it ended, if not in good order."""
        mine = sum(other.stream.peer == stream.peer for other in self._inlets)
        if self._closed or len(self._inlets) >= MAX_STREAMS or mine >= MAX_STREAMS_PER_PEER:
            raise PeerRefused(stream.peer, "this stage takes no more streams")
        inlet = _Inlet(stream)
        self._inlets.add(inlet)
        try:
            with inlet.scope:
                await self._serve(inlet)
        finally:
            self._inlets.discard(inlet)
        if inlet.error is not None:
            raise inlet.error

    def report(self, trainer: str, message: TrainerReport) -> None:
        """Tell a trainer, if it listens."""
        inlet = self._trainers.get(trainer)
        if inlet is None or inlet.reports is None:
            return
        try:
            inlet.reports.send_nowait(message)
        except trio.WouldBlock:
            inlet.end(PeerTimeout(trainer, f"leaves {MAX_REPORTS} reports unread"))
        except trio.BrokenResourceError:
            pass  # its stream is ending

    def end_neighbour(self, peer: str, reason: str) -> None:
        """What a neighbour sent has turned out to be against the rules."""
        for inlet in self._inlets:
            if inlet.stream.peer == peer and inlet.reports is None:
                inlet.end(RemoteProtocolError(reason, peer))

    def close(self, reason: str) -> None:
        self._closed = True
        for inlet in self._inlets:
            inlet.end(PeerRefused(inlet.stream.peer, reason))

    async def _serve(self, inlet: _Inlet) -> None:
        peer = inlet.stream.peer
        frame: memoryview | None = None
        with trio.move_on_after(OPENING_PATIENCE_S) as patience:
            frame = await inlet.stream.receive()
        if patience.cancelled_caught:
            raise PeerTimeout(peer, f"opened a stream and said nothing for {OPENING_PATIENCE_S:.0f} s")
        if frame is None:
            return
        message, wires = pipe_codec.decode(frame)
        if isinstance(message, Drive):
            await self._serve_trainer(inlet, message, wires)
        else:
            self.listener.take(peer, message, wires, len(frame), drives=False)
            await self._listen(inlet, drives=False)

    async def _serve_trainer(self, inlet: _Inlet, message: Drive, wires: Wires) -> None:
        peer = inlet.stream.peer
        if message.run != self.run or wires:
            raise RemoteProtocolError("drives another run", peer)
        if (older := self._trainers.get(peer)) is not None:
            older.end(PeerRefused(peer, "drives over another stream now"))
        inlet.reports, reports = trio.open_memory_channel[TrainerReport](MAX_REPORTS)
        self._trainers[peer] = inlet
        if peer in self._drove:
            self.listener.trainer_returned(peer)
        elif len(self._drove) < MAX_TRAINERS:
            self._drove.add(peer)
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(_say, inlet, reports)
                try:
                    await self._listen(inlet, drives=True)
                except PeerError as error:  # out of a nursery it would come in a group
                    inlet.end(error)
                nursery.cancel_scope.cancel()
        finally:
            if self._trainers.get(peer) is inlet:
                del self._trainers[peer]

    async def _listen(self, inlet: _Inlet, *, drives: bool) -> None:
        while (frame := await inlet.stream.receive()) is not None:
            message, wires = pipe_codec.decode(frame)
            self.listener.take(inlet.stream.peer, message, wires, len(frame), drives=drives)


async def _say(inlet: _Inlet, reports: trio.MemoryReceiveChannel[TrainerReport]) -> None:
    """What a trainer hears, in order."""
    try:
        async for message in reports:
            await inlet.stream.send(*pipe_codec.encode(message))
    except PeerError as error:
        inlet.end(error)
