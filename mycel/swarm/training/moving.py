"""When a peer that trains moves to another stage: from where work waits least to where it waits most.

The adaptive rebalancing of SWARM (Ryabinin et al. 2023), which its release leaves out. Every peer knows from the
statuses how much work waits at every peer, so all name the same mover: from the stage with the shortest queues the
peer with the shortest queue, to the stage with the longest. What is ours, for peers of unlike speeds and for peace:

- A stage's queue is that of its peers on average. SWARM adds them up, which takes a stage of many slow peers for the
  bottleneck (simulated speeds of 1:2:4:8, a look a minute: 0.83 of the optimum, on average instead 0.91).
- Of the peers of a stage the one moves that helps most; the shortest queue decides among equals (0.87 of the optimum
  instead of 0.82 with a look every five minutes).
- One peer leaves its stage at a time, in the whole run; who has left counts where it fetches the state.
- A move has to raise the lesser of the two stages that it touches by a share of 1/n over what the weak one computes, of
  n peers: so moves raise the weakest stages step by step and end, whatever noise is in the queues.
- After a move, or after joining, a peer stays for at least twice as long as fetching a state takes.

Periods are each peer's own, from the moment when it began to train, without a shared clock: all looks name the same
mover, but only the mover's own look moves it, so that there is about one move a period however the looks lie. What two
peers chose in ignorance of each other is taken back by the one with the greater id.

Ring: pure.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import msgspec

from mycel.swarm.training.members import Member
from mycel.swarm.training.plan import RunPlan
from mycel.swarm.training.stages import capacities, goal, rate_of, typical_rate
from mycel.swarm.view import short_id

__all__ = ["HASTE", "PERIOD_S", "Move", "Mover", "Stay", "best_move", "must_go_back"]

PERIOD_S = 300.0
# While a stage is empty nothing is computed at all: looks are so many times as frequent, and wait for no cool-down.
HASTE = 6.0
# After a move, so many times what fetching the state takes.
COOL_DOWN_FETCHES = 2.0
# Who has the parameters of its stage and stays.
_READY = ("training", "observing")


@dataclass(frozen=True, slots=True)
class Stay:
    """Go on in the same stage."""

    reason: str


@dataclass(frozen=True, slots=True)
class Move:
    """`peer` goes from stage `source` to stage `target`."""

    peer: str
    source: int
    target: int
    reason: str


def best_move(plan: RunPlan, members: Iterable[Member]) -> Move | Stay:
    """Who should move where, by the statuses alone: the same for everybody who has heard the same.

    The target is the stage where most work waits, an empty one before all. The source is the stage where least work
    waits, of those from which a move is worth it.
    """
    table = sorted(members, key=lambda member: member.peer)
    for member in table:
        if member.status.moving_to >= 0:
            return Stay(f"{short_id(member.peer)} is moving to stage {member.status.moving_to}")
    held = capacities(plan, table)
    waiting = _waiting(plan, table)
    target = max(range(plan.n_stages), key=lambda s: (held[s] == 0.0, waiting[s], -held[s], -s))
    # Before a run's first step everybody observes, and would for ever beside an empty stage.
    ready = _READY if held[target] == 0.0 else ("training",)
    training = [member for member in table if member.status.state in ready]
    for source in sorted(range(plan.n_stages), key=lambda s: (waiting[s], -held[s], s)):
        movers = [member for member in training if member.stage == source]
        if source == target or len(movers) < 2:  # a stage is never emptied
            continue
        mover, lesser = _most_useful(movers, held[source], held[target], typical_rate(table))
        if lesser > 0.0 and lesser >= held[target] * (1.0 + 1.0 / len(training)):
            return Move(mover.peer, source, target, _worth(source, target, held[target], lesser))
    return Stay(f"no move raises stage {target}, where most work waits, by 1/{len(training)} of what it computes")


def _most_useful(movers: Iterable[Member], source: float, target: float, typical: float) -> tuple[Member, float]:
    """Who of a stage should move, and what the lesser of both stages computes then."""

    def lesser(member: Member) -> float:
        rate = rate_of(member, typical)
        return min(source - rate, target + rate)

    mover = min(movers, key=lambda m: (-lesser(m), _queued(m, typical), m.peer))
    return mover, lesser(mover)


def must_go_back(plan: RunPlan, members: Iterable[Member], me: str) -> str | None:
    """Why `me`, which has said that it moves but has not left its stage yet, has to stay after all; None if not.

    To be asked at every change and once more when stages.SETTLE_S have passed since it said so, before it leaves.
    """
    table = sorted(members, key=lambda member: member.peer)
    mine = next((member for member in table if member.peer == me), None)
    if mine is None:
        return None
    back = f"stays in stage {mine.stage}"
    others = [member for member in table if member.peer != me]
    first = next((member.peer for member in others if member.status.moving_to >= 0 and member.peer < me), None)
    if first is not None:
        return f"{back}: {short_id(first)} moves at the same time and comes first"
    if not any(m.stage == mine.stage and m.status.state in _READY for m in others):
        return f"{back}: nobody else holds it any more"
    held = capacities(plan, [_at_home(member) for member in others])
    if held[goal(mine)] > held[mine.stage]:
        return f"{back}: it computes less than stage {goal(mine)} by now"
    return None


def _at_home(member: Member) -> Member:
    """Who moves at the same time and does not come first will go back."""
    return replace(member, status=msgspec.structs.replace(member.status, moving_to=-1))


@dataclass(eq=False, slots=True)
class Mover:
    """One peer's looks, from when it began to train in its stage (`since_s`) until it leaves it.

    Times are those of one clock, in seconds.
    """

    me: str
    since_s: float
    period_s: float = PERIOD_S
    _looked_s: float | None = None

    def due_s(self, *, empty: bool) -> float:
        """When to look next; `empty`: there is a stage without peers."""
        last_s = self.since_s if self._looked_s is None else self._looked_s
        return last_s + self.period_s / (HASTE if empty else 1.0)

    def decide(self, plan: RunPlan, members: Iterable[Member], now: float, *, fetch_s: float) -> Move | Stay:
        """Whether this peer moves now; `fetch_s` is what fetching the state of a stage takes.

        Who moves says so in its status (`moving_to`), asks `must_go_back`, and only then leaves: in the new stage it is
        a newcomer.
        """
        table = tuple(members)
        empty = 0.0 in capacities(plan, table)
        if now < self.due_s(empty=empty):
            return Stay(f"looks again in {self.due_s(empty=empty) - now:.0f} s")
        self._looked_s = now
        move = best_move(plan, table)
        if isinstance(move, Stay):
            return move
        if move.peer != self.me:
            return Stay(f"{short_id(move.peer)} is to move to stage {move.target}")
        left_s = self.since_s + COOL_DOWN_FETCHES * fetch_s - now
        if left_s > 0.0 and not empty:
            return Stay(f"has come only now: may move to stage {move.target} in {left_s:.0f} s")
        return move


def _waiting(plan: RunPlan, members: Sequence[Member]) -> list[float]:
    """Sequences that wait at a peer of each stage, on average."""
    typical = typical_rate(members)
    queues: list[list[float]] = [[] for _ in range(plan.n_stages)]
    for member in members:
        if member.stage < plan.n_stages and member.status.state in ("training", "leaving"):
            queues[member.stage].append(_queued(member, typical))
    return [sum(queue) / len(queue) if queue else 0.0 for queue in queues]


def _queued(member: Member, typical: float) -> float:
    """Sequences that wait at a peer: seconds alone would make a slow peer's short queue look long."""
    return member.status.queue_s * rate_of(member, typical)


def _worth(source: int, target: int, before: float, after: float) -> str:
    if before == 0.0:
        return f"nobody holds stage {target}"
    return (
        f"most work waits at stage {target}, least at stage {source}: the lesser of the two rises from "
        f"{before:.3g} to {after:.3g} sequences a second"
    )
