"""Peers of a run of one-byte updates in virtual time: a small task whose slopes follow from the parameters.

The loss of a batch is the mean square of theta - target over a random half of the elements, which its seed draws: like
a model's, it is another one for each sample, and the same for all who measure it again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch
import trio

from mycel.node.rounds.blobs import BlobExchange
from mycel.node.rounds.group import Group, GroupPlace, GroupPorts, Standing
from mycel.node.rounds.round_streams import RoundDoor
from mycel.node.training.state_service import StateService
from mycel.node.zeroth.catching_up import SNAPSHOT, CatchUp, StateHolder, archive_of
from mycel.node.zeroth.files import RunFiles
from mycel.node.zeroth.measuring import Measurer, Sending
from mycel.node.zeroth.peer import Applied, NothingToReduce, ZerothPeer
from mycel.protocols.messages import PeerAddress
from mycel.swarm.rounds.terms import GroupTerms
from mycel.swarm.training.bell import Bell
from mycel.swarm.zeroth.course import Course
from mycel.swarm.zeroth.lattice import from_float, state_hash
from mycel.swarm.zeroth.options import ZerothOptions, make_rule
from mycel.swarm.zeroth.run_log import LogHead
from mycel.swarm.zeroth.scalars import Batch, load
from tests.sim.compute import SimCompute
from tests.sim.transport import SimTransport
from tests.sim.world import World, run_world

RUN = bytes(range(32))
N_ELEMENTS = 96
TARGET = np.random.default_rng(7).normal(size=N_ELEMENTS).astype(np.float32)


class ToyTunable:
    """Parameters near a target."""

    shapes = (("theta", (N_ELEMENTS,)),)

    def __init__(self, n_elements: int) -> None:
        self.flat = torch.zeros(n_elements)

    def loss(self, batch: Batch) -> float:
        apart = (self.flat[:N_ELEMENTS] - torch.from_numpy(TARGET))[batch.tokens.reshape(-1)]
        return float((apart.double() ** 2).mean())


async def batch_of(seed: bytes) -> Batch:
    chosen = np.random.default_rng(list(seed[:8])).permutation(N_ELEMENTS)[: N_ELEMENTS // 2]
    chosen_T = torch.from_numpy(chosen)
    return Batch(chosen_T, chosen_T)


@dataclass(eq=False)
class ZerothSwarm:
    """Peers by name; the first one that starts is the founder. What all must agree on is checked at every round."""

    world: World
    folder: Path
    options: ZerothOptions
    terms: GroupTerms
    peers: dict[str, ZerothPeer] = field(default_factory=dict)
    states: dict[int, bytes] = field(default_factory=dict)
    applied: dict[str, list[Applied]] = field(default_factory=dict)
    told: list[tuple[str, str, dict[str, object]]] = field(default_factory=list)
    moved: Bell = field(default_factory=Bell)
    founder: str = ""
    work_s: float = 0.5
    # More than the task needs, for the sake of their bytes.
    n_elements: int = N_ELEMENTS

    def start(
        self,
        name: str,
        *,
        sending: Sending | None = None,
        speeds: tuple[float, float] = (1e6, 1e-9),
        measures: bool = True,
    ) -> ZerothPeer:
        transport = self.world.restart(name) if name in self.peers else self.world.add_node(name)
        self.founder = self.founder or transport.peer_id
        compute, disk = SimCompute(self.world, name), SimCompute(self.world, name)

        def event(what: str, /, **fields: object) -> None:
            self.world.record(what, name, *(f"{key}={value}" for key, value in fields.items()))
            self.told.append((name, what, fields))
            self.moved.ring()

        theta_P = from_float(np.zeros(self.n_elements, np.float32))
        rule = make_rule(self.options, RUN, state_hash(theta_P), self.n_elements)
        course = Course(rule, RUN, theta_P)
        head = LogHead(RUN, "run", self.founder, rule.pack(), self.terms.open, "")
        files = RunFiles(self.folder / name / "log", head)
        files.open(course)
        blobs = BlobExchange(transport, threads=compute, event=event)
        ports = GroupPorts(RoundDoor(transport), blobs, transport.identity, compute, disk, event)
        standing = Standing(course.digest(), course.number)
        place = GroupPlace(RUN, "run", self.terms, self.founder)
        group = Group(place, ports, NothingToReduce(), self.folder / name / "group", standing)
        archive = archive_of(course, files, disk)
        states = StateService(
            transport, RUN, SNAPSHOT, StateHolder(course), compute, event, archive=archive, max_held=8
        )
        tunable = ToyTunable(self.n_elements)
        load(tunable, course.state.theta_P)

        async def batches(seed: bytes) -> Batch:
            await trio.sleep(self.work_s / self.options.updates)
            return await batch_of(seed)

        measurer = Measurer(transport.peer_id, course, tunable, batches, compute, event, self.options.audits)
        if sending is not None:
            measurer.sending = sending

        async def measured(_: Sequence[str]) -> tuple[float, float]:
            return speeds

        catch_up = CatchUp(transport, group, course, files, compute, disk, event, measured, theta_P.copy())
        peer = ZerothPeer(
            group,
            course,
            measurer if measures else None,
            catch_up,
            states,
            files,
            compute,
            disk,
            event,
            10_000,
            on_applied=lambda done: self._note(name, done),
        )
        self.peers[name] = peer
        others = [node for node in self.world.nodes() if node.name != name]

        async def main(_: SimTransport) -> None:
            for other in others:
                group.meet(PeerAddress(other.peer_id, other.addresses))
            async with trio.open_nursery() as nursery:
                await nursery.start(blobs.run)
                await peer.run()

        self.world.start(name, main)
        return peer

    def _note(self, name: str, done: Applied) -> None:
        before = self.states.setdefault(done.step.number, done.digest)
        assert before == done.digest, f"two states after round {done.step.number}"
        self.applied.setdefault(name, []).append(done)
        self.moved.ring()

    def events(self, what: str) -> list[tuple[str, dict[str, object]]]:
        return [(name, fields) for name, told, fields in self.told if told == what]

    async def when(self, is_so: Callable[[], bool]) -> None:
        while True:
            seen = self.moved.count
            if is_so():
                return
            await self.moved.after(seen)

    async def until(self, number: int, *names: str) -> None:
        """Until these have applied round `number`."""
        await self.when(lambda: all(self.peers[name].course.number >= number for name in names))

    def error(self, name: str) -> float:
        """How far the peer's parameters are from the target, in the mean square."""
        theta = self.peers[name].course.state.theta_P[:N_ELEMENTS].astype(np.float64) / 2**30
        return float(((theta - TARGET) ** 2).mean())


def zeroth_world(
    folder: Path,
    body: Callable[[ZerothSwarm], object],
    options: ZerothOptions,
    *,
    seed: int = 1,
    n_elements: int = N_ELEMENTS,
    **changes: object,
) -> ZerothSwarm:
    """Run a scenario; the swarm as it was at the end."""
    swarms: list[ZerothSwarm] = []
    fields: dict[str, object] = {
        "n_elements": n_elements,
        "aggregators": 0,
        "longest_grace_s": 3.0,
        "patience_s": 20.0,
        **changes,
    }

    async def main(world: World) -> None:
        swarm = ZerothSwarm(world, folder, options, GroupTerms(**fields), n_elements=n_elements)  # type: ignore[arg-type]
        swarms.append(swarm)
        await body(swarm)  # type: ignore[misc]

    with patch("os.fsync"):
        run_world(seed, main, limit_s=3000.0)
    return swarms[0]
