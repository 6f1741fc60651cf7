"""What happens when: a heap of calls in virtual time, made one after the other by one task.

Calls due at the same moment are made in the order in which they were planned, whatever trio's scheduler does.
"""

from __future__ import annotations

from collections.abc import Callable
from heapq import heappop, heappush
from itertools import count
from math import inf

import trio


class Agenda:
    """Calls to come. They are plain functions: they change state and wake tasks, and never wait."""

    def __init__(self) -> None:
        self._calls: list[tuple[float, int, Callable[[], None]]] = []
        self._numbers = count()
        self._changed = trio.Event()

    def after(self, delay_s: float, call: Callable[[], None]) -> None:
        """Make `call` in `delay_s` seconds from now."""
        heappush(self._calls, (trio.current_time() + delay_s, next(self._numbers), call))
        self._changed.set()

    async def run(self) -> None:
        """Make the calls, for ever."""
        while True:
            self._changed = trio.Event()
            due = self._calls[0][0] if self._calls else inf
            if due > trio.current_time():
                with trio.move_on_at(due):
                    await self._changed.wait()
                continue
            heappop(self._calls)[2]()
            await trio.lowlevel.checkpoint()  # tasks that the call woke see the world as that call left it
