"""The demo of rounds, as far as it can be judged without processes: when a run is lost, and what is drawn of it."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from mycel.cli.demo_rounds import BOUND, LIARS, N_HONEST, LostRun, demo_rounds, visible
from mycel.cli.exits import CommandFailedError
from mycel.node.training.founding import read_recipe
from mycel.node.training.metrics import StepMetrics
from mycel.security.attacks import play
from mycel.swarm.methods.options import DilocoOptions

RECIPE = Path(__file__).parents[2] / "docs" / "recipes" / "rounds.toml"


def at(step: int, loss: float | None) -> StepMetrics:
    return StepMetrics(step, 100 * step, loss)


def test_a_run_that_learns_is_not_lost() -> None:
    end = LostRun()
    assert end.why_lost(None, 0.0) == ""
    assert [end.why_lost(at(step, 7.0 - step), 10.0 * step) for step in range(1, 5)] == [""] * 4


@pytest.mark.parametrize("loss", [21.1, 1e5, math.inf, math.nan])
def test_a_loss_beyond_three_times_the_first_is_the_end(loss: float) -> None:
    end = LostRun()
    assert end.why_lost(at(1, 7.0), 0.0) == ""
    assert end.why_lost(at(2, 21.0), 1.0) == ""
    why = end.why_lost(at(3, loss), 2.0)
    assert why == f"its loss is {loss:.3g} after step 3, and was 7 at first"


def test_a_run_that_stands_still_is_the_end() -> None:
    end = LostRun()
    assert end.why_lost(at(4, 7.0), 100.0) == ""
    assert end.why_lost(at(4, 7.0), 129.9) == ""
    assert end.why_lost(at(4, 7.0), 130.0) == "since step 4 no round has come to anything for 30 s"
    end.why_lost(at(5, None), 131.0)
    assert end.why_lost(at(5, None), 160.0) == ""


def test_what_leaves_the_scale_is_cut_at_its_edge() -> None:
    run = [at(1, 6.0), at(2, 12.0), at(3, 1e5), at(4, math.nan), at(5, None)]
    assert [record.loss for record in visible(run)] == [6.0, 12.0, 18.0]
    assert visible(run[:2]) == run[:2]
    assert visible([at(1, None)]) == [at(1, None)]
    assert [record.loss for record in visible([at(1, 6.0), at(2, math.nan)])] == [6.0, 18.0]


def test_the_recipe_is_of_rounds_and_withstands_the_demos_liars() -> None:
    recipe = read_recipe(RECIPE)
    assert isinstance(recipe.method, DilocoOptions)
    assert recipe.round.liars >= len(LIARS) / (N_HONEST + len(LIARS))
    assert BOUND == 1.08
    for name in LIARS:
        play(name)


def test_a_recipe_without_rounds_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CommandFailedError, match=r"is no recipe of rounds: it has no \[method\]"):
        demo_rounds(RECIPE.parent / "topics.toml", tmp_path)
