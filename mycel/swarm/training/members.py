"""Who takes part in a run and how far each is, as one peer knows it from what the others say.

A peer is there from its first status on, until its stream breaks, it says nothing for `SILENT_S`, or it goes. The table
judges nobody: what follows from it is decided elsewhere (step, wiring, stages), and also who is doubted (doubts).

Ring: pure.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from mycel.protocols.errors import RemoteProtocolError
from mycel.protocols.training import StageStatus
from mycel.swarm.training.numbers import from_bytes
from mycel.swarm.training.plan import RunPlan

# A status is a heartbeat, too.
HEARTBEAT_S = 1.0
SILENT_S = 5.0
MAX_MEMBERS = 1024
# So long after a peer has gone a status of its former life may still be on its way.
_REMEMBER_S = 60.0


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


def check_status(status: StageStatus, plan: RunPlan, peer: str) -> StageStatus:
    """What fits into no table of this run raises RemoteProtocolError; the types have checked the rest."""
    if status.run != plan.run:
        raise RemoteProtocolError("says how far it is in another run", peer)
    if status.stage >= plan.n_stages or status.moving_to >= plan.n_stages:
        raise RemoteProtocolError(f"is at stage {max(status.stage, status.moving_to)} of {plan.n_stages}", peer)
    if status.version > plan.n_steps:
        raise RemoteProtocolError(f"has made {status.version} of {plan.n_steps} steps", peer)
    if from_bytes(status.counted) & ~plan.everything:
        raise RemoteProtocolError("has counted numbers that no step has", peer)
    if max(status.kept, status.whole) > plan.n_steps:
        raise RemoteProtocolError(f"keeps step {max(status.kept, status.whole)} of {plan.n_steps}", peer)
    if len(status.params) not in (0, 32):
        raise RemoteProtocolError(f"a digest of {len(status.params)} bytes", peer)
    return status


@dataclass(eq=False, slots=True)
class Members:
    """All peers of one run that are there now, oneself among them."""

    me: str
    run: bytes
    _members: dict[str, Member] = field(default_factory=dict, init=False)
    # The highest seq of whoever was here, and when it came: what was overtaken must not bring back who has gone.
    _seen: dict[str, tuple[int, float]] = field(default_factory=dict, init=False)
    # Who is passed over as if it were not there (doubts.py).
    _doubted: set[str] = field(default_factory=set, init=False)

    def hear(self, peer: str, status: StageStatus, now: float) -> bool:
        """Take a status; whether it says anything new. Another run's, and what was overtaken, is ignored."""
        if status.run != self.run or status.seq <= self._seen.get(peer, (-1, 0.0))[0]:
            return False
        if peer not in self._members and peer != self.me and len(self._members) >= MAX_MEMBERS:
            return False
        self._seen.pop(peer, None)
        self._seen[peer] = status.seq, now
        while len(self._seen) > 2 * MAX_MEMBERS:  # those who have gone longest; who is here speaks every second
            del self._seen[next(iter(self._seen))]
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
        for peer, (_, heard_s) in list(self._seen.items()):
            if peer not in self._members and now - heard_s > _REMEMBER_S:
                del self._seen[peer]
        return silent

    def doubt(self, peer: str) -> None:
        """Pass over what it says, until `trust`; it is still heard."""
        self._doubted.add(peer)

    def trust(self, peer: str) -> None:
        self._doubted.discard(peer)

    def hears(self, peer: str) -> Member | None:
        """Whoever speaks, doubted or not."""
        return self._members.get(peer)

    def get(self, peer: str) -> Member | None:
        return None if peer in self._doubted else self._members.get(peer)

    def __iter__(self) -> Iterator[Member]:
        there = (member for member in self._members.values() if member.peer not in self._doubted)
        return iter(sorted(there, key=lambda member: member.peer))

    def of_stage(self, stage: int, *states: str) -> tuple[Member, ...]:
        """In order of peer id; of these states, by default those that train."""
        wanted = states or ("training", "leaving")
        return tuple(m for m in self if m.stage == stage and m.status.state in wanted)

    def trainers(self) -> tuple[str, ...]:
        """Who drives microbatches, in order of peer id."""
        return tuple(m.peer for m in self if m.status.trains and m.status.state in ("observing", "training"))
