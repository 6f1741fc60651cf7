"""What a shaped transport makes of time, over a simulated network that takes almost none."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import pytest
import trio

from mycel.node.shaped_transport import ShapedTransport, shaped
from mycel.protocols.errors import LocalProtocolError, PeerError, PeerUnreachable
from mycel.protocols.ports import Stream, Transport
from mycel.swarm.chaos import Shape
from tests.conformance.transport_rig import ECHO, GREET, PLAIN, accepting, serve_suite
from tests.sim.faults import LinkFaults, WorldOptions
from tests.sim.transport import SimTransport
from tests.sim.world import World, run_world

LATENCY_S = 1e-5
RTT_S = 0.08
ROUND_TRIP = Shape(rtt_s=RTT_S)


def play(scenario: Callable[[Transport, Transport], Awaitable[None]], shape: Shape, seed: int = 1) -> None:
    """Run `scenario(client, server)`, both shaped alike."""

    async def main(world: World) -> None:
        transports: dict[str, Transport] = {}
        ready = trio.Event()

        async def live(inner: SimTransport) -> None:
            async with shaped(inner, shape) as transport:
                transports[inner.name] = transport
                if len(transports) == 2:
                    ready.set()
                await trio.sleep_forever()

        for name in ("client", "server"):
            world.add_node(name)
            world.start(name, live)
        await ready.wait()
        client, server = transports["client"], transports["server"]
        serve_suite(server)
        client.learn(server.peer_id, server.addresses)
        with trio.fail_after(600):
            await scenario(client, server)

    run_world(seed, main, options=WorldOptions(link=LinkFaults(latency_s=LATENCY_S)))


def about(seconds: float):
    return pytest.approx(seconds, abs=20 * LATENCY_S)


async def seconds_of(doing: Awaitable[object]) -> float:
    began = trio.current_time()
    await doing
    return trio.current_time() - began


async def ask(stream: Stream, frame: bytes = b"?") -> None:
    await stream.send(frame)
    assert await stream.receive() == frame


def test_a_question_takes_one_round_trip_and_sending_none():
    async def scenario(client: Transport, server: Transport) -> None:
        stream = await client.open(server.peer_id, ECHO)
        assert await seconds_of(ask(stream)) == about(RTT_S)
        assert await seconds_of(stream.send(b"!")) == 0.0
        assert client.rtt_s(server.peer_id) == about(RTT_S)

    play(scenario, ROUND_TRIP)


def test_opening_costs_a_round_trip_and_connecting_five_more():
    async def scenario(client: Transport, server: Transport) -> None:
        assert await seconds_of(client.open(server.peer_id, ECHO)) == about(6 * RTT_S)
        assert await seconds_of(client.open(server.peer_id, ECHO)) == about(RTT_S)
        with pytest.raises(PeerError):
            await client.open(server.peer_id, "/nobody/1")

    play(scenario, ROUND_TRIP)


def test_a_plain_shape_is_no_wrapper():
    async def scenario(client: Transport, server: Transport) -> None:
        assert not isinstance(client, ShapedTransport)

    play(scenario, Shape(seed=5))


def test_jitter_and_loss_reorder_nothing_and_repeat_with_the_seed():
    taken: list[list[float]] = []

    async def scenario(client: Transport, server: Transport) -> None:
        async with accepting(server, PLAIN) as inbound:
            near = await client.open(server.peer_id, PLAIN)
            far = await inbound.receive()
            began, times = trio.current_time(), []

            async def send_all() -> None:
                for n in range(300):
                    await near.send(n.to_bytes(2, "big"))
                    await trio.sleep(0.002)
                await near.aclose()

            async with trio.open_nursery() as nursery:
                nursery.start_soon(send_all)
                while (frame := await far.receive()) is not None:
                    assert int.from_bytes(frame, "big") == len(times)
                    times.append(trio.current_time() - began)
            assert len(times) == 300
            taken.append(times)

    shape = Shape(rtt_s=RTT_S, jitter_s=0.04, loss=0.01, seed=3)
    play(scenario, shape)
    play(scenario, shape)
    assert taken[0] == taken[1]
    delays = [at_s - n * 0.002 for n, at_s in enumerate(taken[0])]
    assert min(delays) >= RTT_S / 2
    assert max(delays) > 0.28, "a packet was lost, and came after its time-out"


def test_the_uplink_is_shared_by_all_streams():
    async def scenario(client: Transport, server: Transport) -> None:
        streams = [await client.open(server.peer_id, ECHO) for _ in range(4)]
        began = trio.current_time()
        async with trio.open_nursery() as nursery:
            for stream in streams:
                nursery.start_soon(ask, stream, bytes(250_000))
        # A million bytes up at a million a second; the last quarter's way back comes on top.
        assert trio.current_time() - began == pytest.approx(1.25 + RTT_S, abs=0.01)

    play(scenario, Shape(rtt_s=RTT_S, bytes_per_s=1e6))


def test_a_sender_is_held_back_by_a_slow_link():
    async def scenario(client: Transport, server: Transport) -> None:
        async with accepting(server, PLAIN) as inbound:
            near = await client.open(server.peer_id, PLAIN)
            far = await inbound.receive()
            began = trio.current_time()

            async def read() -> None:
                while await far.receive() is not None:
                    pass

            async with trio.open_nursery() as nursery:
                nursery.start_soon(read)
                for _ in range(40):
                    await near.send(bytes(50_000))
                # Two million bytes at a million a second, less what may be on its way.
                assert trio.current_time() - began > 2.0 - 0.35
                await near.aclose()

    play(scenario, Shape(rtt_s=RTT_S, bytes_per_s=1e6))


def test_what_a_handler_said_last_arrives():
    async def scenario(client: Transport, server: Transport) -> None:
        stream = await client.open(server.peer_id, GREET)
        assert await stream.receive() == b"hello"
        assert await stream.receive() is None

    play(scenario, ROUND_TRIP)


def test_an_end_and_a_reset_travel_as_long_as_a_frame_does():
    async def scenario(client: Transport, server: Transport) -> None:
        async with accepting(server, PLAIN) as inbound:
            for end in ("aclose", "reset"):
                near = await client.open(server.peer_id, PLAIN)
                far = await inbound.receive()
                await near.send(b"last words")
                assert await seconds_of(getattr(near, end)()) == 0.0
                with pytest.raises(LocalProtocolError):
                    await near.send(b"too late")
                with pytest.raises(LocalProtocolError):
                    await near.receive()
                began = trio.current_time()
                assert await far.receive() == b"last words"
                if end == "aclose":
                    assert await far.receive() is None
                else:
                    with pytest.raises(PeerUnreachable):
                        await far.receive()
                assert trio.current_time() - began == about(RTT_S / 2)

    play(scenario, ROUND_TRIP)


def test_a_transport_that_closes_lets_arrive_what_was_sent():
    async def main(world: World) -> None:
        server, client = world.add_node("server"), world.add_node("client")
        client.learn(server.peer_id, server.addresses)
        heard: list[bytes] = []

        async def listen(stream: Stream) -> None:
            while (frame := await stream.receive()) is not None:
                heard.append(bytes(frame))
            heard.append(b"end")

        server.serve(PLAIN, listen)
        async with shaped(client, ROUND_TRIP) as transport:
            stream = await transport.open(server.peer_id, PLAIN)
            await stream.send(b"on its way")
            await stream.aclose()
        await trio.sleep(1)
        assert heard == [b"on its way", b"end"]
        left_open = await client.open(server.peer_id, PLAIN)
        await left_open.aclose()

    run_world(1, main)


def test_nothing_is_sent_once_the_transport_is_closed():
    async def main(world: World) -> None:
        server, client = world.add_node("server"), world.add_node("client")
        serve_suite(server)
        client.learn(server.peer_id, server.addresses)
        async with shaped(client, ROUND_TRIP) as transport:
            stream = await transport.open(server.peer_id, ECHO)
        with pytest.raises(PeerUnreachable, match="closed"):
            await stream.send(b"too late")
        await stream.aclose()
        await stream.reset()

    run_world(1, main)


def test_a_peer_that_does_not_read_holds_no_end_up_for_ever():
    async def scenario(client: Transport, server: Transport) -> None:
        stream = await client.open(server.peer_id, "/suite/mute/1")
        with trio.move_on_after(1.0) as scope:
            while True:
                await stream.send(bytes(200_000))
        assert scope.cancelled_caught
        assert isinstance(client, ShapedTransport)
        await stream.aclose()
        assert 0 < await seconds_of(client.drained()) < 3.0

    play(scenario, ROUND_TRIP)
