"""What only the real adapter can show: libp2p's sharp edges, hostile and foreign peers, processes, sockets and ports.

The shared suite (test_libp2p_transport) holds the rest: cancellation storms, SIGKILL, SIGSTOP, 300 of everything.
"""

from __future__ import annotations

import gc
import logging
import os
import socket
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from functools import partial
from pathlib import Path

import pytest
import trio
import trio.testing
from libp2p import new_host
from libp2p.crypto.ed25519 import create_new_key_pair
from libp2p.host.exceptions import StreamFailure
from libp2p.network.config import ConnectionConfig
from libp2p.network.connection.swarm_connection import SwarmConn
from libp2p.network.swarm import Swarm
from libp2p.peer.id import ID
from libp2p.peer.peerinfo import PeerInfo
from libp2p.security.insecure.transport import PLAINTEXT_PROTOCOL_ID, InsecureTransport
from multiaddr import Multiaddr

from mycel.node.libp2p_transport import Libp2pTransport, TransportLimits, open_transport
from mycel.node.libp2p_transport.connection import Connection
from mycel.node.libp2p_transport.dialing import Dialler
from mycel.node.libp2p_transport.stream import FrameStream
from mycel.protocols.errors import (
    ConfigError,
    LocalProtocolError,
    PeerError,
    PeerRefused,
    PeerUnreachable,
    RemoteProtocolError,
)
from mycel.protocols.ports import MAX_FRAME_BYTES, Stream
from mycel.security.identity import Identity
from tests.conformance.libp2p_rig import QUICK, process_victim
from tests.conformance.transport_rig import (
    ECHO,
    KIB,
    MIB,
    MUTE,
    accepting,
    assert_echoes,
    eventually,
    frame_of,
    index_of,
    serve_suite,
)

pytestmark = pytest.mark.loopback

Events = list[tuple[str, dict[str, object]]]


def run(test: Callable[[], Awaitable[None]], limit_s: float = 30.0) -> None:
    async def bounded() -> None:
        with trio.fail_after(limit_s):
            await test()

    trio.run(bounded)


@asynccontextmanager
async def transport(
    limits: TransportLimits = QUICK, events: Events | None = None, listen: tuple[str, ...] = ("/ip4/127.0.0.1/tcp/0",)
) -> AsyncIterator[Libp2pTransport]:
    """A transport that serves the suite's handlers and writes its events down."""

    def event(name: str, /, **fields: object) -> None:
        if events is not None:
            events.append((name, fields))

    async with open_transport(Identity.generate(), listen=listen, limits=limits, event=event) as opened:
        serve_suite(opened)
        yield opened


@asynccontextmanager
async def knowing_pair(
    limits: TransportLimits = QUICK, events: Events | None = None
) -> AsyncIterator[tuple[Libp2pTransport, Libp2pTransport]]:
    """A client that knows a server, and the server, whose events are written down."""
    async with transport(limits, events) as server, transport(limits, listen=()) as client:
        client.learn(server.peer_id, server.addresses)
        yield client, server


def reasons(events: Events, name: str) -> list[str]:
    return [str(fields["reason"]) for found, fields in events if found == name]


# ---- listening and ending -----------------------------------------------------------------------------------------


def test_a_port_in_use_is_one_clear_line() -> None:
    async def main() -> None:
        async with transport() as first:
            port = first.addresses[0].rpartition("/")[2]
            with pytest.raises(ConfigError) as caught:
                async with transport(listen=(f"/ip4/127.0.0.1/tcp/{port}",)):
                    pass
            assert str(caught.value) == f"cannot listen on 127.0.0.1 port {port}: the port is in use"

    run(main)


@pytest.mark.parametrize(
    "address",
    ["", "localhost:4001", "/ip4/127.0.0.1", "/ip4/127.0.0.1/udp/1/quic-v1", "/ip4/1.2.3.4/tcp/99999", "/x/y"],
)
def test_what_is_no_address_to_listen_on_is_one_clear_line(address: str) -> None:
    async def main() -> None:
        with pytest.raises(ConfigError) as caught:
            async with transport(listen=(address,)):
                pass
        assert "\n" not in str(caught.value)
        assert repr(address) in str(caught.value)

    run(main)


