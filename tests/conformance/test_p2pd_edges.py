"""What only the second engine can show: its daemon's life and death, and what Go's Yamux asks of its peers."""

from __future__ import annotations

import os
import random
import signal
import socket
import tempfile
from collections.abc import Awaitable, Callable
from pathlib import Path

import psutil
import pytest
import trio

from mycel.node.hivemind_engine import available
from mycel.node.hivemind_engine.available import engine_available, p2pd_path
from mycel.node.hivemind_engine.p2pd_transport import P2pdTransport, open_p2pd_transport
from mycel.node.hivemind_engine.socket_stream import SocketStream
from mycel.node.libp2p_transport import Libp2pTransport, TransportLimits
from mycel.protocols.errors import ConfigError, LocalProtocolError, PeerRefused, PeerUnreachable, RemoteProtocolError
from mycel.protocols.ids import PING
from mycel.protocols.ports import MAX_FRAME_BYTES, Stream, Transport
from mycel.security.identity import Identity
from tests.conformance.libp2p_rig import QUICK
from tests.conformance.p2pd_rig import LIBP2P, P2PD, engine_victim, needs_engine, open_engine
from tests.conformance.transport_rig import KIB, MIB, MUTE, PLAIN, accepting, assert_echoes, eventually, serve_suite

pytestmark = [pytest.mark.loopback, needs_engine]


def run(test: Callable[[], Awaitable[None]], limit_s: float = 30.0) -> None:
    async def bounded() -> None:
        with trio.fail_after(limit_s):
            await test()

    trio.run(bounded)


def our_folders() -> set[Path]:
    return set(Path(tempfile.gettempdir()).glob("mycel-p2pd-*"))


def inside(folder: Path) -> list[Path]:
    return list(folder.iterdir())


def daemons(process: psutil.Process | None = None) -> list[psutil.Process]:
    children = (process or psutil.Process()).children(recursive=True)
    return [child for child in children if child.name() == "p2pd"]


# ---- the daemon's life


@pytest.mark.slow
def test_the_daemon_has_our_identity_and_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    place = Path(tempfile.mkdtemp(prefix="m"))  # pytest's own are too long for a socket
    monkeypatch.setattr(tempfile, "tempdir", str(place))
    identity = Identity.generate()

    async def main() -> None:
        async with open_p2pd_transport(identity, limits=QUICK) as transport:
            assert transport.peer_id == identity.peer_id
            assert len(transport.addresses) == 1
            (folder,) = inside(place)
            assert folder.stat().st_mode & 0o777 == 0o700
            command = daemons()[-1].cmdline()
            assert not any(identity.seed.hex() in word for word in command)
        assert inside(place) == []
        assert daemons() == []

    run(main)
    place.rmdir()


@pytest.mark.slow
def test_a_path_for_temporary_files_may_be_too_long_for_a_socket(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    deep = tmp_path / ("x" * 80)
    deep.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(deep))

    async def main() -> None:
        async with open_p2pd_transport(Identity.generate(), limits=QUICK) as transport:
            assert transport.addresses

    run(main)


@pytest.mark.slow
def test_the_daemon_dies_with_a_killed_node_whose_sockets_the_next_one_removes() -> None:
    async def main() -> None:
        before = our_folders()
        async with engine_victim(P2PD, 2.0) as victim:
            (daemon,) = daemons(psutil.Process(victim.process.pid))
            left = our_folders() - before
            await victim.kill()
            await eventually(lambda: not daemon.is_running() or daemon.status() == psutil.STATUS_ZOMBIE, limit_s=3)
        for folder in left & our_folders():
            os.utime(folder, (0, 0))
        async with open_p2pd_transport(Identity.generate(), limits=QUICK):
            assert not left & our_folders()

    run(main)


@pytest.mark.slow
def test_a_node_does_not_go_on_without_its_daemon() -> None:
    async def main() -> None:
        async with open_p2pd_transport(Identity.generate(), limits=QUICK):
            daemons()[-1].kill()
            await trio.sleep_forever()

    with pytest.raises(LocalProtocolError, match="daemon ended"):
        run(main)


@pytest.mark.slow
def test_what_the_body_raises_comes_out_as_it_is() -> None:
    async def main() -> None:
        with pytest.raises(ZeroDivisionError):
            async with open_p2pd_transport(Identity.generate(), limits=QUICK):
                raise ZeroDivisionError

    run(main)


def test_a_port_in_use_is_one_clear_line() -> None:
    async def main() -> None:
        async with open_p2pd_transport(Identity.generate(), limits=QUICK) as first:
            port = first.addresses[0].rpartition("/")[2]
            with pytest.raises(ConfigError) as caught:
                async with open_p2pd_transport(Identity.generate(), listen=(f"/ip4/127.0.0.1/tcp/{port}",)):
                    pass
            assert str(caught.value) == f"cannot listen on 127.0.0.1 port {port}: the port is in use"

    run(main)


@pytest.mark.parametrize("address", ["", "localhost:4001", "/ip4/127.0.0.1", "/ip4/1.2.3.4/tcp/99999"])
def test_what_is_no_address_to_listen_on_is_one_clear_line(address: str) -> None:
    async def main() -> None:
        with pytest.raises(ConfigError) as caught:
            async with open_p2pd_transport(Identity.generate(), listen=(address,)):
                pass
        assert "\n" not in str(caught.value)
        assert repr(address) in str(caught.value)

    run(main)


