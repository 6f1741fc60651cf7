"""`mycel up`: a local network of real node processes."""

from __future__ import annotations

import json
import signal
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import trio

from mycel.cli.chaos import ChaosRun
from mycel.cli.chaos_options import chaos_of, chaos_options
from mycel.cli.common import exclusive, forget_invite, remember_invite, say, state_home, write
from mycel.cli.exits import INTERRUPTED, TERMINATED, CommandFailedError

if TYPE_CHECKING:
    from mycel.cli.processes import LocalNetwork, LocalNode


@dataclass(frozen=True, slots=True)
class LocalPlan:
    """A local network: a span of `model` for each node, and what all nodes are told besides."""

    model: Path
    spans: tuple[tuple[int, int], ...]
    shared: tuple[str, ...] = ()


@click.command()
@click.option(
    "--nodes",
    type=click.IntRange(1, 64),
    metavar="N",
    help="How many nodes. [default: 4, with --train as many as the recipe has stages]",
)
@click.option(
    "--model",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="A Hugging Face model directory. [default: the small model inside Mycel]",
)
@click.option(
    "--replicas",
    type=click.IntRange(1, 64),
    metavar="N",
    help="How many nodes serve each block. [default: 1, with faults 2]",
)
@click.option(
    "--dir",
    "directory",
    type=click.Path(path_type=Path, file_okay=False),
    metavar="DIR",
    help="Where the nodes keep keys and logs. [default: ~/.local/state/mycel/up, with --train that of `mycel train`]",
)
@click.option(
    "--listen",
    default="/ip4/127.0.0.1/tcp/0",
    show_default=True,
    metavar="ADDRESS",
    help="Where the nodes listen, as a multiaddr with port 0.",
)
@click.option(
    "--train",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="RECIPE",
    help="Train a model with this recipe, as `mycel train` does, and stay when it is done.",
)
@chaos_options
@click.option(
    "--json", "as_json", is_flag=True, help="Print one JSON object instead of a table: of nodes, or the verdict."
)
@click.pass_context
def up(  # noqa: PLR0913  one parameter for each option
    ctx: click.Context,
    /,
    *,
    nodes: int | None,
    model: Path | None,
    replicas: int | None,
    directory: Path | None,
    listen: str,
    train: Path | None,
    as_json: bool,
    **typed: Any,
) -> None:
    """Start a local network of real node processes.

    Each node serves a share of the model's blocks. The network stays until Ctrl-C, and then leaves no process behind.
    Meanwhile, in another terminal: `mycel run "..."`, `mycel chat`, `mycel status`.

    Links can be made worse (--rtt, --jitter, --loss, --bandwidth) and nodes hit (--kill, --stop, --leave). With faults,
    --for or --load the command asks prompts itself and ends with a verdict: every answer is compared with what one
    process alone says, and the exit code is 0 only if all are equal.

    With --train the nodes train a model, and answer from its present parameters, during the run and after it.
    """
    chaos = chaos_of(typed)
    shared = () if chaos.shape.is_plain else ("--shape", str(chaos.shape))
    if train is not None:
        if model is not None or replicas is not None or chaos.is_driven:
            raise click.UsageError("--train goes without --model, --replicas, --for, --load and faults")
        from mycel.cli.train import plan_training, run_training

        training = plan_training(train, nodes, directory, listen=listen, shared=shared)
        ctx.exit(run_training(training, partial(_stay, as_json=as_json)))
    plan = plan_network(model, nodes or 4, replicas or (2 if chaos.rates.any else 1))
    plan = replace(plan, shared=shared)
    place = directory or state_home() / "up"
    if not chaos.is_driven:
        with exclusive(place, "--dir"):
            ctx.exit(trio.run(_up, plan, place, listen, partial(_stay, as_json=as_json)))
    run = ChaosRun.planned(plan, chaos, place)
    with exclusive(place, "--dir"):
        code = trio.run(_up, plan, place, listen, run.play)
    ctx.exit(run.conclude(code, as_object=as_json))


def plan_network(model: Path | None, n_nodes: int, replicas: int) -> LocalPlan:
    """Even shares of a model. Raises ConfigError if it is not one, or cannot be shared like that."""
    from mycel.node.demo import demo_model_dir
    from mycel.node.model_info import inspect_model
    from mycel.swarm.placement import even_spans

    path = demo_model_dir() if model is None else model
    info = inspect_model(path)
    # The embedding is one row to read for each token; the head is read whole, as the blocks are.
    return LocalPlan(
        path.resolve(), even_spans(info.block_bytes, n_nodes, head_bytes=info.head_bytes, replicas=replicas)
    )


