"""Nodes as processes of their own, for tests that kill them.

Python with torch, transformers and libp2p takes three seconds of a core to start. Nodes are therefore forked from one
process that has imported them (multiprocessing's fork server), and are ready some tenths of a second later. The rest is
as in life: `run_node`, and a key, a data directory and sockets for each. A node ends when its pipe does, so that none
outlives the tests.
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import multiprocessing.forkserver
import os
import signal
import sys
import threading
import traceback
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import trio

# Imported here and not in `_serve`: this module is what the fork server preloads.
from mycel.node.config import NodeConfig
from mycel.node.events import EventWriter
from mycel.node.runtime import Serving, run_node
from mycel.protocols.errors import MycelError
from tests.loopback.links import rerouted_transports

ROOT = Path(__file__).resolve().parent.parent.parent
READY_S = 60.0
LEAVE_S = 10.0


def look_again() -> None:
    """Between two looks at what processes write: nothing but their logs and files tells what they do."""
    threading.Event().wait(0.05)


class NodeFailed(Exception):
    """A node ended before it was ready: the name of its error, and what it said."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(kind, message)
        self.kind, self.message = kind, message


@dataclass(eq=False)
class NodeProcess:
    """A node process that serves (`serving`), or is about to."""

    config: NodeConfig
    process: Any
    pipe: Connection
    _serving: Serving | None = None
    _killed: bool = False

    @property
    def serving(self) -> Serving:
        assert self._serving is not None
        return self._serving

    @property
    def peer(self) -> str:
        return self.serving.peer

    @property
    def address(self) -> str:
        return self.serving.addresses[0]

    @property
    def invite(self) -> str:
        return self.serving.invite.text

    @property
    def alive(self) -> bool:
        return not self._killed and bool(self.process.is_alive())

    def wait_until_ready(self) -> None:
        """Raises NodeFailed if it ends instead."""
        assert self.pipe.poll(READY_S), f"not ready after {READY_S:.0f} s: {self.log()}"
        try:
            what, value = self.pipe.recv()
        except EOFError:
            what, value = "failed", ("a crash", self.log())
        if what == "failed":
            raise NodeFailed(*value)
        self._serving = value

    def kill(self) -> None:
        self._killed = True
        self.process.kill()

    def freeze(self) -> None:
        os.kill(self.process.pid, signal.SIGSTOP)

    def thaw(self) -> None:
        os.kill(self.process.pid, signal.SIGCONT)

    def ask_to_leave(self) -> None:
        with contextlib.suppress(OSError):  # it is gone already
            self.pipe.send("leave")

    def end(self) -> None:
        """Wait until it is gone, and make sure that it is."""
        self.pipe.close()
        self.process.join(LEAVE_S)
        self.process.kill()
        self.process.join()
        self.process.close()

    def log(self) -> str:
        return (self.config.data_dir / "log").read_text()

    def events(self, name: str) -> list[dict[str, Any]]:
        """What it told of one kind, oldest first."""
        told = [json.loads(line) for line in self.log().splitlines() if line.startswith("{")]
        return [event for event in told if event["event"] == name]


@dataclass(eq=False)
class Nodes:
    """The node processes of one network under `root`. The first one started founds it with `model`."""

    root: Path
    model: Path
    nodes: list[NodeProcess] = field(default_factory=list)

    @property
    def invite(self) -> str:
        """The invite of the first node that lives."""
        return self.living[0].invite

    @property
    def living(self) -> list[NodeProcess]:
        """Those that serve, the oldest first."""
        return [node for node in self.nodes if node._serving and node.alive]

    def start(self, *spans: tuple[int, int], **options: Any) -> list[NodeProcess]:
        """A node for each span, started side by side, all serving. Options as for `start_one`."""
        begun = [] if self.nodes else [self.start_one(blocks=spans[0], **options)]
        rest = [self._begin(blocks=span, **options) for span in spans[len(begun) :]]
        for node in rest:
            node.wait_until_ready()
        return begun + rest

    def start_one(self, **options: Any) -> NodeProcess:
        """A node with the fields of NodeConfig given, and `reroute`: addresses to dial in place of others.

        It has the model's files, unless model=None makes it fetch them. Raises NodeFailed.
        """
        node = self._begin(**options)
        node.wait_until_ready()
        return node

    def _begin(self, *, reroute: Mapping[str, str] | None = None, **options: Any) -> NodeProcess:
        known = self.living[0].serving.invite if self.living else None
        fields: dict[str, Any] = {
            "data_dir": self.root / f"node-{len(self.nodes) + 1}",
            "listen": ("/ip4/127.0.0.1/tcp/0",),
            "model": self.model,
            "invite": known,
            "kv_tokens": 16384,
            **options,
        }
        config = NodeConfig(**fields)
        config.data_dir.mkdir(parents=True, exist_ok=True)
        context = multiprocessing.get_context("forkserver")
        ours, theirs = context.Pipe()
        process = context.Process(target=_serve, args=(theirs, config, dict(reroute or {})), daemon=True)
        process.start()
        theirs.close()
        node = NodeProcess(config, process, ours)
        self.nodes.append(node)
        return node

    def named(self, peer: str) -> NodeProcess:
        return next(node for node in self.nodes if node._serving and node.peer == peer)

    def __enter__(self) -> Nodes:
        return self

    def __exit__(self, *_: object) -> None:
        for node in self.nodes:
            node.ask_to_leave()
        for node in self.nodes:
            node.end()


@contextlib.contextmanager
def fork_server() -> Iterator[None]:
    """Start the process that nodes are forked from; it ends with this one."""
    # pytest itself is what a child imports as its main module.
    multiprocessing.get_context("forkserver").set_forkserver_preload(["pytest", __name__])
    with contextlib.chdir(ROOT):
        multiprocessing.forkserver.ensure_running()
    yield


# ---- in the child --------------------------------------------------------------------------------------------------


def _serve(pipe: Connection, config: NodeConfig, reroute: dict[str, str]) -> None:
    with (config.data_dir / "log").open("w", buffering=1) as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
        try:
            with rerouted_transports(reroute):
                trio.run(_run, pipe, config, EventWriter(log, as_json=True))
        except MycelError as error:
            pipe.send(("failed", (type(error).__name__, str(error))))
        except BaseException:  # noqa: BLE001 - the root of a process: whoever started it reads the log
            traceback.print_exc()
            sys.exit(1)


async def _run(pipe: Connection, config: NodeConfig, event: EventWriter) -> None:
    stop = trio.Event()

    def heard() -> None:
        with contextlib.suppress(EOFError, OSError):  # whoever started us has gone: that is a word to leave, too
            pipe.recv()

    async def obey() -> None:
        await trio.to_thread.run_sync(heard, abandon_on_cancel=True)
        stop.set()

    def say(line: str) -> None:
        event("said", line=line)

    try:
        async with trio.open_nursery() as nursery:
            serving = await nursery.start(run_node, config, event, say, stop)
            pipe.send(("ready", serving))
            nursery.start_soon(obey)
    except BaseExceptionGroup as group:
        raise _first(group) from None


def _first(group: BaseExceptionGroup[BaseException]) -> BaseException:
    error: BaseException = group
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error
