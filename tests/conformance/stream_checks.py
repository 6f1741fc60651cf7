"""Checks of one stream: frames, ends, memory, cancellation and back-pressure. Run through `transport_suite`."""

from __future__ import annotations

import random

import pytest
import trio

from mycel.protocols.errors import LocalProtocolError, MycelError, PeerUnreachable
from mycel.protocols.ports import MAX_FRAME_BYTES, Stream
from tests.conformance.transport_rig import (
    CHECKS,
    ECHO,
    FAIL,
    GREET,
    KIB,
    MIB,
    MUTE,
    PLAIN,
    SLOW_CHECKS,
    Rig,
    accepting,
    assert_echoes,
    check,
    frame_of,
    index_of,
    pair,
    read_to_the_end,
    two_ends,
    write_for_ever,
)

# ---- frames -----------------------------------------------------------------------------------------------------


@check(to=CHECKS)
async def frames_of_all_sizes_echo(rig: Rig) -> None:
    client, server = await pair(rig)
    stream = await client.open(server.peer_id, ECHO)
    for size_bytes in (1, 2, 1000, 16 * KIB, 64 * KIB - 1, 64 * KIB, 64 * KIB + 1, 5 * MIB):
        frame = random.Random(size_bytes).randbytes(size_bytes)
        await stream.send(frame)
        assert await stream.receive() == frame, f"{size_bytes} bytes"
    await stream.aclose()


@check(to=CHECKS)
async def parts_make_one_frame(rig: Rig) -> None:
    async with two_ends(rig) as (near, far):
        await near.send(b"ab", memoryview(b"cd"), b"", memoryview(bytearray(b"e")))
        await near.send(*(bytes([i]) for i in range(200)))
        assert await far.receive() == b"abcde"
        assert await far.receive() == bytes(range(200))


@check(to=CHECKS)
async def frames_keep_their_order_and_borders(rig: Rig) -> None:
    rng = random.Random(1)
    frames = [rng.randbytes(rng.choice((1, 2, 3, 100, 5000, 100_000))) for _ in range(400)]

    async def send_all(stream: Stream) -> None:
        for frame in frames:
            await stream.send(frame)
        await stream.aclose()

    async with two_ends(rig) as (near, far), trio.open_nursery() as nursery:
        nursery.start_soon(send_all, near)
        for i, frame in enumerate(frames):
            assert await far.receive() == frame, f"frame {i}"
        assert await far.receive() is None


@check(to=CHECKS)
async def both_directions_at_once(rig: Rig) -> None:
    async def send_all(stream: Stream, first: int) -> None:
        for i in range(first, first + 100):
            await stream.send(frame_of(i, 1 + (i * 7919) % 50_000))

    async def receive_all(stream: Stream, first: int) -> None:
        for i in range(first, first + 100):
            frame = await stream.receive()
            assert frame is not None
            assert index_of(frame) == i

    async with two_ends(rig) as (near, far), trio.open_nursery() as nursery:
        nursery.start_soon(send_all, near, 0)
        nursery.start_soon(send_all, far, 1000)
        nursery.start_soon(receive_all, far, 0)
        nursery.start_soon(receive_all, near, 1000)


@check(to=CHECKS)
async def an_empty_frame_is_our_bug(rig: Rig) -> None:
    async with two_ends(rig) as (near, far):
        for parts in ((), (b"",), (b"", memoryview(b""))):
            with pytest.raises(LocalProtocolError):
                await near.send(*parts)
        await near.send(b"still well")
        assert await far.receive() == b"still well"


