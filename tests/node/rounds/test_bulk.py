"""Bulk lanes: sealed frames over TCP, and agreeing on a lane, whoever can dial whom and whoever interferes."""

from __future__ import annotations

import hashlib
import os
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import pytest
import trio
import trio.testing

from mycel.node.libp2p_transport import Libp2pTransport, open_transport
from mycel.node.rounds import bulk
from mycel.node.rounds.blobs import LANE_BYTES, BlobExchange, BlobStore
from mycel.node.rounds.bulk import BulkLanes
from mycel.node.rounds.bulk_stream import BulkStream
from mycel.node.rounds.bulk_wire import LANE, LaneAt, NoLane, OpenLane, Sealer, Unsealer, lane_codec, lane_keys
from mycel.protocols.errors import LocalProtocolError, PeerRefused, PeerUnreachable, RemoteProtocolError
from mycel.security.identity import Identity

RUN = b"r" * 32
MIB = 1 << 20
LOOPBACK = ("/ip4/127.0.0.1/tcp/0",)


def bytes_of(n_bytes: int) -> bytes:
    return hashlib.shake_128(b"bulk").digest(n_bytes)


def run(scenario: Callable[[], Awaitable[None]]) -> None:
    async def main() -> None:
        with trio.fail_after(30):
            await scenario()

    trio.run(main)


# ---- frames in sealed records


Wire = Callable[[bytes], bytes]
"""What becomes of a piece of the bytes between two ends."""


@asynccontextmanager
async def tcp_pair() -> AsyncIterator[tuple[trio.SocketStream, trio.SocketStream]]:
    [listener] = await trio.open_tcp_listeners(0, host="127.0.0.1")
    async with listener:
        here = await trio.open_tcp_stream(*listener.socket.getsockname())
        there = await listener.accept()
    async with here, there:
        yield here, there


@asynccontextmanager
async def lane() -> AsyncIterator[tuple[BulkStream, BulkStream]]:
    async with tcp_pair() as (here, there):
        yield (
            BulkStream("there", here, bytes(32), bytes([1]) * 32),
            BulkStream("here", there, bytes([1]) * 32, bytes(32)),
        )


@asynccontextmanager
async def written(
    plain: bytes, key: bytes = bytes(32)
) -> AsyncIterator[tuple[bytearray, trio.SocketStream, BulkStream]]:
    """The one record of a frame, a bare connection to write it on, and who reads there."""
    into = memoryview(bytearray(len(plain) + 100))
    size = Sealer(key).seal(memoryview(plain), 0, into)
    async with tcp_pair() as (here, there):
        yield bytearray(into[:size]), here, BulkStream("here", there, bytes([1]) * 32, bytes(32))


@pytest.mark.parametrize("sizes", [[1], [MIB], [MIB + 1], [5 * MIB + 7], [3, MIB, 1, 2 * MIB]], ids=str)
def test_frames_arrive_whole_and_in_order(sizes: list[int]) -> None:
    async def scenario() -> None:
        data = bytes_of(sum(sizes))
        parts, at = [], 0
        for size in sizes:
            parts.append(memoryview(data)[at : at + size])
            at += size
        async with lane() as (here, there), trio.open_nursery() as nursery:
            for sender, receiver in ((here, there), (there, here)):
                nursery.start_soon(sender.send, *parts)
                assert await receiver.receive() == data
                nursery.start_soon(sender.send, b"next")
                assert bytes(await receiver.receive() or b"") == b"next"

    run(scenario)


def test_an_end_is_told_from_a_break() -> None:
    async def scenario() -> None:
        async with lane() as (here, there):
            await here.send(b"last")
            await here.aclose()
            await here.aclose()
            assert bytes(await there.receive() or b"") == b"last"
            assert await there.receive() is None
            assert await there.receive() is None
            with pytest.raises(LocalProtocolError):
                await here.send(b"more")
            with pytest.raises(LocalProtocolError):
                await here.receive()
        async with lane() as (here, there):
            await here.reset()
            with pytest.raises(PeerUnreachable):
                await there.receive()
            with pytest.raises(PeerUnreachable):
                await there.send(b"more")
        async with lane() as (here, there):
            for size in (0, 64 * MIB + 1):
                with pytest.raises(LocalProtocolError):
                    await here.send(bytes(size))

    run(scenario)


@pytest.mark.parametrize("place", [0, 4, 8, 20, -1])
def test_a_changed_bit_ends_the_lane(place: int) -> None:
    async def scenario() -> None:
        async with written(b"x" * 100) as (record, wire, reader):
            record[place] ^= 1
            await wire.send_all(record + bytes(100))
            with pytest.raises(PeerUnreachable):
                await reader.receive()

    run(scenario)


