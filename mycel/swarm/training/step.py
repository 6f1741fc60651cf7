"""What a peer does next for the step that its stage is making: a function of what everybody says, with its reason.

Nobody leads. The sum of a step's gradients is one value whoever counted what (lattice.py), so peers need not agree on
who takes part: each pulls what it lacks from whoever has it, and makes the step when all have their sums, or when one
that could not have made it otherwise has made it.

    count -> take back what another counted, too -> sum up a shard -> take the others' -> add the tied table's
    other share -> all have theirs? -> step

In a run of rounds nobody sums up: who has counted offers its part to the round, and what that brings is the sum.

The doing is `mycel/node/training/stepping.py`.

Ring: pure.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property

from mycel.protocols.training import Reduced, StageStatus
from mycel.swarm.training.actions import (
    AddTied,
    Begin,
    Commit,
    Contribute,
    Decision,
    Finished,
    Range,
    Reduce,
    Restore,
    Resync,
    Seal,
    TakeResult,
    TakeShards,
    TakeSum,
    Uncount,
    Wait,
)
from mycel.swarm.training.members import Member, Members
from mycel.swarm.training.plan import RunPlan, shards

__all__ = [
    "RESTORE_AFTER_S",
    "Facts",
    "RoundFacts",
    "are_enough",
    "decide",
    "is_stranded",
    "lacks_sum",
    "uncovered",
]

# Who is ahead of what the run can go on from goes back, once that has been so for as long: not while peers come in.
RESTORE_AFTER_S = 10.0
# In a run of rounds: who lacks a sum that others have waits so long for the round to bring it, then takes theirs.
ROUND_GRACE_S = 3.0


@dataclass(frozen=True, slots=True)
class RoundFacts:
    """What this peer knows of the group in which all peers of the run make their rounds.

    `number` is the round in hand, `has_offered`: to it. `may_compute`: this peer is a certified member, and so are as
    many as the run begins with. `made`: of each stage the step of which a round has brought the sum last, -1 for none.
    """

    number: int
    may_compute: bool
    has_offered: bool
    made: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Facts:
    """What this peer knows of itself: its `status` as of now (`seq` and what wiring needs do not matter) and more.

    `covered`: elements of the stage's own sum that are here, disjoint and in order. `tied_to`: the stage at the other
    end of a tied table. `scale`: that of the step `status.version`, if somebody who made it said it, else 0. `failed`:
    who did not give what was asked for in this step; `helpless`: that nobody has for long. `stranded_s`: for how long
    `is_stranded` has been true, `lacks_s`: for how long others of the stage have had the sum that this peer lacks.
    `round` is None in a run that sums exactly.
    """

    status: StageStatus
    n_elements: int
    covered: tuple[Range, ...] = ()
    tied_to: int | None = None
    scale: float = 0.0
    failed: frozenset[str] = frozenset()
    helpless: bool = False
    stranded_s: float = 0.0
    lacks_s: float = 0.0
    round: RoundFacts | None = None


# ---- the picture


@dataclass(frozen=True)
class _View:
    """Everybody with parameters, oneself among them as one is now, in order of peer id."""

    plan: RunPlan
    facts: Facts
    clip: float
    me: Member
    everyone: tuple[Member, ...]

    @property
    def version(self) -> int:
        return self.me.version

    @property
    def own(self) -> Reduced | None:
        return _sum_of(self.me, self.version)

    @cached_property
    def mates(self) -> tuple[Member, ...]:
        """The others of this stage."""
        return tuple(m for m in self.everyone if m.stage == self.me.stage and m is not self.me)

    @cached_property
    def counting(self) -> tuple[Member, ...]:
        """Whose counted numbers make up this stage's step."""
        return self.counting_at(self.me.stage)

    def counting_at(self, stage: int) -> tuple[Member, ...]:
        return tuple(m for m in self.everyone if m.stage == stage and m.version == self.version and _computes(m))

    def union_at(self, stage: int) -> int:
        """All numbers that somebody has counted there."""
        union = 0
        for member in self.counting_at(stage):
            union |= member.counted
        return union

    @cached_property
    def reach(self) -> tuple[int | None, ...]:
        """Of each stage the most steps that one of its peers has made, or has the sum to make; None: nobody there."""
        furthest: list[int | None] = [None] * self.plan.n_stages
        for member in self.everyone:
            made = member.version + (_sum_of(member, member.version) is not None)
            furthest[member.stage] = max(made, furthest[member.stage] or 0)
        return tuple(furthest)

    @cached_property
    def present(self) -> int | None:
        """The version that all stages can come to, None while a stage is empty."""
        known = [reach for reach in self.reach if reach is not None]
        return min(known) if len(known) == self.plan.n_stages else None

    @cached_property
    def is_made(self) -> bool:
        """Whether the step is made, by the word of others who compute: one alone might say anything."""
        others = [m for m in self.everyone if m is not self.me and (_computes(m) or m.version > self.version)]
        return are_enough(sum(m.version > self.version for m in others), len(others))

    @property
    def is_brought(self) -> bool:
        """Whether a round has brought the stage's own sum of this step."""
        return self.facts.round is not None and self.facts.round.made[self.me.stage] == self.version

    @property
    def waits_for_round(self) -> bool:
        """Whether others have the sum, and the round is about to bring it in fewer bytes."""
        if self.facts.round is None or self.own is not None or self.facts.lacks_s >= ROUND_GRACE_S:
            return False
        return any(_sum_of(m, self.version) is not None for m in self.mates)

    def holders(self) -> tuple[Member, ...]:
        """Mates with the sum to apply at this version, those that have failed us last, and only if it is made."""
        if self.waits_for_round:
            return ()
        holders = [m for m in self.mates if _sum_of(m, self.version) is not None]
        if not self.is_made:  # else it can come together without them
            holders = [m for m in holders if m.peer not in self.facts.failed]
        return tuple(sorted(holders, key=lambda m: (m.peer in self.facts.failed, m.peer)))


