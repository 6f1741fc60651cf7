"""Bytes by hash between nodes, in virtual time: who gives what, who gives it not, and what is kept how long."""

from __future__ import annotations

import hashlib
from collections.abc import Awaitable, Callable

import pytest
import trio
import trio.testing

from mycel.node.rounds.blobs import BlobExchange, BlobLimits, BlobStore
from mycel.protocols import ids
from mycel.protocols.codec import blob_codec
from mycel.protocols.errors import (
    LocalProtocolError,
    PeerError,
    PeerRefused,
    PeerTimeout,
    PeerUnreachable,
    RemoteProtocolError,
    RouteUnavailable,
    VerificationError,
)
from mycel.protocols.ports import Stream
from mycel.protocols.rounds import (
    Blob,
    BlobMessage,
    Certificates,
    GetBlob,
    GetCertificates,
    GetOffers,
    NotHere,
    Offers,
)
from mycel.protocols.wire import TensorHeader, WireTensor
from tests.sim.compute import SimCompute
from tests.sim.world import World, run_world

RUN = b"r" * 32
MIB = 1 << 20


def sha(data: bytes | memoryview) -> bytes:
    return hashlib.sha256(data).digest()


def bytes_of(n_bytes: int, seed: int = 1) -> bytes:
    return hashlib.shake_128(bytes([seed])).digest(n_bytes)


class Node:
    """A node with a store, and who failed it."""

    def __init__(self, world: World, name: str, limits: BlobLimits | None = None) -> None:
        self.transport = world.node(name)
        self.peer_id = self.transport.peer_id
        self.exchange = BlobExchange(self.transport, threads=SimCompute(world, name), limits=limits)
        self.store: BlobStore = self.exchange.store(RUN, "run")
        self.failures: list[PeerError] = []
        self.store.failed = self.failures.append

    def kinds(self) -> list[type[PeerError]]:
        return [type(failure) for failure in self.failures]


Scenario = Callable[[World, dict[str, Node]], Awaitable[None]]


def play(scenario: Scenario, names: str = "abc", limits: BlobLimits | None = None) -> World:
    """Run a scenario on nodes that all know each other and serve."""

    async def main(world: World) -> None:
        for name in names:
            world.add_node(name)
        nodes = {name: Node(world, name, limits) for name in names}
        for node in nodes.values():
            for other in nodes.values():
                if other is not node:
                    node.transport.learn(other.peer_id, other.transport.addresses)
        async with trio.open_nursery() as nursery:
            for node in nodes.values():
                await nursery.start(node.exchange.run)
            await scenario(world, nodes)
            nursery.cancel_scope.cancel()

    return run_world(1, main)


@pytest.mark.parametrize("n_bytes", [1, 65_537, MIB, 9 * MIB + 3])
def test_a_blob_comes_whole_and_is_given_on(n_bytes: int) -> None:
    async def scenario(world: World, nodes: dict[str, Node]) -> None:
        a, b, c = nodes.values()
        data = bytes_of(n_bytes)
        digest = await a.store.put(data, 1)
        assert await b.store.fetch(digest, n_bytes, [a.peer_id], 1) == data
        world.crash("a")
        assert await c.store.fetch(digest, n_bytes, [a.peer_id, b.peer_id], 1) == data
        assert c.kinds() == [PeerUnreachable]
        assert (a.store.given_bytes, b.store.fetched_bytes, b.store.given_bytes) == (n_bytes,) * 3

    play(scenario)


def test_blobs_are_kept_for_their_rounds() -> None:
    async def scenario(world: World, nodes: dict[str, Node]) -> None:
        store = nodes["a"].store
        old, new = await store.put(b"old", 1), await store.put(b"new", 2)
        kept = await store.put(b"kept", 1)
        assert store.keep(kept, 3)
        assert not store.keep(bytes(32), 3)
        assert await store.put(b"kept", 2) == kept
        store.drop_before(2)
        assert (store.get(old), store.get(new), store.get(kept)) == (None, b"new", b"kept")
        store.drop_before(4)
        assert store.kept_bytes == 0

    play(scenario)


