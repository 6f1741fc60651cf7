"""What a transport adapter lends to the conformance suite, and the small things that its checks share.

Knows the ports alone: nothing here depends on virtual or real time.
"""

from __future__ import annotations

import random
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import wraps
from typing import Protocol

import trio

from mycel.protocols.errors import PeerError
from mycel.protocols.ports import Stream, Transport

ECHO = "/suite/echo/1"
MUTE = "/suite/mute/1"
FLOOD = "/suite/flood/1"
GREET = "/suite/greet/1"
FAIL = "/suite/fail/1"
PLAIN = "/suite/plain/1"

KIB = 1024
MIB = 1024 * 1024


@dataclass(frozen=True, slots=True)
class Scale:
    """How much of everything: the checks are the same, the fast run does less of them."""

    cancels: int = 300
    streams: int = 300
    cycles: int = 20
    pause_s: float = 0.3  # how long a reader does not read


FAST = Scale()
FULL = Scale(cancels=2000, streams=300, cycles=300, pause_s=7.0)  # 7 s: past py-libp2p's 5 s limit on a blocked writer


class Victim(Protocol):
    """A peer that can be killed: for a real adapter a process of its own, which called `serve_suite`."""

    @property
    def peer_id(self) -> str: ...

    @property
    def addresses(self) -> tuple[str, ...]: ...

    async def kill(self) -> None:
        """SIGKILL: gone without a word, nothing listens any more."""
        ...

    async def stop(self) -> None:
        """SIGSTOP: its kernel still accepts and acknowledges, but nothing answers."""
        ...

    async def cont(self) -> None:
        """SIGCONT."""
        ...


class Rig(Protocol):
    """One check's supply of transports; the adapter's factory ends them all when the check is over."""

    @property
    def scale(self) -> Scale: ...

    @property
    def silence_s(self) -> float:
        """After how long without any sign of life a peer counts as dead."""
        ...

    @property
    def max_in_flight_bytes(self) -> int:
        """The most that one stream may take from a sender whose peer does not read."""
        ...

    async def start(self) -> Transport:
        """A running transport with an identity of its own, that knows nobody; on this event loop."""
        ...

    async def shut_down(self, transport: Transport) -> None:
        """End a transport that `start` gave, in order; when this returns, nothing listens at its addresses."""
        ...

    async def start_victim(self) -> Victim: ...


Check = Callable[[Rig], Awaitable[None]]
CHECKS: list[Check] = []
DEATH_CHECKS: list[Check] = []
SLOW_CHECKS: list[Check] = []


def check(*, to: list[Check], limit_s: float = 30.0) -> Callable[[Check], Check]:
    """Register a check and bound it: a hang is a failure, in virtual time as in real time."""

    def register(function: Check) -> Check:
        @wraps(function)
        async def bounded(rig: Rig) -> None:
            with trio.fail_after(limit_s):
                await function(rig)

        to.append(bounded)
        return bounded

    return register


def check_name(function: Check) -> str:
    """The id of a check in a parametrised test."""
    return getattr(function, "__name__", repr(function))


# ---- handlers that every serving side of the suite has -----------------------------------------------------------


async def echo(stream: Stream) -> None:
    try:
        while (frame := await stream.receive()) is not None:
            await stream.send(frame)
    except PeerError:
        return  # the client's affair: many checks reset or kill their end


async def mute(stream: Stream) -> None:
    """Neither reads nor writes nor ends."""
    await trio.sleep_forever()


async def flood(stream: Stream) -> None:
    """Send until the client is gone."""
    try:
        while True:
            await stream.send(bytes(64 * KIB))
    except PeerError:
        return  # the client is gone


async def greet(stream: Stream) -> None:
    """Return without aclose: the transport has to end the stream."""
    await stream.send(b"hello")


async def fail(stream: Stream) -> None:
    await stream.receive()
    raise RuntimeError("on purpose: a handler that raises")


def serve_suite(transport: Transport) -> None:
    """Give `transport` the handlers that the checks talk to. A victim's process calls this too."""
    for protocol, handler in ((ECHO, echo), (MUTE, mute), (FLOOD, flood), (GREET, greet), (FAIL, fail)):
        transport.serve(protocol, handler)


# ---- what checks share ------------------------------------------------------------------------------------------


async def pair(rig: Rig) -> tuple[Transport, Transport]:
    """A client that knows a server, and the server."""
    client, server = await rig.start(), await rig.start()
    serve_suite(server)
    client.learn(server.peer_id, server.addresses)
    return client, server


@asynccontextmanager
async def accepting(transport: Transport, protocol: str) -> AsyncIterator[trio.MemoryReceiveChannel[Stream]]:
    """Hand the inbound streams of `protocol` to the check itself; their handlers return when the block ends."""
    arrived, inbound = trio.open_memory_channel[Stream](1000)
    done = trio.Event()

    async def handler(stream: Stream) -> None:
        arrived.send_nowait(stream)
        await done.wait()

    transport.serve(protocol, handler)
    try:
        yield inbound
    finally:
        done.set()


@asynccontextmanager
async def two_ends(rig: Rig) -> AsyncIterator[tuple[Stream, Stream]]:
    """Both ends of one fresh stream: the opener's and the handler's."""
    client, server = await pair(rig)
    async with accepting(server, PLAIN) as inbound:
        near = await client.open(server.peer_id, PLAIN)
        far = await inbound.receive()
        yield near, far


def frame_of(index: int, size_bytes: int) -> bytes:
    """A frame that says its number and whose every byte depends on it; at least 4 bytes."""
    return index.to_bytes(4, "big") + random.Random(index).randbytes(max(0, size_bytes - 4))


def index_of(frame: memoryview) -> int:
    """The number of a frame, checked byte for byte."""
    index = int.from_bytes(frame[:4], "big")
    assert frame == frame_of(index, len(frame)), f"frame {index} of {len(frame)} bytes arrived damaged"
    return index


async def assert_echoes(transport: Transport, peer: str, size_bytes: int = 1000) -> None:
    """`peer` is well: a new stream to it echoes a frame and ends."""
    stream = await transport.open(peer, ECHO)
    frame = frame_of(1, size_bytes)
    await stream.send(frame)
    answer = await stream.receive()
    assert answer == frame
    await stream.aclose()


async def read_to_the_end(stream: Stream) -> None:
    while await stream.receive() is not None:
        pass


async def write_for_ever(stream: Stream) -> None:
    """Write until something stops us; an adapter that takes a gigabyte for a peer that reads nothing is broken."""
    for _ in range(16 * KIB):
        await stream.send(bytes(64 * KIB))
    raise AssertionError("1 GiB was taken for a peer that does not read")


async def eventually(condition: Callable[[], bool], limit_s: float = 10.0) -> None:
    """Wait for a fact that no port announces (a heartbeat was measured, a connection left the list)."""
    with trio.fail_after(limit_s):
        while not condition():  # noqa: ASYNC110 - there is no event to wait for
            await trio.sleep(0.005)
