"""`mycel start`: found a swarm with a model of one's own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from mycel.cli.serving import NodeOptions, node_options, serve


@click.command()
@click.option(
    "--model",
    type=click.Path(path_type=Path),
    required=True,
    metavar="MODEL",
    help="The model to share: a Hugging Face directory with config.json, safetensors and tokenizer.json, or the name "
    "of a repository, ORG/NAME or ORG/NAME@REVISION.",
)
@click.option(
    "--dtype",
    type=click.Choice(["auto", "float32", "bfloat16", "float16"]),
    default="auto",
    show_default=True,
    help="What the whole swarm computes in. auto: float32 for small models, else what the files hold.",
)
@node_options
@click.pass_context
def start(ctx: click.Context, /, **options: Any) -> None:
    """Found a swarm: share a model from this machine.

    Prints one line, `mycel join mycel1:...`, to be run on each machine that shall help. This node serves as many blocks
    as its memory holds, and hands the weights of all others to whoever joins. Ctrl-C leaves the swarm.
    """
    ctx.exit(serve(NodeOptions(**options), None))
