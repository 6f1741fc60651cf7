"""Frames: every message survives the way there and back; nothing else becomes a message, takes long or needs much."""

from __future__ import annotations

import struct
import time
import tracemalloc
from collections.abc import Iterator

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mycel.protocols import messages as m
from mycel.protocols import training as t
from mycel.protocols.codec import (
    MAX_HEADER_BYTES,
    MAX_TENSORS,
    Codec,
    file_codec,
    pipe_codec,
    record_codec,
    reduce_codec,
    ring_codec,
    session_codec,
    state_codec,
    train_codec,
)
from mycel.protocols.errors import LocalProtocolError, RemoteProtocolError
from mycel.protocols.wire import ALIGNMENT_BYTES, MAX_ELEMENTS, TensorHeader, WireTensor, padded
from tests.protocols.strategies import BY_TYPE, PROTOCOLS, said, wire_tensors

CODECS = [codec for codec, _ in PROTOCOLS]
STEP = m.Step(3, (m.HopTiming(1, 2),))


def frame_of(codec: Codec, message: m.Message, tensors: list[WireTensor] | None = None) -> bytearray:
    return bytearray().join(codec.encode(message, tensors or []))


def headed(header: bytes, payload: bytes = b"") -> bytes:
    """A frame of a header that no encoder of ours would make."""
    return len(header).to_bytes(4, "little") + header + payload


def with_tensor(dtype: object, shape: object, codec: object = "raw", payload: bytes = b"") -> bytes:
    """A step whose tensor header says anything."""
    header = msgspec.msgpack.encode((STEP, [[dtype, shape, codec]]))
    lead = bytes(padded(4 + len(header)) - 4 - len(header))
    return headed(header, lead + payload)


# ---- there and back


def test_there_is_a_strategy_for_every_message() -> None:
    assert set(BY_TYPE) == {kind for _, kinds in PROTOCOLS for kind in kinds}


@settings(max_examples=400)
@given(said, st.lists(wire_tensors(), max_size=MAX_TENSORS))
def test_what_is_encoded_is_decoded(one: tuple[Codec, m.Message], tensors: list[WireTensor]) -> None:
    codec, message = one
    got, got_tensors = codec.decode(frame_of(codec, message, tensors))
    assert got == message
    assert type(got) is type(message)
    assert [tensor.header for tensor in got_tensors] == [tensor.header for tensor in tensors]
    assert [bytes(tensor.data) for tensor in got_tensors] == [bytes(tensor.data) for tensor in tensors]


@given(said)
def test_a_message_belongs_to_one_protocol(one: tuple[Codec, m.Message]) -> None:
    """But for `NotNow`, which answers the questions of two."""
    codec, message = one
    for other, kinds in PROTOCOLS:
        if type(message) not in kinds:
            with pytest.raises(RemoteProtocolError):
                other.decode(frame_of(codec, message))
    assert sum(type(message) in kinds for _, kinds in PROTOCOLS) == (2 if isinstance(message, t.NotNow) else 1)


@given(st.lists(wire_tensors(), min_size=1, max_size=3))
def test_tensors_start_aligned(tensors: list[WireTensor]) -> None:
    frame = frame_of(ring_codec, STEP, tensors)
    for got in ring_codec.decode(frame)[1]:
        if len(got.data):
            before = bytes(frame)
            got.data[0] ^= 0xFF  # the view shows where it lies
            at = next(index for index, byte in enumerate(frame) if byte != before[index])
            assert at % ALIGNMENT_BYTES == 0
    assert len(frame) % ALIGNMENT_BYTES == 0


def test_a_received_tensor_is_a_view_of_the_frame() -> None:
    frame = frame_of(ring_codec, STEP, [WireTensor(TensorHeader("uint8", (4,)), memoryview(b"abcd"))])
    (tensor,) = ring_codec.decode(frame)[1]
    at = bytes(frame).index(b"abcd")
    assert at % ALIGNMENT_BYTES == 0
    frame[at] = ord("z")
    assert bytes(tensor.data) == b"zbcd"


def test_a_sent_tensor_is_not_copied() -> None:
    data = bytearray(b"abcd" * 4)
    parts = ring_codec.encode(STEP, [WireTensor(TensorHeader("uint8", (16,)), memoryview(data))])
    data[0] = ord("z")
    assert b"zbcd" in b"".join(parts)


def test_decode_only_refuses_tensors() -> None:
    tensor = WireTensor(TensorHeader("uint8", (1,)), memoryview(b"a"))
    with pytest.raises(RemoteProtocolError, match="carries no tensors"):
        ring_codec.decode_only(frame_of(ring_codec, STEP, [tensor]))
    assert ring_codec.decode_only(frame_of(ring_codec, STEP)) == STEP


def test_we_send_nothing_over_the_limits() -> None:
    tensor = WireTensor(TensorHeader("uint8", (0,)), memoryview(b""))
    with pytest.raises(LocalProtocolError):
        ring_codec.encode(STEP, [tensor] * (MAX_TENSORS + 1))
    with pytest.raises(LocalProtocolError):
        file_codec.encode(m.ManifestBytes(bytes(MAX_HEADER_BYTES)))