def _view(plan: RunPlan, members: Members, facts: Facts, clip: float) -> _View:
    me = Member(members.me, facts.status, 0.0)
    others = [m for m in members if m.peer != me.peer and m.status.state != "joining"]
    return _View(plan, facts, clip, me, tuple(sorted((*others, me), key=lambda m: m.peer)))


def _computes(member: Member) -> bool:
    return member.status.state in ("training", "leaving")


def _sum_of(member: Member, version: int) -> Reduced | None:
    return next((reduced for reduced in member.status.reduced if reduced.version == version), None)


def _most(digests: Iterable[tuple[str, bytes]]) -> bytes:
    """The digest that most peers hold; of equally many that of the smallest peer id."""
    held = sorted(digests)
    count = Counter(digest for _, digest in held)
    most = max(count.values())
    return next(digest for _, digest in held if count[digest] == most)


def are_enough(n_say_so: int, n_others: int) -> bool:
    """Whether so many are believed that steps are made: most, or two and a quarter of all; never one against two."""
    return 2 * n_say_so > n_others or (n_say_so > 1 and 4 * n_say_so >= n_others)


def uncovered(covered: Iterable[Range], start: int, end: int) -> tuple[Range, ...]:
    """What of [start, end) lies in none of `covered`, which are disjoint and in order."""
    missing = []
    for low, high in covered:
        if low >= end:
            break
        if low > start:
            missing.append((start, low))
        start = max(start, high)
    if start < end:
        missing.append((start, end))
    return tuple(missing)


# ---- the rules: the first that has something to say decides


def decide(plan: RunPlan, members: Members, facts: Facts, clip: float) -> Decision:
    """What `members.me` does next. `clip` bounds the norm of the gradient of the whole model, 0: it does not."""
    view = _view(plan, members, facts, clip)
    for rule in _RULES:
        if (decision := rule(view)) is not None:
            return decision
    raise AssertionError("the last rule always decides")


def lacks_sum(plan: RunPlan, members: Members, facts: Facts) -> bool:
    """Whether others of the stage have the sum of the step, and this peer has not."""
    view = _view(plan, members, facts, 0.0)
    return view.own is None and any(_sum_of(m, view.version) is not None for m in view.mates)