def test_a_store_has_an_end() -> None:
    async def scenario(world: World, nodes: dict[str, Node]) -> None:
        store = nodes["a"].exchange.store(RUN, "small", max_bytes=10)
        await store.put(bytes(6), 1)
        await store.put(bytes(6), 2)  # the same bytes
        with pytest.raises(LocalProtocolError, match="over 10"):
            await store.put(b"x" * 6, 1)

    play(scenario)


def test_an_empty_blob_needs_nobody() -> None:
    async def scenario(world: World, nodes: dict[str, Node]) -> None:
        a, b, _ = nodes.values()
        assert await b.store.fetch(sha(b""), 0, [], 1) == b""
        with pytest.raises(RouteUnavailable):
            await b.store.fetch(sha(b"x"), 0, [a.peer_id], 1)

    play(scenario)


def test_only_the_group_asked_for_gives() -> None:
    async def scenario(world: World, nodes: dict[str, Node]) -> None:
        a, b, _ = nodes.values()
        digest = await a.store.put(b"data", 1)
        other = b.exchange.store(RUN, "stage:1")
        with pytest.raises(RouteUnavailable, match="this group is not here"):
            await other.fetch(digest, 4, [a.peer_id], 1)
        with pytest.raises(RouteUnavailable, match="this blob is not here"):
            await b.store.fetch(sha(b"none"), 4, [a.peer_id], 1)
        a.store.close()
        with pytest.raises(RouteUnavailable, match="this group is not here"):
            await b.store.fetch(digest, 4, [a.peer_id], 1)

    play(scenario)


def test_fetches_of_one_blob_become_one() -> None:
    async def scenario(world: World, nodes: dict[str, Node]) -> None:
        a, b, _ = nodes.values()
        data = bytes_of(3 * MIB)
        digest = await a.store.put(data, 1)
        with trio.CancelScope() as given_up:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(b.store.fetch, digest, len(data), [a.peer_id], 1)
                await trio.testing.wait_all_tasks_blocked()
                given_up.cancel()
        async with trio.open_nursery() as nursery:
            for _ in range(5):
                nursery.start_soon(b.store.fetch, digest, len(data), [a.peer_id], 1)
        assert b.store.get(digest) == data
        assert a.store.given_bytes <= 2 * len(data)

    play(scenario)


def test_many_blobs_of_one_peer_share_a_stream() -> None:
    async def scenario(world: World, nodes: dict[str, Node]) -> None:
        a, b, _ = nodes.values()
        blobs = [bytes_of(300_000 + seed, seed) for seed in range(20)]
        digests = [await a.store.put(data, 1) for data in blobs]
        async with trio.open_nursery() as nursery:
            for digest, data in zip(digests, blobs, strict=True):
                nursery.start_soon(b.store.fetch, digest, len(data), [a.peer_id], 1)
        assert [b.store.get(digest) for digest in digests] == blobs

    world = play(scenario)
    streams = {what[2] for _, kind, *what in world.log if kind == "frame" and what[1] == "b"}
    assert len(streams) == 1


# ---- peers that do not do what they should


Reply = Callable[[GetBlob], list[bytes | memoryview]]


def blob(start: int, data: bytes, shape: tuple[int, ...] | None = None) -> list[bytes | memoryview]:
    tensor = WireTensor(TensorHeader("uint8", shape or (len(data),)), memoryview(data))
    return blob_codec.encode(Blob(start), [tensor])