# ---- anything else


@settings(max_examples=400)
@given(st.sampled_from(CODECS), st.binary(max_size=200))
def test_any_bytes_are_a_message_or_refused(codec: Codec, data: bytes) -> None:
    for frame in (data, headed(data)):
        try:
            message, _ = codec.decode(frame)
        except RemoteProtocolError:
            continue
        assert isinstance(message, m.Message)


@settings(max_examples=400)
@given(said, st.lists(wire_tensors(), max_size=2), st.data())
def test_a_changed_frame_is_a_message_or_refused(
    one: tuple[Codec, m.Message], tensors: list[WireTensor], data: st.DataObject
) -> None:
    codec, message = one
    frame = frame_of(codec, message, tensors)
    for _ in range(data.draw(st.integers(1, 4))):
        frame[data.draw(st.integers(0, len(frame) - 1))] = data.draw(st.integers(0, 255))
    try:
        got, _ = codec.decode(frame)
    except RemoteProtocolError:
        return
    assert codec.decode(frame_of(codec, got))[0] == got, "whatever is accepted can be said again"


@given(said, st.lists(wire_tensors(), max_size=2), st.data())
def test_a_frame_that_is_cut_or_longer_is_refused(
    one: tuple[Codec, m.Message], tensors: list[WireTensor], data: st.DataObject
) -> None:
    codec, message = one
    frame = bytes(frame_of(codec, message, tensors))
    with pytest.raises(RemoteProtocolError):
        codec.decode(frame[: data.draw(st.integers(0, len(frame) - 1))])
    with pytest.raises(RemoteProtocolError):
        codec.decode(frame + data.draw(st.binary(min_size=1, max_size=40)))


@pytest.mark.parametrize(
    ("dtype", "shape", "codec", "reason"),
    [
        ("float31", [1], "raw", "unknown dtype"),
        ("float32", [1], "zip", "unknown tensor codec"),
        ("float32", [MAX_ELEMENTS, 2], "raw", "over the limit"),
        ("float32", [MAX_ELEMENTS] * 4, "raw", "over the limit"),  # 2**120 elements: no 64-bit product wraps round
        ("float32", [2**32, 2**32], "raw", "refused"),
        ("float32", [2**63 + 1, 2], "raw", "refused"),
        ("float32", [-1, -1], "raw", "refused"),
        ("float32", [1] * 5, "raw", "refused"),
        ("float32", [MAX_ELEMENTS], "raw", "in a frame of"),
        ("uint8", [17], "raw", "in a frame of"),
        ("uint8", [0], "raw", "too many"),
        (7, [1], "raw", "refused"),
        ("float32", [1.0], "raw", "refused"),
    ],
)
def test_a_tensor_header_that_lies_is_refused(dtype: object, shape: object, codec: object, reason: str) -> None:
    with pytest.raises(RemoteProtocolError, match=reason):
        ring_codec.decode(with_tensor(dtype, shape, codec, bytes(16)))


def test_two_tensors_do_not_share_bytes() -> None:
    header = msgspec.msgpack.encode((STEP, [["uint8", [16], "raw"], ["uint8", [16], "raw"]]))
    frame = headed(header, bytes(padded(4 + len(header)) - 4 - len(header) + 16))
    with pytest.raises(RemoteProtocolError, match="in a frame of"):
        ring_codec.decode(frame)


def test_a_tiny_temperature_is_refused_because_logits_would_overflow() -> None:
    m.SamplingParams(temperature=m.MIN_TEMPERATURE)
    with pytest.raises(ValueError, match="greedy"):
        m.SamplingParams(temperature=1e-300)
    generation = [[1e-300], [1], 5]
    opening = ["OpenHop", bytes(16), bytes(32), 0, 1, 9, ["p"], ["p"], [1], generation]
    with pytest.raises(RemoteProtocolError, match="temperature"):
        session_codec.decode(headed(msgspec.msgpack.encode((opening, []))))
    generation[0] = [float("nan")]
    with pytest.raises(RemoteProtocolError):
        session_codec.decode(headed(msgspec.msgpack.encode((opening, []))))


# ---- bombs: a few bytes must not cost many, nor much time


def nested(depth: int) -> bytes:
    return b"\x91" * depth