def test_another_computers_address_cannot_be_listened_on() -> None:
    async def main() -> None:
        with pytest.raises(ConfigError, match=r"cannot listen on 192\.0\.2\.1 port 4001: cannot assign"):
            async with transport(listen=("/ip4/192.0.2.1/tcp/4001",)):
                pass

    run(main)


def test_nobody_can_share_our_port() -> None:
    """libp2p listens with SO_REUSEPORT: a second process would get half of our connections."""

    async def main() -> None:
        async with transport() as first:
            port = int(first.addresses[0].rpartition("/")[2])
            with socket.socket() as thief:
                thief.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
                with pytest.raises(OSError, match="in use"):
                    thief.bind(("127.0.0.1", port))

    run(main)


def test_a_shutdown_leaves_no_task_no_socket_and_no_listener() -> None:
    def n_fds() -> int:
        gc.collect()
        return len(list(Path("/proc/self/fd").iterdir())) if sys.platform == "linux" else 0

    async def one_life() -> str:
        async with transport() as server:
            async with trio.open_nursery() as nursery:

                async def visit() -> None:
                    async with transport(listen=()) as client:
                        client.learn(server.peer_id, server.addresses)
                        await client.open(server.peer_id, MUTE)
                        await assert_echoes(client, server.peer_id)

                for _ in range(5):
                    nursery.start_soon(visit)
            return server.addresses[0]

    async def main() -> None:
        await one_life()
        await trio.testing.wait_all_tasks_blocked(0.05)
        fds, tasks = n_fds(), trio.lowlevel.current_statistics().tasks_living
        address = await one_life()
        await eventually(lambda: trio.lowlevel.current_statistics().tasks_living == tasks)
        assert n_fds() == fds
        with pytest.raises(OSError, match="connect"):
            await trio.open_tcp_stream("127.0.0.1", int(address.rpartition("/")[2]))

    run(main)


def test_many_connections_end_at_once() -> None:
    """libp2p closes them one after the other, 0.2 s each."""

    async def main() -> None:
        n_guests = 20
        closed_in_s = 0.0
        async with trio.open_nursery() as nursery:
            over = trio.Event()

            async def guest(hub: Libp2pTransport, task_status: trio.TaskStatus[None]) -> None:
                async with transport(listen=()) as client:
                    client.learn(hub.peer_id, hub.addresses)
                    await assert_echoes(client, hub.peer_id)
                    task_status.started()
                    await over.wait()

            async with transport() as hub:
                for _ in range(n_guests):
                    await nursery.start(guest, hub)
                assert len(hub.connected()) == n_guests
                started = trio.current_time()
            closed_in_s = trio.current_time() - started
            over.set()
        assert closed_in_s < 0.2 * n_guests / 2

    run(main)


def test_the_body_of_open_transport_raises_its_own_errors() -> None:
    """Not wrapped in a group, as a nursery would."""

    async def main() -> None:
        with pytest.raises(PeerRefused, match="on purpose"):
            async with transport():
                raise PeerRefused("", "on purpose")
        with trio.move_on_after(0.05) as scope:
            async with transport():
                await trio.sleep_forever()
        assert scope.cancelled_caught

    run(main)


def test_what_was_sent_before_the_end_arrives() -> None:
    """A client that sends, closes and is gone at once: the server still gets everything, and the end."""

    async def main() -> None:
        async with transport() as server, accepting(server, "/suite/keep/1") as inbound:
            async with transport(listen=()) as client:
                client.learn(server.peer_id, server.addresses)
                stream = await client.open(server.peer_id, "/suite/keep/1")
                for i in range(30):
                    await stream.send(frame_of(i, 100 * KIB))
                await stream.aclose()
            far = await inbound.receive()
            for i in range(30):
                frame = await far.receive()
                assert frame is not None
                assert index_of(frame) == i
            assert await far.receive() is None

    run(main)


