"""A run of real processes: one is killed, one joins, all are killed; what is trained is served, saved and taken up."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from mycel.node.training.founding import plan_of, read_recipe
from mycel.node.training.metrics import disagreements, read_each
from mycel.node.training.stage import TorchStage
from tests.loopback.generating import Run, generate, reference, with_model
from tests.loopback.node_process import NodeProcess, Nodes, look_again

pytestmark = [pytest.mark.slow, pytest.mark.loopback]

RECIPE = """
name = "tiny"
stages = 2
[model]
path = "{model}"
[data]
kind = "python-topics"
sequence = 16
[step]
steps = 90
batch_tokens = 256
microbatch = 2
[checkpoint]
every = 5
"""
STEPS = 90
PROMPT = tuple(b"The for statement")
LIMIT_S = 60.0


@dataclass
class TrainedSwarm:
    """A run in `nodes`: the first has founded it and keeps whole checkpoints. `spans` are the blocks of its stages."""

    nodes: Nodes
    recipe: Path
    spans: tuple[tuple[int, int], ...] = ()

    @classmethod
    def founded(cls, nodes: Nodes, model: Path) -> TrainedSwarm:
        """With two peers in each stage."""
        recipe = nodes.root / "tiny.toml"
        recipe.write_text(RECIPE.format(model=model), "utf-8")
        swarm = cls(nodes, recipe)
        first = nodes.start_one(model=None, recipe=recipe)
        own, n_blocks = (first.serving.start, first.serving.end), first.serving.n_blocks
        cut = own[1] if own[0] == 0 else own[0]
        swarm.spans = (0, cut), (cut, n_blocks)
        nodes.start(*swarm.spans, swarm.spans[own == swarm.spans[0]], model=None)
        return swarm

    def version(self, node: NodeProcess) -> int:
        return max((event["version"] for event in node.events("step.done")), default=0)

    def until(self, version: int, *others: Callable[[], object]) -> None:
        """All that live have made so many steps, and whatever else has happened."""
        began = time.monotonic()
        while min(map(self.version, self.nodes.living)) < version or not all(other() for other in others):
            logs = [node.log()[-2000:] for node in self.nodes.living]
            assert time.monotonic() - began < LIMIT_S, logs
            look_again()

    def checkpoints(self) -> dict[int, Path]:
        """The whole ones that anybody told of."""
        told = [event for node in self.nodes.nodes for event in node.events("checkpoint.whole")]
        return {event["version"]: Path(event["path"]) for event in told}

    def params(self, version: int) -> dict[int, set[str]]:
        """The hashes of each stage's parameters after so many steps, as nodes wrote them down."""
        said: dict[int, set[str]] = {}
        for record in self._metrics():
            for stage, params in record.params.items() if record.step == version else ():
                said.setdefault(stage, set()).add(params)
        return said

    def check(self) -> None:
        """Nobody has ever had other parameters than another at the same step."""
        assert disagreements(self._metrics()) == []

    def _metrics(self) -> list[Any]:
        return list(read_each(sorted(self.nodes.root.glob("node-*/runs/*/metrics.jsonl"))))

    def params_in(self, checkpoint: Path) -> dict[int, set[str]]:
        """The same of what a checkpoint holds."""
        recipe = read_recipe(checkpoint / "training" / "recipe.toml")
        plan = plan_of(recipe, bytes(32), checkpoint)
        stages = (TorchStage.load(checkpoint, plan, index, recipe) for index in range(plan.n_stages))
        return {stage.index: {hashlib.sha256(stage.params_P.numpy().tobytes()).hexdigest()} for stage in stages}

    def talk(self) -> Run:
        return with_model(self.nodes.invite, lambda model: generate(model, PROMPT, 12))


def test_a_peer_is_killed_another_joins_and_the_run_ends(tmp_path: Path, llama: Path) -> None:
    with Nodes(tmp_path, llama) as nodes:
        swarm = TrainedSwarm.founded(nodes, llama)
        swarm.until(5)
        victim = nodes.nodes[1]
        victim.kill()
        during = swarm.talk()
        assert len(during.tokens) == 12
        newcomer = nodes.start_one(model=None, blocks=(victim.serving.start, victim.serving.end))
        swarm.until(STEPS, lambda: STEPS in swarm.checkpoints())
        swarm.check()
        [told] = newcomer.events("stage.joined")
        assert 5 <= told["version"] < STEPS
        assert 5 <= swarm.version(victim) < told["version"]
        checkpoint = swarm.checkpoints()[STEPS]
        assert swarm.params_in(checkpoint) == swarm.params(STEPS)
        after = swarm.talk()
        assert after.tokens == reference(checkpoint, PROMPT, 12)
        assert after.tokens != during.tokens


def test_all_are_killed_and_the_run_goes_on_from_its_checkpoint(tmp_path: Path, llama: Path) -> None:
    with Nodes(tmp_path, llama) as nodes:
        swarm = TrainedSwarm.founded(nodes, llama)
        swarm.until(6, swarm.checkpoints)
        for node in nodes.nodes:
            node.kill()
        whole = max(swarm.checkpoints())
    with Nodes(tmp_path, llama) as again:
        swarm = TrainedSwarm.founded(again, llama)
        swarm.until(whole + 5)
        swarm.check()
        for node in again.nodes:
            versions = [event["version"] for event in node.events("step.done")]
            assert versions[0] > whole
        [told] = again.nodes[0].events("stage.restored")
        assert told["version"] == whole
