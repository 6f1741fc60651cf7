"""Hostile peers on every protocol, over real connections: the node stays up and small, and nobody else notices."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from time import time

import msgspec
import pytest
import torch
import trio

from mycel.node.libp2p_transport.stream import FrameStream
from mycel.protocols import ids
from mycel.protocols import messages as m
from mycel.protocols.codec import file_codec, handover_codec, reach_codec, record_codec, ring_codec, session_codec
from mycel.protocols.errors import PeerError, PeerRefused
from mycel.protocols.tensors import to_wire
from mycel.protocols.wire import MAX_ELEMENTS
from mycel.security.envelope import sign_record
from mycel.security.identity import Identity
from tests.loopback.hostile import FRAME_OF_4_GB, MIB, Hostile, answer, ended, frame_of, survive
from tests.loopback.node_process import Nodes
from tests.tiny_models import HIDDEN

pytestmark = [pytest.mark.loopback, pytest.mark.slow]

N_BLOCKS = 4
GARBAGE = (
    b"\x00",
    b"\xff" * 64,
    b"\x0f\x00\x00\x00" + b"\x92\x93\xa9NoMessage\x07\x2a\x90",
    # A header of 2 GiB in a frame of ten bytes, and one that ends in the middle of a word.
    b"\xff\xff\xff\x7f" + b"\x00" * 6,
    b"\x20\x00\x00\x00" + b"\x92\x93\xa9NextTo",
    b"\x40\x00\x00\x00" + b"\x91" * 64,
)


@pytest.fixture(scope="module")
def nodes(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nodes]:
    """Two hops and no other holder: whoever loses one of them notices."""
    with Nodes(tmp_path_factory.mktemp("nodes"), llama) as started:
        started.start((0, 2), (2, 4))
        yield started


def claiming_4_gb(message: m.Message) -> bytes:
    """A frame of some bytes with a tensor that claims to have 2^30 elements of 4 bytes."""
    header = msgspec.msgpack.encode((message, (("float32", (MAX_ELEMENTS,), "raw"),)))
    lead = 4 + len(header)
    return len(header).to_bytes(4, "little") + header + bytes(-lead % 16) + bytes(64)


# ---- what is the same on all protocols -------------------------------------------------------------------------------

PROTOCOLS = (ids.RECORDS, ids.SESSION, ids.RING, ids.HANDOVER, ids.REACH, ids.FILES)
PATIENT = (ids.SESSION, ids.RING)  # they wait some seconds for the first message


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_garbage_half_frames_and_false_lengths(nodes: Nodes, llama: Path, protocol: str) -> None:
    async def attack(hostile: Hostile) -> None:
        for garbage in GARBAGE:
            await ended(await hostile.say(protocol, garbage))
        await ended(await hostile.say_raw(protocol, FRAME_OF_4_GB + b"x"))
        for _ in range(20):
            half = await hostile.say_raw(protocol, b"\x00\x10\x00\x00half a frame")
            await half.reset()
        for _ in range(20):
            early = await hostile.open(protocol)
            await early.reset()
        await ended(await hostile.say_raw(protocol, bytes(4) + b"more after the end"))

    survive(nodes, llama, attack)


def test_thousands_of_streams_that_say_nothing(nodes: Nodes, llama: Path) -> None:
    """As many as are let in, half of them with half a frame; and once more. (Records and files let in few.)"""

    async def attack(hostile: Hostile) -> None:
        for _ in range(2):
            opened: list[FrameStream] = []
            async with trio.open_nursery() as nursery:
                for share in range(10):
                    nursery.start_soon(open_many, hostile, range(share, 1500, 10), opened)
            assert 900 < len(opened) <= 1024
            for stream in opened:
                stream.abandon()

    survive(nodes, llama, attack)


async def open_many(hostile: Hostile, numbers: range, opened: list[FrameStream]) -> None:
    for number in numbers:
        with suppress(PeerError):  # refused
            stream = await hostile.open(PATIENT[number % len(PATIENT)])
            opened.append(stream)
            if number % 2 and stream._mux.up:
                stream._mux.write([b"\x00\x00\x10\x00half"], 8)


def test_bytes_that_trickle_in(nodes: Nodes, llama: Path) -> None:
    """A slow loris: every stream is about to say something. The bystanders have no patience for it."""

    async def attack(hostile: Hostile) -> None:
        valid = frame_of(file_codec, m.GetManifest(hostile.swarm))
        data = len(valid).to_bytes(4, "big") + valid
        streams = [await hostile.open(protocol) for protocol in PROTOCOLS for _ in range(16)]
        for byte in data[:24]:
            for stream in streams:
                if stream._mux.up:
                    stream._mux.write([bytes([byte])], 1)
            await trio.sleep(0.02)

    survive(nodes, llama, attack)


def test_frames_that_fill_the_memory_and_never_end(nodes: Nodes, llama: Path) -> None:
    """63 MiB of 64 on each of six streams: over the limit of one connection, whose streams are reset then."""

    async def attack(hostile: Hostile) -> None:
        async def pour(stream_number: int) -> None:
            stream = await hostile.open(PROTOCOLS[stream_number % len(PROTOCOLS)])
            block = bytes(60_000)  # Noise packs no more into one message
            try:
                stream._mux.write([(64 * MIB).to_bytes(4, "big")], 4)
                for _ in range(63 * MIB // len(block)):
                    await stream._wait_for_credit(len(block))
                    stream._mux.write([block], len(block))
            except PeerError:
                return
            await trio.sleep(1.0)

        with trio.move_on_after(8.0):
            async with trio.open_nursery() as nursery:
                for number in range(6):
                    nursery.start_soon(pour, number)

    # 256 MiB are what a connection may hold; a growing bytearray may take twice a frame for a moment.
    survive(nodes, llama, attack, room_bytes=(256 + 64 + 64) * MIB)


# ---- records ---------------------------------------------------------------------------------------------------------


def test_records(nodes: Nodes, llama: Path) -> None:
    async def attack(hostile: Hostile) -> None:
        me, key = hostile.me, os.urandom(32)
        stranger = Identity.generate()
        find = frame_of(record_codec, m.FindRecords(me, key))
        # Another's name, an answer in place of a request, garbage after a valid beginning.
        await ended(await hostile.say(ids.RECORDS, frame_of(record_codec, m.FindRecords(hostile.node, key))))
        await ended(await hostile.say(ids.RECORDS, frame_of(record_codec, m.Stored(True))))
        stream = await hostile.say(ids.RECORDS, find)
        await answer(stream)
        await stream.send(b"garbage")
        await ended(stream)
        # A forged, an outdated, an old and a replayed record.
        stream = await hostile.open(ids.RECORDS)

        async def store(record: m.SignedRecord) -> m.Stored:
            await stream.send(frame_of(record_codec, m.StoreRecord(me, record)))
            stored = record_codec.decode_only(await answer(stream))
            assert isinstance(stored, m.Stored)
            return stored

        now = time()
        old, new = (sign_record(stranger, key, seq, now + 60, b"value") for seq in (1, 2))
        assert (await store(new)).accepted
        assert not (await store(old)).accepted
        assert not (await store(msgspec.structs.replace(new, value=b"other", seq=3))).accepted
        assert not (await store(sign_record(stranger, key, 4, now - 60, b"value"))).accepted
        assert not (await store(sign_record(stranger, key, 5, now + 1e6, b"value"))).accepted
        # Many questions whose answers nobody reads.
        flood = await hostile.open(ids.RECORDS)
        with trio.move_on_after(1.0):
            while True:
                await flood.send(find)

    survive(nodes, llama, attack)


# ---- sessions --------------------------------------------------------------------------------------------------------


async def refusal(stream) -> str:
    said = session_codec.decode_only(await answer(stream))
    assert isinstance(said, m.HopRefused)
    return said.reason


def test_sessions(nodes: Nodes, llama: Path) -> None:
    async def attack(hostile: Hostile) -> None:
        open_own = partial(hostile.open_last_hop, N_BLOCKS)
        # Someone else's session by its name.
        generation = m.Generation(m.SamplingParams(), (1, 2, 3), 60)
        theirs = m.OpenHop(hostile.session, hostile.swarm, 2, N_BLOCKS, 64, hostile.me, hostile.me, (), generation)
        assert "open already" in await refusal(await hostile.say(ids.SESSION, frame_of(session_codec, theirs)))
        # More than there is, tokens that no vocabulary has, blocks that nobody has, our own peer twice.
        huge = msgspec.structs.replace(theirs, session=os.urandom(16), max_tokens=2**24)
        assert "context" in await refusal(await hostile.say(ids.SESSION, frame_of(session_codec, huge)))
        strange = m.Generation(m.SamplingParams(), (2**31 - 1,), 60)
        stream, _ = await open_own(generation=strange)
        assert "vocabulary" in await refusal(stream)
        stream, _ = await open_own(previous=hostile.node)
        assert "visits a peer once" in await refusal(stream)
        await ended((await open_own(generation=None))[0])
        endless = m.Generation(m.SamplingParams(), tuple(range(200)) * 5000, 2**24)
        await ended(
            await hostile.say(ids.SESSION, frame_of(session_codec, msgspec.structs.replace(huge, generation=endless)))
        )
        # Nonsense in a running session ends that session.
        for nonsense in (b"\xff" * 40, frame_of(session_codec, theirs), frame_of(session_codec, m.HopOpened())):
            stream, _ = await open_own()
            assert isinstance(session_codec.decode_only(await answer(stream)), m.HopOpened)
            await stream.send(nonsense)
            await ended(stream)
        stream, _ = await open_own()
        await answer(stream)
        await stream.send(frame_of(session_codec, m.Relink(hostile.node, hostile.node, 3, 3)))
        await ended(stream)
        await ended(await hostile.say(ids.SESSION, claiming_4_gb(m.HopOpened())))
        # As many sessions as are let in.
        opened = [(await open_own())[0] for _ in range(80)]
        answers = [type(session_codec.decode_only(await answer(stream))) for stream in opened]
        assert answers.count(m.HopOpened) <= 64
        assert answers.count(m.HopRefused) >= 16

    survive(nodes, llama, attack)


# ---- the ring --------------------------------------------------------------------------------------------------------


def step(position: int, hidden: torch.Tensor) -> bytes:
    return frame_of(ring_codec, m.Step(position, ()), [to_wire(hidden)])


NAN = torch.full((1, HIDDEN), torch.nan)
BAD_STEPS = {
    "NaN": step(0, NAN),
    "infinite": step(0, torch.full((1, HIDDEN), torch.inf)),
    "too wide": step(0, torch.zeros(1, 2 * HIDDEN)),
    "flat": step(0, torch.zeros(HIDDEN)),
    "four dimensions": step(0, torch.zeros(1, 1, 1, HIDDEN)),
    "no tokens": step(0, torch.zeros(0, HIDDEN)),
    "another dtype": step(0, torch.zeros(1, HIDDEN, dtype=torch.float16)),
    "integers": step(0, torch.zeros(1, HIDDEN, dtype=torch.int64)),
    "too many tokens": step(0, torch.zeros(300, HIDDEN)),
    "a gap": step(7, torch.zeros(1, HIDDEN)),
    "the last position there is": step(2**31 - 1, torch.zeros(1, HIDDEN)),
    "a token for a later hop": frame_of(ring_codec, m.NextToken(0, 1)),
    "two tensors": frame_of(ring_codec, m.Step(0, ()), [to_wire(torch.zeros(1, HIDDEN))] * 2),
    "no tensor": frame_of(ring_codec, m.Step(0, ())),
    "a claim of 4 GB": claiming_4_gb(m.Step(0, ())),
    "Attach again": frame_of(ring_codec, m.Attach(bytes(16), 1)),
    "garbage": b"\xff" * 32,
}


def test_the_ring(nodes: Nodes, llama: Path) -> None:
    async def attack(hostile: Hostile) -> None:
        # Someone else's session: by its name with every link number near, and by a name that nobody has.
        strangers = [
            await hostile.say(ids.RING, frame_of(ring_codec, m.Attach(session, link)), BAD_STEPS["NaN"])
            for session in (hostile.session, os.urandom(16))
            for link in range(20)
        ]
        # In a session of our own, where we are the hop before: each bad step is refused, and we are named for it.
        for why, bad in BAD_STEPS.items():
            control, session = await hostile.open_last_hop(N_BLOCKS)
            assert isinstance(session_codec.decode_only(await answer(control)), m.HopOpened)
            ring = await hostile.say(ids.RING, frame_of(ring_codec, m.Attach(session, 1)), bad)
            failed = session_codec.decode_only(await answer(control))
            assert isinstance(failed, m.HopFailed), why
            assert failed.peer == hostile.me.peer
            await ended(ring)
            await control.aclose()
        # The same good step, again and again: a replay is skipped.
        control, session = await hostile.open_last_hop(N_BLOCKS)
        good = step(0, torch.ones(4, HIDDEN))
        await hostile.say(ids.RING, frame_of(ring_codec, m.Attach(session, 1)), *[good] * 500)
        await answer(control)
        assert isinstance(session_codec.decode_only(await answer(control)), m.Sampled | m.HopFailed)
        await control.reset()
        for stream in strangers:
            stream.abandon()

    survive(nodes, llama, attack)


# ---- handing over ----------------------------------------------------------------------------------------------------


def part(block: int, position: int, *tensors: torch.Tensor) -> bytes:
    return frame_of(handover_codec, m.StatePart(block, position), [to_wire(tensor) for tensor in tensors])


KEYS_HTD = torch.ones(2, 3, 8)
BAD_PARTS = {
    "NaN": part(2, 0, torch.full((2, 3, 8), torch.nan), KEYS_HTD),
    "too many heads": part(2, 0, torch.ones(4, 3, 8), torch.ones(4, 3, 8)),
    "flat": part(2, 0, torch.ones(48), torch.ones(48)),
    "no values": part(2, 0, KEYS_HTD),
    "another dtype": part(2, 0, KEYS_HTD.half(), KEYS_HTD.half()),
    "a block of others": part(0, 0, KEYS_HTD, KEYS_HTD),
    "a block that nobody has": part(4095, 0, KEYS_HTD, KEYS_HTD),
    "a gap": part(2, 2, KEYS_HTD, KEYS_HTD),
    "beyond the end": part(2, 2**31 - 1, KEYS_HTD, KEYS_HTD),
    "nothing": part(2, 0, torch.ones(2, 0, 8), torch.ones(2, 0, 8)),
    "outputs of a last hop": part(-1, 0, torch.ones(3, HIDDEN)),
    "no tensors": frame_of(handover_codec, m.StatePart(2, 0)),
    "a claim of 4 GB": claiming_4_gb(m.StatePart(2, 0)),
    "an answer": frame_of(handover_codec, m.StateTaken(10, 3)),
    "a second beginning": frame_of(handover_codec, m.GiveState(bytes(16), 3, 100)),
    "garbage": b"\xff" * 32,
}


def test_handing_over(nodes: Nodes, llama: Path) -> None:
    async def attack(hostile: Hostile) -> None:
        async def offer(session: bytes, position: int, size_bytes: int, *parts: bytes) -> list[memoryview]:
            give = frame_of(handover_codec, m.GiveState(session, position, size_bytes))
            return await ended(await hostile.say(ids.HANDOVER, give, *parts))

        async def taken_by(session: bytes, position: int, size_bytes: int, *parts: bytes) -> bool:
            said = [handover_codec.decode_only(frame) for frame in await offer(session, position, size_bytes, *parts)]
            return any(isinstance(one, m.StateTaken) and one.position for one in said)

        # The state of a session that is not ours, of one that nobody has, and of one of ours that waits for no state.
        good = part(2, 0, KEYS_HTD, KEYS_HTD)
        assert not await taken_by(hostile.session, 3, len(good), good)
        assert not await taken_by(os.urandom(16), 3, len(good), good)
        control, session = await hostile.open_last_hop(N_BLOCKS)
        assert not await taken_by(session, 3, len(good), good)
        await control.reset()
        # Of one that waits for ours: more than fits, bad parts, parts of another size, and silence.
        for size_bytes in (2**50, 2**32, 0):
            control, session = await hostile.open_last_hop(N_BLOCKS, giver=hostile.me.peer)
            assert not await taken_by(session, 3, size_bytes, good)
            await control.reset()
        for why, bad in BAD_PARTS.items():
            control, session = await hostile.open_last_hop(N_BLOCKS, giver=hostile.me.peer)
            await answer(control)
            assert not await taken_by(session, 3, 2 * KEYS_HTD.nbytes, bad), why
            await control.reset()
        # And one that fits, so that what was refused was refused for what it is.
        control, session = await hostile.open_last_hop(N_BLOCKS, giver=hostile.me.peer)
        await answer(control)
        assert await taken_by(session, 3, 4 * KEYS_HTD.nbytes, good, part(3, 0, KEYS_HTD, KEYS_HTD))
        await control.reset()
        # In a session of ours: hand over to us, who do not take it, to the hop itself, and to nobody.
        for taker in (hostile.me, hostile.node, m.PeerAddress(Identity.generate().peer_id, ("/ip4/127.0.0.1/tcp/1",))):
            control, _ = await hostile.open_last_hop(N_BLOCKS)
            await answer(control)
            for _ in range(20):
                with suppress(PeerError):
                    await control.send(frame_of(session_codec, m.HandOver(taker)))
            with trio.move_on_after(0.3):
                await ended(control)
            await control.reset()

    survive(nodes, llama, attack)


# ---- reachability ----------------------------------------------------------------------------------------------------


def test_reachability(nodes: Nodes, llama: Path) -> None:
    """It dials whoever asks, on the host that they come from; and neither others nor without end."""

    async def attack(hostile: Hostile) -> None:
        dialled: list[str] = []

        async def trap(stream: trio.SocketStream) -> None:
            dialled.append("by the node")
            await trio.sleep_forever()

        async with trio.open_nursery() as nursery:
            [listener] = await trio.open_tcp_listeners(0, host="127.0.0.2")
            nursery.start_soon(trio.serve_listeners, trap, [listener])
            elsewhere = f"/ip4/127.0.0.2/tcp/{listener.socket.getsockname()[1]}"
            asks = (
                m.DialMe((elsewhere,) * 8),
                m.DialMe(("/ip4/10.255.255.1/tcp/9", "/dns4/localhost/tcp/9", "/ip6/::1/tcp/9")),
                m.DialMe(("/", "//", "garbage", "/ip4/127.0.0.1/tcp/99999999")),
                m.DialMe(()),
                m.Dialled((), "", 0.0),
            )
            for ask in asks:
                for frame in await ended(await hostile.say(ids.REACH, frame_of(reach_codec, ask))):
                    told = reach_codec.decode_only(frame)
                    assert isinstance(told, m.Dialled)
                    assert all(result.failure for result in told.results)
            # Over and over: it answers some.
            for _ in range(30):
                ask = frame_of(reach_codec, m.DialMe(("/ip4/127.0.0.1/tcp/1",)))
                stream = await hostile.say(ids.REACH, ask, ask)
                await stream.reset()
            assert not dialled
            nursery.cancel_scope.cancel()

    survive(nodes, llama, attack)


# ---- files -----------------------------------------------------------------------------------------------------------


def test_files(nodes: Nodes, llama: Path) -> None:
    async def attack(hostile: Hostile) -> None:
        swarm = hostile.swarm
        questions = [
            m.GetManifest(os.urandom(32)),
            m.GetFile(swarm, os.urandom(32), 0, MIB),
            m.GetFile(swarm, bytes(32), 2**50, MIB),
        ]
        stream = await hostile.say(ids.FILES, *(frame_of(file_codec, question) for question in questions))
        for _ in questions:
            assert isinstance(file_codec.decode_only(await answer(stream)), m.NotHere)
        await stream.send(frame_of(file_codec, m.FileChunk(b"an answer")))
        await ended(stream)
        # Everything that there is, by many streams that read nothing.
        asking = frame_of(file_codec, m.GetManifest(swarm))
        streams = [await hostile.open(ids.FILES) for _ in range(16)]
        with trio.move_on_after(1.0):
            async with trio.open_nursery() as nursery:
                for stream in streams:
                    nursery.start_soon(ask_for_ever, stream, asking)

    survive(nodes, llama, attack)


async def ask_for_ever(stream, frame: bytes) -> None:
    try:
        while True:
            await stream.send(frame)
    except PeerError:
        return


def test_protocols_that_nobody_speaks(nodes: Nodes, llama: Path) -> None:
    async def attack(hostile: Hostile) -> None:
        for protocol in ("/mycel/session/99", "/ipfs/kad/1.0.0", "/x" * 500):
            with pytest.raises(PeerRefused):
                await hostile.open(protocol)

    survive(nodes, llama, attack)
