"""A shaped transport passes the transport suite: over the simulated one in virtual time, and over the real one."""

from __future__ import annotations

import pytest
import trio

from mycel.node.libp2p_transport import open_transport
from mycel.node.shaped_transport import shaped
from mycel.protocols.ports import Transport
from mycel.security.identity import Identity
from mycel.swarm.chaos import Shape
from tests.conformance.libp2p_rig import Libp2pRig
from tests.conformance.test_sim_transport import SimRig, SimVictim
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

GOOD_LINK = LinkFaults(latency_s=0.0005, bandwidth_bytes_per_s=200e6)
MILD = Shape(rtt_s=0.004, jitter_s=0.002, loss=0.001, bytes_per_s=50e6, seed=1)
ROUGH = Shape(rtt_s=0.05, jitter_s=0.03, loss=0.05, bytes_per_s=20e6, seed=2)


class ShapedRig(SimRig):
    """The simulated rig with every transport shaped, and run as a node's program, so that a crash ends it all."""

    def __init__(self, world: World, scale: Scale, shape: Shape) -> None:
        super().__init__(world, scale)
        self._shape = shape
        # Ours and that of the simulated stream below.
        self.max_in_flight_bytes = shape.window_bytes + world.options.window_bytes

    async def start(self) -> Transport:
        send, receive = trio.open_memory_channel[Transport](1)

        async def main(inner: SimTransport) -> None:
            async with shaped(inner, self._shape) as transport:
                await send.send(transport)
                await trio.sleep_forever()

        inner = self._new()
        self._world.start(inner.name, main)
        return await receive.receive()

    async def shut_down(self, transport: Transport) -> None:
        self._world.crash(self._world.name_of(transport.peer_id))

    async def start_victim(self) -> SimVictim:
        transport = await self.start()
        serve_suite(transport)
        return SimVictim(self._world, self._world.node(self._world.name_of(transport.peer_id)))


def _run(check: Check, seed: int, shape: Shape, scale: Scale) -> None:
    async def scenario(world: World) -> None:
        await check(ShapedRig(world, scale, shape))
        world.handler_errors = [error for error in world.handler_errors if "on purpose" not in str(error)]

    run_world(seed, scenario, options=WorldOptions(link=GOOD_LINK))


@pytest.mark.parametrize("check", [*CHECKS, *DEATH_CHECKS], ids=check_name)
def test_on_a_mild_shape(check: Check) -> None:
    _run(check, seed=1, shape=MILD, scale=Scale(cancels=60, streams=30, cycles=4))


@pytest.mark.slow
@pytest.mark.parametrize("check", [*CHECKS, *DEATH_CHECKS, *SLOW_CHECKS], ids=check_name)
def test_on_a_mild_shape_in_full(check: Check) -> None:
    _run(check, seed=2, shape=MILD, scale=FULL)


@pytest.mark.slow
@pytest.mark.parametrize("check", CHECKS, ids=check_name)
def test_on_a_rough_shape(check: Check) -> None:
    _run(check, seed=3, shape=ROUGH, scale=Scale(cancels=60, streams=20, cycles=3))


class ShapedLibp2pRig(Libp2pRig):
    """The real rig with every transport of this process shaped."""

    @property
    def max_in_flight_bytes(self) -> int:
        return super().max_in_flight_bytes + MILD.window_bytes

    async def start(self) -> Transport:
        assert self._nursery is not None
        transport, stop, stopped = await self._nursery.start(self._run)
        self._running[transport.peer_id] = (stop, stopped)
        return transport

    async def _run(self, task_status: trio.TaskStatus[tuple[Transport, trio.Event, trio.Event]]) -> None:
        stop, stopped = trio.Event(), trio.Event()
        try:
            async with (
                open_transport(Identity.generate(), limits=self.limits) as bare,
                shaped(bare, MILD) as transport,
            ):
                task_status.started((transport, stop, stopped))
                await stop.wait()
        finally:
            stopped.set()

    async def play(self, check: Check) -> None:
        async with trio.open_nursery() as self._nursery:
            await check(self)
            self._over.set()
            for stop, _ in self._running.values():
                stop.set()


# Where a shape could break a promise of the adapter below: order, ends, handlers, shutting down, death.
OVER_LIBP2P = {
    "a_connection_serves_both_peers",
    "frames_of_all_sizes_echo",
    "both_directions_at_once",
    "an_end_comes_after_all_frames",
    "a_reset_is_not_an_end",
    "a_blocked_send_wakes_on_reset",
    "a_handler_that_returns_ends_its_stream",
    "a_handler_that_raises_harms_nobody_else",
    "a_transport_that_shuts_down_does_not_end_its_streams",
    "a_killed_peer_is_noticed_within_a_second",
}


@pytest.mark.slow
@pytest.mark.loopback
@pytest.mark.parametrize("check", [c for c in [*CHECKS, *DEATH_CHECKS] if check_name(c) in OVER_LIBP2P], ids=check_name)
def test_over_libp2p(check: Check) -> None:
    trio.run(ShapedLibp2pRig().play, check)
