"""Says in the directory what this node serves, in time before it would be forgotten.

Ring: shell.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import trio

from mycel._version import __version__
from mycel.dht.addresses import is_multiaddr
from mycel.dht.directory import TTL_S, Directory
from mycel.dht.records import MAX_ADDRESSES, MAX_RTTS, Announcement
from mycel.node.compute import DeviceCompute
from mycel.node.events import EventSink
from mycel.node.hop_service import HopService
from mycel.node.served_span import ServedSpan
from mycel.protocols.errors import PeerError

# Serialization, two thread changes and the socket of one step, measured on loopback (benchmarks/decode.py).
OVERHEAD_S = 0.001
# Of one address in an announcement (dht/records.py).
MAX_ADDRESS_CHARS = 160


@dataclass(frozen=True, slots=True)
class Announcer:
    """Announces one served span; `ttl_s` is how long a dead node stays in the directory."""

    directory: Directory
    service: HopService
    span: ServedSpan
    compute: DeviceCompute
    event: EventSink
    ttl_s: float = TTL_S

    def announcement(self) -> Announcement:
        """What there is to say now."""
        service, span = self.service, self.span
        budget, transport = service.budget, service.transport
        per_token = max(1, span.session_bytes(span.start, span.end, 1))
        rtts = ((peer, rtt) for peer in sorted(transport.connected()) if (rtt := transport.rtt_s(peer)) is not None)
        return Announcement(
            swarm=service.swarm,
            start=span.start,
            end=span.end,
            addresses=announced(transport.addresses),
            block_time_s=span.block_time_s,
            overhead_s=OVERHEAD_S,
            kv_free_tokens=budget.free_bytes // per_token,
            kv_total_tokens=budget.total_bytes // per_token,
            sessions=len(service.sessions),
            queue_s=self.compute.expected_wait_s,
            rtts=tuple(rtts)[:MAX_RTTS],
            version=__version__,
        )

    async def run(self, *, task_status: trio.TaskStatus[int] = trio.TASK_STATUS_IGNORED) -> None:
        """Announce for ever; started with the number of holders of the first announcement."""
        told = False
        while True:
            try:
                holders = await self.directory.announce(self.announcement(), self.ttl_s)
                if not told:
                    task_status.started(holders)
                    told = True
            except PeerError as error:
                self.event("announce.failed", reason=str(error))
            await trio.sleep(self.ttl_s / 3)


def announced(addresses: Iterable[str]) -> tuple[str, ...]:
    """Those that an announcement can carry, the first MAX_ADDRESSES."""
    fitting = (address for address in addresses if len(address) <= MAX_ADDRESS_CHARS and is_multiaddr(address))
    return tuple(dict.fromkeys(fitting))[:MAX_ADDRESSES]
