"""Peers of a run that say what is not so, or take work and do nothing: the others go on, and lose a bounded time."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass

import msgspec
import numpy as np
import pytest
import trio

from mycel.protocols import ids
from mycel.protocols.codec import train_codec
from mycel.protocols.errors import PeerError
from mycel.protocols.ports import Stream
from mycel.protocols.training import Reduced, StageStatus
from tests.sim.toy_stage import RUN, ToyReference, toy_plan, toy_reference
from tests.sim.training_swarm import TrainingSwarm
from tests.sim.transport import SimTransport
from tests.sim.world import World, run_world

PLAN = toy_plan(n_stages=2, n_steps=12, n_microbatches=4, n_sequences=1, n_tokens=2)
ALL = PLAN.everything.to_bytes(1, "little")
EVERY_S = 0.2
# Twelve honest steps take 2 s. A liar costs one patience or two (45 s each), and ever more seldom one again.
LIMIT_S = 1500.0


@pytest.fixture(scope="module")
def reference() -> ToyReference:
    return toy_reference(PLAN)


Lie = Callable[[TrainingSwarm], StageStatus | None]


def status(version: int, **fields: object) -> StageStatus:
    given: dict[str, object] = {"state": "training", "stage": 1, "run": RUN, "seq": 0, **fields}
    return StageStatus(version=version, **given)  # type: ignore[arg-type]


def fake(version: int, digest: bytes = b"L" * 32) -> Reduced:
    return Reduced(version, digest, 1e38, 1e12)


async def silent(stream: Stream) -> None:
    """Takes everything in and answers nothing."""
    while await stream.receive() is not None:
        pass


async def refusing(stream: Stream) -> None:
    """Ends every stream."""


@dataclass
class Liar:
    """Tells every peer `lie` five times a second, and meets what they ask with `manner`."""

    swarm: TrainingSwarm
    lie: Lie
    manner: Callable[[Stream], Awaitable[None]]

    async def main(self, transport: SimTransport) -> None:
        for protocol in (ids.PIPE, ids.REDUCE, ids.STATE, ids.TRAIN):
            transport.serve(protocol, silent if protocol == ids.TRAIN else self.manner)
        seq = 0
        streams: dict[str, Stream] = {}
        while True:
            seq += 1
            for node in self.swarm.world.nodes():
                if node is transport or node.crashed:
                    continue
                try:
                    if node.peer_id not in streams:
                        transport.learn(node.peer_id, node.addresses)
                        streams[node.peer_id] = await transport.open(node.peer_id, ids.TRAIN)
                    said = self.lie(self.swarm)
                    if said is not None:
                        said = msgspec.structs.replace(said, seq=seq, addresses=transport.addresses)
                        await streams[node.peer_id].send(*train_codec.encode(said))
                except PeerError:
                    streams.pop(node.peer_id, None)
            await trio.sleep(EVERY_S)


def now_at(swarm: TrainingSwarm) -> int:
    return swarm.version()


LIES: dict[str, Lie] = {
    "at the end of the run": lambda swarm: status(PLAN.n_steps),
    "always one step further": lambda swarm: status(min(now_at(swarm) + 1, PLAN.n_steps)),
    "one step further, with a sum": lambda swarm: status(
        min(now_at(swarm) + 1, PLAN.n_steps), reduced=(fake(now_at(swarm)),)
    ),
    "two steps further, with sums": lambda swarm: status(
        min(now_at(swarm) + 2, PLAN.n_steps), reduced=(fake(now_at(swarm)), fake(now_at(swarm) + 1))
    ),
    "one step further, observing": lambda swarm: status(min(now_at(swarm) + 1, PLAN.n_steps), state="observing"),
    "has counted everything": lambda swarm: status(now_at(swarm), counted=ALL),
    "has a sum": lambda swarm: status(now_at(swarm), counted=ALL, reduced=(fake(now_at(swarm)),)),
    "other parameters": lambda swarm: status(now_at(swarm), params=b"P" * 32),
    "never has a sum": lambda swarm: status(now_at(swarm)),
    "is a trainer who drives nothing": lambda swarm: status(now_at(swarm), trains=True),
    "far behind": lambda swarm: status(0),
    "keeps what nobody has": lambda swarm: status(0, kept=PLAN.n_steps, whole=PLAN.n_steps),
    "has no end of work, and no speed": lambda swarm: status(now_at(swarm), queue_s=1e9, sequences_per_s=1e-9),
    "is the fastest": lambda swarm: status(now_at(swarm), sequences_per_s=1e9),
}


MANNERS = {"refuses": refusing, "is silent": silent}
# What costs the others nothing, or one patience, in the fast tests; all in the slow ones.
QUICK = (("always one step further", "refuses"), ("has counted everything", "refuses"), ("far behind", "is silent"))
CASES = [
    pytest.param(name, manner, marks=() if (name, manner) in QUICK else pytest.mark.slow)
    for name in LIES
    for manner in MANNERS
]


@pytest.mark.parametrize(("name", "manner"), CASES)
def test_one_who_lies_costs_the_others_some_time_and_nothing_else(name: str, manner: str, reference) -> None:
    async def main(world: World) -> None:
        swarm = TrainingSwarm(world, PLAN, reference)
        swarm.fill(2)
        await swarm.until(1)
        world.add_node("liar")
        world.start("liar", Liar(swarm, LIES[name], MANNERS[manner]).main)
        await swarm.until(PLAN.n_steps)
        swarm.check()

    run_world(2, main, limit_s=LIMIT_S)


@pytest.mark.parametrize("name", ["at the end of the run", pytest.param("has a sum", marks=pytest.mark.slow)])
def test_a_newcomer_joins_the_stage_of_one_who_lies(name: str, reference: ToyReference) -> None:
    async def main(world: World) -> None:
        swarm = TrainingSwarm(world, PLAN, reference)
        swarm.fill(2)
        await swarm.until(1)
        world.add_node("liar")
        world.start("liar", Liar(swarm, LIES[name], silent).main)
        swarm.start("new", stage=1, trains=False)
        await swarm.until(PLAN.n_steps)
        await swarm.when(lambda: "new" in swarm.at(1, "training", "observing"))
        swarm.check()

    run_world(2, main, limit_s=LIMIT_S)


@pytest.mark.slow
def test_a_run_that_diverges_says_so_once_and_tries_ever_more_seldom(reference: ToyReference) -> None:
    """The last stage's parameters are no numbers any more: nothing of the step can be computed anywhere."""

    async def main(world: World) -> None:
        swarm = TrainingSwarm(world, PLAN, reference)
        swarm.fill(2)
        said: list[tuple[str, int]] = []
        for name in ("a1", "b1"):
            swarm.peers[name].on_diverged = lambda version, _, name=name: said.append((name, version))
        await swarm.until(2)
        version = swarm.version()
        for name in ("a1", "b1"):
            stepper = swarm.peers[name].stepper
            assert stepper is not None
            stepper.holder.params_P[:] = np.nan  # type: ignore[attr-defined]
        began_s = trio.current_time()
        await trio.sleep(900)

        def tries(from_s: float, to_s: float) -> int:
            told = swarm.events("microbatch.failed", since_s=began_s + from_s)
            return sum(one.at_s < began_s + to_s for one in told)

        assert sorted(said) == [("a1", version), ("b1", version)]
        assert len(swarm.events("run.diverged")) == 2
        assert tries(0, 60) > 10
        # At most each number once a minute, from each of the peers that may drive it.
        assert 0 < tries(600, 900) <= 5 * 2 * PLAN.n_microbatches
        assert swarm.version() == version

    run_world(2, main, limit_s=4000.0)
