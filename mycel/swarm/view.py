"""The local picture of a swarm: who serves which blocks, as far as live announcements say. Immutable.

It knows nothing of how announcements are found or checked (dht), and decides nothing.

Ring: pure.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import TYPE_CHECKING

from mycel.protocols.messages import PeerAddress

if TYPE_CHECKING:
    from mycel.dht.directory import Located

# A peer that has not measured itself yet announces zeros; no machine does a step in less.
_LEAST_STEP_S = 1e-6


@dataclass(frozen=True, slots=True)
class PeerView:
    """What one peer last announced about its span [start, end). Times are seconds, `rtts` are (peer, rtt_s) pairs.

    A step of one token through n of its blocks takes overhead_s + n * block_time_s, after a wait of queue_s. With
    `moving_to` it is fetching that span, and serves [start, end) until it has it.
    """

    peer: str
    addresses: tuple[str, ...]
    start: int
    end: int
    state: str
    block_time_s: float
    overhead_s: float
    queue_s: float
    kv_free_tokens: int
    sessions: int
    rtts: tuple[tuple[str, float], ...]
    seq: int
    expires_at: float
    link_bytes_per_s: float = 0.0
    moving_to: tuple[int, int] | None = None

    @property
    def address(self) -> PeerAddress:
        return PeerAddress(self.peer, self.addresses)

    @property
    def serving(self) -> bool:
        """Whether it takes new sessions."""
        return self.state == "serving"

    @property
    def staying(self) -> bool:
        """Whether it serves its span or is about to: what placement counts on."""
        return self.state != "leaving"

    @property
    def settled(self) -> PeerView:
        """As it will be when it has fetched what it is going to serve."""
        start, end = self.moving_to or (self.start, self.end)
        return replace(self, start=start, end=end, state="serving", moving_to=None)

    @property
    def steps_per_s(self) -> float:
        """Decode steps a second through the whole span, one at a time and with nothing else to do."""
        return steps_per_s(self.end - self.start, self.block_time_s, self.overhead_s)

    def covers(self, start: int, end: int) -> bool:
        """Whether it takes new sessions for all of [start, end)."""
        return self.serving and self.start <= start and end <= self.end


@dataclass(frozen=True, slots=True)
class View:
    """All peers of a swarm whose model has `n_blocks` blocks, by peer id."""

    n_blocks: int
    peers: Mapping[str, PeerView] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.n_blocks < 1:
            raise ValueError(f"a model has at least one block, not {self.n_blocks}")
        object.__setattr__(self, "peers", MappingProxyType(dict(self.peers)))

    def apply(self, located: Located) -> View:
        """The view with a found announcement in it: the newest of each peer counts, whatever the order of arrival.

        A span outside the model is not believed: the view stays as it is.
        """
        announced = located.announcement
        places = [(announced.start, announced.end), *([announced.moving_to] if announced.moving_to else [])]
        if not all(0 <= start < end <= self.n_blocks for start, end in places):
            return self
        found = PeerView(
            peer=located.peer,
            addresses=tuple(announced.addresses),
            start=announced.start,
            end=announced.end,
            state=announced.state,
            block_time_s=announced.block_time_s,
            overhead_s=announced.overhead_s,
            queue_s=announced.queue_s,
            kv_free_tokens=announced.kv_free_tokens,
            sessions=announced.sessions,
            rtts=tuple(announced.rtts),
            seq=located.seq,
            expires_at=located.expires_at,
            link_bytes_per_s=announced.link_bytes_per_s,
            moving_to=announced.moving_to,
        )
        known = self.peers.get(found.peer)
        if known is not None and _age(found) <= _age(known):
            return self
        return replace(self, peers={**self.peers, found.peer: found})

    def expire(self, now: float) -> View:
        """The view without the announcements that ended at or before `now`."""
        return self.without(peer.peer for peer in self.peers.values() if peer.expires_at <= now)

    def without(self, peers: Iterable[str]) -> View:
        """The view as if `peers` were not there."""
        gone = frozenset(peers)
        return replace(self, peers={name: peer for name, peer in self.peers.items() if name not in gone})

    def serving(self) -> tuple[PeerView, ...]:
        """The peers that take new sessions, by id."""
        return tuple(peer for _, peer in sorted(self.peers.items()) if peer.serving)

    def staying(self) -> View:
        """The view as placement sees it: who leaves is gone, who joins serves, who moves is where it moves to."""
        peers = {name: peer.settled for name, peer in self.peers.items() if peer.staying}
        return replace(self, peers=peers)

    def holders(self, block: int) -> tuple[PeerView, ...]:
        """The peers that take new sessions for `block`, by id."""
        return tuple(peer for peer in self.serving() if peer.start <= block < peer.end)

    def coverage(self) -> tuple[int, ...]:
        """For each block, how many peers take new sessions for it (its replicas)."""
        counts = [0] * self.n_blocks
        for peer in self.serving():
            for block in range(peer.start, peer.end):
                counts[block] += 1
        return tuple(counts)

    def weakest(self) -> tuple[int, int]:
        """(block, replicas) of the first block that has the fewest replicas."""
        coverage = self.coverage()
        replicas = min(coverage)
        return coverage.index(replicas), replicas

    def missing(self) -> tuple[tuple[int, int], ...]:
        """The ranges of blocks that nobody takes new sessions for."""
        return ranges(block for block, replicas in enumerate(self.coverage()) if replicas == 0)


def ranges(blocks: Iterable[int]) -> tuple[tuple[int, int], ...]:
    """Ascending block indices as half-open ranges: 1, 2, 3, 7 gives (1, 4), (7, 8)."""
    found: list[tuple[int, int]] = []
    for block in blocks:
        if found and found[-1][1] == block:
            found[-1] = (found[-1][0], block + 1)
        else:
            found.append((block, block + 1))
    return tuple(found)


def show_ranges(spans: Collection[tuple[int, int]]) -> str:
    """Ranges for a sentence: "0:4, 7:8"."""
    return ", ".join(f"{start}:{end}" for start, end in spans)


def short_id(peer: str) -> str:
    """A peer id for a sentence: its first and last characters."""
    return peer if len(peer) <= 12 else f"{peer[:3]}..{peer[-5:]}"


def steps_per_s(n_blocks: int, block_time_s: float, overhead_s: float = 0.0) -> float:
    """Decode steps a second of a peer that does `n_blocks` blocks a step."""
    return 1.0 / max(overhead_s + n_blocks * block_time_s, _LEAST_STEP_S)


def _age(peer: PeerView) -> tuple[int, float, str]:
    """What makes one announcement newer than another; the last parts only so that the order of arrival never counts."""
    return peer.seq, peer.expires_at, repr(peer)
