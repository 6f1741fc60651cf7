"""Groups of peers in a world where they can be killed, cut off and started, each with a folder that outlives it.

Every peer contributes numbers that follow from its name and the round, and adds up what the rounds bring. What must
never be broken is held against all of them whenever a round is over: one outcome of each round, results that are the
mean of just the contributions in it, one state after it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from unittest.mock import patch

import numpy as np
import trio

from mycel.node.rounds.blobs import BlobExchange
from mycel.node.rounds.bodies import Reducer
from mycel.node.rounds.group import Committed, Contribution, Group, GroupPlace, GroupPorts, NeedState, Standing
from mycel.node.rounds.round_streams import RoundDoor
from mycel.protocols.messages import PeerAddress
from mycel.protocols.rounds import Outcome, outcome_digest
from mycel.swarm.rounds.reducer import Row, ShardWork
from mycel.swarm.rounds.terms import GroupTerms
from mycel.swarm.training.bell import Bell
from tests.sim.compute import SimCompute
from tests.sim.transport import SimTransport
from tests.sim.world import World, run_world

RUN = bytes(range(32))
N_ELEMENTS = 1 << 16  # four shards at most


def vector_of(name: str, number: int) -> np.ndarray:
    """What a peer contributes to a round."""
    seed = int.from_bytes(hashlib.sha256(f"{name} {number}".encode()).digest()[:4], "little")
    return np.random.default_rng(seed).integers(-100, 100, N_ELEMENTS).astype(np.float32)


def mean_of(rows: Sequence[np.ndarray]) -> np.ndarray:
    total = np.zeros(rows[0].size)
    for row in rows:
        total += row
    return (total / len(rows)).astype(np.float32)


@dataclass
class ToyReducer:
    """The mean of float32 vectors; a body of another size counts for nothing."""

    needs_before: bool = False
    n_elements: int = N_ELEMENTS

    def size(self, shard: int, n_shards: int) -> int:
        return self.n_elements * (shard + 1) // n_shards - self.n_elements * shard // n_shards

    def max_bytes(self, shard: int, n_shards: int) -> int:
        return 4 * self.size(shard, n_shards)

    def gram(self, work: ShardWork) -> bytes:
        raise NotImplementedError("the mean needs none")

    def decide(self, rows: Sequence[Row], grams: Sequence[bytes], plan: bytes) -> bytes:
        raise NotImplementedError("the mean needs none")

    def reduce(self, work: ShardWork, decision: bytes) -> bytes:
        size_bytes = self.max_bytes(work.shard, work.n_shards)
        rows = [np.frombuffer(row.body, np.float32) for row in work.rows if len(row.body) == size_bytes]
        return mean_of(rows).tobytes()


@dataclass
class Member:
    """One peer's program: contributes, applies, goes on. `kept` outlives the process, as a checkpoint does."""

    name: str
    group: Group
    kept: dict[str, tuple[int, np.ndarray]]
    total: np.ndarray
    after: int
    """The round after which `total` is."""
    seen: list[Committed] = field(default_factory=list)
    fetched_states: int = 0
    is_silent: bool = False


Program = Callable[["GroupSwarm", Member], Awaitable[None]]


def digest_of(total: np.ndarray) -> bytes:
    return hashlib.sha256(total.tobytes()).digest()