async def found_network(network: LocalNetwork, plan: LocalPlan) -> list[LocalNode]:
    """Start the nodes of a plan: one founds the swarm, the others join it side by side."""
    model = ("--model", str(plan.model), *plan.shared)
    (start, end), *others = plan.spans
    founder = await network.start("start", *model, "--blocks", f"{start}:{end}")
    joining = [("join", founder.serving.invite, *model, "--blocks", f"{a}:{b}") for a, b in others]
    return [founder, *await network.start_all(joining)]


def best_invite(nodes: Sequence[LocalNode]) -> str:
    """Of the last node: it names that node and the founder, so that the loss of either leaves a way in."""
    return nodes[-1].serving.invite


async def _up(
    plan: LocalPlan,
    directory: Path,
    listen: str,
    play: Callable[[LocalNetwork, Sequence[LocalNode]], Awaitable[None]],
) -> int:
    from mycel.cli.processes import local_network

    async def found(network: LocalNetwork) -> list[LocalNode]:
        say(f"starting {len(plan.spans)} nodes with {plan.model.name}; logs in {directory}")
        return await found_network(network, plan)

    return await hold(local_network(directory, len(plan.spans), listen), found, play)


async def hold(
    opening: AbstractAsyncContextManager[LocalNetwork],
    found: Callable[[LocalNetwork], Awaitable[Sequence[LocalNode]]],
    play: Callable[[LocalNetwork, Sequence[LocalNode]], Awaitable[None]],
) -> int:
    """Found a network and `play` on it; the exit code: 0 when that is over, or that of a signal that cut it short."""
    from mycel.node.background import background

    code = 0
    with trio.CancelScope() as scope:
        async with background() as tasks:

            async def on_signals(*, task_status: trio.TaskStatus[None]) -> None:
                nonlocal code
                with trio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals:
                    task_status.started()
                    async for number in signals:
                        if not code:
                            say("stopping the nodes")
                        code = INTERRUPTED if number == signal.SIGINT else TERMINATED
                        scope.cancel()

            await tasks.start(on_signals)
            async with opening as network:
                nodes = await found(network)
                invite = best_invite(nodes)
                remember_invite(invite)
                try:
                    await play(network, nodes)
                finally:
                    forget_invite(invite)
    return code


async def _stay(_: LocalNetwork, nodes: Sequence[LocalNode], *, as_json: bool) -> None:
    """Tell how to use the network, and of every node that ends. Raises CommandFailedError when none is left."""
    _show(nodes, best_invite(nodes), as_json=as_json)

    async def one(node: LocalNode) -> None:
        code = await node.process.wait()
        if node.expected:
            return
        say(f"{node.name} (pid {node.pid}) ended with exit code {code}; the end of {node.log}:")
        for line in node.last_words():
            say(f"  {line}")

    async with trio.open_nursery() as nursery:
        for node in nodes:
            nursery.start_soon(one, node)
    raise CommandFailedError("all nodes have ended")


def _show(nodes: Sequence[LocalNode], invite: str, *, as_json: bool) -> None:
    if as_json:
        value = {
            "invite": invite,
            "nodes": [
                {
                    "name": node.name,
                    "peer": node.serving.peer,
                    "blocks": [node.serving.start, node.serving.end],
                    "addresses": list(node.serving.addresses),
                    "pid": node.pid,
                    "log": str(node.log),
                }
                for node in nodes
            ],
        }
        write(json.dumps(value) + "\n")
        return
    for line in node_lines(nodes):
        say(line)
    say("ready; Ctrl-C ends it. In another terminal:")
    say('  mycel run "The for statement is used to" --show-route')
    say("  mycel status")
    say("to bring in another node:")
    write(f"mycel join {invite}\n")


def node_lines(nodes: Sequence[LocalNode]) -> list[str]:
    """A table of nodes."""
    from mycel.cli.answers import columns
    from mycel.swarm.view import short_id

    rows = [("node", "peer", "blocks", "pid", "log")]
    for node in nodes:
        ready = node.serving
        rows.append((node.name, short_id(ready.peer), f"{ready.start}:{ready.end}", str(node.pid), str(node.log)))
    return columns(rows)
