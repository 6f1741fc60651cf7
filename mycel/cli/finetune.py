"""`mycel finetune`: tune a model on this machine with one byte per update, from its recipe to a tuned model.

Ring: shell.
"""

from __future__ import annotations

import shlex
import sys
from pathlib import Path

import click
import msgspec

from mycel.cli.common import make_directory, read_recipe, say, state_home
from mycel.cli.train import plan_training, run_training
from mycel.protocols.errors import AccessDenied, ConfigError
from mycel.swarm.training.recipe import Recipe, canonical
from mycel.swarm.zeroth.options import ZerothOptions

DEFAULT_NODES = 2


@click.command()
@click.argument("recipe", type=click.Path(path_type=Path, dir_okay=False), metavar="RECIPE")
@click.option("--zeroth-order", is_flag=True, help="With one byte per update, whatever method the recipe names.")
@click.option("--lora", type=click.IntRange(1, 1024), metavar="RANK", help="Train low-rank additions of this rank.")
@click.option("--prompt", type=click.IntRange(1, 4096), metavar="N", help="Train a prompt of so many vectors.")
@click.option("--nodes", type=click.IntRange(1, 64), metavar="N", help=f"How many nodes. [default: {DEFAULT_NODES}]")
@click.option(
    "--dir",
    "directory",
    type=click.Path(path_type=Path, file_okay=False),
    metavar="DIR",
    help="Where the tuned model, logs, metrics and keys are kept. [default: ~/.local/state/mycel/finetune/NAME]",
)
@click.option("--threads", type=click.IntRange(1, 1024), metavar="N", help="Threads that each node computes with.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object at the end.")
@click.pass_context
def finetune(  # noqa: PLR0913 - one for each option
    ctx: click.Context,
    /,
    *,
    recipe: Path,
    zeroth_order: bool,
    lora: int | None,
    prompt: int | None,
    nodes: int | None,
    directory: Path | None,
    threads: int | None,
    as_json: bool,
) -> None:
    """Tune a model on this machine with forward passes alone, by a network of real node processes.

    RECIPE is a TOML file as for `mycel train`, with a [method] "zeroth-order" (or --zeroth-order); a step is a round in
    which every node sends up to 256 measurements of one byte each. DIR then holds the tuned model, and each node's log
    of all bytes: `mycel replay DIR` computes the same state from it again. Other machines join with `mycel join`.
    """
    if lora and prompt:
        raise click.UsageError("--lora and --prompt exclude each other")
    n_nodes = nodes or DEFAULT_NODES
    chosen = _chosen(read_recipe(recipe), recipe, zeroth_order=zeroth_order, lora=lora, prompt=prompt, n_nodes=n_nodes)
    place = (directory or state_home() / "finetune" / chosen.name).resolve()
    file = make_directory(place) / "finetune.toml"
    try:
        file.write_text(canonical(chosen), "utf-8")
    except OSError as error:
        raise AccessDenied(f"cannot write {file}: {error.strerror}") from None
    plan = plan_training(file, n_nodes, place, threads=threads)
    code = run_training(plan, as_json=as_json, command=shlex.join(["mycel", *sys.argv[1:]]))
    if not code:
        say(f"to compute the same state from the log: mycel replay {shlex.quote(str(place))}")
    ctx.exit(code)


def _chosen(
    recipe: Recipe, path: Path, *, zeroth_order: bool, lora: int | None, prompt: int | None, n_nodes: int
) -> Recipe:
    """The recipe with what the options say, its places made absolute. Raises ConfigError."""
    method = recipe.method
    if not isinstance(method, ZerothOptions):
        if not zeroth_order:
            raise ConfigError(f'{path}: [method] is not "zeroth-order": say --zeroth-order, or use mycel train')
        method = ZerothOptions()
    if lora:
        method = msgspec.structs.replace(method, parameters="lora", rank=lora)
    if prompt:
        method = msgspec.structs.replace(method, parameters="prompt", prompt_tokens=prompt)
    base = path.resolve().parent
    files = tuple(str(base / Path(name).expanduser()) for name in recipe.data.files)
    model = base / Path(recipe.model.path).expanduser()
    is_here = recipe.model.path != "demo" and model.exists()
    peers = max(recipe.round.peers, (n_nodes + 1) // 2)
    return msgspec.structs.replace(
        recipe,
        method=method,
        data=msgspec.structs.replace(recipe.data, files=files),
        model=msgspec.structs.replace(recipe.model, path=str(model) if is_here else recipe.model.path),
        round=msgspec.structs.replace(recipe.round, peers=peers),
    )
