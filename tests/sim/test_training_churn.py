"""Peers that die and come, at any time and at chosen moments: the run loses no step and ends where one process ends."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from itertools import takewhile
from random import Random

import pytest
import trio

from mycel.swarm.training.members import HEARTBEAT_S
from mycel.swarm.training.plan import RunPlan
from mycel.swarm.training.step import RESTORE_AFTER_S
from mycel.swarm.training.walks import STATUS_LAG_S
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


def story(seed: int, deaths: Deaths = (), *, tied: bool = False) -> Story:
    stories: list[Story] = []

    async def main(world: World) -> None:
        swarm = TrainingSwarm(world, STORY, reference(STORY, tied=tied), tied, pass_s=PASS_S)
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
        await trio.sleep(AFTER_S)  # who replaces the dead comes now, and has the state in the end
        await swarm.when(lambda: [len(swarm.at(stage, "training", "observing")) for stage in range(2)] == [3, 2])
        assert swarm.version() == STORY.n_steps
        swarm.check_all_made(STORY.n_steps)

    run_world(seed, main, limit_s=120.0)
    return stories[0]


@cache
def calm(seed: int) -> Story:
    return story(seed)


Moment = Callable[[Story, str], float]


def begins(calm: Story, name: str) -> float:
    """It has made the step before, and computes nothing yet."""
    return calm.step_s(2, name) + LATENCY_S / 2


def in_forward(calm: Story, name: str) -> float:
    """In its first forward, or of the last stage, while the first forward is on its way to it."""
    if name[1] == "1":
        return calm.times("frame", "", name, "/mycel/pipe/")[0] - LATENCY_S / 2
    return calm.times("forward", name)[0] - PASS_S / 2


def in_backward(calm: Story, name: str) -> float:
    return calm.times("backward", name)[0] - PASS_S


def all_counted(calm: Story, name: str) -> float:
    """The last gradient of its stage has just been counted."""
    return max(at for peer in (name, *mates(name)) for at in calm.times("backward", peer)) + 1e-4


def asked_for_a_part(calm: Story, name: str) -> float:
    """Another asks for its partial sum."""
    return calm.times("frame", "", name, "/mycel/reduce/")[0] - LATENCY_S / 2


def giving_a_part(calm: Story, name: str) -> float:
    """Its partial sum is on its way."""
    return calm.times("frame", name, "", "/mycel/reduce/")[0] - LATENCY_S / 2


def giving_the_last_part(calm: Story, name: str) -> float:
    return calm.times("frame", name, "", "/mycel/reduce/")[-1] - LATENCY_S / 2


def is_summed_up(calm: Story, name: str) -> float:
    """Nobody has made the step, and all have their sums."""
    return calm.step_s(3) - 1e-4


def first_has_made_it(calm: Story, name: str) -> float:
    """One has made the step; the others do so within a latency."""
    return calm.step_s(3) + 1e-4


def has_made_it(calm: Story, name: str) -> float:
    """It has made the step, and the others may know nothing of it yet."""
    return calm.step_s(3, name) + 1e-4


def mates(name: str) -> tuple[str, ...]:
    return {"a0": ("b0", JOINER), "b0": ("a0", JOINER), "a1": ("b1",), "b1": ("a1",)}[name]


MOMENTS: tuple[Moment, ...] = (
    begins,
    in_forward,
    in_backward,
    all_counted,
    asked_for_a_part,
    giving_a_part,
    giving_the_last_part,
    is_summed_up,
    first_has_made_it,
    has_made_it,
)
SEED = 3
# One stage's peer here and there in the fast tests, all of them in the slow ones.
CELLS = [
    pytest.param(moment, name, marks=() if (at + index) % 8 == 0 else SLOW, id=f"{moment.__name__}-{name}")
    for at, moment in enumerate(MOMENTS)
    for index, name in enumerate(("a0", "b1", "b0", "a1"))
]


# A word that no status bears out is doubted after so long, at the next look.
DOUBT_S = STATUS_LAG_S + 2 * HEARTBEAT_S


def disturb(*deaths: tuple[float, str], patience_s: float = 0.0) -> Story:
    """The story with these deaths. Before them it is the same; it ends about as soon, or so much later."""
    quiet, disturbed = calm(SEED), story(SEED, deaths)
    at_s = min(at_s for at_s, _ in deaths)

    def before(log: list[LogEntry]) -> list[LogEntry]:
        return list(takewhile(lambda entry: entry[0] < at_s - 1e-6, log))

    assert before(quiet.log) == before(disturbed.log), "the simulation is deterministic"
    assert [entry[2] for entry in disturbed.log if entry[1] == "crash"] == [name for _, name in deaths]
    assert disturbed.ended_s < quiet.ended_s + DOUBT_S + patience_s
    return disturbed


@pytest.mark.parametrize(("moment", "name"), CELLS)
def test_a_peer_dies_in_the_middle_of_a_step(moment: Moment, name: str) -> None:
    quiet = calm(SEED)
    at_s = moment(quiet, name)
    assert quiet.step_s(2) < at_s < quiet.step_s(3) + 2 * LATENCY_S
    disturb((at_s, name))


TWO = [
    pytest.param(moment, names, marks=() if moment in (in_backward, giving_a_part) and names == ("a0", "b1") else SLOW)
    for moment in MOMENTS
    for names in (("a0", "b1"), ("b0", "a1"))
]


@pytest.mark.parametrize(("moment", "names"), TWO)
def test_a_peer_of_each_stage_dies_at_once(moment: Moment, names: tuple[str, str]) -> None:
    at_s = moment(calm(SEED), names[0])
    disturb(*((at_s, name) for name in names))


# ---- around a joiner


def listening(calm: Story) -> float:
    return joiners(calm, "node") + LATENCY_S


def asking_for_the_state(calm: Story) -> float:
    return joiners(calm, "frame", JOINER, "", "/mycel/state/") - LATENCY_S / 2


def being_offered_it(calm: Story) -> float:
    return joiners(calm, "frame", "", JOINER, "/mycel/state/") - LATENCY_S / 2


def being_given_it(calm: Story) -> float:
    """A chunk is on its way to it."""
    return max(calm.times("frame", "", JOINER, "/mycel/state/", step=1)) - LATENCY_S / 2


def observing(calm: Story) -> float:
    return joiners(calm, "state.joined") + LATENCY_S


def joiners(calm: Story, kind: str, *who: str) -> float:
    return calm.times(kind, *(who or (JOINER,)), step=1)[0]


JOINING = (listening, asking_for_the_state, being_offered_it, being_given_it, observing)


@pytest.mark.parametrize("moment", [pytest.param(m, marks=() if m is being_given_it else SLOW) for m in JOINING])
@pytest.mark.parametrize("who", ["joiner", "donor", "another peer of its stage", "both of its stage"])
def test_somebody_dies_while_one_joins(moment: Callable[[Story], float], who: str) -> None:
    quiet = calm(SEED)
    at_s = moment(quiet)
    donor = next(e[2] for e in quiet.log if _begins(list(e[1:]), ("frame", "", JOINER, "/mycel/state/")) and e[0] < 1)
    other = "b0" if donor == "a0" else "a0"
    deaths = {"joiner": [JOINER], "donor": [donor], "another peer of its stage": [other]}.get(who, ["a0", "b0"])
    # If nobody has the stage's steps any more, all begin anew, once it is clear that nobody comes who has.
    disturb(*((at_s, name) for name in deaths), patience_s=RESTORE_AFTER_S if len(deaths) == 2 else 0.0)


@SLOW
@pytest.mark.parametrize("seed", range(100, 120))
def test_deaths_at_any_moments(seed: int) -> None:
    rng = Random(seed)
    names = rng.sample(["a0", "b0", "a1", "b1", JOINER], rng.randint(1, 3))
    story(seed, tuple((rng.uniform(0.05, 1.2), name) for name in names), tied=seed % 2 == 0)