@dataclass
class GroupSwarm:
    """Peers by name; the first one that starts is the founder."""

    world: World
    folder: Path
    terms: GroupTerms
    members: dict[str, Member] = field(default_factory=dict)
    kept: dict[str, tuple[int, np.ndarray]] = field(default_factory=dict)
    outcomes: dict[int, Outcome] = field(default_factory=dict)
    states: dict[int, bytes] = field(default_factory=dict)
    told: list[tuple[float, str, str, dict[str, object]]] = field(default_factory=list)
    moved: Bell = field(default_factory=Bell)
    reducer: Reducer = field(default_factory=ToyReducer)
    founder: str = ""
    # Whose states are held against the others'.
    checks_state: Callable[[Member], bool] = lambda _: True
    # How long everybody takes for a contribution.
    work_s: float = 0.2
    # After how many rounds everybody's state is on disk.
    save_every: int = 1
    kept_results: dict[int, object] = field(default_factory=dict)

    def start(
        self,
        name: str,
        *,
        program: Program | None = None,
        reducer: Reducer | None = None,
    ) -> Member:
        """A peer that knows all others. After a crash it comes again with its folder and what it kept."""
        transport = self.world.restart(name) if name in self.members else self.world.add_node(name)
        self.founder = self.founder or transport.peer_id
        place = GroupPlace(RUN, "average", self.terms, self.founder)
        compute = SimCompute(self.world, name)

        def event(what: str, /, **fields: object) -> None:
            self.world.record(what, name, *(f"{key}={value}" for key, value in fields.items()))
            self.told.append((trio.current_time(), name, what, fields))
            self.moved.ring()

        exchange = BlobExchange(transport, threads=SimCompute(self.world, name), event=event)
        ports = GroupPorts(
            RoundDoor(transport), exchange, transport.identity, compute, SimCompute(self.world, name), event
        )
        after, total = self.kept.get(name, (0, np.zeros(N_ELEMENTS, np.float32)))
        group = Group(
            place,
            ports,
            reducer or self.reducer,
            self.folder / name,
            Standing(digest_of(total), after, self.save_every > 1),
        )
        member = self.members[name] = Member(name, group, self.kept, total, after)
        others = [node for node in self.world.nodes() if node.name != name]

        async def main(_: SimTransport) -> None:
            for other in others:
                group.meet(PeerAddress(other.peer_id, other.addresses))
            async with trio.open_nursery() as nursery:
                await nursery.start(exchange.run)
                await nursery.start(group.run)
                await (program or contribute_and_apply)(self, member)

        self.world.start(name, main)
        return member

    def crash(self, name: str) -> None:
        self.world.crash(name)
        self.moved.ring()

    def living(self) -> list[Member]:
        return [member for name, member in self.members.items() if not self.world.node(name).crashed]

    def name_of(self, peer: str) -> str:
        return self.world.name_of(peer)

    def events(self, what: str) -> list[tuple[str, dict[str, object]]]:
        return [(name, fields) for _, name, told, fields in self.told if told == what]

    async def when(self, is_so: Callable[[], bool]) -> None:
        """Wait; looked at whenever anybody tells anything."""
        while True:
            seen = self.moved.count
            if is_so():
                return
            await self.moved.after(seen)

    async def until(self, number: int, *names: str) -> None:
        """Wait until these, or all that live, have applied round `number`."""
        await self.when(lambda: all(m.after >= number for m in self.living() if not names or m.name in names))

    def check(self, member: Member, done: Committed) -> None:
        """One outcome of each round, results that are the mean of just what is in it."""
        outcome = done.certificate.outcome
        before = self.outcomes.setdefault(outcome.round, outcome)
        assert outcome_digest(before) == outcome_digest(outcome), f"two outcomes of round {outcome.round}"
        names = [self.name_of(offer.peer) for offer in done.offers if offer.bodies]
        assert sorted(self.name_of(peer) for peer in outcome.contributors) == sorted(
            self.name_of(offer.peer) for offer in done.offers
        )
        wanted = mean_of([vector_of(name, outcome.round) for name in names]).tobytes() if names else b""
        assert b"".join(done.results) == wanted, f"round {outcome.round}: not the mean of {names}"

    def checked_state(self, member: Member) -> bytes:
        """One state after each round."""
        digest = digest_of(member.total)
        if not self.checks_state(member):
            return digest
        assert self.states.setdefault(member.after, digest) == digest, f"two states after round {member.after}"
        return digest


async def contribute_and_apply(
    swarm: GroupSwarm, member: Member, *, bring: Callable[[int], Awaitable[None]] | None = None
) -> None:
    """What every honest peer does, round after round; `bring` contributes something else than its vector."""
    group = member.group
    while True:
        number = group.round
        async with trio.open_nursery() as nursery:
            if group.is_member and not member.is_silent:
                nursery.start_soon(bring or partial(work_and_contribute, swarm, member), number)
            done = await group.committed()
            nursery.cancel_scope.cancel()
        if isinstance(done, NeedState):
            await fetch_state(swarm, member, done)
            continue
        if swarm.checks_state(member):
            swarm.check(member, done)
        if done.results:
            member.total = member.total + np.frombuffer(b"".join(done.results), np.float32)
        member.after = done.round
        member.seen.append(done)
        if member.after % swarm.save_every == 0:
            swarm.kept[member.name] = (member.after, member.total)
            await group.saved(member.after)
        group.applied(swarm.checked_state(member))
        swarm.moved.ring()


async def work_and_contribute(swarm: GroupSwarm, member: Member, number: int) -> None:
    await trio.sleep(swarm.work_s)
    n_shards = member.group.n_shards
    bodies = np.split(vector_of(member.name, number), [N_ELEMENTS * shard // n_shards for shard in range(1, n_shards)])
    await member.group.contribute(Contribution(tuple(body.tobytes() for body in bodies)), number)


async def fetch_state(swarm: GroupSwarm, member: Member, needed: NeedState) -> None:
    """As over a stream, but without one: from a peer that lives."""
    await trio.sleep(0.5)
    givers = [other for other in swarm.living() if swarm.world.node(other.name).peer_id in needed.peers]
    giver = next(other for other in givers if other.after >= needed.round)
    member.after, member.total = giver.after, giver.total
    member.fetched_states += 1
    swarm.kept[member.name] = (member.after, member.total)
    await member.group.resume(member.after, digest_of(member.total))
    swarm.moved.ring()


def group_terms(**changes: object) -> GroupTerms:
    fields: dict[str, object] = {"n_elements": N_ELEMENTS, "longest_grace_s": 3.0, "patience_s": 20.0, **changes}
    return GroupTerms(**fields)  # type: ignore[arg-type]


def group_world(
    folder: Path,
    body: Callable[[GroupSwarm], Awaitable[None]],
    terms: GroupTerms | None = None,
    *,
    seed: int = 1,
    limit_s: float = 600.0,
    reducer: Reducer | None = None,
    kind: type[GroupSwarm] = GroupSwarm,
    work_s: float = 0.2,
) -> GroupSwarm:
    """Run a scenario; the swarm as it was at the end."""
    swarms: list[GroupSwarm] = []

    async def main(world: World) -> None:
        swarm = kind(world, folder, terms or group_terms(), reducer=reducer or ToyReducer(), work_s=work_s)
        swarms.append(swarm)
        await body(swarm)

    # No power fails in here, and a real disk takes longer over a round than all the rest.
    with patch("os.fsync"):
        run_world(seed, main, limit_s=limit_s)
    return swarms[0]
