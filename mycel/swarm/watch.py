"""A picture of the swarm that is always at hand: read from the directory in the background, handed out without waiting.

Only who asks for a fresh one waits, as a session does whose route is gone; everybody then has it.

Ring: shell.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field

import trio

from mycel.dht.directory import Directory
from mycel.protocols.errors import PeerError
from mycel.swarm.view import View

REFRESH_S = 5.0
RETRY_S = 1.0


@dataclass(eq=False, slots=True)
class SwarmWatch:
    """The view of one swarm; `clock` is unix time, as records are dated by it."""

    directory: Directory
    swarm: bytes
    n_blocks: int
    clock: Callable[[], float]
    _view: View = field(init=False)
    _n_reads: int = field(default=0, init=False)
    _reading: trio.Lock = field(default_factory=trio.Lock, init=False)

    def __post_init__(self) -> None:
        self._view = View(self.n_blocks)

    async def view(self, *, fresh: bool = False) -> View:
        """The peers alive now, without waiting; with `fresh` as the directory knows them at this moment.

        Before the first read there is nothing to hand out: that one is waited for.
        """
        if fresh or not self._n_reads:
            await self.refresh()
        return self._view.expire(self.clock())

    async def refresh(self) -> None:
        """Read the directory once. Whoever comes while a read is under way waits for its result, if it has one."""
        before = self._n_reads
        async with self._reading:
            if self._n_reads > before:
                return
            located = await self.directory.find(self.swarm)
            view = self._view.expire(self.clock())
            for one in located:
                view = view.apply(one)
            self._view, self._n_reads = view, self._n_reads + 1

    async def run(self) -> None:
        """Refresh for ever; a failed read leaves the last view, whose records end by their own time."""
        while True:
            rest_s = RETRY_S
            with suppress(PeerError):  # nobody answered this time
                await self.refresh()
                rest_s = REFRESH_S
            await trio.sleep(rest_s)
