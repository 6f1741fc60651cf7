"""What is said about a bulk lane, and how its records are sealed. A lane is a second connection between two peers.

Its key follows from a secret of each side, which they tell each other on a stream of the transport: whoever holds the
key is the peer that the transport authenticated. One key for each direction, and a counter in each nonce, so that a
record is good at its place alone; its header is authenticated with it.

Ring: pure.
"""

from __future__ import annotations

import struct
from typing import Annotated

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import AES256
from cryptography.hazmat.primitives.ciphers.modes import GCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from msgspec import Meta

from mycel.protocols.codec import Codec
from mycel.protocols.errors import RemoteProtocolError
from mycel.protocols.messages import Key, Message, Multiaddr, Reason

LANE = "/mycel/lane/1"
RECORD_BYTES = 1 << 20
TICKET_BYTES = 16
TAG_BYTES = 16
HEADER = struct.Struct("<II")  # plain bytes of this record, and of the frame after it
SLACK_BYTES = 16  # which a cipher may write past what it was given room for

Ticket = Annotated[bytes, Meta(min_length=TICKET_BYTES, max_length=TICKET_BYTES)]
Addresses = Annotated[tuple[Multiaddr, ...], Meta(max_length=8)]


class OpenLane(Message, frozen=True):
    """Let there be a lane on which I ask; `addresses` is where mine can be dialled."""

    secret: Key
    addresses: Addresses


class LaneAt(Message, frozen=True):
    """Dial one of these and show the ticket. Good while this stream is open, and once."""

    secret: Key
    ticket: Ticket
    addresses: Addresses


class DialBack(Message, frozen=True):
    """I cannot reach you: dial me instead, with the same ticket."""


class NoLane(Message, frozen=True):
    reason: Reason


LaneMessage = OpenLane | LaneAt | DialBack | NoLane
lane_codec: Codec[LaneMessage] = Codec(LaneMessage, "lane")


def lane_keys(asker: str, giver: str, asker_secret: bytes, giver_secret: bytes, ticket: bytes) -> tuple[bytes, bytes]:
    """The keys of what the asker sends, and of what the giver does."""
    names = b"\0".join((b"mycel lane v1", asker.encode(), giver.encode()))
    both = HKDF(SHA256(), 64, salt=ticket, info=names).derive(asker_secret + giver_secret)
    return both[:32], both[32:]


class Sealer:
    """Makes the records of one direction."""

    def __init__(self, key: bytes) -> None:
        self._cipher = AES256(key)
        self._number = 0

    def seal(self, data: memoryview, frame_left: int, into: memoryview) -> int:
        """Write a record into `into`; its length. `frame_left`: how much of the frame comes after it."""
        header = HEADER.pack(len(data), frame_left)
        into[: HEADER.size] = header
        encryptor = Cipher(self._cipher, GCM(_nonce(self._number))).encryptor()
        self._number += 1
        encryptor.authenticate_additional_data(header)
        stop = HEADER.size + encryptor.update_into(data, into[HEADER.size :])
        encryptor.finalize()
        into[stop : stop + TAG_BYTES] = encryptor.tag
        return stop + TAG_BYTES


class Unsealer:
    """Reads the records of one direction."""

    def __init__(self, key: bytes) -> None:
        self._cipher = AES256(key)
        self._number = 0

    def unseal(self, header: memoryview, sealed: memoryview, into: memoryview) -> None:
        """Write what a record holds into `into`, which is SLACK_BYTES longer.

        Raises RemoteProtocolError if it was not sealed with our key, for this place: `into` is then worth nothing.
        """
        decryptor = Cipher(self._cipher, GCM(_nonce(self._number))).decryptor()
        self._number += 1
        decryptor.authenticate_additional_data(header)
        decryptor.update_into(sealed[:-TAG_BYTES], into)
        try:
            decryptor.finalize_with_tag(bytes(sealed[-TAG_BYTES:]))
        except InvalidTag:
            raise RemoteProtocolError("a record of the lane is forged") from None


def _nonce(number: int) -> bytes:
    return number.to_bytes(12, "little")
