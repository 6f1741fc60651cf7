"""Donors of one stage's state in a simulated world, and a toy state of some MiB."""

from __future__ import annotations

import hashlib
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

import numpy as np
from torch import Tensor

from mycel.node.training.state_fetch import FetchedState, fetch_state
from mycel.node.training.state_service import StateService
from mycel.protocols.errors import RemoteProtocolError
from mycel.protocols.ids import STATE
from mycel.protocols.ports import Stream
from tests.sim.compute import SimCompute
from tests.sim.faults import LinkFaults
from tests.sim.transport import SimTransport
from tests.sim.world import World, run_world

RUN = bytes(range(32))
STAGE = 3
# A state of six and a half MiB, of which the parameters are half.
N_ELEMENTS = 13 * (1 << 16)
SIZE_BYTES = 8 * N_ELEMENTS


class FlatToy:
    """Parameters and momentum, drawn from a seed; `snapshots` counts the copies."""

    def __init__(self, seed: int = 0, version: int = 0, n_elements: int = N_ELEMENTS) -> None:
        self.params_P = np.random.default_rng(seed).normal(size=n_elements).astype(np.float32)
        self.momentum_P = np.zeros_like(self.params_P)
        self.version = version
        self.snapshots = 0

    @property
    def size_bytes(self) -> int:
        return 2 * self.params_P.nbytes

    def apply(self, sum_P: Tensor, scale: float) -> None:
        self.momentum_P = np.float32(0.5) * self.momentum_P + sum_P.numpy() * np.float32(scale)
        self.params_P = self.params_P - self.momentum_P
        self.version += 1

    def params_digest(self) -> bytes:
        return hashlib.sha256(self.params_P.tobytes()).digest()

    def snapshot(self) -> memoryview:
        self.snapshots += 1
        return memoryview(self.params_P.tobytes() + self.momentum_P.tobytes())

    def load(self, data: memoryview, version: int) -> None:
        if len(data) != self.size_bytes:
            raise RemoteProtocolError("a state of another size")
        self.params_P, self.momentum_P = np.split(np.frombuffer(bytes(data), dtype=np.float32), 2)
        self.version = version


@dataclass
class Rig:
    """Donors of one stage in a world, and a fetcher that knows them."""

    world: World
    link: LinkFaults = field(default_factory=lambda: LinkFaults(0.01, bandwidth_bytes_per_s=4e6))
    services: dict[str, StateService] = field(default_factory=dict)
    states: dict[str, FlatToy] = field(default_factory=dict)
    events: list[tuple[str, dict[str, object]]] = field(default_factory=list)

    def add(self, name: str) -> SimTransport:
        transport = self.world.add_node(name)
        for other in self.world.nodes():
            if other is not transport:
                self.world.link(name, other.name, self.link)
                transport.learn(other.peer_id, other.addresses)
                other.learn(transport.peer_id, transport.addresses)
        return transport

    def event(self, name: str, /, **fields: object) -> None:
        self.events.append((name, fields))

    async def donor(self, name: str, *, seed: int = 0, version: int = 7, n_elements: int = N_ELEMENTS) -> StateService:
        transport = self.add(name)
        state = self.states[name] = FlatToy(seed, version, n_elements)
        service = StateService(transport, RUN, STAGE, state, SimCompute(self.world, name), self.event)
        await self.world.nursery.start(service.run)
        self.services[name] = service
        return service

    def liar(self, name: str, handler: Callable[[Stream], Awaitable[None]]) -> None:
        self.add(name).serve(STATE, handler)

    def donors(self, *names: str, version: int = 7) -> list[tuple[str, int]]:
        return [(self.world.node(name).peer_id, version) for name in names]

    async def fetch(self, *names: str, version: int = 7, least: int = 1, expected: bytes = b"") -> FetchedState:
        """By the node "me"."""
        return await fetch_state(
            self.world.node("me"),
            RUN,
            STAGE,
            self.donors(*names, version=version),
            self.event,
            fits=lambda size_bytes: size_bytes == SIZE_BYTES,
            expected=lambda _: expected,
            least=least,
        )

    def given(self, fetched: FetchedState) -> dict[str, int]:
        return {self.world.name_of(peer): size for peer, size in fetched.by_peer.items()}

    def failed(self) -> dict[str, str]:
        """Who was named for what."""
        return {
            self.world.name_of(str(fields["peer"])): str(fields["reason"])
            for name, fields in self.events
            if name == "state.failed"
        }


def scenario(body: Callable[[Rig], Awaitable[None]], seed: int = 1) -> World:
    async def main(world: World) -> None:
        rig = Rig(world)
        rig.add("me")
        await body(rig)

    return run_world(seed, main)
