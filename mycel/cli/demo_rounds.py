"""`mycel demo --rounds RECIPE`: eight nodes train by rounds, two of them lie, one is killed and one comes late.

Three runs of real processes, one after the other: honest nodes alone, for comparison; with the liars and the plain
mean, until it is lost; with the liars and the recipe's rule, and there a crash and a latecomer as well. At the end the
loss of the last has to be within BOUND of the honest one's, and all honest nodes have to have had equal parameters
after every round.

Ring: shell.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
import trio

from mycel.cli.answers import columns, counted
from mycel.cli.common import make_directory, say, state_home
from mycel.cli.exits import CommandFailedError
from mycel.cli.train import TrainingPlan, joining, plan_training
from mycel.cli.training_view import NodesWatch, progress_of
from mycel.node.training.metrics import StepMetrics, disagreements, merge, metrics_path, read_each
from mycel.node.training.plots import can_plot, plot_losses
from mycel.swarm.training.progress import progress_line
from mycel.swarm.training.recipe import ExactOptions, Recipe, canonical

if TYPE_CHECKING:
    from mycel.cli.processes import LocalNetwork, LocalNode

N_HONEST = 6
LIARS = ("sign-flip", "x1000")
BOUND = 1.08
# The end of a run is the mean of so many last rounds, over all honest nodes.
_LAST_ROUNDS = 3
_LOOK_EVERY_S = 0.25
_LINE_EVERY_S = 10.0
# The whole of one run; a run that stands still has failed.
_RUN_S = 240.0
# A run is lost whose loss is so many times its first one, or that has made no round for so long.
_LOST_AT = 3.0
_STILL_S = 30.0


def demo_rounds(recipe_file: Path, directory: Path) -> None:
    """The whole story, in `directory`. Raises CommandFailedError for a bound that was not held."""
    plan = plan_training(recipe_file, None, directory)
    if isinstance(plan.recipe.method, ExactOptions):
        raise CommandFailedError(f"{recipe_file} is no recipe of rounds: it has no [method]")
    began_s = time.monotonic()
    trio.run(_story, plan)
    _step(f"{time.monotonic() - began_s:.0f} s in all; the nodes have ended")


async def _story(plan: TrainingPlan) -> None:
    _step(f"first, for comparison, {N_HONEST} honest nodes and nobody else: {_what(plan)}")
    honest = await _play(RoundsRun(_variant(plan, "honest", rule="mean", liars=0.0)))
    _step(f"the same with {counted(len(LIARS), 'liar')} among {N_HONEST + len(LIARS)} nodes, and the plain mean")
    mean = await _play(RoundsRun(_variant(plan, "mean", rule="mean", liars=0.0), LIARS, may_be_lost=True))
    rule = plan.recipe.round.rule or "Mycel's rule"
    _step(f"the same liars and {rule}; one node comes late, and one is killed")
    ours = await _play(RoundsRun(_variant(plan, "ours"), LIARS, disturbed=True))
    _step("all runs side by side:")
    _table(columns(_rows(honest, mean, ours)))
    _draw({"honest nodes alone": honest, "2 of 8 lie, plain mean": visible(mean), f"2 of 8 lie, {rule}": ours})
    ratio = _end(ours) / _end(honest)
    _table([f"the end of the last run: {ratio:.4f} times the loss of honest nodes alone"])
    if not ratio <= BOUND:
        raise CommandFailedError(f"with liars the loss at the end is {ratio:.3f} times that of honest nodes")


def _what(plan: TrainingPlan) -> str:
    n_rounds = -(-plan.n_steps // _stride(plan.recipe))
    return f"{counted(n_rounds, 'round')} of {_stride(plan.recipe)} steps"


def _stride(recipe: Recipe) -> int:
    return getattr(recipe.method, "inner_steps", 1)


def _variant(plan: TrainingPlan, name: str, **changes: object) -> TrainingPlan:
    """The same run under another name and other terms, in a folder of its own."""
    directory = make_directory(plan.directory / name)
    part = msgspec.structs.replace(plan.recipe.round, peers=N_HONEST, **changes)
    recipe = msgspec.structs.replace(plan.recipe, name=f"{plan.recipe.name}-{name}"[:64], round=part)
    file = directory / "recipe.toml"
    file.write_text(canonical(recipe), "utf-8")
    return replace(plan, recipe_file=file, recipe=recipe, directory=directory, n_nodes=N_HONEST + len(LIARS), threads=1)


@dataclass(eq=False, slots=True)
class RoundsRun:
    """One of the runs: its honest nodes, then its liars. `disturbed`: one comes late, one is killed.

    `may_be_lost`: where nothing is to be won any more the run ends early.
    """

    plan: TrainingPlan
    liars: Sequence[str] = ()
    disturbed: bool = False
    may_be_lost: bool = False
    honest: list[LocalNode] = field(default_factory=list)
    _said_at_s: float = float("-inf")
    _said: int = 0

    async def start(self, network: LocalNetwork) -> None:
        """The founder, then all others side by side; the late one not yet."""
        plan = self.plan
        checkpoints = ("--checkpoints", str(plan.checkpoints))
        founder = await network.start("start", "--train", str(plan.recipe_file), *checkpoints)
        join = joining(plan, founder.serving.invite)
        n_honest = N_HONEST - self.disturbed
        others = [join] * (n_honest - 1) + [(*join, "--liar", name) for name in self.liars]
        nodes = await network.start_all(others)
        self.honest += [founder, *nodes[: n_honest - 1]]

    async def follow(self, network: LocalNetwork) -> None:
        """Until every honest node that is there has made the last step."""
        watch, n_steps = NodesWatch(network, self.plan.recipe, say), self.plan.n_steps
        came = killed = not self.disturbed
        end = LostRun()
        while self._slowest(watch) < n_steps:
            record = watch.look()
            step = self._show(record)
            if self.may_be_lost and (why := end.why_lost(record, trio.current_time())):
                _step(f"this run is lost: {why}")
                return
            if not came and step >= n_steps // 4:
                came = True
                await self._come(network)
            if not killed and step >= n_steps // 2:
                killed = True
                victim = self.honest.pop(0)
                victim.kill()
                _step(f"step {step}: {victim.name}, which founded the run, is killed (SIGKILL)")
            await trio.sleep(_LOOK_EVERY_S)
        self._show(watch.look())
        if not (came and killed):
            raise CommandFailedError("the run was over before its latecomer had come and its founder was killed")

    async def _come(self, network: LocalNetwork) -> None:
        began_s = trio.current_time()
        late = await network.start(*joining(self.plan, self.honest[-1].serving.invite))
        self.honest.append(late)
        _step(f"{late.name} comes late, {trio.current_time() - began_s:.0f} s after its start")

    def _slowest(self, watch: NodesWatch) -> int:
        return min(watch.step_of(node) for node in self.honest)

    def _show(self, record: StepMetrics | None) -> int:
        if record is None:
            return 0
        now = trio.current_time()
        if record.step != self._said and (now - self._said_at_s >= _LINE_EVERY_S or record.step == self.plan.n_steps):
            self._said, self._said_at_s = record.step, now
            _table([progress_line(progress_of(record, self.plan.recipe))])
        return record.step

    def metrics(self) -> list[StepMetrics]:
        """One record a step, with the mean loss of the honest nodes. Raises CommandFailedError if they have parted."""
        run = bytes.fromhex(self.honest[0].serving.swarm)
        records = read_each([metrics_path(self.plan.directory / node.name, run) for node in self.honest])
        if wrong := disagreements(records):
            raise CommandFailedError(f"honest nodes had different parameters: {wrong[0]}")
        last = [record for record in records if record.step == self.plan.n_steps]
        if last:
            told = ", ".join(sorted({record.params.get(0, "")[:16] for record in last}))
            _table([f"one hash of {counted(len(last), 'honest node')} after the last round: {told}"])
        return [_with_mean(record, records) for record in merge(records)]


@dataclass(eq=False, slots=True)
class LostRun:
    """Watches whether a run is still worth waiting for."""

    first: float | None = None
    _step: int = 0
    _moved_at_s: float | None = None

    def why_lost(self, record: StepMetrics | None, now: float) -> str:
        """Why not, if it is not; `record` is the newest, and this is called often."""
        if record is None:
            return ""
        if record.loss is not None:
            self.first = record.loss if self.first is None else self.first
            if not record.loss <= _LOST_AT * self.first:
                return f"its loss is {record.loss:.3g} after step {record.step}, and was {self.first:.3g} at first"
        if self._moved_at_s is None or record.step != self._step:
            self._step, self._moved_at_s = record.step, now
        if now - self._moved_at_s >= _STILL_S:
            return f"since step {record.step} no round has come to anything for {_STILL_S:.0f} s"
        return ""


def visible(metrics: Sequence[StepMetrics]) -> list[StepMetrics]:
    """What can be drawn beside a run that learns: up to where the loss leaves every scale."""
    seen: list[StepMetrics] = []
    known = [record.loss for record in metrics if record.loss is not None]
    for record in metrics:
        if record.loss is not None and not record.loss <= _LOST_AT * known[0]:
            # Its line goes up to the edge, and no further.
            return [*seen, msgspec.structs.replace(record, loss=_LOST_AT * known[0])]
        seen.append(record)
    return seen


async def _play(run: RoundsRun) -> list[StepMetrics]:
    from mycel.cli.processes import local_network

    plan = run.plan
    async with local_network(plan.directory, plan.n_nodes, plan.listen, plan.threads) as network:
        with trio.move_on_after(_RUN_S) as patience:
            await run.start(network)
            await run.follow(network)
        if patience.cancelled_caught:
            raise CommandFailedError(f"the run was not over after {_RUN_S:.0f} s; logs in {plan.directory}")
        return run.metrics()


def _with_mean(record: StepMetrics, records: Sequence[StepMetrics]) -> StepMetrics:
    losses = [other.loss for other in records if other.step == record.step and other.loss is not None]
    return msgspec.structs.replace(record, loss=sum(losses) / len(losses) if losses else None)


def _end(metrics: Sequence[StepMetrics]) -> float:
    known = [record.loss for record in metrics if record.loss is not None][-_LAST_ROUNDS:]
    if not known:
        raise CommandFailedError("a run has no loss at all")
    return sum(known) / len(known)


def _rows(*runs: Sequence[StepMetrics]) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = [("step", "honest alone", "liars, plain mean", "liars, our rule")]
    by_step = [{record.step: record.loss for record in run} for run in runs]
    for step in sorted(set().union(*by_step)):
        losses = (losses.get(step) for losses in by_step)
        rows.append((str(step), *("-" if loss is None else f"{loss:.3f}" for loss in losses)))
    return rows


def _draw(runs: dict[str, list[StepMetrics]]) -> None:
    drawable = {name: metrics for name, metrics in runs.items() if any(m.loss is not None for m in metrics)}
    if can_plot():
        png, _ = plot_losses(drawable, state_home() / "demo-rounds", "rounds with liars")
        _table([f"drawn in {png}"])


def _step(text: str) -> None:
    say(f"== {text}")


def _table(lines: Sequence[str]) -> None:
    for line in lines:
        say(f"   {line}")
