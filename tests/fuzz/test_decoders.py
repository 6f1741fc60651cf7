"""Every decoder of peers' bytes against changed samples: only our own errors leave it, and it stays quick and small.

A failure prints the seed and the case; `FUZZ_SEED` runs the same search again.
"""

from __future__ import annotations

import os
import time
import tracemalloc
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from random import Random

import msgspec
import pytest

from mycel.dht.records import Announcement, decode_announcement, encode_announcement
from mycel.node.text import TextCodec
from mycel.protocols import messages as m
from mycel.protocols import training as t
from mycel.protocols.codec import (
    Codec,
    file_codec,
    handover_codec,
    pipe_codec,
    reach_codec,
    record_codec,
    reduce_codec,
    ring_codec,
    session_codec,
    state_codec,
    train_codec,
)
from mycel.protocols.errors import MycelError
from mycel.protocols.hop import HopMachine
from mycel.protocols.messages import OpenHop
from mycel.protocols.tensors import from_wire, to_wire
from mycel.security.envelope import check_record, sign_record
from mycel.security.identity import Identity
from mycel.security.signatures import public_key_of, verify
from mycel.swarm.invite import make_invite, parse_invite
from mycel.swarm.manifest import (
    DTYPES,
    FileSpec,
    Manifest,
    TensorSpec,
    UnitSpec,
    decode_manifest,
    manifest_bytes,
    sign_manifest,
)
from tests.fuzz.mutations import mutated

NOW = 1_750_000_000.0
MIN_CASES = 2_000
SLOWEST_S = 0.25  # of processor time, for samples of a few kilobytes: a hundred times what they take
BASE_BYTES = 200_000
BYTES_PER_BYTE = 64
MEASURED_SHARE = 20  # tracemalloc makes everything ten times slower: one case in so many

IDENTITY = Identity.from_seed(bytes(32))
PEER = m.PeerAddress(IDENTITY.peer_id, ("/ip4/127.0.0.1/tcp/4001", "/ip6/::1/tcp/4001"))
RECORD = sign_record(IDENTITY, bytes(32), 7, NOW + 20, b"value" * 20)
GENERATION = m.Generation(m.SamplingParams(0.7, 40, 0.9, 0.05, 1.1, 5), tuple(range(40)), 60, (2, 3))


@dataclass(frozen=True)
class Target:
    """What is called with the bytes, and samples that it accepts."""

    decode: Callable[[bytes], object]
    samples: list[bytes]


def frames(codec: Codec, *messages: m.Message) -> list[bytes]:
    return [b"".join(codec.encode(message)) for message in messages]


def frame_target(codec: Codec, samples: list[bytes]) -> Target:
    def decode(data: bytes) -> object:
        message, tensors = codec.decode(bytearray(data))
        # As a hop goes on with what it got.
        if isinstance(message, OpenHop):
            HopMachine(message, 8)
        return message, [from_wire(tensor).shape for tensor in tensors]

    return Target(decode, samples)


def step_samples() -> list[bytes]:
    import torch

    samples = []
    for dtype in (torch.float32, torch.bfloat16, torch.int8):
        tensor = to_wire(torch.arange(24).view(3, 8).to(dtype))
        step = m.Step(3, (m.HopTiming(1, 2),) * 3)
        samples += [b"".join(ring_codec.encode(step, [tensor] * n)) for n in (1, 2)]
    return samples


def manifest_sample() -> bytes:
    units = []
    for name in ("embed", "block.0", "block.1", "head"):
        tensor = TensorSpec(f"model.{name}.weight", "float32", (4, 4))
        units.append(UnitSpec(name, (tensor,), 16 * DTYPES["float32"][1], bytes(32)))
    files = (FileSpec("config.json", 10, bytes(32)), FileSpec("tokenizer.json", 10, bytes(32)))
    return manifest_bytes(
        sign_manifest(
            Manifest(
                2,
                "Tiny",
                "",
                "org/tiny@main",
                "llama",
                2,
                4,
                32,
                "float32",
                64,
                (2,),
                files,
                bytes(32),
                tuple(units),
                b"",
            ),
            Identity.from_seed(bytes(32)),
        )
    )


def check_signed(data: bytes) -> object:
    """Anything that decodes as a record, through the checks that a holder makes."""
    message = record_codec.decode_only(data)
    records = [message.record] if isinstance(message, m.StoreRecord) else getattr(message, "records", ())
    for record in records:
        check_record(record, NOW, 30.0)
        assert (record.writer, record.value, record.seq) == (RECORD.writer, RECORD.value, RECORD.seq), (
            "a forgery passed"
        )
    return records


def check_invite(data: bytes) -> object:
    invite = parse_invite(data.decode("utf-8", "surrogateescape"), NOW)
    assert invite.issuer == IDENTITY.peer_id, "a forgery passed"
    return invite


def state_samples() -> list[bytes]:
    """Keys and values of a block, and a piece of the output log."""
    import torch

    keys_HTD, outputs_TD = torch.zeros(2, 3, 4), torch.ones(3, 8)
    parts = [(m.StatePart(5, 0), [keys_HTD, keys_HTD]), (m.StatePart(-1, 0), [outputs_TD])]
    return [b"".join(handover_codec.encode(part, [to_wire(t) for t in tensors])) for part, tensors in parts]


