"""The real adapter as a `Rig`: transports on 127.0.0.1 in this process, victims in processes of their own."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import trio

from mycel.node.libp2p_transport import Libp2pTransport, TransportLimits, open_transport
from mycel.protocols.ports import Transport
from mycel.security.identity import Identity
from tests.conformance.transport_suite import FAST, Scale

ROOT = Path(__file__).resolve().parent.parent.parent
# As fast as a machine with other work on it allows; the defaults have more patience.
QUICK = TransportLimits(heartbeat_interval_s=0.4, silence_s=2.0, dial_timeout_s=3.0, open_timeout_s=3.0)


@dataclass
class ProcessVictim:
    """A process that runs `echo_peer`."""

    process: trio.Process
    peer_id: str
    addresses: tuple[str, ...]

    async def kill(self) -> None:
        self.process.kill()
        await self.process.wait()

    async def stop(self) -> None:
        os.kill(self.process.pid, signal.SIGSTOP)

    async def cont(self) -> None:
        os.kill(self.process.pid, signal.SIGCONT)


async def _first_line(stream: trio.abc.ReceiveStream) -> str:
    text = b""
    while not text.endswith(b"\n"):
        more = await stream.receive_some()
        assert more, f"the victim ended after {text!r}"
        text += more
    return text.decode()


@asynccontextmanager
async def process_victim(silence_s: float) -> AsyncIterator[ProcessVictim]:
    """A victim; it is killed when the block ends, stopped or not."""
    async with trio.open_nursery() as nursery:
        command = [sys.executable, "-W", "error", "-m", "tests.conformance.echo_peer", str(silence_s)]
        run = partial(trio.run_process, command, cwd=ROOT, check=False, deliver_cancel=_kill)
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        process: trio.Process = await nursery.start(partial(run, **pipes))
        try:
            assert process.stdout is not None
            with trio.fail_after(60):
                peer_id, address = (await _first_line(process.stdout)).split()
            yield ProcessVictim(process, peer_id, (address,))
        finally:
            nursery.cancel_scope.cancel()


async def _kill(process: trio.Process) -> None:
    process.kill()


@dataclass
class Libp2pRig:
    """Everything that one check started, each in a task of its own, and ended when the check is over."""

    scale: Scale = FAST
    limits: TransportLimits = QUICK
    _over: trio.Event = field(default_factory=trio.Event)
    _running: dict[str, tuple[trio.Event, trio.Event]] = field(default_factory=dict)
    _nursery: trio.Nursery | None = None

    @property
    def silence_s(self) -> float:
        return self.limits.silence_s

    @property
    def max_in_flight_bytes(self) -> int:
        # A window, and a frame that was begun; the sockets come after the window.
        return 2 * self.limits.window_bytes

    async def start(self) -> Transport:
        """In a task of its own: transports end in any order."""
        assert self._nursery is not None
        transport, stop, stopped = await self._nursery.start(self._run)
        assert isinstance(transport, Libp2pTransport)
        self._running[transport.peer_id] = (stop, stopped)
        return transport

    async def _run(self, task_status: trio.TaskStatus[tuple[Transport, trio.Event, trio.Event]]) -> None:
        stop, stopped = trio.Event(), trio.Event()
        try:
            async with open_transport(Identity.generate(), limits=self.limits) as transport:
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
        async with process_victim(self.silence_s) as victim:
            task_status.started(victim)
            await self._over.wait()


@asynccontextmanager
async def libp2p_rig(scale: Scale = FAST, limits: TransportLimits = QUICK) -> AsyncIterator[Libp2pRig]:
    rig = Libp2pRig(scale, limits)
    async with trio.open_nursery() as rig._nursery:
        yield rig
        rig._over.set()
        for stop, _ in rig._running.values():
            stop.set()
