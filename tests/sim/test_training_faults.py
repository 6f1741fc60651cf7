"""Links and machines that misbehave: what comes out is what one process computes, and nobody waits for ever."""

from __future__ import annotations

from collections import Counter
from functools import cache
from random import Random

import numpy as np
import pytest
import trio

from mycel.protocols import ids
from mycel.protocols.codec import pipe_codec
from mycel.protocols.training import Backward, Passed, WorkFailed
from mycel.swarm.training.plan import RunPlan
from tests.sim.faults import LinkFaults, WorldOptions
from tests.sim.lossy import Losses
from tests.sim.toy_stage import ToyReference, ToyState, toy_plan, toy_reference
from tests.sim.training_swarm import TrainingSwarm
from tests.sim.world import World, run_world

SLOW = pytest.mark.slow


def plan_of(n_steps: int, n_microbatches: int = 4) -> RunPlan:
    return toy_plan(n_stages=2, n_steps=n_steps, n_microbatches=n_microbatches, n_sequences=1, n_tokens=2)


@cache
def reference(plan: RunPlan) -> ToyReference:
    return toy_reference(plan)


def swarm_of(world: World, plan: RunPlan, **options) -> TrainingSwarm:
    return TrainingSwarm(world, plan, reference(plan), **options)


# ---- links


@pytest.mark.parametrize("seed", [pytest.param(seed, marks=SLOW if seed > 1 else ()) for seed in range(1, 5)])
def test_replies_are_lost_doubled_and_late(seed: int) -> None:
    plan = plan_of(4)

    async def main(world: World) -> None:
        replies = (Passed, Backward, WorkFailed)
        losses = Losses(ids.PIPE, pipe_codec, replies, Random(seed), drop=0.2, double=0.1, delay=0.1)
        swarm = swarm_of(world, plan, losses=losses)
        swarm.fill(2)
        await swarm.until(plan.n_steps)
        swarm.check_all_made(plan.n_steps)
        assert min(losses.fates[fate] for fate in ("dropped", "doubled", "delayed")) > 0

    run_world(seed, main, limit_s=300.0)


def test_links_whose_segments_are_lost_and_late() -> None:
    """As TCP shows it: delays of some tenths of a second, and now and then of seconds."""
    plan = plan_of(4)

    async def main(world: World) -> None:
        swarm = swarm_of(world, plan)
        swarm.fill(2)
        await swarm.until(plan.n_steps)
        swarm.check_all_made(plan.n_steps)

    options = WorldOptions(link=LinkFaults(latency_s=0.05, jitter_s=0.05, loss=0.2))
    run_world(2, main, options=options, limit_s=300.0)


def test_a_link_slower_than_any_deadline() -> None:
    """One pair of peers of neighbouring stages cannot talk in time: their microbatches go other ways."""
    plan = plan_of(6)

    async def main(world: World) -> None:
        swarm = swarm_of(world, plan)
        swarm.fill(2)
        await swarm.until(1)
        world.link("a0", "a1", LinkFaults(latency_s=15.0))
        await swarm.until(plan.n_steps)
        swarm.check_all_made(plan.n_steps)

    run_world(1, main, limit_s=600.0)


# ---- partitions


@pytest.mark.parametrize("slowness", [1.0, 8.0])
def test_two_halves_that_hold_all_stages_both_go_on(slowness: float) -> None:
    """Equally fast they make the same steps; of unlike speeds the slower one then takes the other's."""
    plan = plan_of(24)

    async def main(world: World) -> None:
        swarm = swarm_of(world, plan, pass_s=0.1)
        swarm.fill(2)
        await swarm.until(2)
        for name in ("b0", "b1"):
            world.slow(name, slowness)
        world.partition(["a0", "a1"], ["b0", "b1"])
        cut_s = trio.current_time()
        await trio.sleep(5.0 + 9.0)  # silence, and some steps
        alone = {name[0] for at, name, *_ in swarm.made if at > cut_s + 6.0}
        assert alone == {"a", "b"}, "both go on"
        assert swarm.version() < plan.n_steps
        world.heal()
        await swarm.until(plan.n_steps)
        await swarm.when(lambda: swarm.trainers() == [2, 2])
        swarm.check_all_made(plan.n_steps)
        assert not swarm.events("stage.restored", since_s=cut_s), "nobody goes back"

    run_world(1, main, limit_s=300.0)


def test_a_half_that_lacks_a_stage_waits_and_comes_after() -> None:
    plan = plan_of(12)

    async def main(world: World) -> None:
        swarm = swarm_of(world, plan)
        swarm.fill(2)
        await swarm.until(2)
        world.partition(["a0", "a1", "b1"], ["b0"])
        cut_s = trio.current_time()
        await trio.sleep(9.0)
        last = max(d.version for _, name, _, d in swarm.made if name == "b0")
        first = max(d.version for _, name, _, d in swarm.made if name == "a0")
        assert last <= 3
        assert first >= 4
        world.heal()
        await swarm.until(plan.n_steps)
        await swarm.when(lambda: swarm.trainers() == [2, 2])
        swarm.check_all_made(plan.n_steps)
        assert not swarm.events("stage.restored", since_s=cut_s)

    run_world(1, main, limit_s=300.0)


