"""Hostile peers on the protocols of training, over real connections: the run goes on, its nodes stay small."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import msgspec
import psutil
import pytest
import torch
import trio

from mycel.node.libp2p_transport.stream import FrameStream
from mycel.protocols import ids
from mycel.protocols import training as t
from mycel.protocols.codec import pipe_codec, reduce_codec, state_codec, train_codec
from mycel.protocols.errors import PeerError
from mycel.protocols.messages import PeerAddress
from mycel.protocols.tensors import to_wire
from mycel.protocols.wire import MAX_ELEMENTS
from tests.loopback.generating import bounded
from tests.loopback.hostile import FRAME_OF_4_GB, MIB, Attack, Hostile, ended, frame_of, stranger
from tests.loopback.node_process import Nodes, look_again
from tests.loopback.test_training import RECIPE

pytestmark = [pytest.mark.loopback, pytest.mark.slow]

PROTOCOLS = (ids.TRAIN, ids.PIPE, ids.REDUCE, ids.STATE)
LIMIT_S = 30.0
ROOM_BYTES = 96 * MIB
# The heads of tensors that nobody has: absurd sizes, a name that is none, too many dimensions.
HEADS = (
    ("float32", (MAX_ELEMENTS,), "raw"),
    ("int32", (MAX_ELEMENTS, MAX_ELEMENTS), "raw"),
    ("float99", (2,), "raw"),
    ("int64", (1, 1, 1, 1, 1), "raw"),
    ("int8", (2,), "gzip"),
)
GARBAGE = (b"\x00", b"\xff" * 64, b"\xff\xff\xff\x7f" + bytes(6), b"\x40\x00\x00\x00" + b"\x91" * 64)


@pytest.fixture(scope="module")
def nodes(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nodes]:
    """A run without an end, of one peer in each stage."""
    root = tmp_path_factory.mktemp("nodes")
    recipe = root / "tiny.toml"
    recipe.write_text(RECIPE.format(model=llama).replace("steps = 90", "steps = 1000000"), "utf-8")
    with Nodes(root, llama) as started:
        first = started.start_one(model=None, recipe=recipe)
        own, n_blocks = (first.serving.start, first.serving.end), first.serving.n_blocks
        cut = own[1] if own[0] == 0 else own[0]
        started.start(*[span for span in ((0, cut), (cut, n_blocks)) if span != own], model=None)
        until(started, 2)
        yield started


def version(nodes: Nodes) -> int:
    return min(max((e["version"] for e in node.events("step.done")), default=0) for node in nodes.nodes)


def until(nodes: Nodes, wanted: int) -> None:
    began = time.monotonic()
    while version(nodes) < wanted:
        assert time.monotonic() - began < LIMIT_S, [node.log()[-3000:] for node in nodes.nodes]
        look_again()


def survive(nodes: Nodes, attack: Attack) -> None:
    """Attack each node in turn: it makes steps afterwards as before, nothing crashed, and it has not grown."""
    for victim in nodes.nodes:
        watched = psutil.Process(victim.process.pid)
        before_bytes = watched.memory_info().rss
        run = victim.serving.invite.swarm

        async def main(victim=victim, run=run) -> None:
            async with stranger(victim) as transport:
                await attack(Hostile(transport, victim, run, b""))

        bounded(main)
        until(nodes, version(nodes) + 3)
        assert victim.alive
        assert [crash["reason"] for crash in victim.events("handler.crashed")] == []
        grown_bytes = watched.memory_info().rss - before_bytes
        assert grown_bytes < ROOM_BYTES, f"the node grew by {grown_bytes / MIB:.0f} MiB"


async def all_end(hostile: Hostile, protocol: str, frames: list[bytes]) -> None:
    """Each on a stream of its own, which the node ends."""
    for frame in frames:
        await ended(await hostile.say(protocol, frame))


def headed(message: object, head: object) -> bytes:
    """A frame whose tensor is not what its head says."""
    header = msgspec.msgpack.encode((message, (head,)))
    lead = 4 + len(header)
    return len(header).to_bytes(4, "little") + header + bytes(-lead % 16) + bytes(64)


def test_garbage_half_frames_and_false_lengths(nodes: Nodes) -> None:
    async def attack(hostile: Hostile) -> None:
        for protocol in PROTOCOLS:
            await all_end(hostile, protocol, list(GARBAGE))
            await ended(await hostile.say_raw(protocol, FRAME_OF_4_GB + b"x"))
            for _ in range(5):
                half = await hostile.say_raw(protocol, b"\x00\x10\x00\x00half a frame")
                await half.reset()
        drive = t.Drive(hostile.swarm)
        for head in HEADS:
            await all_end(hostile, ids.PIPE, [headed(drive, head)])
            await all_end(hostile, ids.REDUCE, [headed(t.NotNow("x"), head)])

    survive(nodes, attack)


def status(run: bytes, **fields: object) -> bytes:
    given: dict[str, object] = {"run": run, "seq": 1, "stage": 0, "state": "joining", "version": 0, **fields}
    return frame_of(train_codec, t.StageStatus(**given))  # type: ignore[arg-type]


def test_statuses_that_no_run_has(nodes: Nodes) -> None:
    async def attack(hostile: Hostile) -> None:
        run = hostile.swarm
        reduced = t.Reduced(1, bytes(32), float("nan"), float("inf"))
        wrong = [
            status(bytes(32)),
            status(run, stage=63),
            status(run, moving_to=63),
            status(run, version=2**31 - 1),
            status(run, kept=2**31 - 1),
            status(run, whole=2**31 - 1),
            status(run, counted=b"\xff" * 1024),
            status(run, params=b"short"),
            status(run, reduced=(reduced,)),
            status(run, queue_s=float("nan")),
            status(run, sequences_per_s=float("inf")),
            status(run, queue_s=-1.0),
            status(run, state="king"),
            status(run, addresses=("/ip4/1.2.3.4/tcp/1",) * 9),
        ]
        await all_end(hostile, ids.TRAIN, wrong)
        # Well formed: addresses that are none, and more of them than anybody reads.
        odd = ("/ip4/300.1.1.1/tcp/99999", "\x1b[31m/x", "/unix/../../etc", "//////", "x" * 256)
        flood = await hostile.open(ids.TRAIN)
        with suppress(PeerError), trio.move_on_after(2):
            for seq in range(2, 20_000):
                await flood.send(status(run, seq=seq, addresses=odd, sequences_per_s=1e9, queue_s=1e9))
        await flood.reset()

    survive(nodes, attack)


def test_work_that_is_not_the_senders_to_give(nodes: Nodes) -> None:
    async def attack(hostile: Hostile) -> None:
        run, me, node = hostile.swarm, hostile.me, hostile.node
        ways = (t.Way(node), t.Way(PeerAddress("somebody else")))
        tokens = to_wire(torch.full((2, 17), 2**31 - 1, dtype=torch.int32))
        drive = frame_of(pipe_codec, t.Drive(run))

        def forward(**fields: object) -> bytes:
            given: dict[str, object] = {
                "run": run,
                "work": bytes(32),
                "version": 1,
                "number": 0,
                "turn": 1,
                "stage": 0,
                "trainer": me.peer,
                "ways": ways,
                **fields,
            }
            return frame_of(pipe_codec, t.Forward(**given), (tokens,))  # type: ignore[arg-type]

        for wrong in (
            forward(),
            forward(number=8191),
            forward(version=2**31 - 1),
            forward(stage=63),
            forward(run=bytes(32)),
            forward(trainer=node.peer),
            forward(ways=(t.Way(node),) * 64),
        ):
            await all_end(hostile, ids.PIPE, [wrong])
            await ended(await hostile.say(ids.PIPE, drive, wrong))
        await all_end(hostile, ids.PIPE, [frame_of(pipe_codec, t.Backward(bytes(32), bytes(32), 1, 0))])
        await all_end(hostile, ids.PIPE, [frame_of(pipe_codec, t.Passed(bytes(32), 1, 0, True))])
        idle: list[FrameStream] = []
        for _ in range(50):
            with suppress(PeerError):
                idle.append(await hostile.say(ids.PIPE, drive))
        for stream in idle:
            stream.abandon()

    survive(nodes, attack)


def test_sums_and_states_are_asked_for_and_never_read(nodes: Nodes) -> None:
    async def attack(hostile: Hostile) -> None:
        run = hostile.swarm
        await all_end(
            hostile,
            ids.REDUCE,
            [frame_of(reduce_codec, t.GetSum(run, stage, 1, 2**40, 1 << 22, tied=True)) for stage in (0, 1)],
        )
        streams: list[FrameStream] = []
        for _ in range(40):
            for stage in (0, 1):
                asked = frame_of(reduce_codec, t.GetSum(run, stage, version(nodes), 0, 1000, tied=False))
                pinned = frame_of(state_codec, t.PinState(run, stage, version(nodes)))
                chunk = frame_of(state_codec, t.GetStateChunk(run, stage, version(nodes), 0))
                with suppress(PeerError):
                    streams.append(await hostile.say(ids.REDUCE, *(asked,) * 50))
                with suppress(PeerError):
                    streams.append(await hostile.say(ids.STATE, pinned, *(chunk,) * 50))
        await trio.sleep(1)
        for stream in streams:
            stream.abandon()

    survive(nodes, attack)
