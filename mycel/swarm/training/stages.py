"""Which stage of the pipeline a newcomer takes, and which of several that took the same at once chooses again.

A pipeline is as fast as its slowest stage, so help goes to a stage that nobody holds, and then to the one that computes
least. Peers on their way count where they are going: whoever chooses later knows of them. Who chose at the same moment
did not, and learns it from the next statuses; of two such peers the one with the lesser id is first.

Ring: pure.
"""

from __future__ import annotations

import hashlib
import statistics
from collections.abc import Iterable, Sequence

from mycel.swarm.training.members import Member
from mycel.swarm.training.plan import RunPlan
from mycel.swarm.view import short_id

__all__ = ["SETTLE_S", "capacities", "choose_stage", "goal", "must_yield", "rate_of", "typical_rate"]

# After so many seconds everybody has heard who chose what (statuses come at once), and a download goes on as it is.
SETTLE_S = 5.0
# Another stage has to be weaker by this share to be worth choosing again.
MIN_SHARE = 0.05
# What a peer says it computes is believed up to so many times what is typical.
MOST_PRAISE = 16.0
_TIE_DOMAIN = b"mycel stage v1"


def choose_stage(plan: RunPlan, members: Iterable[Member], me: str) -> tuple[int, str]:
    """The stage that `me`, a newcomer, helps most, and why: one without peers, then the one that computes least.

    Of equal stages the one with the lowest hash of peer and stage, so that newcomers that cannot see each other yet
    spread instead of all taking the first.
    """
    others = [member for member in members if member.peer != me]
    held = capacities(plan, others)
    empty = _empty(plan, others)
    if empty:
        return min(empty, key=lambda stage: _tie(me, stage)), "nobody holds it"
    least = min(held)
    stage = min((s for s, rate in enumerate(held) if rate == least), key=lambda stage: _tie(me, stage))
    mean = sum(held) / plan.n_stages
    return stage, f"it computes least: {least:.3g} sequences a second, a stage on average {mean:.3g}"


def must_yield(plan: RunPlan, members: Iterable[Member], me: str) -> str | None:
    """Why `me`, a newcomer on its way in `members`, has to choose again; None if it need not.

    Ask at every change until SETTLE_S have passed since it chose. The first of those on their way at one stage stays,
    so a stage is never left by all; and who yields chooses with those before it in place, so that no two wait for
    each other.
    """
    table = {member.peer: member for member in members}
    mine = table.get(me)
    if mine is None:
        return None
    stage = goal(mine)
    before = [m for m in table.values() if m.peer != me and (m.status.state != "joining" or m.peer < me)]
    first = min((m.peer for m in before if m.status.state == "joining" and goal(m) == stage), default=None)
    if first is None:
        return None
    came = f"{short_id(first)} came first to stage {stage}"
    other, _ = choose_stage(plan, before, me)
    if other in _empty(plan, before):
        return f"chooses again: {came}, and nobody holds stage {other}"
    held = capacities(plan, before)
    if held[stage] > held[other] * (1.0 + MIN_SHARE):
        return f"chooses again: {came}, and stage {other} computes less"
    return None


def capacities(plan: RunPlan, members: Iterable[Member]) -> list[float]:
    """Sequences a second of each stage when all who are on their way have arrived; who leaves does not count."""
    staying = [member for member in members if member.status.state != "leaving"]
    typical = typical_rate(staying)
    held = [0.0] * plan.n_stages
    for member in staying:
        if goal(member) < plan.n_stages:
            held[goal(member)] += rate_of(member, typical)
    return held


def goal(member: Member) -> int:
    """The stage where it is or where it is moving."""
    return member.status.moving_to if member.status.moving_to >= 0 else member.stage


def rate_of(member: Member, typical: float) -> float:
    """What it computes; of a peer that has not measured it yet, what is `typical`."""
    return min(member.status.sequences_per_s, MOST_PRAISE * typical) or typical


def typical_rate(members: Sequence[Member]) -> float:
    """The median of what peers say they compute, 1.0 if none has measured it."""
    return statistics.median([m.status.sequences_per_s for m in members if m.status.sequences_per_s] or [1.0])


def _empty(plan: RunPlan, members: Iterable[Member]) -> list[int]:
    """Stages that nobody holds and nobody is on the way to."""
    taken = {goal(member) for member in members if member.status.state != "leaving"}
    return [stage for stage in range(plan.n_stages) if stage not in taken]


def _tie(me: str, stage: int) -> bytes:
    return hashlib.sha256(_TIE_DOMAIN + stage.to_bytes(2, "little") + me.encode()).digest()
