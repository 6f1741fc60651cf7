"""The `Compute` port in virtual time: no thread, a job takes what it is said to cost."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import trio

from mycel.protocols.ports import Done
from tests.sim.world import World

T = TypeVar("T")


class SimCompute:
    """The processor of node `name`: slowed down by `World.slow`, standing still while the node is stopped."""

    def __init__(self, world: World, name: str) -> None:
        self._world, self._name = world, name
        self._turn = trio.Lock()  # hands out turns in order of arrival
        self._depth = 0

    @property
    def depth(self) -> int:
        """Jobs that run or wait."""
        return self._depth

    async def run(self, job: Callable[[], T], *, cost_s: float = 0.0) -> Done[T]:
        """Wait for a turn, then for `cost_s` times the node's slowness, then run `job`."""
        arrived_s = trio.current_time()
        self._depth += 1
        try:
            async with self._turn:
                started_s = trio.current_time()
                with trio.CancelScope(shield=True):
                    await self._world.work(self._name, cost_s)
                value = job()
                return Done(value, started_s - arrived_s, trio.current_time() - started_s)
        finally:
            self._depth -= 1
