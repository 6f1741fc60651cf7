"""The simulated world keeps its promises: one seed, one log; faults do what they say, when they say it."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable
from math import inf
from pathlib import Path

import pytest
import trio
from hypothesis import given, settings
from hypothesis import strategies as st

from mycel.protocols.errors import LocalProtocolError, PeerError, PeerUnreachable
from mycel.protocols.ports import Stream
from tests.sim.faults import LinkFaults, WorldOptions
from tests.sim.transport import SimTransport
from tests.sim.world import World, run_world

ECHO = "/test/echo/1"
NAMES = ("a", "b", "c")


async def echo(stream: Stream) -> None:
    while (frame := await stream.receive()) is not None:
        await stream.send(frame)


def mesh(world: World, *names: str, faults: LinkFaults | None = None) -> list[SimTransport]:
    """Nodes that know each other and echo."""
    nodes = [world.add_node(name) for name in names]
    for node in nodes:
        node.serve(ECHO, echo)
        for other in nodes:
            node.learn(other.peer_id, other.addresses)
            if faults is not None and other is not node:
                world.link(node.name, other.name, faults)
    return nodes


async def stormy(world: World) -> None:
    """Three nodes exchange 200 messages over lossy links, through a partition, a stop, a crash and a restart."""
    mesh(world, *NAMES, faults=LinkFaults(0.02, jitter_s=0.03, loss=0.1, bandwidth_bytes_per_s=1e6))
    done = trio.Event()
    answered = 0

    async def client(transport: SimTransport) -> None:
        nonlocal answered
        while True:
            other = world.node(world.rng.choice([name for name in NAMES if name != transport.name]))
            try:
                stream = await transport.open(other.peer_id, ECHO)
                for _ in range(world.rng.randrange(1, 6)):
                    await stream.send(world.rng.randbytes(world.rng.choice((10, 1000, 100_000))))
                    assert await stream.receive() is not None
                    answered += 1
                    if answered >= 200:
                        done.set()
                await stream.aclose()
            except PeerError as error:
                world.record("gave up", transport.name, other.name, type(error).__name__, error.reason)
                await trio.sleep(world.rng.uniform(0.1, 1.0))

    for name in NAMES:
        world.start(name, client)
    await trio.sleep(1)
    world.partition("a", "bc")
    await trio.sleep(3)
    world.heal()
    await trio.sleep(2)
    world.stop("b")
    await trio.sleep(8)
    world.cont("b")
    world.crash("c")
    await trio.sleep(2)
    reborn = world.restart("c")
    reborn.serve(ECHO, echo)
    for name in "ab":
        reborn.learn(world.node(name).peer_id, world.node(name).addresses)
    world.start("c", client)
    await done.wait()


def test_same_seed_same_log() -> None:
    logs = [run_world(seed, stormy).log for seed in (1, 1, 1, 2)]
    assert logs[0] == logs[1] == logs[2]
    assert logs[0] != logs[3]
    frames = [entry for entry in logs[0] if entry[1] == "frame"]
    assert len(frames) >= 200
    assert {"connect", "lost", "gave up", "crash", "restart", "partition", "heal"} <= {entry[1] for entry in logs[0]}


def test_the_log_does_not_depend_on_the_process() -> None:
    """Not on hash randomization, not on what ran before, not on whether hypothesis was imported."""
    program = "from tests.sim.test_world import *; print(run_world(1, stormy).digest())"
    root = Path(__file__).resolve().parents[2]
    digests = set()
    for hash_seed in ("1", "2"):
        environment = {**os.environ, "PYTHONHASHSEED": hash_seed, "PYTHONPATH": str(root)}
        done = subprocess.run(
            [sys.executable, "-c", program], env=environment, cwd=root, capture_output=True, text=True, check=True
        )
        digests.add(int(done.stdout))
    assert digests == {run_world(1, stormy).digest()}


def test_identities_follow_from_seed_and_name() -> None:
    ids: list[str] = []

    async def scenario(world: World) -> None:
        ids.extend(world.add_node(name).peer_id for name in "ab")

    for seed in (1, 1, 2):
        run_world(seed, scenario)
    assert ids[:2] == ids[2:4]
    assert len(set(ids)) == 4


# ---- each fault, and when it shows --------------------------------------------------------------------------------


def in_world(scenario: Callable[[World], Awaitable[None]], **options: object) -> World:
    return run_world(7, scenario, options=WorldOptions(**options), limit_s=600)  # type: ignore[arg-type]


async def _timed(action: Callable[[], Awaitable[object]]) -> float:
    start = trio.current_time()
    await action()
    return trio.current_time() - start


def test_latency_and_bandwidth_take_their_time() -> None:
    async def scenario(world: World) -> None:
        a, b = mesh(world, "a", "b")
        world.link("a", "b", LinkFaults(latency_s=0.05, bandwidth_bytes_per_s=1e6), back=LinkFaults(latency_s=0.01))
        streams: list[Stream] = []

        async def connect() -> None:
            streams.append(await a.open(b.peer_id, ECHO))

        async def ask(size_bytes: int) -> None:
            await streams[0].send(bytes(size_bytes))
            await streams[0].receive()

        assert await _timed(connect) == pytest.approx(3 * 0.06, abs=1e-3)  # two round trips to connect, one to open
        assert await _timed(lambda: ask(10)) == pytest.approx(0.06, abs=1e-3)
        assert await _timed(lambda: ask(500_000)) == pytest.approx(0.56, abs=1e-3)
        world.slow("a", 3)
        assert await _timed(lambda: ask(500_000)) == pytest.approx(1.56, abs=1e-3)
        assert a.rtt_s(b.peer_id) == pytest.approx(0.06)

    in_world(scenario)


def test_streams_of_a_connection_take_turns() -> None:
    """A large frame on one stream holds a small one on another up by segments, not by its whole length."""

    async def scenario(world: World) -> None:
        a, b = mesh(world, "a", "b", faults=LinkFaults(latency_s=0.01, bandwidth_bytes_per_s=1e6))
        bulk, small = await a.open(b.peer_id, ECHO), await a.open(b.peer_id, ECHO)
        await bulk.send(bytes(5_000_000))

        async def ask() -> None:
            await small.send(b"x")
            assert await small.receive() == b"x"

        assert 0.02 < await _timed(ask) < 0.02 + 3 * 0.066
        assert await _timed(bulk.receive) > 4

    in_world(scenario)


def test_loss_shows_as_delay() -> None:
    times: list[float] = []

    async def scenario(world: World) -> None:
        a, b = mesh(world, "a", "b", faults=LinkFaults(latency_s=0.01, loss=0.2))
        stream = await a.open(b.peer_id, ECHO)
        for _ in range(200):
            start = trio.current_time()
            await stream.send(b"x")
            assert await stream.receive() == b"x"
            times.append(trio.current_time() - start)

    in_world(scenario)
    n_hurt = sum(t > 0.2 for t in times)
    assert 0.25 * 200 < n_hurt < 0.55 * 200  # two ways, each lost with 0.2: 0.36 of the round trips
    assert min(times) == pytest.approx(0.02, abs=1e-6)


def test_a_crash_is_heard_at_once_and_a_silence_after_its_time() -> None:
    async def scenario(world: World) -> None:
        a, b, c, d = mesh(world, "a", "b", "c", "d", faults=LinkFaults(latency_s=0.02))
        streams = {peer.name: await a.open(peer.peer_id, ECHO) for peer in (b, c, d)}

        async def last_words(name: str) -> tuple[float, str]:
            start = trio.current_time()
            with pytest.raises(PeerUnreachable) as caught:
                await streams[name].receive()
            return trio.current_time() - start, caught.value.reason

        world.crash("b")
        assert await last_words("b") == (pytest.approx(0.02), "connection reset: the peer's process is gone")
        world.stop("c")
        assert await last_words("c") == (pytest.approx(5.0), "silent for 5.0 s")
        world.partition("d")
        assert await last_words("d") == (pytest.approx(5.0), "silent for 5.0 s")
        assert a.connected() == frozenset()
        assert d.connected() == frozenset(), "the silence is mutual"

    in_world(scenario)


def test_a_short_cut_delays_and_loses_nothing() -> None:
    async def scenario(world: World) -> None:
        a, b = mesh(world, "a", "b", faults=LinkFaults(latency_s=0.02, jitter_s=0.05))
        stream = await a.open(b.peer_id, ECHO)
        for cut in (lambda: world.partition("a", "b"), lambda: world.stop("b")):
            cut()
            for i in range(50):
                await stream.send(bytes([i + 1]))
            with trio.move_on_after(4.9):
                raise AssertionError(f"{await stream.receive()!r} came through a cut link")
            world.heal()
            if world.is_stopped("b"):
                world.cont("b")
            for i in range(50):
                assert await stream.receive() == bytes([i + 1])

    in_world(scenario)


def test_a_crash_ends_the_nodes_tasks_and_a_restart_begins_anew() -> None:
    async def scenario(world: World) -> None:
        a, b = mesh(world, "a", "b")
        steps: list[str] = []

        async def main(transport: SimTransport) -> None:
            try:
                steps.append("begun")
                stream = await transport.open(a.peer_id, ECHO)
                await stream.receive()
            finally:
                with trio.move_on_after(1, shield=True):
                    await stream.send(b"a crashed process sends nothing more")
                    steps.append("sent from the grave")

        world.start("b", main)
        await trio.sleep(1)
        assert b.connected() == {a.peer_id}
        world.crash("b")
        await trio.sleep(2)
        assert steps == ["begun"]
        with pytest.raises(LocalProtocolError, match="has crashed"):
            await b.open(a.peer_id, ECHO)
        with pytest.raises(PeerUnreachable, match="refuses"):
            await a.open(b.peer_id, ECHO)
        reborn = world.restart("b")
        assert reborn.peer_id == b.peer_id
        assert reborn.addresses == b.addresses
        with pytest.raises(PeerError, match="does not speak"):
            await a.open(b.peer_id, ECHO)
        with pytest.raises(PeerUnreachable, match="no address is known"):
            await reborn.open(world.add_node("stranger").peer_id, ECHO)
        reborn.serve(ECHO, echo)
        await (await a.open(b.peer_id, ECHO)).aclose()

    in_world(scenario)


def test_bugs_in_handlers_and_programs_come_to_light() -> None:
    async def broken_handler(world: World) -> None:
        a, b = mesh(world, "a", "b")

        async def buggy(stream: Stream) -> None:
            raise ZeroDivisionError("a bug")

        b.serve("/test/buggy/1", buggy)
        stream = await a.open(b.peer_id, "/test/buggy/1")
        with pytest.raises(PeerUnreachable):
            await stream.receive()

    async def broken_program(world: World) -> None:
        async def main(transport: SimTransport) -> None:
            raise ZeroDivisionError("a bug")

        world.add_node("a")
        world.start("a", main)
        await trio.sleep(1)

    for scenario in (broken_handler, broken_program):
        with pytest.raises(ExceptionGroup) as caught:
            in_world(scenario)
        assert caught.group_contains(ZeroDivisionError)


def test_two_readers_on_one_stream_are_a_bug() -> None:
    async def scenario(world: World) -> None:
        a, b = mesh(world, "a", "b")
        stream = await a.open(b.peer_id, ECHO)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(stream.receive)
            await trio.testing.wait_all_tasks_blocked()
            with pytest.raises(LocalProtocolError, match="two tasks receive"):
                await stream.receive()
            nursery.cancel_scope.cancel()

    in_world(scenario)


def test_a_hang_is_over_at_once() -> None:
    async def scenario(world: World) -> None:
        await trio.sleep_forever()

    start = time.perf_counter()
    with pytest.raises(ExceptionGroup) as caught:
        run_world(1, scenario)
    assert caught.group_contains(trio.TooSlowError)
    assert time.perf_counter() - start < 10


def test_going_round_in_circles_is_ended() -> None:
    async def spin(world: World) -> None:
        while True:
            await trio.lowlevel.checkpoint()

    with pytest.raises(AssertionError, match=r"time stands still.*spin"):
        run_world(1, spin)


def test_a_shielded_wait_for_nothing_is_ended() -> None:
    async def stuck(world: World) -> None:
        with trio.CancelScope(shield=True):
            await trio.sleep_forever()

    async def stuck_elsewhere(world: World) -> None:
        world.add_node("n")
        world.start("n", lambda transport: stuck(world))
        await trio.sleep(1)
        raise ZeroDivisionError("the scenario fails, and cannot even end")

    for scenario in (stuck, stuck_elsewhere):
        with pytest.raises(AssertionError, match="behind a shield"):
            run_world(1, scenario)


@pytest.mark.parametrize("wrong", [{"loss": 1.0}, {"loss": -0.1}, {"latency_s": -1.0}, {"bandwidth_bytes_per_s": 0.0}])
def test_impossible_links_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="impossible link"):
        LinkFaults(**wrong)


# ---- what no fault may break --------------------------------------------------------------------------------------

links = st.builds(
    LinkFaults,
    latency_s=st.sampled_from((0.0, 0.001, 0.08)),
    jitter_s=st.sampled_from((0.0, 0.2)),
    loss=st.sampled_from((0.0, 0.05, 0.4)),
    bandwidth_bytes_per_s=st.sampled_from((inf, 1e5, 1e7)),
)
# Cuts end before the silence is fatal: (when, for how long, partition or stop).
cuts = st.lists(
    st.tuples(st.floats(0, 3), st.floats(0.01, 4.5), st.booleans()).map(lambda cut: (round(cut[0], 3), *cut[1:])),
    max_size=3,
)


@settings(max_examples=30)
@given(st.integers(0, 2**32), links, links, cuts, st.integers(1, 4))
def test_frames_arrive_exactly_once_and_in_order(
    seed: int, way: LinkFaults, back: LinkFaults, cuts: list[tuple[float, float, bool]], n_streams: int
) -> None:
    """On every stream, whatever the link does to the segments, and whatever is cancelled meanwhile."""

    async def scenario(world: World) -> None:
        a, b = mesh(world, "a", "b")
        world.link("a", "b", way, back)

        async def faults() -> None:
            for pause_s, duration_s, is_partition in cuts:
                await trio.sleep(pause_s)
                if is_partition:
                    world.partition("a", "b")
                else:
                    world.stop("b")
                await trio.sleep(duration_s)
                world.heal()
                if world.is_stopped("b"):
                    world.cont("b")

        async def talk(number: int) -> None:
            rng = random.Random(f"{seed} {number}")
            frames = [i.to_bytes(2, "big") + rng.randbytes(rng.choice((0, 50, 30_000, 90_000))) for i in range(20)]
            stream = await a.open(b.peer_id, ECHO)

            async def send() -> None:
                for frame in frames:
                    await stream.send(frame)

            async with trio.open_nursery() as nursery:
                nursery.start_soon(send)
                received: list[bytes] = []
                while len(received) < len(frames):
                    with trio.move_on_after(rng.choice((inf, rng.uniform(0, 0.1)))):
                        frame = await stream.receive()
                        assert frame is not None
                        received.append(bytes(frame))
            assert received == frames
            await stream.aclose()

        async with trio.open_nursery() as nursery:
            async with trio.open_nursery() as talking:
                for number in range(n_streams):
                    talking.start_soon(talk, number)
                await trio.sleep(2)  # connected: from here on cuts are bridged
                nursery.start_soon(faults)
            nursery.cancel_scope.cancel()

    run_world(seed, scenario, options=WorldOptions(patience_s=60.0))
