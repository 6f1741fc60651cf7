"""An iterative Kademlia lookup as a machine: whom to ask next, given who answered what. No I/O.

candidate: NEW -next_queries-> ASKED -answered-> ANSWERED
                               ASKED -slow----> SLOW -answered-> ANSWERED
                               any but ANSWERED -failed-> FAILED

At most `parallel` candidates are ASKED at a time. A SLOW one (silent for longer than the driver's hedge) makes room for
the next, and its answer still counts. The lookup is done once the `wanted` nearest candidates that are neither failed
nor slow have all answered, and waits for slow ones only if that makes fewer than `wanted`; a read is done as well once
`enough_replicas` peers answered with records. The driver ends every wait: who was asked has answered or failed one day.
Answers are hostile until shown otherwise: from each only the nearest `wanted` * 2 peers are looked at, the number of
candidates is bounded, and the nearest are kept, so every answer brings the lookup nearer or to its end.

Ring: pure.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from enum import Enum, auto

from mycel.dht.keys import distance, position_of
from mycel.dht.records import newer
from mycel.protocols.errors import LocalProtocolError
from mycel.protocols.messages import PeerAddress, SignedRecord


class State(Enum):
    NEW = auto()
    ASKED = auto()
    SLOW = auto()
    ANSWERED = auto()
    FAILED = auto()


@dataclass(frozen=True, slots=True)
class LookupLimits:
    """wanted: replicas sought (Kademlia's k); parallel: alpha; enough_replicas: 0 for a lookup that converges."""

    wanted: int = 8
    parallel: int = 6
    enough_replicas: int = 0
    candidates: int = 96
    queries: int = 64
    addresses: int = 8


@dataclass(slots=True)
class _Candidate:
    peer: str
    distance: int
    addresses: tuple[str, ...]
    state: State = State.NEW


@dataclass
class Lookup:
    """One lookup of `key` (32 bytes) by `own_peer`, starting from the peers `seeds`."""

    key: bytes
    own_peer: str
    limits: LookupLimits
    seeds: Sequence[PeerAddress] = ()
    records: dict[str, SignedRecord] = field(default_factory=dict)  # newest of each writer so far
    replicas: int = 0
    n_queries: int = 0

    def __post_init__(self) -> None:
        self._candidates: dict[str, _Candidate] = {}
        for seed in self.seeds:
            self._consider(seed)
        self._forget_farthest()

    def next_queries(self) -> tuple[PeerAddress, ...]:
        """Candidates to ask now, nearest first; they count as asked from here on."""
        if self.done:
            return ()
        room = self.limits.parallel - sum(c.state is State.ASKED for c in self._candidates.values())
        fresh = [c for c in self._nearest_hopeful()[: self.limits.wanted] if c.state is State.NEW]
        chosen = fresh[: max(0, min(room, self.limits.queries - self.n_queries))]
        for candidate in chosen:
            candidate.state = State.ASKED
        self.n_queries += len(chosen)
        return tuple(PeerAddress(c.peer, c.addresses) for c in chosen)

    def answered(self, peer: str, closer: Iterable[PeerAddress], records: Iterable[SignedRecord] = ()) -> None:
        """`peer` answered with the peers it knows nearest to the key and with (checked) records under it."""
        candidate = self._asked(peer)
        if candidate is None:
            return
        candidate.state = State.ANSWERED
        empty = True
        for record in records:
            empty = False
            held = self.records.get(record.writer)
            self.records[record.writer] = record if held is None else newer(held, record)
        self.replicas += not empty
        offered = sorted(
            (address for address in closer if address.peer != self.own_peer),
            key=lambda address: distance(position_of(address.peer), self.key),
        )
        for address in offered[: 2 * self.limits.wanted]:
            self._consider(address)
        self._forget_farthest()

    def slow(self, peer: str) -> None:
        """`peer` was asked and is silent so far: go on without waiting for it."""
        candidate = self._asked(peer)
        if candidate is not None:
            candidate.state = State.SLOW

    def failed(self, peer: str) -> None:
        """`peer` cannot be reached, answered nonsense or stayed silent past its deadline."""
        candidate = self._candidates.get(peer)
        if candidate is not None and candidate.state is not State.ANSWERED:
            candidate.state = State.FAILED

    @property
    def done(self) -> bool:
        if 0 < self.limits.enough_replicas <= self.replicas:
            return True
        hopeful = self._nearest_hopeful()[: self.limits.wanted]
        if all(candidate.state is State.ANSWERED for candidate in hopeful):
            return len(hopeful) >= self.limits.wanted or not self._any(State.SLOW)
        return self.n_queries >= self.limits.queries and not self._any(State.ASKED)

    def closest(self) -> tuple[PeerAddress, ...]:
        """The peers that answered, nearest to the key first."""
        answered = [c for c in self._nearest_hopeful() if c.state is State.ANSWERED]
        return tuple(PeerAddress(c.peer, c.addresses) for c in answered)

    def _any(self, state: State) -> bool:
        return any(candidate.state is state for candidate in self._candidates.values())

    def _asked(self, peer: str) -> _Candidate | None:
        """The candidate whose answer is awaited, or None if it has answered or failed, or was crowded out."""
        candidate = self._candidates.get(peer)
        if candidate is None or candidate.state in (State.ANSWERED, State.FAILED):
            return None
        if candidate.state is State.NEW:
            raise LocalProtocolError(f"peer {peer[-8:]} was not asked")
        return candidate

    def _nearest_hopeful(self) -> list[_Candidate]:
        hopeful = [c for c in self._candidates.values() if c.state not in (State.FAILED, State.SLOW)]
        return sorted(hopeful, key=lambda candidate: candidate.distance)

    def _consider(self, address: PeerAddress) -> None:
        if address.peer == self.own_peer:
            return
        known = self._candidates.get(address.peer)
        if known is None:
            if address.addresses:
                gap = distance(position_of(address.peer), self.key)
                self._candidates[address.peer] = _Candidate(address.peer, gap, address.addresses)
        elif known.state is State.NEW:
            # Whoever spoke first may have lied: later addresses are added behind, not put in place of the first.
            both = dict.fromkeys(known.addresses + address.addresses)
            known.addresses = tuple(both)[: self.limits.addresses]

    def _forget_farthest(self) -> None:
        """Keep the number of candidates bounded: the farthest that was not asked goes first."""
        excess = len(self._candidates) - self.limits.candidates
        if excess > 0:
            unasked = [c for c in self._candidates.values() if c.state is State.NEW]
            for candidate in sorted(unasked, key=lambda c: c.distance, reverse=True)[:excess]:
                del self._candidates[candidate.peer]