LIES: dict[str, tuple[Reply, type[PeerError]]] = {
    "other bytes": (lambda asked: blob(asked.start, bytes(asked.count)), VerificationError),
    "fewer bytes": (lambda asked: blob(asked.start, bytes(asked.count - 1)), RemoteProtocolError),
    "more bytes": (lambda asked: blob(asked.start, bytes(asked.count + 1)), RemoteProtocolError),
    "another place": (lambda asked: blob(asked.start + 1, bytes(asked.count)), RemoteProtocolError),
    "another shape": (lambda asked: blob(asked.start, bytes(asked.count), (1, asked.count)), RemoteProtocolError),
    "no tensor": (lambda asked: blob_codec.encode(Blob(asked.start)), RemoteProtocolError),
    "another answer": (lambda asked: blob_codec.encode(Offers(())), RemoteProtocolError),
    "a question": (blob_codec.encode, RemoteProtocolError),
    "no message": (lambda asked: [b"\xff" * 40], RemoteProtocolError),
    "a refusal": (lambda asked: blob_codec.encode(NotHere("no")), PeerRefused),
}


@pytest.mark.parametrize("lie", LIES)
def test_who_gives_something_else_is_named_and_the_next_asked(lie: str) -> None:
    reply, kind = LIES[lie]

    async def lying(stream: Stream) -> None:
        while (frame := await stream.receive()) is not None:
            question = blob_codec.decode_only(frame)
            assert isinstance(question, GetBlob)
            await stream.send(*reply(question))

    async def scenario(world: World, nodes: dict[str, Node]) -> None:
        a, b, c = nodes.values()
        data = bytes_of(2 * MIB)
        digest = await a.store.put(data, 1)
        b.transport.serve(ids.BLOBS, lying)
        with pytest.raises(RouteUnavailable):
            await c.store.fetch(digest, len(data), [b.peer_id], 1)
        assert await c.store.fetch(digest, len(data), [b.peer_id, a.peer_id], 1) == data
        assert c.kinds() == [kind] * 2
        assert {failure.peer for failure in c.failures} == {b.peer_id}

    play(scenario)


def test_a_silent_peer_loses_its_turn_and_then_its_stream() -> None:
    async def mute(stream: Stream) -> None:
        await trio.sleep_forever()

    async def scenario(world: World, nodes: dict[str, Node]) -> None:
        a, b, c = nodes.values()
        digest = await a.store.put(b"data", 1)
        b.transport.serve(ids.BLOBS, mute)
        began_s = trio.current_time()
        assert await c.store.fetch(digest, 4, [b.peer_id, a.peer_id], 1) == b"data"
        assert 10 <= trio.current_time() - began_s < 11
        with pytest.raises(RouteUnavailable, match="answered nothing for 30 s"):
            await c.store.fetch(sha(b"more"), 4, [b.peer_id], 1)
        assert c.kinds() == [PeerTimeout]

    play(scenario)


def test_who_speaks_unasked_is_hung_up_on() -> None:
    async def talking(stream: Stream) -> None:
        while await stream.receive() is not None:
            await stream.send(*blob_codec.encode(NotHere("no")))
            await stream.send(*blob_codec.encode(NotHere("and no")))
            with pytest.raises(PeerUnreachable):
                await stream.receive()
            return

    async def scenario(world: World, nodes: dict[str, Node]) -> None:
        a, b, _ = nodes.values()
        b.transport.serve(ids.BLOBS, talking)
        for _ in range(2):
            with pytest.raises(RouteUnavailable, match="no"):
                await a.store.fetch(sha(b"more"), 4, [b.peer_id], 1)
            await trio.sleep(1)

    play(scenario)


def test_a_peer_that_was_started_again_is_asked_again() -> None:
    async def scenario(world: World, nodes: dict[str, Node]) -> None:
        a, b, _ = nodes.values()
        digest = await a.store.put(b"data", 1)
        await b.store.fetch(digest, 4, [a.peer_id], 1)
        b.store.drop_before(9)
        world.crash("a")
        await trio.sleep(60)
        world.restart("a")
        again = Node(world, "a")
        await again.store.put(b"data", 1)
        async with trio.open_nursery() as nursery:
            await nursery.start(again.exchange.run)
            assert await b.store.fetch(digest, 4, [a.peer_id], 1) == b"data"
            nursery.cancel_scope.cancel()

    play(scenario)