def test_records_are_good_once_at_their_place_and_in_their_direction() -> None:
    async def scenario() -> None:
        async with written(b"hello") as (record, wire, reader):
            await wire.send_all(record + record)
            assert bytes(await reader.receive() or b"") == b"hello"
            with pytest.raises(PeerUnreachable, match="forged"):
                await reader.receive()
        async with written(b"hello", bytes([1]) * 32) as (record, wire, reader):  # its own words come back
            await wire.send_all(record)
            with pytest.raises(PeerUnreachable, match="forged"):
                await reader.receive()

    run(scenario)


@pytest.mark.parametrize("header", [(MIB + 1, 0), (1, 1), (MIB, 64 * MIB), (0, 5)], ids=str)
def test_headers_that_promise_too_much_are_refused_at_once(header: tuple[int, int]) -> None:
    async def scenario() -> None:
        async with written(b"x") as (_, wire, reader):
            await wire.send_all(b"".join(number.to_bytes(4, "little") for number in header))
            with pytest.raises(PeerUnreachable, match="record"):
                await reader.receive()

    run(scenario)


def test_a_cancelled_receive_loses_nothing() -> None:
    async def scenario() -> None:
        data = bytes_of(3 * MIB)
        async with written(data[:MIB]) as (record, wire, reader), trio.open_nursery() as sending:
            sending.start_soon(wire.send_all, record)
            for _ in range(20):
                with trio.CancelScope() as scope:
                    async with trio.open_nursery() as nursery:
                        nursery.start_soon(reader._fill, reader._have + 10_000)
                        await trio.lowlevel.checkpoint()
                        scope.cancel()
            assert await reader.receive() == data[:MIB]

    run(scenario)


def test_a_cancelled_send_never_leaves_half_a_frame() -> None:
    async def scenario() -> None:
        async with lane() as (here, there):
            with trio.move_on_after(0.05) as scope:
                await here.send(bytes(60 * MIB))
            assert scope.cancelled_caught
            with pytest.raises(PeerUnreachable):
                await here.send(b"more")
            with pytest.raises(PeerUnreachable):
                await there.receive()

    run(scenario)


def test_keys_depend_on_all_that_was_agreed() -> None:
    agreed = ("a", "b", b"1" * 32, b"2" * 32, b"t" * 16)
    others = [("b", "a", *agreed[2:]), (*agreed[:2], b"3" * 32, *agreed[3:]), (*agreed[:3], b"3" * 32, agreed[4])]
    others.append((*agreed[:4], b"u" * 16))
    keys = {key for one in (agreed, *others) for key in lane_keys(*one)}
    assert len(keys) == 10
    record = memoryview(bytearray(100))
    size = Sealer(bytes(32)).seal(memoryview(b"x"), 0, record)
    with pytest.raises(RemoteProtocolError):
        Unsealer(b"k" * 32).unseal(record[:8], record[8:size], memoryview(bytearray(100)))


# ---- agreeing on a lane


class Node:
    def __init__(self, transport: Libp2pTransport, listen: tuple[str, ...] | None) -> None:
        self.transport = transport
        self.events: list[str] = []
        self.lanes = None if listen is None else BulkLanes(transport, listen, event=self._event)
        self.exchange = BlobExchange(transport, lanes=self.lanes)
        self.store: BlobStore = self.exchange.store(RUN, "run")

    def _event(self, name: str, /, **fields: object) -> None:
        self.events.append(f"{name}: {fields.get('reason')}")

    @property
    def n_lanes(self) -> int:
        """On which others ask this node."""
        return 0 if self.lanes is None else self.lanes._lanes.total()


@asynccontextmanager
async def two(a_listens: tuple[str, ...] | None, b_listens: tuple[str, ...] | None) -> AsyncIterator[tuple[Node, Node]]:
    async with (
        open_transport(Identity.generate()) as first,
        open_transport(Identity.generate()) as second,
        trio.open_nursery() as nursery,
    ):
        first.learn(second.peer_id, second.addresses)
        second.learn(first.peer_id, first.addresses)
        nodes = Node(first, a_listens), Node(second, b_listens)
        for node in nodes:
            await nursery.start(node.exchange.run)
        yield nodes
        nursery.cancel_scope.cancel()


async def gives(giver: Node, asker: Node, n_bytes: int = 2 * MIB) -> None:
    data = os.urandom(n_bytes)
    digest = await giver.store.put(data, 1)
    assert await asker.store.fetch(digest, n_bytes, [giver.transport.peer_id], 1) == data


def test_large_blobs_come_over_lanes_in_both_directions() -> None:
    async def scenario() -> None:
        async with two(LOOPBACK, LOOPBACK) as (a, b):
            await gives(a, b, LANE_BYTES - 1)
            assert (a.n_lanes, b.n_lanes) == (0, 0)
            for _ in range(3):
                await gives(a, b)
                await gives(b, a)
            assert (a.n_lanes, b.n_lanes) == (1, 1)
            assert a.events + b.events == []

    run(scenario)


