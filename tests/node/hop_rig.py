"""One hop in the simulated world, between peers that say whatever the test has them say."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

import msgspec
import torch
import trio

from mycel.node.hop_service import HopLimits, HopService
from mycel.node.kv_budget import KVBudget
from mycel.protocols import ids
from mycel.protocols.codec import ring_codec, session_codec
from mycel.protocols.errors import LocalProtocolError, PeerUnreachable
from mycel.protocols.messages import (
    Attach,
    Attached,
    Generation,
    HopOpened,
    Message,
    NextToken,
    OpenHop,
    PeerAddress,
    Relink,
    SamplingParams,
    Step,
)
from mycel.protocols.ports import Stream
from mycel.protocols.tensors import from_wire, to_wire
from mycel.protocols.wire import WireTensor
from tests.sim.compute import SimCompute
from tests.sim.faults import WorldOptions
from tests.sim.toy import ToyPart, ToySpan
from tests.sim.transport import SimTransport
from tests.sim.world import World, run_world

SWARM, SESSION = bytes(range(32)), bytes(16)
N_BLOCKS = 8
KV_BYTES = 80 * 1024
PROMPT = (5, 17, 3, 88, 41)
GENERATION = Generation(SamplingParams(), PROMPT, 20)


@dataclass
class Rig:
    """A hop that serves blocks 2:6 (or others), a client, and the hops before and after it, which the test plays."""

    world: World
    span: ToySpan = field(default_factory=lambda: ToySpan(2, 6, N_BLOCKS))
    limits: HopLimits = field(default_factory=HopLimits)
    received: list[tuple[str, Message]] = field(default_factory=list)
    hidden: list[torch.Tensor] = field(default_factory=list)
    failures: list[BaseException] = field(default_factory=list)
    links: dict[str, list[Stream]] = field(default_factory=dict)  # as they were opened by the hop
    ended: list[Stream] = field(default_factory=list)  # by the test
    # What each of them answers to Attach; who is not named stays silent.
    lacking: dict[str, int] = field(default_factory=lambda: {"before": 0, "after": 0, "stranger": 0})

    def __post_init__(self) -> None:
        for name in ("hop", "client", "before", "after", "stranger"):
            self.world.add_node(name)
        self.service = HopService(
            self.hop, SWARM, self.span, SimCompute(self.world, "hop"), KVBudget(KV_BYTES), self._event, self.limits
        )
        self.service.start()
        for name in ("before", "after", "stranger"):
            self.world.node(name).serve(ids.RING, self._receiver(name))
            self.world.node(name).learn(self.hop.peer_id, self.hop.addresses)
        self.world.node("client").learn(self.hop.peer_id, self.hop.addresses)

    def _event(self, what: str, /, **fields: object) -> None:
        self.world.record(what, *(str(value) for value in fields.values()))

    @property
    def hop(self) -> SimTransport:
        return self.world.node("hop")

    def address(self, name: str) -> PeerAddress:
        return PeerAddress(self.world.node(name).peer_id, self.world.node(name).addresses)

    def opening(self, start: int = 2, end: int = 6, **changes: object) -> OpenHop:
        previous, following = self.address("before"), self.address("after")
        usual = OpenHop(SESSION, SWARM, start, end, 40, previous, following, inbound=1, outbound=1)
        return msgspec.structs.replace(usual, **changes)

    def _receiver(self, name: str) -> Callable[[Stream], Awaitable[None]]:
        async def receive(stream: Stream) -> None:
            self.links.setdefault(name, []).append(stream)
            try:
                while (frame := await stream.receive()) is not None:
                    message, tensors = ring_codec.decode(frame)
                    self.received.append((name, message))
                    if isinstance(message, Attach) and name in self.lacking:
                        await stream.send(*ring_codec.encode(Attached(self.lacking[name])))
                    self.hidden += [from_wire(tensor) for tensor in tensors]
            except PeerUnreachable as error:
                self.failures.append(error)
            except LocalProtocolError:
                if stream not in self.ended:
                    raise

        return receive

    async def cut(self, name: str) -> None:
        """Break the newest link that the hop has to `name`, and nothing else."""
        self.ended.append(self.links[name][-1])
        await self.ended[-1].reset()

    async def end_link(self, name: str) -> None:
        """End the newest link that the hop has to `name`, from that side and in good order."""
        self.ended.append(self.links[name][-1])
        await self.ended[-1].aclose()

    async def open(self, opening: OpenHop, client: str = "client") -> tuple[Stream, Message]:
        stream = await self.world.node(client).open(self.hop.peer_id, ids.SESSION)
        await stream.send(*session_codec.encode(opening))
        return stream, await heard(stream)

    async def opened(self, opening: OpenHop | None = None) -> Stream:
        stream, answer = await self.open(opening or self.opening())
        assert answer == HopOpened()
        return stream

    async def attach(self, name: str = "before", link: int = 1) -> Stream:
        stream = await self.world.node(name).open(self.hop.peer_id, ids.RING)
        await stream.send(*ring_codec.encode(Attach(SESSION, link)))
        return stream

    async def relink(
        self, control: Stream, previous: str, following: str, inbound: int, outbound: int, *spare: str | int
    ) -> None:
        message = Relink(self.address(previous), self.address(following), inbound, outbound)
        if spare:
            name, number = spare
            message = msgspec.structs.replace(message, spare=self.address(str(name)), spare_link=number)
        await control.send(*session_codec.encode(message))

    def positions(self, name: str = "after") -> list[int]:
        return [
            message.position for who, message in self.received if who == name and isinstance(message, Step | NextToken)
        ]


def run(scenario: Callable[[Rig], Awaitable[None]], window_bytes: int = 1 << 20, **changes: object) -> World:
    async def main(world: World) -> None:
        await scenario(Rig(world, **changes))  # type: ignore[arg-type]

    return run_world(1, main, options=WorldOptions(window_bytes=window_bytes))


async def heard(stream: Stream) -> Message:
    """What a hop tells its client next; it must say something in time."""
    with trio.fail_after(60):
        frame = await stream.receive()
    assert frame is not None
    return session_codec.decode_only(frame)


async def ended(stream: Stream) -> str:
    """How the other side ended a stream: "" cleanly, or what the reset says."""
    with trio.fail_after(120):
        try:
            while await stream.receive() is not None:
                pass
        except PeerUnreachable as error:
            return error.reason
    return ""


def inputs(position: int, count: int) -> tuple[Step, WireTensor]:
    """Hidden states that blocks 0:2 of the toy would give for tokens 1, 2, 3, ..."""
    part = ToyPart(0, 2, N_BLOCKS)
    hidden_TD = part.forward(torch.arange(1, position + count + 1), part.new_cache())
    return Step(position, ()), to_wire(hidden_TD[position:])


async def push(link: Stream, position: int, count: int) -> None:
    step, tensor = inputs(position, count)
    await link.send(*ring_codec.encode(step, [tensor]))


def outputs(count: int) -> torch.Tensor:
    """What blocks 0:6 of the toy give for `count` tokens."""
    part = ToyPart(0, 6, N_BLOCKS)
    return part.forward(torch.arange(1, count + 1), part.new_cache())
