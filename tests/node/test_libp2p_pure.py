"""The pure parts of the libp2p adapter: Yamux, frames, negotiation and addresses, against any bytes."""

from __future__ import annotations

import struct
import sys
from collections import deque

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mycel.node.libp2p_transport.dialing import AddressBook, plain_address
from mycel.node.libp2p_transport.framing import END, FrameReader, prefix, take
from mycel.node.libp2p_transport.limits import TransportLimits
from mycel.node.libp2p_transport.negotiation import Choice, Proposal
from mycel.node.libp2p_transport.yamux import MAX_CHUNK_BYTES, Muxer, MuxError, MuxStream, StreamUser
from mycel.protocols.errors import ConfigError, RemoteProtocolError
from mycel.security.identity import Identity

WINDOW_BYTES = 1024 * 1024
HEADER = struct.Struct("!BBHII")
DATA, WINDOW_UPDATE, PING, GO_AWAY = range(4)
SYN, ACK, FIN, RST = 1, 2, 4, 8


class Witness:
    """Writes down what it is told."""

    def __init__(self) -> None:
        self.data = bytearray()
        self.reasons: list[str] = []
        self.n_windows = 0

    def on_data(self, data: memoryview) -> None:
        assert not self.reasons, "data after the end"
        self.data += data

    def on_window(self) -> None:
        self.n_windows += 1

    def on_down(self, reason: str) -> None:
        self.reasons.append(reason)


class End:
    """A muxer whose output is kept in `out` until it is carried to the other side."""

    def __init__(self, initiator: bool, admit: bool = True) -> None:
        self.out = bytearray()
        self.accepted: list[tuple[MuxStream, Witness]] = []
        self.pongs: list[int] = []
        self.gone: list[int] = []
        self.admit = admit
        self.muxer = Muxer(
            initiator,
            WINDOW_BYTES,
            self._push,
            self._on_stream,
            self.pongs.append,
            lambda stream: self.gone.append(stream.id),
        )

    def _push(self, data: bytes) -> None:
        self.out += data

    def _on_stream(self, stream: MuxStream) -> StreamUser | None:
        witness = Witness()
        self.accepted.append((stream, witness))
        return witness if self.admit else None

    def open(self, opening: bytes = b"hi") -> tuple[MuxStream, Witness]:
        witness = Witness()
        return self.muxer.open(witness, opening), witness


def carry(sender: End, receiver: End, sizes: list[int] | None = None) -> None:
    """Deliver what `sender` sent, cut into pieces of the given sizes."""
    data, sender.out = bytes(sender.out), bytearray()
    at = 0
    for size in [*(sizes or []), len(data)]:
        receiver.muxer.receive(data[at : at + size])
        at += size


def talk(one: End, other: End) -> None:
    while one.out or other.out:
        carry(one, other)
        carry(other, one)


def pair(admit: bool = True) -> tuple[End, End]:
    return End(True), End(False, admit)


# ---- yamux --------------------------------------------------------------------------------------------------------


@given(st.binary(max_size=400), st.booleans())
def test_any_bytes_are_frames_or_a_mux_error(data: bytes, initiator: bool) -> None:
    end = End(initiator)
    try:
        end.muxer.receive(data)
    except MuxError:
        end.muxer.stop("broken")
        assert not end.muxer.streams


frames = st.lists(
    st.builds(
        lambda kind, flags, stream_id, length, body: (
            HEADER.pack(0, kind, flags, stream_id, len(body) if kind == DATA else length)
            + (body if kind == DATA else b"")
        ),
        st.integers(0, 3),
        st.integers(0, 15),
        st.integers(0, 6),
        st.integers(0, 2**32 - 1),
        st.binary(max_size=50),
    ),
    max_size=30,
)


@given(frames, st.lists(st.integers(1, 40), max_size=30))
def test_any_frames_in_any_pieces_leave_the_books_in_order(sequence: list[bytes], sizes: list[int]) -> None:
    ends = [End(True), End(True)]
    for end, cuts in zip(ends, ([], sizes), strict=True):
        for _ in range(2):
            end.open()
        source = End(False)
        source.out += b"".join(sequence)
        try:
            carry(source, end, cuts)
        except MuxError:
            end.muxer.stop("broken")
        alive = set(end.muxer.streams)
        assert alive.isdisjoint(end.gone)
        assert all(stream.up for stream in end.muxer.streams.values())
        for stream, witness in end.accepted:
            assert len(witness.reasons) <= 1
            assert stream.up != bool(witness.reasons)
    # Where the bytes were cut makes no difference.
    assert [bytes(w.data) for _, w in ends[0].accepted] == [bytes(w.data) for _, w in ends[1].accepted]
    assert ends[0].out == ends[1].out
    assert ends[0].gone == ends[1].gone


