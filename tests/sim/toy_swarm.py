"""A swarm of toy nodes that a test can watch and break: every message is noted, and every way to fail has a verb.

The directory is as slow as in life: a node that died or stands still is listed until its last record ends.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from typing import TypeVar

import torch
import trio

from mycel.dht.directory import TTL_S, Located
from mycel.dht.records import Announcement
from mycel.node.hop_service import HopService
from mycel.node.kv_budget import KVBudget
from mycel.node.sampling import sample
from mycel.protocols.messages import SamplingParams
from mycel.protocols.ports import Done
from mycel.swarm.generation import NewToken, Request, RouteChosen, SessionEvent
from mycel.swarm.session import InferenceSession
from mycel.swarm.view import View
from tests.sim.compute import SimCompute
from tests.sim.tap import Lie, Tap
from tests.sim.toy import VOCAB, ToyPart, ToySpan
from tests.sim.transport import SimTransport
from tests.sim.world import World

T = TypeVar("T")
SWARM = bytes(range(32))
N_BLOCKS = 8
KV_BYTES = 1 << 20
GREEDY = SamplingParams()
# Hot enough that the toy's logits leave a choice, and a penalty, so that a token depends on all the tokens before.
HOT = SamplingParams(temperature=2.5, top_p=0.95, repetition_penalty=1.7, seed=11)


@cache
def expected_tokens(prompt: tuple[int, ...], n_new: int, sampling: SamplingParams) -> list[int]:
    """What one process alone would generate."""
    part = ToyPart(0, N_BLOCKS, N_BLOCKS)
    cached, tokens = part.new_cache(), list(prompt)
    inputs = tokens[:]
    for position in range(len(prompt), len(prompt) + n_new):
        logits_V = part.logits(part.forward(torch.tensor(inputs), cached)[-1:])[0]
        inputs = [sample(logits_V, tokens, sampling, position)]
        tokens += inputs
    return tokens[len(prompt) :]


class NotedCompute(SimCompute):
    """Says in the world's log when a job comes, so that a test can find the middle of one."""

    async def run(self, job: Callable[[], T], *, cost_s: float = 0.0) -> Done[T]:
        self._world.record("compute", self._name, f"{cost_s:.6f}")
        return await super().run(job, cost_s=cost_s)


@dataclass
class Heard:
    """What a session told its user; `token_times_s` is when each token came."""

    events: trio.MemoryReceiveChannel[SessionEvent]
    n_prompt: int
    tokens: list[int] = field(default_factory=list)
    token_times_s: list[float] = field(default_factory=list)
    routes: list[RouteChosen] = field(default_factory=list)
    finish: str = ""

    @property
    def lost(self) -> list[tuple[str, str]]:
        """Who was replaced, and why."""
        return [one for route in self.routes for one in route.lost]

    async def collect(self) -> None:
        async for event in self.events:
            if isinstance(event, RouteChosen):
                self.routes.append(event)
                continue
            assert isinstance(event, NewToken)
            assert event.position == self.n_prompt + len(self.tokens), "one event for each position, in order"
            assert not self.finish, "a token after the last"
            self.tokens.append(event.token)
            self.token_times_s.append(trio.current_time())
            self.finish = event.finish


