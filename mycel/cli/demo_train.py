"""`mycel demo --train RECIPE`: a run that loses a node of each stage, beside the same run left in peace.

Both are real: node processes on this machine, SIGKILL, newcomers that fetch a stage's state while the run goes on. At
the end the losses have to be the same within BOUND, all nodes of a stage have to have had equal parameters after every
step, and what the swarm says has to be what its checkpoint says in one process.

Ring: shell.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import trio

from mycel.cli.answers import columns, counted, show_route, stream_text, summary
from mycel.cli.common import say, state_home, write
from mycel.cli.exits import CommandFailedError
from mycel.cli.train import TrainingPlan, files_of, found_training, joining, newest_checkpoint, plan_training
from mycel.cli.training_view import NodesWatch, progress_of
from mycel.node.training.metrics import StepMetrics, disagreements, merge, read_each, read_metrics
from mycel.node.training.plots import can_plot, plot_losses
from mycel.swarm.training.bell import Bell
from mycel.swarm.training.progress import progress_line

if TYPE_CHECKING:
    from mycel.cli.processes import LocalNetwork, LocalNode
    from mycel.protocols.messages import SamplingParams

PER_STAGE = 2
BOUND = 0.02
# A single step's loss is that of its samples; the end of a run is the mean of so many.
_LAST_STEPS = 10
PROMPT = "The for statement"
N_TOKENS = 40
_LOOK_EVERY_S = 0.25
_LINE_EVERY_S = 10.0
_PATIENCE_S = 30.0


def demo_training(recipe_file: Path, directory: Path) -> None:
    """The whole story, in `directory`. Raises CommandFailedError for a bound that was not held."""
    recipe = plan_training(recipe_file, None, directory).recipe
    calm = plan_training(recipe_file, recipe.stages, directory / "undisturbed", threads=1)
    rough = plan_training(recipe_file, PER_STAGE * recipe.stages, directory / "disturbed", threads=1)
    began_s = time.monotonic()
    trio.run(_story, calm, rough)
    _step(f"{time.monotonic() - began_s:.0f} s in all; the nodes have ended")


async def _story(calm: TrainingPlan, rough: TrainingPlan) -> None:
    n_stages, n_steps = rough.recipe.stages, rough.n_steps
    what = f"{counted(n_steps, 'step')} of {rough.recipe.step.batch_tokens:,} tokens"
    _step(f"first, for comparison, {what} left in peace: {calm.n_nodes} processes, one for each stage")
    undisturbed = await _train(calm)
    _step(f"the same run with {rough.n_nodes} processes, {PER_STAGE} for each of {counted(n_stages, 'stage')}")
    run = DisturbedRun(rough, {record.step: record for record in undisturbed})
    await run.play()


async def _train(plan: TrainingPlan) -> list[StepMetrics]:
    """A run that nobody disturbs, from its first step to its last; its metrics."""
    from mycel.cli.processes import local_network
    from mycel.cli.up import node_lines

    async with local_network(plan.directory, plan.n_nodes, plan.listen, plan.threads) as network:
        nodes = await found_training(network, plan)
        _table(node_lines(nodes))
        watch, lines = NodesWatch(network, plan.recipe, say), Lines(plan)
        while not is_done(plan) or watch.slowest() < plan.n_steps:
            lines.show(watch.look())
            await trio.sleep(_LOOK_EVERY_S)
        lines.show(watch.look())
        return read_metrics(files_of(plan.directory, bytes.fromhex(nodes[0].serving.swarm)))


def is_done(plan: TrainingPlan) -> bool:
    """Whether the checkpoint of the last step is whole."""
    newest = newest_checkpoint(plan.checkpoints)
    return newest is not None and newest[0] >= plan.n_steps


@dataclass(eq=False, slots=True)
class Lines:
    """How far the run is, now and then."""

    plan: TrainingPlan
    beside: Callable[[int], str] = lambda _: ""
    _said_at_s: float = float("-inf")
    _step: int = 0

    def show(self, record: StepMetrics | None) -> None:
        now = trio.current_time()
        if record is None or record.step == self._step:
            return
        if now - self._said_at_s >= _LINE_EVERY_S or record.step == self.plan.n_steps:
            self._said_at_s, self._step = now, record.step
            _table([progress_line(progress_of(record, self.plan.recipe)) + self.beside(record.step)])


@dataclass(eq=False, slots=True)
class DisturbedRun:
    """The run that loses a node of each stage; `calm` is the other one's metrics by step."""

    plan: TrainingPlan
    calm: dict[int, StepMetrics]
    killed: list[LocalNode] = field(default_factory=list)
    came: list[LocalNode] = field(default_factory=list)
    _looked: Bell = field(default_factory=Bell)

    async def play(self) -> None:
        """Train, kill, let others in, compare, and ask the swarm."""
        from mycel.cli.processes import local_network
        from mycel.cli.up import node_lines

        plan = self.plan
        async with local_network(plan.directory, plan.n_nodes, plan.listen, plan.threads) as network:
            nodes = await found_training(network, plan)
            _table(node_lines(nodes))
            watch = NodesWatch(network, plan.recipe, say)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._disturb, network, watch)
                await self._follow(watch)
                # Who has not come by the last step will not train any more.
                nursery.cancel_scope.cancel()
            run = bytes.fromhex(nodes[0].serving.swarm)
            self._compare(files_of(plan.directory, run))
            await self._ask([node for node in network.nodes if node.process.poll() is None])

    async def _follow(self, watch: NodesWatch) -> None:
        """Until the last checkpoint is whole and every node, or those that can, have written down the last step."""
        lines = Lines(self.plan, self._beside)
        with trio.CancelScope() as scope:
            while not is_done(self.plan) or watch.slowest() < self.plan.n_steps:
                if is_done(self.plan):
                    scope.deadline = min(scope.deadline, trio.current_time() + _PATIENCE_S)
                lines.show(watch.look())
                self._looked.ring()
                await trio.sleep(_LOOK_EVERY_S)
            lines.show(watch.look())

    async def _until(self, condition: Callable[[], bool]) -> None:
        while not condition():
            await self._looked.after(self._looked.count)

    def _beside(self, step: int) -> str:
        calm = self.calm.get(step)
        return "" if calm is None or calm.loss is None else f"  (undisturbed: loss {calm.loss:.3f})"

    # ---- the disturbance

    async def _disturb(self, network: LocalNetwork, watch: NodesWatch) -> None:
        """In the first third of the run, one stage after the other: a node of it is killed, and a new one joins."""
        async with trio.open_nursery() as nursery:
            for stage in range(self.plan.recipe.stages):
                due = self.plan.n_steps * (stage + 1) // (3 * self.plan.recipe.stages)
                await self._until(partial(_is_at, watch, due))
                victim = choose_victim(network.nodes, watch.stage_of, stage)
                victim.kill()
                self.killed.append(victim)
                who = f"{victim.name}, which founded the run," if victim is network.nodes[0] else victim.name
                _step(f"step {_step_of(watch)}: {who} of stage {stage} is killed (SIGKILL); another process is started")
                nursery.start_soon(self._replace, network, watch)

    async def _replace(self, network: LocalNetwork, watch: NodesWatch) -> None:
        """One more node, from its start to its first step; it chooses where to help."""
        began_s = trio.current_time()
        left = [node for node in network.nodes if not node.expected and node.ready is not None]
        newcomer = await network.start(*joining(self.plan, left[-1].serving.invite))
        await self._until(partial(_has_stepped, watch, newcomer))
        self.came.append(newcomer)
        took = f"{trio.current_time() - began_s:.0f} s after its start"
        _step(f"step {_step_of(watch)}: {newcomer.name} has made a step in stage {watch.stage_of(newcomer)}, {took}")

    # ---- what came of it

    def _compare(self, files: Sequence[Path]) -> None:
        """Print both runs side by side. Raises CommandFailedError if they are not the same run."""
        records = read_each(files)
        metrics = {record.step: record for record in merge(records)}
        _step("both runs side by side:")
        _table(columns(loss_rows(self.calm, metrics, self.plan.n_steps)))
        ratio = end_ratio(self.calm, metrics, self.plan.n_steps)
        _table([f"the mean of the last {_LAST_STEPS} steps: {ratio:.6f} times that of the undisturbed run"])
        n_stages = self.plan.recipe.stages
        if len(self.killed) < n_stages or len(self.came) < n_stages:
            raise CommandFailedError(
                f"{len(self.killed)} nodes were killed and {len(self.came)} came in their place before the run was "
                f"over: it takes {n_stages} of each"
            )
        if abs(ratio - 1.0) > BOUND:
            raise CommandFailedError(f"the loss at the end is {ratio:.4f} times that of the undisturbed run")
        _step("one hash for each stage:")
        _table(columns(hash_rows(records, self.plan)))
        if wrong := disagreements(records):
            raise CommandFailedError(f"nodes of a stage had different parameters: {wrong[0]}")
        _draw(list(self.calm.values()), list(metrics.values()))

    async def _ask(self, nodes: Sequence[LocalNode]) -> None:
        """The swarm continues PROMPT. Raises CommandFailedError if its checkpoint says something else."""
        from mycel.node.client import connect
        from mycel.protocols.messages import SamplingParams

        # Greedily, a model this young says blanks.
        sampling = SamplingParams(temperature=0.8, top_p=0.95, repetition_penalty=1.1, seed=1)

        _step(f'the swarm continues "{PROMPT}" with what it has just learned')
        newest = newest_checkpoint(self.plan.checkpoints)
        assert newest is not None, "the run was followed until its last checkpoint"
        async with connect(nodes[-1].serving.invite, cache_dir=self.plan.directory / "client") as model:
            async with model.generate(
                PROMPT, max_new_tokens=N_TOKENS, sampling=sampling, patience_s=_PATIENCE_S
            ) as generation:
                write(PROMPT)
                await stream_text(generation)
            show_route(generation.trace)
            say(summary(generation.trace))
            prompt, ends = model.encode(PROMPT), model.manifest.eos_token_ids
            n_blocks = model.manifest.n_blocks
        alone = await trio.to_thread.run_sync(lambda: _reference(newest[1], n_blocks, prompt, sampling, ends))
        if alone != tuple(generation.tokens):
            raise CommandFailedError(f"the checkpoint {newest[1].name} continues it otherwise")
        _table([f"the checkpoint {newest[1].name} says the same in one process"])


