"""`mycel finetune` with real processes, `mycel replay` of what they signed, and what an offer takes at the socket."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import safetensors.torch
import trio
from click.testing import CliRunner

from benchmarks.zeroth_wire import wire_bytes
from mycel.cli.exits import CommandFailedError
from mycel.cli.replay import replay
from mycel.node.training.metrics import disagreements, read_each
from tests.loopback.test_cli import Home

pytestmark = [pytest.mark.slow, pytest.mark.loopback]

RECIPE = """
name = "tuned"
[model]
start = "weights"
[data]
kind = "python-topics"
sequence = 16
[step]
steps = 3
batch_tokens = 64
microbatch = 2
[checkpoint]
every = 0
[method]
name = "zeroth-order"
updates = 8
rate = 0.01
audits = 0.2
"""


def test_three_nodes_tune_a_model_and_a_third_party_replays_it(tmp_path: Path) -> None:
    recipe, directory, home = tmp_path / "tuned.toml", tmp_path / "run", Home(tmp_path)
    recipe.write_text(RECIPE, "utf-8")
    options = ("--lora", "4", "--nodes", "3", "--dir", str(directory), "--threads", "1", "--json")
    done = home.run("finetune", str(recipe), *options)
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    assert (said["steps"], said["done"], said["peers_lost"]) == (3, True, 0)
    each = read_each(sorted(directory.glob("node-*/runs/*/metrics.jsonl")))
    assert disagreements(each) == []
    states = {record.params[0] for record in each if record.step == 3}
    assert len(states) == 1
    checkpoint = directory / "checkpoints" / "step-00000003"
    trained = safetensors.torch.load_file(checkpoint / "adapter.safetensors")
    assert any(name.endswith(".b") and bool(tensor.any()) for name, tensor in trained.items())
    assert (checkpoint / "config.json").is_file()

    again = home.run("replay", str(directory))
    assert (again.returncode, again.stdout.strip()) == (0, states.pop()), again.stderr
    log = max(directory.rglob("zeroth.log"), key=lambda path: path.stat().st_size)
    damaged = bytearray(log.read_bytes())
    damaged[-1500] ^= 1
    forged = tmp_path / "forged.log"
    forged.write_bytes(damaged)
    model = next(path.parent for path in directory.glob("*/runs/*/recipe.toml"))
    refused = CliRunner().invoke(replay, [str(forged), "--model", str(model)])
    assert isinstance(refused.exception, CommandFailedError)
    assert str(refused.exception).startswith(f"{forged}: line ")


def test_256_updates_take_no_more_than_one_and_a_half_bytes_each_at_the_socket() -> None:
    sizes = trio.run(wire_bytes, 256, 8)
    assert len(sizes) == 8
    assert sorted(sizes)[len(sizes) // 2] <= 1.5 * 256
