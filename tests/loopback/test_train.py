"""`mycel train` with real processes: from a recipe to a checkpoint, stopped and taken up again on the way."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest

from mycel.node.training.metrics import disagreements, read_each, read_metrics
from tests.loopback.test_cli import Home, end

pytestmark = [pytest.mark.slow, pytest.mark.loopback]

RECIPE = """
name = "short"
stages = 2
[data]
kind = "python-topics"
sequence = 16
[step]
steps = {steps}
batch_tokens = 64
microbatch = 2
[checkpoint]
every = 4
"""


def recipe_of(tmp_path: Path, steps: int) -> str:
    path = tmp_path / "short.toml"
    path.write_text(RECIPE.format(steps=steps), "utf-8")
    return str(path)


def test_a_run_ends_with_a_checkpoint_metrics_and_a_picture(tmp_path: Path) -> None:
    directory = tmp_path / "run"
    done = Home(tmp_path).run(
        "train", recipe_of(tmp_path, 8), "--dir", str(directory), "--threads", "1", "--nodes", "3", "--json"
    )
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    assert (said["steps"], said["tokens"], said["done"], said["peers_lost"]) == (8, 512, True, 0)
    assert said["checkpoint"] == str(directory / "checkpoints" / "step-00000008")
    metrics = read_metrics([directory / "metrics.jsonl"])
    assert [record.step for record in metrics] == [*range(1, 9)]
    assert all(record.loss is not None and 2.0 < record.loss < 12.0 for record in metrics)
    assert all(record.grad_norm for record in metrics)
    assert sorted(metrics[-1].params) == [0, 1]
    assert metrics[-1].sent_bytes > 0
    each = read_each(sorted(directory.glob("node-*/runs/*/metrics.jsonl")))
    assert disagreements(each) == []
    assert max(sum(record.step == step for record in each) for step in range(1, 9)) == 3
    assert (directory / "loss.png").is_file()


def test_ctrl_c_stops_and_the_same_command_goes_on(tmp_path: Path) -> None:
    home, directory = Home(tmp_path), tmp_path / "run"
    command = ("train", recipe_of(tmp_path, 60), "--dir", str(directory), "--threads", "1")
    process = home.open(*command)
    assert process.stderr is not None
    try:
        line = process.stderr.readline()
        while line and not _is_past(line, 5):
            line = process.stderr.readline()
        assert line, "it ended by itself"
        code, errors = end(process, signal.SIGINT)
    finally:
        process.kill()
        process.communicate()
    assert code == 130, errors
    assert "Traceback" not in errors
    stopped, again = errors.splitlines()[-2:]
    assert stopped.startswith("stopped after step ")
    assert "the newest checkpoint is " in stopped
    assert again.startswith("to go on from there: mycel train ")
    done = home.run(*command)
    assert done.returncode == 0, done.stderr
    assert done.stderr.startswith("going on from step ")
    first = next(line for line in done.stderr.splitlines() if _is_past(line, 0))
    assert _is_past(first, 4), "not from the beginning"
    steps = [record.step for record in read_metrics([directory / "metrics.jsonl"])]
    assert steps == [*range(1, 61)]
    assert done.stdout == f"mycel start --model {directory}/checkpoints/step-00000060\n"


def _is_past(line: str, step: int) -> bool:
    return line.startswith("step ") and int(line.split()[1].split("/", maxsplit=1)[0]) > step