def _step_of(watch: NodesWatch) -> int:
    record = watch.look()
    return 0 if record is None else record.step


def _is_at(watch: NodesWatch, step: int) -> bool:
    return _step_of(watch) >= step


def _has_stepped(watch: NodesWatch, node: LocalNode) -> bool:
    return watch.stage_of(node) is not None


def choose_victim(nodes: Sequence[LocalNode], stage_of: Callable[[LocalNode], int | None], stage: int) -> LocalNode:
    """The first node of a stage that has another one. Raises CommandFailedError if there is none to spare."""
    here = [node for node in nodes if node.process.poll() is None and stage_of(node) == stage]
    if len(here) < PER_STAGE:
        raise CommandFailedError(f"stage {stage} has {counted(len(here), 'node')}: none can be spared")
    return here[0]


def end_ratio(calm: dict[int, StepMetrics], rough: dict[int, StepMetrics], n_steps: int) -> float:
    """Mean loss of the last steps, disturbed over undisturbed. Raises CommandFailedError if one is not known."""
    means = []
    for name, metrics in (("undisturbed", calm), ("disturbed", rough)):
        losses = [_loss(metrics, step) for step in range(max(1, n_steps - _LAST_STEPS + 1), n_steps + 1)]
        known = [loss for loss in losses if loss is not None]
        if len(known) < len(losses):
            raise CommandFailedError(f"the {name} run does not know the loss of all of its last {len(losses)} steps")
        means.append(sum(known) / len(known))
    return means[1] / means[0]


