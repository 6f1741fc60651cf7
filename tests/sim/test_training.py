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
