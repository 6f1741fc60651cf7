"""The record store and the directory on a simulated network: churn, partitions, liars and time."""

from __future__ import annotations

import statistics
from collections.abc import Awaitable, Callable

import msgspec
import pytest
import trio

from mycel.dht.keys import distance, position_of, span_key
from mycel.dht.records import encode_announcement
from mycel.protocols import ids
from mycel.protocols.codec import record_codec
from mycel.protocols.errors import LocalProtocolError, PeerError
from mycel.protocols.messages import FindRecords, Found, PeerAddress, Stored, StoreRecord
from mycel.protocols.ports import Stream
from mycel.security.envelope import sign_record
from mycel.security.identity import Identity
from tests.dht.network import SWARM, Net, serving
from tests.sim.faults import LinkFaults, WorldOptions
from tests.sim.world import World, run_world

KEY = span_key(SWARM)


def seeds(fast: int, count: int) -> list:
    """Seeds 1 to `count`; those after the first `fast` are for the slow part."""
    return [pytest.param(seed, marks=[pytest.mark.slow] * (seed > fast)) for seed in range(1, count + 1)]


def simulate(scenario: Callable[[World, Net], Awaitable[None]], seed: int = 1, latency_s: float = 0.005) -> World:
    async def main(world: World) -> None:
        await scenario(world, Net(world))

    return run_world(seed, main, options=WorldOptions(link=LinkFaults(latency_s=latency_s)))


async def timed_find(net: Net, name: str) -> tuple[float, set[str]]:
    began = trio.current_time()
    found = await net.found_by(name)
    return trio.current_time() - began, set(found)


def test_two_nodes_find_each_other_with_one_bootstrap_address() -> None:
    async def scenario(world: World, net: Net) -> None:
        await net.grow(3)  # n1 and n2 know n0 alone
        await net.directories["n1"].announce(serving(0, 4))
        await net.directories["n2"].announce(serving(4, 8))
        for name in net.stores:
            found = await net.found_by(name)
            assert {who: (a.start, a.end) for who, a in found.items()} == {"n1": (0, 4), "n2": (4, 8)}
        assert await net.stores["n1"].find_peer(net.peer("n2")) == PeerAddress(net.peer("n2"), ("/memory/3",))

    simulate(scenario)


def test_a_node_alone_holds_its_own_record() -> None:
    async def scenario(world: World, net: Net) -> None:
        store = await net.add("n0", bootstrap=[])
        assert await net.directories["n0"].announce(serving(0, 2)) == 1
        assert set(await net.found_by("n0")) == {"n0"}
        assert await store.find_peer(net.peer("n0")) == PeerAddress(net.peer("n0"), ("/memory/1",))
        assert await store.find_peer(Identity.from_seed(bytes(32)).peer_id) is None

    simulate(scenario)


def test_the_bootstrap_peer_may_start_last() -> None:
    async def scenario(world: World, net: Net) -> None:
        world.add_node("n0")
        world.crash("n0")
        late = net.bootstrap()
        await net.add("n1", bootstrap=late)
        await net.add("n2", bootstrap=late)
        assert not len(net.stores["n1"].table)
        net.stores["n0"] = net.stores["n1"]  # marks the name as used: `add` restarts it
        await net.add("n0", bootstrap=[])
        await trio.sleep(30.0)
        await net.directories["n1"].announce(serving(0, 2))
        assert set(await net.found_by("n2")) == {"n1"}

    simulate(scenario)


@pytest.mark.parametrize("seed", seeds(0, 3))
def test_records_stand_with_the_nearest_of_32(seed: int) -> None:
    async def scenario(world: World, net: Net) -> None:
        await net.grow(32)
        assert await net.directories["n7"].announce(serving(0, 4)) == 9  # eight holders and the writer
        nearest = net.true_holders(KEY, distance, [name for name in net.stores if name != "n7"])[:8]
        holders = [name for name, store in net.stores.items() if store.held.get(KEY, world.unix_time_s())]
        assert set(holders) - {"n7"} == set(nearest)

    simulate(scenario, seed)


