"""What hours do to a network of records: clients that come and go, a slow peer, a process that stood still."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import pytest
import trio
import trio.testing

from mycel.protocols.messages import PeerAddress
from mycel.security.identity import Identity
from tests.dht.network import Net, serving
from tests.sim.faults import LinkFaults, WorldOptions
from tests.sim.world import World, run_world

NODES = ("n0", "n1", "n2")


def simulate(scenario: Callable[[World, Net], Awaitable[None]], latency_s: float = 0.005) -> None:
    async def main(world: World) -> None:
        await scenario(world, Net(world))

    run_world(1, main, options=WorldOptions(link=LinkFaults(latency_s=latency_s)), limit_s=20_000.0)


async def serve(net: Net) -> None:
    await net.grow(len(NODES))
    for i, name in enumerate(NODES):
        net.keep_announcing(name, serving(i, i + 1))
    await trio.sleep(1.0)


def state(net: Net) -> dict[str, int]:
    """All that a node remembers, in numbers: the most of any node."""
    stores = [net.stores[name] for name in NODES]
    return {
        "known": max(len(store.table) for store in stores),
        "dead": max(len(store.table._dead) for store in stores),
        "waiting": max(len(bucket.waiting) for store in stores for bucket in store.table._buckets.values()),
        "held": max(len(store.held) for store in stores),
        "own": max(len(store._own) for store in stores),
        "lines": max(len(store._calls._lines) for store in stores),
        "askers": max(len(store._service._streams) for store in stores),
        "connected": max(len(net.world.node(name).connected()) for name in NODES),
    }


@pytest.mark.parametrize(
    ("idle_s", "n_visits"), [(300.0, 4), pytest.param(7200.0, 25, marks=pytest.mark.slow)], ids=["minutes", "hours"]
)
def test_clients_of_an_idle_network_leave_nothing_behind(idle_s: float, n_visits: int) -> None:
    """Each visit is four clients: one leaves in order, one dies, one falls silent, one dies while it joins."""

    async def scenario(world: World, net: Net) -> None:
        await serve(net)
        at_first, took_s = state(net), []
        for visit in range(n_visits):
            await trio.sleep(idle_s / n_visits)
            for way in ("leaves", "dies", "falls silent"):
                name = f"{way} {visit}"
                began = trio.current_time()
                await net.add(name, client=True)
                assert set(await net.found_by(name)) == set(NODES)
                took_s.append(trio.current_time() - began)
                if way == "falls silent":
                    world.stop(name)
                else:
                    await trio.sleep(20.0 if way == "leaves" else 0.0)
                    world.crash(name)
            with trio.move_on_after(0.013):
                await net.add(f"dies early {visit}", client=True)
            world.crash(f"dies early {visit}")
        await trio.sleep(130.0)  # longer than a stream may idle
        assert state(net) == at_first
        assert max(took_s) <= took_s[0] + 0.1, "the last client waits no longer than the first"

    simulate(scenario)


def test_a_silent_bootstrap_peer_keeps_nobody_waiting() -> None:
    """A node that is stopped or swapped out answers late or never; whoever knows another one need not wait for it."""

    async def scenario(world: World, net: Net) -> None:
        await serve(net)
        invite = [PeerAddress(world.node(name).peer_id, world.node(name).addresses) for name in NODES]
        await trio.sleep(15.0)  # everybody has said everything to everybody
        for silent in NODES:
            world.stop(silent)
            began = trio.current_time()
            await net.add(f"client of {silent}", client=True, bootstrap=invite)
            assert set(await net.found_by(f"client of {silent}")) == set(NODES)
            assert trio.current_time() - began < 2.0
            world.cont(silent)
            await trio.sleep(15.0)

    simulate(scenario)


@pytest.mark.parametrize("slept_s", [1.0, 8.0, 3600.0])
def test_who_stood_still_blames_nobody(slept_s: float) -> None:
    """All deadlines are over at once when a process goes on after a stop, with the answers still unread."""

    async def scenario(world: World, net: Net) -> None:
        await serve(net)
        clock = trio.lowlevel.current_clock()
        assert isinstance(clock, trio.testing.MockClock)
        for asked_for_s in (0.01, 0.05, 0.09, 0.11):  # a question is on its way, its answer is
            await trio.sleep(1.0)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(net.directories["n1"].announce, serving(1, 2), 30.0)
                await trio.sleep(asked_for_s)
                clock.jump(slept_s)
            assert {name for name in NODES if net.peer(name) in net.stores["n1"].table} == {"n0", "n2"}
            for name in NODES:
                assert "n1" in await net.found_by(name)
        assert not net.stores["n1"].table._dead

    simulate(scenario, latency_s=0.05)


def test_those_met_later_do_not_displace_the_way_in() -> None:
    """A node that joins a neighbour, too, still comes back through its invite after a long cut."""

    async def scenario(world: World, net: Net) -> None:
        await net.grow(2)
        stranger = PeerAddress(Identity.from_seed(b"\x07" * 32).peer_id, ("/memory/99",))
        assert await net.stores["n1"].join([stranger]) == 0
        world.partition({"n0"}, {"n1"})
        await trio.sleep(600.0)
        assert not len(net.stores["n0"].table)
        assert not len(net.stores["n1"].table)
        world.heal()
        await trio.sleep(15.0)
        assert net.peer("n0") in net.stores["n1"].table
        assert net.peer("n1") in net.stores["n0"].table

    simulate(scenario)
