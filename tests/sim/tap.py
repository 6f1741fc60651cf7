"""A node's streams with an ear and a tongue: messages are noted in the world's log, and a liar changes them.

Lies are of the kinds that whoever hears them can refuse; a false number that looks like a true one would pass.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import msgspec
import torch

from mycel.protocols import ids
from mycel.protocols.codec import Codec, handover_codec, ring_codec, session_codec
from mycel.protocols.messages import Message, NextToken, Step
from mycel.protocols.ports import Handler, Stream
from mycel.protocols.tensors import from_wire, to_wire
from mycel.protocols.wire import WireTensor

if TYPE_CHECKING:
    from tests.sim.transport import SimTransport
    from tests.sim.world import World

Lie = Literal["", "nan", "shape", "gap", "garbage"]
CODECS: dict[str, Codec] = {ids.SESSION: session_codec, ids.RING: ring_codec, ids.HANDOVER: handover_codec}


class Tap:
    """Put between a node's transport and all who use it, before they do."""

    def __init__(self, world: World, transport: SimTransport) -> None:
        self.lie: Lie = ""
        self._world, self._name = world, transport.name
        open_stream, serve = transport.open, transport.serve

        async def open_tapped(peer: str, protocol: str) -> Stream:
            return TappedStream(self, await open_stream(peer, protocol), protocol)

        def serve_tapped(protocol: str, handler: Handler) -> None:
            async def handle(stream: Stream) -> None:
                await handler(TappedStream(self, stream, protocol))

            serve(protocol, handle)

        transport.open = open_tapped  # type: ignore[method-assign,assignment]
        transport.serve = serve_tapped  # type: ignore[method-assign]

    def note(self, peer: str, message: Message) -> None:
        self._world.record("said", self._name, self._world.name_of(peer), type(message).__name__)


class TappedStream:
    """A stream whose sender notes each message, and lies if its node does."""

    def __init__(self, tap: Tap, stream: Stream, protocol: str) -> None:
        self._tap, self._stream, self._codec = tap, stream, CODECS.get(protocol)

    @property
    def peer(self) -> str:
        return self._stream.peer

    @property
    def protocol(self) -> str:
        return self._stream.protocol

    async def send(self, *parts: bytes | memoryview) -> None:
        if self._codec is not None:
            message, tensors = self._codec.decode(bytearray().join(parts))
            self._tap.note(self.peer, message)
            if self._tap.lie and self._codec is ring_codec:
                parts = tuple(falsified(message, tensors, self._tap.lie))
        await self._stream.send(*parts)

    async def receive(self) -> memoryview | None:
        return await self._stream.receive()

    async def aclose(self) -> None:
        await self._stream.aclose()

    async def reset(self) -> None:
        await self._stream.reset()


def falsified(message: Message, tensors: tuple[WireTensor, ...], lie: Lie) -> list[bytes | memoryview]:
    """What a liar sends in place of a frame of the ring. Attach stays true, or nobody would listen."""
    if lie == "garbage" and isinstance(message, Step | NextToken):
        return [b"\x07\x00\x00\x00garbage"]
    if isinstance(message, NextToken):
        change = {"position": message.position + 1000} if lie == "gap" else {"token": 2**31 - 1}
        return ring_codec.encode(msgspec.structs.replace(message, **change))
    if not isinstance(message, Step):
        return ring_codec.encode(message, tensors)
    hidden_TD = from_wire(tensors[0]).clone()
    if lie == "gap":
        return ring_codec.encode(msgspec.structs.replace(message, position=message.position + 1000), tensors)
    if lie == "nan":
        hidden_TD[-1, 0] = torch.nan
    else:
        hidden_TD = hidden_TD.repeat(1, 2)
    return ring_codec.encode(message, [to_wire(hidden_TD)])
