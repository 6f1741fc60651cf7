"""Taking up a stage while it goes on stepping: what is loaded and stepped forward is what its peers have."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np
import pytest
import torch
import trio
from torch import Tensor

from mycel.node.training import state_join
from mycel.node.training.state_fetch import MAX_DONORS
from mycel.node.training.state_join import Joined, Joiner
from mycel.protocols.errors import PeerError, PeerRefused
from mycel.protocols.ids import STATE
from mycel.protocols.training import StageState, StageStatus
from mycel.swarm.training.bell import Bell
from mycel.swarm.training.members import Members
from tests.sim.compute import SimCompute
from tests.sim.state_rig import RUN, STAGE, FlatToy, Rig, scenario

# A state of three and a quarter MiB.
N_ELEMENTS = 13 * (1 << 15)
KEPT_SUMS = 2


@dataclass
class RunningStage:
    """Donors that step together, what they say, and a newcomer "me" that hears it."""

    rig: Rig
    members: Members = field(init=False)
    bell: Bell = field(default_factory=Bell)
    mine: FlatToy = field(default_factory=lambda: FlatToy(99, 0, N_ELEMENTS))
    version: int = 7
    names: list[str] = field(default_factory=list)
    said: dict[str, bytes] = field(default_factory=dict)
    seq: int = 0
    asked_sums: list[int] = field(default_factory=list)
    lost_sums: set[int] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.members = Members(self.rig.world.node("me").peer_id, RUN)

    async def add(self, name: str, *, seed: int = 0) -> None:
        """`seed` other than 0: one that gives another state than the stage has."""
        service = await self.rig.donor(name, seed=seed, version=self.version, n_elements=N_ELEMENTS)
        self.names.append(name)
        assert service.held == ()

    def say(self, state: StageState = "training", *, without: str = "") -> None:
        """Everybody's status reaches the newcomer; whoever lies in what it gives says what the others say."""
        honest = next((name for name in self.names if name not in self.said), self.names[0])
        for name in self.names:
            if name in without:
                continue
            self.seq += 1
            digest = self.said.get(name, self.rig.states[honest].params_digest())
            status = StageStatus(RUN, self.seq, STAGE, state, self.version, digest)
            self.members.hear(self.rig.world.node(name).peer_id, status, trio.current_time())
        self.bell.ring()

    async def step(self) -> None:
        """All donors make a step, one a little after the other, and then say so."""
        for name in self.names:
            state = self.rig.states[name]
            state.apply(*sum_of(self.version))
            await self.rig.services[name].after_step(state.version)
            await trio.sleep(0.004)
        self.version += 1
        self.say()

    async def steps(self, every_s: float) -> None:
        while True:
            await trio.sleep(every_s)
            await self.step()

    async def fetch_sum(self, version: int) -> tuple[Tensor, float]:
        await trio.sleep(0.05)
        self.asked_sums.append(version)
        if version in self.lost_sums or self.version - version > KEPT_SUMS:
            raise PeerRefused("", f"nobody keeps the sum of step {version}")
        assert version < self.version, "asked before it is there"
        return sum_of(version)

    def lose(self, name: str) -> None:
        self.members.lose(self.rig.world.node(name).peer_id)
        self.bell.ring()

    async def join(self) -> Joined:
        world = self.rig.world
        compute = SimCompute(world, "me")
        return await Joiner(
            world.node("me"), STAGE, self.mine, compute, self.members, self.bell, self.fetch_sum, self.rig.event
        ).run()

    def right_at(self, version: int) -> bool:
        """Whether the newcomer has what one gets that was there from the start."""
        alone = FlatToy(0, 7, N_ELEMENTS)
        while alone.version < version:
            alone.apply(*sum_of(alone.version))
        return self.mine.version == version and self.mine.snapshot() == alone.snapshot()


@lru_cache(maxsize=8)
def sum_of(version: int) -> tuple[Tensor, float]:
    return torch.from_numpy(np.random.default_rng(version).normal(size=N_ELEMENTS).astype(np.float32)), 0.5


def stage_scenario(
    body: Callable[[RunningStage], Awaitable[None]], *donors: str, every_s: float = 0.0, liars: str = ""
) -> None:
    """`every_s` > 0: the stage steps so often, all the time."""

    async def main(rig: Rig) -> None:
        stage = RunningStage(rig)
        for name in donors:
            await stage.add(name, seed=5 if name in liars else 0)
        stage.say()
        if every_s:
            rig.world.nursery.start_soon(stage.steps, every_s)
        await body(stage)

    scenario(main)


@pytest.mark.parametrize("every_s", [0.3, 0.7, 3.0])
def test_a_newcomer_takes_up_a_stage_that_steps(every_s: float) -> None:
    async def body(stage: RunningStage) -> None:
        joined = await stage.join()
        assert joined.confirmed
        assert stage.version - joined.version <= 1
        assert stage.right_at(joined.version)
        assert len(joined.by_peer) == 3
        stepped = stage.version - 7
        assert stepped >= int(trio.current_time() / (every_s * 1.1 + 0.02)), "nobody has to wait for the newcomer"

    stage_scenario(body, "a", "b", "c", every_s=every_s)