@dataclass
class ToySwarm:
    """Nodes of a world that serve the toy, by name, and the directory that lists them."""

    world: World
    services: dict[str, HopService] = field(default_factory=dict)
    taps: dict[str, Tap] = field(default_factory=dict)
    _queues_s: dict[str, float] = field(default_factory=dict)
    _gone_at_s: dict[str, float] = field(default_factory=dict)
    _cut: set[frozenset[str]] = field(default_factory=set)

    def __post_init__(self) -> None:
        sides_differ = self.world.is_cut
        self.world.is_cut = lambda a, b: frozenset((a, b)) in self._cut or sides_differ(a, b)  # type: ignore[method-assign]

    # ---- nodes

    def serve(self, name: str, start: int, end: int, *, block_time_s: float = 0.01, queue_s: float = 0.0) -> None:
        """`queue_s` is what it announces, so that others are chosen first; it is as fast as they are."""
        self._queues_s[name] = queue_s
        self._serve(self.world.add_node(name), start, end, block_time_s)

    def add_client(self, name: str) -> None:
        self.taps[name] = Tap(self.world, self.world.add_node(name))

    def _serve(self, transport: SimTransport, start: int, end: int, block_time_s: float) -> None:
        name = transport.name

        def event(what: str, /, **fields: object) -> None:
            self.world.record(what, name, *(str(value) for value in fields.values()))

        self.taps[name] = Tap(self.world, transport)
        span, compute = ToySpan(start, end, N_BLOCKS, block_time_s), NotedCompute(self.world, name)
        service = HopService(transport, SWARM, span, compute, KVBudget(KV_BYTES), event)
        service.start()
        self.services[name] = service

    def name_of(self, peer: str) -> str:
        return self.world.name_of(peer)

    def is_down(self, name: str) -> bool:
        return self.world.node(name).crashed or self.world.is_stopped(name)

    # ---- ways to fail, and to come back

    def crash(self, name: str) -> None:
        self._gone_at_s[name] = trio.current_time()
        self.world.crash(name)

    def restart(self, name: str) -> None:
        """A new process with the same key: it knows nothing of the sessions before."""
        old = self.services[name]
        span = old.span
        assert isinstance(span, ToySpan)
        transport = self.world.restart(name)
        self._serve(transport, span.start, span.end, span.block_time_s)
        self._gone_at_s.pop(name, None)

    def leave(self, name: str, within_s: float = 30.0) -> None:
        """A planned exit: the node hands its sessions over and ends."""

        async def leave() -> None:
            await self.services[name].leave(within_s)
            if not self.world.node(name).crashed:
                self.world.record("left", name)
                self.crash(name)

        self.world.record("leaves", name)
        self.world.nursery.start_soon(leave)

    def stop(self, name: str) -> None:
        self._gone_at_s[name] = trio.current_time()
        self.world.stop(name)

    def cont(self, name: str) -> None:
        self._gone_at_s.pop(name, None)
        self.world.cont(name)

    def cut(self, a: str, b: str) -> None:
        """Nothing passes between these two, while both reach everybody else."""
        self._cut.add(frozenset((a, b)))
        self.world.record("cut", a, b)
        self.world._update_cuts()

    def mend_link(self, a: str, b: str) -> None:
        self._cut.discard(frozenset((a, b)))
        self.world.record("mended", a, b)
        self.world._update_cuts()

    def drop_connection(self, a: str, b: str) -> None:
        """The connection between two living nodes is reset; both hear of it, and may connect again."""
        one, other = self.world.node(a), self.world.node(b)
        connection = one._connections.get(other.peer_id)
        if connection is not None:
            self.world.record("dropped", a, b)
            connection.lose(one, "reset by the test")
            connection.lose(other, "reset by the test")

    def break_streams(self, a: str, b: str, protocol: str) -> None:
        """The streams of one protocol between two nodes break for both of them; their connection stays."""
        one, other = self.world.node(a), self.world.node(b)
        connection = one._connections.get(other.peer_id)
        for (owner, stream_id), stream in list(connection._streams.items()) if connection is not None else ():
            if stream.protocol == protocol:
                self.world.record("broke", a, b, protocol)
                connection.drop_lane(owner, stream_id)
                connection.remove(owner, stream_id)
                stream.on_broken("the stream was reset by the test")

    def lie(self, name: str, lie: Lie) -> None:
        """From now on the node says something false wherever it can."""
        self.world.record("lies", name, lie)
        self.taps[name].lie = lie

    def refuse(self, name: str, how: str) -> None:
        """From now on it admits nothing: it is full, or leaving."""
        service = self.services[name]
        self.world.record("refuses", name, how)
        if how == "full":
            service.budget.total_bytes = service.budget.reserved_bytes
        else:
            service.leaving = True

    # ---- the directory

    async def view(self, *, fresh: bool = False) -> View:
        if fresh:
            await trio.sleep(0.05)
        view = View(N_BLOCKS)
        for seq, (name, service) in enumerate(self.services.items()):
            if trio.current_time() - self._gone_at_s.get(name, trio.current_time()) >= TTL_S:
                continue
            span, transport = service.span, self.world.node(name)
            assert isinstance(span, ToySpan)
            announcement = Announcement(
                SWARM,
                span.start,
                span.end,
                state="leaving" if service.leaving and not self.is_down(name) else "serving",
                addresses=transport.addresses,
                block_time_s=span.block_time_s,
                queue_s=self._queues_s[name],
                kv_free_tokens=10_000,
                kv_total_tokens=10_000,
            )
            view = view.apply(Located(transport.peer_id, announcement, seq, 1e12))
        return view

    # ---- generating

    def session(
        self,
        prompt: tuple[int, ...],
        n_new: int,
        sampling: SamplingParams = GREEDY,
        *,
        client: str = "client",
        patience_s: float = 60.0,
    ) -> tuple[InferenceSession, Heard]:
        send, receive = trio.open_memory_channel[SessionEvent](0)
        request = Request(prompt, n_new, sampling, patience_s=patience_s, vocab_size=VOCAB)
        session = InferenceSession(
            self.world.node(client),
            self,
            SWARM,
            request,
            send,
            rng=self.world.rng,
            session_id=self.world.rng.randbytes(16),
        )
        return session, Heard(receive, len(prompt))

    def left_over(self) -> list[str]:
        """Sessions and memory that living nodes still hold."""
        return [
            f"{name}: {len(service.sessions)} sessions, {service.budget.reserved_bytes} bytes"
            for name, service in self.services.items()
            if not self.is_down(name) and (service.sessions or service.budget.reserved_bytes)
        ]

    def check_budgets(self) -> None:
        """What is reserved is what the open sessions need, and never more than there is."""
        for name, service in self.services.items():
            if self.world.node(name).crashed:
                continue
            reserved = service.budget.reserved_bytes
            assert reserved >= 0, f"{name}: {reserved} bytes reserved"
            assert reserved == needed_bytes(service), f"{name}: {reserved} bytes for {len(service.sessions)} sessions"


def needed_bytes(service: HopService) -> int:
    openings = [session.machine.opening for session in service.sessions.values()]
    return sum(service.span.session_bytes(o.start, o.end, o.max_tokens) for o in openings)
