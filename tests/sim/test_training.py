"""A whole run in virtual time: what comes out is what one process computes, whoever comes, dies and returns."""

from __future__ import annotations

import pytest
import trio

from tests.sim.toy_stage import toy_plan, toy_reference
from tests.sim.training_swarm import TrainingSwarm
from tests.sim.world import World, run_world


@pytest.mark.parametrize("tied", [False, True])
def test_six_peers_train_what_one_process_trains(tied: bool) -> None:
    plan = toy_plan(n_stages=3, n_steps=6)
    reference = toy_reference(plan, tied=tied)

    async def main(world: World) -> None:
        swarm = TrainingSwarm(world, plan, reference, tied=tied)
        for at in range(6):
            swarm.start(f"n{at}", stage=at % 3)
        with trio.fail_after(120):
            await swarm.until(plan.n_steps)
        swarm.check()
        assert set(swarm.seen) == {(stage, version) for stage in range(3) for version in range(1, 7)}

    run_world(1, main)


# ---- all dead, or a whole stage

AGAIN = toy_plan(n_stages=2, n_steps=8, n_microbatches=4, n_sequences=1, n_tokens=2)


@pytest.mark.parametrize("lost", ["", "a0", pytest.param("b1", marks=pytest.mark.slow)])
@pytest.mark.parametrize("order", ["a0 a1 b0 b1", pytest.param("b1 b0 a1 a0", marks=pytest.mark.slow)])
@pytest.mark.parametrize("apart_s", [0.0, pytest.param(0.5, marks=pytest.mark.slow)])
def test_all_are_killed_and_started_again(lost: str, order: str, apart_s: float) -> None:
    """The run goes on from the newest checkpoint, also if one disk is lost, and whoever comes first."""

    async def main(world: World) -> None:
        swarm = TrainingSwarm(world, AGAIN, toy_reference(AGAIN), every=2)
        swarm.fill(2)
        await swarm.until(5)
        await trio.sleep(0.05)
        for name in swarm.living():
            swarm.crash(name)
        swarm.disks[lost] = {}
        since_s = trio.current_time()
        for name in order.split():
            swarm.start(name, stage=int(name[1]))
            await trio.sleep(apart_s)
        await swarm.until(AGAIN.n_steps)
        swarm.check_all_made(AGAIN.n_steps)
        again = [done.version for at_s, _, _, done in swarm.made if at_s >= since_s]
        assert min(again) == 5, "the run went on after step 4, of which everybody had a checkpoint"

    run_world(1, main, limit_s=200.0)


async def lose_stage_0(swarm: TrainingSwarm, newcomers: tuple[str, ...]) -> list[int]:
    """Both its peers die after step 5, a0 after step 3 already if it is to come again; the steps made since."""
    swarm.fill(2)
    if "a0" in newcomers:
        await swarm.until(3)
        swarm.crash("a0")
    await swarm.until(5)
    await trio.sleep(0.05)
    for name in ("a0", "b0"):
        if name in swarm.living():
            swarm.crash(name)
    await trio.sleep(0.2)
    before = len(swarm.made)
    await trio.sleep(1.0)
    assert len(swarm.made) == before, "without a stage nothing is trained"
    for name in newcomers:
        swarm.start(name, stage=0)
    await swarm.until(AGAIN.n_steps)
    swarm.check_all_made(AGAIN.n_steps)
    return [done.version for *_, done in swarm.made[before:]]


@pytest.mark.parametrize(
    ("newcomers", "disk", "back_to"),
    [
        (("c0", "d0"), "own", 0),
        (("c0", "d0"), "whole", 4),
        (("c0", "d0"), "shared", 4),
        (("a0",), "own", 2),
        (("a0", "c0"), "own", 2),
        (("c0", "a0"), "own", 2),
    ],
)
def test_a_whole_stage_is_lost(newcomers: tuple[str, ...], disk: str, back_to: int) -> None:
    """All go back to a version that is to be had: of the machines' disks, of whole checkpoints elsewhere, or to 0."""

    async def main(world: World) -> None:
        swarm = TrainingSwarm(world, AGAIN, toy_reference(AGAIN), every=2, shared=None if disk == "own" else {})
        if disk == "whole":
            swarm.disks |= {name: {} for name in newcomers}
        again = await lose_stage_0(swarm, newcomers)
        assert min(again) == back_to + 1
        assert again.count(back_to + 1) >= 3

    run_world(1, main, limit_s=200.0)
