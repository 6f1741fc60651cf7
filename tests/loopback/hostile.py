"""A peer that keeps to no rule, and what must not change while it tries: other sessions, memory, the node itself."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import psutil
import trio

from mycel.node.client import Model, connect
from mycel.node.libp2p_transport import Libp2pTransport, open_transport
from mycel.node.libp2p_transport.stream import FrameStream
from mycel.protocols import ids
from mycel.protocols.codec import session_codec
from mycel.protocols.errors import PeerError
from mycel.protocols.messages import Generation, Message, OpenHop, PeerAddress, SamplingParams
from mycel.security.identity import Identity
from mycel.swarm.generation import NewToken, Request, RouteChosen, SessionEvent
from mycel.swarm.session import InferenceSession
from tests.conformance.transport_rig import eventually
from tests.loopback.generating import PROMPT, bounded, reference
from tests.loopback.node_process import NodeProcess, Nodes

N_TOKENS = 150
ANSWER_S = 10.0
MIB = 1 << 20
FRAME_OF_4_GB = b"\xff\xff\xff\xff"


@dataclass(frozen=True)
class Hostile:
    """A stranger in the network, the node that it is after, and the session of somebody else there."""

    transport: Libp2pTransport
    victim: NodeProcess
    swarm: bytes
    session: bytes

    @property
    def me(self) -> PeerAddress:
        return PeerAddress(self.transport.peer_id, self.transport.addresses)

    @property
    def node(self) -> PeerAddress:
        return PeerAddress(self.victim.peer, self.victim.serving.addresses)

    async def open(self, protocol: str) -> FrameStream:
        return await self.transport.open(self.victim.peer, protocol)

    async def say(self, protocol: str, *frames: bytes) -> FrameStream:
        """Open a stream and send frames; what is refused meanwhile is no concern of ours."""
        stream = await self.open(protocol)
        with suppress(PeerError):
            for frame in frames:
                await stream.send(frame)
        return stream

    async def say_raw(self, protocol: str, data: bytes) -> FrameStream:
        """Bytes below the frames: half of one, or a length that no frame has."""
        stream = await self.open(protocol)
        stream._mux.write([data], len(data))
        return stream

    async def open_last_hop(self, n_blocks: int, **fields: object) -> tuple[FrameStream, bytes]:
        """A session of our own at the victim, which is its last hop; we are the hop before and the next."""
        session = os.urandom(16)
        start = self.victim.serving.start
        generation = Generation(SamplingParams(), (1, 2, 3), 60)
        given = {"previous": self.me, "next": self.me, "generation": generation, "inbound": 1, "outbound": 1, **fields}
        opening = OpenHop(session, self.swarm, start, n_blocks, 64, **given)  # type: ignore[arg-type]
        return await self.say(ids.SESSION, frame_of(session_codec, opening)), session


def frame_of(codec: object, message: Message, tensors: object = ()) -> bytes:
    return b"".join(codec.encode(message, tensors))  # type: ignore[attr-defined]


async def ended(stream: FrameStream) -> list[memoryview]:
    """What the node still says before it ends the stream or breaks it, which it must do soon."""
    said = []
    with trio.fail_after(ANSWER_S), suppress(PeerError):
        while (frame := await stream.receive()) is not None:
            said.append(frame)
    return said


async def answer(stream: FrameStream) -> memoryview:
    with trio.fail_after(ANSWER_S):
        frame = await stream.receive()
    assert frame is not None
    return frame


Attack = Callable[[Hostile], Awaitable[None]]


def survive(nodes: Nodes, model_path: Path, attack: Attack, *, room_bytes: int = 96 * MIB) -> int:
    """Attack the last hop while somebody generates over it: right tokens, nothing lost, bounded memory.

    `room_bytes`: how much the node may grow meanwhile. Returns how much it did.
    """
    victim = nodes.living[-1]
    watched = psutil.Process(victim.process.pid)
    before_bytes, most_bytes = watched.memory_info().rss, 0
    n_crashes = len(victim.events("handler.crashed"))

    async def watch() -> None:
        nonlocal most_bytes
        while True:
            most_bytes = max(most_bytes, watched.memory_info().rss)
            await trio.sleep(0.02)

    async def main() -> None:
        async with connect(nodes.invite) as model, trio.open_nursery() as nursery:
            nursery.start_soon(watch)
            session, over, begun = os.urandom(16), trio.Event(), trio.Event()

            async def bystand() -> None:
                """One generation after the other, in a session of one name, until the attack is over."""
                while not over.is_set():
                    await generate_undisturbed(model, session, model_path, begun)

            async with trio.open_nursery() as both:
                both.start_soon(bystand)
                await begun.wait()
                async with stranger(victim) as transport:
                    await attack(Hostile(transport, victim, model.watch.swarm, session))
                over.set()
            # And once more, with the attacker gone.
            await generate_undisturbed(model, session, model_path, begun)
            nursery.cancel_scope.cancel()
        await eventually(lambda: len(victim.events("session.closed")) == len(victim.events("session.opened")))

    bounded(main)
    assert victim.alive
    assert [crash["reason"] for crash in victim.events("handler.crashed")[n_crashes:]] == []
    grown_bytes = most_bytes - before_bytes
    assert grown_bytes < room_bytes, f"the node grew by {grown_bytes / MIB:.0f} MiB"
    return grown_bytes


@asynccontextmanager
async def stranger(victim: NodeProcess) -> AsyncIterator[Libp2pTransport]:
    async with open_transport(Identity.generate(), listen=("/ip4/127.0.0.1/tcp/0",)) as transport:
        transport.learn(victim.peer, victim.serving.addresses)
        yield transport


async def generate_undisturbed(model: Model, session_id: bytes, directory: Path, begun: trio.Event) -> None:
    """A generation whose tokens are right and in which no hop is replaced."""
    send, receive = trio.open_memory_channel[SessionEvent](0)
    request = Request(PROMPT, N_TOKENS)
    session = InferenceSession(
        model.network.transport, model.watch, model.watch.swarm, request, send, session_id=session_id
    )
    tokens: list[int] = []
    async with trio.open_nursery() as nursery:
        nursery.start_soon(session.run)
        async for event in receive:
            if isinstance(event, RouteChosen):
                assert event.lost == (), event.lost
            elif isinstance(event, NewToken):
                tokens.append(event.token)
                begun.set()
    assert tokens == reference(directory, PROMPT, N_TOKENS)