def test_halves_of_one_stage_each_wait_for_each_other() -> None:
    """Nobody can go on, and nobody goes back: what was counted is still there when the link is mended."""
    plan = plan_of(6)

    async def main(world: World) -> None:
        swarm = swarm_of(world, plan)
        swarm.fill(2)
        await swarm.until(2)
        await trio.sleep(0.05)
        world.partition(["a0", "b0"], ["a1", "b1"])
        cut_s = trio.current_time()
        await trio.sleep(30.0)
        assert max(d.version for *_, d in swarm.made) <= 3
        world.heal()
        await swarm.until(plan.n_steps)
        swarm.check_all_made(plan.n_steps)
        assert not swarm.events("stage.restored", since_s=cut_s)
        assert trio.current_time() < cut_s + 30.0 + 12.0

    run_world(1, main, limit_s=300.0)


# ---- machines


def test_peers_of_unlike_speeds_share_the_work() -> None:
    plan = plan_of(3, n_microbatches=30)
    speeds = {"a": 8.0, "b": 4.0, "c": 2.0, "d": 1.0}

    async def main(world: World) -> None:
        swarm = swarm_of(world, plan, pass_s=0.1)
        for letter, speed in speeds.items():
            for stage in range(2):
                name = f"{letter}{stage}"
                swarm.start(name, stage=stage, trains=name == "a0", slowness=8.0 / speed)
        await swarm.until(plan.n_steps)
        swarm.check_all_made(plan.n_steps)
        passes = Counter(entry[2] for entry in world.log if entry[1] == "backward")
        for stage in range(2):
            shares = [passes[f"{letter}{stage}"] for letter in speeds]
            assert shares == sorted(shares, reverse=True)
            assert shares[0] > 3 * shares[3] > 0

    run_world(1, main, limit_s=600.0)


@pytest.mark.parametrize("still_s", [3.0, 20.0])
def test_a_peer_stands_still_and_comes_back(still_s: float) -> None:
    """SIGSTOP, shorter and longer than silence is borne: the others go on, it takes up what they have, and trains."""
    plan = plan_of(16)

    async def main(world: World) -> None:
        swarm = swarm_of(world, plan, pass_s=0.4)
        swarm.fill(2)
        await swarm.until(2)
        await trio.sleep(0.1)
        world.stop("b0")
        await trio.sleep(still_s)
        stood = swarm.version()
        world.cont("b0")
        came_s = trio.current_time()
        await swarm.when(lambda: any(n == "b0" and at > came_s and d.version > stood + 1 for at, n, _, d in swarm.made))
        assert stood >= (4 if still_s > 5.0 else 2)
        assert trio.current_time() - came_s < 12.0
        await swarm.until(plan.n_steps)
        await swarm.when(lambda: swarm.trainers() == [2, 2])
        swarm.check_all_made(plan.n_steps)
        assert not swarm.events("stage.restored", since_s=1.0)

    run_world(1, main, limit_s=600.0)


@pytest.mark.parametrize("name", ["b0", "a1"])
def test_a_planned_leave_costs_nothing(name: str) -> None:
    """It finishes the step that it counts in and goes: no microbatch is computed twice, and nobody misses it."""
    plan = plan_of(8)

    async def main(world: World) -> None:
        swarm = swarm_of(world, plan)
        swarm.fill(2)
        # At the beginning of a step: at its end others may have drawn it for the next one before they hear of it.
        await swarm.when(lambda: swarm.peers[name].describe().version == 3)
        began_s = trio.current_time()
        await swarm.peers[name].leave()
        await swarm.when(lambda: name not in swarm.living())
        assert trio.current_time() - began_s < 1.0
        await swarm.until(plan.n_steps)
        swarm.check_all_made(plan.n_steps)
        passes = Counter(entry[1] for entry in world.log if entry[1] in ("forward", "backward"))
        assert passes == {"forward": 4 * plan.n_steps, "backward": 2 * 4 * plan.n_steps}
        assert not swarm.events("work.replaced")

    run_world(1, main, limit_s=100.0)