# ---- foreign and hostile peers ------------------------------------------------------------------------------------


@asynccontextmanager
async def stock_host() -> AsyncIterator[object]:
    """libp2p as it comes: what other implementations look like from here, and a hand that can write any bytes."""
    host = new_host(connection_config=ConnectionConfig(max_connections_per_peer=1))
    async with host.run([Multiaddr("/ip4/127.0.0.1/tcp/0")]):
        try:
            yield host
        finally:
            with trio.move_on_after(3) as scope:
                scope.shield = True
                await host.close()


async def _stock_stream(host, server: Libp2pTransport, protocol: str = ECHO):
    peer = ID.from_string(server.peer_id)
    await host.connect(PeerInfo(peer, [Multiaddr(address) for address in server.addresses]))
    return await host.new_stream(peer, [protocol])


async def _read_exactly(stream, size_bytes: int) -> bytes:
    data = b""
    while len(data) < size_bytes:
        data += await stream.read(size_bytes - len(data))
    return data


def test_stock_libp2p_can_talk_to_us() -> None:
    async def main() -> None:
        async with transport() as server, stock_host() as host:
            stream = await _stock_stream(host, server)
            for size_bytes in (1, 3000, 3 * MIB):
                frame = os.urandom(size_bytes)
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(stream.write, size_bytes.to_bytes(4, "big") + frame)
                    assert await _read_exactly(stream, 4 + size_bytes) == size_bytes.to_bytes(4, "big") + frame
            with pytest.raises(StreamFailure):
                await host.new_stream(ID.from_string(server.peer_id), ["/nobody/speaks/this"])
            stream = await host.new_stream(ID.from_string(server.peer_id), ["/nobody/speaks/this", ECHO])
            await stream.write(b"\x00\x00\x00\x01x")
            assert await _read_exactly(stream, 5) == b"\x00\x00\x00\x01x"

    run(main)


def test_we_can_talk_to_stock_libp2p() -> None:
    async def main() -> None:
        async def echo(stream) -> None:
            try:
                while True:
                    await stream.write(await stream.read(65536))
            except Exception:  # noqa: BLE001 - libp2p's host dies of an exception that leaves a handler
                await stream.reset()

        async with stock_host() as host, transport(listen=()) as client:
            host.set_stream_handler("/stock/echo/1", echo)
            peer = str(host.get_id())
            client.learn(peer, [str(address) for address in host.get_addrs()])
            stream = await client.open(peer, "/stock/echo/1")
            for size_bytes in (1, 3000, 3 * MIB):
                frame = os.urandom(size_bytes)
                await stream.send(frame)
                assert await stream.receive() == frame
            with pytest.raises(PeerRefused, match="does not speak /mycel/none/1"):
                await client.open(peer, "/mycel/none/1")
            await eventually(lambda: client.rtt_s(peer) is not None)  # it answers Yamux's pings
            await stream.aclose()

    run(main)


def test_plaintext_is_refused() -> None:
    """libp2p's defaults fall back to it: an attacker on the path could have both sides agree on no encryption."""

    async def main() -> None:
        keys = create_new_key_pair()
        host = new_host(key_pair=keys, sec_opt={PLAINTEXT_PROTOCOL_ID: InsecureTransport(keys)})
        async with host.run([Multiaddr("/ip4/127.0.0.1/tcp/0")]), transport() as ours:
            peer = str(host.get_id())
            ours.learn(peer, [str(address) for address in host.get_addrs()])
            with pytest.raises(PeerUnreachable):
                await ours.open(peer, ECHO)
            with pytest.raises(Exception, match=r"unable to connect|failed"):
                await host.connect(PeerInfo(ID.from_string(ours.peer_id), [Multiaddr(a) for a in ours.addresses]))
            assert not ours.connected()
            with trio.move_on_after(3):
                await host.close()

    run(main)


