"""Says in the directory what this node serves, in time before it would be forgotten.

Ring: shell.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import trio

from mycel.dht.addresses import is_multiaddr
from mycel.dht.directory import TTL_S, Directory
from mycel.dht.records import MAX_ADDRESSES, Announcement
from mycel.node.endpoints import MAX_ADDRESS_CHARS
from mycel.node.events import EventSink
from mycel.protocols.errors import PeerError

# Serialization, two thread changes and the socket of one step, measured on loopback (benchmarks/decode.py).
OVERHEAD_S = 0.001


@dataclass(frozen=True, slots=True)
class Announcer:
    """Announces what `describe` says, if it says something; `ttl_s` is how long a dead node stays in the directory."""

    directory: Directory
    describe: Callable[[], Announcement | None]
    event: EventSink
    ttl_s: float = TTL_S

    async def say(self) -> int:
        """Announce now; the number of holders, 0 if nobody could be told (which is an event, and no error)."""
        said = self.describe()
        if said is None:
            return 0
        try:
            return await self.directory.announce(said, self.ttl_s)
        except PeerError as error:
            self.event("announce.failed", reason=str(error))
            return 0

    async def run(self, *, task_status: trio.TaskStatus[int] = trio.TASK_STATUS_IGNORED) -> None:
        """Announce for ever; started with the number of holders of the first announcement that had any."""
        told = False
        while True:
            holders = await self.say()
            if holders and not told:
                task_status.started(holders)
                told = True
            await trio.sleep(self.ttl_s / 3)


def announced(addresses: Iterable[str]) -> tuple[str, ...]:
    """Those that an announcement can carry, the first MAX_ADDRESSES."""
    fitting = (address for address in addresses if len(address) <= MAX_ADDRESS_CHARS and is_multiaddr(address))
    return tuple(dict.fromkeys(fitting))[:MAX_ADDRESSES]
