"""The pure parts of the second engine: what the daemon is told, what the DHT process is told, how deep a nest is."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mycel.node.hivemind_engine import daemon_messages as said
from mycel.node.hivemind_engine import dht_messages
from mycel.node.hivemind_engine.depth import is_shallow
from mycel.protocols.errors import LocalProtocolError

PEER = bytes.fromhex("002408011220") + bytes(32)


@given(st.integers(0, 2**63))
def test_a_number_is_read_back(number: int) -> None:
    message = said.varint(number)
    assert said._read_varint(message + b"\xff", 0) == (number, len(message))
    assert said._read_varint(message[:-1], 0) is None


@given(st.binary(max_size=300), st.binary(max_size=20))
def test_messages_are_cut_at_their_length(message: bytes, rest: bytes) -> None:
    whole = said.delimited(message)
    assert said.cut(whole + rest) == (message, rest)
    for size in range(len(whole)):
        assert said.cut(whole[:size]) is None


def test_requests_are_the_bytes_of_the_protocol() -> None:
    """Checked by hand against the daemon's p2pd.proto."""
    assert said.simple(said.Ask.PERSISTENT) == b"\x02\x08\x09"
    assert said.connect(b"P", [b"A", b"B"], 5) == b"\x0f\x08\x01\x12\x0b\x0a\x01P\x12\x01A\x12\x01B\x18\x05"
    assert said.open_stream(b"P", "/x", 300) == b"\x0e\x08\x02\x1a\x0a\x0a\x01P\x12\x02/x\x18\xac\x02"
    assert said.handle_streams("/s", "/x") == b"\x11\x08\x03\x22\x0d\x0a\x05\x90\x03\x02/s\x12\x02/x\x18\x00"
    assert said.disconnect(b"P") == b"\x07\x08\x07\x3a\x03\x0a\x01P"
    assert said.private_key_file(b"S" * 32, b"P" * 32) == b"\x08\x01\x12\x40" + b"S" * 32 + b"P" * 32


def test_answers_are_read() -> None:
    assert said.read_answer(b"\x08\x00") == said.Answer()
    assert said.read_answer(b"\x08\x01\x12\x04\x0a\x02no").error == "no"
    assert said.read_answer(b"\x08\x01").error
    stream = b"\x0a\x01P\x12\x01A\x1a\x02/x"
    assert said.read_answer(b"\x08\x00\x1a" + bytes([len(stream)]) + stream).stream == said.StreamInfo(b"P", "/x", b"A")
    assert said.read_answer(b"\x08\x00\x22\x09\x0a\x01P\x12\x01A\x12\x01B").addresses == (b"A", b"B")
    peers = said.read_answer(b"\x08\x00\x32\x06\x0a\x01P\x12\x01A\x32\x03\x0a\x01Q").peers
    assert peers == {b"P", b"Q"}


@given(st.binary(max_size=200))
def test_no_bytes_do_harm(data: bytes) -> None:
    for read in (said.cut, said.read_answer, said.read_stream_info):
        try:
            read(data)
        except LocalProtocolError:
            continue


def test_a_length_over_the_limit_is_refused() -> None:
    with pytest.raises(LocalProtocolError, match="announced"):
        said.cut(said.varint(said.MAX_MESSAGE_BYTES + 1))
    with pytest.raises(LocalProtocolError, match="announced"):
        dht_messages.body_bytes(b"\xff\xff\xff\xff")


requests = st.one_of(
    st.builds(dht_messages.Get, st.integers(0, 9), st.binary(max_size=32)),
    st.builds(dht_messages.Put, st.just(1), st.binary(max_size=32), st.text(max_size=9), st.binary(), st.just(1.5)),
    st.builds(dht_messages.Start, st.just(("/ip4/192.0.2.1",)), st.just(())),
    st.builds(dht_messages.Stop, st.integers(0, 9)),
)


@given(st.integers(0, 2**40), requests)
def test_questions_to_the_dht_process_are_read_back(number: int, request: dht_messages.Request) -> None:
    frame = dht_messages.to_frame(dht_messages.Asked(number, request))
    size = dht_messages.body_bytes(frame[:4])
    assert size == len(frame) - 4
    assert dht_messages.read_asked(frame[4:]) == dht_messages.Asked(number, request)


# ---- depth -------------------------------------------------------------------------------------------------------

leaves = st.one_of(st.none(), st.booleans(), st.integers(-(2**63), 2**64 - 1), st.floats(), st.text(), st.binary())
trees = st.recursive(leaves, lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner), max_leaves=30)


def depth_of(tree: object) -> int:
    if isinstance(tree, list):
        return 1 + max(map(depth_of, tree)) if tree else 0
    if isinstance(tree, dict):
        return 1 + max(map(depth_of, tree.values())) if tree else 0
    return 0


@given(trees, st.integers(0, 6))
def test_depth_is_that_of_the_tree(tree: object, limit: int) -> None:
    packed = dht_messages._encoder.encode(tree)
    assert is_shallow(packed, limit) == (depth_of(tree) <= limit)


@given(trees)
def test_what_is_cut_short_is_not_read(tree: object) -> None:
    packed = dht_messages._encoder.encode(tree)
    assert is_shallow(packed, 1000)
    assert len(packed) == 1 or not is_shallow(packed[:-1], 1000)


@given(st.binary(max_size=400))
def test_any_bytes_have_an_answer(data: bytes) -> None:
    assert is_shallow(data) in (True, False)


def test_a_nest_of_extension_types_is_deep() -> None:
    """What crashes hivemind's own reader: its tuples and dictionaries are messages inside extension types."""
    nest = b"\x01"
    for level in range(1, 300):
        nest = b"\xc9" + struct.pack(">I", len(nest)) + b"\x40" + nest
        assert is_shallow(nest, 8) == (level <= 8)
