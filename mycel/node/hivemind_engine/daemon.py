"""The Go libp2p daemon as a child process, and asking it things: one Unix socket for each question.

It lives as long as one connection to it that this process holds for nothing else: whatever ends this process closes
that, and the daemon goes. Its key is handed over in memory, its sockets are in a folder that only its owner may enter.

Ring: shell.
"""

from __future__ import annotations

import fcntl
import os
import re
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import trio
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from mycel.node.background import background
from mycel.node.hivemind_engine import daemon_messages as said
from mycel.node.hivemind_engine.available import engine_available, p2pd_path
from mycel.protocols.errors import ConfigError, LocalProtocolError
from mycel.security.identity import Identity

START_S = 15.0
_END_S = 3.0
_ASK_S = 10.0
_BLOCKING_ASK_S = 2.0
_FOLDER_PREFIX = "mycel-p2pd-"
_BEING_MADE_S = 60.0  # a folder so young may not have its lock yet
_MAX_SOCKET_PATH_BYTES = 107  # of the kernel, with room for no more than the final zero
_LOG_CHARS = 2000


@dataclass(frozen=True, slots=True)
class Daemon:
    """A running daemon. `streams` is where it shall deliver inbound streams: a socket for us to listen on."""

    control: str
    streams: str
    process: trio.Process

    # ---- asking

    async def ask(self, request: bytes) -> said.Answer:
        """One question on a connection of its own. Raises LocalProtocolError if the daemon is gone or too slow."""
        with trio.move_on_after(_ASK_S):
            connection, answer, _ = await self.open(request)
            connection.close()
            return answer
        raise LocalProtocolError(f"the p2p daemon did not answer within {_ASK_S:.0f} s")

    async def open(self, request: bytes) -> tuple[socket.socket, said.Answer, bytes]:
        """Ask, and keep the connection: what came on it after the answer is the beginning of a stream."""
        connection = self._connect()
        try:
            await trio.lowlevel.checkpoint_if_cancelled()
            connection.send(request)  # a fresh socket takes far more at once
            message, rest = await read_message(connection)
            return connection, said.read_answer(message), rest
        except BaseException as error:
            connection.close()
            if isinstance(error, OSError):
                raise LocalProtocolError(f"the p2p daemon is gone: {error.strerror}") from None
            raise

    def ask_at_once(self, request: bytes) -> said.Answer:
        """The same without awaiting, for what takes the daemon microseconds and the caller cannot wait for."""
        with socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(_BLOCKING_ASK_S)
            try:
                connection.connect(self.control)
                connection.sendall(request)
                data = b""
                while (found := said.cut(data)) is None:
                    more = connection.recv(4096)
                    if not more:
                        raise LocalProtocolError("the p2p daemon closed a connection unasked")
                    data += more
            except OSError as error:
                raise LocalProtocolError(f"the p2p daemon does not answer: {error}") from None
        return said.read_answer(found[0])

    def _connect(self) -> socket.socket:
        connection = socket.socket(socket.AF_UNIX)
        connection.setblocking(False)
        try:
            connection.connect(self.control)  # at once: both ends are on this machine, and its queue is long
        except OSError as error:
            connection.close()
            raise LocalProtocolError(f"the p2p daemon is gone: {error.strerror}") from None
        return connection


async def read_message(connection: socket.socket) -> tuple[bytes, bytes]:
    """The first message on a connection and what came after it. Raises LocalProtocolError when it ends before that."""
    data = b""
    while (found := said.cut(data)) is None:
        try:
            more = connection.recv(65536)
        except BlockingIOError:
            await trio.lowlevel.wait_readable(connection)
            continue
        except OSError as error:
            raise LocalProtocolError(f"the p2p daemon broke a connection: {error.strerror}") from None
        if not more:
            raise LocalProtocolError("the p2p daemon closed a connection unasked")
        data += more
    return found


# ---- life


