"""The trainer: pushes its microbatches through whatever peers are alive, until the step has them all.

One task for each microbatch on its way. It sends the tokens to the first stage and then only hears what becomes of
them: stages pass on to each other. Streams to all peers are kept open, since that is where they report.

Others decide: which peer (wiring), what a walk needs next and which numbers are due (walks).

Ring: shell.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from math import ceil, inf
from random import Random
from typing import Protocol

import torch
import trio
from torch import Tensor

from mycel.protocols import ids
from mycel.protocols.codec import pipe_codec
from mycel.protocols.errors import LocalProtocolError, PeerError, PeerUnreachable, RemoteProtocolError
from mycel.protocols.ports import Stream, Transport
from mycel.protocols.tensors import to_wire
from mycel.protocols.training import Drive, Forward, Passed, StageStatus, WorkFailed
from mycel.protocols.wire import WireTensor
from mycel.swarm.training.bell import Bell
from mycel.swarm.training.members import HEARTBEAT_S, Members
from mycel.swarm.training.plan import RunPlan
from mycel.swarm.training.walks import Finished, Seen, Send, Walk, drivers, due, look, nobody, owned
from mycel.swarm.training.wiring import Wiring

__all__ = ["LocalDoor", "Pipeline", "PipelineCounters", "threaded"]

# Microbatches on their way for each peer: one is computed while the next one arrives.
FLIGHTS_PER_PEER = 2
# A full pipeline on slow links: what the slowest stage does within one walk, and some more for its unevenness.
FLIGHTS_PER_WALK = 1.25
LEAST_REST_S = 0.25
MOST_REST_S = 8.0
_CLOSE_S = 1.0
_SLOWNESS_WEIGHT = 0.1

Report = Passed | WorkFailed
Load = Callable[[int, int], Awaitable[Tensor]]


class EventSink(Protocol):
    """Where a decision is told."""

    def __call__(self, name: str, /, **fields: object) -> None: ...


class SampleSource(Protocol):
    """The run's endless order of samples."""

    def tokens(self, first: int, count: int) -> Tensor:
        """Token ids of sequences [first, first + count): [count, T + 1]."""
        ...


class LocalDoor(Protocol):
    """The stage that this node hosts itself: as over a stream, without one."""

    def drive_locally(self, report: Callable[[Report], None]) -> None:
        """From now on reports on this node's own microbatches go there, at once."""
        ...

    async def forward_locally(self, message: Forward, tokens_BT1: Tensor) -> None:
        """A Forward for stage 0, with its tokens."""
        ...


@dataclass(slots=True)
class PipelineCounters:
    """What the trainer has to show. `mean_s` is a moving average of a walk's time; `wasted`: parts done for nothing."""

    done: int = 0
    replaced: int = 0
    wasted: int = 0
    resent: int = 0
    mean_s: float = 0.0
    in_flight: int = 0


def threaded(samples: SampleSource) -> Load:
    """Samples as the pipeline takes them: read on a worker thread, since files may be slow."""

    async def load(first: int, count: int) -> Tensor:
        return await trio.to_thread.run_sync(samples.tokens, first, count)

    return load


@dataclass(eq=False, slots=True)
class _Link:
    """The stream to one peer, once it is there; reports come over it. `speaking` keeps senders apart."""

    peer: str
    scope: trio.CancelScope = field(default_factory=trio.CancelScope)
    speaking: trio.Lock = field(default_factory=trio.Lock)
    stream: Stream | None = None
    lost: str = ""


@dataclass(eq=False, slots=True)
class _Flight:
    """A walk on its way, and how its task is woken or ended."""

    walk: Walk
    scope: trio.CancelScope = field(default_factory=trio.CancelScope)
    news: Bell = field(default_factory=Bell)