def is_stranded(plan: RunPlan, members: Members, facts: Facts) -> bool:
    """Whether this peer is ahead of all that the run can come to: a stage has lost the steps in between."""
    view = _view(plan, members, facts, 0.0)
    return facts.status.state != "joining" and view.present is not None and view.version > view.present


def _fetch(view: _View) -> Decision | None:
    if view.me.status.state == "joining":
        return Decision(Resync(), "has no parameters yet")
    if view.facts.helpless and view.is_made:
        return Decision(Resync(), "nobody has given what this step needs for too long")
    return None


def _mend(view: _View) -> Decision | None:
    """Peers of a stage hold the same parameters. Those who compute judge; observers only where nobody does."""
    told = [m for m in (*view.mates, view.me) if m.version == view.version and m.status.params]
    voters = [m for m in told if _computes(m)] or told
    mine = view.me.status.params
    if not mine or not voters:
        return None
    most = _most((m.peer, m.status.params) for m in voters)
    held = Counter(m.status.params for m in voters)
    # Where two hashes have equally many, those who are still making the step decide.
    if mine == most or (held[mine] == held[most] and any(m.version == view.version - 1 for m in view.mates)):
        return None
    return Decision(Resync(), f"has other parameters after {view.version} steps than its stage")


def _go_back(view: _View) -> Decision | None:
    present = view.present
    if present is None or view.version <= present or view.facts.stranded_s < RESTORE_AFTER_S:
        return None
    stage = view.reach.index(present)
    why = f"stage {stage} has lost what it had beyond {present} steps"
    if donors := [m.version for m in view.mates if m.version <= present]:
        return Decision(Restore(max(donors)), why)
    return Decision(Restore(min(present, _kept(view))), f"{why}, and everybody goes back to a checkpoint")


def _kept(view: _View) -> int:
    """The newest version that some peer of each stage has on its disk."""
    newest = [0] * view.plan.n_stages
    for member in view.everyone:
        newest[member.stage] = max(newest[member.stage], member.status.kept)
    return min(newest)


def _finish(view: _View) -> Decision | None:
    if view.version < view.plan.n_steps:
        return None
    return Decision(Finished(), f"all {view.plan.n_steps} steps are made")


def _take_round(view: _View) -> Decision | None:
    """What a round has brought is the sum, whoever has come or gone since."""
    if view.own is not None or not view.is_brought:
        return None
    if uncovered(view.facts.covered, 0, view.facts.n_elements):
        return Decision(TakeResult(), "a round has brought the sum")
    return _complete(view)


def _catch_up(view: _View) -> Decision | None:
    """Others of the stage have made the step: it is decided, and what they applied is its sum."""
    limit = math.inf if view.present is None else view.present
    ahead = [m for m in view.mates if view.version < m.version <= limit]
    if view.own is not None or not ahead:
        return None
    if holders := view.holders():
        return _take_sum(view, holders, f"{len(ahead)} of the stage have made the step")
    if not view.is_made or view.waits_for_round:
        return None  # a word that nothing bears out, or that the round in hand may
    newest = max(m.version for m in ahead)
    return Decision(Resync(), f"the stage is at version {newest}, and nobody keeps the sum of step {view.version}")


def _observe(view: _View) -> Decision | None:
    if view.me.status.state != "observing":
        return None
    # Also if it has the sum: another stage may still need this one's forward.
    if None not in view.reach and (reason := _may_begin(view)):
        return Decision(Begin(), reason)
    if view.own is not None:
        return None
    if holders := view.holders():
        return _take_sum(view, holders, "observes, and another has the sum")
    return Decision(Wait(), "observes until the step is made")


def _may_begin(view: _View) -> str:
    """Why an observer computes from now on; "" if it does not."""
    round_, stage = view.facts.round, view.me.stage
    if round_ is not None and not round_.may_compute:
        return ""
    if not view.counting:
        return f"nobody else computes stage {stage}"
    if round_ is not None and not view.union_at(stage) and not view.is_brought:
        # Whoever were alone in a round could bring anything.
        return f"nobody has counted anything of stage {stage} yet"
    return ""


