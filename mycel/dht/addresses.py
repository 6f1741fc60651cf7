"""Addresses as people and peers write them: bootstrap texts from a person, claims from the network.

Ring: pure.
"""

from __future__ import annotations

import re

from mycel.protocols.errors import ConfigError
from mycel.protocols.messages import PeerAddress
from mycel.security.signatures import public_key_of

MAX_ADDRESSES = 8
_MULTIADDR = re.compile(r"/[a-z0-9-]+(/[!-.0-~]+)+")
_PEER_MARK = "/p2p/"
_MAX_MULTIADDR_CHARS = 256


def parse_bootstrap(text: str) -> PeerAddress:
    """The peer behind "<multiaddr>/p2p/<peer id>", such as /ip4/192.0.2.1/tcp/4001/p2p/12D3Koo...

    Raises ConfigError, with one line that says what is wrong.
    """
    address, mark, peer = text.strip().rpartition(_PEER_MARK)
    if not mark or not address:
        raise ConfigError(f"bootstrap address {text!r} must look like /ip4/<address>/tcp/<port>/p2p/<peer id>")
    if public_key_of(peer) is None:
        raise ConfigError(f"bootstrap address {text!r} does not end in the peer id of an Ed25519 key")
    if not is_multiaddr(address):
        raise ConfigError(f"bootstrap address {text!r} does not begin with /ip4/<address>/tcp/<port> or the like")
    return PeerAddress(peer, (address,))


def is_multiaddr(text: str) -> bool:
    """Whether a text has the shape of a multiaddr: /protocol/value ... Dialling finds whether it is one."""
    return len(text) <= _MAX_MULTIADDR_CHARS and _MULTIADDR.fullmatch(text) is not None


def sane(address: PeerAddress) -> PeerAddress:
    """The same peer with only those addresses that have the shape of one, each once, the first MAX_ADDRESSES."""
    kept = tuple(dict.fromkeys(filter(is_multiaddr, address.addresses)))[:MAX_ADDRESSES]
    return address if kept == address.addresses else PeerAddress(address.peer, kept)
