"""`mycel train`: a training run on this machine, from its recipe to a checkpoint and a picture of its loss.

Ring: shell.
"""

from __future__ import annotations

import json
import re
import shlex
import sys
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import trio

from mycel.cli.answers import counted
from mycel.cli.common import exclusive, make_directory, read_recipe, say, state_home, write
from mycel.cli.training_view import NodesWatch, ProgressView, progress_of
from mycel.node.training.metrics import FILE_NAME, StepMetrics, metrics_path, read_metrics, write_metrics
from mycel.node.training.plots import can_plot, plot_loss, plot_losses
from mycel.protocols.errors import AccessDenied, ConfigError
from mycel.swarm.training.progress import show_duration
from mycel.swarm.training.recipe import Recipe, canonical, n_steps, parse_recipe
from mycel.swarm.zeroth.options import ZerothOptions

if TYPE_CHECKING:
    from mycel.cli.processes import LocalNetwork, LocalNode

_LOOK_EVERY_S = 0.5
_CHECKPOINT = re.compile(r"step-(\d{1,12})")
LISTEN = "/ip4/127.0.0.1/tcp/0"
_MEANWHILE = '. Meanwhile, in another terminal: mycel run "..."'


@dataclass(frozen=True, slots=True)
class TrainingPlan:
    """A run on this machine: its recipe, how many nodes, where everything lies, and what all nodes are told besides."""

    recipe_file: Path
    recipe: Recipe
    n_nodes: int
    directory: Path
    listen: str = LISTEN
    threads: int | None = None
    shared: tuple[str, ...] = ()

    @property
    def checkpoints(self) -> Path:
        return self.directory / "checkpoints"

    @property
    def n_steps(self) -> int:
        return n_steps(self.recipe)


