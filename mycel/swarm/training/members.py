"""Who takes part in a run and how far each is, as one peer knows it from what the others say.

A peer is there from its first status on, until its stream breaks, it says nothing for `SILENT_S`, or it goes. The table
judges nobody: what follows from it is decided elsewhere (step, wiring, stages).

Ring: pure.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from mycel.protocols.training import StageStatus
from mycel.swarm.training.numbers import from_bytes

# A status is a heartbeat, too.
HEARTBEAT_S = 1.0
SILENT_S = 5.0
MAX_MEMBERS = 1024


@dataclass(frozen=True, slots=True)
class Member:
    """One peer's newest status; `heard_s` is when it came."""

    peer: str
    status: StageStatus
    heard_s: float

    @property
    def stage(self) -> int:
        return self.status.stage

    @property
    def version(self) -> int:
        return self.status.version

    @property
    def counted(self) -> int:
        """The numbers of its step whose gradients it holds."""
        return from_bytes(self.status.counted)


@dataclass(eq=False, slots=True)
class Members:
    """All peers of one run that are there now, oneself among them."""

    me: str
    run: bytes
    _members: dict[str, Member] = field(default_factory=dict, init=False)
    # The highest seq of whoever was here: a status that was overtaken must not bring back who has gone.
    _seen: dict[str, int] = field(default_factory=dict, init=False)

    def hear(self, peer: str, status: StageStatus, now: float) -> bool:
        """Take a status; whether it says anything new. Another run's, and what was overtaken, is ignored."""
        if status.run != self.run or status.seq <= self._seen.get(peer, -1):
            return False
        if peer not in self._members and len(self._members) >= MAX_MEMBERS:
            return False
        self._seen[peer] = status.seq
        self._members[peer] = Member(peer, status, now)
        return True

    def lose(self, peer: str) -> bool:
        """The peer is gone, or has said its last word; whether it was there."""
        return self._members.pop(peer, None) is not None

    def expire(self, now: float) -> tuple[str, ...]:
        """Drop who has been silent for too long; who that was."""
        silent = tuple(p for p, m in self._members.items() if p != self.me and now - m.heard_s > SILENT_S)
        for peer in silent:
            del self._members[peer]
        return silent

    def get(self, peer: str) -> Member | None:
        return self._members.get(peer)

    def __iter__(self) -> Iterator[Member]:
        return iter(sorted(self._members.values(), key=lambda member: member.peer))

    def of_stage(self, stage: int, *states: str) -> tuple[Member, ...]:
        """In order of peer id; of these states, by default those that train."""
        wanted = states or ("training", "leaving")
        return tuple(m for m in self if m.stage == stage and m.status.state in wanted)

    def trainers(self) -> tuple[str, ...]:
        """Who drives microbatches, in order of peer id."""
        return tuple(m.peer for m in self if m.status.trains and m.status.state in ("observing", "training"))
