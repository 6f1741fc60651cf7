"""A local network: node processes that this one starts, watches and ends.

Each is a `mycel start` or `mycel join` of its own, told through its standard input when to stop: the pipe ends with
this process, whatever ends this process, so that no node is left behind. Standard output carries the line that says
that the node is ready, and standard error goes to a file.

Ring: shell.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path

import trio

from mycel.cli.common import cores, make_directory
from mycel.cli.exits import FAILURE, TIMEOUT, NodeFailedError, one_line
from mycel.node.background import cause_of

READY_S = 180.0
LEAVE_S = 8.0
# What a node may take to hand its sessions over, as `mycel start --leave` has it, and to go then.
HAND_OVER_S = 30.0 + LEAVE_S
_LOG_TAIL_BYTES = 8192
# What a node says to the shell when it ends by an error that the user can do something about.
_TOLD = range(64, 79)


@dataclass(frozen=True, slots=True)
class Ready:
    """What a node says when others can use it."""

    peer: str
    addresses: tuple[str, ...]
    invite: str
    model: str
    start: int
    end: int
    n_blocks: int
    swarm: str = ""


@dataclass(eq=False, slots=True)
class LocalNode:
    """A node process; `ready` once it serves, `expected` when we asked it to end."""

    name: str
    process: trio.Process
    log: Path
    ready: Ready | None = None
    expected: bool = False

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def serving(self) -> Ready:
        assert self.ready is not None, "the node was handed out before it was ready"
        return self.ready

    @property
    def blocks(self) -> str:
        """Its span, written A:B."""
        return f"{self.serving.start}:{self.serving.end}"

    def last_words(self, n_lines: int = 5) -> list[str]:
        """The end of its log."""
        try:
            with self.log.open("rb") as file:
                file.seek(max(0, self.log.stat().st_size - _LOG_TAIL_BYTES))
                text = file.read().decode("utf-8", "replace")
        except OSError:
            return []
        return [one_line(line) for line in text.splitlines() if line.strip()][-n_lines:]

    def kill(self) -> None:
        """End it as a power cut would."""
        self.expected = True
        self.process.kill()

    def freeze(self) -> None:
        """Let it stand still: its sockets stay open, and nothing answers."""
        self.process.send_signal(signal.SIGSTOP)

    def thaw(self) -> None:
        """Let a frozen one go on; nothing for others, and for those that have ended."""
        if hasattr(signal, "SIGCONT") and self.process.poll() is None:
            self.process.send_signal(signal.SIGCONT)

    async def leave(self) -> bool:
        """Ask it to leave and wait until it has; whether it went by itself."""
        self.expected = True
        assert self.process.stdin is not None
        await self.process.stdin.aclose()
        with trio.move_on_after(HAND_OVER_S):
            await self.process.wait()
        went = self.process.poll() is not None
        if not went:
            self.process.kill()
        await self.process.wait()
        return went


@dataclass(eq=False, slots=True)
class LocalNetwork:
    """The node processes under `directory`. Made by `local_network`.

    `n_expected` of them share the cores, unless `threads` says what each computes with.
    """

    directory: Path
    n_expected: int
    listen: str = "/ip4/127.0.0.1/tcp/0"
    threads: int | None = None
    nodes: list[LocalNode] = field(default_factory=list)
    _numbers: Iterator[int] = field(default_factory=lambda: count(1))

    async def start(self, *arguments: str) -> LocalNode:
        """Start a node with `mycel ARGUMENTS` and wait until it serves.

        Raises NodeFailedError if it ends before, or is not ready in time.
        """
        return await self._start(f"node-{next(self._numbers)}", arguments)

    async def restart(self, node: LocalNode, *arguments: str) -> None:
        """Start a node that has ended (or ends now) again, with its name, directory and key. Raises as `start` does."""
        await node.process.wait()
        await _close_pipes(node)
        node.process = await self._open(node.name, arguments, "ab")
        node.expected = False
        await self._ready(node)

    async def _start(self, name: str, arguments: Sequence[str]) -> LocalNode:
        node = LocalNode(name, await self._open(name, arguments, "wb"), self._log(name))
        self.nodes.append(node)
        await self._ready(node)
        return node

    async def _ready(self, node: LocalNode) -> None:
        with trio.move_on_after(READY_S):
            node.ready = await self._hear(node)
            return
        raise NodeFailedError(f"{node.name} was not ready after {READY_S:.0f} s; its log: {node.log}", TIMEOUT)

    async def start_all(self, many: Sequence[Sequence[str]]) -> list[LocalNode]:
        """Start several nodes side by side; all of them, in this order, once all serve."""
        names = [f"node-{next(self._numbers)}" for _ in many]
        started: dict[str, LocalNode] = {}

        async def one(name: str, arguments: Sequence[str]) -> None:
            started[name] = await self._start(name, arguments)

        try:
            async with trio.open_nursery() as nursery:
                for name, arguments in zip(names, many, strict=True):
                    nursery.start_soon(one, name, arguments)
        except BaseExceptionGroup as group:
            raise cause_of(group) from None
        return [started[name] for name in names]

    def _log(self, name: str) -> Path:
        return make_directory(self.directory) / f"{name}.log"

    async def _open(self, name: str, arguments: Sequence[str], log_mode: str) -> trio.Process:
        threads = self.threads or max(1, cores() // self.n_expected)
        shared = ["--data-dir", str(self.directory / name), "--listen", self.listen, "--threads", str(threads)]
        # -P: a file in the working directory must not stand in for a module.
        command = [sys.executable, "-P", "-m", "mycel", *arguments, *shared, "--no-mdns", "--json", "--supervised"]
        with self._log(name).open(log_mode) as errors:
            return await trio.lowlevel.open_process(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                env=_environment(threads),
                start_new_session=True,  # the terminal's Ctrl-C is for us, and we tell the nodes
            )

    async def _hear(self, node: LocalNode) -> Ready:
        """Read the line that says that the node is ready."""
        assert node.process.stdout is not None
        line = b""
        while not line.endswith(b"\n"):
            data = await node.process.stdout.receive_some(65536)
            if not data:
                raise await self._failure(node)
            line += data
        value = json.loads(line)
        start, end = value["blocks"]
        addresses = tuple(value["addresses"])
        return Ready(
            value["peer"], addresses, value["invite"], value["model"], start, end, value["n_blocks"], value["swarm"]
        )

    async def _failure(self, node: LocalNode) -> NodeFailedError:
        code = await node.process.wait()
        told = code if code in _TOLD else FAILURE
        last = node.last_words(1)
        reason = last[0].removeprefix("error: ") if last else "it said nothing"
        return NodeFailedError(f"{node.name} did not start: {reason} (exit code {code}; its log: {node.log})", told)

    async def stop(self) -> None:
        """Ask every node to leave, wait a bounded time, and end those that stay."""
        async with trio.open_nursery() as nursery:
            for node in self.nodes:
                nursery.start_soon(_stop, node)


@asynccontextmanager
async def local_network(
    directory: Path, n_expected: int, listen: str = "/ip4/127.0.0.1/tcp/0", threads: int | None = None
) -> AsyncIterator[LocalNetwork]:
    """A network without nodes yet; when the block ends, however it ends, no node is left."""
    network = LocalNetwork(directory, n_expected, listen, threads)
    try:
        yield network
    finally:
        # Bounded: LEAVE_S for the nodes to go, and a kill cannot be refused.
        with trio.CancelScope(shield=True):
            await network.stop()


async def _stop(node: LocalNode) -> None:
    node.expected = True
    node.thaw()
    if node.process.poll() is None:
        assert node.process.stdin is not None
        await node.process.stdin.aclose()
        with trio.move_on_after(LEAVE_S):
            await node.process.wait()
        if node.process.poll() is None:
            node.process.kill()
    await node.process.wait()
    await _close_pipes(node)


async def _close_pipes(node: LocalNode) -> None:
    if node.process.stdout is not None:
        await node.process.stdout.aclose()
    if node.process.stdin is not None:
        await node.process.stdin.aclose()


def _environment(threads: int) -> dict[str, str]:
    """Ours, less the options that were meant for this command, and with threads that wait instead of spinning."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith("MYCEL_") or key == "MYCEL_DEBUG"}
    return {**kept, "OMP_WAIT_POLICY": "PASSIVE", "OMP_NUM_THREADS": str(threads)}
