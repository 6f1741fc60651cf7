"""A hop leaves as planned, and at every step of its exit somebody dies: equal tokens, and only who failed is blamed.

Undisturbed, an exit costs no pause; when its successor dies another takes its place, and a leaver that dies is a lost
hop as any other.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import pairwise, product

import pytest

from mycel.protocols.messages import SamplingParams
from tests.sim.kills import PROMPT, SPANS, Fault, Walk, in_flight, walk, walk_once
from tests.sim.test_kill_matrix import KILLED, PLACES, REFUSALS, SOME_WAYS, STOPPED, Place, Way
from tests.sim.toy_swarm import GREEDY, HOT, ToySwarm, expected_tokens

SEED = 7
N_NEW = 20
LEAVES_AT = 2
ONE_HOP = ((0, 8),)
# Bytes a second of a link over which replaying the toy's history is quicker than pushing its state.
SLOW_LINK = 2000.0


@dataclass(frozen=True)
class Exit:
    """Who leaves and who takes over; if the link between them is known to be slow, the history is replayed."""

    index: int
    slow: bool = False
    spans: tuple[tuple[int, int], ...] = SPANS

    @property
    def leaver(self) -> Place:
        return Place.of(self.index, "a", len(self.spans))

    @property
    def successor(self) -> Place:
        return Place.of(self.index, "b", len(self.spans))

    def faults(self, sampling: SamplingParams) -> tuple[Fault, ...]:
        leaver, successor = self.leaver.name, self.successor.name
        calm = walk_once(SEED, (), self.spans, sampling, N_NEW)
        leaving = Fault(calm.token(LEAVES_AT) + 1e-4, f"{leaver} leaves", lambda swarm: swarm.leave(leaver))
        return (Fault(0.0, "slow", partial(_know_slow_link, leaver, successor)), leaving) if self.slow else (leaving,)


def _know_slow_link(leaver: str, successor: str, swarm: ToySwarm) -> None:
    swarm.services[leaver].rates.learn(swarm.world.node(successor).peer_id, SLOW_LINK)


# ---- the steps of an exit, by who says what to whom ------------------------------------------------------------------

Says = Callable[[Exit], tuple[str, str, str, int]]


def said(sender: str, receiver: str, kind: str, nth: int = 0) -> Says:
    """`sender` and `receiver` are roles: client, leaver, successor, before, behind."""

    def says(exit_: Exit) -> tuple[str, str, str, int]:
        names = {
            "client": "client",
            "leaver": exit_.leaver.name,
            "successor": exit_.successor.name,
            "before": exit_.leaver.previous,
            "behind": exit_.leaver.following,
        }
        return names[sender], names[receiver], kind, nth

    return says


STEPS: dict[str, Says] = {
    "told": said("leaver", "client", "Leaving"),
    "asking the successor": said("client", "successor", "OpenHop"),
    "successor open": said("successor", "client", "HopOpened"),
    "asked to hand over": said("client", "leaver", "HandOver"),
    "beginning to give": said("leaver", "successor", "GiveState"),
    "giving": said("leaver", "successor", "StatePart", 3),
    "taken": said("successor", "leaver", "StateTaken", 3),
    "handed over": said("leaver", "client", "HandedOver"),
    "spare link asked for": said("client", "before", "Relink"),
    "asked how far": said("client", "successor", "AskProgress"),
    "far enough": said("successor", "client", "Progress"),
    "switching the hop before": said("client", "before", "Relink", 1),
    "switching the hop behind": said("client", "behind", "Relink"),
    "first step after": said("successor", "behind", "Attach"),
}
# A first hop has the tokens, so nothing fills it before the switch: its predecessor is told once.
NOT_OF_THE_FIRST = ("spare link asked for",)
REPLAYING: dict[str, Says] = {
    "nothing to be given": said("leaver", "successor", "GiveState"),
    "handed over": STEPS["handed over"],
    "spare link asked for": STEPS["spare link asked for"],
    "attaching the spare link": said("before", "successor", "Attach"),
    "replaying": said("before", "successor", "Step"),
    "far enough": STEPS["far enough"],
    "switching the hop behind": STEPS["switching the hop behind"],
}


@dataclass(frozen=True)
class Cell:
    """In the middle of a step of an exit, a victim fails in a way."""

    name: str
    exit: Exit
    says: Says
    victim: Place
    way: Way

    @property
    def sampling(self) -> SamplingParams:
        return HOT if zlib.crc32(self.name.encode()) % 2 else GREEDY

    def moment(self, calm: Walk) -> float:
        return in_flight(calm.said(*self.says(self.exit)))


def cells() -> Iterator[Cell]:
    for index, where in enumerate(PLACES):
        for slow, steps in ((False, STEPS), (True, REPLAYING)):
            exit_ = Exit(index, slow)
            for (step, says), (role, victim, ways) in product(steps.items(), victims(exit_)):
                if index == 0 and (slow or step in NOT_OF_THE_FIRST):
                    continue
                refusals = REFUSALS if step == "asking the successor" and role == "successor" else ()
                for way in (*ways, *refusals):
                    kind = " by replay" if slow else ""
                    name = f"the {where} hop leaves{kind}, {step}, {role} {way.name}"
                    yield Cell(name, exit_, says, victim, way)


def victims(exit_: Exit) -> tuple[tuple[str, Place, tuple[Way, ...]], ...]:
    before, behind = Place.of((exit_.index - 1) % 3), Place.of((exit_.index + 1) % 3)
    return (
        ("leaver", exit_.leaver, (KILLED, STOPPED)),
        ("successor", exit_.successor, SOME_WAYS if exit_.index == 1 and not exit_.slow else (KILLED, STOPPED)),
        ("the hop before", before, (KILLED,)),
        ("the hop behind", behind, (KILLED,)),
    )


ALL = {cell.name: cell for cell in cells()}
FAST = (
    "the first hop leaves, giving, leaver killed",
    "the middle hop leaves, far enough, successor killed",
    "the last hop leaves by replay, replaying, the hop before killed",
)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in FAST else pytest.mark.slow, id=name) for name in ALL]
)
def test_equal_tokens_and_only_who_failed_is_blamed(name: str) -> None:
    cell = ALL[name]
    before = cell.exit.faults(cell.sampling)
    calm = walk_once(SEED, before, SPANS, cell.sampling, N_NEW)
    at_s = cell.moment(calm)
    fault = Fault(at_s, name, partial(cell.way.act, at=cell.victim))
    done = walk(SEED, (*before, fault), sampling=cell.sampling, n_new=N_NEW)
    assert done.until(at_s) == calm.until(at_s), "the walks differ before the fault"
    assert done.error is None
    assert done.heard.tokens == expected_tokens(PROMPT, N_NEW, cell.sampling)
    assert set(done.lost) <= {getattr(cell.victim, role) for role in cell.way.blames} | {cell.victim.name}, (
        done.heard.lost
    )
    assert done.pause_s(at_s) <= cell.way.longest_s
    if cell.way is KILLED:
        last = {done.names[hop.peer.peer] for hop in done.heard.routes[-1].hops}
        assert not last & {cell.exit.leaver.name, cell.victim.name}
    assert not done.left_over


@pytest.mark.parametrize("sampling", [GREEDY, HOT], ids=["greedy", "sampled"])
@pytest.mark.parametrize(
    "exit_",
    [Exit(0), Exit(1), Exit(2), Exit(1, slow=True), Exit(2, slow=True), Exit(0, spans=ONE_HOP)],
    ids=["first", "middle", "last", "middle by replay", "last by replay", "only"],
)
def test_an_exit_is_not_noticed(exit_: Exit, sampling: SamplingParams) -> None:
    faults = exit_.faults(sampling)
    done = walk(SEED, faults, spans=exit_.spans, sampling=sampling, n_new=N_NEW)
    assert done.error is None
    assert done.heard.tokens == expected_tokens(PROMPT, N_NEW, sampling)
    assert done.lost == []
    assert [done.names[peer] for route in done.heard.routes for peer, _ in route.moved] == [exit_.leaver.name]
    assert max(later - sooner for sooner, later in pairwise(done.heard.token_times_s)) < 1.0
    [left_s] = [entry[0] for entry in done.log if entry[1:] == ("left", exit_.leaver.name)]
    assert left_s < done.ended_s, "it waited for the end of the session"
    assert not done.left_over


def test_the_fast_cells_are_cells() -> None:
    assert set(FAST) <= set(ALL)