def training_targets() -> Mapping[str, Target]:
    """Frames of a run: how far all are, microbatches with their borders, sums, states."""
    import torch

    key, peer = bytes(range(32)), IDENTITY.peer_id
    reduced = t.Reduced(3, key, 0.5, 7.25)
    status = t.StageStatus(
        key, 9, 1, "training", 3, key, b"\xff\x03", (reduced, reduced), True, 0.5, 20.0, 2, 2, 10**9, -1, PEER.addresses
    )
    ways = (t.Way(PEER), t.Way(PEER, True), t.Way(PEER, True, True))
    forward = t.Forward(key, key, 3, 5, 2, 1, peer, ways)
    tokens = to_wire(torch.arange(8, dtype=torch.int32).view(2, 4))
    border = [to_wire(torch.zeros(2, 3, 8, dtype=torch.int8)), to_wire(torch.ones(2, 3, 1))]
    pipe = [
        *frames(
            pipe_codec,
            t.Drive(key),
            t.Passed(key, 2, 1, True, 100, 2000),
            t.WorkFailed(key, 2, 1, peer, "connection lost"),
        ),
        b"".join(pipe_codec.encode(forward, [tokens, *border])),
        b"".join(pipe_codec.encode(t.Backward(key, key, 2, 1), border)),
    ]
    reduce = [
        *frames(
            reduce_codec,
            t.GetPartial(key, 1, 3, b"\xff\x03", 0, 1 << 20),
            t.GetSum(key, 1, 3, 0, 1 << 20, True),
            t.NotNow("not reduced yet"),
        ),
        *(
            b"".join(reduce_codec.encode(t.Slice(0, 1.5, 1.0), [to_wire(torch.ones(9, dtype=dtype))]))
            for dtype in (torch.int64, torch.float32)
        ),
    ]
    state = frames(
        state_codec,
        t.PinState(key, 1, 3),
        t.StateOffer(3, 1 << 20, key, key * 2),
        t.GetStateChunk(key, 1, 3, 7),
        t.StateChunk(bytes(100)),
        t.NotNow("nothing is held"),
    )
    return {
        "train frames": frame_target(train_codec, frames(train_codec, status)),
        "pipe frames": frame_target(pipe_codec, pipe),
        "reduce frames": frame_target(reduce_codec, reduce),
        "state frames": frame_target(state_codec, state),
    }


def targets() -> Mapping[str, Target]:
    session_samples = frames(
        session_codec,
        OpenHop(bytes(16), bytes(32), 0, 4, 100, PEER, PEER, tuple(range(40))),
        OpenHop(bytes(16), bytes(32), 4, 8, 100, PEER, PEER, (), GENERATION),
        m.HopOpened(),
        m.HopRefused("KV memory is full"),
        m.Relink(PEER, PEER, 3, 4),
        OpenHop(bytes(16), bytes(32), 0, 4, 100, PEER, PEER, tuple(range(40)), None, 3, 3, PEER.peer),
        m.Relink(PEER, PEER, 3, 4, PEER, 5),
        m.AskProgress(40),
        m.Progress(40, 39, 1_000_000),
        m.Leaving(30.0),
        m.HandOver(PEER),
        m.HandedOver(40, "replaying is quicker"),
        m.Sampled(41, 7, (m.HopTiming(100, 2000),) * 4, "stop"),
        m.HopFailed(PEER.peer, "connection lost"),
    )
    record_samples = frames(
        record_codec,
        m.FindRecords(PEER, bytes(32)),
        m.Found((RECORD, RECORD), (PEER,) * 3),
        m.StoreRecord(PEER, RECORD),
    )
    file_samples = frames(
        file_codec,
        m.GetManifest(bytes(32)),
        m.ManifestBytes(bytes(100)),
        m.GetFile(bytes(32), bytes(32), 0, 1000),
        m.FileChunk(bytes(100)),
        m.NotHere("no such file"),
    )
    handover_samples = [
        *frames(
            handover_codec,
            m.GiveState(bytes(16), 1000, 2**40),
            m.StateTaken(70_000, 1000),
            m.StateRefused("replaying is quicker"),
        ),
        *state_samples(),
    ]
    reach_samples = frames(
        reach_codec,
        m.DialMe(PEER.addresses),
        m.Dialled((m.DialResult("/ip4/127.0.0.1/tcp/4001", "refused"),), "/ip4/127.0.0.1/tcp/9", NOW),
    )
    announcement = Announcement(
        bytes(32), 0, 4, addresses=PEER.addresses, block_time_s=0.01, rtts=((IDENTITY.peer_id, 0.02),), version="1.0"
    )
    invite = make_invite(IDENTITY, bytes(32), "Tiny", [PEER], now=NOW - 60, lifetime_s=3600)
    return {
        "session frames": frame_target(session_codec, session_samples),
        "ring frames": frame_target(
            ring_codec, [*step_samples(), *frames(ring_codec, m.Attach(bytes(16), 2), m.Attached(9), m.NextToken(1, 2))]
        ),
        "handover frames": frame_target(handover_codec, handover_samples),
        "reach frames": frame_target(reach_codec, reach_samples),
        **training_targets(),
        "record frames": frame_target(record_codec, record_samples),
        "file frames": frame_target(file_codec, file_samples),
        "signed records": Target(check_signed, record_samples[1:]),
        "manifests": Target(decode_manifest, [manifest_sample()]),
        "announcements": Target(decode_announcement, [encode_announcement(announcement)]),
        "invites": Target(check_invite, [invite.text.encode(), f"mycel join {invite.text}\n".encode()]),
        "peer ids": Target(
            lambda data: (public_key_of(data.decode("latin-1")), verify(data.decode("latin-1"), bytes(64), b"x")),
            [IDENTITY.peer_id.encode()],
        ),
    }


