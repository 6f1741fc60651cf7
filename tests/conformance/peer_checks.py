"""Checks between peers: who is who, opening, many of everything, and death. Run through `transport_suite`."""

from __future__ import annotations

import random

import pytest
import trio

from mycel.protocols.errors import PeerError, PeerRefused, PeerTimeout, PeerUnreachable
from mycel.protocols.ports import Stream, Transport
from mycel.security.identity import Identity
from tests.conformance.transport_rig import (
    CHECKS,
    DEATH_CHECKS,
    ECHO,
    FLOOD,
    MUTE,
    PLAIN,
    SLOW_CHECKS,
    Rig,
    Victim,
    accepting,
    assert_echoes,
    check,
    eventually,
    frame_of,
    index_of,
    pair,
    read_to_the_end,
    serve_suite,
    write_for_ever,
)

# ---- who is who -------------------------------------------------------------------------------------------------


@check(to=CHECKS)
async def both_ends_know_whom_they_talk_to(rig: Rig) -> None:
    client, server = await pair(rig)
    third = await rig.start()
    third.learn(server.peer_id, server.addresses)
    assert len({client.peer_id, server.peer_id, third.peer_id}) == 3
    async with accepting(server, PLAIN) as inbound:
        for caller in (client, third, client):
            near = await caller.open(server.peer_id, PLAIN)
            await near.send(caller.peer_id.encode())
            far = await inbound.receive()
            said = await far.receive()
            assert said is not None
            assert bytes(said).decode() == far.peer == caller.peer_id
            assert near.peer == server.peer_id


@check(to=CHECKS)
async def an_impostor_at_the_address_is_not_taken_for_the_peer(rig: Rig) -> None:
    client, impostor = await pair(rig)
    expected = Identity.from_seed(b"\x07" * 32).peer_id
    client.learn(expected, impostor.addresses)
    with pytest.raises(PeerUnreachable) as caught:
        await client.open(expected, ECHO)
    assert caught.value.peer == expected
    assert expected not in client.connected()
    await assert_echoes(client, impostor.peer_id)


# ---- opening ----------------------------------------------------------------------------------------------------


@check(to=CHECKS)
async def an_unknown_protocol_is_refused(rig: Rig) -> None:
    client, server = await pair(rig)
    for _ in range(3):
        with pytest.raises(PeerRefused) as caught:
            await client.open(server.peer_id, "/suite/nobody-speaks-this/1")
        assert caught.value.peer == server.peer_id
    await assert_echoes(client, server.peer_id)


@check(to=CHECKS)
async def a_peer_without_addresses_is_unreachable(rig: Rig) -> None:
    client, _ = await pair(rig)
    nobody = Identity.from_seed(b"\x09" * 32).peer_id
    with pytest.raises(PeerUnreachable) as caught:
        await client.open(nobody, ECHO)
    assert caught.value.peer == nobody


@check(to=CHECKS)
async def a_peer_that_left_is_unreachable(rig: Rig) -> None:
    client, server = await pair(rig)
    await rig.shut_down(server)
    for _ in range(2):
        with pytest.raises(PeerUnreachable) as caught:
            await client.open(server.peer_id, ECHO)
        assert caught.value.peer == server.peer_id


@check(to=CHECKS)
async def a_dead_address_does_not_hide_a_good_one(rig: Rig) -> None:
    client, server = await pair(rig)
    gone = await rig.start()
    await rig.shut_down(gone)
    client.learn(server.peer_id, gone.addresses)
    await assert_echoes(client, server.peer_id)
    other = await rig.start()
    other.learn(server.peer_id, (*gone.addresses, *server.addresses))
    await assert_echoes(other, server.peer_id)


@check(to=CHECKS)
async def a_peer_can_be_reached_again_after_it_was_not(rig: Rig) -> None:
    """A failed attempt must not be remembered for longer than the failure lasts."""
    client, server = await pair(rig)
    gone = await rig.start()
    await rig.shut_down(gone)
    late = await rig.start()
    late.learn(server.peer_id, gone.addresses)
    with pytest.raises(PeerUnreachable):
        await late.open(server.peer_id, ECHO)
    late.learn(server.peer_id, server.addresses)
    await assert_echoes(late, server.peer_id)
    await assert_echoes(client, server.peer_id)


@check(to=CHECKS)
async def a_connection_serves_both_peers(rig: Rig) -> None:
    """Who was dialled can open a stream back, without an address to dial."""
    client, server = await pair(rig)
    serve_suite(client)
    async with accepting(server, PLAIN) as inbound:
        near = await client.open(server.peer_id, PLAIN)
        far = await inbound.receive()
        assert far.peer == client.peer_id
        await assert_echoes(server, client.peer_id)
        await near.aclose()


