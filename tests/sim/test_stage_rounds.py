"""The peers of a run's stages take each step's sum out of a round, in virtual time."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
import trio
from torch import Tensor

from mycel.protocols.errors import ConfigError
from mycel.protocols.training import StageState, StageStatus
from mycel.swarm.rounds.terms import GroupTerms
from mycel.swarm.training.attendance import IDLE_S, brings_nothing
from mycel.swarm.training.lattice import to_float
from mycel.swarm.training.members import Members
from mycel.swarm.training.numbers import to_bytes
from mycel.swarm.training.plan import RunPlan
from mycel.swarm.training.recipe import parse_recipe
from mycel.swarm.training.step import RoundFacts
from tests.sim.toy_stage import ToyReference, ToyState, toy_plan, toy_reference
from tests.sim.training_swarm import Rounds, TrainingSwarm
from tests.sim.world import World, run_world

SLOW = pytest.mark.slow
STEPS = 10
PLAN = toy_plan(n_stages=2, n_steps=STEPS)


def terms(**changes: object) -> GroupTerms:
    fields: dict[str, object] = {"longest_grace_s": 3.0, "patience_s": 20.0, **changes}
    return GroupTerms(1, **fields)  # type: ignore[arg-type]


@cache
def reference(plan: RunPlan, *, tied: bool = False) -> ToyReference:
    return toy_reference(plan, tied=tied)


def rounds_world(
    rounds: Rounds,
    body: Callable[[TrainingSwarm], Awaitable[None]],
    *,
    plan: RunPlan = PLAN,
    tied: bool = False,
    every: int = 0,
) -> TrainingSwarm:
    """Run a scenario; the swarm as it was at the end."""
    swarms: list[TrainingSwarm] = []

    async def main(world: World) -> None:
        swarm = TrainingSwarm(world, plan, reference(plan, tied=tied), tied=tied, rounds=rounds, every=every)
        swarms.append(swarm)
        await body(swarm)

    # No power fails in here, and a real disk takes longer over a round than all the rest.
    with patch("os.fsync"):
        run_world(1, main, limit_s=900.0)
    return swarms[0]


def params_of(swarm: TrainingSwarm, stage: int) -> np.ndarray:
    """Of who has made the most steps."""
    holders = [one.stepper.holder for name in swarm.at(stage) if (one := swarm.peers[name]).stepper is not None]
    furthest = max(holders, key=lambda holder: holder.version)
    assert isinstance(furthest, ToyState)
    return furthest.params_P


def exact_params(stage: int, n_steps: int = STEPS, plan: RunPlan = PLAN) -> np.ndarray:
    state = ToyState(plan, stage)
    for sums in reference(plan).sums[:n_steps]:
        state.apply(to_float(sums[stage]), 1.0)
    return state.params_P


def losses(swarm: TrainingSwarm) -> dict[int, float]:
    return {done.version: done.loss for *_, done in swarm.made if done.loss is not None}


def exact_losses(plan: RunPlan = PLAN, *, tied: bool = False) -> list[float]:
    return [loss / plan.step_tokens for loss in reference(plan, tied=tied).losses]


async def train(swarm: TrainingSwarm, per_stage: int = 2) -> None:
    swarm.fill(per_stage)
    await swarm.until(STEPS)
    swarm.check_all_made(STEPS)


def test_float32_and_the_mean_equal_the_exact_run(tmp_path: Path) -> None:
    distances = []

    async def body(swarm: TrainingSwarm) -> None:
        await train(swarm)
        distances.extend(float(abs(params_of(swarm, stage) - exact_params(stage)).max()) for stage in range(2))

    swarm = rounds_world(Rounds(tmp_path, terms(contributors=1.0), 4), body)
    assert max(distances) < 1e-6
    found = losses(swarm)
    assert [found[version + 1] for version in range(STEPS)] == pytest.approx(exact_losses(), rel=1e-6)


@SLOW
def test_a_tied_table_gets_both_shares(tmp_path: Path) -> None:
    async def body(swarm: TrainingSwarm) -> None:
        await train(swarm)

    swarm = rounds_world(Rounds(tmp_path, terms(contributors=1.0), 4), body, tied=True)
    found = losses(swarm)
    assert [found[version + 1] for version in range(STEPS)] == pytest.approx(exact_losses(tied=True), rel=1e-5)


@SLOW
def test_eight_bits_with_error_feedback_learn_alike(tmp_path: Path) -> None:
    swarm = rounds_world(Rounds(tmp_path, terms(codec="int8+ef", result_codec="int8"), 4), train)
    found, exact = losses(swarm), exact_losses()
    assert found[STEPS] == pytest.approx(exact[-1], rel=0.02)
    assert found[STEPS] < found[1] - 0.3


# ---- liars

# Whoever is alone in a round may bring anything: everybody has to have counted something.
LIED_TO = toy_plan(n_stages=2, n_steps=5, n_microbatches=24, n_sequences=2)


def thousandfold(vector_P: Tensor, number: int) -> Tensor:
    return vector_P * -1000.0


@SLOW
@pytest.mark.parametrize("rule", ["median", "nnm+geometric-median"])
def test_a_liar_in_a_stage_does_no_harm(tmp_path: Path, rule: str) -> None:
    async def body(swarm: TrainingSwarm) -> None:
        swarm.fill(3)
        await swarm.until(LIED_TO.n_steps)
        swarm.check_all_made(LIED_TO.n_steps)

    robust = terms(rule=rule, liars=0.34, contributors=1.0)
    swarm = rounds_world(Rounds(tmp_path, robust, 6, {"c0": thousandfold}), body, plan=LIED_TO)
    assert swarm.events("round.brought")
    assert losses(swarm)[LIED_TO.n_steps] == pytest.approx(exact_losses(LIED_TO)[-1], rel=0.08)


@SLOW
def test_with_the_mean_the_same_liar_ruins_the_stage(tmp_path: Path) -> None:
    distances = []

    async def body(swarm: TrainingSwarm) -> None:
        swarm.fill(3)
        await swarm.until(1)
        distances.extend(
            float(abs(params_of(swarm, stage) - exact_params(stage, 1, LIED_TO)).max()) for stage in (0, 1)
        )

    rounds_world(Rounds(tmp_path, terms(contributors=1.0), 6, {"c0": thousandfold}), body, plan=LIED_TO)
    assert distances[0] > 1.0
    assert distances[1] < 1e-6, "the other stage has no liar"


# ---- who comes and goes


@SLOW
def test_a_peer_is_killed_in_a_step_and_comes_again(tmp_path: Path) -> None:
    """Its numbers are walked again or missing in the mean; nobody waits for it, and it counts again as a member."""

    async def body(swarm: TrainingSwarm) -> None:
        swarm.fill(3)
        await swarm.until(3)
        await trio.sleep(0.05)
        began_s = trio.current_time()
        swarm.crash("b0")
        await swarm.until(6)
        assert trio.current_time() - began_s < 10.0
        swarm.start("b0", stage=0)
        await swarm.until(STEPS)
        swarm.check_all_made(STEPS)
        assert "b0" in swarm.at(0, "training", "observing")

    swarm = rounds_world(Rounds(tmp_path, terms(codec="int8+ef"), 6), body)
    assert losses(swarm)[STEPS] == pytest.approx(exact_losses()[-1], rel=0.05)


@SLOW
def test_a_newcomer_counts_once_it_is_a_certified_member(tmp_path: Path) -> None:
    async def body(swarm: TrainingSwarm) -> None:
        swarm.fill(2)
        await swarm.until(2)
        newcomer = swarm.start("c0", stage=0)
        while "c0" not in swarm.at(0, "training"):
            stepper = newcomer.stepper
            assert stepper is None or not stepper.counted or newcomer.rounds.group.is_member  # type: ignore[union-attr]
            await swarm.moved.after(swarm.moved.count)
        assert newcomer.rounds is not None
        assert newcomer.rounds.group.is_member
        await swarm.until(STEPS)
        swarm.check_all_made(STEPS)
        assert any(told.name == "c0" and told.fields["accepted"] for told in swarm.events("round.brought"))

    rounds_world(Rounds(tmp_path, terms(), 4), body)


@SLOW
def test_all_are_killed_and_go_on_from_their_checkpoints(tmp_path: Path) -> None:
    async def body(swarm: TrainingSwarm) -> None:
        swarm.fill(2)
        await swarm.until(5)
        for name in swarm.living():
            swarm.crash(name)
        await trio.sleep(0.05)  # until its files are free
        since_s = trio.current_time()
        for name in ("b1", "a0", "b0", "a1"):
            swarm.start(name, stage=int(name[1]))
        await swarm.when(lambda: any(at_s > since_s for at_s, *_ in swarm.made))
        assert min(done.version for at_s, *_, done in swarm.made if at_s > since_s) == 5
        await swarm.until(STEPS)

    rounds_world(Rounds(tmp_path, terms(rule="nnm+caf", liars=0.25), 4), body, every=2)


@SLOW
def test_a_stage_that_is_lost_is_manned_by_newcomers(tmp_path: Path) -> None:
    """The peers of the other stage are a quorum: they let the newcomers in, and all go back to a checkpoint."""

    async def body(swarm: TrainingSwarm) -> None:
        swarm.fill(2)
        for name in ("c1", "d1", "e1"):
            swarm.start(name, stage=1)
        await swarm.until(5)
        for name in ("a0", "b0"):
            swarm.crash(name)
        since_s = trio.current_time()
        for name in ("c0", "d0"):
            swarm.start(name, stage=0)
        await swarm.when(lambda: any(told.what == "stage.restored" for told in swarm.told if told.at_s > since_s))
        await swarm.when(lambda: any(n == "c0" and done.version == STEPS for _, n, _, done in swarm.made))

    rounds_world(Rounds(tmp_path, terms(), 7), body, every=2)


@SLOW
def test_who_leaves_is_let_go_by_a_certificate(tmp_path: Path) -> None:
    async def body(swarm: TrainingSwarm) -> None:
        swarm.fill(2)
        await swarm.until(3)
        began_s = trio.current_time()
        swarm.world.start("b0", lambda _: swarm.peers["b0"].leave())
        await swarm.when(lambda: any(told.name == "b0" for told in swarm.events("peer.left")))
        assert trio.current_time() - began_s < 5.0
        await swarm.until(STEPS)
        swarm.check_all_made(STEPS)
        rounds = swarm.peers["a0"].rounds
        assert rounds is not None
        assert len(rounds.group.members) == 3

    rounds_world(Rounds(tmp_path, terms(), 4), body)


# ---- who brings nothing


FACTS = RoundFacts(9, may_compute=True, has_offered=False, made=(4, 4))


def status(stage: int, counted: int = 0, version: int = 5, state: StageState = "training") -> StageStatus:
    return StageStatus(run=PLAN.run, seq=1, stage=stage, state=state, version=version, counted=to_bytes(counted))


def absence(
    me: StageStatus, *others: StageStatus, facts: RoundFacts = FACTS, outsiders: bool = False, since_s: float = 0.0
) -> str:
    members = Members("m", PLAN.run)
    for at, one in enumerate(others):
        members.hear(f"p{at}", one, 0.0)
    return brings_nothing(PLAN, members, me, facts, outsiders=outsiders, since_s=since_s)


def test_a_member_says_that_it_brings_nothing_only_when_others_can_bring_theirs() -> None:
    whole, part = PLAN.everything, PLAN.everything >> 1
    observer = status(0, state="observing")
    assert absence(observer, status(0, whole), status(1, whole)) == (
        "stage 0 offers its part of step 5, and this peer has none"
    )
    assert not absence(observer, status(0, whole), status(1, part)), "the round would end without stage 1"
    assert not absence(status(0, whole), status(1, whole)), "it brings what it has counted"
    assert absence(status(0, whole), status(1, whole), facts=replace(FACTS, made=(5, 4)))
    assert not absence(status(0, whole), status(1, whole), facts=replace(FACTS, made=(5, 5))), (
        "the step is about to be made"
    )
    assert not absence(observer, status(0, whole), status(1, whole), facts=replace(FACTS, has_offered=True))


def test_a_round_that_brings_nothing_ends_for_those_who_wait_to_be_let_in() -> None:
    alone = status(0, PLAN.everything)
    assert not absence(alone, since_s=60.0)
    assert not absence(alone, outsiders=True)
    assert absence(alone, outsiders=True, since_s=IDLE_S) == (
        "a stage has nobody who computes it, and others wait to be let in"
    )
    over = status(0, version=STEPS), status(1, version=STEPS)
    assert absence(*over, outsiders=True, since_s=IDLE_S) == "the run is over, and others wait to be let in"
    assert not absence(*over, since_s=60.0), "rounds rest"


def test_a_liar_who_says_that_it_is_far_ahead_moves_nobody() -> None:
    whole = PLAN.everything
    observer, liar = status(0, state="observing"), status(1, whole, version=9)
    assert "step 5" in absence(observer, liar, status(0, whole), status(1, whole))


# ---- the recipe


@pytest.mark.parametrize(
    ("method", "flaw"),
    [
        ('name = "data-parallel"\ncodec = "int8+ef"', ""),
        ('name = "diloco"', 'method.name: with stages > 1 it must be "exact" or "data-parallel", not "diloco"'),
        ('name = "data-parallel"\ninner_steps = 4', "method.inner_steps: with stages > 1 every step is shared"),
        ('name = "data-parallel"\nrate = 0.1', "method.rate: with stages > 1 every step is shared"),
    ],
)
def test_what_stages_can_share_in_rounds(method: str, flaw: str) -> None:
    text = f'name = "x"\nstages = 2\n[data]\nkind = "python-topics"\n[step]\nsteps = 4\n[method]\n{method}\n'
    if not flaw:
        assert parse_recipe(text, "recipe").stages == 2
        return
    with pytest.raises(ConfigError, match=flaw):
        parse_recipe(text, "recipe")