@pytest.mark.parametrize("death", ["crash", pytest.param("stop", marks=pytest.mark.slow)])
@pytest.mark.parametrize("seed", seeds(1, 3))
def test_32_nodes_find_fast_also_just_after_10_died(death: str, seed: int) -> None:
    async def scenario(world: World, net: Net) -> None:
        await net.grow(32)
        for i in range(1, 32):
            net.keep_announcing(f"n{i}", serving(i % 8, i % 8 + 1))
        await trio.sleep(5.0)
        healthy = [await timed_find(net, f"n{i}") for i in range(32)]
        assert all(found == set(net.stores) - {"n0"} for _, found in healthy)
        dead = set(world.rng.sample(sorted(net.stores), 10))
        for name in sorted(dead):
            getattr(world, death)(name)
        died_at = trio.current_time()
        alive = sorted(set(net.stores) - dead)
        after = [await timed_find(net, name) for name in alive]
        assert statistics.median(took for took, _ in healthy) < 0.1
        assert statistics.median(took for took, _ in after) < 0.1
        assert max(took for took, _ in after) < 1.0
        assert all(found >= set(alive) - {"n0"} for _, found in after), "nobody who lives is lost"
        for name in alive[:3]:
            began = trio.current_time()
            assert await net.stores[name].find_peer(net.peer(alive[-1])) is not None
            assert trio.current_time() - began < 0.5, "nor does a lookup that has to converge wait for the silent"
        await trio.sleep(died_at + 30.0 - trio.current_time())
        for name in alive:  # a dead peer is forgotten within its time to live, a live one is not
            assert set(await net.found_by(name)) == set(alive) - {"n0"}

    simulate(scenario, seed)


def test_a_partition_heals() -> None:
    async def scenario(world: World, net: Net) -> None:
        await net.grow(12)
        for name in net.stores:
            net.keep_announcing(name, serving(0, 1))
        await trio.sleep(5.0)
        left, right = {f"n{i}" for i in range(6)}, {f"n{i}" for i in range(6, 12)}
        world.partition(left, right)
        await trio.sleep(150.0)
        assert set(await net.found_by("n1")) == left
        assert set(await net.found_by("n9")) == right
        world.heal()
        await trio.sleep(120.0)
        for name in ("n1", "n9"):
            assert set(await net.found_by(name)) == left | right

    simulate(scenario)


@pytest.mark.parametrize("seed", seeds(0, 4))
def test_churn(seed: int) -> None:
    """Nodes die and come back all the time; whoever has been up for a while is found by everybody."""

    async def scenario(world: World, net: Net) -> None:
        await net.grow(14)
        for name in net.stores:
            net.keep_announcing(name, serving(0, 1))
        down: set[str] = set()
        for _ in range(8):
            for name in sorted(down):
                await net.add(name)
                net.keep_announcing(name, serving(0, 1))
            down = set(world.rng.sample([f"n{i}" for i in range(1, 14)], 4))
            for name in sorted(down):
                world.crash(name)
            await trio.sleep(12.0)
            up = sorted(set(net.stores) - down)
            assert set(await net.found_by(world.rng.choice(up))) >= set(up)
        await trio.sleep(20.0)
        assert set(await net.found_by("n0")) == set(net.stores) - down

    simulate(scenario, seed)


def test_the_writer_repeats_its_words_to_new_holders() -> None:
    async def scenario(world: World, net: Net) -> None:
        await net.grow(24)
        await net.directories["n7"].announce(serving(0, 1), ttl_s=60.0)
        for name, store in net.stores.items():
            if name != "n7" and store.held.get(KEY, world.unix_time_s()):
                world.crash(name)
        await trio.sleep(25.0)
        alive = [name for name in net.stores if not world.node(name).crashed and name != "n7"]
        holders = [name for name in alive if net.stores[name].held.get(KEY, world.unix_time_s())]
        assert len(holders) == 8
        assert set(await net.found_by(alive[0])) == {"n7"}

    simulate(scenario)


def test_a_newcomer_is_told_at_once() -> None:
    async def scenario(world: World, net: Net) -> None:
        await net.grow(3)
        await net.directories["n1"].announce(serving(0, 1), ttl_s=60.0)
        await net.add("late")
        await trio.sleep(2.0)  # not the twenty of the next repetition
        assert [record.writer for record in net.stores["late"].held.get(KEY, world.unix_time_s())]

    simulate(scenario)


def test_a_restarted_node_is_believed_again() -> None:
    async def scenario(world: World, net: Net) -> None:
        await net.grow(6)
        await net.directories["n5"].announce(serving(0, 1))
        world.crash("n5")
        await net.found_by("n1")  # notices
        await trio.sleep(3.0)
        await net.add("n5")
        await net.directories["n5"].announce(serving(2, 3))
        found = await net.found_by("n1")
        assert (found["n5"].start, found["n5"].end) == (2, 3), "seq went on above that of its earlier life"

    simulate(scenario)


def test_withdrawal_is_seen_and_not_undone_by_older_words() -> None:
    async def scenario(world: World, net: Net) -> None:
        await net.grow(10)
        await net.directories["n3"].announce(serving(0, 1))
        (old,) = await net.stores["n1"].get(KEY)
        await net.directories["n3"].withdraw(SWARM)
        assert (await net.found_by("n1"))["n3"].state == "leaving"
        world.crash("n3")
        for _ in range(31):
            if old.expires_at > world.unix_time_s():
                await net.stores["n2"].put(old)  # a replay: valid and signed, but older
            found = await net.found_by("n1")
            assert "n3" not in found or found["n3"].state == "leaving"
            await trio.sleep(1.0)
        assert await net.found_by("n1") == {}
        assert await net.directories["n1"].withdraw(SWARM) == 0

    simulate(scenario)


