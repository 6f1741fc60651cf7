"""Running one node in the foreground, for `mycel start` and `mycel join`: from its options to its last word.

Ring: shell.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import trio

from mycel.cli.common import (
    F,
    Number,
    blocks,
    cores,
    data_dir_option,
    data_home,
    exclusive,
    forget_invite,
    remember_invite,
    say,
    size_bytes,
    write,
)
from mycel.cli.exits import INTERRUPTED, TERMINATED
from mycel.node.background import background
from mycel.node.config import DAY_S, NodeConfig
from mycel.node.endpoints import checked_announce
from mycel.node.events import EventSink, no_events, stderr_events

if TYPE_CHECKING:
    from mycel.node.runtime import Serving
    from mycel.swarm.invite import Invite

# After a second Ctrl-C, what a thread in the middle of loading weights may still take.
_HURRY_S = 3.0


@dataclass(frozen=True, slots=True)
class NodeOptions:
    """The options that `start` and `join` have in common, as typed."""

    model: Path | None
    blocks: tuple[int, int] | None
    max_blocks: int | None
    memory: int | None
    kv_tokens: int
    dtype: str
    threads: int | None
    listen: tuple[str, ...]
    port: int | None
    announce: tuple[str, ...]
    network: str
    shape: str
    leave: float
    hivemind_dht: tuple[str, ...]
    data_dir: Path | None
    mdns: bool | None
    ttl: float
    invite_days: float
    as_json: bool
    verbose: bool
    supervised: bool
    train: Path | None = None
    checkpoints: Path | None = None
    liar: str = ""

    def config(self, invite: Invite | None) -> NodeConfig:
        """What the node is told. Raises UsageError for options that exclude each other."""
        if self.listen and self.port is not None:
            raise click.UsageError("--listen names a port already: leave out --port")
        listen = self.listen or (f"/ip4/0.0.0.0/tcp/{self.port or 0}",)
        beyond = any("/127." not in address and "/::1/" not in address for address in listen)
        return NodeConfig(
            data_dir=self.data_dir or data_home(),
            listen=listen,
            model=self.model,
            invite=invite,
            blocks=self.blocks,
            max_blocks=self.max_blocks,
            memory_bytes=self.memory,
            kv_tokens=self.kv_tokens,
            dtype=self.dtype,
            threads=self.threads or cores(),
            ttl_s=self.ttl,
            mdns=beyond if self.mdns is None else self.mdns,
            invite_lifetime_s=self.invite_days * DAY_S,
            announce=checked_announce(self.announce),
            network=self.network,
            shape=self.shape,
            leave_s=self.leave,
            hivemind_dht=self.hivemind_dht,
            recipe=self.train,
            checkpoints=self.checkpoints,
            data=self.train is not None,
            liar=self.liar,
        )


_OPTIONS = (
    click.option(
        "--liar",
        default="",
        metavar="NAME",
        hidden=True,  # for experiments, not for a swarm of others
        help="Contribute lies to rounds of training, on purpose: sign-flip, x1000, gaussian, zero, nan, replay...",
    ),
    click.option(
        "--blocks",
        type=blocks,
        metavar="A:B",
        help="Serve these blocks, whatever the swarm needs. [default: where they help most, and elsewhere once others "
        "have left]",
    ),
    click.option("--max-blocks", type=click.IntRange(1), metavar="N", help="Serve at most so many blocks."),
    click.option(
        "--memory",
        type=size_bytes,
        metavar="SIZE",
        help="Memory for weights and KV cache, such as 8GB. [default: 70% of what is free]",
    ),
    click.option(
        "--kv-tokens",
        type=click.IntRange(1, 2**24),
        default=8192,
        show_default=True,
        metavar="N",
        help="Tokens of all sessions together that the KV cache holds.",
    ),
    click.option(
        "--threads", type=click.IntRange(1, 1024), metavar="N", help="Threads to compute with. [default: all cores]"
    ),
    click.option(
        "--listen",
        multiple=True,
        metavar="ADDRESS",
        help="Where to listen, as a multiaddr such as /ip4/0.0.0.0/tcp/4001; may be repeated. [default: any free port]",
    ),
    click.option("--port", type=click.IntRange(1, 65535), metavar="N", help="Listen on this port of every network."),
    click.option(
        "--announce",
        multiple=True,
        metavar="ADDRESS",
        help="An address that others are told instead of those listened on, such as /ip4/203.0.113.7/tcp/4001 of a "
        "forwarded port; may be repeated.",
    ),
    click.option(
        "--network",
        type=click.Choice(["auto", "libp2p", "p2pd"]),
        default="auto",
        show_default=True,
        help="The network engine; auto is libp2p. p2pd needs Linux on x86-64 and the extra mycel[hivemind].",
    ),
    click.option("--shape", default="", hidden=True, help="Make every link worse; used by `mycel up`."),
    click.option(
        "--leave",
        type=Number(0, 3600),
        default=30.0,
        show_default=True,
        metavar="SECONDS",
        help="On Ctrl-C, hand sessions over for at most so long.",
    ),
    click.option(
        "--hivemind-dht",
        multiple=True,
        metavar="ADDRESS",
        help="Announce the node in this hivemind DHT, too: a multiaddr with /p2p/..., may be repeated. Needs "
        "mycel[hivemind].",
    ),
    data_dir_option,
    click.option(
        "--mdns/--no-mdns",
        default=None,
        help="Find nodes in this local network by multicast DNS. [default: on, unless listening on loopback alone]",
    ),
    click.option(
        "--ttl",
        type=Number(2, 3600),
        default=30.0,
        show_default=True,
        metavar="SECONDS",
        help="How long the swarm remembers this node after it died.",
    ),
    click.option(
        "--invite-days",
        type=Number(0.001, 3650),
        default=7.0,
        show_default=True,
        metavar="DAYS",
        help="How long the printed invite is good for.",
    ),
    click.option("--json", "as_json", is_flag=True, help="Print one JSON object when ready, instead of the invite."),
    click.option("-v", "--verbose", is_flag=True, help="Tell every event on stderr."),
    click.option("--supervised", is_flag=True, hidden=True, help="End when stdin ends; used by `mycel up`."),
)


def checkpoints_option(command: F) -> F:
    return click.option(
        "--checkpoints",
        type=click.Path(path_type=Path, file_okay=False),
        metavar="DIR",
        help="Of a training run: keep whole checkpoints here, and resume from the newest. [default: who founds a run "
        "keeps them under --data-dir]",
    )(command)


def node_options(command: F) -> F:
    """Add the options of a node to a command."""
    for option in reversed(_OPTIONS):
        command = option(command)
    return command


def serve(options: NodeOptions, invite: Invite | None) -> int:
    """Run a node until it is asked to stop; the exit code."""
    config = options.config(invite)
    # Read by torch's OpenMP when it is loaded: threads that spin while they wait starve the network of its cores.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("OMP_NUM_THREADS", str(config.threads))
    with exclusive(config.data_dir, "--data-dir"):
        event = stderr_events() if options.verbose or options.supervised else no_events
        ending = Ending(options.supervised)
        remembered: list[str] = []

        def ready(serving: Serving) -> None:
            _announce(serving, as_json=options.as_json)
            if not options.supervised:
                remember_invite(serving.invite.text)
                remembered.append(serving.invite.text)

        try:
            trio.run(_run, config, event, ending, ready)
        finally:
            for text in remembered:  # nobody can enter through us any more
                forget_invite(text, instead=invite.text if invite else None)
        return ending.code


@dataclass(eq=False, slots=True)
class Ending:
    """How a node comes to its end: the first wish lets it take leave, the second does not."""

    supervised: bool
    code: int = 0
    stop: trio.Event = field(default_factory=trio.Event)
    scope: trio.CancelScope = field(default_factory=trio.CancelScope)
    is_ready: bool = False

    def ask(self, code: int) -> None:
        if self.stop.is_set():
            timer = threading.Timer(_HURRY_S, os._exit, args=(code,))
            timer.daemon = True
            timer.start()
            self.scope.cancel()
            return
        self.code = code
        self.stop.set()
        if not self.is_ready:
            self.scope.cancel()  # nobody uses us yet

    async def on_signals(self, *, task_status: trio.TaskStatus[None]) -> None:
        with trio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals:
            task_status.started()
            async for number in signals:
                if not self.supervised:
                    first = "leaving the swarm (Ctrl-C again to stop at once)" if self.is_ready else "stopping"
                    say("stopping at once" if self.stop.is_set() else first)
                self.ask(INTERRUPTED if number == signal.SIGINT else TERMINATED)

    async def when_parent_ends(self) -> None:
        """The parent holds the other end of stdin: it ends with the parent, whatever ends the parent."""
        await trio.to_thread.run_sync(_read_to_end, abandon_on_cancel=True)
        self.ask(0)


async def _run(config: NodeConfig, event: EventSink, ending: Ending, ready: Callable[[Serving], None]) -> None:
    async with background() as tasks:
        await tasks.start(ending.on_signals)
        if ending.supervised:
            tasks.start_soon(ending.when_parent_ends)
        with ending.scope:
            run_node: Any = await trio.to_thread.run_sync(_load_runtime)
            async with trio.open_nursery() as nursery:
                serving = await nursery.start(run_node, config, event, say, ending.stop)
                ending.is_ready = True
                ready(serving)


def _load_runtime() -> Any:
    """Importing torch takes seconds, in which a Ctrl-C is to be heard."""
    from mycel.node.runtime import run_node

    return run_node


def _read_to_end() -> None:
    # Not sys.stdin: its lock, held by a thread that waits, would make Python's own end fail.
    while os.read(0, 4096):
        pass


def _announce(serving: Serving, *, as_json: bool) -> None:
    if as_json:
        value = {
            "peer": serving.peer,
            "addresses": serving.addresses,
            "invite": serving.invite.text,
            "model": serving.model,
            "blocks": [serving.start, serving.end],
            "n_blocks": serving.n_blocks,
            "swarm": serving.invite.swarm.hex(),
        }
        write(json.dumps(value) + "\n")
        return
    say(f"serving blocks {serving.start}:{serving.end} of {serving.n_blocks} of {serving.model}; Ctrl-C to leave")
    if sys.stdout.isatty():
        say("to bring in another machine, run there:")
    write(f"mycel join {serving.invite.text}\n")
