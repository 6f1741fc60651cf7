"""Everybody tells everybody how far it is: at once, together, again and not too often; and who falls silent is gone."""

from __future__ import annotations

from dataclasses import dataclass, field

import msgspec
import trio

from mycel.node.training.gossip import Gossip
from mycel.protocols.codec import train_codec
from mycel.protocols.errors import RemoteProtocolError
from mycel.protocols.ids import TRAIN
from mycel.protocols.messages import PeerAddress
from mycel.protocols.training import StageStatus
from mycel.swarm.training.bell import Bell
from mycel.swarm.training.members import MAX_MEMBERS, Members
from mycel.swarm.training.plan import RunPlan
from tests.sim.world import World, run_world

RUN = bytes(range(32))
PLAN = RunPlan(RUN, ((0, 1), (1, 2)), 100, 64, 2, 3)


@dataclass(eq=False)
class Heard(Members):
    """Notes what comes, and when."""

    log: list[tuple[float, StageStatus]] = field(default_factory=list)

    def hear(self, peer: str, status: StageStatus, now: float) -> bool:
        if peer != self.me:
            self.log.append((now, status))
        return Members.hear(self, peer, status, now)


@dataclass
class Node:
    """A peer that says what the test has it say."""

    world: World
    name: str
    status: StageStatus = field(default_factory=lambda: StageStatus(RUN, 0, 0, "training", 0))
    events: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.transport = self.world.node(self.name)
        self.bell, self.members = Bell(), Heard(self.transport.peer_id, RUN)
        self.gossip = Gossip(
            self.transport,
            PLAN,
            self.members,
            self.describe,
            self.bell,
            lambda what, /, **_: self.events.append(what),
            unix_time_s=self.world.unix_time_s,
        )
        self.world.start(self.name, self.main)

    @property
    def heard(self) -> list[tuple[float, StageStatus]]:
        return self.members.log

    async def main(self, _) -> None:
        await self.gossip.run()

    def describe(self) -> StageStatus:
        return msgspec.structs.replace(self.status, addresses=self.transport.addresses)

    def say(self, **change) -> None:
        self.status = msgspec.structs.replace(self.status, **change)
        self.gossip.say()

    def sees(self, other: Node) -> StageStatus | None:
        member = self.members.get(other.transport.peer_id)
        return None if member is None else msgspec.structs.replace(member.status, seq=0, addresses=())


def nodes(world: World, *names: str) -> list[Node]:
    for name in names:
        world.add_node(name)
    return [Node(world, name) for name in names]


def introduce(one: Node, *others: Node) -> None:
    for other in others:
        one.gossip.meet(PeerAddress(other.transport.peer_id, other.transport.addresses))


def test_who_is_told_answers_and_all_know_all():
    async def scenario(world: World) -> None:
        a, b, c = nodes(world, "a", "b", "c")
        introduce(a, b)
        introduce(c, b)
        await trio.sleep(0.5)
        a.say(version=7, state="leaving")
        await trio.sleep(0.1)
        assert b.sees(a) == a.status
        assert a.sees(b) == b.status, "b met a by its status"
        assert a.sees(a) == a.status, "oneself is in the table"
        assert a.sees(c) is None, "nobody has named c to a"

    run_world(1, scenario)


def test_numbers_wait_a_moment_and_go_together_but_news_goes_at_once():
    async def scenario(world: World) -> None:
        a, b = nodes(world, "a", "b")
        introduce(a, b)
        await trio.sleep(1.5)
        b.heard.clear()
        for count in range(1, 41):
            a.say(counted=((1 << count) - 1).to_bytes(8, "little"))
            await trio.sleep(0.005)
        assert 3 <= len(b.heard) <= 7, "40 changes in 200 ms"
        before_s = trio.current_time()
        a.say(version=1)
        await trio.sleep(0.02)
        assert b.heard[-1][1].version == 1
        assert b.heard[-1][0] < before_s + 0.01

    run_world(2, scenario)


def test_bells_ring_for_what_matters_alone():
    async def scenario(world: World) -> None:
        a, b = nodes(world, "a", "b")
        introduce(a, b)
        await trio.sleep(1.0)
        rung, heard = b.bell.count, len(b.heard)
        a.say(queue_s=3.0, sequences_per_s=9.0)
        await trio.sleep(5.0)
        assert len(b.heard) >= heard + 4, "the heartbeat"
        assert b.bell.count == rung
        assert b.sees(a) == a.status, "the heartbeat carries what does not matter"
        a.say(kept=3)
        await trio.sleep(0.1)
        assert b.bell.count == rung + 1

    run_world(3, scenario)