def test_whoever_can_dial_the_other_does() -> None:
    async def scenario() -> None:
        async with two(LOOPBACK, ()) as (a, b):
            await gives(a, b)  # the asker dials
            await gives(b, a)  # the giver dials
            assert (a.n_lanes, b.n_lanes) == (1, 1)

    run(scenario)


@pytest.mark.parametrize("listens", [((), ()), (LOOPBACK, None), (None, LOOPBACK)], ids=str)
def test_without_a_lane_the_streams_of_the_transport_do(listens: tuple[tuple[str, ...] | None, ...]) -> None:
    async def scenario() -> None:
        async with two(*listens) as (a, b):
            for _ in range(2):
                await gives(a, b)
                await gives(b, a)
            assert (a.n_lanes, b.n_lanes) == (0, 0)
            for node, other in ((a, b), (b, a)):
                if node.lanes is not None:
                    [event] = node.events  # tried once, and then not for a while
                    assert event.startswith("lane.failed: " + ("no address" if other.lanes else ""))

    run(scenario)


def test_a_lane_that_breaks_is_done_without() -> None:
    async def scenario() -> None:
        async with two(LOOPBACK, LOOPBACK) as (a, b):
            await gives(a, b)
            link = b.exchange._links[a.transport.peer_id, True]
            stream = link._stream
            assert isinstance(stream, BulkStream)
            receive = stream._socket

            class Broken:
                """Ends the connection inside of the next answer."""

                n_left = 300_000

                def recv_into(self, view: memoryview) -> int:
                    self.n_left -= len(view)
                    return receive.recv_into(view) if self.n_left > 0 else 0

                def __getattr__(self, name: str) -> object:
                    return getattr(receive, name)

            stream._socket = Broken()  # type: ignore[assignment]
            link.piece_bytes = MIB
            await gives(a, b, 4 * MIB)
            assert any("the lane was lost" in event for event in b.events)
            assert (a.transport.peer_id, True) not in b.exchange._links

    run(scenario)


def test_strangers_get_nowhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bulk, "_DIAL_S", 0.2)

    async def scenario() -> None:
        async with two(LOOPBACK, LOOPBACK) as (a, b):
            stream = await b.transport.open(a.transport.peer_id, LANE)
            secret = os.urandom(32)
            await stream.send(*lane_codec.encode(OpenLane(secret, ())))
            answer = lane_codec.decode_only(await stream.receive() or b"")
            assert isinstance(answer, LaneAt)
            host, port = "127.0.0.1", int(answer.addresses[0].rpartition("/")[2])
            keys = lane_keys(b.transport.peer_id, a.transport.peer_id, secret, answer.secret, answer.ticket)
            for ticket, send_key, hello in (
                (os.urandom(16), keys[0], b"mycel lane"),
                (answer.ticket, bytes(32), b"mycel lane"),
                (answer.ticket, keys[1], b"mycel lane"),
                (answer.ticket, keys[0], b"another"),
                (answer.ticket[:15], None, b""),  # and then nothing
            ):
                async with await trio.open_tcp_stream(host, port) as connection:
                    await connection.send_all(ticket)
                    if send_key is not None:
                        await BulkStream("a", connection, send_key, keys[1]).send(hello)
                    with pytest.raises((trio.BrokenResourceError, AssertionError)):
                        assert await connection.receive_some() != b""
            async with await trio.open_tcp_stream(host, port) as connection:  # the ticket was not used up by them
                await connection.send_all(answer.ticket)
                lane = BulkStream("a", connection, *keys)
                await lane.send(b"mycel lane")
                assert bytes(await lane.receive() or b"") == b"mycel lane"
                async with await trio.open_tcp_stream(host, port) as again:
                    await again.send_all(answer.ticket)
                    twin = BulkStream("a", again, *keys)
                    await twin.send(b"mycel lane")
                    with pytest.raises(PeerUnreachable):
                        await twin.receive()
            await stream.reset()

    run(scenario)


def test_what_is_no_agreement_is_refused_and_lanes_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bulk, "_MAX_LANES_PER_PEER", 1)

    async def scenario() -> None:
        async with two(LOOPBACK, LOOPBACK) as (a, b):
            for nonsense in (b"\xff" * 20, b"".join(lane_codec.encode(NoLane("odd")))):
                stream = await b.transport.open(a.transport.peer_id, LANE)
                await stream.send(nonsense)
                with pytest.raises(PeerUnreachable):
                    await stream.receive()
            await gives(a, b)
            stream = await b.transport.open(a.transport.peer_id, LANE)
            await stream.send(*lane_codec.encode(OpenLane(bytes(32), ())))
            answer = lane_codec.decode_only(await stream.receive() or b"")
            assert isinstance(answer, NoLane)
            assert "too many" in answer.reason
            bare = BulkLanes(b.transport, ())
            with pytest.raises(PeerRefused):
                await bare._ask(await b.transport.open(a.transport.peer_id, LANE))

    run(scenario)