def test_a_client_is_told_to_nobody() -> None:
    async def scenario(world: World, net: Net) -> None:
        await net.grow(5)
        await net.add("guest", client=True)
        await net.directories["n1"].announce(serving(0, 1))
        assert set(await net.found_by("guest")) == {"n1"}
        await trio.sleep(120.0)
        assert all(net.peer("guest") not in store.table for store in net.stores.values())
        assert await net.stores["n2"].find_peer(net.peer("guest")) is None

    simulate(scenario)


def test_invalid_records_are_refused_here_and_there() -> None:
    async def scenario(world: World, net: Net) -> None:
        await net.grow(3)
        now = world.unix_time_s()
        writer = world.node("n1").identity
        value = encode_announcement(serving(0, 1))
        good = sign_record(writer, KEY, 7, now + 30, value)
        expired = sign_record(writer, KEY, 8, now - 1, value)
        eternal = sign_record(writer, KEY, 9, now + 1e6, value)
        forged = msgspec.structs.replace(good, seq=10)
        stolen = msgspec.structs.replace(good, writer=net.peer("n2"))
        moved = msgspec.structs.replace(good, key=position_of("elsewhere"))
        transport, target = world.node("n1"), net.peer("n2")
        for bad in (expired, eternal, forged, stolen, moved):
            with pytest.raises(LocalProtocolError):
                await net.stores["n1"].put(bad)
            answer = await ask(transport, target, StoreRecord(PeerAddress(transport.peer_id), bad))
            assert isinstance(answer, Stored)
            assert not answer.accepted
            assert answer.reason
        assert await net.stores["n1"].put(good) == 3
        older = sign_record(writer, KEY, 6, now + 30, value)
        replayed = await ask(transport, target, StoreRecord(PeerAddress(transport.peer_id), older))
        assert replayed == Stored(False, "seq 6 is not newer than 7")
        assert await net.stores["n0"].get(KEY) == (good,)

    simulate(scenario)


async def ask(transport: object, target: str, request: StoreRecord | FindRecords) -> object:
    stream = await transport.open(target, ids.RECORDS)
    await stream.send(*record_codec.encode(request))
    frame = await stream.receive()
    await stream.aclose()
    return None if frame is None else record_codec.decode_only(frame)


def test_who_breaks_the_protocol_loses_the_stream_alone() -> None:
    async def scenario(world: World, net: Net) -> None:
        await net.grow(3)
        transport, target = world.node("n1"), net.peer("n2")
        impostor = FindRecords(PeerAddress(net.peer("n0"), ("/memory/9",)), KEY)
        for request in (impostor, Stored(True), Found((), ())):
            with pytest.raises(PeerError):
                await ask(transport, target, request)
        stream = await transport.open(target, ids.RECORDS)
        await stream.send(b"\xff" * 40)
        with pytest.raises(PeerError):
            await stream.receive()
        await net.directories["n2"].announce(serving(0, 1))
        assert set(await net.found_by("n1")) == {"n2"}

    simulate(scenario)


@pytest.mark.parametrize("seed", seeds(1, 3))
def test_liars_neither_forge_nor_hide(seed: int) -> None:
    """A quarter of the nodes answer with forged records and made-up peers; everybody honest is still found."""

    async def scenario(world: World, net: Net) -> None:
        await net.grow(24)
        made_up = [Identity.from_seed(bytes([9, i]) + bytes(30)).peer_id for i in range(200)]
        victim = Identity.from_seed(b"\x03" * 32)
        value = encode_announcement(serving(0, 1))
        lies: list[object] = []

        def lie(request: FindRecords | StoreRecord) -> Found | Stored:
            lies.append(request)
            if isinstance(request, StoreRecord):
                return Stored(True)
            near = sorted(made_up, key=lambda peer: distance(position_of(peer), request.key))[:32]
            true = sign_record(victim, request.key, 1, world.unix_time_s() + 20, value)
            forged = msgspec.structs.replace(true, seq=2**60, value=encode_announcement(serving(0, 4000)))
            return Found((forged,) * request.want_records, tuple(PeerAddress(peer, ("/memory/777",)) for peer in near))

        # Every other one of those that hold the records: where it hurts.
        liars = set(net.true_holders(KEY, distance, sorted(set(net.stores) - {"n0"}))[:12:2])
        for name in liars:
            net.make_liar(name, lie)
        honest = sorted(set(net.stores) - liars)
        for name in honest:
            net.keep_announcing(name, serving(0, 1))
        await trio.sleep(60.0)
        for name in honest:
            began = trio.current_time()
            found = await net.found_by(name)
            assert set(found) == set(honest)
            assert all(announcement.end == 1 for announcement in found.values())
            assert trio.current_time() - began < 2.0
            assert not set(made_up) & set(net.stores[name].table.known_peers())
        assert sum(isinstance(request, FindRecords) and request.want_records for request in lies) >= len(liars)

    simulate(scenario, seed)


