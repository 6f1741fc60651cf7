"""Strong peers send pseudo-gradients, weak ones scalars, on one committed state: equal digests, and no worse for it."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from unittest.mock import patch

import torch
import trio
from torch import Tensor

from mycel.node.rounds.blobs import BlobExchange
from mycel.node.rounds.group import Committed, Contribution, Group, GroupPlace, GroupPorts, Standing
from mycel.node.rounds.round_streams import RoundDoor
from mycel.protocols.messages import PeerAddress
from mycel.security.signatures import public_key_of
from mycel.swarm.codecs import Layout
from mycel.swarm.methods.diloco import Diloco
from mycel.swarm.methods.options import DilocoOptions
from mycel.swarm.rounds.reducer import VectorReducer
from mycel.swarm.rounds.terms import GroupTerms
from mycel.swarm.training.bell import Bell
from mycel.swarm.zeroth.mixed import apply_scalars, measure_float, scalar_updates
from mycel.swarm.zeroth.options import ZerothOptions, make_rule
from mycel.swarm.zeroth.seeds import seed_of
from tests.sim.compute import SimCompute
from tests.sim.transport import SimTransport
from tests.sim.world import World, run_world

RUN = bytes(range(32))
P = 64
TEACHER = torch.randn(P, generator=torch.Generator().manual_seed(3))
OPTIONS = DilocoOptions(inner_steps=4, rate=0.7, momentum=0.5, codec="float32", result_codec="float32")
N_ROUNDS = 12


def loss_of(theta_P: Tensor, seed: bytes) -> Tensor:
    """Of a linear student on 16 examples that the seed draws, with some noise in their answers."""
    drawn = torch.Generator().manual_seed(int.from_bytes(seed[:7], "little"))
    x_BP = torch.randn(16, P, generator=drawn)
    noise_B = 0.1 * torch.randn(16, generator=drawn)
    return ((x_BP @ (theta_P - TEACHER) - noise_B) ** 2).mean()


@dataclass(eq=False)
class Peer:
    """One peer's program, strong or weak."""

    group: Group
    method: Diloco
    reducer: VectorReducer
    key: bytes
    is_weak: bool
    digests: dict[int, bytes] = field(default_factory=dict)
    n_scalars: int = 0

    def __post_init__(self) -> None:
        rule_options = ZerothOptions(updates=32, rate=0.1, epsilon=1e-3)
        self.rule = make_rule(rule_options, RUN, bytes(32), P)

    async def run(self, moved: Bell) -> None:
        while True:
            number = self.group.round
            async with trio.open_nursery() as nursery:
                if self.group.is_member and len(self.group.members) >= self.group.place.terms.min_members:
                    nursery.start_soon(self.bring, number)
                done = await self.group.committed()
                nursery.cancel_scope.cancel()
            assert isinstance(done, Committed)
            self.apply(done)
            moved.ring()

    async def bring(self, number: int) -> None:
        await trio.sleep(0.2)
        theta_P, beacon = self.method.state.theta_P, self.group.beacon
        if self.is_weak:
            seeds = [seed_of(RUN, beacon, self.key, sample) for sample in range(32)]
            codes = bytes(
                measure_float(theta_P, seed, self.rule, lambda at_P, s=seed: float(loss_of(at_P, s))).code
                for seed in seeds
            )
            await self.group.contribute(Contribution(scalars=codes, weight=len(codes)), number)
            return
        local_P = self.method.restart()
        for step in range(OPTIONS.inner_steps):
            local_P.requires_grad_(True)
            (grad_P,) = torch.autograd.grad(loss_of(local_P, seed_of(RUN, beacon, self.key, step)), local_P)
            local_P = (local_P - 0.01 * grad_P).detach()
        vector_P = self.method.contribution(self.method.state.version, local_P)
        layouts = self.reducer.shards(self.group.n_shards)
        parts = self.reducer.cut(vector_P, self.group.n_shards)
        bodies = tuple(
            self.reducer.codec.encoder(layout).encode(part, bytes(32))
            for layout, part in zip(layouts, parts, strict=True)
        )
        await self.group.contribute(Contribution(bodies), number)

    def apply(self, done: Committed) -> None:
        state, outcome = self.method.state, done.certificate.outcome
        updates = scalar_updates(self.rule, RUN, self.group.beacon, self.group.state, done.offers)
        vectors = sum(bool(offer.bodies) for offer in done.offers)
        if vectors:
            self.method.apply(state.version, self.reducer.decode(done.results), vectors)
        apply_scalars(state.theta_P, updates)
        self.n_scalars += len(updates)
        self.digests[outcome.round] = state.digest()
        self.group.applied(state.digest())


def run_peers(folder: Path, strong: str, weak: str) -> dict[str, Peer]:
    peers: dict[str, Peer] = {}
    n_peers = len(strong + weak)
    terms = GroupTerms(P, min_members=n_peers, contributors=1.0, patience_s=20.0, longest_grace_s=3.0)

    async def main(world: World) -> None:
        moved = Bell()
        nodes = [world.add_node(name) for name in strong + weak]
        for node in nodes:
            disk = SimCompute(world, node.name)
            blobs = BlobExchange(node, threads=disk)
            ports = GroupPorts(RoundDoor(node), blobs, node.identity, disk, disk, lambda what, /, **fields: None)
            method = Diloco(OPTIONS, Layout(((P,),)), torch.zeros(P))
            reducer = VectorReducer(Layout(((P,),)), terms)
            place = GroupPlace(RUN, "run", terms, nodes[0].peer_id)
            group = Group(place, ports, reducer, folder / node.name, Standing(method.state.digest()))
            key = public_key_of(node.peer_id)
            assert key is not None
            peer = peers[node.name] = Peer(group, method, reducer, key, node.name in weak)

            async def life(_: SimTransport, peer: Peer = peer, blobs: BlobExchange = blobs) -> None:
                for other in nodes:
                    peer.group.meet(PeerAddress(other.peer_id, other.addresses))
                async with trio.open_nursery() as nursery:
                    await nursery.start(blobs.run)
                    await nursery.start(peer.group.run)
                    await peer.run(moved)

            world.start(node.name, life)
        while not all(peer.method.state.version >= N_ROUNDS for peer in peers.values()):
            await moved.after(moved.count)

    with patch("os.fsync"):
        run_world(1, main, limit_s=600.0)
    return peers


def error(peer: Peer) -> float:
    return float(((peer.method.state.theta_P - TEACHER) ** 2).mean())


def test_weak_peers_send_scalars_beside_pseudo_gradients(tmp_path: Path) -> None:
    mixed = run_peers(tmp_path / "mixed", "abc", "de")
    alone = run_peers(tmp_path / "alone", "abc", "")
    last = min(max(peer.digests) for peer in mixed.values())
    for number in range(1, last + 1):
        assert len({peer.digests[number] for peer in mixed.values()}) == 1, f"two states after round {number}"
    assert mixed["a"].n_scalars >= 2 * 32 * (N_ROUNDS - 1)
    assert error(mixed["a"]) < error(alone["a"]) < 0.9