@pytest.mark.parametrize(
    "garbage",
    [
        b"\xff\xff\xff\xff\xff\xff\xff\xff\xff\x7f",  # a name of 2**63 bytes
        b"\x05\xff\xfe\xfd\xfc\n",  # a name that is no text: libp2p's own host dies of it
        b"\x13/multistream/9.9.9\n",
        b"\x00" * 100,
    ],
)
def test_garbage_instead_of_a_protocol_harms_nobody(garbage: bytes) -> None:
    async def main() -> None:
        async with knowing_pair() as (client, server), stock_host() as host:
            bystander = await client.open(server.peer_id, ECHO)
            peer = ID.from_string(server.peer_id)
            await host.connect(PeerInfo(peer, [Multiaddr(address) for address in server.addresses]))
            stream = await host.get_network().new_stream(peer)
            await stream.write(garbage)
            with pytest.raises(Exception, match=r"^$|reset|EOF|closed"):
                await _read_exactly(stream, MIB)
            await bystander.send(b"still well")
            assert await bystander.receive() == b"still well"

    run(main)


def test_a_stream_that_never_says_its_protocol_is_reset() -> None:
    async def main() -> None:
        limits = TransportLimits(heartbeat_interval_s=0.1, silence_s=2.0, open_timeout_s=0.3)
        async with transport(limits) as server, stock_host() as host:
            peer = ID.from_string(server.peer_id)
            await host.connect(PeerInfo(peer, [Multiaddr(address) for address in server.addresses]))
            stream = await host.get_network().new_stream(peer)
            with pytest.raises(Exception, match=r"^$|reset|EOF|closed"):
                await stream.read(1000)

    run(main)


def test_a_frame_over_the_limit_is_the_peers_fault() -> None:
    async def main() -> None:
        async with transport() as server, accepting(server, "/suite/keep/1") as inbound, stock_host() as host:
            hostile = await _stock_stream(host, server, "/suite/keep/1")
            await hostile.write((MAX_FRAME_BYTES + 1).to_bytes(4, "big") + b"x")
            far = await inbound.receive()
            with pytest.raises(RemoteProtocolError, match="announced a frame of") as caught:
                await far.receive()
            assert caught.value.peer == str(host.get_id())
            with pytest.raises(PeerError):
                await far.send(b"nobody is there")

    run(main)


def test_an_end_without_the_mark_is_no_end() -> None:
    """libp2p's half close looks the same as a process that was killed."""

    async def main() -> None:
        async with transport() as server, accepting(server, "/suite/keep/1") as inbound, stock_host() as host:
            hostile = await _stock_stream(host, server, "/suite/keep/1")
            await hostile.write(b"\x00\x00\x00\x02ok\x00\x00\x00\x09half")
            await hostile.close()
            far = await inbound.receive()
            assert await far.receive() == b"ok"
            with pytest.raises(PeerUnreachable, match="closed the stream"):
                await far.receive()

    run(main)


def test_a_peer_that_ignores_the_window_is_cut_off() -> None:
    async def main() -> None:
        events: Events = []
        async with knowing_pair(events=events) as (client, server):
            stream = await client.open(server.peer_id, MUTE)
            assert isinstance(stream, FrameStream)
            stream._mux.send_window = 2**30  # the lie
            with pytest.raises(PeerUnreachable):
                await _send_forever(stream)
            assert await _soon(lambda: reasons(events, "peer.lost"))
            assert reasons(events, "peer.lost") == ["the peer sent more than its window"]
            await assert_echoes(client, server.peer_id)

    run(main)


