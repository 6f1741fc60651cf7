"""`mycel doctor` in a real network on 127.0.0.1: what it finds in a healthy swarm, and in each way to be ill."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import trio

from mycel.dht.records import Announcement
from mycel.node import doctor
from mycel.node.diagnosis import Check, conclusion, swarm_is_reached
from mycel.node.doctor import Question, examine
from mycel.node.events import no_events
from mycel.node.files import serve_files
from mycel.node.libp2p_transport import Libp2pTransport, open_transport
from mycel.node.model_store import ModelStore, build_manifest
from mycel.node.network import Network, open_network
from mycel.node.reach import ask_to_dial, serve_reach
from mycel.protocols.errors import PeerError, PeerTimeout, PeerUnreachable, RemoteProtocolError
from mycel.protocols.ids import REACH
from mycel.protocols.messages import PeerAddress
from mycel.protocols.ports import Stream
from mycel.security.identity import Identity, load_or_create
from mycel.swarm.invite import make_invite
from mycel.swarm.manifest import sign_manifest, swarm_id
from tests.tiny_models import make_tiny_model, make_tiny_tokenizer

pytestmark = [pytest.mark.slow, pytest.mark.loopback]

LISTEN = ("/ip4/127.0.0.1/tcp/0",)
N_BLOCKS = 4
# What depends on the machine that the tests run on.
OF_THIS_MACHINE = {"software", "disk", "memory", "network"}


@dataclass(frozen=True)
class Founded:
    """A model's files, shared under the id of its swarm."""

    store: ModelStore
    swarm: bytes


@pytest.fixture(scope="module")
def founded(tmp_path_factory: pytest.TempPathFactory) -> Founded:
    directory = tmp_path_factory.mktemp("swarm")
    make_tiny_model("llama", directory / "model", N_BLOCKS)
    make_tiny_tokenizer(directory / "model")
    store = ModelStore(directory / "cache")
    unsigned, blobs = build_manifest(directory / "model", store.cache_dir)
    manifest = sign_manifest(unsigned, Identity.generate())
    store.share(manifest, blobs)
    return Founded(store, swarm_id(manifest))


@dataclass
class Swarm:
    """Nodes of one model that serve everything but sessions."""

    founded: Founded
    stack: AsyncExitStack
    nodes: list[Network]

    @property
    def id(self) -> bytes:
        return self.founded.swarm

    async def add(self, start: int, end: int, identity: Identity | None = None, ahead_s: float = 0.0) -> Network:
        node = await self.stack.enter_async_context(open_network(identity or Identity.generate(), LISTEN, no_events))
        transport = node.transport
        assert isinstance(transport, Libp2pTransport)
        transport.serve(*serve_files(self.founded.store))
        reach = serve_reach(transport.came_from, transport.probe, clock=lambda: time.time() + ahead_s)
        transport.serve(*reach)
        await node.join([self.address(other) for other in self.nodes])
        await node.directory.announce(Announcement(self.id, start, end, addresses=transport.addresses))
        self.nodes.append(node)
        return node

    def address(self, node: Network) -> PeerAddress:
        return PeerAddress(node.identity.peer_id, node.transport.addresses)

    def invite(self, *contacts: PeerAddress, lifetime_s: float = 3600.0, age_s: float = 0.0) -> str:
        contacts = contacts or tuple(self.address(node) for node in self.nodes)
        issuer, now = Identity.generate(), time.time() - age_s
        return make_invite(issuer, self.id, "tiny", contacts, now=now, lifetime_s=lifetime_s).text


def in_swarm(founded: Founded, scenario: Callable[[Swarm], Awaitable[None]]) -> None:
    async def main() -> None:
        with trio.fail_after(60):
            async with AsyncExitStack() as stack:
                await scenario(Swarm(founded, stack, []))

    trio.run(main)


async def ask_doctor(question: Question) -> dict[str, list[Check]]:
    """The findings by name. The doctor never leaves a failure or a doubt without advice, nor a wait without a bound."""
    waits: list[float] = []
    checks = await examine(question, lambda _: None, lambda _, at_most_s: waits.append(at_most_s))
    assert all(0 < at_most_s <= 60 for at_most_s in waits)
    assert all(check.advice for check in checks if check.mark in ("warn", "fail")), checks
    assert all("\n" not in check.found + check.advice for check in checks)
    found: dict[str, list[Check]] = {}
    for check in checks:
        found.setdefault(check.name, []).append(check)
    return found


