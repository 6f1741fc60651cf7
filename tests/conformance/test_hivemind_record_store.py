"""The record store over a hivemind DHT passes its suite: real DHT nodes on loopback, in the engine's own process."""

from __future__ import annotations

import socket
import subprocess
import time
from collections.abc import Awaitable, Callable, Iterator

import msgspec
import pytest
import trio

from mycel.node.hivemind_engine import dht_messages as said
from mycel.node.hivemind_engine.dht_client import PACKAGE_ROOT, DhtClient, child_command, open_dht_process
from mycel.node.hivemind_engine.record_store import HivemindRecordStore, open_hivemind_records
from mycel.protocols.errors import PeerUnreachable
from mycel.protocols.messages import PeerAddress
from mycel.security.envelope import sign_record
from mycel.security.identity import Identity
from tests.conformance.p2pd_rig import needs_engine
from tests.conformance.record_store_suite import CHECKS, KEY, Check, Node

pytestmark = [pytest.mark.slow, pytest.mark.loopback, needs_engine]
LIMIT_S = 60.0


@pytest.fixture(scope="module")
def dht_process() -> Iterator[socket.socket]:
    """One process for all checks, each of which starts nodes of its own in it: importing hivemind takes seconds."""
    ours, theirs = socket.socketpair()
    with theirs:
        process = subprocess.Popen(child_command(theirs.fileno()), pass_fds=[theirs.fileno()], cwd=PACKAGE_ROOT)
    with process:
        with ours:
            yield ours
        assert process.wait(LIMIT_S) == 0


class DhtRig:
    """Members of one hivemind DHT, the first of which the others join through."""

    def __init__(self, client: DhtClient, nursery: trio.Nursery) -> None:
        self.client = client
        self.initial: tuple[str, ...] = ()
        self._nursery = nursery
        self._living: dict[str, tuple[trio.Event, trio.Event]] = {}
        self._skipped_s = 0.0

    async def start(self) -> Node:
        node: Node = await self._nursery.start(self._live)
        return node

    async def _live(self, *, task_status: trio.TaskStatus[Node]) -> None:
        identity, stop, stopped = Identity.generate(), trio.Event(), trio.Event()
        own = PeerAddress(identity.peer_id, (f"/ip4/192.0.2.1/tcp/{4001 + len(self._living)}",))
        async with open_hivemind_records(self.client, identity, self.now_s, own, initial=self.initial) as store:
            self.initial = self.initial or store.addresses
            self._living[identity.peer_id] = (stop, stopped)
            task_status.started(Node(store, identity, own))
            await stop.wait()
        stopped.set()

    async def kill(self, node: Node) -> None:
        stop, stopped = self._living[node.identity.peer_id]
        stop.set()
        await stopped.wait()

    async def stop(self) -> None:
        for stop, stopped in self._living.values():
            stop.set()
            await stopped.wait()

    def now_s(self) -> float:
        return time.time() + self._skipped_s

    async def pass_time(self, duration_s: float) -> None:
        self._skipped_s += duration_s

    async def settle(self) -> None:
        await trio.lowlevel.checkpoint()


def _run(process: socket.socket, test: Callable[[DhtRig], Awaitable[None]]) -> None:
    async def main() -> None:
        client = DhtClient(process.dup())
        with trio.fail_after(LIMIT_S):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(client.run)
                rig = DhtRig(client, nursery)
                await test(rig)
                await rig.stop()
                nursery.cancel_scope.cancel()
        await client.aclose()

    trio.run(main)


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_record_store(check: Check, dht_process: socket.socket) -> None:
    _run(dht_process, check)


def test_what_strangers_store_is_ignored(dht_process: socket.socket) -> None:
    """Garbage, a nest that crashes hivemind's own reader, a forgery: none is read, or keeps the true one from us."""
    bomb = b"\xc7\x03\x40" + b"\x91" * 3
    for _ in range(200):
        bomb = b"\xc8" + len(bomb).to_bytes(2, "big") + b"\x40" + b"\x91" + bomb

    async def test(rig: DhtRig) -> None:
        reader, writer = await rig.start(), await rig.start()
        record = sign_record(writer.identity, KEY, 1, rig.now_s() + 30, b"true")
        forged = msgspec.structs.replace(record, writer=reader.identity.peer_id)
        await writer.store.put(record)
        for i, value in enumerate((b"", b"\xff" * 100, bomb[:16000], msgspec.msgpack.encode(forged))):
            vandalism = said.Put(writer.store.node, KEY, f"vandal {i}", value, rig.now_s() + 60)
            assert (await rig.client.ask(vandalism, said.Kept)).holders
        assert await reader.store.get(KEY) == (record,)

    _run(dht_process, test)


def test_a_later_word_counts_though_it_ends_earlier(dht_process: socket.socket) -> None:
    async def test(rig: DhtRig) -> None:
        reader, writer = await rig.start(), await rig.start()
        await writer.store.put(sign_record(writer.identity, KEY, 1, rig.now_s() + 60, b"serving"))
        last = sign_record(writer.identity, KEY, 2, rig.now_s() + 20, b"leaving")
        assert await writer.store.put(last) >= 1
        assert await reader.store.get(KEY) == (last,)
        await rig.pass_time(25)
        assert await reader.store.get(KEY) == ()

    _run(dht_process, test)


def test_an_unreachable_dht_is_said(dht_process: socket.socket) -> None:
    async def test(rig: DhtRig) -> None:
        rig.initial = (f"/ip4/127.0.0.1/tcp/1/p2p/{Identity.generate().peer_id}",)
        with pytest.raises(PeerUnreachable, match="hivemind DHT"):
            await rig.start()

    _run(dht_process, test)


def test_the_process_ends_with_its_block() -> None:
    async def main() -> None:
        with trio.fail_after(LIMIT_S):
            async with open_dht_process() as client:
                identity = Identity.generate()
                own = PeerAddress(identity.peer_id, ("/ip4/192.0.2.1/tcp/4001",))
                async with open_hivemind_records(client, identity, time.time, own, listen=()) as store:
                    assert isinstance(store, HivemindRecordStore)
                    assert store.addresses == ()

    trio.run(main)