def test_frames_that_nobody_takes_are_bounded_for_each_connection() -> None:
    limits = TransportLimits(
        heartbeat_interval_s=0.4, silence_s=2.0, max_frame_bytes=2 * MIB, max_held_bytes_per_connection=16 * MIB
    )

    async def main() -> None:
        async with knowing_pair(limits) as (client, server):
            streams = [await client.open(server.peer_id, MUTE) for _ in range(8)]
            n_reset = 0
            for stream in streams:  # 4 MiB of window each
                try:
                    with trio.move_on_after(0.3):
                        while True:
                            await stream.send(bytes(64 * KIB))
                    with trio.move_on_after(0.1):
                        await stream.receive()
                except PeerUnreachable:
                    n_reset += 1
            held_bytes = [connection.held.used for live in server._live.values() for connection in live]
            assert max(held_bytes) <= 17 * MIB
            assert n_reset >= 3
            for stream in streams:
                await stream.reset()
            await assert_echoes(client, server.peer_id)
            await eventually(lambda: len(server._live[client.peer_id][0].muxer.streams) <= 8)

    run(main)


def test_a_flood_before_the_handshake_is_cut_off() -> None:
    """libp2p reads a length of its peer's choice before it knows who that is."""

    async def main() -> None:
        async with transport() as server:
            sock = await trio.open_tcp_stream("127.0.0.1", int(server.addresses[0].rpartition("/")[2]))
            with pytest.raises(trio.BrokenResourceError):
                await sock.send_all(b"\xff\xff\xff\xff\x7f" + bytes(64 * MIB))
            await sock.aclose()

    run(main)


# ---- admission ----------------------------------------------------------------------------------------------------


def test_streams_over_the_limit_are_refused_at_once_and_come_back() -> None:
    async def main() -> None:
        few = TransportLimits(max_streams_per_peer=3)
        events: Events = []
        async with transport(few, events) as server, transport(listen=()) as client, transport(few) as modest:
            for opener in (client, modest):
                opener.learn(server.peer_id, server.addresses)
                streams = [await opener.open(server.peer_id, ECHO) for _ in range(3)]
                with pytest.raises(PeerRefused):
                    await opener.open(server.peer_id, ECHO)
                await streams.pop().aclose()
                streams.append(await opener.open(server.peer_id, ECHO))
                for stream in streams:
                    await stream.send(b"well")
                    assert await stream.receive() == b"well"
            assert reasons(events, "stream.refused") == ["3 streams from it are open"]

    run(main)


def test_connections_over_the_limit_are_refused_and_come_back() -> None:
    async def main() -> None:
        few = TransportLimits(max_connections=2)
        async with transport(few) as server, transport(listen=()) as first, transport(listen=()) as third:
            async with transport(listen=()) as second:
                for client in (first, second, third):
                    client.learn(server.peer_id, server.addresses)
                await assert_echoes(first, server.peer_id)
                await assert_echoes(second, server.peer_id)
                with pytest.raises(PeerError):
                    await (await third.open(server.peer_id, ECHO)).receive()
                await assert_echoes(first, server.peer_id)
                await assert_echoes(second, server.peer_id)
            await eventually(lambda: len(server.connected()) < 2)
            with trio.fail_after(10):
                while third.peer_id not in server.connected():
                    # libp2p forgets a connection 0.2 s after its end; the back-off is the pause
                    with suppress(PeerError):
                        await assert_echoes(third, server.peer_id)

    run(main)


def test_one_peer_cannot_take_all_connections() -> None:
    async def main() -> None:
        events: Events = []
        async with knowing_pair(events=events) as (client, server):
            for _ in range(6):
                with suppress(PeerError):  # the fifth may hear of its refusal while it is being made
                    await client._dialler.connect(server.peer_id)
            await eventually(lambda: len(client._live[server.peer_id]) == 4)
            assert len(server._live[client.peer_id]) == 4
            await assert_echoes(client, server.peer_id)
            assert [name for name, _ in events] == ["peer.connected"]

    run(main)


def test_the_resource_manager_of_libp2p_is_on() -> None:
    async def main() -> None:
        async with transport(TransportLimits(max_connections=7)) as server:
            manager = server.swarm._resource_manager
            assert manager is not None
            assert manager.limits.max_connections == 14
            assert manager.connection_lifecycle is not None

    run(main)


