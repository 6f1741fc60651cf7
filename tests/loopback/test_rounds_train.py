"""`mycel train` by rounds with real processes: one is killed and comes again, then all are, and the run goes on."""

from __future__ import annotations

import subprocess
from pathlib import Path

import psutil
import pytest
from transformers import AutoModelForCausalLM

from mycel.node.training.metrics import StepMetrics, disagreements, read_each, read_metrics
from tests.loopback.test_cli import Home

pytestmark = [pytest.mark.slow, pytest.mark.loopback]

STEPS = 36
# Of three members of an open group all have to sign: the run cannot end while one is gone.
RECIPE = f"""
name = "rounds"
[data]
kind = "python-topics"
sequence = 16
[step]
steps = {STEPS}
batch_tokens = 64
microbatch = 4
[checkpoint]
every = 0
[method]
name = "diloco"
inner_steps = 3
[round]
peers = 3
open = true
patience_s = 8
"""


def each_of(directory: Path) -> list[StepMetrics]:
    return read_each(sorted(directory.glob("node-*/runs/*/metrics.jsonl")))


def steps_of(directory: Path, name: str) -> list[int]:
    return [record.step for record in read_metrics(sorted(directory.glob(f"{name}/runs/*/metrics.jsonl")))]


def is_past(line: str, step: int) -> bool:
    return line.startswith("step ") and int(line.split()[1].split("/", maxsplit=1)[0]) > step


def read_past(process: subprocess.Popen[str], step: int) -> None:
    """Read what the command says until it is past this step."""
    assert process.stderr is not None
    line = process.stderr.readline()
    while line and not is_past(line, step):
        line = process.stderr.readline()
    assert line, "it ended by itself"


def node_of(process: subprocess.Popen[str], name: str) -> psutil.Process:
    nodes = psutil.Process(process.pid).children()
    return next(node for node in nodes if any(part.endswith(f"/{name}") for part in node.cmdline()))


def test_nodes_that_are_killed_come_again_and_all_hold_the_same(tmp_path: Path) -> None:
    recipe, directory, home = tmp_path / "rounds.toml", tmp_path / "run", Home(tmp_path)
    recipe.write_text(RECIPE, "utf-8")
    command = ("train", str(recipe), "--dir", str(directory), "--threads", "1", "--nodes", "3")
    process = home.open(*command)
    again: subprocess.Popen[bytes] | None = None
    try:
        read_past(process, 0)
        victim = node_of(process, "node-3")
        arguments, environment = victim.cmdline(), victim.environ()
        victim.kill()
        killed_at = max(steps_of(directory, "node-3"), default=0)
        with (tmp_path / "again.log").open("wb") as log:
            again = subprocess.Popen(
                arguments, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log
            )
        assert again.stdout is not None
        assert again.stdout.readline(), (tmp_path / "again.log").read_text()
        read_past(process, killed_at + 3)
        # Everybody at once, in the midst of a round.
        nodes = psutil.Process(process.pid).children()
        process.kill()
        for node in nodes:
            node.kill()
    finally:
        process.kill()
        process.communicate()
        if again is not None:
            again.kill()
            again.communicate()
    reached = max(max(steps_of(directory, f"node-{number}"), default=0) for number in (1, 2, 3))
    assert 0 < reached < STEPS
    done = home.run(*command)
    assert done.returncode == 0, done.stderr
    first = next(line for line in done.stderr.splitlines() if is_past(line, 0))
    assert is_past(first, reached - 1), "it began anew"
    each = each_of(directory)
    assert disagreements(each) == []
    assert [record.step for record in each].count(STEPS) >= 2, "one may have been ended before it wrote its last line"
    assert len({record.params[0] for record in each if record.step == STEPS}) == 1
    assert max(steps_of(directory, "node-3")) > killed_at
    checkpoint = directory / "checkpoints" / f"step-{STEPS:08d}"
    assert done.stdout == f"mycel start --model {checkpoint}\n"
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    assert all(bool(parameter.isfinite().all()) for parameter in model.parameters())