@click.command()
@click.argument("recipe", nargs=-1, type=click.Path(path_type=Path), metavar="RECIPE")
@click.option(
    "--nodes",
    type=click.IntRange(1, 64),
    metavar="N",
    help="How many node processes. [default: as many as the recipe has stages]",
)
@click.option(
    "--dir",
    "directory",
    type=click.Path(path_type=Path, file_okay=False),
    metavar="DIR",
    help="Where checkpoints, metrics, the plot, keys and logs are kept. [default: ~/.local/state/mycel/train/NAME]",
)
@click.option(
    "--threads",
    type=click.IntRange(1, 1024),
    metavar="N",
    help="Threads that each node computes with. [default: an even share of all cores]",
)
@click.option(
    "--plot",
    is_flag=True,
    help="Train nothing: draw the loss again, from the metrics in the directories named in place of RECIPE.",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object at the end.")
@click.pass_context
def train(
    ctx: click.Context,
    /,
    *,
    recipe: tuple[Path, ...],
    nodes: int | None,
    directory: Path | None,
    threads: int | None,
    plot: bool,
    as_json: bool,
) -> None:
    """Train a model on this machine, with a network of real node processes.

    RECIPE is a TOML file: which model, which text, how many stages and steps. Each node hosts one stage and drives
    microbatches through all of them. At the end DIR holds the checkpoints, metrics.jsonl, loss.png and loss.svg, and
    the last line says how to serve what was trained.

    Ctrl-C stops; the same command goes on from the newest checkpoint. Meanwhile `mycel run` answers from the present
    parameters. Several directories with --plot give one picture, losses.png and losses.svg.
    """
    if plot:
        if not recipe or nodes or threads or as_json:
            raise click.UsageError("--plot takes directories of runs, and no other option than --dir")
        draw_again(recipe, directory)
        return
    if len(recipe) != 1:
        raise click.UsageError("which recipe? Name one TOML file: mycel train RECIPE")
    plan = plan_training(recipe[0], nodes, directory, threads=threads)
    ctx.exit(run_training(plan, as_json=as_json, command=shlex.join(["mycel", *sys.argv[1:]])))


def plan_training(
    recipe_file: Path,
    n_nodes: int | None,
    directory: Path | None,
    *,
    listen: str = LISTEN,
    threads: int | None = None,
    shared: tuple[str, ...] = (),
) -> TrainingPlan:
    """What a recipe asks for. Raises ConfigError for a bad recipe, or more stages than nodes."""
    recipe = read_recipe(recipe_file)
    if n_nodes is not None and n_nodes < recipe.stages:
        few = f"{counted(n_nodes, 'node')} cannot host {counted(recipe.stages, 'stage')}"
        raise ConfigError(f"{few} of {recipe_file}: each stage needs one")
    place = directory or state_home() / "train" / recipe.name
    return TrainingPlan(
        recipe_file.resolve(), recipe, n_nodes or recipe.stages, place.resolve(), listen, threads, shared
    )


Play = Callable[["LocalNetwork", Sequence["LocalNode"]], Awaitable[None]]


def run_training(
    plan: TrainingPlan, afterwards: Play | None = None, *, as_json: bool = False, command: str = ""
) -> int:
    """Train until the run is done, with `afterwards` beside it, if there is such; the exit code."""
    from mycel.cli.processes import local_network
    from mycel.cli.up import hold

    run = TrainingRun(plan, command)
    with exclusive(plan.directory, "--dir"):
        run.settle()
        code = 0
        if run.checkpoint is None or afterwards is not None:
            opening = local_network(plan.directory, plan.n_nodes, plan.listen, plan.threads)
            try:
                code = trio.run(hold, opening, partial(found_training, plan=plan), partial(run.play, beside=afterwards))
            except BaseException:
                if run.last is not None:
                    run.conclude(1, as_json=False)
                raise
        run.conclude(code, as_json=as_json)
    return code


async def found_training(network: LocalNetwork, plan: TrainingPlan) -> list[LocalNode]:
    """Start the nodes: one founds the run or goes on from its newest checkpoint, the others join it side by side."""
    what = f"{plan.n_nodes} nodes for {plan.recipe.stages} stages"
    say(f"training {plan.recipe.name}: starting {what}; logs in {plan.directory}")
    common = ("--checkpoints", str(plan.checkpoints), *plan.shared)
    founder = await network.start("start", "--train", str(plan.recipe_file), *common)
    join = joining(plan, founder.serving.invite)
    return [founder, *await network.start_all([join] * (plan.n_nodes - 1))]


def joining(plan: TrainingPlan, invite: str) -> tuple[str, ...]:
    """What starts one more node of the run."""
    common = ("--checkpoints", str(plan.checkpoints), *plan.shared)
    return ("join", invite, "--train-data", str(plan.recipe_file), *common)


@dataclass(eq=False, slots=True)
class TrainingRun:
    """One run: `settle` in its directory, `play` on a network, then `conclude`, also after it was interrupted.

    `command` is what to type to go on. `first` and `last` are the first and the last step that were seen.
    """

    plan: TrainingPlan
    command: str = ""
    n_lost: int = 0
    seconds: float = 0.0
    first: StepMetrics | None = None
    last: StepMetrics | None = None
    _run: bytes | None = None

    @property
    def checkpoint(self) -> Path | None:
        """The checkpoint of the last step, if it is whole: then the run is done."""
        newest = newest_checkpoint(self.plan.checkpoints)
        return newest[1] if newest is not None and newest[0] >= self.plan.n_steps else None

    def settle(self) -> None:
        """Make the directory this run's. Raises ConfigError if it is another's."""
        place = make_directory(self.plan.directory) / "recipe.toml"
        make_directory(self.plan.checkpoints)
        try:
            if not place.exists():
                place.write_text(canonical(self.plan.recipe), "utf-8")
            there = place.read_text("utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise AccessDenied(f"cannot read and write {place}: {error}") from None
        if parse_recipe(there, str(place)) != self.plan.recipe:
            raise ConfigError(f"{place.parent} holds a run of another recipe (recipe.toml): name another with --dir")
        if not can_plot():
            say("no plot will be drawn: that needs matplotlib, pip install 'mycel[train]'")
        newest = newest_checkpoint(self.plan.checkpoints)
        if newest is not None and newest[0] < self.plan.n_steps:
            say(f"going on from step {newest[0]}: {newest[1]}")

    async def play(self, network: LocalNetwork, nodes: Sequence[LocalNode], *, beside: Play | None = None) -> None:
        """Show the run until its last checkpoint is whole, and as long as `beside` goes on."""
        self._run = bytes.fromhex(nodes[0].serving.swarm)
        if beside is None:
            asked = "" if isinstance(self.plan.recipe.method, ZerothOptions) else _MEANWHILE
            say(f"all nodes are there; Ctrl-C stops{asked}")
            await self._follow(network, ProgressView())
            return
        async with trio.open_nursery() as nursery:
            nursery.start_soon(beside, network, nodes)
            # A table that is drawn over itself would be in the way of what else is said.
            await self._follow(network, ProgressView(is_terminal=False))
            self._say_end(await trio.to_thread.run_sync(self._write_down))

    async def _follow(self, network: LocalNetwork, view: ProgressView) -> None:
        watch, began_s = NodesWatch(network, self.plan.recipe, view.tell), trio.current_time()
        try:
            while True:
                done = self.checkpoint is not None  # before the look, which then shows the last step
                record = watch.look()
                self.n_lost, self.seconds = watch.n_lost, trio.current_time() - began_s
                if record is not None:
                    self.first, self.last = self.first or record, record
                    view.show(progress_of(record, self.plan.recipe))
                if done:
                    return
                await trio.sleep(_LOOK_EVERY_S)
        finally:
            view.close()

    def conclude(self, code: int, *, as_json: bool) -> None:
        """Write metrics and plot, and say what there is."""
        metrics = self._write_down()
        if as_json:
            write(json.dumps(self._summary(metrics, interrupted=bool(code))) + "\n")
        elif self.checkpoint is not None:
            self._say_end(metrics)
        else:
            newest = newest_checkpoint(self.plan.checkpoints)
            step = metrics[-1].step if metrics else 0
            kept = f"the newest checkpoint is {newest[1]}" if newest else "there is no checkpoint yet"
            say(f"stopped after step {step} of {self.plan.n_steps}; {kept}")
            if self.command:
                say(f"to go on from there: {self.command}")

    def _write_down(self) -> list[StepMetrics]:
        """All nodes' metrics in one file, and its picture; the metrics."""
        directory = self.plan.directory
        metrics = read_metrics([directory / FILE_NAME] if self._run is None else files_of(directory, self._run))
        if metrics:
            write_metrics(directory / FILE_NAME, metrics)
        if can_plot() and any(record.loss is not None for record in metrics):
            plot_loss(
                metrics, directory / "loss", f"{self.plan.recipe.name}: {counted(self.plan.recipe.stages, 'stage')}"
            )
        return metrics

    def _say_end(self, metrics: Sequence[StepMetrics]) -> None:
        if metrics:
            last = metrics[-1]
            parts = [f"{last.step} steps", f"{last.tokens:,} tokens"]
            parts += [] if last.loss is None else [f"loss {last.loss:.3f}"]
            parts += [f"{show_duration(self.seconds)} of training"] if self.seconds else []
            parts += [f"{counted(self.n_lost, 'node')} lost"] if self.n_lost else []
            say(f"done: {', '.join(parts)}")
            say(f"metrics.jsonl, loss.png and loss.svg are in {self.plan.directory}")
        if self.plan.recipe.has_bottlenecks:
            say(f"the last checkpoint is {self.checkpoint}; with learned bottlenecks it is no Hugging Face model")
            return
        say(f"the last checkpoint is {self.checkpoint}; to serve it:")
        write(f"mycel start --model {shlex.quote(str(self.checkpoint))}\n")

    def _summary(self, metrics: Sequence[StepMetrics], *, interrupted: bool) -> dict[str, Any]:
        newest = newest_checkpoint(self.plan.checkpoints)
        last = metrics[-1] if metrics else StepMetrics(0, 0)
        tokens = 0 if self.first is None or self.last is None else self.last.tokens - self.first.tokens
        seconds = 0.0 if self.first is None or self.last is None else self.last.unix - self.first.unix
        return {
            "run": self.plan.recipe.name,
            "steps": last.step,
            "n_steps": self.plan.n_steps,
            "tokens": last.tokens,
            "loss": last.loss,
            "tokens_per_s": round(tokens / seconds, 1) if seconds > 0 else None,
            "seconds": round(self.seconds, 3),
            "sent_bytes": last.sent_bytes,
            "peers_lost": self.n_lost,
            "checkpoint": None if newest is None else str(newest[1]),
            "checkpoint_step": None if newest is None else newest[0],
            "done": self.checkpoint is not None,
            "interrupted": interrupted,
            "directory": str(self.plan.directory),
        }


def files_of(directory: Path, run: bytes) -> list[Path]:
    """What the nodes of a local network have written of a run, in this life or an earlier one."""
    return sorted(directory.glob(str(metrics_path(Path("*"), run))))


def newest_checkpoint(directory: Path) -> tuple[int, Path] | None:
    """The step and the place of the newest whole checkpoint: one is given its name when all of it is there."""
    try:
        found = [(int(m[1]), path) for path in directory.iterdir() if (m := _CHECKPOINT.fullmatch(path.name))]
    except FileNotFoundError:
        return None
    except OSError as error:
        raise AccessDenied(f"cannot read {directory}: {error.strerror}") from None
    return max(found, default=None)


def draw_again(directories: Sequence[Path], place: Path | None) -> None:
    """loss.png and loss.svg of one run in its directory, or losses.png and losses.svg of several in the first one's.

    Raises ConfigError for a directory without metrics.
    """
    runs: dict[str, list[StepMetrics]] = {}
    for directory in directories:
        whole = directory / FILE_NAME
        label = directory.resolve().name
        # A run that was cut short by a power cut has no file of its own yet, but its nodes have.
        paths = [whole] if whole.exists() else sorted(directory.glob(f"*/runs/*/{FILE_NAME}"))
        metrics = runs[str(directory) if label in runs else label] = read_metrics(paths)
        if not metrics:
            raise ConfigError(f"{directory} holds no metrics of a run ({FILE_NAME})")
    where = place or directories[0]
    if len(runs) == 1:
        ((label, metrics),) = runs.items()
        pictures = plot_loss(metrics, where / "loss", label)
    else:
        pictures = plot_losses(runs, where / "losses", ", ".join(runs))
    for picture in pictures:
        write(f"{picture}\n")