@pytest.fixture
def question(tmp_path: Path) -> Question:
    return Question(data_dir=tmp_path / "data", listen=LISTEN, wanted=True)


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "DIAL_S", 0.7)


@contextmanager
def listening(backlog: int = 8) -> Iterator[str]:
    """A socket that never accepts: the kernel does in its stead, `backlog` + 1 times."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        sock.listen(backlog)
        yield f"/ip4/127.0.0.1/tcp/{sock.getsockname()[1]}"


@contextmanager
def black_hole() -> Iterator[str]:
    """An address that answers nothing: its queue of connections is full, and the kernel drops what comes."""
    with listening(0) as address, socket.socket() as first, socket.socket() as second:
        for waiting in (first, second):
            waiting.setblocking(False)
            waiting.connect_ex(("127.0.0.1", int(address.rpartition("/")[2])))
        yield address


@contextmanager
def closed_port() -> Iterator[str]:
    """Bound and not listening, so nobody else takes it meanwhile."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        yield f"/ip4/127.0.0.1/tcp/{sock.getsockname()[1]}"


@asynccontextmanager
async def web_server() -> AsyncIterator[str]:
    async def answer(stream: trio.SocketStream) -> None:
        async with stream:
            await stream.send_all(b"HTTP/1.1 400 Bad Request\r\n\r\n")
            await stream.receive_some()

    async with trio.open_nursery() as nursery:
        listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
        nursery.start_soon(trio.serve_listeners, answer, listeners)
        yield f"/ip4/127.0.0.1/tcp/{listeners[0].socket.getsockname()[1]}"
        nursery.cancel_scope.cancel()


# ---- the whole walk


def test_in_a_healthy_swarm_everything_is_well(founded: Founded, question: Question) -> None:
    async def scenario(swarm: Swarm) -> None:
        await swarm.add(0, 2)
        await swarm.add(2, N_BLOCKS)
        found = await ask_doctor(replace(question, invite=swarm.invite()))
        rest = [check for name, checks in found.items() for check in checks if name not in OF_THIS_MACHINE]
        assert [check.name for check in rest if check.mark != "ok"] == ["neighbours"], rest
        assert len(found["peer"]) == 2
        assert found["directory"][0].found == "2 nodes for 4 blocks, all served"
        assert found["reach"][0].found.startswith("reachable at 127.0.0.1:")
        assert conclusion(rest) == "All is well: the swarm answers, and this machine can be reached."

    in_swarm(founded, scenario)


def test_a_node_that_runs_is_dialled_itself(founded: Founded, question: Question) -> None:
    async def scenario(swarm: Swarm) -> None:
        question.data_dir.mkdir()
        await swarm.add(0, 2)
        mine = await swarm.add(2, N_BLOCKS, load_or_create(question.data_dir / "identity.key"))
        port = int(mine.transport.addresses[0].rpartition("/")[2])
        listen = (f"/ip4/127.0.0.1/tcp/{port}",)
        found = await ask_doctor(replace(question, invite=swarm.invite(), listen=listen, running=True))
        assert f"port {port} is in use by " in found["port"][0].found
        assert found["port"][0].mark == "ok"
        assert found["reach"][0].found == f"reachable at 127.0.0.1:{port}"

    in_swarm(founded, scenario)


def test_blocks_that_nobody_serves(founded: Founded, question: Question) -> None:
    async def scenario(swarm: Swarm) -> None:
        await swarm.add(0, 2)
        found = await ask_doctor(replace(question, invite=swarm.invite()))
        assert "nobody serves blocks 2:4" in found["directory"][0].found

    in_swarm(founded, scenario)


def test_a_clock_that_is_wrong(founded: Founded, question: Question) -> None:
    async def scenario(swarm: Swarm) -> None:
        for _ in range(3):
            await swarm.add(0, N_BLOCKS, ahead_s=30.0)
        found = await ask_doctor(replace(question, invite=swarm.invite()))
        assert (found["clock"][0].mark, found["clock"][0].found) == (
            "fail",
            "this machine's clock is 30 s behind 3 peers",
        )

    in_swarm(founded, scenario)


def test_peers_that_do_not_know_the_question(founded: Founded, question: Question) -> None:
    """Of an older version: what needs their answer is passed over, the rest is found."""

    async def scenario(swarm: Swarm) -> None:
        node = await swarm.add(0, N_BLOCKS)

        async def silent_end(stream: Stream) -> None:
            await stream.receive()

        node.transport.serve(REACH, silent_end)
        found = await ask_doctor(replace(question, invite=swarm.invite()))
        assert [found[name][0].mark for name in ("swarm", "directory", "clock", "reach")] == [
            "ok",
            "ok",
            "skip",
            "skip",
        ]

    in_swarm(founded, scenario)


