"""The node's side of the DHT process: starting it, and asking it over a socket, many questions at once.

Ring: shell.
"""

from __future__ import annotations

import socket
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TypeVar

import trio

from mycel.node.background import background
from mycel.node.hivemind_engine import dht_messages as said
from mycel.node.hivemind_engine.available import engine_available
from mycel.protocols.errors import ConfigError, LocalProtocolError, PeerUnreachable

_END_S = 5.0
_ASK_S = 45.0  # importing hivemind is part of the first answer
PACKAGE_ROOT = Path(__file__).resolve().parents[3]  # `python -m` finds this very package from there
_Reply = TypeVar("_Reply", bound=said.Reply)


class DhtClient:
    """Questions over `sock`, whose other end a DHT process has. `run` reads the answers."""

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        self._stream = trio.SocketStream(trio.socket.from_stdlib_socket(sock))
        self._sending = trio.Lock()
        self._room = trio.Semaphore(said.MAX_IN_FLIGHT)
        self._waiting: dict[int, trio.MemorySendChannel[said.Reply]] = {}
        self._number = 0

    async def ask(self, request: said.Request, kind: type[_Reply]) -> _Reply:
        """Raises PeerUnreachable if the DHT cannot do it, LocalProtocolError if its process is gone."""
        send, receive = trio.open_memory_channel[said.Reply](1)
        async with self._room:
            self._number += 1
            number = self._number
            self._waiting[number] = send
            try:
                await self._send(said.to_frame(said.Asked(number, request)))
                with trio.move_on_after(_ASK_S):
                    reply = await receive.receive()
                    if isinstance(reply, said.Failed):
                        raise PeerUnreachable("", f"the hivemind DHT: {reply.reason}")
                    if not isinstance(reply, kind):
                        raise LocalProtocolError(f"the DHT process answered with {type(reply).__name__}")
                    return reply
            except (trio.EndOfChannel, trio.BrokenResourceError, trio.ClosedResourceError):
                raise LocalProtocolError("the DHT process has ended") from None
            finally:
                del self._waiting[number]
        raise PeerUnreachable("", f"the hivemind DHT did not answer within {_ASK_S:.0f} s")

    async def _send(self, frame: bytes) -> None:
        async with self._sending:
            with trio.CancelScope(shield=True):  # a small frame, to a process that reads on: whole or not at all
                await self._stream.send_all(frame)

    async def run(self) -> None:
        """Hand answers to whoever asked, until the process ends."""
        try:
            while True:
                head = await self._exactly(said.PREFIX_BYTES)
                answered = said.read_answered(await self._exactly(said.body_bytes(head)))
                if (channel := self._waiting.get(answered.number)) is not None:
                    channel.send_nowait(answered.body)
        except (trio.EndOfChannel, trio.BrokenResourceError):
            for channel in self._waiting.values():
                channel.close()
            raise LocalProtocolError("the DHT process has ended") from None

    async def _exactly(self, size_bytes: int) -> bytes:
        data = bytearray()
        while len(data) < size_bytes:
            more = await self._stream.receive_some(size_bytes - len(data))
            if not more:
                raise trio.EndOfChannel
            data += more
        return bytes(data)

    async def aclose(self) -> None:
        await self._stream.aclose()


def child_command(descriptor: int) -> list[str]:
    return [sys.executable, "-m", "mycel.node.hivemind_engine.dht_process", str(descriptor)]


@asynccontextmanager
async def open_dht_process() -> AsyncIterator[DhtClient]:
    """A DHT process that ends with the block. Raises ConfigError if hivemind cannot run here."""
    why = engine_available()
    if why:
        raise ConfigError(f"a hivemind DHT cannot be used: {why}")
    ours, theirs = socket.socketpair()
    with theirs:
        process = await trio.lowlevel.open_process(
            child_command(theirs.fileno()),
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            cwd=PACKAGE_ROOT,
        )
    client = DhtClient(ours)
    reading = trio.CancelScope(shield=True)  # also for the last words of a block that is cancelled

    async def read() -> None:
        with reading:
            await client.run()

    try:
        async with background() as tasks:
            tasks.start_soon(read)
            try:
                yield client
            finally:
                reading.cancel()
    finally:
        with trio.CancelScope(shield=True):
            await client.aclose()
            with trio.move_on_after(_END_S):
                await process.wait()
            if process.returncode is None:
                process.kill()
                await process.wait()
