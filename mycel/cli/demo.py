"""`mycel demo`: from nothing to text from four node processes, one of which is killed while it speaks."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import click
import trio

from mycel.cli.common import say, write
from mycel.cli.demo_rounds import demo_rounds
from mycel.cli.demo_train import demo_training
from mycel.cli.exits import CommandFailedError

if TYPE_CHECKING:
    from mycel.cli.processes import LocalNetwork
    from mycel.cli.up import LocalPlan
    from mycel.node.client import Generation, Model
    from mycel.protocols.messages import SamplingParams
    from mycel.swarm.routing import Hop
    from mycel.swarm.view import View

N_NODES = 4
PROMPT = "The for statement is used to"
N_TOKENS = 110
KILL_AFTER = 20
SEED = 1
PATIENCE_S = 30.0


@click.command()
@click.option(
    "--train",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="RECIPE",
    help="See a training run instead: it loses a node of each stage, and its loss goes on as if nothing had been.",
)
@click.option(
    "--rounds",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="RECIPE",
    help="See a run of rounds instead: two of eight nodes lie, one is killed and one comes late.",
)
def demo(train: Path | None, rounds: Path | None) -> None:
    """See it work: four nodes answer a prompt, and lose one of them.

    Starts a network of four processes on this machine with the small model inside Mycel, lets it continue a prompt,
    adds a fifth node, and lets it do the same again while one node is killed. The text has to be the same.
    """
    directory = Path(tempfile.mkdtemp(prefix="mycel-demo-"))
    try:
        if train is not None:
            demo_training(train, directory)
        elif rounds is not None:
            demo_rounds(rounds, directory)
        else:
            trio.run(_demo, directory)
    except Exception:
        say(f"the logs of the nodes: {directory}")
        raise
    except BaseException:
        shutil.rmtree(directory, ignore_errors=True)
        raise
    shutil.rmtree(directory, ignore_errors=True)


@dataclass(frozen=True, slots=True)
class Stage:
    """What the story is played with."""

    network: LocalNetwork
    model: Model
    sampling: SamplingParams


async def _demo(directory: Path) -> None:
    from mycel.cli.processes import local_network
    from mycel.cli.sampling_options import sampling_params
    from mycel.cli.status import read_status, status_lines
    from mycel.cli.up import best_invite, found_network, node_lines
    from mycel.node.client import connect

    began = trio.current_time()
    plan = _plan()
    async with local_network(directory, N_NODES) as network:
        _step(
            f"starting {N_NODES} node processes, each with {plan.spans[0][1]} of the model's {plan.spans[-1][1]} blocks"
        )
        nodes = await found_network(network, plan)
        _table(node_lines(nodes))
        _step(f'asking them to continue "{PROMPT}"')
        async with connect(best_invite(nodes), cache_dir=directory / "client") as model:
            stage = Stage(network, model, sampling_params({"seed": SEED}, plan.model))
            before = await _speak(stage, kill=False)

            _step("a fifth node joins with the invite and takes blocks that the swarm needs most; `mycel status`:")
            # Twice a share: wherever it goes, all blocks of at least one other node are then served twice.
            limits = ("--max-blocks", str(2 * plan.spans[0][1]))
            await network.start("join", best_invite(nodes), "--model", str(plan.model), *limits)
            _table(status_lines(await read_status(model)))

            _step(f"the same prompt again, and after {KILL_AFTER} tokens a node of the route is killed (SIGKILL)")
            after = await _speak(stage, kill=True)
        if not after.trace.replaced:
            raise CommandFailedError("no hop was replaced: the answer was over before the loss was noticed")
        if (after.text, after.tokens) != (before.text, before.tokens):
            raise CommandFailedError("the text is not the same after the loss of a node")
        _step(f"the text is the same. {trio.current_time() - began:.0f} s in all; ending the nodes")


def _plan() -> LocalPlan:
    """Blocks alone count here, so that each node has the same number of them."""
    from mycel.cli.up import LocalPlan
    from mycel.node.demo import demo_model_dir
    from mycel.swarm.placement import even_spans

    directory = demo_model_dir()
    # Our own model's configuration; inspecting it as a stranger's would import torch, which takes seconds.
    n_blocks = json.loads((directory / "config.json").read_bytes())["num_hidden_layers"]
    return LocalPlan(directory, even_spans([1] * n_blocks, N_NODES))


async def _speak(stage: Stage, *, kill: bool) -> Generation:
    """The answer to PROMPT, streamed, and its route; with `kill`, a node of the route dies while it speaks."""
    from mycel.cli.answers import show_route, stream_text, summary

    view = await stage.model.view()
    async with stage.model.generate(
        PROMPT, max_new_tokens=N_TOKENS, sampling=stage.sampling, patience_s=PATIENCE_S
    ) as generation:

        def after_token(n_tokens: int) -> None:
            if kill and n_tokens == KILL_AFTER:
                peer = choose_victim(generation.trace.hops, view)
                victim = next(node for node in stage.network.nodes if node.serving.peer == peer)
                victim.kill()
                click.echo(f" [{victim.name} killed] ", err=True, nl=False)

        write(PROMPT)
        await stream_text(generation, after_token)
    show_route(generation.trace)
    say(summary(generation.trace))
    return generation


def choose_victim(hops: Sequence[Hop], view: View) -> str:
    """A peer of the route whose blocks others serve, too. Raises CommandFailedError if there is none."""
    for hop in hops:
        others = view.without([hop.peer.peer])
        if all(others.holders(block) for block in range(hop.start, hop.end)):
            return hop.peer.peer
    raise CommandFailedError("every node of the route is the only one with its blocks: none can be spared")


def _step(text: str) -> None:
    say(f"== {text}")


def _table(lines: Sequence[str]) -> None:
    for line in lines:
        say(f"   {line}")
