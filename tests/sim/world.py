"""A simulated world: nodes, the links between them, their faults, and the log of all that happened.

Everything that is left to chance comes from the seed: the network's dice, the scenario's (`World.rng`) and the order in
which trio runs tasks. So one seed gives one log, and a failing seed is a failing example to keep.
"""

from __future__ import annotations

import hashlib
import random
import zlib
from collections.abc import Awaitable, Callable, Iterable, Iterator
from contextlib import contextmanager

import trio
from trio._core import _run as trio_run
from trio.testing import MockClock

from mycel.protocols.errors import PeerError
from mycel.security.identity import Identity
from tests.sim.agenda import Agenda
from tests.sim.faults import LinkFaults, WorldOptions
from tests.sim.net import Connection, now
from tests.sim.standstill import StandstillGuard
from tests.sim.transport import SimTransport

EPOCH_S = 1_750_000_000.0  # the Unix time at which every world begins
Main = Callable[[SimTransport], Awaitable[None]]
LogEntry = tuple[float, str, *tuple[str, ...]]


class World:
    """Nodes by name. All verbs are instantaneous; what follows from them takes virtual time."""

    def __init__(self, seed: int, options: WorldOptions, nursery: trio.Nursery) -> None:
        self.seed, self.options, self.nursery = seed, options, nursery
        self.rng = random.Random(f"scenario {seed}")
        self.agenda = Agenda()
        self.log: list[LogEntry] = []
        self.handler_errors: list[Exception] = []
        self._dice = random.Random(f"network {seed}")
        self._nodes: dict[str, SimTransport] = {}
        self._links: dict[tuple[str, str], LinkFaults] = {}
        self._connections: list[tuple[Connection, SimTransport, SimTransport]] = []
        self._sides: dict[str, int] = {}  # of a partition; nodes that are not named are on a side of their own
        self._stopped: dict[str, trio.Event] = {}
        self._slowness: dict[str, float] = {}
        self._over = trio.Event()

    # ---- nodes

    def add_node(self, name: str) -> SimTransport:
        """A node that runs, knows nobody and serves nothing. Its identity follows from the seed and its name."""
        if name in self._nodes:
            raise ValueError(f"there is a node {name} already")
        identity = Identity.from_seed(hashlib.sha256(f"{self.seed} {name}".encode()).digest())
        self._nodes[name] = SimTransport(self, name, identity, f"/memory/{len(self._nodes) + 1}")
        self.record("node", name)
        return self._nodes[name]

    def node(self, name: str) -> SimTransport:
        """The current life of a node."""
        return self._nodes[name]

    def nodes(self) -> tuple[SimTransport, ...]:
        """All nodes in order of birth, the crashed ones too."""
        return tuple(self._nodes.values())

    def start(self, name: str, main: Main) -> None:
        """Run `main(transport)` as the node's program: a crash cancels it, and its exception ends the simulation."""
        transport = self._nodes[name]
        transport.start(main, transport)

    def crash(self, name: str) -> None:
        """The node's process is killed: its tasks end, its peers hear of it one latency later."""
        self.record("crash", name)
        self._nodes[name].crash()
        if name in self._stopped:
            self._stopped[name].set()  # killed while it stood still: what it waited for with a shield must end too
        self._let_go(name)

    def restart(self, name: str) -> SimTransport:
        """A new life for a crashed node: same identity and address, nothing served, nobody known."""
        old = self._nodes[name]
        if not old.crashed:
            raise ValueError(f"node {name} is running")
        self.record("restart", name)
        self._nodes[name] = SimTransport(self, name, old.identity, old.addresses[0])
        return self._nodes[name]

    def stop(self, name: str) -> None:
        """SIGSTOP: nothing leaves it and it takes nothing in. Its timers go on: it is cut off rather than frozen."""
        self.record("stop", name)
        self._stopped.setdefault(name, trio.Event())
        self._update_cuts()

    def cont(self, name: str) -> None:
        """SIGCONT."""
        self.record("cont", name)
        self._let_go(name)

    def _let_go(self, name: str) -> None:
        if name in self._stopped:
            self._stopped.pop(name).set()
            self._update_cuts()

    def slow(self, name: str, factor: float) -> None:
        """All that a node computes and sends takes `factor` times as long."""
        self.record("slow", name, f"{factor:g}")
        self._slowness[name] = factor

    def wake_all(self) -> None:
        """Let nothing stand still any more: the world ends, and a shielded wait would outlive it."""
        self._over.set()
        for name in list(self._stopped):
            self._stopped.pop(name).set()

    # ---- links

    def link(self, a: str, b: str, faults: LinkFaults, back: LinkFaults | None = None) -> None:
        """What the way from `a` to `b` is like, and the way back, if it differs; also for connections that are up."""
        self._links[a, b] = faults
        self._links[b, a] = back or faults

    def partition(self, *groups: Iterable[str]) -> None:
        """Nothing passes between groups. Nodes that are in no group form one more."""
        listed = [sorted(group) for group in groups]
        self.record("partition", *(" ".join(group) for group in listed))
        self._sides = {name: side for side, group in enumerate(listed, start=1) for name in group}
        self._update_cuts()

    def heal(self) -> None:
        """End the partition."""
        self.record("heal")
        self._sides = {}
        self._update_cuts()

    def faults(self, source: str, target: str) -> LinkFaults:
        return self._links.get((source, target), self.options.link)

    def slowness(self, name: str) -> float:
        return self._slowness.get(name, 1.0)

    def is_stopped(self, name: str) -> bool:
        return name in self._stopped

    def is_cut(self, a: str, b: str) -> bool:
        """Whether nothing passes between two nodes now."""
        return a in self._stopped or b in self._stopped or self._sides.get(a, 0) != self._sides.get(b, 0)

    async def work(self, name: str, cost_s: float) -> None:
        """Let a node's processor be busy, for longer if the node is slow or stopped; cut short by the world's end."""
        with trio.move_on_after(cost_s * self.slowness(name)):
            await self._over.wait()
        while name in self._stopped:
            await self._stopped[name].wait()

    def _update_cuts(self) -> None:
        self._connections = [entry for entry in self._connections if any(entry[0].alive(side) for side in entry[1:])]
        for connection, dialer, listener in self._connections:
            connection.set_cut(self.is_cut(dialer.name, listener.name))

    # ---- for the parts of the world

    def chances(self, n_numbers: int) -> list[float]:
        """The network's dice."""
        return [self._dice.random() for _ in range(n_numbers)]

    def at_address(self, address: str) -> SimTransport | None:
        return next((node for node in self._nodes.values() if address in node.addresses), None)

    def name_of(self, peer: str) -> str:
        """The name of a peer id, or its end where no node has it."""
        return next((node.name for node in self._nodes.values() if node.peer_id == peer), peer[-8:])

    def add_connection(self, connection: Connection, dialer: SimTransport, listener: SimTransport) -> None:
        self.record("connect", dialer.name, listener.name)
        self._connections.append((connection, dialer, listener))

    def unix_time_s(self) -> float:
        """What a wall clock shows, for records that expire."""
        return EPOCH_S + trio.current_time()

    def record(self, kind: str, *what: str) -> None:
        """Add to the log; scenarios note their decisions with it too."""
        self.log.append((now(), kind, *what))

    def report(self, name: str, protocol: str, error: Exception) -> None:
        """A handler raised. A PeerError is someone else's doing; anything else is a bug that `run_world` raises."""
        self.record("handler failed", name, protocol, f"{type(error).__name__}: {error}")
        if not isinstance(error, PeerError):
            self.handler_errors.append(error)

    def digest(self) -> int:
        """A number for the whole log, to compare across processes."""
        return zlib.crc32(repr(self.log).encode())


