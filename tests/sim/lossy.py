"""Streams of one protocol whose messages are lost, doubled and late. Real streams lose nothing: this is the worst."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from random import Random

import trio

from mycel.protocols.codec import Codec
from mycel.protocols.errors import LocalProtocolError, PeerError
from mycel.protocols.messages import Message
from mycel.protocols.ports import Handler, Stream
from tests.sim.transport import SimTransport


@dataclass(eq=False)
class Losses:
    """What becomes of frames of these `kinds` that `protocol` carries; a late one comes after every deadline."""

    protocol: str
    codec: Codec
    kinds: tuple[type[Message], ...]
    dice: Random
    drop: float = 0.0
    double: float = 0.0
    delay: float = 0.0
    delay_s: tuple[float, float] = (3.0, 9.0)
    fates: Counter[str] = field(default_factory=Counter)

    def tap(self, transport: SimTransport) -> None:
        """Put between a node's transport and all who use it, before they do."""
        open_stream, serve = transport.open, transport.serve

        async def open_lossy(peer: str, protocol: str) -> Stream:
            stream = await open_stream(peer, protocol)
            return LossyStream(self, transport, stream) if protocol == self.protocol else stream

        def serve_lossy(protocol: str, handler: Handler) -> None:
            async def handle(stream: Stream) -> None:
                await handler(LossyStream(self, transport, stream))

            serve(protocol, handle if protocol == self.protocol else handler)

        transport.open = open_lossy  # type: ignore[method-assign,assignment]
        transport.serve = serve_lossy  # type: ignore[method-assign]

    def fate(self, frame: bytearray) -> str:
        message, _ = self.codec.decode(frame)
        if not isinstance(message, self.kinds):
            return "spared"
        rolled = self.dice.random()
        for fate, chance in (("dropped", self.drop), ("doubled", self.double), ("delayed", self.delay)):
            if rolled < chance:
                return fate
            rolled -= chance
        return "sent"


class LossyStream:
    """A stream that meets with `Losses`."""

    def __init__(self, losses: Losses, transport: SimTransport, stream: Stream) -> None:
        self._losses, self._transport, self._stream = losses, transport, stream
        self._speaking = trio.Lock()

    @property
    def peer(self) -> str:
        return self._stream.peer

    @property
    def protocol(self) -> str:
        return self._stream.protocol

    async def send(self, *parts: bytes | memoryview) -> None:
        frame = bytearray().join(parts)
        fate = self._losses.fate(frame)
        self._losses.fates[fate] += 1
        if fate == "delayed":
            self._transport.start(self._send_late, frame)
        for _ in range({"dropped": 0, "delayed": 0, "doubled": 2}.get(fate, 1)):
            async with self._speaking:
                await self._stream.send(frame)

    async def _send_late(self, frame: bytearray) -> None:
        await trio.sleep(self._losses.dice.uniform(*self._losses.delay_s))
        try:
            async with self._speaking:
                await self._stream.send(frame)
        except (PeerError, LocalProtocolError):
            pass  # the stream has ended meanwhile, there or here

    async def receive(self) -> memoryview | None:
        return await self._stream.receive()

    async def aclose(self) -> None:
        await self._stream.aclose()

    async def reset(self) -> None:
        await self._stream.reset()
