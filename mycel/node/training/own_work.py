"""A peer's own time in a group: how much it works, what it offers, and what it does when it is late.

    from the shared state: steps -> offer -> (more steps, where a result comes late on purpose) -> merge -> steps

A phase is the work between two of its contributions. Where the method has a delay, the first steps of a phase are made
while the round before is decided; what that brings is held back meanwhile (`holds`), so that the phase meets it at the
step that the method says and not at a moment that chance gave.

Legend: P parameters, S elements of a round's scope.

Ring: shell.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import TypeVar

from torch import Tensor

from mycel.node.events import EventSink
from mycel.node.rounds.group import Group
from mycel.node.rounds.group_port import Contribution
from mycel.node.training.outgoing import Outgoing
from mycel.node.training.work_port import Work, Worked
from mycel.protocols.ports import Compute
from mycel.swarm.methods.method import Method
from mycel.swarm.methods.sizing import contribution_weight, size_work
from mycel.swarm.training.bell import Bell

__all__ = ["OwnWork"]

T = TypeVar("T")

# A peer that is slow makes no fewer than this part of a round's steps, and offers them late if need be.
LEAST_SHARE = 8
# What is later than so many results is thrown away: it is about parameters of long ago.
MAX_STALENESS = 3
# What the newest round's time, or step's, counts for among all.
_BLEND = 0.3
# Who was late makes at most this part of the steps that it made.
_SHRINK = 0.75
_NOTHING_DONE = Worked(0, 0.0, 0.0)


@dataclass(eq=False, slots=True)
class _Phase:
    """Began from `start_P`, is at `local_P`, has merged all results before `version`.

    Its steps are those of `beacon` from `first` on. `vector_S` is what it offers, where that was known before the
    result that was due.
    """

    start_P: Tensor  # noqa: N815 - their shapes
    local_P: Tensor  # noqa: N815
    version: int
    generation: int
    beacon: bytes
    first: int = 0
    worked: Worked = _NOTHING_DONE
    gradient_P: Tensor | None = None  # noqa: N815
    vector_S: Tensor | None = None  # noqa: N815


@dataclass(eq=False)
class OwnWork:
    """`run` for ever. `bell` rings for it whenever the group or the shared state has changed."""

    group: Group
    method: Method
    work: Work
    outgoing: Outgoing
    compute: Compute
    event: EventSink
    me: str
    n_rounds: int
    bell: Bell
    # Results are not to be applied now.
    holds: bool = field(default=False, init=False)
    _generation: int = field(default=0, init=False)
    # The round that was offered to last, and what was done for it.
    _offered: int = field(default=0, init=False)
    _told: Worked | None = field(default=None, init=False)
    _steps: int = field(default=0, init=False)
    _step_s: float = field(default=0.0, init=False)
    _round_s: float = field(default=0.0, init=False)
    _is_shown: bool = field(default=False, init=False)

    async def run(self) -> None:
        phase: _Phase | None = None
        while True:
            await self._until_wanted()
            if phase is None or phase.generation != self._generation:
                phase = await self._begin()
            phase = await self._contribute(phase)

    # ---- what becomes of the shared state

    async def decided(self, number: int, *, accepted: bool) -> Worked | None:
        """Round `number` is over: call it before its result is applied. What was done for it, if anything was."""
        if number != self._offered:
            return None
        await self._on_compute(lambda: self.outgoing.settle(accepted))
        told, self._told = self._told, None
        return told

    def replaced(self) -> None:
        """The shared state came from others: begin anew from it."""
        self._generation += 1
        self.holds, self._told, self._is_shown = False, None, False
        self.outgoing.forget()

    def measure(self, round_s: float, *, accepted: bool) -> None:
        """Who was late does less next time; who was in time does a little more, up to what is due."""
        most = self.method.inner_steps
        if not self._step_s or (round_s < self._step_s and not accepted):
            return  # made up for, after an absence: it says nothing of how quick the others are
        self._round_s = round_s if not self._round_s else self._round_s + _BLEND * (round_s - self._round_s)
        if not accepted:
            least = max(1, most // LEAST_SHARE)
            sized = size_work(self._step_s, max(self._round_s, 1e-3), least, most)
            self._steps = max(least, min(sized.steps, int(_SHRINK * self._count())))
            self.event("round.sized", steps=self._steps, reason=sized.reason)
        elif self._steps:
            self._steps = min(most, self._steps + max(1, most // 10))

    # ---- one phase after the other

    async def _until_wanted(self) -> None:
        """Until this peer can contribute to the round in hand, and has not."""
        group = self.group
        while True:
            seen = self.bell.count
            is_over = self.method.state.version >= self.n_rounds
            gathered = group.is_member and group.has_begun
            is_open = gathered and not group.is_over and group.round != self._offered
            if self.holds or (is_open and not is_over):
                return
            if is_over and not self._is_shown:  # whoever asks the model now asks the one that all have trained
                self._is_shown = True
                await self.work.start(await self._on_compute(self.method.restart), self._behind(self.n_rounds))
            await self.bell.after(seen)

    async def _begin(self) -> _Phase:
        """From the shared state, whatever was before."""
        self._release()
        generation, beacon = self._generation, self.group.beacon
        version, local_P = await self._on_compute(lambda: (self.method.state.version, self.method.restart()))
        await self.work.start(local_P, self._behind(version))
        return _Phase(local_P.clone(), local_P, version, generation, beacon)

    async def _contribute(self, phase: _Phase) -> _Phase | None:
        """Finish a phase and offer what came of it; the next phase, or None to begin from the shared state."""
        await self._work(phase, self._count())
        if self._overlaps and phase.vector_S is None and phase.generation == self._generation:
            phase.vector_S = await self._on_compute(partial(self._vector, phase, phase.version))
            self._release()
            await self._settled(phase)
            await self._merge(phase)
        if phase.generation != self._generation or self._late(phase) > MAX_STALENESS:
            return None
        if self._merges_first:
            await self._merge(phase)
        match await self._offer(phase):
            case None:
                return None
            case False:
                return phase  # in a later round, if there is one
            case True:
                return await self._follow(phase)

    async def _follow(self, phase: _Phase) -> _Phase | None:
        """The phase after one that was offered, up to where the result of the latter is in it."""
        beacon = self.group.beacon
        first = phase.first + phase.worked.n_steps if beacon == phase.beacon else 0
        following = _Phase(phase.local_P, phase.local_P, phase.version, phase.generation, beacon, first)
        if self._delay:
            self.holds = True
            await self._work(following, self._count() if self._overlaps else min(self._delay, self._count()))
            if self._overlaps:
                return following
            self._release()
        await self._settled(following)
        await self._merge(following, offered=True)
        return following

    async def _work(self, phase: _Phase, count: int) -> None:
        """Make steps until there are `count` in this phase."""
        count -= phase.worked.n_steps
        if count <= 0 or phase.generation != self._generation:
            return
        first = phase.first + phase.worked.n_steps
        if self.method.sends == "gradient":
            sum_P, worked = await self.work.gradients(phase.beacon, first, count)
            phase.gradient_P = sum_P if phase.gradient_P is None else phase.gradient_P + sum_P
        else:
            phase.local_P, worked = await self.work.steps(phase.beacon, first, count)
        phase.worked += worked
        step_s = worked.seconds / count
        self._step_s = step_s if not self._step_s else self._step_s + _BLEND * (step_s - self._step_s)

    async def _merge(self, phase: _Phase, *, offered: bool = False) -> None:
        """Have in `phase` what was applied since."""
        if phase.generation != self._generation:
            return
        method, before = self.method, phase.version

        def merged() -> tuple[Tensor, int]:
            local_P, version = phase.local_P, method.state.version
            for number in range(before, version):
                local_P = method.merge(number, local_P)
            if offered and version == before and self.outgoing.carries and not self._overlaps:
                # Nothing came of the round. The codec sends later what it took: the work must not be sent twice.
                local_P = method.merge(version, local_P)
            return local_P, version

        local_P, phase.version = await self._on_compute(merged)
        if local_P is phase.local_P:
            return
        phase.local_P = local_P
        if not phase.worked.n_steps:
            phase.start_P = local_P.clone()
        await self.work.start(local_P, self._behind(phase.version) + phase.worked.n_steps)

    async def _settled(self, phase: _Phase) -> None:
        """Until the round that was offered to is applied."""
        while self.group.round <= self._offered and phase.generation == self._generation:
            await self.bell.after(self.bell.count)

    def _release(self) -> None:
        if self.holds:
            self.holds = False
            self.bell.ring()

    # ---- what it offers

    async def _offer(self, phase: _Phase) -> bool | None:
        """Whether this phase's work is on its way; None if there is nothing in it that could be."""
        group, number = self.group, self.group.round
        is_over = group.is_over or self.method.state.version >= self.n_rounds
        if is_over or not group.is_member or number == self._offered:
            return False
        if self._merges_first and self._late(phase):
            return False
        version, n_shards = self.method.state.version, group.n_shards
        seed = hashlib.sha256(group.beacon + self.me.encode()).digest()

        def encode() -> list[bytes] | None:
            if self.method.state.version != version:
                return None
            vector_S = self._vector(phase, version)
            return self.outgoing.encode(vector_S, version, number, n_shards, seed)

        try:
            bodies = await self._on_compute(encode)
        except FloatingPointError as error:
            self.event("round.diverged", round=number, reason=str(error))
            self._offered = number
            await self.work.forget()
            return None
        if bodies is None:
            return False
        self._offered, self._told = number, phase.worked
        weight = contribution_weight(phase.worked.n_steps, self.method.inner_steps)
        contribution = Contribution(tuple(bodies), weight, b"", self._late(phase))
        if await group.contribute(contribution, number):
            return True
        if phase.generation == self._generation:
            await self._on_compute(lambda: self.outgoing.settle(False))
        self._told = None
        return self.outgoing.carries

    def _vector(self, phase: _Phase, version: int) -> Tensor:
        if phase.vector_S is not None:
            return phase.vector_S
        if phase.gradient_P is not None:
            return self.method.contribution(version, phase.gradient_P / phase.worked.n_steps)
        if version == phase.version:
            return self.method.contribution(version, phase.local_P)
        # The shared state has moved on meanwhile; what was learned is still how far this peer has come.
        return phase.start_P - phase.local_P

    def _late(self, phase: _Phase) -> int:
        """Results that have come in and are not in this phase."""
        return self.method.state.version - phase.version

    # ---- how much

    @property
    def _delay(self) -> int:
        """Steps between a contribution and its result: less than a phase where the next one is of another scope."""
        return min(self.method.delay, self.method.inner_steps - (self.method.n_scopes > 1))

    @property
    def _overlaps(self) -> bool:
        """Whether a result comes in after the next contribution is made."""
        return self._delay >= self.method.inner_steps

    @property
    def _merges_first(self) -> bool:
        """Whether what a late peer offers is about the shared state of now: each round is about another scope."""
        return not self._overlaps and (self._delay > 0 or self.method.n_scopes > 1)

    def _count(self) -> int:
        """As many steps as fit into the time that the others take, and no more than are due."""
        return self._steps or self.method.inner_steps

    def _behind(self, version: int) -> int:
        """Inner steps behind the run."""
        return version * self.method.inner_steps

    async def _on_compute(self, job: Callable[[], T]) -> T:
        return (await self.compute.run(job)).value
