"""Peers that die and come, at all times and at chosen moments: the run loses no step and ends where one process ends."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from itertools import takewhile

import pytest
import trio

from mycel.swarm.training.plan import RunPlan
from tests.sim.toy_stage import ToyReference, toy_plan, toy_reference
from tests.sim.training_swarm import TrainingSwarm
from tests.sim.world import LogEntry, World, run_world

SLOW = pytest.mark.slow


@cache
def reference(plan: RunPlan, *, tied: bool = False) -> ToyReference:
    return toy_reference(plan, tied=tied)


# ---- (1) one of four every 20 steps


def redone(swarm: TrainingSwarm) -> set[object]:
    """The steps in which microbatches had to be walked anew, parts fetched again or gradients taken back."""
    anew = {told.fields["version"] for told in swarm.events("work.replaced")}
    return anew | {done.version - 1 for *_, done in swarm.made if done.retries or done.duplicates}


@pytest.mark.parametrize(("n_steps", "every", "pass_s"), [(40, 10, 0.3), pytest.param(200, 20, 0.15, marks=SLOW)])
def test_one_of_four_peers_is_killed_every_few_steps(n_steps, every, pass_s, record_testsuite_property) -> None:
    plan = toy_plan(n_stages=2, n_steps=n_steps, n_microbatches=4, n_sequences=1, n_tokens=2)
    kills = range(every, n_steps, every)

    async def main(world: World) -> None:
        swarm = TrainingSwarm(world, plan, reference(plan), pass_s=pass_s)
        swarm.fill(2)
        for round_, version in enumerate(kills):
            await swarm.until(version)
            assert swarm.trainers() == [2, 2], "the one before has come"
            await trio.sleep(world.rng.uniform(0.0, 8 * pass_s))
            swarm.crash(world.rng.choice(swarm.living()))
            swarm.start(f"new{round_}")
        await swarm.until(n_steps)
        swarm.check_all_made(n_steps)
        again = redone(swarm)
        world.record("redone", str(len(again)))
        assert len(again) <= 0.15 * n_steps, f"{len(again)} of {n_steps} steps were made with something done again"
        record_testsuite_property(f"steps_with_something_redone_of_{n_steps}", len(again))
        print(len(again), trio.current_time(), swarm.trainers(), len(swarm.events("step.fetch")))

    run_world(1, main, limit_s=60.0 * n_steps)


# ---- (2) somebody dies at a chosen moment

PASS_S = 0.01
LATENCY_S = 0.005
STORY = toy_plan(n_stages=2, n_steps=5, n_microbatches=4, n_sequences=1, n_tokens=2)
JOINER = "joiner"
AFTER_S = 0.3
Deaths = tuple[tuple[float, str], ...]


@dataclass(frozen=True)
class Story:
    """Two peers in each of two stages, and one that joins stage 0 after the first step; who dies is soon replaced."""

    log: list[LogEntry]
    swarm: TrainingSwarm
    ended_s: float

    def times(self, kind: str, *who: str, step: int = 2) -> list[float]:
        """When something was noted in the step after `step` steps: what begins in the log with these."""
        low, high = self.step_s(step), self.step_s(step + 1)
        return [at for at, *entry in self.log if low < at < high and _begins(entry, (kind, *who))]

    def step_s(self, version: int, *names: str) -> float:
        """When the first (of these) had made so many steps."""
        return min(at for at, name, _, done in self.swarm.made if done.version == version and name in (names or name))


def _begins(entry: list[str], wanted: tuple[str, ...]) -> bool:
    return all(said.startswith(want) for said, want in zip(entry, wanted, strict=False))


def story(seed: int, deaths: Deaths = ()) -> Story:
    stories: list[Story] = []

    async def main(world: World) -> None:
        swarm = TrainingSwarm(world, STORY, reference(STORY), pass_s=PASS_S)
        swarm.fill(2)

        def die(name: str) -> None:
            if name not in swarm.living():
                return
            swarm.crash(name)
            stage = 0 if name == JOINER else int(name[1])
            world.agenda.after(AFTER_S, lambda: swarm.start(f"after {name}", stage=stage))

        for at_s, name in deaths:
            world.agenda.after(at_s, lambda name=name: die(name))
        await swarm.until(1)
        swarm.start(JOINER, stage=0)
        await swarm.until(STORY.n_steps)
        stories.append(Story(world.log, swarm, trio.current_time()))
        await trio.sleep(2 * AFTER_S)
        await swarm.when(lambda: swarm.trainers() == [3, 2])
        swarm.check_all_made(STORY.n_steps)

    run_world(seed, main, limit_s=120.0)
    return stories[0]


@cache
def calm(seed: int) -> Story:
    return story(seed)
