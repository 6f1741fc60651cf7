"""The second engine as a `Rig`, alone or mixed with the first: transports are of the engines in `engines`, in turn."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import cycle

import pytest
import trio

from mycel.node.hivemind_engine.available import engine_available
from mycel.node.hivemind_engine.p2pd_transport import open_p2pd_transport
from mycel.node.libp2p_transport import TransportLimits, open_transport
from mycel.protocols.ports import Transport
from mycel.security.identity import Identity
from tests.conformance.libp2p_rig import QUICK, ROOT, ProcessVictim
from tests.conformance.transport_suite import FAST, Scale

needs_engine = pytest.mark.skipif(bool(engine_available()), reason=engine_available() or "it is there")

P2PD, LIBP2P = "p2pd", "libp2p"
_PEERS = {P2PD: "tests.conformance.p2pd_echo_peer", LIBP2P: "tests.conformance.echo_peer"}


def open_engine(
    engine: str, limits: TransportLimits = QUICK, listen: tuple[str, ...] = ("/ip4/127.0.0.1/tcp/0",)
) -> AbstractAsyncContextManager[Transport]:
    opener = open_p2pd_transport if engine == P2PD else open_transport
    return opener(Identity.generate(), listen=listen, limits=limits)


@asynccontextmanager
async def engine_victim(engine: str, silence_s: float) -> AsyncIterator[ProcessVictim]:
    """A victim of either engine; it is killed when the block ends, stopped or not."""
    async with trio.open_nursery() as nursery:
        command = [sys.executable, "-W", "error", "-m", _PEERS[engine], str(silence_s)]
        run = partial(trio.run_process, command, cwd=ROOT, check=False, deliver_cancel=_kill)
        process: trio.Process = await nursery.start(partial(run, stdin=subprocess.PIPE, stdout=subprocess.PIPE))
        try:
            assert process.stdout is not None
            text = b""
            with trio.fail_after(60):
                while not text.endswith(b"\n"):
                    more = await process.stdout.receive_some()
                    assert more, f"the victim ended after {text!r}"
                    text += more
            peer_id, address = text.decode().split()
            yield ProcessVictim(process, peer_id, (address,))
        finally:
            nursery.cancel_scope.cancel()


async def _kill(process: trio.Process) -> None:
    process.kill()


@dataclass
class EngineRig:
    """Everything that one check started, each in a task of its own, and ended when the check is over."""

    engines: tuple[str, ...]
    scale: Scale = FAST
    limits: TransportLimits = QUICK
    _over: trio.Event = field(default_factory=trio.Event)
    _running: dict[str, tuple[trio.Event, trio.Event]] = field(default_factory=dict)
    _nursery: trio.Nursery | None = None

    def __post_init__(self) -> None:
        self._next = cycle(self.engines)

    @property
    def silence_s(self) -> float:
        return self.limits.silence_s

    @property
    def max_in_flight_bytes(self) -> int:
        # Go's windows grow up to 16 MiB for readers that were fast, and there are two sockets and a frame beside it.
        return 20 * 1024 * 1024

    async def start(self) -> Transport:
        assert self._nursery is not None
        transport, stop, stopped = await self._nursery.start(self._run)
        self._running[transport.peer_id] = (stop, stopped)
        return transport

    async def _run(self, task_status: trio.TaskStatus[tuple[Transport, trio.Event, trio.Event]]) -> None:
        stop, stopped = trio.Event(), trio.Event()
        try:
            async with open_engine(next(self._next), self.limits) as transport:
                task_status.started((transport, stop, stopped))
                await stop.wait()
        finally:
            stopped.set()

    async def shut_down(self, transport: Transport) -> None:
        stop, stopped = self._running[transport.peer_id]
        stop.set()
        await stopped.wait()

    async def start_victim(self) -> ProcessVictim:
        assert self._nursery is not None
        victim: ProcessVictim = await self._nursery.start(self._run_victim)
        return victim

    async def _run_victim(self, task_status: trio.TaskStatus[ProcessVictim]) -> None:
        async with engine_victim(next(self._next), self.silence_s) as victim:
            task_status.started(victim)
            await self._over.wait()


@asynccontextmanager
async def engine_rig(engines: tuple[str, ...], scale: Scale = FAST) -> AsyncIterator[EngineRig]:
    rig = EngineRig(engines, scale)
    async with trio.open_nursery() as rig._nursery:
        yield rig
        rig._over.set()
        for stop, _ in rig._running.values():
            stop.set()
