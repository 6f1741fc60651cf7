"""Waking whoever waits for a change: several tasks of a peer look at the same few tables.

Ring: shell.
"""

from __future__ import annotations

import trio


class Bell:
    """Rung at every change. Who looks first and waits after misses nothing:

    seen = bell.count; (look, do); await bell.after(seen)
    """

    def __init__(self) -> None:
        self.count = 0
        self._next = trio.Event()

    def ring(self) -> None:
        self.count += 1
        self._next.set()
        self._next = trio.Event()

    async def after(self, seen: int) -> None:
        """Return once it has been rung since `count` was `seen`."""
        while self.count == seen:
            await self._next.wait()