def test_why_the_engine_cannot_run_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert engine_available() == ""
    assert p2pd_path() is not None
    with monkeypatch.context() as patch:
        patch.setattr(available.platform, "machine", lambda: "aarch64")
        assert "aarch64" in engine_available()
    with monkeypatch.context() as patch:
        patch.setattr(available, "p2pd_path", lambda: None)
        assert "pip install" in engine_available()
    with monkeypatch.context() as patch:
        patch.setattr(available, "p2pd_path", lambda: tmp_path / "p2pd")
        assert "no daemon that can be run" in engine_available()


# ---- peers


@pytest.mark.slow
def test_a_stranger_that_answers_no_heartbeat_is_refused() -> None:
    async def main() -> None:
        async with open_engine(P2PD) as near, open_engine(LIBP2P) as far:
            assert isinstance(far, Libp2pTransport)
            far._handlers.pop(PING, None)
            near.learn(far.peer_id, far.addresses)
            with pytest.raises(PeerRefused, match=PING):
                await near.open(far.peer_id, PLAIN)
            assert far.peer_id not in near.connected()

    run(main)


@pytest.mark.slow
def test_a_peer_that_announces_too_much_is_named() -> None:
    async def main() -> None:
        async with open_engine(P2PD) as near, open_engine(P2PD) as far:
            near.learn(far.peer_id, far.addresses)
            async with accepting(far, PLAIN) as inbound:
                stream = await near.open(far.peer_id, PLAIN)
                assert isinstance(stream, SocketStream)
                stream._socket.send((MAX_FRAME_BYTES + 1).to_bytes(4, "big") + bytes(100))
                received = await inbound.receive()
                with pytest.raises(RemoteProtocolError, match="over") as caught:
                    await received.receive()
                assert caught.value.peer == near.peer_id

    run(main)


@pytest.mark.slow
def test_a_peer_can_have_only_so_many_streams() -> None:
    async def main() -> None:
        limits = TransportLimits(heartbeat_interval_s=0.4, silence_s=2.0, max_streams_per_peer=8)
        async with open_engine(P2PD, limits) as far, open_engine(P2PD) as near:
            serve_suite(far)
            near.learn(far.peer_id, far.addresses)
            streams = [await near.open(far.peer_id, MUTE) for _ in range(12)]
            broken: list[Stream] = []

            async def wait_for_its_end(stream: Stream) -> None:
                with pytest.raises(PeerUnreachable):
                    await stream.receive()
                broken.append(stream)

            async with trio.open_nursery() as nursery:
                for stream in streams:
                    nursery.start_soon(wait_for_its_end, stream)
                await eventually(lambda: len(broken) == 5)  # one of the eight is the heartbeat
                nursery.cancel_scope.cancel()
            assert far.connected() == {near.peer_id}

    run(main)


@pytest.mark.slow
def test_go_never_owes_a_sender_its_window() -> None:
    """Frames of sizes that fit nothing, on fresh streams: a sender that waits for more credit than there is hangs."""

    async def main() -> None:
        rng = random.Random(4)
        async with open_engine(P2PD) as far, open_engine(LIBP2P) as near:
            near.learn(far.peer_id, far.addresses)
            for sizes in [(64 * KIB, 64 * KIB), (1, 40_000), (MIB, 3 * MIB), (1, 100)]:
                await _pour(near, far, rng, sizes, 24 * MIB if sizes[1] > 100 else MIB)
                await _pour(far, near, rng, sizes, 24 * MIB if sizes[1] > 100 else MIB)

    run(main, limit_s=60)


async def _pour(source: Transport, drain: Transport, rng: random.Random, sizes: tuple[int, int], total: int) -> None:
    async def send(stream: Stream) -> None:
        left = total
        while left > 0:
            size = rng.randint(*sizes)
            await stream.send(bytes(size))
            left -= size
        await stream.aclose()

    async with accepting(drain, PLAIN) as inbound:
        stream = await source.open(drain.peer_id, PLAIN)
        far, received = await inbound.receive(), 0
        async with trio.open_nursery() as nursery:
            nursery.start_soon(send, stream)
            while (frame := await far.receive()) is not None:
                received += len(frame)
        assert received >= total


@pytest.mark.slow
@pytest.mark.parametrize(("watcher", "victim"), [(LIBP2P, P2PD), (P2PD, P2PD)])
def test_a_stopped_node_is_missed_though_its_daemon_goes_on(watcher: str, victim: str) -> None:
    async def main() -> None:
        async with open_engine(watcher) as near, engine_victim(victim, 2.0) as stopped:
            near.learn(stopped.peer_id, stopped.addresses)
            await assert_echoes(near, stopped.peer_id)
            stream = await near.open(stopped.peer_id, "/suite/echo/1")
            os.kill(stopped.process.pid, signal.SIGSTOP)
            with trio.fail_after(4.0), pytest.raises(PeerUnreachable, match="silent"):
                await stream.receive()
            assert near.connected() == frozenset()
            os.kill(stopped.process.pid, signal.SIGCONT)
            await assert_echoes(near, stopped.peer_id)

    run(main)


@pytest.mark.slow
def test_nobody_else_can_reach_the_sockets() -> None:
    async def main() -> None:
        async with open_engine(P2PD) as transport:
            assert isinstance(transport, P2pdTransport)
            with socket.socket(socket.AF_UNIX) as stranger:  # of this user; the folder keeps out all others
                stranger.connect(transport._daemon.streams)
                stranger.send(b"\xff" * 100)
            await assert_self_is_well(transport)

    run(main)


async def assert_self_is_well(transport: Transport) -> None:
    async with open_engine(P2PD) as other:
        serve_suite(other)
        transport.learn(other.peer_id, other.addresses)
        await assert_echoes(transport, other.peer_id)
