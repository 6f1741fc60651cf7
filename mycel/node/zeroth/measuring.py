"""A peer's own measurements: the slopes of its samples in a round, and those of others that it looks at again.

Legend: P parameters.

Ring: shell.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

from mycel.node.events import EventSink
from mycel.protocols.ports import Compute
from mycel.security.signatures import public_key_of
from mycel.swarm.zeroth.course import KEPT_STEPS, Accusation, Author, Course, Step, mark_of
from mycel.swarm.zeroth.defence import Measured, drawn, verdict
from mycel.swarm.zeroth.lattice import SCALE_BITS, add_updates
from mycel.swarm.zeroth.scalars import Batch, Tunable, measure

__all__ = ["Batches", "Measurer", "Sending"]

Batches = Callable[[bytes], Awaitable[Batch]]
"""The text that a sample of this seed is measured on."""
Sending = Callable[[Measured], int]
"""From what was measured to the code that is sent: another than its own makes a liar, in experiments."""

# Of each accuser in a round so many accusations are looked at: a liar must not keep everybody busy.
MOST_LOOKS = 2


@dataclass(frozen=True, slots=True)
class _Suspect:
    """An update to be measured again."""

    step: Step
    author: Author
    sample: int
    code: int


@dataclass(eq=False)
class Measurer:
    """Of one peer. `share` of all updates is measured again."""

    me: str
    course: Course
    tunable: Tunable
    batches: Batches
    compute: Compute
    event: EventSink
    share: float
    sending: Sending = lambda found: found.code
    # By mark: what is held against a peer that is not banned yet.
    _guilty: dict[bytes, tuple[int, int, int]] = field(default_factory=dict, init=False)

    async def samples(self, count: int, beacon: bytes, is_wanted: Callable[[], bool]) -> tuple[bytes, float]:
        """The codes of this peer's samples in the round of `beacon`, and their mean loss.

        Ends early, with what there is, once it is not wanted.
        """
        course, key = self.course, public_key_of(self.me)
        assert key is not None, "nodes have Ed25519 keys"
        seeds = course.seeds(key, range(count), beacon)
        directions = course.directions(seeds, course.epoch_beacon_of(course.number + 1, beacon))
        codes, losses = bytearray(), 0.0
        for seed, direction in zip(seeds, directions, strict=True):
            batch = await self.batches(seed)
            if not is_wanted():
                break
            found = (await self.compute.run(partial(self._measure, direction, batch))).value
            codes.append(self.sending(found))
            losses += 0.5 * (found.loss_plus + found.loss_minus)
        return bytes(codes), losses / max(len(codes), 1)

    def _measure(self, direction: bytes, batch: Batch) -> Measured:
        return measure(self.tunable, self.course.state.theta_P, direction, self.course.rule.spread, batch)

    # ---- others

    async def accusations(self, beacon: bytes) -> list[Accusation]:
        """Whom this peer found lying, for its offer of the round of `beacon`. Measures what it is its turn to."""
        for suspect in self._suspects(beacon):
            mark = mark_of(suspect.author.peer)
            if mark in self._guilty or mark in self.course.banned:
                continue
            again = await self._again(suspect)
            if again is None:
                continue
            said = verdict(suspect.code, again, self.course.rule.spread / 2.0**SCALE_BITS)
            if not said.ok:
                self._guilty[mark] = (suspect.step.number, suspect.sample, again.code)
                self.event(
                    "update.false",
                    peer=suspect.author.peer,
                    round=suspect.step.number,
                    sample=suspect.sample,
                    reason=said.reason,
                )
        number = self.course.number + 1
        self._guilty = {
            mark: what
            for mark, what in self._guilty.items()
            if number - what[0] <= KEPT_STEPS and mark not in self.course.banned
        }
        return [Accusation(mark, number - at, sample, code) for mark, (at, sample, code) in self._guilty.items()]

    def _suspects(self, beacon: bytes) -> list[_Suspect]:
        if not self.course.recent:
            return []
        last = self.course.recent[-1]
        me = next((number for number, author in enumerate(last.members) if author.peer == self.me), None)
        everybody = range(len(last.members))
        found = [
            _Suspect(last, last.members[one.peer], one.sample, one.code)
            for one in drawn(last, last, beacon, self.share, everybody)
            if one.auditor == me
        ]
        looks: dict[str, int] = {}
        for accuser, accusation in last.accusations:
            looks[accuser] = looks.get(accuser, 0) + 1
            # What was so many rounds ago then is one more by now.
            moved = Accusation(accusation.mark, accusation.ago + 1, accusation.sample, accusation.code)
            what = self.course.update_of(moved)
            if what is not None and accuser != self.me and looks[accuser] <= MOST_LOOKS:
                step, author, code = what
                found.append(_Suspect(step, author, accusation.sample, code))
        return [suspect for suspect in found if suspect.author.peer != self.me]

    async def _again(self, suspect: _Suspect) -> Measured | None:
        """None if the course has gone on so far meanwhile that the state of then is not known any more."""
        course, step = self.course, suspect.step
        seed = course.seeds(suspect.author.key, [suspect.sample], step.beacon)[0]
        direction = course.directions([seed], step.epoch_beacon)[0]
        batch = await self.batches(seed)

        def job() -> Measured | None:
            if step not in course.recent:
                return None
            since = [one for later in course.recent if later.number >= step.number for one in later.updates]
            theta_P = course.state.theta_P.copy()
            add_updates(theta_P, _negated(since))
            return measure(self.tunable, theta_P, direction, course.rule.spread, batch)

        return (await self.compute.run(job)).value


def _negated(updates: Sequence[tuple[bytes, int]]) -> list[tuple[bytes, int]]:
    return [(seed, -size) for seed, size in updates]
