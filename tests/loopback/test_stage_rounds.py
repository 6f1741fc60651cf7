"""Two stages of two real processes share each step in rounds of 8 bits; one is killed, and the others go on."""

from __future__ import annotations

from pathlib import Path

import pytest

from mycel.node.training.metrics import disagreements, read_each
from tests.loopback.node_process import Nodes
from tests.loopback.test_training import TrainedSwarm

pytestmark = [pytest.mark.slow, pytest.mark.loopback]

STEPS = 20
RECIPE = """
name = "tiny"
stages = 2
[model]
path = "{model}"
[data]
kind = "python-topics"
sequence = 16
[optimizer]
learning_rate = 1e-2
[step]
steps = 20
batch_tokens = 256
microbatch = 2
[method]
name = "data-parallel"
codec = "int8+ef"
result_codec = "int8"
[round]
peers = 4
liars = 0.0
patience_s = 8
"""


def test_a_run_of_stages_goes_on_in_rounds(tmp_path: Path, llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.loopback.test_training.RECIPE", RECIPE)
    with Nodes(tmp_path, llama) as nodes:
        swarm = TrainedSwarm.founded(nodes, llama)
        swarm.until(5)
        victim = nodes.nodes[1]
        victim.kill()
        killed_at = swarm.version(victim)
        swarm.until(STEPS)
        assert killed_at < STEPS
        swarm.check()
        for node in nodes.living:
            brought = [event for event in node.events("round.brought") if event["stages"]]
            assert len(brought) >= STEPS - 1, "each step's sum came out of a round"
            assert any(event["accepted"] for event in brought)
    records = read_each(sorted(tmp_path.glob("node-*/runs/*/metrics.jsonl")))
    assert disagreements(records) == []
    losses = {record.step: record.loss for record in records if record.loss is not None}
    assert losses[STEPS] < losses[1] - 0.2