@dataclass(eq=False, slots=True)
class Pipeline:
    """One node's trainer. `version` says which step is on; `in_flight` bounds how many walks are on their way.

    `local` is the stage on the same node, `load` gives the tokens of samples (`threaded`).
    """

    transport: Transport
    plan: RunPlan
    members: Members
    load: Load
    bell: Bell
    event: EventSink
    rng: Random
    version: Callable[[], int]
    local: LocalDoor | None
    in_flight: int
    counters: PipelineCounters = field(default_factory=PipelineCounters, init=False)
    wiring: Wiring = field(init=False)
    _walks: dict[int, Walk] = field(default_factory=dict, init=False)
    _by_work: dict[bytes, _Flight] = field(default_factory=dict, init=False)
    _flights: dict[int, _Flight] = field(default_factory=dict, init=False)
    _links: dict[str, _Link] = field(default_factory=dict, init=False)
    _at: int = field(default=-1, init=False)
    _mine: int = field(default=0, init=False)
    _mine_of: tuple[int, tuple[str, ...]] = field(default=(-1, ()), init=False)
    _quickest_s: float = field(default=inf, init=False)
    _seen: Seen = field(init=False)
    _nursery: trio.Nursery = field(init=False)

    def __post_init__(self) -> None:
        self.wiring = Wiring(self.plan.n_stages, self.rng)
        self._seen = nobody(self.plan.n_stages)

    async def run(self) -> None:
        """Drive this node's share of every step, until cancelled."""
        if self.local is not None:
            self.local.drive_locally(self._hear_locally)
        async with trio.open_nursery() as self._nursery:
            while True:
                rung = self.bell.count
                self._look_around()
                with trio.move_on_after(HEARTBEAT_S):
                    await self.bell.after(rung)

    # ---- looking around: who is there, which step is on, what is due ---------------------------------------------

    def _look_around(self) -> None:
        """Follow the members' table: links, wiring, walks. Nothing here waits."""
        now = trio.current_time()
        if self.version() != self._at:
            self._begin_step()
        self._keep_links()
        seen, stages = look(self.members, self._at, self.plan.n_stages), range(self.plan.n_stages)
        before = tuple(map(self.wiring.peers, stages)), self._seen.ready, self._seen.decided
        for stage, there in enumerate(seen.counted):
            announced = {peer: self._announced(peer) for peer in there if self._can_talk_to(peer)}
            self.wiring.set_peers(stage, announced, now)
        same = before == (tuple(map(self.wiring.peers, stages)), seen.ready, seen.decided)
        news = seen.changed(self._seen)
        self._seen = seen
        for number, flight in self._flights.items():
            if not same or news >> number & 1:
                flight.news.ring()
        self._begin_walks(now)

    def _begin_step(self) -> None:
        """Another version: whatever is on its way belongs to a step that is made, or was taken back."""
        self._at = self.version()
        for flight in self._flights.values():
            flight.scope.cancel()
        self._flights.clear()
        self._walks.clear()
        self._by_work.clear()
        self.counters.in_flight = 0

    def _begin_walks(self, now: float) -> None:
        """Start what is due, as far as there is room; end what another drives now."""
        if self._at >= self.plan.n_steps or self._at != self.version():
            return
        trainers = drivers(self.members)
        if self._mine_of != (self._at, trainers):
            self._mine_of = (self._at, trainers)
            self._mine = owned(self.plan, self._at, trainers, self.transport.peer_id)
        for number in [number for number in self._flights if not self._mine >> number & 1]:
            flight = self._flights.pop(number)
            flight.scope.cancel()
            flight.walk.pause()
        room = max(0, self._room() - len(self._flights))
        for number in due(self._mine, self._seen, self._walks, self._flights, now)[:room] if room else ():
            walk = self._walks.get(number) or Walk(self.plan.work(self._at, number), self.plan.n_stages)
            self._walks[number] = walk
            flight = self._flights[number] = _Flight(walk)
            self._by_work[walk.work.id] = flight
            self._nursery.start_soon(self._drive, flight)
        self.counters.in_flight = len(self._flights)

    def _room(self) -> int:
        """How many walks may be on their way: enough to keep every peer busy, not more because they are slow.

        That is two for each peer, or on slow links what the slowest stage does in the time of the quickest walk. The
        trainers share it by how much each has left to drive: with equal shares whoever has most to do ends alone, and
        the stages wait.
        """
        stages = [self.wiring.peers(stage) for stage in range(self.plan.n_stages)]
        n_peers = sum(map(len, stages))
        rates = [sum(map(self._announced, there)) for there in stages]
        per_walk = min(rates) / self.plan.n_sequences * self._quickest_s if self._quickest_s < inf else 0.0
        wanted = max(FLIGHTS_PER_PEER * n_peers, ceil(FLIGHTS_PER_WALK * per_walk))
        left = self._seen.missing(self.plan.everything)
        mine, all_left = (left & self._mine).bit_count(), left.bit_count()
        return max(1, min(self.in_flight, ceil(wanted * mine / max(1, all_left))))

    def _announced(self, peer: str) -> float:
        member = self.members.get(peer)
        return member.status.sequences_per_s if member is not None else 0.0

    # ---- one microbatch ------------------------------------------------------------------------------------------

    async def _drive(self, flight: _Flight) -> None:
        """The whole walk: tokens, a Forward, and what its trouble asks for, until every stage has counted it."""
        walk = flight.walk
        began_s, failures = trio.current_time(), flight.walk.failures
        with flight.scope:
            tokens_BT1 = (await self.load(walk.work.first, walk.work.count)).to(torch.int32)
            while True:
                if walk.failures > failures:
                    failures = walk.failures
                    await trio.sleep(walk.rest_s)
                heard = flight.news.count
                decision = walk.decide(trio.current_time(), self._seen, self.wiring)
                if isinstance(decision, Finished):
                    break
                if isinstance(decision, Send):
                    self._tell(walk, decision)
                    await self._send(walk, decision, tokens_BT1)
                    continue
                with trio.move_on_at(decision.until_s):
                    await flight.news.after(heard)
        if self._flights.get(walk.work.number) is flight:  # not ended from outside
            self._done(flight, trio.current_time() - began_s)

    def _tell(self, walk: Walk, send: Send) -> None:
        if send.turn > 1:
            self.counters.resent += 1
        for one in send.replaced:
            self.counters.replaced += 1
            self.event(
                "work.replaced",
                version=walk.work.version,
                number=walk.work.number,
                stage=one.stage,
                peer=one.peer,
                by=one.by,
                reason=one.reason,
            )

    async def _send(self, walk: Walk, send: Send, tokens_BT1: Tensor) -> None:
        """Give the walk to its first stage; whoever cannot take it in time is replaced."""
        work, first = walk.work, send.ways[0]
        peer, me = first.peer.peer, self.transport.peer_id
        message = Forward(self.plan.run, work.id, work.version, work.number, send.turn, 0, me, send.ways)
        attached = () if first.has_input else (to_wire(tokens_BT1),)
        with trio.move_on_after(self.wiring.deadline_s(0, peer, work.count)):
            try:
                if peer == me and self.local is not None:
                    await self.local.forward_locally(message, tokens_BT1)
                else:
                    await self._say(peer, message, attached)
            except PeerError as error:
                walk.unreachable(0, peer, error.reason, trio.current_time(), self.wiring)

    async def _say(self, peer: str, message: Forward, tokens: tuple[WireTensor, ...]) -> None:
        link = self._links.get(peer)
        if link is None or link.stream is None:
            raise PeerUnreachable(peer, "there is no stream to it")
        async with link.speaking:
            if (stream := link.stream) is None:
                raise PeerUnreachable(peer, "the stream to it broke")
            try:
                await stream.send(*pipe_codec.encode(message, tokens))
            except LocalProtocolError:
                if link.stream is stream:
                    raise
                raise PeerUnreachable(peer, "the stream to it broke meanwhile") from None  # who listens has reset it

    def _done(self, flight: _Flight, took_s: float) -> None:
        counters, number = self.counters, flight.walk.work.number
        counters.done += 1
        counters.mean_s += (took_s - counters.mean_s) * (_SLOWNESS_WEIGHT if counters.mean_s else 1.0)
        if flight.walk.turn == 1:
            self._quickest_s = min(self._quickest_s, took_s)
        del self._flights[number]
        self._begin_walks(trio.current_time())

    # ---- hearing -------------------------------------------------------------------------------------------------

    def _hear_locally(self, message: Report) -> None:
        """Our own stage reports; it breaks no rules, or that is a bug."""
        self._hear(self.transport.peer_id, message)

    def _hear(self, peer: str, message: Report) -> None:
        """A report goes to its walk. One about a step that is over, or a walk that another drives now, is an echo."""
        flight = self._by_work.get(message.work)
        if flight is None:
            return
        now = trio.current_time()
        if isinstance(message, WorkFailed):
            flight.walk.failed(peer, message, now, self.wiring)
        elif not flight.walk.passed(peer, message, now, self.wiring):
            self.counters.wasted += 1  # it was replaced meanwhile
        flight.news.ring()

    # ---- streams to peers ----------------------------------------------------------------------------------------

    def _can_talk_to(self, peer: str) -> bool:
        if peer == self.transport.peer_id:
            return self.local is not None
        return peer in self._links and self._links[peer].stream is not None

    def _keep_links(self) -> None:
        """A stream to whoever computes or is about to; none to who is gone."""
        wanted = {m.peer: m.status for m in self.members if m.status.state != "joining" and m.peer != self.members.me}
        for peer in self._links.keys() - wanted.keys():
            self._links.pop(peer).scope.cancel()
        for peer in sorted(wanted.keys() - self._links.keys()):
            link = self._links[peer] = _Link(peer)
            self._nursery.start_soon(self._keep_link, link)
        for peer, status in wanted.items():
            self._learn(peer, status)

    def _learn(self, peer: str, status: StageStatus) -> None:
        if status.addresses and self._links[peer].stream is None:
            self.transport.learn(peer, status.addresses)

    async def _keep_link(self, link: _Link) -> None:
        """Open the stream, listen, and open it anew when it breaks, ever more patiently."""
        rest_s = LEAST_REST_S
        with link.scope:
            while True:
                began_s = trio.current_time()
                try:
                    await self._listen(link)
                except PeerError as error:
                    self._lost(link, error)
                if trio.current_time() - began_s > MOST_REST_S:
                    rest_s = LEAST_REST_S
                await trio.sleep(rest_s)
                rest_s = min(2.0 * rest_s, MOST_REST_S)

    async def _listen(self, link: _Link) -> None:
        stream = await self.transport.open(link.peer, ids.PIPE)
        try:
            await stream.send(*pipe_codec.encode(Drive(self.plan.run)))
            link.stream, link.lost = stream, ""
            self.bell.ring()
            while (frame := await stream.receive()) is not None:
                message = pipe_codec.decode_only(frame)
                if not isinstance(message, Report):
                    raise RemoteProtocolError(f"sent {type(message).__name__} to a trainer", link.peer)
                self._hear(link.peer, message)
            raise PeerUnreachable(link.peer, "ended the stream")
        finally:
            link.stream = None
            with trio.move_on_after(_CLOSE_S, shield=True):
                await stream.reset()

    def _lost(self, link: _Link, error: PeerError) -> None:
        """Its walks go elsewhere: nobody would hear of them here."""
        member = self.members.get(link.peer)
        if member is not None and member.stage < self.plan.n_stages:
            self.wiring.failed(member.stage, link.peer, trio.current_time())
        if link.lost != error.reason:  # not with every attempt to open it anew
            link.lost = error.reason
            self.event("work.link_lost", peer=link.peer, reason=error.reason)
        self.bell.ring()