def _count(view: _View) -> Decision | None:
    """Every number exactly once, before anything can be summed up."""
    if view.own is not None:
        return None
    union = lower = doubled = 0
    for member in view.counting:
        doubled |= union & member.counted
        union |= member.counted
        if member.peer < view.me.peer:
            lower |= member.counted
    if union == view.plan.everything and not doubled:
        return None
    if holders := view.holders():
        return _take_sum(view, holders, "another has the sum already")
    if mine := lower & view.me.counted:
        return Decision(Uncount(mine), f"{mine.bit_count()} microbatches are counted by a peer with a smaller id, too")
    if union != view.plan.everything:
        counted = f"{union.bit_count()} of {view.plan.n_microbatches}"
        return Decision(Wait(), f"{counted} microbatches are counted")
    return Decision(Wait(), f"{doubled.bit_count()} microbatches are counted twice, and others take them back")


def _sum_up(view: _View) -> Decision | None:
    """One's own shard first, since others wait for it."""
    if view.own is not None:
        return None
    facts, failed, holders = view.facts, view.facts.failed, view.holders()
    sources = tuple((m.peer, m.counted) for m in view.counting if m.counted)
    if facts.round is not None:
        return _contribute(view, facts.round, sources)
    missing = {
        owner: ranges
        for owner, shard in shards(facts.n_elements, [m.peer for m in view.counting]).items()
        if (ranges := uncovered(facts.covered, *shard))
    }
    if not missing:
        return None
    mine = missing.pop(view.me.peer, ())
    lost = tuple(part for owner in sorted(missing) if owner in failed for part in missing[owner])
    if holders and (lost or any(peer in failed for peer, _ in sources)):
        return _take_sum(view, holders, "somebody did not give a part, and another has the whole")
    if mine:
        return Decision(Reduce(mine, sources), "everything is counted once: sums up its shard")
    if shares := tuple((owner, ranges) for owner, ranges in sorted(missing.items()) if owner not in failed):
        return Decision(TakeShards(shares), f"takes {len(shares)} shards from those who sum them up")
    return Decision(Reduce(lost, sources), "sums up what others did not give")


def _contribute(view: _View, round_: RoundFacts, sources: tuple[tuple[str, int], ...]) -> Decision:
    """All stages at once, since a round does not wait long for the last ones: each peer what it has counted."""
    for stage in range(view.plan.n_stages):
        if round_.made[stage] != view.version and view.union_at(stage) != view.plan.everything:
            return Decision(Wait(), f"stage {stage} still counts, and all offer their parts to one round")
    if not round_.may_compute:
        return Decision(Wait(), "is no member of the run's rounds")
    if round_.has_offered:
        return Decision(Wait(), f"round {round_.number} brings the sum")
    return Decision(Contribute(round_.number, sources), "everything is counted once: offers its part to the round")


def _complete(view: _View) -> Decision | None:
    """All of the stage's own sum is here; a tied table needs the share of the other end."""
    if view.own is not None:
        return None
    other = view.facts.tied_to
    if other is None:
        return Decision(Seal(), "the sum is whole")
    there = [m for m in view.everyone if m.stage == other]
    holding = [m for m in there if _sum_of(m, view.version) is not None]
    is_there = view.union_at(other) == view.plan.everything
    if view.facts.round is not None:
        is_there = view.facts.round.made[other] == view.version
    summing = [m for m in view.counting_at(other) if m not in holding] if is_there else []
    if not holding and not summing:
        return Decision(Wait(), f"stage {other}, which shares the table, still counts")
    first = sorted((*holding, *summing), key=lambda m: (m.peer in view.facts.failed, m in summing, m.peer))
    return Decision(AddTied(tuple(m.peer for m in first)), f"adds the table's share of stage {other}")


