"""Ways to a late state, as bytes: the log from the first round on, or the sums of whole epochs with the log's tail.

    catalog   round u32 | log's bytes u64 | its updates u64 | bytes with sums u64 | directions u64
              | bytes of a snapshot u64                                        (0 for a way that is not there)
    summed    count u16 | for each epoch: size u32, sums, version u32, number u16, marks of the banned
              | the log's lines after them

What they lead to is checked against the state that the group says it has; the log's lines are checked one by one too.

Ring: pure.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from mycel.protocols.errors import RemoteProtocolError, VerificationError
from mycel.protocols.rounds import Outcome
from mycel.swarm.rounds.terms import beacon_of
from mycel.swarm.zeroth.choose import Way
from mycel.swarm.zeroth.compact import Sums
from mycel.swarm.zeroth.course import Course, Step
from mycel.swarm.zeroth.lattice import RunPieces
from mycel.swarm.zeroth.run_log import LogHead, read_rounds
from mycel.swarm.zeroth.seeds import pool_seed

__all__ = ["Catalog", "Epoch", "SumTable", "pack_summed", "read_epochs", "replay_summed"]

_CATALOG = struct.Struct("<IQQQQQ")
_COUNT, _SIZE, _END = struct.Struct("<H"), struct.Struct("<I"), struct.Struct("<IH")
_MARK_BYTES = 16


@dataclass(frozen=True, slots=True)
class Catalog:
    """What the ways to the state after `round` take, as one peer has them."""

    round: int
    log_bytes: int
    n_updates: int
    summed_bytes: int
    n_directions: int
    snapshot_bytes: int

    def pack(self) -> bytes:
        fields = (self.round, self.log_bytes, self.n_updates, self.summed_bytes, self.n_directions)
        return _CATALOG.pack(*fields, self.snapshot_bytes)

    @classmethod
    def unpack(cls, data: bytes | memoryview) -> Catalog:
        """Raises RemoteProtocolError."""
        if len(data) != _CATALOG.size:
            raise RemoteProtocolError(f"a catalog of {len(data)} bytes")
        return cls(*_CATALOG.unpack(data))

    def ways(self) -> list[Way]:
        found = [Way("snapshot", self.snapshot_bytes, 0)]
        if self.log_bytes:
            found.append(Way("log", self.log_bytes, self.n_updates))
        if self.summed_bytes:
            found.append(Way("sums", self.summed_bytes, self.n_directions))
        return found


@dataclass(frozen=True, slots=True)
class Epoch:
    """The sums of a whole epoch, and what else is in the state at its end."""

    sums: Sums
    version: int
    banned: tuple[bytes, ...]

    def pack(self) -> bytes:
        sums = self.sums.pack()
        return _SIZE.pack(len(sums)) + sums + _END.pack(self.version, len(self.banned)) + b"".join(self.banned)


class SumTable:
    """Adds up the steps of each epoch; none that was not seen from its first round on, and none after that."""

    def __init__(self, epochs: Iterable[Epoch] = ()) -> None:
        self.epochs = list(epochs)
        self._totals: dict[bytes, int] = {}
        self._next = self.end + 1

    @property
    def end(self) -> int:
        """The round after which the last whole epoch is; 0 if there is none."""
        return self.epochs[-1].sums.last + 1 if self.epochs else 0

    def add(self, course: Course, step: Step) -> Epoch | None:
        """`course` has applied the step: the epoch that is whole with it, if one is."""
        rule, index = course.rule, step.number - 1
        if not rule.pool or step.number != self._next:
            return None
        self._next += 1
        for seed, size in step.updates:
            self._totals[seed] = self._totals.get(seed, 0) + size
        if (index + 1) % rule.epoch:
            return None
        seeds = (pool_seed(course.run, step.epoch_beacon, k) for k in range(rule.pool))
        steps = tuple(self._totals.get(seed, 0) for seed in seeds)
        self._totals = {}
        self.epochs.append(
            Epoch(Sums(index + 1 - rule.epoch, index, step.epoch_beacon, steps), course.version, course.banned)
        )
        return self.epochs[-1]


def read_epochs(data: bytes, course: Course, count: int | None = None) -> tuple[list[Epoch], int]:
    """So many epochs (None: all) that follow each other from the first on, and where they end.

    Raises RemoteProtocolError.
    """
    rule, at = course.rule, 0
    found: list[Epoch] = []
    try:
        while len(found) != count and (count is not None or at < len(data)):
            number = len(found)
            (size,) = _SIZE.unpack_from(data, at)
            at += _SIZE.size
            sums = Sums.unpack(data[at : at + size], rule)
            at += size
            version, n_banned = _END.unpack_from(data, at)
            at += _END.size
            end = at + _MARK_BYTES * n_banned
            if end > len(data) or (sums.first, sums.last) != (number * rule.epoch, (number + 1) * rule.epoch - 1):
                raise RemoteProtocolError("sums that do not follow each other")
            found.append(Epoch(sums, version, tuple(data[i : i + _MARK_BYTES] for i in range(at, end, _MARK_BYTES))))
            at = end
    except struct.error:
        raise RemoteProtocolError("sums that end too early") from None
    return found, at


def pack_summed(epochs: Sequence[Epoch], tail: bytes) -> bytes:
    """`tail` are the log's lines after the last of these epochs."""
    return _COUNT.pack(len(epochs)) + b"".join(epoch.pack() for epoch in epochs) + tail


def replay_summed(
    course: Course,
    head: LogHead,
    data: bytes,
    outcome: Callable[[int], Outcome],
    on_step: Callable[[Step], None] = lambda step: None,
    run_pieces: RunPieces = map,
) -> None:
    """From the first state to the one that `data` leads to; `outcome` gives those of rounds that were certified.

    Raises RemoteProtocolError or VerificationError; `course` is then anywhere.
    """
    if len(data) < _COUNT.size:
        raise RemoteProtocolError(f"sums in {len(data)} bytes")
    (count,) = _COUNT.unpack_from(data)
    epochs, at = read_epochs(data[_COUNT.size :], course, count)
    for epoch in epochs:
        try:
            course.skip(epoch.sums, epoch.version, epoch.banned, run_pieces)
        except OverflowError as error:
            raise VerificationError("", str(error)) from None
    last = outcome(course.number)
    for logged in read_rounds(head, data[_COUNT.size + at :], course.digest, last):
        step = course.step(logged.number, beacon_of(last), logged.offers)
        course.apply(step, run_pieces)
        on_step(step)
        last = logged.certificate.outcome
