"""Where peers can be dialled and where we listen, as the daemon is told: multiaddrs in bytes, looked at beforehand.

The daemon remembers a failed dial for longer with each failure, up to five minutes. So a port is knocked at here first,
and the daemon is sent only to where somebody opens.

Ring: shell.
"""

from __future__ import annotations

import errno
import ipaddress
import socket
from collections import OrderedDict
from collections.abc import Sequence

import trio
from multiaddr import Multiaddr
from multiaddr.exceptions import Error as MultiaddrError

from mycel.node.endpoints import Endpoint, parse_endpoint
from mycel.protocols.errors import ConfigError

_HEAD_START_S = 0.1  # how long, after the first address has opened, the others may still do so


def binary(address: str) -> bytes | None:
    """A multiaddr in bytes, or None for what is none."""
    try:
        return bytes(Multiaddr(address).to_bytes())
    except (MultiaddrError, ValueError, TypeError, OSError):
        return None


def shown(address: bytes) -> str | None:
    """A binary multiaddr as others write it, if it is a TCP endpoint."""
    try:
        endpoint = parse_endpoint(str(Multiaddr(address)))
    except (MultiaddrError, ValueError, TypeError):
        return None
    return endpoint.multiaddr if endpoint is not None else None


class AddressBook:
    """Addresses of peers, newest first, bounded in both directions: the peer least recently learnt of is forgotten."""

    def __init__(self, max_peers: int, max_addresses: int) -> None:
        self._addresses: OrderedDict[str, tuple[str, ...]] = OrderedDict()
        self._max_peers = max_peers
        self._max_addresses = max_addresses

    def learn(self, peer: str, addresses: Sequence[str]) -> None:
        """Put `addresses` first, in their order."""
        known = self._addresses.pop(peer, ())
        fresh = (usable_address(text, peer) for text in addresses[: self._max_addresses])
        merged = tuple(dict.fromkeys([*(text for text in fresh if text is not None), *known]))
        if merged:
            self._addresses[peer] = merged[: self._max_addresses]
        if len(self._addresses) > self._max_peers:
            self._addresses.popitem(last=False)

    def addresses(self, peer: str) -> tuple[str, ...]:
        return self._addresses.get(peer, ())


def usable_address(text: str, peer: str) -> str | None:
    """The address without its peer id, or None for one that cannot be dialled or that is another's.

    >>> usable_address("/ip4/192.0.2.1/tcp/4001", "12D3KooW")
    '/ip4/192.0.2.1/tcp/4001'
    """
    endpoint = parse_endpoint(text)
    if endpoint is None or not endpoint.port or endpoint.peer not in (None, peer):
        return None
    return endpoint.multiaddr


async def dialable(addresses: Sequence[str], within_s: float) -> tuple[list[str], str]:
    """Those behind which somebody accepts connections, and why the others do not."""
    opened: set[str] = set()
    reasons = dict.fromkeys(addresses, "no answer")

    with trio.move_on_after(within_s):
        async with trio.open_nursery() as nursery:

            async def knock(address: str) -> None:
                endpoint = parse_endpoint(address)
                assert endpoint is not None
                try:
                    stream = await trio.open_tcp_stream(endpoint.host, endpoint.port)
                except OSError as error:
                    reasons[address] = _os_reason(error)
                    return
                opened.add(address)
                nursery.cancel_scope.deadline = min(nursery.cancel_scope.deadline, trio.current_time() + _HEAD_START_S)
                await trio.aclose_forcefully(stream)

            for address in tuple(reasons):
                nursery.start_soon(knock, address)
    good = [address for address in addresses if address in opened]
    return good, "; ".join(f"{address}: {reason}" for address, reason in reasons.items() if address not in opened)


def _os_reason(error: OSError) -> str:
    inner: BaseException = error.__cause__ or error
    if isinstance(inner, BaseExceptionGroup) and inner.exceptions:
        inner = inner.exceptions[0]
    return inner.strerror.lower() if isinstance(inner, OSError) and inner.strerror else str(error)[:200]


# ---- listening


def checked_listen(addresses: Sequence[str]) -> list[Endpoint]:
    """Endpoints to listen on. Raises ConfigError for what is none, and for one that is taken or not ours."""
    endpoints = [_checked(text) for text in addresses]
    for endpoint in endpoints:
        _try_to_bind(endpoint)
    return endpoints


def _checked(text: str) -> Endpoint:
    endpoint = parse_endpoint(text)
    if endpoint is None or endpoint.is_name or endpoint.peer is not None:
        raise ConfigError(f"not an address to listen on: {text!r}; it looks like /ip4/0.0.0.0/tcp/4001")
    return endpoint


def _try_to_bind(endpoint: Endpoint) -> None:
    """The daemon would share a port with another node of this user, and is content with one address of several."""
    family = socket.AF_INET6 if endpoint.kind == "ip6" else socket.AF_INET
    with socket.socket(family) as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            sock.bind((endpoint.host, endpoint.port))
            sock.listen(1)
        except OSError as error:
            in_use = error.errno == errno.EADDRINUSE
            why = "the port is in use" if in_use else (error.strerror or str(error)).lower()
            raise ConfigError(f"cannot listen on {endpoint.host} port {endpoint.port}: {why}") from None


def reachable(addresses: Sequence[bytes]) -> tuple[str, ...]:
    """What the daemon says that it listens on, for others; loopback only where there is nothing else."""
    texts = [text for address in addresses if (text := shown(address)) is not None]
    found = [endpoint for text in texts if (endpoint := parse_endpoint(text)) is not None]
    usable = [endpoint for endpoint in found if not ipaddress.ip_address(endpoint.host).is_link_local]
    outside = [endpoint for endpoint in usable if not ipaddress.ip_address(endpoint.host).is_loopback]
    return tuple(dict.fromkeys(endpoint.multiaddr for endpoint in outside or usable))
