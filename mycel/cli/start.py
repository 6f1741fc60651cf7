"""`mycel start`: found a swarm with a model of one's own."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from mycel.cli.common import read_recipe
from mycel.cli.serving import NodeOptions, checkpoints_option, node_options, serve


@click.command()
@click.option(
    "--model",
    type=click.Path(path_type=Path),
    metavar="MODEL",
    help="The model to share: a Hugging Face directory with config.json, safetensors and tokenizer.json, or the name "
    "of a repository, ORG/NAME or ORG/NAME@REVISION.",
)
@click.option(
    "--train",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="RECIPE",
    help="Train instead: found a run with this recipe, which names the model, the text and the steps.",
)
@checkpoints_option
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
    """Found a swarm: share a model from this machine, or train one (--train).

    Prints one line, `mycel join mycel1:...`, to be run on each machine that shall help. This node serves as many blocks
    as its memory holds, and hands the weights of all others to whoever joins. Ctrl-C leaves the swarm.

    With --train it hosts one stage of the model and drives microbatches, and the run begins once every stage has a
    node. `mycel run` asks the same swarm, which answers from the present parameters.
    """
    checked_sources(options)
    ctx.exit(serve(NodeOptions(**options), None))


def checked_sources(options: Mapping[str, Any]) -> None:
    """A model to share or a recipe to train, and what goes with it. Raises UsageError, and ConfigError for a recipe."""
    if (options["model"] is None) == (options["train"] is None):
        raise click.UsageError("what is it about? Give --model to share a model, or --train to train one")
    if options["train"] is None and options["checkpoints"] is not None:
        raise click.UsageError("--checkpoints goes with --train")
    if options["train"] is not None and options["dtype"] != "auto":
        raise click.UsageError("--dtype goes with --model: a run is trained in float32")
    if options["train"] is not None:
        read_recipe(options["train"])
