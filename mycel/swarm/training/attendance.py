"""When a member of the run's rounds says that it is there and brings nothing: so that nobody waits for it.

All peers of a run, whatever their stage, make their rounds in one group. Who has the sum of its stage while another
stage lacks its own, or who computes nothing, gives no gradient; but a round ends sooner if everybody has said something
(swarm/rounds/closing). It is said only once those who do bring something can: or rounds would end without them.

Ring: pure.
"""

from __future__ import annotations

from collections import Counter

from mycel.protocols.training import StageStatus
from mycel.swarm.training.members import Member, Members
from mycel.swarm.training.plan import RunPlan
from mycel.swarm.training.step import RoundFacts

__all__ = ["IDLE_S", "brings_nothing"]

# A round in which nothing can come together ends after so long if somebody waits to be let in.
IDLE_S = 2.0


def brings_nothing(
    plan: RunPlan, members: Members, me: StageStatus, facts: RoundFacts, *, outsiders: bool, since_s: float
) -> str:
    """Why this peer says now that it brings nothing to the round in hand; "" if it does not.

    `outsiders`: somebody is here who is no member of the group. `since_s`: how long the round has been in hand.
    """
    if facts.has_offered:
        return ""
    computing = [m for m in (*(m for m in members if m.peer != members.me), Member(members.me, me, 0.0)) if _runs(m)]
    versions = Counter(m.version for m in computing)
    if not versions:
        return "nobody computes, and others wait to be let in" if outsiders and since_s >= IDLE_S else ""
    # What one peer alone says that it is at moves nobody.
    version = min(versions, key=lambda version: (-versions[version], version))
    there = [m for m in computing if m.version == version]
    manned = {m.stage for m in there}
    if version >= plan.n_steps or len(manned) < plan.n_stages:
        why = "the run is over" if version >= plan.n_steps else "a stage has nobody who computes it"
        return f"{why}, and others wait to be let in" if outsiders and since_s >= IDLE_S else ""
    lacking = [stage for stage in range(plan.n_stages) if _lacks(stage, version, there, facts, since_s)]
    if not lacking or not all(_is_counted(plan, stage, there) for stage in lacking):
        return ""
    if me.state in ("training", "leaving") and me.version == version and me.stage in lacking:
        return ""  # what it has counted
    return f"stage {lacking[0]} offers its part of step {version}, and this peer has none"


def _runs(member: Member) -> bool:
    return member.status.state in ("training", "leaving")


def _lacks(stage: int, version: int, there: list[Member], facts: RoundFacts, since_s: float) -> bool:
    """Whether a round has to bring the stage its sum: also if one has, and who had it is gone."""
    if facts.made[stage] != version:
        return True
    mates = [m for m in there if m.stage == stage]
    return since_s >= IDLE_S and not any(r.version == version for m in mates for r in m.status.reduced)


def _is_counted(plan: RunPlan, stage: int, there: list[Member]) -> bool:
    union = 0
    for member in there:
        union |= member.counted if member.stage == stage else 0
    return union == plan.everything
