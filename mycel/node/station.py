"""The blocks that this node serves at this moment, and what it says about itself: it may take, leave and change them.

    nothing --joining--> fetched --open--> serving --close--> nothing

It does not know which blocks are wanted (placing) or when the node shall go (runtime).

Ring: shell.
"""

from __future__ import annotations

from dataclasses import dataclass

from mycel._version import __version__
from mycel.dht.records import MAX_RTTS, Announcement
from mycel.node.announcer import OVERHEAD_S, announced
from mycel.node.compute import DeviceCompute
from mycel.node.config import NodeConfig
from mycel.node.events import EventSink
from mycel.node.hop_service import HopService
from mycel.node.kv_budget import KVBudget
from mycel.node.model import Model
from mycel.node.network import Network
from mycel.node.served_span import ServedSpan
from mycel.node.span import Span
from mycel.node.weights_load import release_free_memory


@dataclass(eq=False, slots=True)
class Station:
    """What one node holds of one swarm. `span` and `service` are there while it serves."""

    config: NodeConfig
    network: Network
    model: Model
    compute: DeviceCompute
    event: EventSink
    block_time_s: float
    link_bytes_per_s: float = 0.0
    claimed: tuple[int, int] = (0, 0)
    service: HopService | None = None
    span: ServedSpan | None = None

    def claim(self, start: int, end: int) -> None:
        """From now on say that the node is about to serve [start, end); until then it serves what it has."""
        self.claimed = start, end

    def stay(self) -> None:
        """From now on say that it goes on serving what it has."""
        assert self.span is not None
        self.claimed = self.span.start, self.span.end

    async def open(self, loaded: Span | None = None) -> None:
        """Load the claimed blocks, or take those `loaded` already, and admit sessions.

        Raises ConfigError for weights that do not fit the model.
        """
        (start, end), model = self.claimed, self.model

        def load() -> ServedSpan:
            blocks = loaded or Span.load(model.directory, start, end, dtype=model.dtype)
            span = ServedSpan(blocks, blocks.dtype)
            span.measure()
            return span

        span = (await self.compute.run(load)).value
        per_token = span.session_bytes(start, end, 1)
        budget = KVBudget(self.config.kv_tokens * per_token)
        service = HopService(self.network.transport, model.swarm, span, self.compute, budget, self.event)
        service.start()
        self.span, self.service, self.block_time_s = span, service, span.block_time_s

    def retire(self) -> None:
        """Admit no more sessions, and say so from now on; those that are there go on."""
        if self.service is not None:
            self.service.leaving = True

    async def close(self, within_s: float) -> None:
        """Hand over all sessions, for at most `within_s`, and let go of the blocks. Cancelled, it can be repeated."""
        self.retire()
        if self.service is not None:
            await self.service.leave(within_s)
            await self.service.close("this node leaves")
        self.service = self.span = None
        await self.compute.run(release_free_memory)

    def describe(self) -> Announcement | None:
        """What there is to say now; nothing before blocks were claimed."""
        if self.claimed[0] == self.claimed[1]:
            return None
        transport, span = self.network.transport, self.span
        service = self.service if self.service is not None and not self.service.leaving else None
        rtts = ((peer, rtt) for peer in sorted(transport.connected()) if (rtt := transport.rtt_s(peer)) is not None)
        free, total, sessions = 0, self.config.kv_tokens, 0
        (start, end), moving_to = self.claimed, None
        if service is not None and span is not None:
            per_token = max(1, span.session_bytes(span.start, span.end, 1))
            free, total = service.budget.free_bytes // per_token, service.budget.total_bytes // per_token
            sessions = len(service.sessions)
            self.link_bytes_per_s = max(self.link_bytes_per_s, service.rates.best)
            if self.claimed != (span.start, span.end):
                (start, end), moving_to = (span.start, span.end), self.claimed
        return Announcement(
            swarm=self.model.swarm,
            start=start,
            end=end,
            state="joining" if service is None else "serving",
            addresses=announced(transport.addresses),
            block_time_s=span.block_time_s if span is not None else self.block_time_s,
            overhead_s=OVERHEAD_S,
            kv_free_tokens=free,
            kv_total_tokens=total,
            sessions=sessions,
            queue_s=self.compute.expected_wait_s,
            rtts=tuple(rtts)[:MAX_RTTS],
            version=__version__,
            link_bytes_per_s=self.link_bytes_per_s,
            moving_to=moving_to,
        )
