"""What all peers of a run of one-byte updates hold alike after each round, and how a certified round moves it.

A round's offers carry a byte for each of `weight` updates, and after those up to four accusations of 20 bytes. An offer
counts if it was made from the state that all share, in time, by a peer that is not banned. Then, whoever
computes it,

    parameters   lattice -= the updates of all offers that count, averaged and bounded by the rule
    banned       gains every peer that more than half of the other authors of one round accuse
    state        SHA-256("mycel/zeroth/course/1" | 0 | round u32 | version u32 | lattice's hash | epoch's beacon
                 | marks of the banned)

An accusation says: that update of one of the last rounds measures to another code than its author said. Whose lot it is
to look (defence.py) accuses first; the others measure again what it accuses, and join in or do not. So a peer is out
only if more than half of the others found it out themselves, and all peers drop it after the same round.

    accusation   first half of SHA-256(peer id) | rounds ago u8 (1 to 3) | sample u16 | code u8

Ring: pure.
"""

from __future__ import annotations

import hashlib
import struct
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from mycel.protocols.errors import RemoteProtocolError, VerificationError
from mycel.protocols.rounds import Offer
from mycel.security.signatures import public_key_of
from mycel.swarm.zeroth.chain import NO_HASH, Part
from mycel.swarm.zeroth.compact import Sums, pack_state, unpack_state
from mycel.swarm.zeroth.lattice import Lattice, Reach, RunPieces, Update, state_hash
from mycel.swarm.zeroth.replay import State
from mycel.swarm.zeroth.rule import Rule
from mycel.swarm.zeroth.seeds import pool_index, pool_seed, seed_of

__all__ = [
    "ACCUSATION_BYTES",
    "KEPT_STEPS",
    "MOST_ACCUSATIONS",
    "Accusation",
    "Author",
    "Course",
    "Said",
    "Step",
    "mark_of",
    "pack_scalars",
    "said_by",
]

MOST_ACCUSATIONS = 4
# Rounds that can still be measured again.
KEPT_STEPS = 3
_ACCUSATION = struct.Struct("<16sBHB")
ACCUSATION_BYTES = _ACCUSATION.size
_MARK_BYTES = 16
_STATE = b"mycel/zeroth/course/1\0"
_SNAPSHOT = struct.Struct("<8sII32sH")
_MAGIC = b"mycelZC1"


@dataclass(frozen=True, slots=True)
class Accusation:
    """Update `sample` of the peer with this mark, `ago` rounds before, measures `code`."""

    mark: bytes
    ago: int
    sample: int
    code: int

    def pack(self) -> bytes:
        return _ACCUSATION.pack(self.mark, self.ago, self.sample, self.code)


def mark_of(peer: str) -> bytes:
    """By which accusations and lists of the banned name a peer."""
    return hashlib.sha256(peer.encode()).digest()[:_MARK_BYTES]


@dataclass(frozen=True, slots=True)
class Said:
    """What an offer's scalars say."""

    codes: bytes
    accusations: tuple[Accusation, ...]


def pack_scalars(codes: bytes, accusations: Sequence[Accusation]) -> bytes:
    """An offer's scalars; its weight is the number of the codes."""
    return codes + b"".join(accusation.pack() for accusation in accusations[:MOST_ACCUSATIONS])


def said_by(offer: Offer, most_codes: int) -> Said | None:
    """What an offer says, or None if it is not made like that."""
    more = len(offer.scalars) - offer.weight
    if not 0 <= offer.weight <= most_codes or not 0 <= more <= MOST_ACCUSATIONS * ACCUSATION_BYTES:
        return None
    if more % ACCUSATION_BYTES:
        return None
    rest = offer.scalars[offer.weight :]
    return Said(offer.scalars[: offer.weight], tuple(Accusation(*one) for one in _ACCUSATION.iter_unpack(rest)))


@dataclass(frozen=True, slots=True)
class Author:
    """Whose offer counted."""

    peer: str
    key: bytes