def test_two_muxers_open_write_and_reset() -> None:
    client, server = pair()
    near, near_user = client.open(b"opening")
    talk(client, server)
    far, far_user = server.accepted[0]
    assert far_user.data == b"opening"
    assert near.send_window == WINDOW_BYTES - len(b"opening")
    far.write([b"to ", b"you"], 6)
    near.write([b"!"], 1)
    talk(client, server)
    assert (far_user.data, near_user.data) == (b"opening!", b"to you")
    near.reset()
    near.reset()
    far.write([b"crossing"], 8)
    talk(client, server)
    assert far_user.reasons == ["the peer reset the stream"]
    assert near_user.reasons == []
    assert near_user.data == b"to you"
    assert client.gone == server.gone == [near.id]
    assert not client.muxer.streams
    assert not server.muxer.streams


def test_last_words_arrive_before_the_end() -> None:
    client, server = pair()
    near, _ = client.open()
    near.write_last(b"bye")
    talk(client, server)
    _, far_user = server.accepted[0]
    assert far_user.data == b"hibye"
    assert far_user.reasons == ["the peer closed the stream"]


def test_a_fin_ends_the_stream_after_its_data() -> None:
    client, server = pair()
    near, user = client.open()
    talk(client, server)
    client.muxer.receive(HEADER.pack(0, DATA, FIN, near.id, 3) + b"end")
    assert user.data == b"end"
    assert user.reasons == ["the peer closed the stream"]


def test_windows_are_kept_and_granted() -> None:
    client, server = pair()
    near, user = client.open(b"")
    talk(client, server)
    far, far_user = server.accepted[0]
    full = near.send_window
    near.write([bytes(MAX_CHUNK_BYTES)], MAX_CHUNK_BYTES)
    assert near.send_window == full - MAX_CHUNK_BYTES
    talk(client, server)
    assert far.recv_window == WINDOW_BYTES - MAX_CHUNK_BYTES
    n_windows = user.n_windows
    far.grant(MAX_CHUNK_BYTES)
    talk(client, server)
    assert near.send_window == full
    assert user.n_windows == n_windows + 1
    near.send_window = 2 * WINDOW_BYTES
    for _ in range(20):
        near.write([bytes(MAX_CHUNK_BYTES)], MAX_CHUNK_BYTES)
    with pytest.raises(MuxError, match="more than its window"):
        carry(client, server)
    assert len(far_user.data) <= WINDOW_BYTES + MAX_CHUNK_BYTES


def test_a_refused_stream_is_reset_and_costs_nothing() -> None:
    client, server = pair(admit=False)
    _, user = client.open()
    talk(client, server)
    assert user.reasons == ["the peer reset the stream"]
    assert not server.muxer.streams
    assert server.gone == []


def test_pings_are_answered() -> None:
    client, server = pair()
    client.muxer.ping(7)
    talk(client, server)
    assert client.pongs == [7]


@pytest.mark.parametrize(
    "frame",
    [
        HEADER.pack(1, DATA, 0, 1, 0),
        HEADER.pack(0, 4, 0, 1, 0),
        HEADER.pack(0, GO_AWAY, 0, 0, 0),
        HEADER.pack(0, WINDOW_UPDATE, SYN, 0, 0),
        HEADER.pack(0, WINDOW_UPDATE, SYN, 2, 0),  # even ids are the server's own
        HEADER.pack(0, WINDOW_UPDATE, SYN, 1, 0) * 2,
        HEADER.pack(0, DATA, SYN, 1, WINDOW_BYTES + 1),
    ],
)
def test_what_ends_a_connection(frame: bytes) -> None:
    with pytest.raises(MuxError):
        End(False).muxer.receive(frame)


def test_bytes_of_an_unknown_stream_are_skipped_and_refused() -> None:
    server = End(False)
    server.muxer.receive(HEADER.pack(0, DATA, 0, 9, 100) + bytes(100) + HEADER.pack(0, PING, SYN, 0, 3))
    assert bytes(server.out) == HEADER.pack(0, WINDOW_UPDATE, RST, 9, 0) + HEADER.pack(0, PING, ACK, 0, 3)


# ---- frames -------------------------------------------------------------------------------------------------------


@given(st.lists(st.binary(min_size=1, max_size=60), max_size=20), st.lists(st.integers(1, 30), max_size=60))
def test_frames_survive_any_cut(expected: list[bytes], sizes: list[int]) -> None:
    reader = FrameReader(60)
    data = b"".join(prefix(len(frame)) + frame for frame in expected) + END
    got: list[bytearray] = []
    at = 0
    for size in [*sizes, len(data)]:
        got += reader.feed(memoryview(data)[at : at + size])
        at += size
    assert got == expected
    assert reader.ended
    assert reader.partial_bytes == 0


