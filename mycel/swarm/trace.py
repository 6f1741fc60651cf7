"""Where the time of a generation went, hop by hop, and what was replaced on the way.

Compute and queue are what each hop reports. The network cannot be measured hop by hop without synchronized clocks; what
can be measured exactly is the whole: a token's turn round the ring minus all compute and queue. That rest is shared out
to the links evenly: an average, and called so.

Ring: pure.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from mycel.swarm.generation import NewToken, RouteChosen, SessionEvent
from mycel.swarm.routing import Hop


@dataclass(frozen=True, slots=True)
class HopReport:
    """Milliseconds for each decoded token at one hop; `network_ms` is the ring's average link."""

    peer: str
    start: int
    end: int
    compute_ms: float
    queue_ms: float
    network_ms: float


@dataclass(frozen=True, slots=True)
class Replaced:
    """A hop that another took the place of at a token position, and why."""

    position: int
    peer: str
    reason: str


@dataclass(slots=True)
class RouteTrace:
    """Collects a session's events; `began_s` is when the request was made, on the clock of NewToken.at_s.

    `replaced` are the hops that failed, `moved` those that left and handed their work over.
    """

    began_s: float
    n_tokens: int = 0
    first_s: float | None = None
    last_s: float | None = None
    hops: tuple[Hop, ...] = ()
    reason: str = ""
    replaced: list[Replaced] = field(default_factory=list)
    moved: list[Replaced] = field(default_factory=list)
    _turns: int = 0
    _sums_us: list[list[int]] = field(default_factory=list)
    _turning_since_s: float | None = None
    _position: int = 0

    def apply(self, event: SessionEvent) -> None:
        """Take an event of the session into the account."""
        if isinstance(event, RouteChosen):
            position = max(self._position, event.position)
            self.replaced += [Replaced(position, peer, reason) for peer, reason in event.lost]
            self.moved += [Replaced(position, peer, reason) for peer, reason in event.moved]
            self.hops, self.reason = event.hops, event.reason
            self._turns, self._turning_since_s = 0, None
            self._sums_us = [[0, 0] for _ in event.hops]
        else:
            self._token(event)

    def _token(self, event: NewToken) -> None:
        self.n_tokens += 1
        self.first_s = event.at_s if self.first_s is None else self.first_s
        self.last_s, self._position = event.at_s, event.position + 1
        if self._turning_since_s is None:
            self._turning_since_s = event.at_s  # this token paid for the prefill or a replay: no turn of the ring
            return
        self._turns += 1
        for sums, timing in zip(self._sums_us, event.timings, strict=False):
            sums[0] += timing.compute_us
            sums[1] += timing.queue_us

    @property
    def tokens_per_s(self) -> float | None:
        """Decode rate: tokens after the first over the time since the first."""
        if self.first_s is None or self.last_s is None or self.n_tokens < 2 or self.last_s <= self.first_s:
            return None
        return (self.n_tokens - 1) / (self.last_s - self.first_s)

    @property
    def first_token_s(self) -> float | None:
        return None if self.first_s is None else self.first_s - self.began_s

    def report(self) -> tuple[HopReport, ...]:
        """One line for each hop of the present route; zeros until the ring has turned once."""
        turns, n_hops = max(self._turns, 1), max(len(self.hops), 1)
        turned_ms = 0.0
        if self.last_s is not None and self._turning_since_s is not None:
            turned_ms = (self.last_s - self._turning_since_s) * 1e3
        spent_ms = sum(map(sum, self._sums_us)) / 1e3
        network_ms = max(0.0, turned_ms - spent_ms) / turns / n_hops
        return tuple(
            HopReport(hop.peer.peer, hop.start, hop.end, compute / turns / 1e3, queue / turns / 1e3, network_ms)
            for hop, (compute, queue) in zip(self.hops, self._sums_us, strict=True)
        )