@dataclass(frozen=True, slots=True)
class Step:
    """A round as it counts: `parts` by the number of their author in `members`, and the updates that they come to."""

    number: int
    beacon: bytes
    epoch_beacon: bytes
    members: tuple[Author, ...]
    parts: tuple[Part, ...]
    accusations: tuple[tuple[str, Accusation], ...]
    updates: tuple[Update, ...]
    banned: tuple[bytes, ...] = ()

    @property
    def n_updates(self) -> int:
        return sum(len(part.codes) for part in self.parts)

    def code_of(self, author: int, sample: int) -> int | None:
        """What the author said of its sample."""
        codes = next((part.codes for part in self.parts if part.peer == author), b"")
        return codes[sample] if sample < len(codes) else None


class Course:
    """The state after round `number` of a run, and the last steps to it. `run` is the group's.

    `version` counts the rounds that brought updates.
    """

    def __init__(self, rule: Rule, run: bytes, theta_P: Lattice) -> None:
        self.rule, self.run = rule, run
        self.state = State(theta_P)
        self.number = self.version = 0
        self.epoch_beacon = NO_HASH
        self.banned: tuple[bytes, ...] = ()
        self.recent: deque[Step] = deque(maxlen=KEPT_STEPS)

    # ---- seeds

    def seeds(self, key: bytes, samples: Iterable[int], beacon: bytes) -> list[bytes]:
        """What decides a peer's samples: their directions, and the text that they are measured on."""
        return [seed_of(self.run, beacon, key, sample) for sample in samples]

    def directions(self, seeds: Sequence[bytes], epoch_beacon: bytes) -> list[bytes]:
        """What stands for each seed in the generator: itself, or one of the epoch's pool."""
        size = self.rule.pool
        if not size:
            return list(seeds)
        return [pool_seed(self.run, epoch_beacon, pool_index(seed, size)) for seed in seeds]

    def epoch_beacon_of(self, number: int, beacon: bytes) -> bytes:
        """Of the next round, whose beacon this is."""
        return beacon if self.rule.pool and (number - 1) % self.rule.epoch == 0 else self.epoch_beacon

    # ---- one round

    def step(self, number: int, beacon: bytes, offers: Sequence[Offer]) -> Step:
        """What the offers of the round after this state come to. Changes nothing."""
        if number != self.number + 1:
            raise AssertionError(f"round {number} follows on the state after round {self.number}")
        digest, epoch_beacon = self.digest(), self.epoch_beacon_of(number, beacon)
        members: list[Author] = []
        parts: list[Part] = []
        accusations: list[tuple[str, Accusation]] = []
        seeds: list[bytes] = []
        for offer in sorted(offers, key=lambda offer: offer.peer):
            key, said = public_key_of(offer.peer), said_by(offer, self.rule.samples)
            is_due = offer.state == digest and not offer.staleness and not offer.bodies
            if key is None or said is None or not is_due or mark_of(offer.peer) in self.banned:
                continue
            parts.append(Part(len(members), 0, said.codes))
            members.append(Author(offer.peer, key))
            accusations += [(offer.peer, accusation) for accusation in said.accusations]
            seeds += self.seeds(key, range(len(said.codes)), beacon)
        steps = self.rule.steps(b"".join(part.codes for part in parts))
        updates = tuple(zip(self.directions(seeds, epoch_beacon), steps, strict=True))
        try:
            # Of the state alone: whoever came by another way has to refuse the same.
            Reach.of(self.state.theta_P).after(step for _, step in updates)
        except OverflowError:
            updates = ()
        banned = self._convicted(accusations, [author.peer for author in members])
        return Step(number, beacon, epoch_beacon, tuple(members), tuple(parts), tuple(accusations), updates, banned)

    def _convicted(self, accusations: Sequence[tuple[str, Accusation]], authors: Sequence[str]) -> tuple[bytes, ...]:
        """Whom more than half of the other authors accuse; a mark that is nobody's would do no harm."""
        accusers: dict[bytes, set[str]] = {}
        for accuser, accusation in accusations:
            if accusation.mark != mark_of(accuser) and accusation.mark not in self.banned:
                accusers.setdefault(accusation.mark, set()).add(accuser)
        others = {mark: sum(mark_of(author) != mark for author in authors) for mark in accusers}
        return tuple(sorted(mark for mark, by in accusers.items() if 2 * len(by) > others[mark]))

    def update_of(self, accusation: Accusation) -> tuple[Step, Author, int] | None:
        """What an accusation made in the next round is about, as far as it is still known here: its round and code."""
        step = self.recent[-accusation.ago] if 1 <= accusation.ago <= len(self.recent) else None
        if step is None:
            return None
        number = next((i for i, author in enumerate(step.members) if mark_of(author.peer) == accusation.mark), None)
        code = None if number is None else step.code_of(number, accusation.sample)
        return None if number is None or code is None else (step, step.members[number], code)

    def apply(self, step: Step, run_pieces: RunPieces = map) -> None:
        """Be in the state after this step."""
        self.state.reach = Reach.of(self.state.theta_P)
        self.state.apply(step.updates, run_pieces)
        self.number, self.epoch_beacon = step.number, step.epoch_beacon
        self.version += bool(step.n_updates)
        self.banned = tuple(sorted({*self.banned, *step.banned}))
        self.recent.append(step)

    def skip(self, sums: Sums, version: int, banned: Sequence[bytes], run_pieces: RunPieces = map) -> None:
        """Be in the state after the rounds that these sums are of (which count from 0). Raises OverflowError."""
        self.state.reach = Reach.of(self.state.theta_P)
        updates = [(pool_seed(self.run, sums.epoch_beacon, k), step) for k, step in enumerate(sums.steps)]
        self.state.apply(updates, run_pieces)
        self.number, self.version = sums.last + 1, version
        self.epoch_beacon, self.banned = sums.epoch_beacon, tuple(sorted(banned))
        self.recent.clear()

    def take(self, other: Course) -> None:
        """Be what another course is."""
        self.state, self.number, self.version = other.state, other.number, other.version
        self.epoch_beacon, self.banned, self.recent = other.epoch_beacon, other.banned, other.recent

    # ---- the state

    def digest(self) -> bytes:
        """Names the state after round `number`."""
        return self._digest(state_hash(self.state.theta_P))

    def _digest(self, theta: bytes) -> bytes:
        head = struct.pack("<II", self.number, self.version) + theta + self.epoch_beacon
        return hashlib.sha256(_STATE + head + b"".join(self.banned)).digest()

    def pack(self) -> bytes:
        """The state as bytes, for newcomers and the next life."""
        head = _SNAPSHOT.pack(_MAGIC, self.number, self.version, self.epoch_beacon, len(self.banned))
        return head + b"".join(self.banned) + state_hash(self.state.theta_P) + pack_state(self.state.theta_P)

    def load(self, data: bytes | memoryview, digest: bytes | None = None) -> None:
        """Be in the state that `pack` gave, of this digest if one is given.

        Raises RemoteProtocolError or VerificationError, and changes nothing.
        """
        view = bytes(data)
        try:
            magic, number, version, epoch_beacon, size = _SNAPSHOT.unpack_from(view)
        except struct.error:
            raise RemoteProtocolError(f"a state of {len(view)} bytes") from None
        at = _SNAPSHOT.size + _MARK_BYTES * size
        banned = tuple(view[i : i + _MARK_BYTES] for i in range(_SNAPSHOT.size, at, _MARK_BYTES))
        theta = view[at : at + 32]
        if magic != _MAGIC or len(theta) != 32:
            raise RemoteProtocolError("this is no state of a run of one-byte updates")
        state = unpack_state(view[at + 32 :], self.rule, theta)
        fresh = Course(self.rule, self.run, state.theta_P)
        fresh.number, fresh.version, fresh.epoch_beacon, fresh.banned = number, version, epoch_beacon, banned
        if digest is not None and fresh.digest() != digest:
            raise VerificationError("", "the state is another than was said")
        self.take(fresh)
