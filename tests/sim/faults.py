"""What can be wrong with a simulated network, as plain values that a test or hypothesis can choose."""

from __future__ import annotations

from dataclasses import dataclass, field
from math import inf

SEGMENT_BYTES = 64 * 1024
FIRST_RETRANSMISSION_S = 0.2  # TCP's least retransmission time-out on Linux
_MOST_RETRANSMISSIONS = 8


@dataclass(frozen=True, slots=True)
class LinkFaults:
    """One direction between two nodes. Streams are reliable, so a loss shows as TCP shows it: as a delay.

    latency_s: one way; jitter_s: uniform on top of it; loss: chance that a segment of 64 KiB or less has to be sent
    again, after a time-out that doubles each time; bandwidth_bytes_per_s: shared by all streams of the connection.
    """

    latency_s: float = 0.005
    jitter_s: float = 0.0
    loss: float = 0.0
    bandwidth_bytes_per_s: float = inf

    def __post_init__(self) -> None:
        if min(self.latency_s, self.jitter_s, self.loss) < 0 or self.loss >= 1 or self.bandwidth_bytes_per_s <= 0:
            raise ValueError(f"impossible link: {self}")

    def delay_s(self, chance: list[float]) -> float:
        """How long a segment travels. `chance`: numbers in [0, 1), the first for jitter, the others one per attempt."""
        delay_s = self.latency_s + self.jitter_s * chance[0]
        timeout_s = FIRST_RETRANSMISSION_S + 2 * self.latency_s
        for drawn in chance[1:]:
            if drawn >= self.loss:
                break
            delay_s += timeout_s
            timeout_s *= 2
        return delay_s

    @property
    def n_chances(self) -> int:
        """How many numbers `delay_s` may need; a link without chance draws none beyond the jitter's."""
        return 1 + (_MOST_RETRANSMISSIONS if self.loss else 0)


@dataclass(frozen=True, slots=True)
class WorldOptions:
    """What all nodes of a world have in common."""

    link: LinkFaults = field(default_factory=LinkFaults)  # between nodes for which `World.link` was not called
    silence_s: float = 5.0
    patience_s: float = 5.0  # for a connection to be made, or a stream to be accepted
    window_bytes: int = 1 << 20  # in flight on one stream, unless a single frame is larger
