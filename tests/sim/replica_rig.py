"""Replicas in a world where they can be killed, cut off and started: the real group, a model of a few numbers.

What they learn is a target, by steps of gradient descent with noise that follows from beacon, peer and step. After each
round the states of all that applied it are held against each other, bit for bit.
"""

from __future__ import annotations

import hashlib
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from unittest.mock import patch

import torch
import trio
from torch import Tensor

from mycel.node.rounds.blobs import BlobExchange
from mycel.node.rounds.group import Contribution, Group, GroupPlace, GroupPorts, Standing
from mycel.node.rounds.round_streams import RoundDoor
from mycel.node.training.outgoing import Outgoing, Twist
from mycel.node.training.replica import Applied, Kept, Replica, ReplicaPorts
from mycel.node.training.scoped_reducer import ScopedReducer
from mycel.node.training.shared_state import SharedHolder, load_shared
from mycel.node.training.state_service import StateService
from mycel.node.training.work_port import Worked
from mycel.protocols.messages import PeerAddress
from mycel.swarm.codecs import Layout
from mycel.swarm.methods.make import make_method
from mycel.swarm.methods.method import Method
from mycel.swarm.rounds.terms import GroupTerms
from mycel.swarm.training.bell import Bell
from tests.sim.compute import SimCompute
from tests.sim.transport import SimTransport
from tests.sim.world import World, run_world

RUN = bytes(range(32))
LAYOUT = Layout(((192, 192),))  # two shards
TARGET_P = torch.randn(LAYOUT.n_elements, generator=torch.Generator().manual_seed(7))


def distance(theta_P: Tensor) -> float:
    """The loss: a mean square, 1 or so at the beginning."""
    return float((theta_P - TARGET_P).square().mean())


@dataclass
class ToyWork:
    """Gradient descent towards the target; a step takes `step_s`. From `spoiled_at` on its numbers are none, once."""

    me: str
    step_s: float = 0.1
    rate: float = 0.05
    spoiled_at: int = -1
    params_P: Tensor = field(default_factory=lambda: torch.zeros(LAYOUT.n_elements))  # noqa: N815
    begun: list[int] = field(default_factory=list)
    drawn: list[tuple[bytes, int]] = field(default_factory=list)
    n_forgotten: int = 0

    async def start(self, params_P: Tensor, version: int) -> None:
        self.params_P = params_P.clone()
        self.begun.append(version)

    async def steps(self, beacon: bytes, first: int, count: int) -> tuple[Tensor, Worked]:
        losses = 0.0
        for step in range(first, first + count):
            gradient_P = await self._gradient(beacon, step)
            losses += distance(self.params_P)
            self.params_P = self.params_P - self.rate * gradient_P
        return self.params_P.clone(), Worked(count, losses / count, count * self.step_s)

    async def gradients(self, beacon: bytes, first: int, count: int) -> tuple[Tensor, Worked]:
        sum_P = torch.zeros_like(self.params_P)
        for step in range(first, first + count):
            sum_P += await self._gradient(beacon, step)
        return sum_P, Worked(count, distance(self.params_P), count * self.step_s)

    async def forget(self) -> None:
        self.n_forgotten += 1

    async def _gradient(self, beacon: bytes, step: int) -> Tensor:
        await trio.sleep(self.step_s)
        self.drawn.append((beacon, step))
        if len(self.drawn) == self.spoiled_at:
            return torch.full_like(self.params_P, torch.nan)
        seed = hashlib.sha256(beacon + self.me.encode() + step.to_bytes(4, "little")).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(seed[:7], "little"))
        return self.params_P - TARGET_P + 0.1 * torch.randn(LAYOUT.n_elements, generator=generator)


@dataclass
class Peer:
    """One life of a peer."""

    name: str
    replica: Replica
    method: Method
    work: ToyWork | None
    shown_P: Tensor  # noqa: N815
    applied: list[Applied] = field(default_factory=list)
    offered: list[tuple[int, Contribution]] = field(default_factory=list)

    @property
    def version(self) -> int:
        return self.method.state.version


