"""Many trainers keep a pipeline as full as one does, to the end of each step."""

from __future__ import annotations

from tests.sim.toy_stage import toy_plan, toy_reference
from tests.sim.training_swarm import TrainingSwarm
from tests.sim.world import World, run_world

PLAN = toy_plan(n_stages=4, n_steps=5, n_microbatches=16, n_sequences=1, n_tokens=2)


def step_s(n_trainers: int) -> float:
    """A peer a stage, the first of them trainers; the mean of the steps after the first two."""
    ends_s: list[float] = []

    async def main(world: World) -> None:
        swarm = TrainingSwarm(world, PLAN, toy_reference(PLAN), pass_s=0.1)
        for stage in range(PLAN.n_stages):
            swarm.start(f"n{stage}", stage=stage, trains=stage < n_trainers)
        await swarm.until(PLAN.n_steps)
        last_s = {done.version: at_s for at_s, _, _, done in swarm.made}
        ends_s.extend(last_s[version] for version in sorted(last_s))

    run_world(1, main, limit_s=200.0)
    return (ends_s[-1] - ends_s[1]) / (len(ends_s) - 2)


def test_four_trainers_fill_four_stages_as_one_does() -> None:
    """Numbers fall to trainers by lot: whoever has more of them must not end the step alone, two at a time."""
    assert step_s(4) <= 1.02 * step_s(1)