@asynccontextmanager
async def run_daemon(identity: Identity, flags: Sequence[str]) -> AsyncIterator[Daemon]:
    """A daemon with our identity. Raises ConfigError if the engine cannot run here or the daemon refuses to."""
    why = engine_available()
    if why:
        raise ConfigError(f"the network p2pd cannot be used: {why}")
    with socket_folder() as folder:
        control, streams = str(folder / "control"), str(folder / "streams")
        process = await _start(identity, control, flags)
        try:
            output = _Output(process)
            with trio.move_on_after(START_S) as patience:
                await output.ready()
            if patience.cancelled_caught:
                raise ConfigError(f"the p2p daemon did not start within {START_S:.0f} s")
            daemon = Daemon(control, streams, process)
            # The one that keeps it alive.
            connection, answer, _ = await daemon.open(said.simple(said.Ask.PERSISTENT))
            with connection:
                if answer.error:
                    raise LocalProtocolError(f"the p2p daemon refuses to stay: {answer.error}")
                async with background() as tasks:
                    tasks.start_soon(output.drain)
                    yield daemon
        finally:
            with trio.CancelScope(shield=True):
                await _end(process)


async def _start(identity: Identity, control: str, flags: Sequence[str]) -> trio.Process:
    public_key = identity.private_key.public_key().public_bytes(Encoding.Raw, PublicFormat.Raw)
    key = os.memfd_create("mycel-key")  # no file: nothing to remove, and nothing for others to read
    try:
        os.write(key, said.private_key_file(identity.seed, public_key))
        command = [
            str(p2pd_path()),
            f"-listen=/unix{control}",
            f"-id=/proc/self/fd/{key}",
            f"-idleTimeout={START_S:.0f}s",  # should we die before we hold the connection that keeps it
            *flags,
        ]
        return await trio.lowlevel.open_process(
            command,
            pass_fds=[key],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # a Ctrl-C in the terminal is ours to handle: it has to carry our last words
        )
    except OSError as error:
        raise ConfigError(f"the p2p daemon cannot be started: {error.strerror}") from None
    finally:
        os.close(key)


async def _end(process: trio.Process) -> None:
    """Closing the connection that keeps it has told the daemon to go."""
    with trio.move_on_after(_END_S):
        await process.wait()
    if process.returncode is None:
        process.kill()
        await process.wait()
    if process.stdout is not None:
        await process.stdout.aclose()


class _Output:
    """What the daemon prints: first that it is ready, later what it complains of, which nobody reads."""

    def __init__(self, process: trio.Process) -> None:
        self._process = process
        self._text = ""

    async def ready(self) -> None:
        """Raises ConfigError if it ends instead."""
        while "Peer ID:" not in self._text:
            if not await self._read():
                raise ConfigError(f"the p2p daemon ended at its start: {_last_words(self._text)}")

    async def drain(self) -> None:
        while await self._read():
            self._text = self._text[-_LOG_CHARS:]
        # It ends with us, or by a fault: without it this node has no network, and must not go on as if it had.
        status = await self._process.wait()
        raise LocalProtocolError(f"the p2p daemon ended with status {status}: {_last_words(self._text)}")

    async def _read(self) -> bool:
        assert self._process.stdout is not None
        data = await self._process.stdout.receive_some()
        self._text += data.decode(errors="replace")
        return bool(data)


def _last_words(text: str) -> str:
    lines = [line for line in text.splitlines() if line.strip()]
    return re.sub(r"^[\d/]+ [\d:]+ ", "", lines[-1])[:300] if lines else "it does not say why"


# ---- the folder


@contextmanager
def socket_folder() -> Iterator[Path]:
    """A folder of mode 0700 for sockets, removed at the end; those that a killed process left are removed before."""
    parent = Path(tempfile.gettempdir())
    if len(os.fsencode(parent)) + 40 > _MAX_SOCKET_PATH_BYTES:
        parent = Path("/tmp")  # noqa: S108 - the folder in it is ours alone
    _sweep(parent)
    folder = Path(tempfile.mkdtemp(prefix=_FOLDER_PREFIX, dir=parent))
    try:
        with (folder / "lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _sweep(parent: Path) -> None:
    """Remove folders of our own whose process is gone: it held a lock on them."""
    for folder in parent.glob(f"{_FOLDER_PREFIX}*"):
        with suppress(OSError):  # being made or removed by another, or locked, which is what a living one does
            facts = folder.lstat()
            if facts.st_uid != os.getuid() or time.time() - facts.st_mtime < _BEING_MADE_S:
                continue
            with (folder / "lock").open("r+") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(folder, ignore_errors=True)