def test_a_run_that_stands_still_is_taken_up_as_it_is() -> None:
    async def body(stage: RunningStage) -> None:
        joined = await stage.join()
        assert (joined.version, joined.steps, joined.attempts, joined.confirmed) == (7, 0, 1, True)
        assert stage.right_at(7)
        assert stage.asked_sums == []
        assert trio.current_time() < 3.0

    stage_scenario(body, "a", "b")


def test_of_many_peers_a_few_are_asked() -> None:
    async def body(stage: RunningStage) -> None:
        joined = await stage.join()
        assert (joined.attempts, joined.confirmed) == (1, True)
        assert sum(state.snapshots for state in stage.rig.states.values()) == MAX_DONORS
        assert stage.right_at(7)

    stage_scenario(body, *(f"d{i}" for i in range(2 * MAX_DONORS + 1)))


def test_a_liar_a_silent_one_and_a_death_in_the_middle() -> None:
    async def body(stage: RunningStage) -> None:
        rig = stage.rig

        async def silent(_: object) -> None:
            await trio.sleep_forever()

        rig.world.node("c").serve(STATE, silent)

        async def kill() -> None:
            await trio.sleep(2.5)
            rig.world.crash("b")
            stage.names.remove("b")
            stage.lose("b")

        rig.world.nursery.start_soon(kill)
        joined = await stage.join()
        assert joined.confirmed
        assert stage.right_at(joined.version)
        givers = {rig.world.name_of(peer) for peer in joined.by_peer}
        assert givers <= {"a", "b", "e"}
        assert "a" in givers

    stage_scenario(body, "a", "b", "c", "d", "e", every_s=0.5, liars="d")


def test_a_state_that_the_stage_does_not_confirm_is_fetched_again_from_others() -> None:
    """Two give the same wrong state, and say what the others say; of the honest three only one can be reached."""

    async def body(stage: RunningStage) -> None:
        for name in "de":
            stage.rig.world.node(name).serve(STATE, refuse)
        stage.said = dict.fromkeys("ab", stage.rig.states["c"].params_digest())
        stage.say()
        joined = await stage.join()
        assert joined.confirmed
        assert joined.attempts > 1
        assert [stage.rig.world.name_of(peer) for peer in joined.by_peer] == ["c"]
        assert stage.right_at(7)
        retries = [str(fields["reason"]) for name, fields in stage.rig.events if name == "state.retry"]
        assert any("is not its stage's at step 7" in reason for reason in retries)

    async def refuse(_: object) -> None:
        pass

    stage_scenario(body, "a", "b", "c", "d", "e", liars="ab")


def test_lost_sums_mean_another_version() -> None:
    async def body(stage: RunningStage) -> None:
        stage.lost_sums = set(range(7, 14))
        joined = await stage.join()
        assert joined.attempts > 1
        assert joined.version >= 14
        assert stage.right_at(joined.version)

    stage_scenario(body, "a", "b", every_s=0.2)


def test_sums_that_are_never_to_be_had_end_it_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(state_join, "MAX_ATTEMPTS", 3)

    async def body(stage: RunningStage) -> None:
        stage.lost_sums = set(range(1000))
        with pytest.raises(PeerError, match=r"the sum of step \d+ cannot be had: nobody keeps"):
            await stage.join()
        assert sum(name == "state.retry" for name, _ in stage.rig.events) == 3

    stage_scenario(body, "a", "b", every_s=0.25)


def test_nobody_to_fetch_from() -> None:
    async def body(stage: RunningStage) -> None:
        with pytest.raises(PeerRefused, match="no peer that has the state of stage 3 is known"):
            await stage.join()
        assert trio.current_time() < 60.0

    async def main(rig: Rig) -> None:
        await body(RunningStage(rig))

    scenario(main)


def test_who_is_left_alone_with_the_state_keeps_it() -> None:
    async def main(rig: Rig) -> None:
        stage = RunningStage(rig, said={"a": b""})
        await stage.add("a")
        stage.say()

        async def die() -> None:
            await trio.sleep(3.0)
            stage.lose("a")

        rig.world.nursery.start_soon(die)
        joined = await stage.join()
        assert not joined.confirmed
        assert stage.right_at(7)

    scenario(main)


def test_a_single_false_word_about_the_parameters_proves_nothing() -> None:
    """It comes before the others have said anything of that version."""

    async def main(rig: Rig) -> None:
        stage = RunningStage(rig, said=dict.fromkeys("ab", b"") | {"c": bytes(32)})
        for name in "abc":
            await stage.add(name)
        stage.say()

        async def speak() -> None:
            await trio.sleep(4.0)
            stage.said = {"a": rig.states["a"].params_digest(), "b": rig.states["b"].params_digest(), "c": bytes(32)}
            stage.say()

        rig.world.nursery.start_soon(speak)
        joined = await stage.join()
        assert joined.confirmed
        assert joined.attempts == 1
        assert stage.right_at(7)

    scenario(main)