def test_a_connection_that_ends_while_it_is_added_is_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    """A client that leaves within its handshake's last step; libp2p kept it, and refused everybody after 1000."""
    start = SwarmConn.start

    async def leave_first(self: SwarmConn) -> None:
        if self.swarm is leaving_from:
            connection = self.muxed_conn
            assert isinstance(connection, Connection)
            connection.kill("it left")
            await self.event_closed.wait()
            for _ in range(10):  # libp2p looks for the connection in its book, where it is not yet
                await trio.lowlevel.checkpoint()
        await start(self)

    monkeypatch.setattr(SwarmConn, "start", leave_first)
    leaving_from = None

    async def main() -> None:
        nonlocal leaving_from
        async with transport() as server:
            leaving_from = server.swarm
            for _ in range(3):
                async with transport(listen=()) as client:
                    client.learn(server.peer_id, server.addresses)
                    with pytest.raises(PeerError):
                        await client.open(server.peer_id, ECHO)
            await eventually(lambda: not server.swarm._inbound_limiter.borrowed_tokens)
            assert not server.swarm.get_connections()
            assert server.swarm._resource_manager is not None
            assert server.swarm._resource_manager._current_connections == 0
            leaving_from = None
            async with transport(listen=()) as client:
                client.learn(server.peer_id, server.addresses)
                await assert_echoes(client, server.peer_id)

    run(main)


def test_clients_that_left_are_not_remembered() -> None:
    async def main() -> None:
        async with transport() as server:
            before = _sizes(server.swarm)
            for _ in range(5):
                async with transport(listen=()) as client:
                    client.learn(server.peer_id, server.addresses)
                    await assert_echoes(client, server.peer_id)
            await eventually(lambda: not server.swarm._inbound_limiter.borrowed_tokens)
            await eventually(lambda: _sizes(server.swarm) == before)

    run(main)


def _sizes(swarm: Swarm) -> dict[str, int]:
    """How much each book of libp2p's swarm holds."""
    manager = swarm._resource_manager
    assert manager is not None
    assert manager.connection_lifecycle is not None
    books = (swarm, swarm.auto_connector, swarm.peerstore, manager, manager.connection_lifecycle.tracker)
    entries = ((type(book).__name__, name, value) for book in books for name, value in vars(book).items())
    return {f"{book}.{name}": len(value) for book, name, value in entries if isinstance(value, dict | list | set)}


# ---- dialling -----------------------------------------------------------------------------------------------------


@asynccontextmanager
async def silent_listener() -> AsyncIterator[tuple[str, list[trio.SocketStream]]]:
    """Accepts and says nothing; its address and what it accepted."""
    accepted: list[trio.SocketStream] = []

    async def hold(stream: trio.SocketStream) -> None:
        accepted.append(stream)
        await trio.sleep_forever()

    async with trio.open_nursery() as nursery:
        listeners = await nursery.start(partial(trio.serve_tcp, hold, 0, host="127.0.0.1"))
        port = listeners[0].socket.getsockname()[1]
        yield f"/ip4/127.0.0.1/tcp/{port}", accepted
        nursery.cancel_scope.cancel()


def test_a_silent_address_does_not_delay_a_good_one() -> None:
    async def main() -> None:
        async with transport() as server, transport(listen=()) as client, silent_listener() as (silent, accepted):
            client.learn(server.peer_id, server.addresses)
            client.learn(server.peer_id, [silent])  # newer, so it is tried first
            with trio.fail_after(1.5):
                await assert_echoes(client, server.peer_id)
            assert len(accepted) == 1

    run(main)


def test_all_who_open_share_one_dial() -> None:
    async def main() -> None:
        peer = Identity.generate().peer_id
        limits = TransportLimits(dial_timeout_s=0.4)
        failures: list[PeerError] = []
        async with transport(limits, listen=()) as client, silent_listener() as (silent, accepted):
            client.learn(peer, [silent])

            async def fail() -> None:
                with pytest.raises(PeerError) as caught:
                    await client.open(peer, ECHO)
                failures.append(caught.value)

            async with trio.open_nursery() as nursery:
                for _ in range(20):
                    nursery.start_soon(fail)
                with trio.move_on_after(0.1):  # one who loses patience takes nobody with him
                    await client.open(peer, ECHO)
            assert len(failures) == 20
            assert len(accepted) == 1

    run(main)


