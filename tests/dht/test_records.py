"""Keys, announcements and addresses: what is accepted, what fits, and which of two is the newer."""

from __future__ import annotations

import contextlib
import itertools

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mycel.dht.addresses import is_multiaddr, parse_bootstrap, sane
from mycel.dht.keys import SPACE_BITS, bucket_index, distance, key_in_bucket, position_of, span_key
from mycel.dht.records import (
    MAX_ADDRESSES,
    MAX_BLOCKS,
    MAX_RTTS,
    Announcement,
    decode_announcement,
    encode_announcement,
    newer,
)
from mycel.protocols.errors import ConfigError, LocalProtocolError, RemoteProtocolError
from mycel.protocols.messages import MAX_RECORD_VALUE_BYTES, PeerAddress
from mycel.security.envelope import sign_record
from mycel.security.identity import Identity

SWARM = b"\x05" * 32
WRITER = Identity.from_seed(bytes(32))
positions = st.binary(min_size=32, max_size=32)
seconds = st.floats(0, 1e9)
counts = st.integers(0, 2**31 - 1)


@st.composite
def announcements(draw: st.DrawFn) -> Announcement:
    start = draw(st.integers(0, MAX_BLOCKS - 1))
    total = draw(counts)
    return Announcement(
        draw(positions),
        start,
        draw(st.integers(start + 1, MAX_BLOCKS)),
        draw(st.sampled_from(["serving", "leaving"])),
        tuple(draw(st.lists(st.from_regex(r"/ip4/[!-~]{1,40}", fullmatch=True), max_size=MAX_ADDRESSES))),
        draw(seconds),
        draw(seconds),
        draw(st.integers(0, total)),
        total,
        draw(counts),
        draw(seconds),
        tuple(
            draw(
                st.dictionaries(st.from_regex(r"[0-9A-Za-z]{1,64}", fullmatch=True), seconds, max_size=MAX_RTTS)
            ).items()
        ),
        draw(st.from_regex(r"[!-~]{0,32}", fullmatch=True)),
    )


@given(announcements())
def test_announcements_come_back(announcement: Announcement) -> None:
    assert decode_announcement(encode_announcement(announcement)) == announcement


def test_a_full_announcement_fits_into_a_record() -> None:
    largest = Announcement(
        SWARM,
        MAX_BLOCKS - 1,
        MAX_BLOCKS,
        "leaving",
        tuple("/" + str(i) + "a" * 158 for i in range(MAX_ADDRESSES)),
        0.1,
        0.1,
        2**31 - 1,
        2**31 - 1,
        2**31 - 1,
        0.1,
        tuple((f"{i:064}", 0.1) for i in range(MAX_RTTS)),
        "v" * 32,
    )
    assert len(encode_announcement(largest)) <= MAX_RECORD_VALUE_BYTES


@given(st.binary(max_size=300))
def test_any_bytes_are_an_announcement_or_refused(value: bytes) -> None:
    try:
        announcement = decode_announcement(value)
    except RemoteProtocolError:
        return
    assert announcement.start < announcement.end


@given(announcements(), st.data())
def test_damaged_announcements_are_refused_or_sensible(announcement: Announcement, data: st.DataObject) -> None:
    value = bytearray(encode_announcement(announcement))
    value[data.draw(st.integers(0, len(value) - 1))] ^= data.draw(st.integers(1, 255))
    try:
        damaged = decode_announcement(bytes(value))
    except RemoteProtocolError:
        return
    assert 0 <= damaged.start < damaged.end <= MAX_BLOCKS


