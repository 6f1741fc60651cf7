"""One generation with faults at exact moments: walked once undisturbed to find the moments, then again with the faults.

The simulation is deterministic, so a walk with a fault at second t is the same walk until t.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from itertools import takewhile

import pytest
import trio

from mycel.protocols.errors import MycelError
from mycel.protocols.messages import SamplingParams
from tests.sim.faults import LinkFaults, WorldOptions
from tests.sim.toy_swarm import Heard, ToySwarm
from tests.sim.world import LogEntry, World, run_world

LATENCY_S = 0.005
SPANS = ((0, 2), (2, 6), (6, 8))
# Three chunks of prefill, so that hops overlap in it.
PROMPT = tuple((7 * i * i + 3) % 97 for i in range(20))
CHUNK_TOKENS = 8
N_NEW = 8
SETTLE_S = 40.0

# What happens at a moment: called with the swarm when it comes.
Act = Callable[[ToySwarm], None]


@dataclass(frozen=True)
class Fault:
    """`act` at virtual second `at_s`. Equal names are equal faults."""

    at_s: float
    name: str
    act: Act = field(compare=False)


@dataclass
class Walk:
    """A generation that is over: the log of its world, what the client heard, and what went wrong."""

    log: list[LogEntry]
    heard: Heard
    error: MycelError | None
    ended_s: float
    left_over: list[str]
    names: dict[str, str]

    @property
    def lost(self) -> list[str]:
        """Names of those who were replaced."""
        return [self.names[peer] for peer, _ in self.heard.lost]

    def said(self, sender: str, receiver: str, kind: str, nth: int = 0) -> float:
        """When `sender` gave `receiver` its nth message of a kind."""
        return self._times(lambda entry: entry[1:] == ("said", sender, receiver, kind))[nth]

    def computes(self, name: str, nth: int = 0) -> float:
        """When a node's nth job came."""
        return self._times(lambda entry: entry[1:3] == ("compute", name))[nth]

    def token(self, nth: int) -> float:
        """When the client had its nth token."""
        return self.heard.token_times_s[nth]

    def _times(self, matches: Callable[[LogEntry], bool]) -> list[float]:
        return [entry[0] for entry in self.log if matches(entry)]

    def until(self, at_s: float) -> list[LogEntry]:
        """What happened before, to compare with another walk."""
        return list(takewhile(lambda entry: entry[0] < at_s - 1e-6, self.log))

    def pause_s(self, at_s: float) -> float:
        """From `at_s` to the next token."""
        return next((came for came in self.heard.token_times_s if came > at_s), self.ended_s) - at_s


def in_flight(sent_s: float) -> float:
    """Between the sending and the delivery of a message."""
    return sent_s + LATENCY_S / 2


def delivered(sent_s: float) -> float:
    """Just after a message has come."""
    return sent_s + LATENCY_S + 1e-4


def walk(
    seed: int,
    faults: tuple[Fault, ...],
    *,
    spans: tuple[tuple[int, int], ...] = SPANS,
    sampling: SamplingParams,
    n_new: int = N_NEW,
) -> Walk:
    """Generate over the chain a0, a1, ... while the faults happen; b0, b1, ... stand by, and c0, c1, ..."""
    walks: list[Walk] = []

    async def scenario(world: World) -> None:
        swarm = ToySwarm(world)
        for index, (start, end) in enumerate(spans):
            for letter, queue_s in (("a", 0.0), ("b", 10.0), ("c", 1000.0)):
                swarm.serve(f"{letter}{index}", start, end, queue_s=queue_s)
        swarm.add_client("client")
        for fault in faults:
            world.agenda.after(fault.at_s, lambda act=fault.act: act(swarm))
        session, heard = swarm.session(PROMPT, n_new, sampling)
        error: MycelError | None = None
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(heard.collect)
                await session.run()
        except* MycelError as group:
            error = _first(group)
        ended_s = trio.current_time()
        await trio.sleep(SETTLE_S)
        swarm.check_budgets()
        names = {node.peer_id: node.name for node in world.nodes()}
        walks.append(Walk(world.log, heard, error, ended_s, swarm.left_over(), names))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mycel.protocols.hop.MAX_STEP_TOKENS", CHUNK_TOKENS)
        # The toy's state is always small: what a link carries decides all the same.
        patch.setattr("mycel.swarm.handover.SMALL_STATE_BYTES", 0)
        run_world(seed, scenario, options=WorldOptions(link=LinkFaults(latency_s=LATENCY_S)), limit_s=600.0)
    return walks[0]


@cache
def walk_once(
    seed: int,
    faults: tuple[Fault, ...],
    spans: tuple[tuple[int, int], ...],
    sampling: SamplingParams,
    n_new: int = N_NEW,
) -> Walk:
    """As `walk`, for the walks from which moments are taken: many cells share one."""
    return walk(seed, faults, spans=spans, sampling=sampling, n_new=n_new)


def _first(group: BaseExceptionGroup[MycelError]) -> MycelError:
    error: BaseException = group
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    assert isinstance(error, MycelError)
    return error
