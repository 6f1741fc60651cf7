"""The pure parts of benchmarks/train.py: which steps are measured, and what is made of them."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.train import check_losses, slope
from benchmarks.train_runs import WARM_UP_STEPS, Asked, Size, window_of, write_recipe
from mycel.cli.exits import CommandFailedError
from mycel.node.training.founding import read_recipe
from mycel.node.training.metrics import StepMetrics
from mycel.swarm.training.progress import StageProgress


def record(step: int, peers: tuple[int, ...]) -> StepMetrics:
    stages = tuple(StageProgress(training=n, sequences_per_s=8.0 * n) for n in peers)
    return StepMetrics(
        step, 100 * step, 9.0 - step, peers=peers, sent_bytes=1000 * step, unix=50.0 + 2.0 * step, stages=stages
    )


def test_measured_is_from_the_first_steps_with_all_peers_on() -> None:
    records = [record(1, (1, 2)), *(record(step, (2, 2)) for step in range(2, 9))]
    assert window_of(records[: WARM_UP_STEPS + 3], (2, 2), 3, n_sequences=4) is None
    window = window_of(records, (2, 2), 3, n_sequences=4)
    assert window is not None
    assert (window.n_steps, window.seconds, window.tokens, window.sent_bytes) == (3, 6.0, 300, 3000)
    assert (window.tokens_per_s, window.step_s) == (50.0, 2.0)
    assert window.compute_s == (0.5, 0.5)  # a peer computes 8 sequences a second, and a microbatch has 4
    assert window.losses[:2] == (8.0, 7.0)


def test_a_peer_that_is_missing_on_the_way_is_no_measurement() -> None:
    records = [record(step, (1, 1) if step == 5 else (2, 2)) for step in range(1, 9)]
    with pytest.raises(CommandFailedError, match="between steps 3 and 7 a peer was missing"):
        window_of(records, (2, 2), 3, n_sequences=4)


def test_the_exponent_of_a_power_is_found() -> None:
    assert slope([(width, 3.0 / width) for width in (64, 128, 512)]) == pytest.approx(-1.0)
    assert slope([(width, width**0.5) for width in (2, 3, 7)]) == pytest.approx(0.5)


def test_cases_that_train_something_else_are_refused() -> None:
    check_losses([8.0, 7.0], [8.001, 7.01, 5.0], "near")
    with pytest.raises(SystemExit, match=r"far trains something else: its losses are up to 0\.500 off"):
        check_losses([8.0, 7.0], [8.0, 6.5], "far")
    with pytest.raises(SystemExit):
        check_losses([8.0], [float("nan")], "no number")


def test_what_is_asked_of_a_recipe_stands_in_it(tmp_path: Path) -> None:
    size = Size(64, 4, 3, n_sequences=2, sequence=16)
    recipe = read_recipe(write_recipe(tmp_path / "r.toml", size, 2, Asked("demo", "float32", 7, 0.5)))
    assert (recipe.stages, recipe.seed, recipe.border.codec, recipe.model.path) == (2, 7, "float32", "demo")
    assert (recipe.step.batch_tokens, recipe.optimizer.learning_rate) == (size.step_tokens, 0.5)
