"""TCP endpoints as multiaddrs write them: what a node can be told to announce, and which network an address is of.

Ring: pure.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address, ip_address
from typing import Literal

from mycel.dht.records import MAX_ADDRESSES
from mycel.protocols.errors import ConfigError
from mycel.security.signatures import public_key_of

Scope = Literal["loopback", "link-local", "private", "public"]

# Of one address in an announcement (dht/records.py).
MAX_ADDRESS_CHARS = 160
_ENDPOINT = re.compile(r"/(ip4|ip6|dns|dns4|dns6)/([!-.0-~]+)/tcp/([0-9]{1,5})(?:/p2p/([0-9A-Za-z]{1,64}))?")
_NAME = re.compile(r"(?=.{1,253}\Z)[A-Za-z0-9_](?:[A-Za-z0-9_-]{0,62})(?:\.[A-Za-z0-9_][A-Za-z0-9_-]{0,62})*\.?")
_EXAMPLE = "/ip4/203.0.113.7/tcp/4001"


@dataclass(frozen=True, slots=True)
class Endpoint:
    """A host (an IP address in its shortest form, or a name) and a TCP port; `peer` if the address says who is there.

    >>> Endpoint("dns4", "node.example.org", 4001).multiaddr
    '/dns4/node.example.org/tcp/4001'
    """

    kind: str
    host: str
    port: int
    peer: str | None = None

    @property
    def is_name(self) -> bool:
        return self.kind.startswith("dns")

    @property
    def multiaddr(self) -> str:
        """As others dial it, without the peer id."""
        return f"/{self.kind}/{self.host}/tcp/{self.port}"

    @property
    def shown(self) -> str:
        """As people write it."""
        return f"[{self.host}]:{self.port}" if self.kind == "ip6" else f"{self.host}:{self.port}"


def parse_endpoint(text: str) -> Endpoint | None:
    """The endpoint that a multiaddr names, or None for anything else. Port 0 is one: any free port, to listen on."""
    match = _ENDPOINT.fullmatch(text)
    if match is None:
        return None
    kind, host, port, peer = match[1], match[2], int(match[3]), match[4]
    if port > 65535 or (peer is not None and public_key_of(peer) is None):
        return None
    if kind.startswith("dns"):
        return Endpoint(kind, host, port, peer) if _NAME.fullmatch(host) else None
    try:
        ip = ip_address(host)
    except ValueError:
        return None
    return Endpoint(kind, str(ip), port, peer) if ip.version == int(kind[2:]) else None


def plain_host(host: str) -> str:
    """An IP address in the one form in which two can be compared: no zone, and IPv4 not dressed up as IPv6."""
    try:
        ip = ip_address(host.partition("%")[0])
    except ValueError:
        return host
    mapped = ip.ipv4_mapped if isinstance(ip, IPv6Address) else None
    return str(mapped or ip)


def tcp_multiaddr(host: str, port: int) -> str:
    """The multiaddr of one end of a connection.

    >>> tcp_multiaddr("::ffff:192.0.2.1", 4001)
    '/ip4/192.0.2.1/tcp/4001'
    """
    plain = plain_host(host)
    return f"/{'ip6' if ':' in plain else 'ip4'}/{plain}/tcp/{port}"


def scope_of(host: str) -> Scope:
    """From how far away an IP address can be dialled. Shared addresses of carriers (100.64.0.0/10) are private."""
    ip: IPv4Address | IPv6Address = ip_address(plain_host(host))
    if ip.is_loopback:
        return "loopback"
    if ip.is_link_local:
        return "link-local"
    return "public" if ip.is_global else "private"


def checked_announce(addresses: Sequence[str]) -> tuple[str, ...]:
    """What a person wants others to be told, each once. Raises ConfigError, with one line that says what is wrong."""
    if len(set(addresses)) > MAX_ADDRESSES:
        raise ConfigError(f"--announce takes at most {MAX_ADDRESSES} addresses")
    return tuple(dict.fromkeys(_checked(address) for address in addresses))


def _checked(text: str) -> str:
    endpoint = parse_endpoint(text)
    if endpoint is None:
        raise ConfigError(f"not an address to announce: {text!r}; it looks like {_EXAMPLE} or /dns4/<name>/tcp/4001")
    if endpoint.peer is not None:
        raise ConfigError(f"announce {endpoint.multiaddr} without /p2p/...: the node's own id goes without saying")
    if endpoint.port == 0:
        raise ConfigError(f"cannot announce {text}: nobody can dial port 0, give the port that is forwarded")
    if not endpoint.is_name and (ip_address(endpoint.host).is_unspecified or ip_address(endpoint.host).is_multicast):
        raise ConfigError(f"cannot announce {text}: {endpoint.host} is not the address of one machine")
    if len(endpoint.multiaddr) > MAX_ADDRESS_CHARS:
        raise ConfigError(f"cannot announce an address of more than {MAX_ADDRESS_CHARS} characters")
    return endpoint.multiaddr
