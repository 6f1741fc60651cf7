"""`mycel join`: help a swarm with this machine."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import click

from mycel.cli.common import find_invite, read_recipe
from mycel.cli.serving import NodeOptions, checkpoints_option, node_options, serve


@click.command()
@click.argument("invite", nargs=-1)
@click.option(
    "--model",
    type=click.Path(path_type=Path),
    metavar="MODEL",
    help="The swarm's model, if this machine has it (a directory, or ORG/NAME of a repository): spares the download.",
)
@click.option(
    "--train-data",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="RECIPE",
    help="Of a training run: drive microbatches, too, with the text that this recipe names on this machine.",
)
@checkpoints_option
@node_options
@click.pass_context
def join(ctx: click.Context, /, *, invite: tuple[str, ...], train_data: Path | None, **options: Any) -> None:
    """Help a swarm with this machine.

    INVITE is what `mycel start` printed. Measures how much of the model this machine can hold, takes the blocks that
    the swarm needs most, fetches their weights from the other nodes, and serves them. Ctrl-C leaves the swarm.

    If the swarm trains its model, this machine takes the stage that computes least, fetches its parameters and
    optimizer state while the run goes on, and trains.
    """
    text = "".join(invite) or os.environ.get("MYCEL_INVITE", "")
    if not text:
        raise click.UsageError("which swarm? Give the invite that `mycel start` printed: mycel join mycel1:...", ctx)
    if train_data is not None:
        read_recipe(train_data)
    ctx.exit(serve(NodeOptions(dtype="auto", train=train_data, **options), find_invite(text)))