@dataclass
class ReplicaSwarm:
    """Peers by name; the first that starts is the founder."""

    world: World
    folder: Path
    options: Mapping[str, object]
    terms: Mapping[str, object]
    n_rounds: int
    peers: dict[str, Peer] = field(default_factory=dict)
    digests: dict[int, bytes] = field(default_factory=dict)
    """The state's after each round, which must be one."""
    told: list[tuple[str, str, dict[str, object]]] = field(default_factory=list)
    moved: Bell = field(default_factory=Bell)
    founder: str = ""

    def start(
        self, name: str, *, step_s: float = 0.1, twist: Twist | None = None, works: bool = True, spoiled_at: int = -1
    ) -> Peer:
        """A peer that knows all others. After a crash it comes again with its folder."""
        transport = self.world.restart(name) if name in self.peers else self.world.add_node(name)
        self.founder = self.founder or transport.peer_id
        others = [node for node in self.world.nodes() if node.name != name]
        work = ToyWork(transport.peer_id, step_s, spoiled_at=spoiled_at) if works else None
        peer = self.peers[name] = self._make(name, transport, work, twist)

        async def main(_: SimTransport) -> None:
            for other in others:
                peer.replica.group.meet(PeerAddress(other.peer_id, other.addresses))
            async with trio.open_nursery() as nursery:
                await nursery.start(peer.replica.group._ports.blobs.run)
                nursery.start_soon(peer.replica.run)

        self.world.start(name, main)
        return peer

    def _make(self, name: str, transport: SimTransport, work: ToyWork | None, twist: Twist | None) -> Peer:
        method = make_method(self.options, LAYOUT, torch.zeros(LAYOUT.n_elements))
        fields: dict[str, object] = {
            "codec": method.codec, "result_codec": method.result_codec,
            "longest_grace_s": 3.0, "patience_s": 20.0, **self.terms,
        }  # fmt: skip
        terms = GroupTerms(LAYOUT.n_elements, **fields)  # type: ignore[arg-type]
        compute, disk = SimCompute(self.world, name), SimCompute(self.world, name)

        def event(what: str, /, **fields: object) -> None:
            self.told.append((name, what, fields))
            if what == "round.done":
                self._check(peer, int(str(fields["round"])))
            self.moved.ring()

        path = self.folder / name / "shared.state"
        known = load_shared(path, method.state) or 0
        reducer = ScopedReducer(method, terms)
        blobs = BlobExchange(transport, threads=SimCompute(self.world, name), event=event)
        group = Group(
            GroupPlace(RUN, "run", terms, self.founder),
            GroupPorts(RoundDoor(transport), blobs, transport.identity, compute, disk, event),
            reducer,
            self.folder / name,
            Standing(method.state.digest(), known, keeps_rounds=True),
        )
        holder = SharedHolder(method.state, known)
        shown_P = torch.zeros(LAYOUT.n_elements)
        states = StateService(transport, RUN, 0, holder, compute, event)
        peer = Peer(
            name,
            Replica(
                ReplicaPorts(transport, compute, disk, event),
                group,
                method,
                reducer,
                Outgoing(reducer, twist),
                Kept(path, holder, states),
                self.n_rounds,
                work,
                shown_P,
            ),
            method,
            work,
            shown_P,
        )
        peer.replica.on_applied = peer.applied.append
        contribute = group.contribute

        async def noted(contribution: Contribution, number: int) -> bool:
            is_wanted = await contribute(contribution, number)
            if is_wanted:
                peer.offered.append((number, contribution))
            return is_wanted

        group.contribute = noted  # type: ignore[method-assign]
        return peer

    def _check(self, peer: Peer, number: int) -> None:
        digest = peer.method.state.digest()
        assert self.digests.setdefault(number, digest) == digest, f"two states after round {number}"

    def crash(self, *names: str) -> None:
        for name in names:
            self.world.crash(name)
        self.moved.ring()

    def living(self) -> list[Peer]:
        return [peer for name, peer in self.peers.items() if not self.world.node(name).crashed]

    def events(self, what: str, name: str = "") -> list[dict[str, object]]:
        return [fields for who, told, fields in self.told if told == what and name in ("", who)]

    async def when(self, is_so: Callable[[], bool]) -> None:
        """Wait; looked at whenever anybody tells anything."""
        while True:
            seen = self.moved.count
            if is_so():
                return
            await self.moved.after(seen)

    async def until(self, version: int, *names: str) -> None:
        """Wait until these, or all that live, have so many results behind them."""
        await self.when(lambda: all(p.version >= version for p in self.living() if not names or p.name in names))

    async def all_in(self, *names: str) -> None:
        """Until these are the members, in the view of all of them."""
        wanted = {self.world.node(name).peer_id for name in names}
        await self.when(lambda: all(set(self.peers[name].replica.group.members) == wanted for name in names))


def replica_world(
    folder: Path,
    body: Callable[[ReplicaSwarm], Awaitable[None]],
    options: Mapping[str, object],
    *,
    n_rounds: int = 1000,
    seed: int = 1,
    limit_s: float = 900.0,
    **terms: object,
) -> ReplicaSwarm:
    """Run a scenario; the swarm as it was at the end."""
    swarms: list[ReplicaSwarm] = []

    async def main(world: World) -> None:
        swarm = ReplicaSwarm(world, folder, options, terms, n_rounds)
        swarms.append(swarm)
        await body(swarm)

    # No power fails in here, and a real disk takes longer over a round than all the rest.
    with patch("os.fsync"):
        run_world(seed, main, limit_s=limit_s)
    return swarms[0]