def test_who_crashes_is_lost_at_once_and_is_heard_when_it_is_back():
    async def scenario(world: World) -> None:
        a, b = nodes(world, "a", "b")
        introduce(a, b)
        await trio.sleep(1.0)
        rung = a.bell.count
        world.crash("b")
        await trio.sleep(0.1)
        assert a.sees(b) is None
        assert a.bell.count > rung
        assert "peer.lost" in a.events
        await trio.sleep(20.0)
        world.restart("b")
        again = Node(world, "b")
        again.status = msgspec.structs.replace(again.status, version=2)
        introduce(again, a)
        await trio.sleep(0.2)
        assert a.sees(again) == again.status
        assert again.sees(a) == a.status, "who is heard is told at once, whatever rest was left"

    run_world(4, scenario)


def test_silence_is_an_end_and_speaking_a_beginning():
    async def scenario(world: World) -> None:
        a, b = nodes(world, "a", "b")
        introduce(a, b)
        await trio.sleep(1.0)
        world.stop("b")
        await trio.sleep(7.0)
        assert a.sees(b) is None
        world.cont("b")
        await trio.sleep(10.0)
        assert a.sees(b) == b.status
        assert b.sees(a) == a.status

    run_world(5, scenario)


def test_who_does_not_speak_the_protocol_is_left_alone():
    async def scenario(world: World) -> None:
        world.add_node("deaf")
        (a,) = nodes(world, "a")
        deaf = world.node("deaf")
        a.gossip.meet(PeerAddress(deaf.peer_id, deaf.addresses))
        await trio.sleep(50.0)
        assert a.events.count("peer.refused") == 1
        await trio.sleep(60.0)
        assert a.events.count("peer.refused") == 2

    run_world(6, scenario)


def test_who_cannot_be_reached_is_forgotten_and_may_be_met_again():
    async def scenario(world: World) -> None:
        a, b = nodes(world, "a", "b")
        world.crash("b")
        introduce(a, b)
        await trio.sleep(300.0)
        assert a.gossip._known == {}
        assert len([entry for entry in world.log if entry[1] == "unreachable"]) == 12
        world.restart("b")
        again = Node(world, "b")
        introduce(a, again)
        await trio.sleep(1.0)
        assert again.sees(a) == a.status

    run_world(7, scenario)


def test_what_is_no_status_of_this_run_is_refused_and_a_flood_is_slowed_down():
    async def scenario(world: World) -> None:
        (a,) = nodes(world, "a")
        liar = world.add_node("liar")
        liar.learn(a.transport.peer_id, a.transport.addresses)
        await trio.sleep(0.1)
        for bad in (
            b"\x07\x00\x00\x00garbage",
            b"".join(train_codec.encode(msgspec.structs.replace(a.status, run=bytes(32)))),
            b"".join(train_codec.encode(msgspec.structs.replace(a.status, stage=9))),
        ):
            stream = await liar.open(a.transport.peer_id, TRAIN)
            await stream.send(bad)
            await trio.sleep(0.1)
        refused = [
            entry for entry in world.log if entry[1] == "handler failed" and RemoteProtocolError.__name__ in entry[4]
        ]
        assert len(refused) == 3
        stream = await liar.open(a.transport.peer_id, TRAIN)
        for seq in range(1000):
            await stream.send(*train_codec.encode(msgspec.structs.replace(a.status, seq=seq + 1)))
        await trio.sleep(1.0)
        assert len(a.heard) < 150
        newer = await liar.open(a.transport.peer_id, TRAIN)
        await newer.send(*train_codec.encode(msgspec.structs.replace(a.status, seq=5000)))
        await trio.sleep(5.0)
        assert a.heard[-1][1].seq == 5000, "nobody listens to the older stream any more"
        assert a.members.get(liar.peer_id) is not None

    run_world(8, scenario)


def test_more_peers_than_a_run_may_have_are_not_met():
    async def scenario(world: World) -> None:
        (a,) = nodes(world, "a")
        for index in range(MAX_MEMBERS + 50):
            a.gossip.meet(PeerAddress(f"p{index}"))
        await trio.sleep(0.1)
        assert len(a.gossip._known) == MAX_MEMBERS

    run_world(9, scenario)