def _agree(view: _View) -> Decision | None:
    """Machines that round differently have sums that differ: one of them becomes everybody's."""
    own = view.own
    assert own is not None
    chosen = _chosen(view, view.me.stage)
    if chosen is None or chosen.digest == own.digest:
        return None
    holders = tuple(m for m in view.holders() if _sum_of(m, view.version) == chosen)
    return _take_sum(view, holders, "has another sum than its stage") if holders else None


def _chosen(view: _View, stage: int) -> Reduced | None:
    """The sum that counts for a stage: what was applied, if anybody has, else what most have."""
    having = [(m, found) for m in view.everyone if m.stage == stage and (found := _sum_of(m, view.version)) is not None]
    having = [pair for pair in having if pair[0].version > view.version] or having
    if not having:
        return None
    digest = _most((m.peer, found.digest) for m, found in having)
    return next(found for _, found in having if found.digest == digest)


def _take_sum(view: _View, holders: tuple[Member, ...], reason: str) -> Decision:
    chosen = _chosen(view, view.me.stage)
    assert chosen is not None
    having = ((m.peer, _sum_of(m, view.version)) for m in holders)
    peers = tuple(peer for peer, found in having if found is not None and found.digest == chosen.digest)
    return Decision(TakeSum(view.version, chosen.digest, peers), reason)


def _step(view: _View) -> Decision:
    """All stages have their sums: the step is made, by all or, if a stage is lost now, taken back by all."""
    version = view.version
    for stage, reach in enumerate(view.reach):
        if reach is None:
            return Decision(Wait(), f"nobody is at stage {stage}")
        if reach <= version:
            return Decision(Wait(), f"stage {stage} has not summed up yet")
    if not view.is_made and (obstacle := _obstacle(view)):
        return Decision(Wait(), obstacle)
    sums = [_chosen(view, stage) for stage in range(view.plan.n_stages)]
    known = [chosen.sum_sq for chosen in sums if chosen is not None]
    norm = math.sqrt(math.fsum(known)) if len(known) == view.plan.n_stages else 0.0
    reason = "others have made the step" if view.is_made else "all stages have their sums"
    if view.facts.scale:
        return Decision(Commit(view.facts.scale, norm), reason)
    if len(known) == view.plan.n_stages:
        scale = min(1.0, view.clip / (norm + 1e-6)) if view.clip else 1.0
        return Decision(Commit(scale, norm), reason)
    if makers := tuple(m for m in view.holders() if m.version > version):
        return _take_sum(view, makers, "asks those who made the step how much of the sum they applied")
    if not any(m.version > version for m in view.mates):
        # Nobody has another state of this stage: those ahead come back to it.
        return Decision(Wait(), f"others are ahead, and nobody of stage {view.me.stage} is with them")
    return Decision(Resync(), "others are too far ahead to say how the step was made")


def _obstacle(view: _View) -> str:
    """Why nobody may be the first to make this step; "" if one may.

    Everybody who computes is waited for: had one alone the sum of its stage and died, nobody could finish the step.
    Who is further behind than one step comes after by the sums, or fetches the state. Observers are waited for only
    where one peer would be alone.
    """
    version = view.version
    near = (m for m in view.everyone if _computes(m) and version - 1 <= m.version <= version)
    if pending := [m for m in near if _sum_of(m, version) is None]:
        return f"{len(pending)} peers do not have their sum yet, at stage {pending[0].stage} among others"
    for stage in range(view.plan.n_stages):
        there = [m for m in view.everyone if m.stage == stage]
        having = [reduced for m in there if (reduced := _sum_of(m, version)) is not None]
        if len({reduced.digest for reduced in having}) > 1:
            return f"stage {stage} does not agree on its sum yet"
        if len(having) == 1 and any(m.version == version and m.status.state == "observing" for m in there):
            return f"at stage {stage} one peer alone has the sum, and an observer takes it"
    return ""


_RULES: tuple[Callable[[_View], Decision | None], ...] = (
    _fetch,
    _mend,
    _go_back,
    _finish,
    _take_round,
    _catch_up,
    _observe,
    _count,
    _sum_up,
    _complete,
    _agree,
    _step,
)