# ---- peers that are not found


def missed(founded: Founded, question: Question, address: str) -> Check:
    """What the doctor says of an invite whose only peer is said to be at `address`."""
    checks: list[Check] = []

    async def scenario(swarm: Swarm) -> None:
        invite = swarm.invite(PeerAddress(Identity.generate().peer_id, (address,)))
        found = await ask_doctor(replace(question, invite=invite))
        assert found["swarm"][0].found == "no peer of the invite answers"
        assert [found[name][0].mark for name in ("clock", "directory", "reach")] == ["skip"] * 3
        everything = [check for checks in found.values() for check in checks]
        assert not swarm_is_reached(everything)
        assert conclusion(everything) == f"Most probable cause: {found['peer'][0].found}."
        checks.extend(found["peer"])

    in_swarm(founded, scenario)
    (check,) = checks
    assert check.mark == "fail"
    return check


def test_nobody_listens_there(founded: Founded, question: Question) -> None:
    with closed_port() as address:
        assert "nothing listens there (connection refused)" in missed(founded, question, address).found


@pytest.mark.usefixtures("impatient")
def test_no_answer_at_all(founded: Founded, question: Question) -> None:
    with black_hole() as address:
        assert "no answer (within 1 s)" in missed(founded, question, address).found


@pytest.mark.usefixtures("impatient")
def test_a_process_that_was_stopped(founded: Founded, question: Question) -> None:
    with listening() as address:
        assert "accepts connections but stays silent" in missed(founded, question, address).found


def test_a_name_that_leads_nowhere(founded: Founded, question: Question, monkeypatch: pytest.MonkeyPatch) -> None:
    look_up = trio.socket.getaddrinfo

    async def unknown(host: object, *rest: Any, **options: Any) -> Any:
        if host == "node.invalid":
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        return await look_up(host, *rest, **options)

    monkeypatch.setattr(trio.socket, "getaddrinfo", unknown)
    check = missed(founded, question, "/dns4/node.invalid/tcp/4001")
    assert "the name node.invalid cannot be resolved (name or service not known)" in check.found


def test_another_peer_and_no_peer_at_an_address(founded: Founded, question: Question) -> None:
    async def scenario(swarm: Swarm) -> None:
        node = await swarm.add(0, N_BLOCKS)
        async with web_server() as web:
            contacts = [
                PeerAddress(Identity.generate().peer_id, node.transport.addresses),
                PeerAddress(Identity.generate().peer_id, (web,)),
            ]
            found = await ask_doctor(replace(question, invite=swarm.invite(*contacts)))
        assert [check.mark for check in found["peer"]] == ["fail", "fail"]
        assert "another peer answers there" in found["peer"][0].found
        assert "no Mycel node" in found["peer"][1].found
        both = [*contacts, swarm.address(node)]
        found = await ask_doctor(replace(question, invite=swarm.invite(*both)))
        assert [check.mark for check in found["peer"]] == ["warn", "warn", "ok"]
        assert found["swarm"][0].mark == "ok"

    in_swarm(founded, scenario)


def test_a_swarm_that_the_peers_do_not_have(founded: Founded, question: Question) -> None:
    async def scenario(swarm: Swarm) -> None:
        node = await swarm.add(0, N_BLOCKS)
        address = swarm.address(node)
        other = make_invite(Identity.generate(), bytes(32), "x", [address], now=time.time(), lifetime_s=60).text
        found = await ask_doctor(replace(question, invite=other))
        assert found["swarm"][0].mark == "fail"
        assert "not shared here" in found["swarm"][0].found
        assert found["directory"][0].mark == "skip"

    in_swarm(founded, scenario)


def test_an_invite_that_expired_or_is_none(founded: Founded, question: Question) -> None:
    async def scenario(swarm: Swarm) -> None:
        await swarm.add(0, N_BLOCKS)
        invite = swarm.invite(age_s=100.0, lifetime_s=99.9)
        expired = (await ask_doctor(replace(question, invite=invite)))["invite"][0]
        assert (expired.mark, expired.found) == ("fail", "this invite to tiny expired 1 second ago")
        assert "UTC by this machine's clock" in expired.advice
        found = await ask_doctor(replace(question, invite="mycel1:abc"))
        assert "this invite is damaged" in found["invite"][0].found
        assert [found[name][0].mark for name in ("swarm", "reach")] == ["skip", "skip"]

    in_swarm(founded, scenario)