def test_failures_back_off_and_a_new_address_does_not_wait() -> None:
    async def main() -> None:
        async with transport() as server, transport(listen=()) as client:
            with socket.socket() as nobody:  # bound, but it does not listen
                nobody.bind(("127.0.0.1", 0))
                client.learn(server.peer_id, [f"/ip4/127.0.0.1/tcp/{nobody.getsockname()[1]}"])
                started = trio.current_time()
                for _ in range(5):
                    with pytest.raises(PeerUnreachable, match="refused"):
                        await client.open(server.peer_id, ECHO)
                took_s = trio.current_time() - started
                assert took_s >= 0.05 + 0.1 + 0.2 + 0.4
                client.learn(server.peer_id, server.addresses)
                started = trio.current_time()
                await assert_echoes(client, server.peer_id)
                assert trio.current_time() - started < 0.5

    run(main)


def test_a_dial_that_outlasted_our_own_standstill_is_made_again() -> None:
    """All deadlines are over when a process goes on after a stop: a peer that is well must not look silent."""
    n_dials = 0

    async def dial(address: Multiaddr, peer: str) -> Connection:
        nonlocal n_dials
        n_dials += 1
        if n_dials == 1:
            clock = trio.lowlevel.current_clock()
            assert isinstance(clock, trio.testing.MockClock)
            clock.jump(60.0)
        await trio.sleep(0.1 if n_dials == 2 else 3600.0)
        raise ConnectionRefusedError("reached")

    async def main() -> None:
        async with trio.open_nursery() as nursery:
            dialler = Dialler(dial, nursery.start_soon, TransportLimits())
            dialler.learn("peer", ["/ip4/127.0.0.1/tcp/1"])
            with pytest.raises(PeerUnreachable, match="reached"):
                await dialler.connect("peer")
            began = trio.current_time()
            with pytest.raises(PeerUnreachable, match="no answer"):
                await dialler.connect("peer")
            assert trio.current_time() - began < 6.0, "a peer that is silent while we are awake is tried once"
        assert n_dials == 3

    trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0))


def test_hostile_addresses_are_forgotten_not_raised() -> None:
    async def main() -> None:
        async with transport() as server, transport(listen=()) as client:
            bad = ["", "x", "/ip4/999.1.1.1/tcp/1", "/ip4/127.0.0.1/udp/1", "/ip4/127.0.0.1/tcp/0", "/tcp/1", "/unix/x"]
            other = Identity.generate().peer_id
            client.learn(server.peer_id, [*bad, f"{server.addresses[0]}/p2p/{other}"])
            with pytest.raises(PeerUnreachable, match="no address"):
                await client.open(server.peer_id, ECHO)
            client.learn(server.peer_id, [f"{server.addresses[0]}/p2p/{server.peer_id}"])
            await assert_echoes(client, server.peer_id)
            with pytest.raises(PeerUnreachable, match="not the id of a peer"):
                await client.open("not-an-id", ECHO)
            with pytest.raises(LocalProtocolError):
                await client.open(client.peer_id, ECHO)

    run(main)


# ---- handlers -----------------------------------------------------------------------------------------------------


def test_what_a_handler_raises_is_told_and_goes_no_further() -> None:
    async def main() -> None:
        events: Events = []
        async with knowing_pair(events=events) as (client, server):

            async def crash(stream: Stream) -> None:
                raise ZeroDivisionError("a bug")

            async def crash_in_a_nursery(stream: Stream) -> None:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(trio.sleep_forever)
                    raise LocalProtocolError("a bug of ours")

            async def refuse(stream: Stream) -> None:
                raise PeerRefused(stream.peer, "we are full")

            for name, handler in (("crash", crash), ("group", crash_in_a_nursery), ("refuse", refuse)):
                server.serve(f"/suite/{name}/1", handler)
                stream = await client.open(server.peer_id, f"/suite/{name}/1")
                with pytest.raises(PeerUnreachable):
                    await stream.receive()
            await assert_echoes(client, server.peer_id)
            crashed = [fields for name, fields in events if name == "handler.crashed"]
            assert [str(fields["protocol"]) for fields in crashed] == ["/suite/crash/1", "/suite/group/1"]
            assert "ZeroDivisionError: a bug" in str(crashed[0]["traceback"])
            assert reasons(events, "handler.failed") == [f"we are full (peer {client.peer_id[-8:]})"]

    run(main)


