"""Peer ids and signatures: a peer id contains its public key, so a signature is checked with the signer's id alone.

Ring: pure.
"""

from __future__ import annotations

from typing import Protocol

import base58
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

# identity multihash (0x00) of 36 bytes: protobuf {type: Ed25519 (08 01), data: 32 bytes (12 20 ...)}: libp2p peer ids
_PEER_ID_PREFIX = bytes.fromhex("002408011220")
_MAX_PEER_ID_CHARS = 64  # base58 of 38 bytes has 52; decoding takes quadratic time, so it is not tried on more


class Signer(Protocol):
    """Who can sign in the name of `peer_id`: in practice an `Identity`."""

    @property
    def peer_id(self) -> str: ...

    def sign(self, data: bytes) -> bytes:
        """A 64-byte signature; callers put a versioned domain string in front of `data`."""
        ...


def peer_id_of(public_key: bytes) -> str:
    """The libp2p peer id of a raw 32-byte Ed25519 public key."""
    return base58.b58encode(_PEER_ID_PREFIX + public_key).decode()


def public_key_of(peer_id: str) -> bytes | None:
    """The raw public key inside a peer id, or None for anything that is not an Ed25519 peer id."""
    if len(peer_id) > _MAX_PEER_ID_CHARS:
        return None
    try:
        raw = base58.b58decode(peer_id)
    except ValueError:
        return None
    if len(raw) != len(_PEER_ID_PREFIX) + 32 or not raw.startswith(_PEER_ID_PREFIX):
        return None
    return raw[len(_PEER_ID_PREFIX) :]


def verify(peer_id: str, signature: bytes, data: bytes) -> bool:
    """Whether the owner of `peer_id` signed `data`."""
    public_key = public_key_of(peer_id)
    if public_key is None:
        return False
    try:
        Ed25519PublicKey.from_public_bytes(public_key).verify(signature, data)
    except (InvalidSignature, ValueError):
        return False
    return True