@given(st.binary(max_size=200), st.integers(1, 100))
def test_any_bytes_are_frames_or_a_remote_protocol_error(data: bytes, limit: int) -> None:
    reader = FrameReader(limit)
    try:
        frames = reader.feed(memoryview(data))
    except RemoteProtocolError:
        return
    assert sum(len(frame) + 4 for frame in frames) + reader.partial_bytes + 4 * reader.ended == len(data)


def test_an_announced_length_allocates_nothing() -> None:
    reader = FrameReader(64 * 1024 * 1024)
    reader.feed(memoryview(prefix(64 * 1024 * 1024) + b"only this"))
    assert sys.getsizeof(reader._frame) < 1000
    assert reader.partial_bytes == 4 + 9


@given(st.lists(st.binary(max_size=50), max_size=10), st.integers(1, 40))
def test_what_is_taken_is_the_parts_again(parts: list[bytes], size: int) -> None:
    left = deque(memoryview(part) for part in parts)
    cut = []
    while left:
        cut.append(b"".join(take(left, size)))
    assert b"".join(cut) == b"".join(parts)
    assert all(len(piece) == size for piece in cut[:-1] if piece)


# ---- negotiation --------------------------------------------------------------------------------------------------

names = st.text(min_size=1, max_size=200).filter(lambda text: text not in ("na", "/multistream/1.0.0"))


@given(names, st.booleans(), st.binary(max_size=20), st.lists(st.integers(1, 9), max_size=40))
def test_both_sides_agree_in_one_round_trip(protocol: str, spoken: bool, rest: bytes, sizes: list[int]) -> None:
    proposal, choice = Proposal(protocol), Choice({protocol} if spoken else {protocol + "x"})
    data = proposal.opening + (rest if spoken else b"")
    answer, left, at = b"", b"", 0
    for size in [*sizes, len(data)]:
        if choice.protocol is None:
            more, remainder = choice.feed(memoryview(data)[at : at + size])
            answer, left = answer + more, left + remainder
        else:
            left += data[at : at + size]
        at += size
    belongs = proposal.feed(memoryview(answer + (b"first frame" if spoken else b"")))
    assert proposal.accepted is spoken
    assert choice.protocol == (protocol if spoken else None)
    if spoken:
        assert left == rest
        assert belongs == b"first frame"


@given(st.binary(max_size=200))
def test_any_bytes_are_a_negotiation_or_a_remote_protocol_error(data: bytes) -> None:
    for side in (Proposal("/a/1"), Choice({"/a/1"})):
        try:
            side.feed(memoryview(data))
        except RemoteProtocolError:
            continue


def test_a_peer_cannot_propose_for_ever() -> None:
    choice = Choice({"/a/1"})
    choice.feed(memoryview(Proposal("/b/1").opening))
    with pytest.raises(RemoteProtocolError):
        choice.feed(memoryview(b"\x05/b/1\n" * 20))


# ---- addresses and limits -----------------------------------------------------------------------------------------


@given(st.text(max_size=60))
def test_any_text_is_an_address_or_none(text: str) -> None:
    plain = plain_address(text, "12D3KooW")
    assert plain is None or plain.count("/") == 4


def test_addresses_are_kept_newest_first_and_bounded() -> None:
    book = AddressBook(max_peers=2, max_addresses=3)
    peer = Identity.from_seed(b"\x01" * 32).peer_id
    address = [f"/ip4/127.0.0.1/tcp/{port}" for port in range(1, 9)]
    assert book.learn(peer, [address[0], address[1]])
    assert book.learn(peer, [address[2]])
    assert book.addresses(peer) == (address[2], address[0], address[1])
    assert not book.learn(peer, [address[1]])
    assert book.addresses(peer) == (address[1], address[2], address[0])
    assert book.learn(peer, [address[3], "nonsense"])
    assert book.addresses(peer) == (address[3], address[1], address[2])
    assert not book.learn(peer, ["nonsense"])
    for other in ("b", "c"):
        book.learn(other, address[:1])
    assert book.addresses(peer) == ()


@pytest.mark.parametrize(
    "wrong",
    [
        {"silence_s": 0.0},
        {"silence_s": 1.5},
        {"window_bytes": 1000},
        {"max_connections": 0},
        {"max_frame_bytes": 2**30},
        {"max_held_bytes_per_connection": 2**20},
    ],
)
def test_limits_that_cannot_work_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ConfigError):
        TransportLimits(**wrong)
