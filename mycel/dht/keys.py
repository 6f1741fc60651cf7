"""Positions in the 256-bit Kademlia space: where a swarm's announcements live, where a peer stands, how far apart.

Ring: pure.
"""

from __future__ import annotations

from hashlib import sha256

SPACE_BITS = 256
_SPAN_DOMAIN = b"mycel/key/spans/1\0"


def span_key(swarm_id: bytes) -> bytes:
    """The key (32 bytes) under which the peers of a swarm announce their spans."""
    return sha256(_SPAN_DOMAIN + swarm_id).digest()


def position_of(peer: str) -> bytes:
    """Where a peer stands in the key space (32 bytes): the hash of its id, so that nobody picks a place cheaply."""
    return sha256(peer.encode()).digest()


def distance(a: bytes, b: bytes) -> int:
    """The XOR distance of two 32-byte positions.

    >>> distance(bytes(32), bytes(31) + b"\\x05")
    5
    """
    return int.from_bytes(a, "big") ^ int.from_bytes(b, "big")


def bucket_index(own: bytes, other: bytes) -> int | None:
    """The number of leading bits that two positions share (0 is the farthest bucket), or None for equal positions."""
    gap = distance(own, other)
    return SPACE_BITS - gap.bit_length() if gap else None


def key_in_bucket(own: bytes, index: int, salt: int) -> bytes:
    """A key that shares exactly `index` leading bits with `own`; `salt` chooses which one, repeatably."""
    noise = int.from_bytes(sha256(own + salt.to_bytes(8, "big")).digest(), "big")
    keep_bits = SPACE_BITS - index - 1  # the bits below the first one that differs
    flipped = int.from_bytes(own, "big") ^ (1 << keep_bits)
    return ((flipped >> keep_bits << keep_bits) | (noise & ((1 << keep_bits) - 1))).to_bytes(32, "big")