@pytest.mark.parametrize(
    "change",
    [
        {"start": 8},
        {"start": -1},
        {"end": MAX_BLOCKS + 1},
        {"state": "sleeping"},
        {"swarm": b"short"},
        {"addresses": ("ip4",)},
        {"addresses": ("/ip4/1.2.3.4\n",)},
        {"addresses": ("/ip4/ä",)},
        {"addresses": ("/a/b",) * (MAX_ADDRESSES + 1)},
        {"block_time_s": float("nan")},
        {"overhead_s": float("inf")},
        {"queue_s": -1.0},
        {"kv_free_tokens": 11},
        {"sessions": 2**40},
        {"rtts": (("a", float("nan")),)},
        {"rtts": (("a", 0.1), ("a", 0.2))},
        {"rtts": (("a b", 0.1),)},
        {"rtts": tuple((str(i), 0.1) for i in range(MAX_RTTS + 1))},
        {"version": "1" * 33},
        {"version": "1\n"},
    ],
)
def test_nonsense_is_refused(change: dict) -> None:
    sensible = Announcement(SWARM, 0, 8, kv_free_tokens=10, kv_total_tokens=10)
    nonsense = msgspec.structs.replace(sensible, **change)
    with pytest.raises(RemoteProtocolError):
        decode_announcement(msgspec.msgpack.encode(nonsense))
    with pytest.raises(LocalProtocolError):
        encode_announcement(nonsense)


def test_newer_does_not_depend_on_the_order_of_arrival() -> None:
    records = [
        sign_record(WRITER, SWARM, seq, expires_at, value)
        for seq, expires_at, value in itertools.product((1, 2), (100.0, 130.0), (b"a", b"b"))
    ]
    for a, b in itertools.product(records, records):
        assert newer(a, b) == newer(b, a)
        assert newer(a, b).seq == max(a.seq, b.seq)


# ---- keys


@given(positions, positions, positions)
def test_distance_is_a_metric(a: bytes, b: bytes, c: bytes) -> None:
    assert distance(a, b) == distance(b, a)
    assert (distance(a, b) == 0) == (a == b)
    assert distance(a, c) <= distance(a, b) + distance(b, c)


@given(positions, st.integers(0, SPACE_BITS - 1), st.integers(0, 2**32))
def test_key_in_bucket_is_in_that_bucket(own: bytes, index: int, salt: int) -> None:
    assert bucket_index(own, key_in_bucket(own, index, salt)) == index


def test_keys_differ_by_kind() -> None:
    assert len({span_key(SWARM), span_key(bytes(32)), position_of("a"), SWARM}) == 4
    assert bucket_index(SWARM, SWARM) is None


# ---- addresses


def test_a_bootstrap_address_is_read() -> None:
    text = f" /ip4/192.0.2.1/tcp/4001/p2p/{WRITER.peer_id}\n"
    assert parse_bootstrap(text) == PeerAddress(WRITER.peer_id, ("/ip4/192.0.2.1/tcp/4001",))
    relayed = f"/ip4/192.0.2.1/tcp/1/p2p/{WRITER.peer_id}/p2p-circuit/p2p/{WRITER.peer_id}"
    assert parse_bootstrap(relayed).addresses == (relayed.removesuffix(f"/p2p/{WRITER.peer_id}"),)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "nonsense",
        "a:1",
        "/ip4/192.0.2.1/tcp/4001",
        "/ip4/192.0.2.1/tcp/4001/p2p/QmNoKey",
        f"/p2p/{WRITER.peer_id}",
        f"192.0.2.1:4001/p2p/{WRITER.peer_id}",
        f"/ip4/x y/tcp/1/p2p/{WRITER.peer_id}",
        f"/ip4/{'9' * 300}/p2p/{WRITER.peer_id}",
    ],
)
def test_a_bad_bootstrap_address_gives_one_clear_line(text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_bootstrap(text)
    assert "bootstrap address" in str(caught.value)
    assert "\n" not in str(caught.value)


@given(st.text(max_size=300))
def test_any_text_is_a_bootstrap_address_or_a_config_error(text: str) -> None:
    with contextlib.suppress(ConfigError):
        assert parse_bootstrap(text).peer


def test_claimed_addresses_are_cleaned() -> None:
    good = "/dns4/example.org/tcp/4001"
    assert is_multiaddr(good)
    assert sane(PeerAddress("a", ("x", good, good, "/ip4/\x00/tcp/1", "/" * 9))) == PeerAddress("a", (good,))