@check(to=CHECKS)
async def a_frame_over_the_limit_is_our_bug(rig: Rig) -> None:
    block = bytes(MIB)
    async with two_ends(rig) as (near, far):
        with pytest.raises(LocalProtocolError):
            await near.send(*([block] * (MAX_FRAME_BYTES // MIB)), b"x")
        await near.send(b"still well")
        assert await far.receive() == b"still well"


@check(to=SLOW_CHECKS, limit_s=60.0)
async def the_largest_frame_passes(rig: Rig) -> None:
    block = random.Random(3).randbytes(MIB)
    n_blocks = MAX_FRAME_BYTES // MIB
    async with two_ends(rig) as (near, far), trio.open_nursery() as nursery:
        nursery.start_soon(lambda: near.send(*([block] * n_blocks)))
        frame = await far.receive()
        assert frame is not None
        assert len(frame) == MAX_FRAME_BYTES
        assert all(frame[i * MIB : (i + 1) * MIB] == block for i in range(n_blocks))


@check(to=CHECKS)
async def a_received_frame_is_the_callers_own(rig: Rig) -> None:
    async with two_ends(rig) as (near, far):
        await near.send(b"first")
        await near.send(b"second")
        first = await far.receive()
        assert first is not None
        assert not first.readonly
        first[:] = b"XXXXX"
        assert await far.receive() == b"second"
        assert first == b"XXXXX"


@check(to=CHECKS)
async def a_sent_buffer_may_be_reused(rig: Rig) -> None:
    buffer = bytearray(b"a" * 100_000)
    async with two_ends(rig) as (near, far):
        await near.send(memoryview(buffer))
        buffer[:] = b"b" * 100_000
        assert await far.receive() == b"a" * 100_000


# ---- ends -------------------------------------------------------------------------------------------------------


@check(to=CHECKS)
async def an_end_comes_after_all_frames(rig: Rig) -> None:
    frames = [frame_of(i, 300 * KIB) for i in range(5)]

    async def send_and_end(stream: Stream) -> None:
        for frame in frames:
            await stream.send(frame)
        await stream.aclose()
        await stream.aclose()
        with pytest.raises(LocalProtocolError):
            await stream.send(b"too late")

    async with two_ends(rig) as (near, far), trio.open_nursery() as nursery:
        nursery.start_soon(send_and_end, near)
        for frame in frames:
            assert await far.receive() == frame
        for _ in range(3):
            assert await far.receive() is None


@check(to=CHECKS)
async def a_reset_is_not_an_end(rig: Rig) -> None:
    async with two_ends(rig) as (near, far):
        await near.reset()
        await near.reset()
        for _ in range(2):
            with pytest.raises(PeerUnreachable) as caught:
                await far.receive()
            assert caught.value.peer == far.peer
        with pytest.raises(PeerUnreachable):
            await far.send(b"nobody is there")
        with pytest.raises(MycelError):
            await near.send(b"after our own reset")


@check(to=CHECKS)
async def a_blocked_send_wakes_on_reset(rig: Rig) -> None:
    async def send_forever(stream: Stream) -> None:
        with pytest.raises(PeerUnreachable):
            await write_for_ever(stream)

    async with two_ends(rig) as (near, far), trio.open_nursery() as nursery:
        nursery.start_soon(send_forever, near)
        assert await far.receive() is not None
        await far.reset()


@check(to=CHECKS)
async def one_side_ends_while_the_other_sends(rig: Rig) -> None:
    """The one who is still sending finishes or hears PeerUnreachable; it never hangs, and still reads the end."""

    async def send_on(stream: Stream) -> None:
        try:
            for i in range(400):
                await stream.send(frame_of(i, 64 * KIB))
        except PeerUnreachable:
            return

    client, server = await pair(rig)
    async with accepting(server, PLAIN) as inbound:
        near = await client.open(server.peer_id, PLAIN)
        far = await inbound.receive()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(send_on, far)
            assert await near.receive() is not None
            await near.send(b"last words")
            await near.aclose()
            assert await far.receive() == b"last words"
            assert await far.receive() is None
        await far.aclose()
        await assert_echoes(client, server.peer_id)


@check(to=CHECKS)
async def a_handler_that_returns_ends_its_stream(rig: Rig) -> None:
    client, server = await pair(rig)
    stream = await client.open(server.peer_id, GREET)
    assert await stream.receive() == b"hello"
    assert await stream.receive() is None
    await stream.aclose()


@check(to=CHECKS)
async def a_handler_that_raises_harms_nobody_else(rig: Rig) -> None:
    client, server = await pair(rig)
    bystander = await client.open(server.peer_id, ECHO)
    for i in range(10):
        broken = await client.open(server.peer_id, FAIL)
        await broken.send(b"now fail")
        with pytest.raises(PeerUnreachable):
            await broken.receive()
        await bystander.send(frame_of(i, 100))
        assert await bystander.receive() == frame_of(i, 100)
    await assert_echoes(client, server.peer_id)


@check(to=CHECKS)
async def closing_ones_own_end_wakes_a_blocked_receive(rig: Rig) -> None:
    """It ends with None or an error of ours: what matters is that no task stays behind."""

    async def wait_for_end(stream: Stream) -> None:
        try:
            await read_to_the_end(stream)
        except MycelError:
            return

    client, server = await pair(rig)
    for end in ("aclose", "reset"):
        stream = await client.open(server.peer_id, MUTE)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(wait_for_end, stream)
            await trio.lowlevel.checkpoint()
            await getattr(stream, end)()


# ---- cancellation -----------------------------------------------------------------------------------------------


def _moment(rng: random.Random) -> float:
    """A deadline from 10 us to 30 ms: before, within and after what one frame takes, on any adapter."""
    return float(10.0 ** rng.uniform(-5, -1.5))


@check(to=CHECKS, limit_s=60.0)
async def cancelled_receives_lose_nothing(rig: Rig) -> None:
    rng = random.Random(7)
    client, server = await pair(rig)
    stream = await client.open(server.peer_id, ECHO)
    n_cancelled = index = 0
    while n_cancelled < rig.scale.cancels:
        burst = rng.choice((1, 1, 3))
        for i in range(index, index + burst):
            await stream.send(frame_of(i, rng.choice((10, 1000, 100_000))))
        while burst:
            frame = None
            with trio.move_on_after(_moment(rng)) as scope:
                frame = await stream.receive()
            if frame is None:
                assert scope.cancelled_caught
                n_cancelled += 1
                continue
            assert index_of(frame) == index
            index, burst = index + 1, burst - 1
        if rng.random() < 0.5:  # nothing is on its way: this one can only be cancelled
            with trio.move_on_after(_moment(rng) / 10):
                raise AssertionError(f"received {await stream.receive()!r} out of nowhere")
            n_cancelled += 1
    await assert_echoes(client, server.peer_id)


@check(to=CHECKS, limit_s=60.0)
async def a_cancellation_between_any_two_steps_loses_nothing(rig: Rig) -> None:
    """Cancelled 0, 1, 2, ... turns of the scheduler after the call, with a frame there to be taken."""
    received: list[int] = []

    async def take(stream: Stream, scope: trio.CancelScope) -> None:
        with scope:
            frame = await stream.receive()
            assert frame is not None
            received.append(index_of(frame))

    client, server = await pair(rig)
    stream = await client.open(server.peer_id, ECHO)
    n_moments = min(30, rig.scale.cancels)
    for n_turns in range(n_moments):
        await stream.send(frame_of(n_turns, 100))
        await assert_echoes(client, server.peer_id)  # by now the frame is back, on any network in order
        scope = trio.CancelScope()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(take, stream, scope)
            for _ in range(n_turns):
                await trio.lowlevel.checkpoint()
            scope.cancel()
    while len(received) < n_moments:
        await take(stream, trio.CancelScope())
    assert received == list(range(n_moments))


@check(to=CHECKS, limit_s=60.0)
async def cancelled_sends_corrupt_nothing(rig: Rig) -> None:
    """What `send` returned for arrives; what was cancelled arrives whole or not at all; a bystander is not touched."""
    rng = random.Random(8)
    confirmed: set[int] = set()

    async def send_all(stream: Stream) -> None:
        n_cancelled = index = 0
        while n_cancelled < rig.scale.cancels:
            deadline_s = _moment(rng) if index % 8 else 10.0  # at least each eighth has the time to pass
            with trio.move_on_after(deadline_s) as scope:
                await stream.send(frame_of(index, rng.choice((10, 1000, 100_000, 700_000))))
                confirmed.add(index)
            n_cancelled += scope.cancelled_caught
            index += 1
            if rng.random() < 0.1:
                with trio.CancelScope() as scope:
                    scope.cancel()
                    await stream.send(frame_of(index, 1000))
                    confirmed.add(index)
                index += 1
        await stream.aclose()

    arrived: list[int] = []
    client, server = await pair(rig)
    bystander = await client.open(server.peer_id, ECHO)
    async with accepting(server, PLAIN) as inbound:
        near = await client.open(server.peer_id, PLAIN)
        far = await inbound.receive()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(send_all, near)
            while (frame := await far.receive()) is not None:
                arrived.append(index_of(frame))
                if len(arrived) % 50 == 0:
                    await bystander.send(frame_of(len(arrived), 100))
                    assert await bystander.receive() == frame_of(len(arrived), 100)
    assert arrived == sorted(set(arrived))
    assert confirmed <= set(arrived)
    assert confirmed


# ---- back-pressure ----------------------------------------------------------------------------------------------


async def _reader_pauses(rig: Rig, pause_s: float) -> None:
    n_frames = 2 * rig.max_in_flight_bytes // (256 * KIB) + 8
    sent = 0
    finished = trio.Event()

    async def send_all(stream: Stream) -> None:
        nonlocal sent
        for i in range(n_frames):
            await stream.send(frame_of(i, 256 * KIB))
            sent += 1
        await stream.aclose()
        finished.set()

    client, server = await pair(rig)
    async with accepting(server, PLAIN) as inbound:
        near = await client.open(server.peer_id, PLAIN)
        far = await inbound.receive()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(send_all, near)
            with trio.move_on_after(pause_s):
                await finished.wait()
            assert not finished.is_set(), "the sender was never held back"
            assert sent * 256 * KIB <= rig.max_in_flight_bytes
            await assert_echoes(client, server.peer_id)  # other streams of the connection are not held up
            for i in range(n_frames):
                frame = await far.receive()
                assert frame is not None
                assert index_of(frame) == i
            assert await far.receive() is None


@check(to=CHECKS, limit_s=60.0)
async def a_reader_that_pauses_holds_its_sender_back(rig: Rig) -> None:
    await _reader_pauses(rig, min(rig.scale.pause_s, 0.5))


@check(to=SLOW_CHECKS, limit_s=120.0)
async def a_reader_that_pauses_for_long_loses_nothing(rig: Rig) -> None:
    await _reader_pauses(rig, rig.scale.pause_s)


@check(to=CHECKS)
async def a_blocked_send_can_be_cancelled(rig: Rig) -> None:
    client, server = await pair(rig)
    stream = await client.open(server.peer_id, MUTE)
    with trio.move_on_after(rig.scale.pause_s) as scope:
        for _ in range(2 * rig.max_in_flight_bytes // (256 * KIB) + 8):
            await stream.send(bytes(256 * KIB))
    assert scope.cancelled_caught
    await stream.reset()
    await assert_echoes(client, server.peer_id)
