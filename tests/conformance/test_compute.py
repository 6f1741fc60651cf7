"""The real and the simulated processor pass the compute suite."""

from __future__ import annotations

import threading

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from mycel.node.compute import DeviceCompute
from tests.conformance.compute_suite import CHECKS, Check
from tests.sim.compute import SimCompute
from tests.sim.world import World, run_world


class BlockingOnThread:
    """Holds the worker thread with an event."""

    cost_s = 0.0

    def __init__(self) -> None:
        self._started, self._released = threading.Event(), threading.Event()

    def __call__(self) -> str:
        self._started.set()
        assert self._released.wait(timeout=20)
        return "released"

    async def started(self) -> None:
        assert await trio.to_thread.run_sync(self._started.wait, 20)

    async def release(self) -> None:
        self._released.set()


class BlockingInVirtualTime:
    """Holds the simulated processor by its cost: it is released once all tasks wait for it."""

    cost_s = 1.0

    def __call__(self) -> str:
        return "released"

    async def started(self) -> None:
        await wait_all_tasks_blocked()

    async def release(self) -> None:
        """Nothing to do: virtual time goes on by itself, when everybody waits."""


class RealRig:
    blocking = BlockingOnThread

    def __init__(self) -> None:
        self.compute = DeviceCompute("test")


class SimRig:
    blocking = BlockingInVirtualTime

    def __init__(self, world: World) -> None:
        world.add_node("n")
        self.compute = SimCompute(world, "n")


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_real(check: Check) -> None:
    async def main() -> None:
        with trio.fail_after(20):
            await check(RealRig())

    trio.run(main)


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_simulated(check: Check) -> None:
    async def scenario(world: World) -> None:
        await check(SimRig(world))

    run_world(1, scenario, limit_s=60)


def test_the_real_one_runs_on_a_thread_of_its_own_and_tells_its_load() -> None:
    async def main() -> None:
        compute, blocking = DeviceCompute("test"), BlockingOnThread()
        assert compute.depth == 0
        assert compute.expected_wait_s == 0
        done = await compute.run(threading.current_thread)
        assert done.value is not threading.main_thread()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(compute.run, blocking)
            await blocking.started()
            nursery.start_soon(compute.run, lambda: None)
            await trio.testing.wait_all_tasks_blocked()
            assert compute.depth == 2
            assert compute.expected_wait_s > 0
            await blocking.release()
        assert compute.depth == 0

    trio.run(main)


def test_the_simulated_one_charges_what_the_node_is_worth() -> None:
    async def scenario(world: World) -> None:
        world.add_node("n")
        compute = SimCompute(world, "n")
        assert (await compute.run(lambda: None, cost_s=0.5)).compute_s == pytest.approx(0.5)
        world.slow("n", 4)
        assert (await compute.run(lambda: None, cost_s=0.5)).compute_s == pytest.approx(2.0)
        world.stop("n")
        with trio.move_on_after(7):
            await trio.sleep_forever()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(lambda: compute.run(lambda: world.record("ran"), cost_s=0.5))
            await trio.sleep(10)
            assert "ran" not in [kind for _, kind, *_ in world.log]
            world.cont("n")
        assert "ran" in [kind for _, kind, *_ in world.log]

    run_world(1, scenario)