@pytest.mark.parametrize("when", ["between two steps", "in the middle of a step"])
def test_flipped_bits_are_noticed(when: str) -> None:
    """The stage's hash tells: who differs from most takes their state again, and all have one hash at each version."""
    plan = plan_of(8)

    async def main(world: World) -> None:
        swarm = swarm_of(world, plan)
        swarm.fill(3)
        await swarm.until(2)
        stepper = swarm.peers["b0"].stepper
        assert stepper is not None
        state = stepper.holder
        assert isinstance(state, ToyState)
        if when == "between two steps":
            apply = state.apply

            def apply_and_flip(sum_P, scale) -> None:
                apply(sum_P, scale)
                flip(state)
                state.apply = apply

            state.apply = apply_and_flip
        else:
            await trio.sleep(0.04)
            flip(state)
        await swarm.when(lambda: swarm.events("step.fetch", since_s=0.2))
        [told] = swarm.events("step.fetch", since_s=0.2)
        assert told.name == "b0"
        assert "has other parameters" in str(told.fields["reason"])
        wrong = swarm.seen[0, told.fields["version"]]
        deviant = next(params for params, names in wrong.items() if names == {"b0"})
        del wrong[deviant]
        await swarm.until(plan.n_steps)
        await swarm.when(lambda: swarm.trainers() == [3, 3])
        assert {len(hashes) for hashes in swarm.seen.values()} == {1}
        if when == "between two steps":
            swarm.check_all_made(plan.n_steps)

    run_world(1, main, limit_s=100.0)


def flip(state: ToyState) -> None:
    """One bit of one parameter."""
    state.params_P.view(np.uint32)[3] ^= 1 << 20


def test_a_trainer_that_is_alone_dies() -> None:
    """Who only holds a stage goes on waiting, and the next who has the text drives on."""
    plan = plan_of(6)

    async def main(world: World) -> None:
        swarm = swarm_of(world, plan)
        swarm.fill(2, trains=False)
        swarm.start("trainer", stage=0)
        await swarm.until(2)
        await trio.sleep(0.05)
        swarm.crash("trainer")
        await trio.sleep(8.0)
        assert swarm.version() <= 3
        swarm.start("next", stage=1)
        came_s = trio.current_time()
        await swarm.until(plan.n_steps)
        swarm.check_all_made(plan.n_steps)
        assert trio.current_time() - came_s < 5.0

    run_world(1, main, limit_s=100.0)


# ---- (5) peers that are where they are not needed


@pytest.mark.parametrize("seed", [1, pytest.param(2, marks=SLOW)])
def test_peers_move_to_where_they_are_needed(seed: int) -> None:
    """4 + 1 + 1: one moves at a time, a stage is never emptied, and in the end each has two."""
    plan = toy_plan(n_stages=3, n_steps=14, n_microbatches=6, n_sequences=1, n_tokens=2)

    async def main(world: World) -> None:
        swarm = swarm_of(world, plan, pass_s=0.25, move_every_s=10.0)
        for at, stage in enumerate((0, 0, 0, 0, 1, 2)):
            swarm.start(f"n{at}", first=stage)
        await swarm.when(lambda: swarm.trainers() == [4, 1, 1])
        least = swarm.trainers()
        while swarm.version() < plan.n_steps:
            await swarm.moved.after(swarm.moved.count)
            least = [min(pair) for pair in zip(least, swarm.trainers(), strict=True)]
        swarm.check_all_made(plan.n_steps)
        assert min(least) >= 1, "no stage is ever left by all"
        assert swarm.trainers() == [2, 2, 2]
        moving = [(told.at_s, told.name) for told in swarm.events("stage.moving")]
        assert len(moving) == 2
        left = [next(t.at_s for t in swarm.events("step.fetch", since_s=at) if t.name == name) for at, name in moving]
        assert left[0] < moving[1][0], "the next one says that it moves when the first has left its stage"

    run_world(seed, main, limit_s=3000.0)


# ---- all of it


@SLOW
@pytest.mark.parametrize("seed", range(204, 210))
def test_chaos(seed: int) -> None:
    """Deaths, returns, newcomers, standstills, cuts, leaves and lost replies, one after the other."""
    plan = toy_plan(n_stages=2, n_steps=30, n_microbatches=4, n_sequences=1, n_tokens=2)

    async def main(world: World) -> None:
        rng = world.rng
        losses = Losses(ids.PIPE, pipe_codec, (Passed, Backward, WorkFailed), Random(seed), 0.02, 0.02, 0.02)
        swarm = swarm_of(world, plan, pass_s=0.1, losses=losses, every=4, move_every_s=20.0)
        swarm.fill(3)
        for number in range(8):
            await trio.sleep(rng.uniform(0.5, 4.0))
            name = rng.choice(swarm.living())
            match rng.choice(["crash", "restart", "stop", "cut", "leave", "join"]):
                case "crash":
                    swarm.crash(name)
                    swarm.start(f"new{number}")
                case "restart":
                    swarm.crash(name)
                    await trio.sleep(rng.uniform(0.0, 2.0))
                    swarm.start(name)
                case "stop":
                    world.stop(name)
                    await trio.sleep(rng.uniform(0.5, 12.0))
                    world.cont(name)
                case "cut":
                    world.partition(rng.sample(swarm.living(), len(swarm.living()) // 2))
                    await trio.sleep(rng.uniform(0.5, 12.0))
                    world.heal()
                case "leave" if len(swarm.living()) > 4:
                    world.nursery.start_soon(swarm.peers[name].leave)
                case _:
                    swarm.start(f"new{number}")
        await swarm.until(plan.n_steps)
        swarm.check_all_made(plan.n_steps)

    run_world(seed, main, limit_s=1500.0)