@pytest.mark.slow
def test_the_same_seed_gives_the_same_world() -> None:
    async def scenario(world: World, net: Net) -> None:
        await net.grow(6)
        await net.directories["n3"].announce(serving(0, 1))
        world.crash("n4")
        await net.found_by("n5")
        await trio.sleep(40.0)

    assert simulate(scenario, 3).digest() == simulate(scenario, 3).digest()


def test_a_node_that_was_cut_off_is_soon_back() -> None:
    """It took everybody for dead; that it was itself is clear to it when nobody is left."""

    async def scenario(world: World, net: Net) -> None:
        await net.grow(8)
        for name in net.stores:
            net.keep_announcing(name, serving(0, 1))
        await trio.sleep(5.0)
        world.partition({"n5"})
        for _ in range(45):
            await net.found_by("n5")
            await trio.sleep(1.0)
        assert set(await net.found_by("n5")) == {"n5"}
        world.heal()
        await trio.sleep(20.0)
        for name in net.stores:
            assert set(await net.found_by(name)) == set(net.stores)

    simulate(scenario)


def test_streams_are_kept() -> None:
    async def scenario(world: World, net: Net) -> None:
        await net.grow(8)
        await net.directories["n1"].announce(serving(0, 1))
        await net.found_by("n2")
        transport, opened = world.node("n2"), []
        really_open = transport.open

        async def counted(peer: str, protocol: str) -> Stream:
            opened.append(peer)
            return await really_open(peer, protocol)

        transport.open = counted
        for _ in range(20):
            assert set(await net.found_by("n2")) == {"n1"}
        assert len(opened) <= 7, "a find that is over leaves questions behind, so a peer may need a second stream"
        await trio.sleep(100.0)  # longer than an idle stream is kept
        async with trio.open_nursery() as nursery:
            for _ in range(40):
                nursery.start_soon(net.found_by, "n2")
        assert len(opened) <= 7 * 4 + 10, "many at once share a few streams to each of the seven"

    simulate(scenario)


def test_a_greedy_peer_is_slowed_down_alone() -> None:
    async def scenario(world: World, net: Net) -> None:
        await net.grow(4)
        transport, target = world.node("n1"), net.peer("n2")
        stream = await transport.open(target, ids.RECORDS)
        began = trio.current_time()
        frame = record_codec.encode(FindRecords(PeerAddress(transport.peer_id, transport.addresses), KEY))
        for _ in range(600):
            await stream.send(*frame)
            assert await stream.receive() is not None
        assert trio.current_time() - began > 3.0, "beyond 200 at once, 100 a second"
        began = trio.current_time()
        await net.found_by("n3")
        assert trio.current_time() - began < 0.1
        for _ in range(15):
            await transport.open(target, ids.RECORDS)
        with pytest.raises(PeerError, match="handler failed"):
            await ask(transport, target, FindRecords(PeerAddress(transport.peer_id), KEY))

    simulate(scenario, latency_s=0.0001)


@pytest.mark.slow
def test_wide_area_latency() -> None:
    """With a round trip of 300 ms every question outlasts the hedge; the lookup still waits for answers."""

    async def scenario(world: World, net: Net) -> None:
        await net.grow(12)
        assert await net.directories["n3"].announce(serving(0, 1)) >= 8
        for name in net.stores:
            assert set(await net.found_by(name)) == {"n3"}

    simulate(scenario, latency_s=0.15)


def test_what_is_left_of_a_store_that_is_shut_down() -> None:
    """A node says goodbye while its own tasks are being cancelled."""

    async def scenario(world: World, net: Net) -> None:
        await net.grow(4)
        await net.directories["n3"].announce(serving(0, 1))
        transport = world.add_node("leaver")
        from mycel.dht.directory import Directory
        from mycel.dht.kademlia import Kademlia

        store = Kademlia(transport, transport.identity, world.unix_time_s)
        directory = Directory(store, transport.identity, world.unix_time_s)

        async def serve() -> None:
            try:
                await directory.announce(serving(1, 2))
                await trio.sleep_forever()
            finally:
                with trio.CancelScope(shield=True):
                    await directory.withdraw(SWARM)

        with trio.move_on_after(1.0):
            async with trio.open_nursery() as nursery:
                await nursery.start(store.run)
                await store.join(net.bootstrap())
                nursery.start_soon(serve)
        assert (await net.found_by("n1"))["leaver"].state == "leaving"

    simulate(scenario)
