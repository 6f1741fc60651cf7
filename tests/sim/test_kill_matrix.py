"""Every state of a session, every way to die, every place in the chain: equal tokens, and only who failed is blamed.

A cell is a state, the hops that fail in it and how. The moment of a state is read off a walk without the fault.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import product

import pytest

from mycel.protocols import ids
from mycel.protocols.messages import SamplingParams
from tests.sim.kills import LATENCY_S, N_NEW, PROMPT, SPANS, Fault, Walk, delivered, in_flight, walk, walk_once
from tests.sim.toy_swarm import GREEDY, HOT, ToySwarm, expected_tokens

SEED = 7
ONE_HOP = ((0, 8),)
PLACES = ("first", "middle", "last")


@dataclass(frozen=True)
class Place:
    """A hop of the chain and who stands beside it; `sends` is what it says to the next, or to the client if alone."""

    name: str
    previous: str
    following: str
    sends: str

    @classmethod
    def of(cls, index: int, letter: str = "a", n_hops: int = len(SPANS)) -> Place:
        sends = "Sampled" if n_hops == 1 else "NextToken" if index == n_hops - 1 else "Step"
        if n_hops == 1:
            return cls(f"{letter}0", "client", "client", sends)
        return cls(f"{letter}{index}", f"a{(index - 1) % n_hops}", f"a{(index + 1) % n_hops}", sends)


# ---- states of a chain that is set up for the first time: their moments, for a place ---------------------------------

Moment = Callable[[Walk, Place], float]


def connecting(calm: Walk, place: Place) -> float:
    """The client dials it."""
    return calm.said("client", place.name, "OpenHop") - 3 * LATENCY_S


def asked(calm: Walk, place: Place) -> float:
    """OpenHop is on its way."""
    return in_flight(calm.said("client", place.name, "OpenHop"))


def answering(calm: Walk, place: Place) -> float:
    """HopOpened is on its way."""
    return in_flight(calm.said(place.name, "client", "HopOpened"))


def opened(calm: Walk, place: Place) -> float:
    """The client knows that it is open; the first hop has just begun with the prompt."""
    return delivered(calm.said(place.name, "client", "HopOpened"))


def prefilling(calm: Walk, place: Place) -> float:
    """In the middle of a chunk of the prompt."""
    return calm.computes(place.name, 1) + 0.015


def sending_a_chunk(calm: Walk, place: Place) -> float:
    """The output of a chunk is on its way; of the last hop, the first token."""
    return in_flight(calm.said(place.name, place.following, place.sends))


def being_sent_to(calm: Walk, place: Place) -> float:
    """What the hop before put out is on its way to it."""
    kind = "Step" if place.sends != "Step" or place.name != "a0" else "NextToken"
    return in_flight(calm.said(place.previous, place.name, kind, 5))


def decoding(calm: Walk, place: Place) -> float:
    """In the middle of a token."""
    return calm.computes(place.name, 7) + 0.008


def sending_a_token(calm: Walk, place: Place) -> float:
    """What it put out for one token is on its way."""
    return in_flight(calm.said(place.name, place.following, place.sends, 5))


def between_tokens(calm: Walk, place: Place) -> float:
    """The client has just heard a token."""
    return calm.token(4) + 1e-4


def last_token(calm: Walk, place: Place) -> float:
    """The last token is on its way to the client."""
    return calm.token(N_NEW - 1) - LATENCY_S / 2


def closing(calm: Walk, place: Place) -> float:
    """The client has its last token; its farewell is on its way."""
    return calm.token(N_NEW - 1) + LATENCY_S / 2


OPENING = {"connecting": connecting, "asked": asked}
FIRST_CHAIN: dict[str, Moment] = {
    **OPENING,
    "answering": answering,
    "opened": opened,
    "prefilling": prefilling,
    "sending a chunk": sending_a_chunk,
    "being sent to": being_sent_to,
    "decoding": decoding,
    "sending a token": sending_a_token,
    "between tokens": between_tokens,
    "last token": last_token,
    "closing": closing,
}

# ---- states of a chain that is being mended, its hop there killed; the place is the replacement's --------------------


def relinking(calm: Walk, place: Place) -> float:
    """Relink is on its way to the neighbours."""
    return in_flight(calm.said("client", place.previous, "Relink"))


def attaching(calm: Walk, place: Place) -> float:
    """The hop before is opening its link to the replacement."""
    return in_flight(calm.said(place.previous, place.name, "Attach"))


def refilling(calm: Walk, place: Place) -> float:
    """The replacement computes the history."""
    return calm.computes(place.name) + 0.01


def sending_the_rest(calm: Walk, place: Place) -> float:
    """The replacement gives the hop behind it what that may lack."""
    return in_flight(calm.said(place.name, place.following, place.sends))


MENDING: dict[str, Moment] = {
    **OPENING,
    "answering": answering,
    "relinking": relinking,
    "attaching": attaching,
    "refilling": refilling,
    "sending the rest": sending_the_rest,
}

BEFORE_THE_CHAIN = (connecting, asked, answering)
LINKED = (being_sent_to, decoding, sending_a_token, between_tokens, last_token, closing)

# ---- ways to die -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Way:
    """How a hop fails, and who may be held to have failed: nobody, it alone, or either end of a link."""

    name: str
    act: Callable[[ToySwarm, Place], None]
    blames: frozenset[str] = frozenset({"name"})
    longest_s: float = 1.2


def stop_for(seconds: float) -> Callable[[ToySwarm, Place], None]:
    def act(swarm: ToySwarm, at: Place) -> None:
        swarm.stop(at.name)
        swarm.world.agenda.after(seconds, lambda: swarm.cont(at.name))

    return act


NOBODY: frozenset[str] = frozenset()
EITHER_END = frozenset({"name", "following"})
# Silence takes 5 s to show on a connection; asking the hops shows it in 2 s, if there are others who answer.
SILENT_S = 6.5
ASKED_S = 3.5
KILLED = Way("killed", lambda swarm, at: swarm.crash(at.name))
STOPPED = Way("stopped", lambda swarm, at: swarm.stop(at.name), longest_s=SILENT_S)
WAYS = (
    KILLED,
    STOPPED,
    Way("stopped for 9 s", stop_for(9.0), longest_s=SILENT_S),
    Way("cut off from the client", lambda swarm, at: swarm.cut(at.name, "client"), longest_s=SILENT_S),
    Way("connection to the client reset", lambda swarm, at: swarm.drop_connection(at.name, "client")),
    Way("stream to the client broke", lambda swarm, at: swarm.break_streams(at.name, "client", ids.SESSION)),
)
# Once the links are there, so short a silence is no loss. (While dialling it is: the simulated dial waits for no one.)
HICCUP = Way("stopped for 0.7 s", stop_for(0.7), NOBODY, longest_s=SILENT_S)
LINK_WAYS = (
    Way("cut off from the next", lambda swarm, at: swarm.cut(at.name, at.following), EITHER_END, longest_s=SILENT_S),
    Way("connection to the next reset", lambda swarm, at: swarm.drop_connection(at.name, at.following), EITHER_END),
    Way("link to the next broke", lambda swarm, at: swarm.break_streams(at.name, at.following, ids.RING), EITHER_END),
    # Of the last hop: a token that no vocabulary has.
    Way("says NaN", lambda swarm, at: swarm.lie(at.name, "nan")),
)
# One in each state and place, by turns.
LIES = (
    Way("says a gap", lambda swarm, at: swarm.lie(at.name, "gap")),
    Way("says garbage", lambda swarm, at: swarm.lie(at.name, "garbage")),
    Way("says a wrong shape", lambda swarm, at: swarm.lie(at.name, "shape")),
)
SOME_WAYS = tuple(
    way
    for way in (*WAYS, *LINK_WAYS)
    if way.name not in ("stopped for 9 s", "connection to the client reset", "connection to the next reset")
)
REFUSALS = (
    Way("full", lambda swarm, at: swarm.refuse(at.name, "full"), NOBODY),
    Way("leaving", lambda swarm, at: swarm.refuse(at.name, "leaving"), NOBODY),
)

# ---- the matrix ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cell:
    """What is killed before leads to the state; then the way happens to every victim, at the moment of `subject`."""

    name: str
    moment: Moment
    subject: Place
    victims: tuple[Place, ...]
    way: Way
    spans: tuple[tuple[int, int], ...] = SPANS
    killed_before: str = ""

    @property
    def sampling(self) -> SamplingParams:
        """Half of the cells are greedy, half are not; which does not change from run to run."""
        return HOT if zlib.crc32(self.name.encode()) % 2 else GREEDY

    def may_be_blamed(self) -> set[str]:
        blamed = {getattr(place, role) for place in self.victims for role in self.way.blames}
        return blamed | {self.killed_before}

    def must_be_lost(self) -> set[str]:
        """Who was part of the chain, is gone and still needed."""
        gone = self.way in (KILLED, STOPPED) and self.moment not in (*BEFORE_THE_CHAIN, last_token, closing)
        return {self.killed_before} - {""} | ({place.name for place in self.victims} if gone else set())

    @property
    def longest_s(self) -> float:
        alone = len(self.victims) == len(self.spans)
        return ASKED_S if self.way is STOPPED and self.moment in LINKED and not alone else self.way.longest_s

    def walk_before(self) -> tuple[Walk, tuple[Fault, ...]]:
        """The walk without the fault of this cell: who is killed before is, as the fifth token comes."""
        before: tuple[Fault, ...] = ()
        if self.killed_before:
            calm = walk_once(SEED, (), self.spans, self.sampling)
            before = (killing(self.killed_before, calm.token(4) + 1e-4),)
        return walk_once(SEED, before, self.spans, self.sampling), before


def killing(name: str, at_s: float) -> Fault:
    return Fault(at_s, f"kill {name}", lambda swarm: swarm.crash(name))


def cells() -> Iterator[Cell]:
    for turn, (state, moment) in enumerate(FIRST_CHAIN.items()):
        refusals = REFUSALS if moment in OPENING.values() else ()
        hiccups = (HICCUP,) if moment in LINKED else ()
        for index, where in enumerate(PLACES):
            for way in (*WAYS, *LINK_WAYS, LIES[(turn + index) % len(LIES)], *refusals, *hiccups):
                yield one(f"{state}, {where} {way.name}", moment, Place.of(index), way)
        alone = Place.of(0, n_hops=1)
        for way in (*WAYS, *refusals) if moment is not being_sent_to else ():
            yield Cell(f"{state}, only {way.name}", moment, alone, (alone,), way, ONE_HOP)
    yield from several_at_once()
    yield from cells_of_mending()


def one(name: str, moment: Moment, place: Place, way: Way) -> Cell:
    return Cell(name, moment, place, (place,), way)


def several_at_once() -> Iterator[Cell]:
    for state in ("asked", "opened", "prefilling", "sending a token", "between tokens", "last token"):
        for who in ((0, 1), (1, 2), (0, 2), (0, 1, 2)):
            for way in (KILLED, STOPPED):
                places = tuple(Place.of(index) for index in who)
                where = " and ".join(PLACES[index] for index in who)
                yield Cell(f"{state}, {where} {way.name}", FIRST_CHAIN[state], places[0], places, way)


def cells_of_mending() -> Iterator[Cell]:
    for (state, moment), (index, where) in product(MENDING.items(), enumerate(PLACES)):
        new, before, behind = Place.of(index, "b"), Place.of((index - 1) % 3), Place.of((index + 1) % 3)
        refusals = REFUSALS if moment in OPENING.values() else ()
        victims = [(new, "the replacement", (*SOME_WAYS, *refusals))]
        victims += [(before, "the hop before", (KILLED, STOPPED)), (behind, "the hop behind", (KILLED, STOPPED))]
        for victim, role, ways in victims:
            for way in ways:
                name = f"mending the {where}, {state}, {role} {way.name}"
                yield Cell(name, moment, new, (victim,), way, killed_before=f"a{index}")


ALL = {cell.name: cell for cell in cells()}
FAST = (
    "connecting, middle killed",
    "asked, last full",
    "prefilling, first killed",
    "prefilling, only stopped",
    "sending a chunk, middle says NaN",
    "sending a token, last killed",
    "sending a chunk, last stopped",
    "being sent to, middle connection to the next reset",
    "between tokens, first cut off from the client",
    "between tokens, first and middle and last killed",
    "last token, last stopped",
    "mending the middle, refilling, the replacement killed",
    "mending the last, relinking, the hop before stopped",
)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in FAST else pytest.mark.slow, id=name) for name in ALL]
)
def test_equal_tokens_and_only_who_failed_is_blamed(name: str) -> None:
    cell = ALL[name]
    calm, before = cell.walk_before()
    at_s = cell.moment(calm, cell.subject)
    faults = tuple(Fault(at_s, name, partial(cell.way.act, at=place)) for place in cell.victims)
    done = walk(SEED, (*before, *faults), spans=cell.spans, sampling=cell.sampling)
    assert done.until(at_s) == calm.until(at_s), "the walks differ before the fault"
    assert done.error is None
    assert done.heard.tokens == expected_tokens(PROMPT, N_NEW, cell.sampling)
    assert done.heard.finish == "length"
    assert cell.must_be_lost() <= set(done.lost) <= cell.may_be_blamed(), done.heard.lost
    assert done.pause_s(at_s) <= cell.longest_s
    assert not done.left_over


def test_the_fast_cells_are_cells() -> None:
    assert set(FAST) <= set(ALL)
