"""A peer of a run of one-byte updates: it measures, offers the codes, and applies what all certified.

    state -> slopes of this peer's samples -> codes, offered -> certificate -> the lattice moved by all alike -> state

What a round comes to is decided in swarm/zeroth/course.py; who contributed, by the group (node/rounds).

Ring: shell.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

import trio

from mycel.node.background import background
from mycel.node.events import EventSink
from mycel.node.rounds.group import Group
from mycel.node.rounds.group_port import Committed, Contribution, NeedState
from mycel.node.training.state_service import StateService
from mycel.node.zeroth.catching_up import CatchUp
from mycel.node.zeroth.files import RunFiles
from mycel.node.zeroth.measuring import Measurer
from mycel.protocols.ports import Compute
from mycel.swarm.rounds.reducer import Row, ShardWork
from mycel.swarm.training.bell import Bell
from mycel.swarm.zeroth.course import Course, Step, mark_of, pack_scalars
from mycel.swarm.zeroth.lattice import RunPieces
from mycel.swarm.zeroth.run_log import pack_round

__all__ = ["Applied", "NothingToReduce", "ZerothPeer"]

# A peer that was late measures no fewer than this part of what is due.
LEAST_SHARE = 16


@dataclass(frozen=True, slots=True)
class Applied:
    """A round that this peer has applied. `loss` is the mean over its own samples, None if it had none in time."""

    step: Step
    version: int
    digest: bytes
    loss: float | None
    contributors: int
    members: int
    seconds: float


class NothingToReduce:
    """A group's `Reducer` where contributions are scalars: there is nothing to reduce."""

    needs_before = False

    def max_bytes(self, shard: int, n_shards: int) -> int:
        return 0

    def gram(self, work: ShardWork) -> bytes:
        raise AssertionError("the mean needs no Gram matrix")

    def decide(self, rows: Sequence[Row], grams: Sequence[bytes], plan: bytes) -> bytes:
        raise AssertionError("the mean decides nothing")

    def reduce(self, work: ShardWork, decision: bytes) -> bytes:
        return b""


def _ignore(_: Applied) -> None:
    """For who does not listen."""


async def _nothing(_: Course) -> None:
    """For who writes no checkpoints."""


@dataclass(eq=False)
class ZerothPeer:
    """`run` until cancelled. `measurer` is None where the text is not: such a peer signs, and measures nothing."""

    group: Group
    course: Course
    measurer: Measurer | None
    catch_up: CatchUp
    states: StateService
    files: RunFiles
    compute: Compute
    disk: Compute
    event: EventSink
    n_rounds: int
    on_applied: Callable[[Applied], None] = _ignore
    after_round: Callable[[Course], Awaitable[None]] = _nothing
    run_pieces: RunPieces = map
    ready: trio.Event = field(default_factory=trio.Event, init=False)
    bell: Bell = field(default_factory=Bell, init=False)
    _offered: int = field(default=0, init=False)
    _loss: float | None = field(default=None, init=False)
    _count: int = field(default=0, init=False)
    _applied_s: float = field(default=0.0, init=False)

    @property
    def version(self) -> int:
        """Rounds that brought updates."""
        return self.course.version

    async def run(self) -> None:
        """Take part until cancelled. Raises ConfigError for a disk that does not take what has to be kept."""
        self._applied_s, self._count = trio.current_time(), self.course.rule.samples
        async with background() as tasks:
            await tasks.start(self.group.run)
            await tasks.start(self.states.run)
            await self.states.after_step(self.course.number)
            self.ready.set()
            tasks.start_soon(self._listen)
            tasks.start_soon(self._apply_all)
            if self.measurer is not None:
                tasks.start_soon(self._measure, self.measurer)
            await trio.sleep_forever()

    async def _listen(self) -> None:
        """What has changed in the group may be what another task waits for."""
        while True:
            seen = self.group.bell.count
            self.bell.ring()
            await self.group.bell.after(seen)

    # ---- what others certified

    async def _apply_all(self) -> None:
        while True:
            match await self.group.committed():
                case NeedState() as need:
                    await self.catch_up.follow(need)
                    await self.states.after_step(self.course.number)
                case Committed() as committed:
                    await self._apply(committed)
            self._accuse()
            self.bell.ring()

    async def _apply(self, committed: Committed) -> None:
        course, members, outcome = self.course, self.group.members, committed.certificate.outcome
        beacon, number = self.group.beacon, committed.round

        def job() -> tuple[Step, bytes, bytes]:
            before = course.digest()
            step = course.step(number, beacon, committed.offers)
            course.apply(step, self.run_pieces)
            return step, before, course.digest()

        step, before, digest = (await self.compute.run(job)).value
        lines = pack_round(members, committed.certificate, committed.offers, before)
        await self.disk.run(partial(self.files.add, lines, course, step))
        await self.states.after_step(number)
        await self.after_round(course)
        is_mine = number == self._offered
        if is_mine:
            self._size(committed.accepted)
        now = trio.current_time()
        if step.n_updates:
            loss = self._loss if is_mine else None
            done = Applied(step, course.version, digest, loss, len(step.members), len(members), now - self._applied_s)
            self.on_applied(done)
        self._applied_s = now
        self.event("round.done", round=number, version=course.version, contributors=len(outcome.contributors))
        self.group.applied(digest)

    def _accuse(self) -> None:
        """Who was banned shall be convicted, too: it is no member any more then, and holds nobody up."""
        for peer in self.group.members:
            if mark_of(peer) in self.course.banned and peer != self.catch_up.transport.peer_id:
                self.group.accuse(peer, "most of the others measured other updates than it sent")

    def _size(self, accepted: bool) -> None:
        """Who was late measures a fifth less next time; who was in time an eighth of all more, up to what is due."""
        most = self.course.rule.samples
        least = max(1, most // LEAST_SHARE)
        self._count = min(most, self._count + max(1, most // 8)) if accepted else max(least, self._count * 4 // 5)

    # ---- own measurements

    async def _measure(self, measurer: Measurer) -> None:
        while True:
            seen = self.bell.count
            if not self._is_wanted():
                await self.bell.after(seen)
                continue
            number, beacon = self.group.round, self.group.beacon

            def is_wanted(number: int = number) -> bool:
                return self.group.round == number and not self.group.is_over

            accusations = await measurer.accusations(beacon)
            codes, loss = await measurer.samples(self._count, beacon, is_wanted)
            if not is_wanted() or not codes:
                self._offered = number
                self._size(False)
                continue
            self._offered, self._loss = number, loss
            scalars = pack_scalars(codes, accusations)
            await self.group.contribute(Contribution(scalars=scalars, weight=len(codes)), number)

    def _is_wanted(self) -> bool:
        """Whether there is a round that this peer can contribute to, and has not."""
        group = self.group
        is_due = group.round == self.course.number + 1 and group.round != self._offered and not group.is_over
        return is_due and group.is_member and group.has_begun and self.version < self.n_rounds
