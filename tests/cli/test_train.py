"""`mycel train` without processes: what is refused, what it shows of the nodes' metrics, what it leaves behind."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import click
import pytest
import trio
from click.testing import CliRunner, Result
from trio.testing import MockClock

from mycel.cli import train as train_module
from mycel.cli.demo_train import DisturbedRun, choose_victim, end_ratio, hash_rows, loss_rows
from mycel.cli.exits import CommandFailedError
from mycel.cli.join import join
from mycel.cli.processes import LocalNetwork, Ready
from mycel.cli.start import start
from mycel.cli.train import (
    TrainingPlan,
    TrainingRun,
    draw_again,
    files_of,
    joining,
    newest_checkpoint,
    plan_training,
    train,
)
from mycel.cli.training_view import NodesWatch, ProgressView, progress_of
from mycel.cli.up import up
from mycel.node.training.metrics import MetricsFile, StepMetrics, metrics_path, read_metrics, write_metrics
from mycel.protocols.errors import ConfigError
from mycel.swarm.training.progress import StageProgress
from mycel.swarm.training.recipe import Recipe, parse_recipe

RECIPE = """
name = "topics"
stages = 2
[data]
kind = "python-topics"
sequence = 16
[step]
steps = 20
batch_tokens = 64
microbatch = 2
"""
RUN = bytes(range(32))


@pytest.fixture
def recipe_file(tmp_path: Path) -> Path:
    path = tmp_path / "topics.toml"
    path.write_text(RECIPE, "utf-8")
    return path


@pytest.fixture
def plan(recipe_file: Path, tmp_path: Path) -> TrainingPlan:
    return plan_training(recipe_file, 4, tmp_path / "run")


def recipe() -> Recipe:
    return parse_recipe(RECIPE, "topics")


def record(step: int, stage: int = 0, **more: object) -> StepMetrics:
    """What a node of `stage` writes after a step."""
    known: dict[str, object] = {
        "loss": 9.0 / step,
        "tokens_per_s": 64.0,
        "unix": 1e12 + step,
        "peers": (2, 2),
        "stages": (StageProgress(training=2, version=step),) * 2,
        "params": {stage: f"{step:02}{stage:02}" * 16},
    }
    return StepMetrics(step, step * 64, **{**known, **more})  # type: ignore[arg-type]


# ------------------------------------------------------------------------------------------------------ what is refused


def refused(command: click.Command, *arguments: str) -> str:
    """Why a command refuses to begin, in one line."""
    result: Result = CliRunner().invoke(command, arguments)
    assert result.exit_code != 0
    if isinstance(result.exception, ConfigError):
        said = str(result.exception)
    else:
        assert result.exit_code == 2, result.output
        said = result.output.strip().splitlines()[-1]
    assert "\n" not in said
    return said


def test_what_train_does_not_take(recipe_file: Path, tmp_path: Path) -> None:
    assert "which recipe" in refused(train)
    assert "which recipe" in refused(train, str(recipe_file), str(recipe_file))
    assert "there is no recipe" in refused(train, str(tmp_path / "none.toml"))
    assert "cannot read" in refused(train, str(tmp_path))
    assert "1 node cannot host 2 stages" in refused(train, str(recipe_file), "--nodes", "1")
    assert "--plot takes directories" in refused(train, "--plot")
    assert "--plot takes directories" in refused(train, "--plot", str(tmp_path), "--nodes", "2")
    assert "holds no metrics" in refused(train, "--plot", str(tmp_path))
    recipe_file.write_text(RECIPE + "stepps = 3\n", "utf-8")
    assert "step.stepps: there is no such key" in refused(train, str(recipe_file))
    recipe_file.write_bytes(b"\xff")
    assert "not UTF-8" in refused(train, str(recipe_file))


def test_what_start_join_and_up_do_not_take(recipe_file: Path, tmp_path: Path) -> None:
    made_of = ("--model", str(tmp_path))
    assert "--model to share a model, or --train" in refused(start)
    assert "--model to share a model, or --train" in refused(start, *made_of, "--train", str(recipe_file))
    assert "--checkpoints goes with --train" in refused(start, *made_of, "--checkpoints", str(tmp_path))
    assert "--dtype goes with --model" in refused(start, "--train", str(recipe_file), "--dtype", "bfloat16")
    assert "there is no recipe" in refused(start, "--train", str(tmp_path / "none.toml"))
    assert "there is no recipe" in refused(join, "mycel1:x", "--train-data", str(tmp_path / "none.toml"))
    assert "--train goes without --model" in refused(up, *made_of, "--train", str(recipe_file))
    assert "--train goes without --model" in refused(up, "--train", str(recipe_file), "--kill", "1/20s")
    assert "1 node cannot host 2 stages" in refused(up, "--train", str(recipe_file), "--nodes", "1")


def test_a_directory_belongs_to_one_recipe(plan: TrainingPlan, recipe_file: Path) -> None:
    TrainingRun(plan).settle()
    TrainingRun(plan).settle()
    recipe_file.write_text(RECIPE.replace("steps = 20", "steps = 21"), "utf-8")
    other = plan_training(recipe_file, None, plan.directory)
    with pytest.raises(ConfigError, match=r"another recipe.*--dir"):
        TrainingRun(other).settle()


def test_as_many_nodes_as_stages_and_a_place_by_name(recipe_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(recipe_file.parent))
    plan = plan_training(recipe_file, None, None)
    assert (plan.n_nodes, plan.n_steps) == (2, 20)
    assert plan.directory == recipe_file.parent / "mycel" / "train" / "topics"
    shaped = plan_training(recipe_file, None, None, shared=("--shape", "x"))
    assert joining(shaped, "an invite") == (
        *("join", "an invite", "--train-data", str(recipe_file)),
        *("--checkpoints", str(plan.checkpoints), "--shape", "x"),
    )


# ------------------------------------------------------------------------------------------------------ a run, followed


@dataclass(eq=False)
class FakeProcess:
    returncode: int | None = None

    def poll(self) -> int | None:
        return self.returncode


@dataclass(eq=False)
class FakeNode:
    """As much of a LocalNode as a watch needs; `make` writes what the node would write."""

    name: str
    stage: int
    directory: Path
    process: FakeProcess = field(default_factory=FakeProcess)
    expected: bool = False

    @property
    def ready(self) -> Ready:
        return Ready(f"peer of {self.name}", (), "invite", "topics", self.stage, self.stage + 1, 2, RUN.hex())

    serving = ready

    @property
    def pid(self) -> int:
        return int(self.name.removeprefix("node-"))

    def kill(self) -> None:
        self.expected, self.process.returncode = True, -9

    log = Path("a log")

    def last_words(self) -> list[str]:
        return ["it was the disk"]

    def make(self, step: int, **more: object) -> None:
        MetricsFile(metrics_path(self.directory / self.name, RUN)).append(record(step, self.stage, **more))


def fake_network(plan: TrainingPlan) -> LocalNetwork:
    network = LocalNetwork(plan.directory, plan.n_nodes)
    for index in range(plan.n_nodes):
        network.nodes.append(FakeNode(f"node-{index + 1}", index % 2, plan.directory))  # type: ignore[arg-type]
    return network


def nodes_of(network: LocalNetwork) -> list[FakeNode]:
    return network.nodes  # type: ignore[return-value]


async def trained(plan: TrainingPlan, network: LocalNetwork, up_to: int) -> None:
    """What the nodes do: a step a second, and at the end the checkpoint."""
    await trio.sleep(0.1)  # not at the moments of a look
    for step in range(1, up_to + 1):
        await trio.sleep(1.0)
        for node in nodes_of(network):
            if node.process.returncode is None:
                node.make(step)
    if up_to == plan.n_steps:
        (plan.checkpoints / "step-00000020.partial").mkdir()
        await trio.sleep(3.0)
        (plan.checkpoints / "step-00000020.partial").rename(plan.checkpoints / "step-00000020")


def followed(plan: TrainingPlan, *, up_to: int = 20, kill_at_s: float | None = None, n_killed: int = 1) -> TrainingRun:
    run, network = TrainingRun(plan, "mycel train topics.toml"), fake_network(plan)
    run.settle()

    async def main() -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(trained, plan, network, up_to)
            with trio.move_on_after(60.0):
                if kill_at_s is not None:

                    async def kill() -> None:
                        await trio.sleep(kill_at_s)
                        for node in nodes_of(network)[:n_killed]:
                            node.process.returncode = -9

                    nursery.start_soon(kill)
                await run.play(network, network.nodes)
            nursery.cancel_scope.cancel()

    trio.run(main, clock=MockClock(autojump_threshold=0))
    return run


def test_a_run_is_followed_to_its_checkpoint(plan: TrainingPlan, capsys: pytest.CaptureFixture[str]) -> None:
    run = followed(plan)
    assert run.checkpoint == plan.checkpoints / "step-00000020"
    assert 23.0 <= run.seconds <= 24.0, "until the checkpoint has its name"
    run.conclude(0, as_json=False)
    said = capsys.readouterr()
    assert said.out == f"mycel start --model {plan.checkpoints}/step-00000020\n"
    lines = said.err.splitlines()
    assert lines.pop(0).startswith("all nodes are there")
    assert lines[0].startswith("step 1/20  64 tokens  loss 9.000  64 tokens/s  ETA 19s  peers 2+2")
    assert [line.split("  ")[0] for line in lines[:5]] == [f"step {n}/20" for n in (1, 6, 11, 16, 20)]
    assert "done: 20 steps, 1,280 tokens, loss 0.450" in said.err
    assert [found.step for found in read_metrics([plan.directory / "metrics.jsonl"])] == [*range(1, 21)]
    assert (plan.directory / "loss.png").is_file()
    assert (plan.directory / "loss.svg").is_file()


def test_the_json_object_says_it_all(plan: TrainingPlan, capsys: pytest.CaptureFixture[str]) -> None:
    run = followed(plan, kill_at_s=5.5)
    capsys.readouterr()
    run.conclude(0, as_json=True)
    value = json.loads(capsys.readouterr().out)
    assert value.pop("seconds") == pytest.approx(run.seconds, abs=1e-3)
    assert value == {
        "run": "topics",
        "steps": 20,
        "n_steps": 20,
        "tokens": 1280,
        "loss": 0.45,
        "tokens_per_s": 64.0,
        "sent_bytes": 0,
        "peers_lost": 1,
        "checkpoint": str(plan.checkpoints / "step-00000020"),
        "checkpoint_step": 20,
        "done": True,
        "interrupted": False,
        "directory": str(plan.directory),
    }


def test_a_node_that_ends_is_told_and_the_others_go_on(plan: TrainingPlan, capsys: pytest.CaptureFixture[str]) -> None:
    run = followed(plan, kill_at_s=5.5)
    assert run.n_lost == 1
    said = capsys.readouterr().err
    assert said.count("node-1 (pid 1) ended with exit code -9; a log:\n  it was the disk") == 1
    assert "step 20/20" in said


def test_too_few_nodes_for_all_stages_is_the_end(plan: TrainingPlan) -> None:
    with pytest.raises(BaseExceptionGroup) as group:
        followed(plan, kill_at_s=5.5, n_killed=3)
    assert group.group_contains(CommandFailedError, match="1 nodes are left, too few for 2 stages")


def test_a_run_that_was_stopped_says_how_to_go_on(plan: TrainingPlan, capsys: pytest.CaptureFixture[str]) -> None:
    plan.checkpoints.mkdir(parents=True)
    (plan.checkpoints / "step-00000010").mkdir()
    run = followed(plan, up_to=12)
    run.conclude(130, as_json=False)
    said = capsys.readouterr()
    assert said.out == ""
    assert f"going on from step 10: {plan.checkpoints}/step-00000010" in said.err
    assert "step 12/20  768 tokens  loss 0.750  64 tokens/s  ETA 8s  peers 2+2  (no step for 24s)" in said.err
    assert said.err.splitlines()[-2:] == [
        f"stopped after step 12 of 20; the newest checkpoint is {plan.checkpoints}/step-00000010",
        "to go on from there: mycel train topics.toml",
    ]
    assert (plan.directory / "metrics.jsonl").is_file()


def test_a_run_that_is_done_needs_no_nodes(
    plan: TrainingPlan, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    followed(plan).conclude(0, as_json=False)
    monkeypatch.setattr(train_module.trio, "run", None)
    assert train_module.run_training(plan) == 0
    assert capsys.readouterr().out.count("mycel start --model") == 2


def test_what_comes_beside_goes_on_when_the_run_is_done(plan: TrainingPlan, capsys: pytest.CaptureFixture[str]) -> None:
    run, network, ended = TrainingRun(plan), fake_network(plan), []

    async def beside(*_: object) -> None:
        await trio.sleep(100.0)
        ended.append(trio.current_time())

    async def main() -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(trained, plan, network, 20)
            nursery.start_soon(partial(run.play, network, network.nodes, beside=beside))

    run.settle()
    trio.run(main, clock=MockClock(autojump_threshold=0))
    assert ended
    assert "to serve it" in capsys.readouterr().err
    assert (plan.directory / "loss.png").is_file()


# --------------------------------------------------------------------------------------------------------------- a look


def test_the_furthest_node_counts_and_no_earlier_life(plan: TrainingPlan) -> None:
    network = fake_network(plan)
    one, two, three, _ = nodes_of(network)
    three.make(19, unix=0.0)
    watch = NodesWatch(network, plan.recipe, lambda _: None)
    assert watch.look() is None, "what was written before the nodes were started"
    one.make(4)
    two.make(5)
    latest = watch.look()
    assert latest is not None
    assert latest.step == 5
    assert (watch.stage_of(network.nodes[0]), watch.stage_of(network.nodes[1])) == (0, 1)
    assert watch.stage_of(network.nodes[3]) is None
    assert watch.slowest() == 0
    two.process.returncode = 0
    latest = watch.look()
    assert latest is not None
    assert latest.step == 4, "who has ended is no measure"
    one.make(2)
    latest = watch.look()
    assert latest is not None
    assert latest.step == 2, "all went back to a checkpoint"


def test_a_terminal_sees_a_table_in_one_place(capsys: pytest.CaptureFixture[str]) -> None:
    view = ProgressView(is_terminal=True, clock=lambda: 0.0)
    view.show(progress_of(record(3), recipe()))
    first = capsys.readouterr().err
    assert first.splitlines()[0].startswith("step 3/20")
    assert first.splitlines()[1].split() == ["stage", "peers", "state", "queue", "rate", "version"]
    assert "\x1b" not in first
    view.show(progress_of(record(4), recipe()))
    assert capsys.readouterr().err.startswith("\x1b[4F\x1b[Jstep 4/20")
    view.tell("node-1 \x1b[31mended")
    assert capsys.readouterr().err == "\x1b[4F\x1b[Jnode-1 ?[31mended\n"
    view.show(progress_of(record(5), recipe()))
    assert capsys.readouterr().err.startswith("step 5/20")
    view.close()


def test_only_whole_checkpoints_count(tmp_path: Path) -> None:
    assert newest_checkpoint(tmp_path / "none") is None
    assert newest_checkpoint(tmp_path) is None
    for name in ("step-00000100", "step-00000900", "step-00001000.partial", "step-x", "other"):
        (tmp_path / name).mkdir()
    assert newest_checkpoint(tmp_path) == (900, tmp_path / "step-00000900")


# ------------------------------------------------------------------------------------------------------------- pictures


def test_pictures_are_drawn_again(tmp_path: Path) -> None:
    write_metrics(tmp_path / "one" / "metrics.jsonl", [record(step) for step in range(1, 9)])
    write_metrics(metrics_path(tmp_path / "two" / "node-1", RUN), [record(step) for step in range(1, 9)])
    result = CliRunner().invoke(train, ["--plot", str(tmp_path / "one")])
    assert result.exit_code == 0, result.output
    assert (tmp_path / "one" / "loss.svg").is_file()
    draw_again([tmp_path / "one", tmp_path / "two"], tmp_path / "both")
    assert sorted(path.name for path in (tmp_path / "both").iterdir()) == ["losses.png", "losses.svg"]


# ----------------------------------------------------------------------------------------------------- the demo's rules


def test_the_end_of_two_runs_is_compared_over_several_steps() -> None:
    calm = {step: record(step, loss=2.0) for step in range(1, 21)}
    rough = {step: record(step, loss=2.0 if step < 20 else 2.4) for step in range(1, 21)}
    assert end_ratio(calm, calm, 20) == 1.0
    assert end_ratio(calm, rough, 20) == pytest.approx(1.02)
    del rough[15]
    with pytest.raises(CommandFailedError, match="the disturbed run does not know the loss"):
        end_ratio(calm, rough, 20)
    assert loss_rows(calm, rough, 4)[1:] == [
        ("1", "2.000000", "2.000000", "+0.000000"),
        ("2", "2.000000", "2.000000", "+0.000000"),
        ("3", "2.000000", "2.000000", "+0.000000"),
        ("4", "2.000000", "2.000000", "+0.000000"),
    ]


def test_the_hash_of_a_stage_is_told_by_two_nodes(plan: TrainingPlan) -> None:
    both = [record(step, stage) for step in (19, 20) for stage in (0, 1)] * 2
    assert hash_rows(both, plan)[1:] == [
        ("0", "2000200020002000", "2 nodes", "2 of 20"),
        ("1", "2001200120012001", "2 nodes", "2 of 20"),
    ]
    with pytest.raises(CommandFailedError, match="1 node of stage 1 made the last step"):
        hash_rows(both[:-1], plan)


class NetworkThatGrows(LocalNetwork):
    """A node that is started is there after 4 seconds, in the stage of the last that was killed."""

    async def start(self, *arguments: str) -> FakeNode:  # type: ignore[override]
        assert arguments[0] == "join"
        stage = [node.stage for node in nodes_of(self) if node.expected][-1]
        await trio.sleep(4.0)
        node = FakeNode(f"node-{len(self.nodes) + 1}", stage, self.directory)
        self.nodes.append(node)  # type: ignore[arg-type]
        return node


def test_the_demo_kills_a_node_of_each_stage_and_compares(
    plan: TrainingPlan, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(plan.directory))
    network = NetworkThatGrows(plan.directory, 4)
    network.nodes += fake_network(plan).nodes
    plan.checkpoints.mkdir(parents=True)
    run = DisturbedRun(plan, {step: record(step) for step in range(1, 21)})
    watch = NodesWatch(network, plan.recipe, print)

    async def main() -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(trained, plan, network, 20)
            nursery.start_soon(run._disturb, network, watch)
            await run._follow(watch)

    trio.run(main, clock=MockClock(autojump_threshold=0))
    assert [node.name for node in run.killed] == ["node-1", "node-2"]
    assert [node.name for node in run.came] == ["node-5", "node-6"]
    run._compare(files_of(plan.directory, RUN))
    said = capsys.readouterr().err
    assert "step 3: node-1, which founded the run, of stage 0 is killed (SIGKILL)" in said
    assert "step 6: node-2 of stage 1 is killed (SIGKILL)" in said
    assert "node-5 has made a step in stage 0, 5 s after its start" in said
    assert "the mean of the last 10 steps: 1.000000 times that of the undisturbed run" in said
    assert "0      2000200020002000  2 nodes  16 of 20" in said
    assert (plan.directory / "mycel" / "demo-train.png").is_file()
    run.calm[20] = record(20, loss=9.0)
    with pytest.raises(CommandFailedError, match="the loss at the end is 0"):
        run._compare(files_of(plan.directory, RUN))
    run.came.pop()
    with pytest.raises(CommandFailedError, match="1 came in their place"):
        run._compare(files_of(plan.directory, RUN))


def test_a_victim_can_be_spared(plan: TrainingPlan) -> None:
    network = fake_network(plan)
    stages: dict[object, int] = {node: node.stage for node in nodes_of(network)}
    assert choose_victim(network.nodes, stages.get, 1).name == "node-2"
    nodes_of(network)[3].process.returncode = -9
    with pytest.raises(CommandFailedError, match="stage 1 has 1 node: none can be spared"):
        choose_victim(network.nodes, stages.get, 1)
