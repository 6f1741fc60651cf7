"""How much a transport spends on its peers: times, counts and bytes.

Ring: pure.
"""

from __future__ import annotations

from dataclasses import dataclass

from mycel.protocols.errors import ConfigError
from mycel.protocols.ports import MAX_FRAME_BYTES


@dataclass(frozen=True, slots=True)
class TransportLimits:
    """Raises ConfigError for a limit under which nothing could work."""

    heartbeat_interval_s: float = 1.0
    silence_s: float = 5.0  # a peer that sent nothing at all for so long, answers to heartbeats included, is dead
    dial_timeout_s: float = 5.0  # all addresses of a peer together
    open_timeout_s: float = 5.0
    close_timeout_s: float = 2.0  # how long aclose and a shutdown wait for bytes to leave
    max_connections: int = 1000
    max_connections_per_peer: int = 4  # two are normal: both sides dialled at once
    max_streams_per_peer: int = 1024  # in each direction
    max_frame_bytes: int = MAX_FRAME_BYTES
    window_bytes: int = 4 * 1024 * 1024  # what one stream may take from a sender whose peer does not read
    max_held_bytes_per_connection: int = 256 * 1024 * 1024  # frames that arrived and nobody took yet
    max_known_peers: int = 4096
    max_addresses_per_peer: int = 16

    def __post_init__(self) -> None:
        times = (self.heartbeat_interval_s, self.silence_s, self.dial_timeout_s, self.open_timeout_s)
        if min(*times, self.close_timeout_s) <= 0:
            raise ConfigError("every time limit of the transport has to be positive")
        if self.silence_s < 2 * self.heartbeat_interval_s:
            raise ConfigError(
                f"a peer cannot be called silent after {self.silence_s} s with a heartbeat each "
                f"{self.heartbeat_interval_s} s: leave time for two"
            )
        if self.window_bytes < 512 * 1024:
            raise ConfigError(f"a window of {self.window_bytes} bytes is under 512 KiB, two of Yamux's own")
        counts = (self.max_connections, self.max_connections_per_peer, self.max_streams_per_peer)
        if min(*counts, self.max_known_peers, self.max_addresses_per_peer) < 1:
            raise ConfigError("every count of the transport has to be at least 1")
        if self.max_held_bytes_per_connection < 2 * self.max_frame_bytes:
            raise ConfigError("a connection has to be able to hold two of its largest frames")
        if not 0 < self.max_frame_bytes <= MAX_FRAME_BYTES:
            raise ConfigError(f"frames have between 1 and {MAX_FRAME_BYTES} bytes, not {self.max_frame_bytes}")
