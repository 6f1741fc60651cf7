"""Whom a peer passes over when the run stands still: statuses are words, and one who lies must not stop all others.

Nobody can see who lies. But a run whose peers do as they say moves; so while nothing moves, one peer after the other is
passed over on trial, those first whose word stands in the way. If the step is made then, the one on trial is passed
over for longer each time. Who was passed over wrongly has lost nothing, since sums are the same whoever counted what.

Ring: pure.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from mycel.protocols.training import StageStatus
from mycel.swarm.training.members import Member, Members
from mycel.swarm.training.plan import RunPlan
from mycel.swarm.training.step import are_enough
from mycel.swarm.training.walks import drivers

__all__ = ["Doubt", "Doubts", "suspects"]

# Nothing has moved for so long, or for so many times the longest that it took in a good step; before the first step
# nobody knows what is long.
LEAST_PATIENCE_S, PATIENCE_TIMES, FIRST_PATIENCE_S = 45.0, 3.0, 120.0
LONGEST_PATIENCE_S = 600.0
# A trial lasts for so many times the patience: those who only hear of it begin after two.
TRIAL_TIMES = 2.0
# Who was in the way is passed over for so long, and twice as long each time.
FIRST_DOUBT_S, LONGEST_DOUBT_S = 60.0, 3600.0
MAX_REMEMBERED = 1024
_FORGETTING = 0.9  # of the longest gap, each step


@dataclass(frozen=True, slots=True)
class Doubt:
    """From now on `peer` is passed over."""

    peer: str
    reason: str


def suspects(
    plan: RunPlan, members: Members, me: StageStatus, strikes: Mapping[str, int] | None = None, *, hearsay: bool = True
) -> Iterator[Doubt]:
    """Whose word stands in the way of the step that `me` is at, the likeliest first; a peer may come more than once.

    `strikes`: who did not give what it was asked for in this step. Without `hearsay`, those alone of whom this peer
    knows as much as anybody.
    """
    mine = Member(members.me, me, 0.0)
    others = [m for m in members if m.peer != members.me and m.status.state != "joining"]
    here = [m for m in others if m.version == me.version and m.status.state in ("training", "leaving")]
    ahead = [m for m in others if m.version > me.version]
    if not are_enough(len(ahead), len(others)):
        for member in sorted(ahead, key=lambda m: (-m.version, m.peer)):
            yield Doubt(member.peer, f"says that {member.version} steps are made, and most others do not")
    yield from _counted_twice([*here, mine], me.stage, mine)
    for peer, times in sorted((strikes or {}).items(), key=lambda item: (-item[1], item[0])):
        if times and peer != members.me:
            yield Doubt(peer, "has not given what it says it has")
    yield from _not_driven(plan, members, [*here, mine], me.version, wholly=True)
    if not hearsay:
        return
    for stage in range(plan.n_stages):
        yield from _counted_twice([*here, mine], stage, mine)
    for stage in range(plan.n_stages):
        yield from _without_sum([m for m in here if m.stage == stage], me.version)
    yield from _not_driven(plan, members, [*here, mine], me.version, wholly=False)
    for member in (*ahead, *others):
        yield Doubt(member.peer, "is there, and nothing moves")


def _counted_twice(computing: Sequence[Member], stage: int, mine: Member) -> Iterator[Doubt]:
    """Who keeps what others have counted, too, the most first: of two the one with the greater id takes it back."""
    there = [m for m in computing if m.stage == stage]
    doubled = {
        m.peer: sum((m.counted & other.counted).bit_count() for other in there if other is not m)
        for m in there
        if m is not mine
    }
    for peer in sorted(sorted(doubled, reverse=True), key=lambda peer: -doubled[peer]):
        if doubled[peer]:
            yield Doubt(peer, "keeps microbatches that another has counted")


def _not_driven(
    plan: RunPlan, members: Members, computing: Sequence[Member], version: int, *, wholly: bool
) -> Iterator[Doubt]:
    """Whose microbatches are not there. `wholly`: those alone of whom nobody has counted a single one."""
    trainers, whole, part = drivers(members), plan.everything, 0
    for stage in range(plan.n_stages):
        have = 0
        for member in computing:
            have |= member.counted if member.stage == stage else 0
        whole, part = whole & have, part | have
    owed, given = dict.fromkeys(trainers, 0), dict.fromkeys(trainers, 0)
    for number in range(plan.n_microbatches) if trainers and whole != plan.everything else ():
        owner = plan.owner(plan.work(version, number), trainers)
        owed[owner] += not whole >> number & 1
        given[owner] += part >> number & 1
    for peer in sorted(trainers, key=lambda peer: (-owed[peer], peer)):
        if owed[peer] and peer != members.me and not (wholly and given[peer]):
            yield Doubt(peer, f"drives {owed[peer]} microbatches that do not come")


def _without_sum(there: Sequence[Member], version: int) -> Iterator[Doubt]:
    """Of one stage's peers, those first who are fewer: with a sum or without, with this one or another."""
    said = {m.peer: _sum_of(m.status, version) for m in there}
    held = Counter(said.values())
    if len(held) == 1 and b"" not in held:
        return  # all have it
    counted = {m.peer: m.counted.bit_count() for m in there}
    for peer in sorted(said, key=lambda peer: (held[said[peer]], said[peer] != b"", -counted[peer], peer)):
        what = "another sum than its stage" if said[peer] else "no sum"
        yield Doubt(peer, f"has {what} of step {version}")


def _sum_of(status: StageStatus, version: int) -> bytes:
    """The digest of the sum that it says it has, b"" for none."""
    return next((reduced.digest for reduced in status.reduced if reduced.version == version), b"")