# ---- not being found


def test_a_port_that_somebody_has(founded: Founded, question: Question) -> None:
    async def scenario(swarm: Swarm) -> None:
        await swarm.add(0, N_BLOCKS)
        with listening() as address:
            found = await ask_doctor(replace(question, invite=swarm.invite(), listen=(address,)))
        assert (found["port"][0].mark, f"(process {os.getpid()})" in found["port"][0].found) == ("fail", True)
        assert found["reach"][0].found == "not looked at: the port cannot be listened on"
        assert found["swarm"][0].mark == "ok"

    in_swarm(founded, scenario)


def test_an_announced_address_that_leads_nowhere_or_elsewhere(founded: Founded, question: Question) -> None:
    async def scenario(swarm: Swarm) -> None:
        await swarm.add(0, N_BLOCKS)
        await swarm.add(0, N_BLOCKS)
        with closed_port() as shut:
            found = await ask_doctor(replace(question, invite=swarm.invite(), announce=(shut,)))
        (reach,) = found["reach"]
        assert (reach.mark, "connection refused" in reach.found, shut.rpartition("/")[2] in reach.found) == (
            "fail",
            True,
            True,
        )

    in_swarm(founded, scenario)


def test_a_wrong_address_to_listen_on(founded: Founded, question: Question) -> None:
    found = trio.run(ask_doctor, replace(question, listen=("127.0.0.1:4001",)))
    assert "is not an address to listen on" in found["port"][0].found


def test_multicast_on_loopback_is_looked_at(question: Question) -> None:
    """Whether it works depends on the machine; that it is found out, and in time, does not."""
    with_mdns = replace(question, interfaces=["127.0.0.1"])
    assert trio.run(ask_doctor, with_mdns)["neighbours"][0].mark in ("ok", "warn")
    nowhere = replace(question, interfaces=["192.0.2.77"])
    assert trio.run(ask_doctor, nowhere)["neighbours"][0].mark == "warn"


# ---- what the libp2p adapter gives the service


def test_one_look_at_an_address_leaves_no_trace() -> None:
    async def main() -> None:
        with closed_port() as shut, listening() as mute, trio.fail_after(20):
            async with (
                open_transport(Identity.generate(), listen=LISTEN) as looking,
                open_transport(Identity.generate(), listen=LISTEN) as there,
                web_server() as web,
            ):
                (address,) = there.addresses
                for _ in range(20):
                    await looking.probe(there.peer_id, address, 3.0)
                stranger = Identity.generate().peer_id
                for peer, where, error in (
                    (stranger, address, RemoteProtocolError),
                    (stranger, web, RemoteProtocolError),
                    (stranger, shut, PeerUnreachable),
                    (stranger, mute, PeerTimeout),
                    (stranger, "/ip4/127.0.0.1/udp/1", PeerUnreachable),
                    (looking.peer_id, looking.addresses[0], PeerUnreachable),
                ):
                    with pytest.raises(error) as caught:
                        await looking.probe(peer, where, 0.5)
                    assert isinstance(caught.value, PeerError)
                assert not looking.connected()
                assert not there.connected()

    trio.run(main)


def test_where_a_peer_comes_from_is_known_of_connections_that_it_made() -> None:
    async def main() -> None:
        with trio.fail_after(20):
            async with (
                open_transport(Identity.generate(), listen=LISTEN) as node,
                open_transport(Identity.generate(), listen=("/ip6/::1/tcp/0",)) as node6,
                open_transport(Identity.generate(), listen=()) as client,
            ):
                for host, prefix in ((node, "/ip4/127.0.0.1/tcp/"), (node6, "/ip6/::1/tcp/")):
                    host.serve(*serve_reach(host.came_from, host.probe))
                    client.learn(host.peer_id, host.addresses)
                    answer, skew_s = await ask_to_dial(client, host.peer_id)
                    assert answer.observed.startswith(prefix)
                    assert abs(skew_s) < 2.0
                    assert client.came_from(host.peer_id) == ()

    trio.run(main)


def test_others_are_told_what_is_announced() -> None:
    async def main() -> None:
        told = ("/ip4/203.0.113.7/tcp/4001",)
        async with open_transport(Identity.generate(), listen=LISTEN, announce=told) as node:
            assert node.addresses == told
            assert node.listening[0].startswith("/ip4/127.0.0.1/tcp/")
        async with open_transport(Identity.generate(), listen=(), announce=told) as client:
            assert client.addresses == ()

    trio.run(main)
