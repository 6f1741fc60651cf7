"""The simulated transport passes the transport suite."""

from __future__ import annotations

import pytest

from mycel.protocols.ports import Transport
from tests.conformance.transport_suite import (
    CHECKS,
    DEATH_CHECKS,
    FULL,
    SLOW_CHECKS,
    Check,
    Scale,
    check_name,
    serve_suite,
)
from tests.sim.faults import LinkFaults, WorldOptions
from tests.sim.transport import SimTransport
from tests.sim.world import World, run_world

SLOW_LINK = LinkFaults(latency_s=0.03, jitter_s=0.02, loss=0.05, bandwidth_bytes_per_s=40e6)


class SimVictim:
    """A node of the world, to be killed."""

    def __init__(self, world: World, transport: SimTransport) -> None:
        self._world, self._transport = world, transport

    @property
    def peer_id(self) -> str:
        return self._transport.peer_id

    @property
    def addresses(self) -> tuple[str, ...]:
        return self._transport.addresses

    async def kill(self) -> None:
        self._world.crash(self._transport.name)

    async def stop(self) -> None:
        self._world.stop(self._transport.name)

    async def cont(self) -> None:
        self._world.cont(self._transport.name)


class SimRig:
    """The suite's supply of transports, from one world."""

    def __init__(self, world: World, scale: Scale) -> None:
        self._world, self.scale = world, scale
        self.silence_s = world.options.silence_s
        self.max_in_flight_bytes = world.options.window_bytes
        self._n_nodes = 0

    async def start(self) -> Transport:
        return self._new()

    def _new(self) -> SimTransport:
        self._n_nodes += 1
        return self._world.add_node(f"n{self._n_nodes}")

    async def shut_down(self, transport: Transport) -> None:
        assert isinstance(transport, SimTransport)
        self._world.crash(transport.name)

    async def start_victim(self) -> SimVictim:
        transport = self._new()
        serve_suite(transport)
        return SimVictim(self._world, transport)


def _run(check: Check, seed: int, link: LinkFaults, scale: Scale) -> None:
    async def scenario(world: World) -> None:
        await check(SimRig(world, scale))
        world.handler_errors = [error for error in world.handler_errors if "on purpose" not in str(error)]

    run_world(seed, scenario, options=WorldOptions(link=link))


@pytest.mark.parametrize("check", [*CHECKS, *DEATH_CHECKS, *SLOW_CHECKS], ids=check_name)
def test_on_a_good_network(check: Check) -> None:
    _run(check, seed=1, link=LinkFaults(latency_s=0.002, bandwidth_bytes_per_s=50e6), scale=Scale())


@pytest.mark.parametrize("check", [*CHECKS, *DEATH_CHECKS], ids=check_name)
def test_on_a_bad_network(check: Check) -> None:
    """Slow, jittery and lossy: other orders of events, the same promises."""
    for seed in (2, 3):
        _run(check, seed=seed, link=SLOW_LINK, scale=Scale(cancels=100, streams=40, cycles=5))


@pytest.mark.slow
@pytest.mark.parametrize("check", [*CHECKS, *DEATH_CHECKS, *SLOW_CHECKS], ids=check_name)
def test_in_full(check: Check) -> None:
    _run(check, seed=4, link=LinkFaults(latency_s=0.002, bandwidth_bytes_per_s=50e6), scale=FULL)