def _tardy(plan: RunPlan, members: Members, me: StageStatus) -> frozenset[str]:
    """Who alone keeps everybody from the step: this peer has its sum, and so have most of each stage."""
    if not _sum_of(me, me.version) or me.version >= plan.n_steps:
        return frozenset()
    tardy: set[str] = set()
    for stage in range(plan.n_stages):
        computing = [m for m in members.of_stage(stage) if m.version >= me.version - 1]
        lacking = {m.peer for m in computing if m.version <= me.version and not _sum_of(m.status, me.version)}
        if not computing or 2 * len(lacking) > len(computing):
            return frozenset()
        tardy |= lacking
    return frozenset(tardy - {members.me})


@dataclass(eq=False, slots=True)
class Doubts:
    """One peer's patience with the others. Looked at every second or so; it tells `members` whom to pass over."""

    plan: RunPlan
    members: Members
    patience_s: float = FIRST_PATIENCE_S
    has_changed: bool = False  # with the last look somebody is listened to again
    _gap_s: float = 0.0
    _mark: tuple[int, int] = (-1, 0)
    _moved_s: float = 0.0
    _next_s: float = 0.0
    _on_trial: str = ""
    _tried: set[str] = field(default_factory=set)
    _until_s: dict[str, float] = field(default_factory=dict)
    _times: dict[str, int] = field(default_factory=dict)
    # Who alone lacks its sum of which step, and since when.
    _tardy: dict[str, float] = field(default_factory=dict)
    _tardy_at: int = -1

    def look(self, me: StageStatus, strikes: Mapping[str, int], now: float) -> Doubt | None:
        """`me` is this peer's status as of now. Whom it begins to pass over with this look, if anybody."""
        self.has_changed = False
        self._forgive(now)
        if doubt := self._pass_over(me, now):
            return doubt
        if self._moves(me, now) or now < self._next_s:
            return None
        self._release()
        hearsay = now - self._moved_s >= 2 * self.patience_s
        for doubt in suspects(self.plan, self.members, me, strikes, hearsay=hearsay):
            if doubt.peer not in self._tried:
                self._tried.add(doubt.peer)
                self._on_trial = doubt.peer
                self.members.doubt(doubt.peer)
                self._next_s = now + TRIAL_TIMES * self.patience_s
                return doubt
        if hearsay:  # nobody's word alone is in the way: begin anew, more slowly
            self._tried.clear()
            self.patience_s = min(2 * self.patience_s, LONGEST_PATIENCE_S)
        self._next_s = now + self.patience_s
        return None

    def _pass_over(self, me: StageStatus, now: float) -> Doubt | None:
        """All see alike who alone has no sum: so nobody has to try, and all go on at the same moment."""
        # Not while somebody is passed over on trial: without it, few may look like most.
        tardy = frozenset[str]() if self._on_trial else _tardy(self.plan, self.members, me)
        kept, self._tardy = self._tardy, dict.fromkeys(tardy, now)
        if kept and self._tardy_at == me.version:
            self._tardy |= {peer: since_s for peer, since_s in kept.items() if peer in tardy}
        self._tardy_at = me.version
        late = [peer for peer, since_s in self._tardy.items() if now - since_s >= LEAST_PATIENCE_S]
        if not late:
            return None
        self.convict(min(late), now)
        return Doubt(min(late), f"has no sum of step {me.version}, and nobody else lacks it")

    def convict(self, peer: str, now: float) -> None:
        """It was in the way: pass it over for a while, longer each time."""
        while len(self._times) >= MAX_REMEMBERED:
            del self._times[next(iter(self._times))]
        times = self._times.pop(peer, 0)
        self._times[peer] = times + 1
        self._until_s[peer] = now + min(FIRST_DOUBT_S * 2.0 ** min(times, 16), LONGEST_DOUBT_S)
        self.members.doubt(peer)

    def _moves(self, me: StageStatus, now: float) -> bool:
        """Whether anything has moved since the last look, or need not: then the patience begins anew."""
        stages = {m.stage for m in self.members if m.status.state != "joining"}
        idle = me.state == "joining" or me.version >= self.plan.n_steps or len(stages) < self.plan.n_stages
        before, mark = self._mark, (me.version, self._done(me))
        if mark <= before and me.version == before[0] and not idle:
            return False
        gap_s, self._mark, self._moved_s = now - self._moved_s, mark, now
        self._next_s = now + self.patience_s
        if me.version <= before[0] or idle:
            if not idle and gap_s < self.patience_s:
                self._gap_s = max(self._gap_s, gap_s)
            return True
        if self._on_trial:
            self.convict(self._on_trial, now)
        self._on_trial = ""
        self._tried.clear()
        self.patience_s = min(max(LEAST_PATIENCE_S, PATIENCE_TIMES * self._gap_s), LONGEST_PATIENCE_S)
        self._next_s = now + self.patience_s
        self._gap_s *= _FORGETTING
        return True

    def _done(self, me: StageStatus) -> int:
        """What the stages have counted of this step, and how many have their sum."""
        done = 0
        for stage in range(self.plan.n_stages):
            union = 0
            for member in self.members.of_stage(stage):
                if member.version == me.version:
                    union |= member.counted
                    done += any(reduced.version == me.version for reduced in member.status.reduced)
            done += union.bit_count()
        return done

    def _forgive(self, now: float) -> None:
        for peer in [peer for peer, until_s in self._until_s.items() if until_s <= now]:
            del self._until_s[peer]
            if peer != self._on_trial:
                self.members.trust(peer)
                self.has_changed = True

    def _release(self) -> None:
        if self._on_trial and self._on_trial not in self._until_s:
            self.members.trust(self._on_trial)
            self.has_changed = True
        self._on_trial = ""
