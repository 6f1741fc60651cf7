"""Who failed a session, when and why: barred for moments, avoided for a while, never forgotten.

A peer that failed is not lost for good: it may have been cut off for a second, and it may be the only one that holds
its blocks. So it is out of the question for a second only (longer each time it fails again), and for some time after
that it is taken only where nobody else can.

Ring: pure.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from mycel.swarm.view import short_id

BAR_S = 1.0
MAX_BAR_S = 8.0
AVOID_S = 30.0


@dataclass(frozen=True, slots=True)
class Failure:
    """The last failure of a peer, at `at_s`, how many there were, and why the first one was."""

    at_s: float
    count: int
    reason: str
    first_reason: str

    @property
    def barred_until_s(self) -> float:
        return self.at_s + min(BAR_S * 2.0 ** min(self.count - 1, 10), MAX_BAR_S)


@dataclass(slots=True)
class Failures:
    """The failures of one session, by peer; it meets few peers, so that they all have room."""

    by_peer: dict[str, Failure] = field(default_factory=dict)

    def note(self, peer: str, reason: str, now: float) -> None:
        """A peer failed (or refused) at `now`."""
        before = self.by_peer.get(peer)
        if before is None:
            self.by_peer[peer] = Failure(now, 1, reason, reason)
        else:
            self.by_peer[peer] = Failure(now, before.count + 1, reason, before.first_reason)

    def barred(self, now: float) -> frozenset[str]:
        """Who is not to be asked at all."""
        return frozenset(peer for peer, failure in self.by_peer.items() if failure.barred_until_s > now)

    def avoided(self, now: float) -> frozenset[str]:
        """Who is asked only where nobody else can: those barred, and everybody who failed of late."""
        return frozenset(peer for peer, failure in self.by_peer.items() if failure.at_s + AVOID_S > now)

    def next_free_s(self, now: float) -> float | None:
        """When the next of those who are barred may be asked again; None if nobody is barred."""
        ends = [failure.barred_until_s for failure in self.by_peer.values() if failure.barred_until_s > now]
        return min(ends, default=None)

    def told(self) -> str:
        """Who was tried and why it came to nothing, for a sentence: "a: went away, then refused (3 times)"."""
        return "; ".join(f"{short_id(peer)}: {_told(failure)}" for peer, failure in self.by_peer.items())


def _told(failure: Failure) -> str:
    then = f", then {failure.reason}" if failure.reason != failure.first_reason else ""
    return f"{failure.first_reason}{then}" + (f" ({failure.count} times)" if failure.count > 1 else "")