TARGETS = targets()


@pytest.mark.parametrize("name", sorted(TARGETS))
def test_samples_are_accepted(name: str) -> None:
    for sample in TARGETS[name].samples:
        TARGETS[name].decode(sample)


@pytest.mark.parametrize("name", sorted(TARGETS))
def test_changed_samples_are_a_value_or_our_error(name: str, fuzz_seconds: float) -> None:
    target = TARGETS[name]
    seed = int(os.environ.get("FUZZ_SEED") or Random().randrange(2**32))
    rng = Random(f"{name} {seed}")
    pool = [sample for one in TARGETS.values() for sample in one.samples]
    ends = time.monotonic() + fuzz_seconds / len(TARGETS)
    for number in count():
        if number >= MIN_CASES and time.monotonic() >= ends:
            break
        case = mutated(rng.choice(target.samples), pool, rng)
        where = f"FUZZ_SEED={seed}, target {name!r}, case {number}: {case.hex()}"
        run_case(target.decode, case, where, measured=number % MEASURED_SHARE == 0)
    assert number >= MIN_CASES


def run_case(decode: Callable[[bytes], object], case: bytes, where: str, *, measured: bool) -> None:
    """Fails for anything but a value or our error, and for what is slow or large."""
    if measured:
        tracemalloc.start()
    began = time.thread_time()
    refusal = ""
    try:
        decode(case)
    except MycelError as error:
        refusal = str(error)
    except Exception as error:
        raise AssertionError(f"{type(error).__name__} left the decoder: {where}") from error
    finally:
        took_s = time.thread_time() - began
        peak_bytes = tracemalloc.get_traced_memory()[1] if measured else 0
        tracemalloc.stop()
    assert len(refusal) < 1000, where
    assert refusal.isprintable(), where
    assert took_s < SLOWEST_S, f"{took_s:.2f} s: {where}"
    assert peak_bytes < BASE_BYTES + BYTES_PER_BYTE * len(case), f"{peak_bytes} bytes: {where}"


def test_the_search_finds_what_it_looks_for() -> None:
    """Three decoders with a fault each: a foreign error deep inside, much memory, much time."""

    def foreign(data: bytes) -> object:
        return {}[data]

    def large(data: bytes) -> object:
        return bytes(10_000_000 + len(data))

    def slow(data: bytes) -> object:
        return sum(range(30_000_000)) + len(data)

    for decode, reason in ((foreign, "KeyError"), (large, "bytes: here"), (slow, "s: here")):
        with pytest.raises(AssertionError, match=reason):
            run_case(decode, b"abc", "here", measured=decode is large)


def test_the_same_seed_makes_the_same_cases() -> None:
    samples = TARGETS["session frames"].samples
    first, second = ([mutated(samples[0], samples, rng) for _ in range(500)] for rng in (Random(5), Random(5)))
    assert first == second
    assert len(set(first)) > 450
    assert samples[0] not in first[:1]


def test_a_damaged_tokenizer_file_is_refused_in_one_line(tmp_path: Path, fuzz_seconds: float) -> None:
    """Files come from peers too. The library is large and slow, so there are fewer cases."""
    sample = msgspec.json.encode(
        {
            "version": "1.0",
            "model": {"type": "BPE", "vocab": {"a": 0, "b": 1, "ab": 2}, "merges": [["a", "b"]]},
            "added_tokens": [],
            "normalizer": None,
            "pre_tokenizer": None,
            "post_processor": None,
            "decoder": None,
            "truncation": None,
            "padding": None,
        }
    )
    path = tmp_path / "tokenizer.json"
    path.write_bytes(sample)
    assert TextCodec.load(tmp_path, 3).encode("ab") == [2]
    seed = int(os.environ.get("FUZZ_SEED") or Random().randrange(2**32))
    rng = Random(seed)

    def load(data: bytes) -> object:
        path.write_bytes(data)
        return TextCodec.load(tmp_path, 3).encode("abba")

    ends = time.monotonic() + fuzz_seconds / len(TARGETS)
    for number in count():
        if number >= 300 and time.monotonic() >= ends:
            break
        case = mutated(sample, [sample], rng)
        run_case(load, case, f"FUZZ_SEED={seed}, case {number}: {case!r}", measured=False)
    assert number >= 300