async def drain(stream: Stream) -> None:
    while True:
        await stream.receive()


def test_a_peer_that_asks_nonsense_or_takes_nothing_loses_its_stream() -> None:
    async def scenario(world: World, nodes: dict[str, Node]) -> None:
        a, b, _ = nodes.values()
        digest = await a.store.put(bytes(16 * MIB), 1)
        for nonsense in (b"\x00" * 9, b"".join(blob_codec.encode(NotHere("answer")))):
            stream = await b.transport.open(a.peer_id, ids.BLOBS)
            await stream.send(nonsense)
            with pytest.raises(PeerUnreachable):
                await stream.receive()
        stream = await b.transport.open(a.peer_id, ids.BLOBS)
        for _ in range(4):
            await stream.send(*blob_codec.encode(GetBlob(RUN, "run", digest, 0, 16 * MIB)))
        await trio.sleep(200)
        with pytest.raises(PeerUnreachable):
            await drain(stream)
        assert a.store.given_bytes < 64 * MIB

    world = play(scenario)
    reasons = [what[2] for _, kind, *what in world.log if kind == "handler failed"]
    assert len(reasons) == 3
    assert "took nothing for 60 s" in reasons[-1]


def test_streams_of_one_peer_are_bounded() -> None:
    async def scenario(world: World, nodes: dict[str, Node]) -> None:
        a, b, _ = nodes.values()
        await a.store.put(b"data", 1)
        streams = [await b.transport.open(a.peer_id, ids.BLOBS) for _ in range(5)]
        answers: list[object] = []
        for stream in streams:
            await stream.send(*blob_codec.encode(GetBlob(RUN, "run", sha(b"data"), 0, 4)))
            answers.append(await stream.receive())
        assert [answer is None for answer in answers] == [False] * 4 + [True]

    play(scenario)


def test_pieces_outside_of_a_blob_are_not_given() -> None:
    async def scenario(world: World, nodes: dict[str, Node]) -> None:
        a, b, _ = nodes.values()
        digest = await a.store.put(b"data", 1)
        stream = await b.transport.open(a.peer_id, ids.BLOBS)
        for start, count in ((0, 5), (4, 1), (1 << 32, 1)):
            await stream.send(*blob_codec.encode(GetBlob(RUN, "run", digest, start, count)))
            frame = await stream.receive()
            assert frame is not None
            assert blob_codec.decode_only(frame) == NotHere("this blob has 4 bytes")

    play(scenario)


# ---- other questions


def test_other_questions_are_answered_by_the_group() -> None:
    async def scenario(world: World, nodes: dict[str, Node]) -> None:
        a, b, _ = nodes.values()
        asked: list[tuple[str, object]] = []

        def hook(peer: str, question: GetCertificates | GetOffers) -> Certificates | Offers | NotHere:
            asked.append((peer, question))
            return Certificates(7, ()) if isinstance(question, GetCertificates) else Offers(())

        questions = (GetCertificates(RUN, "run", 3), GetOffers(RUN, "run", ()))
        with pytest.raises(PeerRefused):
            await b.store.ask(a.peer_id, questions[0])
        a.store.hook = hook
        answers: list[BlobMessage] = [await b.store.ask(a.peer_id, question) for question in questions]
        assert answers == [Certificates(7, ()), Offers(())]
        assert asked == [(b.peer_id, question) for question in questions]
        a.store.hook = lambda peer, question: Offers(())
        with pytest.raises(RemoteProtocolError):
            await b.store.ask(a.peer_id, questions[0])

    play(scenario)


def test_nothing_is_asked_while_the_exchange_does_not_run() -> None:
    async def scenario(world: World) -> None:
        exchange = BlobExchange(world.add_node("a"))
        with pytest.raises(LocalProtocolError):
            await exchange.store(RUN, "run").ask(world.add_node("b").peer_id, GetOffers(RUN, "run", ()))

    run_world(1, scenario)
