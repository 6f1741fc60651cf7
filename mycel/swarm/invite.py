"""An invite: one line of text that says which swarm, and whom to ask first; signed by its issuer, and it expires.

    mycel1:<base64url of checksum (4 bytes) | signature (64) | body>

The checksum tells a slip in copying from a forgery. Peer ids stand in the body as raw public keys, the issuer's once,
so that the line stays short enough to paste. An invite carries no secret: it names a swarm and opens nothing.

Ring: pure.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import re
from collections.abc import Sequence
from typing import Annotated

import msgspec
from msgspec import Meta, Struct

from mycel.protocols.errors import ConfigError, LocalProtocolError
from mycel.protocols.messages import Key, Multiaddr, PeerAddress, UnixTime
from mycel.security.signatures import Signer, peer_id_of, public_key_of, verify
from mycel.swarm.manifest import Name

__all__ = ["Invite", "make_invite", "parse_invite"]

MAX_TEXT_CHARS = 4096
MAX_PEERS = 8
MAX_CLOCK_SKEW_S = 3600.0
_DOMAIN = b"mycel invite v1\0"
_CHECKSUM_BYTES = 4
_SIGNATURE_BYTES = 64
_START = re.compile(r"mycel(\d{1,4}):(.*)\Z", re.DOTALL)


class Invite(Struct, frozen=True):
    """A checked invite; times are unix seconds, `bootstrap` is who to dial, the best first."""

    swarm: bytes
    name: str
    bootstrap: tuple[PeerAddress, ...]
    issuer: str
    issued_at: float
    expires_at: float
    signature: bytes
    text: str


class _Contact(Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """A bootstrap peer: its public key (empty for the issuer's own) and its addresses."""

    key: Annotated[bytes, Meta(max_length=32)]
    addresses: Annotated[tuple[Multiaddr, ...], Meta(min_length=1, max_length=8)]


class _Body(Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    swarm: Key
    name: Name
    issuer: Key
    issued_at: Annotated[int, Meta(ge=0, le=10**11)]
    lifetime_s: Annotated[int, Meta(ge=1, le=10**10)]
    contacts: Annotated[tuple[_Contact, ...], Meta(min_length=1, max_length=MAX_PEERS)]


_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(_Body)


def make_invite(
    identity: Signer, swarm: bytes, name: str, bootstrap: Sequence[PeerAddress], *, now: UnixTime, lifetime_s: float
) -> Invite:
    """An invite to the swarm with id `swarm` (32 bytes), good for `lifetime_s` from `now` (whole seconds).

    Raises LocalProtocolError if a field is out of its limits: no bootstrap address, a peer id that is not Ed25519.
    """
    issuer = _raw_key(identity.peer_id)
    contacts = []
    for contact in bootstrap:
        key = b"" if contact.peer == identity.peer_id else _raw_key(contact.peer)
        contacts.append(_Contact(key, contact.addresses))
    body = _encoder.encode(_Body(swarm, name, issuer, int(now), int(lifetime_s), tuple(contacts)))
    signature = identity.sign(_DOMAIN + body)
    signed = signature + body
    text = "mycel1:" + base64.urlsafe_b64encode(_checksum(signed) + signed).decode().rstrip("=")
    try:
        return parse_invite(text, now)
    except ConfigError as error:
        raise LocalProtocolError(f"an invite that nobody could use: {error}") from None


def parse_invite(text: str, now: UnixTime) -> Invite:
    """The invite in `text`, which may stand behind `mycel join` and be broken over lines.

    Raises ConfigError, one line that says what is wrong: not an invite, of a newer Mycel, damaged in copying, not
    signed by its issuer, expired (and when), or issued in the future (a wrong clock).
    """
    start = _START.search(text.strip()[:MAX_TEXT_CHARS])
    if start is None:
        raise ConfigError("this is not an invite: an invite is one line that starts with mycel1:")
    if start[1] != "1":
        raise ConfigError(
            f"this invite is of kind mycel{start[1]}, which this Mycel does not know: install a newer one"
        )
    canonical = re.sub(r"[\s'\"`]+", "", start[2]).rstrip("=")
    signature, encoded = _unwrap(canonical)
    try:
        body = _decoder.decode(encoded)
    except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError):
        raise ConfigError("this invite is not valid: whoever made it has to make a new one") from None
    issuer = peer_id_of(body.issuer)
    if not verify(issuer, signature, _DOMAIN + encoded):
        raise ConfigError("this invite was changed after it was signed: ask for a new one, and do not trust this one")
    expires_at = body.issued_at + body.lifetime_s
    if now >= expires_at:
        raise ConfigError(f"this invite to {body.name} expired {_duration(now - expires_at)} ago: ask for a new one")
    if body.issued_at > now + MAX_CLOCK_SKEW_S:
        ahead = _duration(body.issued_at - now)
        raise ConfigError(f"this invite to {body.name} was made {ahead} in the future: is this machine's clock right?")
    bootstrap = []
    for contact in body.contacts:
        if len(contact.key) not in {0, 32}:
            raise ConfigError("this invite is not valid: whoever made it has to make a new one")
        bootstrap.append(PeerAddress(peer_id_of(contact.key) if contact.key else issuer, contact.addresses))
    return Invite(
        swarm=body.swarm,
        name=body.name,
        bootstrap=tuple(bootstrap),
        issuer=issuer,
        issued_at=float(body.issued_at),
        expires_at=float(expires_at),
        signature=signature,
        text="mycel1:" + canonical,
    )


def _unwrap(canonical: str) -> tuple[bytes, bytes]:
    """Signature and body. Raises ConfigError for text that lost or changed a character."""
    damaged = "this invite is damaged: a character is missing or changed, copy it again from mycel1: to its end"
    try:
        raw = base64.b64decode(canonical + "=" * (-len(canonical) % 4), altchars=b"-_", validate=True)
    except (binascii.Error, ValueError):
        raise ConfigError(damaged) from None
    checksum, signed = raw[:_CHECKSUM_BYTES], raw[_CHECKSUM_BYTES:]
    if len(signed) <= _SIGNATURE_BYTES or checksum != _checksum(signed):
        raise ConfigError(damaged)
    return signed[:_SIGNATURE_BYTES], signed[_SIGNATURE_BYTES:]


def _checksum(data: bytes) -> bytes:
    return hashlib.sha256(data).digest()[:_CHECKSUM_BYTES]


def _raw_key(peer: str) -> bytes:
    key = public_key_of(peer)
    if key is None:
        raise LocalProtocolError(f"{peer!r} is not an Ed25519 peer id")
    return key


def _duration(seconds: float) -> str:
    """A length of time as a person says it, rounded down: "3 days", "1 hour", "20 seconds"."""
    for unit, length_s in (("day", 86400), ("hour", 3600), ("minute", 60), ("second", 1)):
        count = int(seconds // length_s)
        if count or unit == "second":
            return f"{count} {unit}{'' if count == 1 else 's'}"
    raise AssertionError("unreachable: a second divides everything")