def run_world(
    seed: int,
    scenario: Callable[[World], Awaitable[None]],
    *,
    options: WorldOptions | None = None,
    limit_s: float = 3600.0,
) -> World:
    """Run `scenario(world)` to its end in virtual time; the world with its log.

    Raises what the scenario or a node's program raised, TooSlowError after `limit_s` virtual seconds (a hang is over at
    once in real time), AssertionError when tasks run on while time stands still or wait behind a shield for ever, and
    an ExceptionGroup of what handlers raised that was not a PeerError, unless the scenario emptied
    `world.handler_errors`.
    """

    guard = StandstillGuard(limit_s)

    async def main() -> World:
        trio.lowlevel.spawn_system_task(guard.break_shields)
        async with trio.open_nursery() as nursery:
            guard.scope = nursery.cancel_scope
            world = World(seed, options or WorldOptions(), nursery)
            nursery.start_soon(world.agenda.run)
            try:
                with trio.fail_after(limit_s):
                    await scenario(world)
            finally:
                world.wake_all()
            nursery.cancel_scope.cancel()
        return world

    try:
        with _scheduler_of(seed):
            world = trio.run(main, clock=MockClock(autojump_threshold=0), instruments=[guard])
    finally:
        if guard.finding:
            raise AssertionError(guard.finding)
    if world.handler_errors:
        raise ExceptionGroup("handlers failed", world.handler_errors)
    return world


@contextmanager
def _scheduler_of(seed: int) -> Iterator[None]:
    """Let the order in which trio runs tasks follow from the seed. trio's own tests do it in the same way."""
    allowed, state = trio_run._ALLOW_DETERMINISTIC_SCHEDULING, trio_run._r.getstate()
    trio_run._ALLOW_DETERMINISTIC_SCHEDULING = True
    trio_run._r.seed(seed)
    try:
        yield
    finally:
        trio_run._ALLOW_DETERMINISTIC_SCHEDULING = allowed
        trio_run._r.setstate(state)
