"""The ports: what the rest of Mycel needs from a network, a record store and a processor.

Real and simulated adapters implement them, and one conformance suite for each port runs against both.

Ring: pure (signatures only; awaiting is the implementation's affair).
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

from mycel.protocols.messages import PeerAddress, SignedRecord

T = TypeVar("T")

MAX_FRAME_BYTES = 64 * 1024 * 1024


class Stream(Protocol):
    """An ordered, reliable, bounded, two-way sequence of whole frames with one peer.

    Cancelling `send` or `receive` never corrupts anything: a frame is delivered whole or not at all, and a frame
    that arrived is not lost by a cancelled receive. One sender and one receiver at a time.
    """

    @property
    def peer(self) -> str:
        """The authenticated peer id of the other end."""
        ...

    async def send(self, *parts: bytes | memoryview) -> None:
        """Send the concatenation of `parts` as one frame of 1 to MAX_FRAME_BYTES bytes; waits while the peer is slow.

        Raises PeerUnreachable if the connection is gone, LocalProtocolError for an empty frame, one over the limit, or
        after our own aclose or reset.
        """
        ...

    async def receive(self) -> memoryview | None:
        """The next frame, in writable memory of the caller's own, or None once the peer ended the stream with aclose.

        None is an explicit end, not a crash.

        Raises PeerUnreachable when the peer died, reset the stream or fell silent past the heartbeat deadline, and
        RemoteProtocolError for a frame over the limit.
        """
        ...

    async def aclose(self) -> None:
        """End the stream cleanly: what was sent arrives, then the peer's receive returns None. Idempotent, bounded."""
        ...

    async def reset(self) -> None:
        """Abandon the stream: the peer's receive raises PeerUnreachable. Idempotent, bounded."""
        ...


Handler = Callable[[Stream], Awaitable[None]]


class Transport(Protocol):
    """Authenticated streams to peers. A connection serves both ends: whoever was dialled can open streams back.

    A transport that shuts down ends its handlers, and its peers' streams raise PeerUnreachable.
    """

    @property
    def peer_id(self) -> str: ...

    @property
    def addresses(self) -> tuple[str, ...]:
        """Where others can dial us, as multiaddrs without the peer id; empty for a client that only dials."""
        ...

    async def open(self, peer: str, protocol: str) -> Stream:
        """Open a stream, connecting first if needed.

        Raises PeerUnreachable (nothing answers), PeerTimeout (something accepts but stays silent) or PeerRefused (the
        peer does not speak the protocol or admits no more); LocalProtocolError for our own id.
        """
        ...

    def serve(self, protocol: str, handler: Handler) -> None:
        """Call `handler` for every inbound stream of `protocol`, each in its own task.

        When the handler returns the stream is closed; when it raises, the stream is reset, the error is reported and
        nobody else notices.
        """
        ...

    def learn(self, peer: str, addresses: Sequence[str]) -> None:
        """Remember where `peer` can be dialled; the newest addresses are tried first."""
        ...

    def rtt_s(self, peer: str) -> float | None:
        """Smoothed heartbeat round-trip time, or None while not connected or not measured."""
        ...

    def connected(self) -> frozenset[str]:
        """Peers with a live connection."""
        ...


class RecordStore(Protocol):
    """Signed, expiring records of several writers under one key, kept by the peers closest to the key."""

    async def put(self, record: SignedRecord) -> int:
        """Store a record with its holders; the number of peers (this one included) that now hold it.

        Raises LocalProtocolError for a record that its own check refuses.
        """
        ...

    async def get(self, key: bytes) -> tuple[SignedRecord, ...]:
        """The newest valid record of each writer under `key`, in order of writer id; empty if there is none."""
        ...

    async def find_peer(self, peer: str) -> PeerAddress | None:
        """Where a peer can be dialled, asked of the network."""
        ...


@dataclass(frozen=True, slots=True)
class Done(Generic[T]):
    """A job's value, how long it waited for the processor and how long it ran."""

    value: T
    queue_s: float
    compute_s: float


class Compute(Protocol):
    """The only door to a processor: one job at a time, in order of arrival, never on the event loop."""

    async def run(self, job: Callable[[], T], *, cost_s: float = 0.0) -> Done[T]:
        """Run `job`; its exception is raised here.

        A cancelled caller does not wait for a job that has not started, and waits for one that has (its effect on a
        cache must be known). `cost_s` is what a simulated processor charges; a real one ignores it.
        """
        ...