def loss_rows(calm: dict[int, StepMetrics], rough: dict[int, StepMetrics], n_steps: int) -> list[tuple[str, ...]]:
    """A table of the losses at tenths of the run, its head first."""
    rows: list[tuple[str, ...]] = [("step", "undisturbed", "disturbed", "difference")]
    for step in sorted({1, *(n_steps * tenth // 10 for tenth in range(1, 11))} - {0}):
        one, other = _loss(calm, step), _loss(rough, step)
        difference = "" if one is None or other is None else f"{other - one:+.6f}"
        rows.append((str(step), _shown(one), _shown(other), difference))
    return rows


def hash_rows(records: Sequence[StepMetrics], plan: TrainingPlan) -> list[tuple[str, ...]]:
    """For each stage the hash after the last step, by how many nodes, and how many steps two nodes or more have told.

    Raises CommandFailedError if a stage's last hash is not told by all of its nodes.
    """
    rows: list[tuple[str, ...]] = [("stage", "parameters", "of", "steps compared")]
    for stage in range(plan.recipe.stages):
        told = [record for record in records if stage in record.params]
        last = [record.params[stage] for record in told if record.step == plan.n_steps]
        if len(last) < PER_STAGE:
            raise CommandFailedError(f"{counted(len(last), 'node')} of stage {stage} made the last step")
        by_step: dict[int, int] = {}
        for record in told:
            by_step[record.step] = by_step.get(record.step, 0) + 1
        compared = sum(n > 1 for n in by_step.values())
        rows.append((str(stage), last[0][:16], counted(len(last), "node"), f"{compared} of {plan.n_steps}"))
    return rows


def _loss(metrics: dict[int, StepMetrics], step: int) -> float | None:
    return metrics[step].loss if step in metrics else None


def _shown(loss: float | None) -> str:
    return "?" if loss is None else f"{loss:.6f}"


def _reference(
    checkpoint: Path, n_blocks: int, prompt: Sequence[int], sampling: SamplingParams, ends: Sequence[int]
) -> tuple[int, ...]:
    import torch

    from mycel.node.reference import Reference

    torch.set_num_threads(1)
    return Reference(checkpoint, n_blocks, "float32").generate(prompt, N_TOKENS, sampling, ends)


def _draw(calm: Sequence[StepMetrics], rough: Sequence[StepMetrics]) -> None:
    if can_plot():
        runs = {"undisturbed": calm, "a node of each stage killed": rough}
        png, _ = plot_losses(runs, state_home() / "demo-train", "one run twice")
        _table([f"drawn in {png}"])


def _step(text: str) -> None:
    say(f"== {text}")


def _table(lines: Sequence[str]) -> None:
    for line in lines:
        say(f"   {line}")