def bombs() -> Iterator[tuple[str, Codec, bytes]]:
    opened = b"\xa9HopOpened"
    sampled = b"\xa7Sampled\x01\x01"
    opening = msgspec.msgpack.encode(["OpenHop", bytes(16), bytes(32), 0, 1, 9, ["p"], ["p"]])[1:]
    huge = struct.pack(">I", 2**32 - 1)
    yield "array of 4G at the root", session_codec, headed(b"\xdd" + huge)
    yield "array of 4G timings", session_codec, headed(b"\x92\x95" + sampled + b"\xdd" + huge)
    yield "array of 4G tensors", session_codec, headed(b"\x92\x91" + opened + b"\xdd" + huge)
    yield "text of 4G", session_codec, headed(b"\x92\x92\xaaHopRefused\xdb" + huge)
    yield "binary of 4G", file_codec, headed(b"\x92\x92\xa9FileChunk\xc6" + huge)
    yield "array of 4G tokens", session_codec, headed(b"\x92\x99" + opening + b"\xdd" + huge)
    yield "map of 4G", session_codec, headed(b"\xdf" + huge)
    yield (
        "more tokens than allowed",
        session_codec,
        headed(b"\x92\x99" + opening + b"\xdd" + struct.pack(">I", 4_000_000) + bytes(4_000_000) + b"\x90"),
    )
    yield "deep arrays", session_codec, headed(nested(1_000_000))
    yield "deep arrays as a field", session_codec, headed(b"\x92\x99" + opening + nested(1_000_000))
    # Peers have no field after their addresses; what a newer version may add is skipped, which must not recurse.
    deep_peer = b"\x92\x95\xa6Relink\x93\xa1p\x90" + nested(1_000_000)
    yield "deep arrays in a field to skip", session_codec, headed(deep_peer)
    yield (
        "deep maps in a field to skip",
        session_codec,
        headed(b"\x92\x95\xa6Relink\x93\xa1p\x90" + b"\x81\xa1k" * 300_000),
    )
    yield "many records", record_codec, headed(b"\x92\x93\xa5Found\xdd" + struct.pack(">I", 500_000) + nested(500_000))
    status = msgspec.msgpack.encode(["StageStatus", bytes(32), 1, 0, "training", 0, b""])[1:]
    yield "bitmap of 4G", train_codec, headed(b"\x92\x98" + status + b"\xc6" + huge)
    yield "array of 4G sums", train_codec, headed(b"\x92\x99" + status + b"\xc4\0\xdd" + huge)
    partial = msgspec.msgpack.encode(["GetPartial", bytes(32), 0, 0])[1:]
    too_many = bytes(t.MAX_MICROBATCHES // 8 + 1)
    yield "a number too many", reduce_codec, headed(b"\x92\x97" + partial + msgspec.msgpack.encode(too_many) + b"\0\1")
    forward = msgspec.msgpack.encode(["Forward", bytes(32), bytes(32), 0, 0, 1, 0, "p"])[1:]
    yield "array of 4G ways", pipe_codec, headed(b"\x92\x99" + forward + b"\xdd" + huge)
    many_ways = b"\xdd" + struct.pack(">I", 500_000) + b"\x91\x91\xa1p" * 500_000
    yield "many ways", pipe_codec, headed(b"\x92\x99" + forward + many_ways + b"\x90")
    yield (
        "a way with a deep field to skip",
        pipe_codec,
        headed(b"\x92\x99" + forward + b"\x91\x94\x91\xa1p\xc2\xc2" + nested(1_000_000)),
    )
    offer = msgspec.msgpack.encode(["StateOffer", 0, 0, bytes(32)])[1:]
    yield "binary of 4G chunks", state_codec, headed(b"\x92\x95" + offer + b"\xc6" + huge)
    yield "a frame without a header", session_codec, bytes(2_000_000)
    yield "a header longer than its frame", session_codec, b"\xff\xff\xff\xff" + bytes(2_000_000)


@pytest.mark.parametrize(("codec", "frame"), [pytest.param(c, f, id=name) for name, c, f in bombs()])
def test_a_bomb_costs_no_more_than_its_own_bytes(codec: Codec, frame: bytes) -> None:
    with pytest.raises(RemoteProtocolError):
        codec.decode(frame)  # once before, so that what the error's first use imports is not counted
    began = time.process_time()
    tracemalloc.start()
    try:
        with pytest.raises(RemoteProtocolError):
            codec.decode(frame)
        peak_bytes = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak_bytes <= 2 * len(frame) + 20_000
    assert time.process_time() - began < 2.0


def test_the_dearest_valid_header_costs_a_small_multiple_of_its_bytes() -> None:
    """A megabyte of one-byte token ids, eight bytes each as a tuple: nothing that is allowed grows more."""
    generation = m.Generation(m.SamplingParams(), (1,), 2)
    peer = m.PeerAddress("p")
    message = m.OpenHop(bytes(16), bytes(32), 0, 1, 9, peer, peer, (1,) * 1_048_576, generation)
    frame = bytes(frame_of(session_codec, message))
    tracemalloc.start()
    try:
        session_codec.decode(frame)
        peak_bytes = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak_bytes <= 20 * len(frame)


def test_the_largest_tensor_is_decoded_without_being_copied() -> None:
    size_bytes = 32 * 1024 * 1024
    frame = frame_of(
        ring_codec, STEP, [WireTensor(TensorHeader("uint8", (size_bytes,)), memoryview(bytes(size_bytes)))]
    )
    tracemalloc.start()
    try:
        ring_codec.decode(frame)
        peak_bytes = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak_bytes < 20_000