@check(to=CHECKS)
async def both_open_at_the_same_moment(rig: Rig) -> None:
    first, second = await pair(rig)
    serve_suite(first)
    second.learn(first.peer_id, first.addresses)
    for _ in range(5):
        async with trio.open_nursery() as nursery:
            for _ in range(3):
                nursery.start_soon(assert_echoes, first, second.peer_id)
                nursery.start_soon(assert_echoes, second, first.peer_id)
    assert second.peer_id in first.connected()
    assert first.peer_id in second.connected()


@check(to=CHECKS)
async def cancelled_opens_leave_nothing(rig: Rig) -> None:
    rng = random.Random(11)
    client, server = await pair(rig)
    present = 0

    async def count(stream: Stream) -> None:
        nonlocal present
        present += 1
        try:
            await read_to_the_end(stream)
        except PeerError:
            pass
        finally:
            present -= 1

    server.serve("/suite/count/1", count)
    for _ in range(rig.scale.cancels // 3):
        with trio.move_on_after(10.0 ** rng.uniform(-5, -1.5)):
            stream = await client.open(server.peer_id, "/suite/count/1")
            await stream.aclose()
    await assert_echoes(client, server.peer_id)
    await eventually(lambda: present == 0)


# ---- many of everything -----------------------------------------------------------------------------------------


@check(to=CHECKS, limit_s=60.0)
async def many_streams_are_open_at_once(rig: Rig) -> None:
    client, server = await pair(rig)
    streams: list[Stream] = []
    answers: list[int] = []

    async def open_one() -> None:
        streams.append(await client.open(server.peer_id, ECHO))

    async def use_one(index: int, stream: Stream) -> None:
        await stream.send(frame_of(index, 2000))
        frame = await stream.receive()
        assert frame is not None
        answers.append(index_of(frame))

    async with trio.open_nursery() as nursery:
        for _ in range(rig.scale.streams):
            nursery.start_soon(open_one)
    async with trio.open_nursery() as nursery:
        for index, stream in enumerate(streams):
            nursery.start_soon(use_one, index, stream)
    assert sorted(answers) == list(range(rig.scale.streams))
    for stream in streams:
        await stream.aclose()
    await assert_echoes(client, server.peer_id)


@check(to=CHECKS, limit_s=60.0)
async def streams_come_and_go_without_end(rig: Rig) -> None:
    """More streams, one after the other, than any one connection could hold at once."""
    client, server = await pair(rig)
    for i in range(2 * rig.scale.streams):
        await assert_echoes(client, server.peer_id, size_bytes=10 + i)


async def _come_and_go(rig: Rig, n_cycles: int) -> None:
    hub = await rig.start()
    serve_suite(hub)
    for _ in range(n_cycles):
        guest = await rig.start()
        guest.learn(hub.peer_id, hub.addresses)
        await assert_echoes(guest, hub.peer_id)
        await rig.shut_down(guest)
    await eventually(lambda: not hub.connected())
    last = await rig.start()
    last.learn(hub.peer_id, hub.addresses)
    await assert_echoes(last, hub.peer_id)


@check(to=CHECKS, limit_s=60.0)
async def peers_come_and_go(rig: Rig) -> None:
    await _come_and_go(rig, min(rig.scale.cycles, 20))


@check(to=SLOW_CHECKS, limit_s=300.0)
async def hundreds_of_peers_come_and_go(rig: Rig) -> None:
    await _come_and_go(rig, rig.scale.cycles)


# ---- connections ------------------------------------------------------------------------------------------------


@check(to=CHECKS)
async def a_connection_is_measured_and_listed(rig: Rig) -> None:
    client, server = await pair(rig)
    assert client.connected() == frozenset()
    assert client.rtt_s(server.peer_id) is None
    await assert_echoes(client, server.peer_id)
    assert client.connected() == {server.peer_id}
    for one, other in ((client, server), (server, client)):
        await eventually(lambda one=one, other=other: other.peer_id in one.connected())  # type: ignore[misc]
        await eventually(lambda one=one, other=other: one.rtt_s(other.peer_id) is not None)  # type: ignore[misc]
        rtt_s = one.rtt_s(other.peer_id)
        assert rtt_s is not None
        assert 0.0 < rtt_s < 5.0
    await rig.shut_down(server)
    await eventually(lambda: not client.connected())
    assert client.rtt_s(server.peer_id) is None


@check(to=CHECKS)
async def a_transport_that_shuts_down_does_not_end_its_streams(rig: Rig) -> None:
    """Only aclose is an end; a process that goes away leaves its streams unfinished, and says so."""
    client, server = await pair(rig)
    ended: list[str] = []

    async def wait_in_handler(stream: Stream) -> None:
        try:
            await stream.send(b"the handler is running")
            await stream.receive()
        finally:
            ended.append(stream.peer)

    server.serve("/suite/wait/1", wait_in_handler)
    streams = [await client.open(server.peer_id, protocol) for protocol in (ECHO, MUTE, "/suite/wait/1")]
    assert await streams[2].receive() is not None
    await rig.shut_down(server)
    for stream in streams:
        with pytest.raises(PeerUnreachable):
            await stream.receive()
    assert ended == [client.peer_id], "the handler of a transport that is gone was not ended"


@check(to=SLOW_CHECKS, limit_s=120.0)
async def an_idle_connection_stays(rig: Rig) -> None:
    client, server = await pair(rig)
    stream = await client.open(server.peer_id, ECHO)
    with trio.move_on_after(2 * rig.silence_s):
        raise AssertionError(f"an idle stream received {await stream.receive()!r}")
    await stream.send(b"awake")
    assert await stream.receive() == b"awake"


@check(to=SLOW_CHECKS, limit_s=120.0)
async def a_busy_connection_is_not_taken_for_a_silent_one(rig: Rig) -> None:
    client, server = await pair(rig)
    stream = await client.open(server.peer_id, FLOOD)
    with trio.move_on_after(2 * rig.silence_s):
        while True:
            assert await stream.receive() is not None
    await stream.reset()
    await assert_echoes(client, server.peer_id)


# ---- death ------------------------------------------------------------------------------------------------------


async def _witnesses(rig: Rig, client: Transport, victim: Victim) -> list[Stream]:
    """Streams to the victim in every state: idle, not read by it, and never ending."""
    client.learn(victim.peer_id, victim.addresses)
    await assert_echoes(client, victim.peer_id)
    return [await client.open(victim.peer_id, protocol) for protocol in (ECHO, MUTE, FLOOD)]


async def _notice(client: Transport, streams: list[Stream], within_s: float) -> None:
    """Everyone who reads from, or writes to, the dead peer hears PeerUnreachable within `within_s`."""

    async def read(stream: Stream) -> None:
        with pytest.raises(PeerUnreachable) as caught:
            await read_to_the_end(stream)
        assert caught.value.peer == stream.peer
        assert caught.value.reason

    async def write(stream: Stream) -> None:
        with pytest.raises(PeerUnreachable):
            await write_for_ever(stream)

    with trio.fail_after(within_s):
        async with trio.open_nursery() as nursery:
            for stream in streams:
                nursery.start_soon(read, stream)
            nursery.start_soon(write, streams[1])
        peer = streams[0].peer
        await eventually(lambda: peer not in client.connected(), limit_s=within_s)


@check(to=DEATH_CHECKS, limit_s=60.0)
async def a_killed_peer_is_noticed_within_a_second(rig: Rig) -> None:
    client, bystander = await pair(rig)
    victim = await rig.start_victim()
    streams = await _witnesses(rig, client, victim)
    await victim.kill()
    await _notice(client, streams, within_s=1.0)
    with pytest.raises(PeerUnreachable):
        await client.open(victim.peer_id, ECHO)
    await assert_echoes(client, bystander.peer_id)


@check(to=DEATH_CHECKS, limit_s=60.0)
async def a_stopped_peer_is_noticed_by_its_silence(rig: Rig) -> None:
    client, bystander = await pair(rig)
    victim = await rig.start_victim()
    streams = await _witnesses(rig, client, victim)
    neighbour = await client.open(bystander.peer_id, ECHO)
    await victim.stop()
    await _notice(client, streams, within_s=1.5 * rig.silence_s + 1.0)
    await neighbour.send(b"not touched")
    assert await neighbour.receive() == b"not touched"
    with pytest.raises((PeerTimeout, PeerUnreachable)):
        await client.open(victim.peer_id, ECHO)
    await victim.cont()
    await assert_echoes(client, victim.peer_id)


@check(to=DEATH_CHECKS, limit_s=60.0)
async def opening_to_a_stopped_stranger_times_out(rig: Rig) -> None:
    client = await rig.start()
    victim = await rig.start_victim()
    client.learn(victim.peer_id, victim.addresses)
    await victim.stop()
    with pytest.raises(PeerTimeout) as caught:
        await client.open(victim.peer_id, ECHO)
    assert caught.value.peer == victim.peer_id
    await victim.cont()
    await assert_echoes(client, victim.peer_id)


@check(to=DEATH_CHECKS, limit_s=60.0)
async def a_write_to_a_stopped_peer_can_be_cancelled_and_reset(rig: Rig) -> None:
    """No clean-up hangs on a peer that is silent: every verb is bounded."""
    client, bystander = await pair(rig)
    victim = await rig.start_victim()
    streams = await _witnesses(rig, client, victim)
    await victim.stop()
    with trio.move_on_after(0.2):
        await write_for_ever(streams[1])
    with trio.fail_after(2 * rig.silence_s):
        for stream in streams[:2]:
            await stream.reset()
        await streams[2].aclose()
    await assert_echoes(client, bystander.peer_id)
    await victim.cont()
