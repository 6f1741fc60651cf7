"""Being dialled back: honest answers, and askers that would have others dialled, or our time."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field

import msgspec
import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st

from mycel.node.endpoints import parse_endpoint, plain_host
from mycel.node.reach import ask_to_dial, serve_reach
from mycel.node.reach_rules import NOT_TRIED, Asks, ReachLimits, refusal
from mycel.protocols.codec import reach_codec
from mycel.protocols.errors import PeerUnreachable, RemoteProtocolError
from mycel.protocols.ids import REACH
from mycel.protocols.messages import Dialled, DialMe, DialResult
from mycel.protocols.ports import Stream
from mycel.security.identity import Identity
from tests.sim.transport import SimTransport
from tests.sim.world import World, run_world

SEEN = "/ip4/198.51.100.4/tcp/50123"
HERE = "/ip4/198.51.100.4/tcp/4001"
SHUT = "/ip4/198.51.100.4/tcp/4002"
THIRD = "/ip4/203.0.113.9/tcp/22"
OTHER = Identity.from_seed(bytes(32)).peer_id
LIMITS = ReachLimits()
NINE = msgspec.msgpack.encode([["DialMe", [HERE] * 9], []])
AHEAD_S = 42.0


@dataclass
class Service:
    """A node "helper" that dials nobody in truth: at HERE is whoever asks, elsewhere nobody."""

    world: World
    seen: dict[str, list[str]] = field(default_factory=dict)
    dialled: list[tuple[str, str]] = field(default_factory=list)
    at_once: int = 0
    most_at_once: int = 0
    dial_takes_s: float = 0.5

    def __post_init__(self) -> None:
        self.transport = self.world.add_node("helper")
        protocol, handler = serve_reach(
            lambda peer: self.seen.get(peer, []), self.probe, clock=lambda: self.world.unix_time_s() + AHEAD_S
        )
        self.transport.serve(protocol, handler)

    async def probe(self, peer: str, address: str, within_s: float) -> None:
        assert within_s == LIMITS.dial_s
        self.dialled.append((peer, address))
        self.at_once += 1
        self.most_at_once = max(self.most_at_once, self.at_once)
        await trio.sleep(self.dial_takes_s)
        self.at_once -= 1
        if address != HERE:
            raise PeerUnreachable(peer, "connection refused")

    def asker(self, name: str = "asker", seen: str = SEEN) -> SimTransport:
        transport = self.world.add_node(name)
        transport.learn(self.transport.peer_id, self.transport.addresses)
        self.seen[transport.peer_id] = [seen] if seen else []
        return transport

    async def ask(self, asker: SimTransport, addresses: Sequence[str]) -> dict[str, str]:
        answer, _ = await ask_to_dial(asker, self.transport.peer_id, addresses, clock=self.world.unix_time_s)
        return {result.address: result.failure for result in answer.results}


def with_service(scenario: Callable[[Service], Awaitable[None]]) -> World:
    async def main(world: World) -> None:
        await scenario(Service(world))

    return run_world(1, main)


def test_an_asker_learns_where_it_is_found_where_not_and_where_it_was_seen() -> None:
    async def scenario(service: Service) -> None:
        asker = service.asker()
        answer, skew_s = await ask_to_dial(
            asker, service.transport.peer_id, [HERE, SHUT], clock=service.world.unix_time_s
        )
        assert answer.results == (DialResult(HERE, ""), DialResult(SHUT, "connection refused"))
        assert answer.observed == SEEN
        assert skew_s == pytest.approx(AHEAD_S, abs=0.1)
        assert service.dialled == [(asker.peer_id, HERE), (asker.peer_id, SHUT)]

    with_service(scenario)


def test_an_address_may_name_who_has_to_answer_there() -> None:
    async def scenario(service: Service) -> None:
        address = f"{HERE}/p2p/{OTHER}"
        assert await service.ask(service.asker(), [address]) == {address: ""}
        assert service.dialled == [(OTHER, HERE)]

    with_service(scenario)


@pytest.mark.parametrize(
    "address",
    [
        THIRD,
        "/ip4/127.0.0.1/tcp/4001",
        "/ip4/192.168.1.1/tcp/80",
        "/ip4/0.0.0.0/tcp/4001",
        "/ip4/255.255.255.255/tcp/4001",
        "/ip6/::1/tcp/4001",
        "/ip6/::ffff:127.0.0.1/tcp/4001",
        "/dns4/localhost/tcp/4001",
        "/dns4/198.51.100.4/tcp/4001",
        "/ip4/198.51.100.4/tcp/0",
        "/ip4/198.51.100.4/udp/4001/quic-v1",
        f"/ip4/198.51.100.4/tcp/4001/p2p/{OTHER}/p2p-circuit",
        "/unix/tmp/socket",
        "nonsense",
    ],
)
def test_nobody_has_a_third_party_dialled(address: str) -> None:
    async def scenario(service: Service) -> None:
        answers = await service.ask(service.asker(), [address, HERE])
        assert answers[address].startswith(NOT_TRIED)
        assert answers[HERE] == ""
        assert [dialled for _, dialled in service.dialled] == [HERE]

    with_service(scenario)


def test_who_cannot_be_seen_is_not_dialled() -> None:
    """A peer that we dialled ourselves has not shown where its own connections come from."""

    async def scenario(service: Service) -> None:
        answers = await service.ask(service.asker(seen=""), [HERE])
        assert answers[HERE].startswith(NOT_TRIED)
        assert not service.dialled

    with_service(scenario)


def test_loopback_is_dialled_for_who_comes_from_there_alone() -> None:
    local = "/ip4/127.0.0.1/tcp/4002"

    async def scenario(service: Service) -> None:
        assert (await service.ask(service.asker("far"), [local]))[local].startswith(NOT_TRIED)
        assert (await service.ask(service.asker("near", "/ip4/127.0.0.1/tcp/5"), [local]))[
            local
        ] == "connection refused"

    with_service(scenario)


@given(
    st.lists(
        st.sampled_from(["198.51.100.4", "203.0.113.9", "127.0.0.1", "::1", "::ffff:198.51.100.4", "10.0.0.1"]).flatmap(
            lambda host: st.sampled_from(["ip4", "ip6", "dns4"]).map(lambda kind: f"/{kind}/{host}/tcp/4001")
        )
        | st.text(max_size=40),
        max_size=8,
    )
)
def test_what_is_admitted_is_on_the_askers_host(addresses: list[str]) -> None:
    for address in addresses:
        if not refusal(address, [SEEN]):
            endpoint = parse_endpoint(address)
            assert endpoint is not None
            assert plain_host(endpoint.host) == "198.51.100.4"


def test_a_peer_is_dialled_once_in_ten_seconds_and_told_the_time_always() -> None:
    async def scenario(service: Service) -> None:
        asker = service.asker()
        assert await service.ask(asker, [HERE]) == {HERE: ""}
        again = await service.ask(asker, [HERE])
        assert again[HERE].startswith(NOT_TRIED + "you asked just now, wait ")
        answer, _ = await ask_to_dial(asker, service.transport.peer_id)
        assert answer.observed == SEEN
        await trio.sleep(LIMITS.each_s)
        assert await service.ask(asker, [HERE]) == {HERE: ""}
        assert len(service.dialled) == 2

    with_service(scenario)


def test_many_askers_share_a_bound() -> None:
    """Keys cost nothing, so one asker can be many."""

    async def scenario(service: Service) -> None:
        answers: list[str] = []

        async def ask(asker: SimTransport) -> None:
            answers.append((await service.ask(asker, [SHUT]))[SHUT])

        async with trio.open_nursery() as nursery:
            for number in range(50):
                nursery.start_soon(ask, service.asker(f"asker {number}"))
        refused = [answer for answer in answers if answer == NOT_TRIED + "too many peers ask at once"]
        assert len(refused) == 50 - LIMITS.asks_at_once
        assert service.most_at_once <= LIMITS.asks_at_once

    with_service(scenario)


def test_the_book_of_askers_is_bounded() -> None:
    asks = Asks(LIMITS)
    admitted = [asks.admit(f"peer {number}", 0.0) == "" for number in range(1000)]
    assert sum(admitted) == LIMITS.asks_per_each
    assert asks.admit("late", LIMITS.each_s) == ""


def test_all_of_an_ask_is_dialled_a_few_at_a_time() -> None:
    async def scenario(service: Service) -> None:
        addresses = [f"/ip4/198.51.100.4/tcp/{port}" for port in range(5000, 5008)]
        await service.ask(service.asker(), addresses)
        assert len(service.dialled) == 8
        assert service.most_at_once == LIMITS.dials_at_once

    with_service(scenario)


@pytest.mark.parametrize(
    "frame",
    [
        b"\xff" * 64,
        b"".join(reach_codec.encode(Dialled((), "", 0.0))),
        b"".join(reach_codec.encode(DialMe((HERE,)))) + b"x",
        len(NINE).to_bytes(4, "little") + NINE,
    ],
    ids=["noise", "an answer", "a tail", "nine addresses"],
)
def test_nonsense_ends_the_stream_and_dials_nobody(frame: bytes) -> None:
    async def scenario(service: Service) -> None:
        stream = await service.asker().open(service.transport.peer_id, REACH)
        await stream.send(frame)
        with pytest.raises(PeerUnreachable):
            await stream.receive()
        assert not service.dialled
        assert await service.ask(service.asker("next"), [HERE]) == {HERE: ""}

    with_service(scenario)


def test_streams_that_ask_nothing_end_and_are_few() -> None:
    async def scenario(service: Service) -> None:
        asker = service.asker()
        silent = [await asker.open(service.transport.peer_id, REACH) for _ in range(LIMITS.streams_per_peer)]
        third = await asker.open(service.transport.peer_id, REACH)
        assert await third.receive() is None
        began = trio.current_time()
        for stream in silent:
            with pytest.raises(PeerUnreachable):
                await stream.receive()
        assert trio.current_time() - began < LIMITS.message_s + 1
        assert await service.ask(asker, [HERE]) == {HERE: ""}

    with_service(scenario)


@pytest.mark.parametrize(
    "answer",
    [
        DialMe((HERE,)),
        Dialled((), "", 0.0),
        Dialled((DialResult(THIRD),), "", 0.0),
        Dialled((DialResult(HERE), DialResult(HERE)), "", 0.0),
    ],
    ids=["a question", "nothing", "another address", "twice"],
)
def test_an_answer_to_another_question_is_not_believed(answer: DialMe | Dialled) -> None:
    async def scenario(service: Service) -> None:
        async def lie(stream: Stream) -> None:
            await stream.receive()
            await stream.send(*reach_codec.encode(answer))

        service.transport.serve(REACH, lie)
        with pytest.raises(RemoteProtocolError):
            await service.ask(service.asker(), [HERE])

    with_service(scenario)
