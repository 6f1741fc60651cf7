"""How a peer that comes late gets to the group's state: by the way that takes it the least time (swarm/zeroth/choose).

Snapshot, log and sums are all fetched as states are, from several peers at once, each MiB checked; what they lead to
has to be the state that most of the group say they have.

Ring: shell.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import trio

from mycel.node.events import EventSink
from mycel.node.rounds.group import Group
from mycel.node.rounds.group_port import NeedState
from mycel.node.training.state_fetch import fetch_state
from mycel.node.zeroth.files import RunFiles
from mycel.protocols.errors import PeerError, RouteUnavailable, VerificationError
from mycel.protocols.ports import Compute, Transport
from mycel.swarm.zeroth.choose import Choice, Way, choose
from mycel.swarm.zeroth.course import Course
from mycel.swarm.zeroth.lattice import Lattice
from mycel.swarm.zeroth.run_log import replay_rounds
from mycel.swarm.zeroth.shortcut import Catalog, SumTable, pack_summed, read_epochs, replay_summed

__all__ = ["CATALOG", "LOG", "SNAPSHOT", "SUMS", "CatchUp", "Speeds", "StateHolder", "archive_of"]

# What is asked for in place of a stage's number.
SNAPSHOT, LOG, SUMS, CATALOG = 0, 1, 2, 3
FIRST_REST_S, LONGEST_REST_S = 0.5, 16.0
# What is given may be longer than the catalog of one peer said, but not by much more.
_SPARE_BYTES = 1 << 16

Speeds = Callable[[Sequence[str]], Awaitable[tuple[float, float]]]
"""Measured: bytes a second from these peers, and seconds per direction and parameter on this machine."""


@dataclass(frozen=True, slots=True)
class StateHolder:
    """The course as a `StateService` takes it."""

    course: Course

    @property
    def version(self) -> int:
        return self.course.number

    @property
    def size_bytes(self) -> int:
        return len(self.course.pack())

    def apply(self, sum_P: object, scale: float) -> None:
        raise AssertionError("a course moves by certificates alone")

    def params_digest(self) -> bytes:
        return self.course.digest()

    def snapshot(self) -> memoryview:
        return memoryview(self.course.pack())

    def load(self, data: memoryview, version: int) -> None:
        raise AssertionError("a state that was fetched is loaded by who fetched it")


def archive_of(
    course: Course, files: RunFiles, disk: Compute
) -> Callable[[int, int], Awaitable[tuple[memoryview, bytes] | None]]:
    """What a `StateService` gives besides the snapshot: log, sums and catalog, up to round `version`."""

    def find(kind: int, version: int) -> bytes | None:
        if version > course.number or kind not in (LOG, SUMS, CATALOG):
            return None
        epochs = files.epochs_until(version)
        end = epochs[-1].sums.last + 1 if epochs else 0
        if kind == LOG:
            return files.lines(1, version)
        if kind == SUMS:
            tail = files.lines(end + 1, version)
            return None if tail is None or not epochs else pack_summed(epochs, tail)
        log_bytes, tail_bytes = files.size_bytes(1, version) or 0, files.size_bytes(end + 1, version)
        summed_bytes = len(pack_summed(epochs, b"")) + tail_bytes if epochs and tail_bytes is not None else 0
        n_summed = len(epochs) * course.rule.pool + files.n_updates(end + 1, version) if summed_bytes else 0
        n_updates = files.n_updates(1, version) if log_bytes else 0
        return Catalog(version, log_bytes, n_updates, summed_bytes, n_summed, len(course.pack())).pack()

    async def archive(kind: int, version: int) -> tuple[memoryview, bytes] | None:
        data = (await disk.run(partial(find, kind, version))).value
        return None if data is None else (memoryview(data), hashlib.sha256(data).digest())

    return archive


@dataclass(eq=False)
class CatchUp:
    """Of one peer. `first_P` are the run's first parameters, as long as they are kept: log and sums begin with them."""

    transport: Transport
    group: Group
    course: Course
    files: RunFiles
    compute: Compute
    disk: Compute
    event: EventSink
    speeds: Speeds
    first_P: Lattice | None  # noqa: N815 - its shape
    choice: Choice | None = field(default=None, init=False)

    async def follow(self, need: NeedState) -> int:
        """Be in the state of those that are ahead, and let the group go on from there; the round after which it is."""
        self.event("round.state", round=need.round, reason=need.reason)
        number, rest_s = need.round, FIRST_REST_S
        expected = Counter(need.states.values()).most_common(1)[0][0] if need.states else b""
        refused: set[str] = set()
        while True:
            way = Way("snapshot", 0, 0)
            try:
                way = await self._choose(need.peers, number, refused)
                await self._take(way, need.peers, number, expected if number == need.round else b"")
                await self.group.resume(number, self.course.digest())
            except (PeerError, RouteUnavailable) as error:
                self.event("round.state_failed", round=number, way=way.name, reason=str(error))
                refused |= {way.name} - {"snapshot"}
                await trio.sleep(rest_s)
                rest_s = min(2 * rest_s, LONGEST_REST_S)
                if way.name == "snapshot":
                    number += 1  # they have gone on meanwhile
            else:
                return number

    async def _choose(self, peers: Sequence[str], number: int, refused: set[str]) -> Way:
        if self.first_P is None:
            return Way("snapshot", len(self.course.pack()), 0)
        packed = await self._fetch(CATALOG, peers, number, 64)
        # A snapshot has the size that it has here, whatever they say: so no way that is taken is much larger.
        catalog = replace(Catalog.unpack(packed), snapshot_bytes=len(self.course.pack()))
        ways = [way for way in catalog.ways() if way.name not in refused]
        bytes_per_s, s_per_element = await self.speeds(peers)
        self.choice = choose(ways, self.course.rule.n_elements, bytes_per_s, s_per_element)
        self.event("state.way", round=number, way=self.choice.way.name, reason=self.choice.reason)
        return self.choice.way

    async def _take(self, way: Way, peers: Sequence[str], number: int, expected: bytes) -> None:
        """Raises PeerError or RouteUnavailable; the course is then what it was."""
        if way.name == "log":
            lines = await self._fetch(LOG, peers, number, 2 * way.n_bytes + _SPARE_BYTES)
            await self._replay_log(bytes(lines), number, expected)
        elif way.name == "sums":
            summed = await self._fetch(SUMS, peers, number, 2 * way.n_bytes + _SPARE_BYTES)
            await self._replay_sums(bytes(summed), number, expected)
        else:
            most = 9 * self.course.rule.n_elements + (1 << 20)
            data = await self._fetch(SNAPSHOT, peers, number, most, expected)
            await self.compute.run(partial(self._load, data, number, expected))
            await self.disk.run(partial(self.files.replace, None, self.course))

    async def _fetch(
        self, kind: int, peers: Sequence[str], number: int, most_bytes: int, expected: bytes = b""
    ) -> memoryview:
        donors = [(peer, number) for peer in peers]
        fetched = await fetch_state(
            self.transport,
            self.group.place.run,
            kind,
            donors,
            self.event,
            fits=lambda size: size <= most_bytes,
            version=number,
            expected=lambda _: expected,
        )
        return fetched.data

    def _load(self, data: memoryview, number: int, expected: bytes) -> None:
        fresh = Course(self.course.rule, self.course.run, self.course.state.theta_P)
        fresh.load(data)
        self._become(fresh, number, expected)

    async def _replay_log(self, lines: bytes, number: int, expected: bytes) -> None:
        first_P, sums = self.first_P, SumTable()
        assert first_P is not None

        def job() -> None:
            fresh = replay_rounds(
                self.files.head, lines, first_P, on_step=lambda course, _, step: sums.add(course, step)
            )
            self._become(fresh, number, expected)

        await self.compute.run(job)
        await self.disk.run(partial(self.files.replace, lines, self.course, sums))

    async def _replay_sums(self, data: bytes, number: int, expected: bytes) -> None:
        first_P = self.first_P
        assert first_P is not None
        fresh = Course(self.course.rule, self.course.run, first_P)
        count = int.from_bytes(data[:2], "little")
        epochs, _ = read_epochs(data[2:], fresh, count)
        last = await self.group.outcome_of(epochs[-1].sums.last + 1 if epochs else 0)

        def job() -> None:
            replay_summed(fresh, self.files.head, data, lambda _: last)
            self._become(fresh, number, expected)

        await self.compute.run(job)
        await self.disk.run(partial(self.files.replace, None, self.course))

    def _become(self, fresh: Course, number: int, expected: bytes) -> None:
        """Raises VerificationError for another state than most of the group say that they have."""
        digest = fresh.digest()
        if fresh.number != number or (expected and digest != expected):
            raise VerificationError("", f"what was given leads to another state than that after round {number}")
        self.course.take(fresh)