def test_libp2p_prints_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    """In spite of failures of every kind; and it gives the root logger no handler."""

    async def main() -> None:
        async with knowing_pair() as (client, server):
            await assert_echoes(client, server.peer_id)
            with pytest.raises(PeerRefused):
                await client.open(server.peer_id, "/none/1")
            client.learn(Identity.generate().peer_id, server.addresses)
            impostor = Identity.generate().peer_id
            client.learn(impostor, server.addresses)
            with pytest.raises(PeerUnreachable):
                await client.open(impostor, ECHO)
            sock = await trio.open_tcp_stream("127.0.0.1", int(server.addresses[0].rpartition("/")[2]))
            await sock.send_all(b"GET / HTTP/1.1\r\n\r\n")
            await sock.aclose()
            server._live[client.peer_id][0].kill("on purpose")
            await eventually(lambda: not client.connected())

    handlers = list(logging.getLogger().handlers)
    run(main)
    assert logging.getLogger().handlers == handlers
    assert capfd.readouterr() == ("", "")


# ---- silence ------------------------------------------------------------------------------------------------------


def test_a_stopped_process_is_called_silent() -> None:
    async def main() -> None:
        events: Events = []
        async with process_victim(QUICK.silence_s) as victim, transport(QUICK, events, listen=()) as client:
            client.learn(victim.peer_id, victim.addresses)
            stream = await client.open(victim.peer_id, ECHO)
            await victim.stop()
            started = trio.current_time()
            with pytest.raises(PeerUnreachable, match=r"silent for 2\.0 s"):
                await stream.receive()
            assert 1.0 <= trio.current_time() - started <= 4.0
            assert reasons(events, "peer.lost") == ["silent for 2.0 s"]

    run(main)


@pytest.mark.slow
def test_a_stopped_process_is_noticed_at_the_default_limits() -> None:
    async def main() -> None:
        async with process_victim(5.0) as victim, transport(TransportLimits(), listen=()) as client:
            client.learn(victim.peer_id, victim.addresses)
            stream = await client.open(victim.peer_id, MUTE)
            await victim.stop()
            started = trio.current_time()
            with pytest.raises(PeerUnreachable, match=r"silent for 5\.0 s"):
                await _send_forever(stream)
            assert trio.current_time() - started <= 7.0

    run(main)


@pytest.mark.slow
def test_who_slept_himself_blames_nobody() -> None:
    """A process that stood still for longer than its own limit (a laptop's lid) finds its peers as alive as before."""

    async def main() -> None:
        patient = TransportLimits(heartbeat_interval_s=0.4, silence_s=60.0)
        async with process_victim(1.0) as sleeper, transport(patient, listen=()) as client:
            client.learn(sleeper.peer_id, sleeper.addresses)
            stream = await client.open(sleeper.peer_id, ECHO)
            await sleeper.stop()
            await stream.send(b"good morning")
            with trio.move_on_after(3.0):
                raise AssertionError(f"a stopped process answered {await stream.receive()!r}")
            await sleeper.cont()
            assert await stream.receive() == b"good morning"
            await stream.send(b"still there")
            assert await stream.receive() == b"still there"

    run(main)


async def _send_forever(stream: Stream) -> None:
    while True:
        await stream.send(bytes(64 * KIB))


async def _soon(condition: Callable[[], object]) -> bool:
    await eventually(lambda: bool(condition()))
    return True
