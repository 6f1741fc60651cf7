"""Nodes inside one network find each other without any address: announced and browsed by multicast DNS (RFC 6762).

The library keeps threads of its own; what they find is checked here, brought over to trio and handed out as addresses
of peers that claim to be there. A claim is worth a dial, no more: the connection proves who answers.

Ring: shell.
"""

from __future__ import annotations

import socket
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from functools import partial
from ipaddress import ip_address

import trio
from zeroconf import Error as ZeroconfError
from zeroconf import (
    InterfaceChoice,
    IPVersion,
    NotRunningException,
    ServiceBrowser,
    ServiceInfo,
    ServiceStateChange,
    Zeroconf,
)

from mycel.dht.addresses import MAX_ADDRESSES, sane
from mycel.protocols.errors import ConfigError
from mycel.protocols.messages import PeerAddress
from mycel.security.signatures import public_key_of

SERVICE_TYPE = "_mycel._tcp.local."
_PEER_PROPERTY = b"id"
_ADDRESS_PROPERTIES = tuple(f"a{i}".encode() for i in range(MAX_ADDRESSES))
_MAX_TXT_BYTES = 255  # of one "name=value" string
_WAITING_PEERS = 64
_ANSWER_MS = 3000
_CLOSE_S = 5.0


def to_properties(address: PeerAddress) -> dict[bytes, bytes]:
    """What a node says of itself: its peer id, and each address that fits into a TXT string."""
    properties = {_PEER_PROPERTY: address.peer.encode()}
    fitting = [a.encode() for a in sane(address).addresses if len(a.encode()) <= _MAX_TXT_BYTES - len(b"a0=")]
    return properties | dict(zip(_ADDRESS_PROPERTIES, fitting, strict=False))


def from_properties(properties: dict[bytes, bytes | None]) -> PeerAddress | None:
    """The peer that somebody in the network claims to be, or None for anything that is not a whole claim."""
    try:
        peer = (properties.get(_PEER_PROPERTY) or b"").decode("ascii")
        addresses = [(properties.get(name) or b"").decode("ascii") for name in _ADDRESS_PROPERTIES]
    except UnicodeDecodeError:
        return None
    claimed = sane(PeerAddress(peer, tuple(addresses)))
    return claimed if claimed.addresses and public_key_of(peer) is not None else None


@asynccontextmanager
async def open_mdns(
    me: PeerAddress, interfaces: Sequence[str] | None = None
) -> AsyncIterator[trio.MemoryReceiveChannel[PeerAddress]]:
    """Announce `me` (a client without addresses only listens) and receive the others, each whenever it is seen anew.

    `interfaces`: the addresses of those to use; all unless told. A reader that is slow misses repetitions: the channel
    holds a few peers, and the rest are dropped until they are seen again. Raises ConfigError where multicast DNS cannot
    be used at all.
    """
    token = trio.lowlevel.current_trio_token()
    closing = threading.Event()
    # Not 0: the library's thread must not wait for the reader.
    send, receive = trio.open_memory_channel[PeerAddress](_WAITING_PEERS)

    def found(peer: PeerAddress) -> None:
        if peer.peer != me.peer:
            with suppress(trio.RunFinishedError):  # trio may end before the library's thread
                token.run_sync_soon(_offer, send, peer)

    chosen = InterfaceChoice.All if interfaces is None else list(interfaces)
    try:
        _check_interfaces(interfaces or ())
        service = await trio.to_thread.run_sync(partial(Zeroconf, interfaces=chosen, ip_version=IPVersion.V4Only))
    except (OSError, ZeroconfError) as error:
        raise ConfigError(f"multicast DNS cannot be used here: {error}") from None
    try:
        await trio.to_thread.run_sync(_start, service, me, found, closing)
        yield receive
    finally:
        closing.set()
        # Closing says goodbye to the network first, which takes a moment.
        with trio.CancelScope(deadline=trio.current_time() + _CLOSE_S, shield=True):
            await trio.to_thread.run_sync(service.close, abandon_on_cancel=True)
        send.close()
        receive.close()


def _check_interfaces(hosts: Sequence[str]) -> None:
    """Raise OSError for an interface that is not there: the library would notice, too, but leave a socket open."""
    for host in hosts:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.bind((host, 0))


def _offer(send: trio.MemorySendChannel[PeerAddress], peer: PeerAddress) -> None:
    # Full: it will be seen again. Closed: nobody looks any more.
    with suppress(trio.WouldBlock, trio.ClosedResourceError, trio.BrokenResourceError):
        send.send_nowait(peer)


def _start(service: Zeroconf, me: PeerAddress, found: Callable[[PeerAddress], None], closing: threading.Event) -> None:
    """In a thread: announce and browse."""
    if sane(me).addresses:
        # The peer id is unique, so nobody else has the name; asking the network for it first would cost a second.
        service.register_service(_describe(me), cooperating_responders=True)

    def changed(zeroconf: Zeroconf, service_type: str, name: str, state_change: ServiceStateChange) -> None:
        if state_change is ServiceStateChange.Removed or closing.is_set():
            return
        try:
            info = zeroconf.get_service_info(service_type, name, timeout=_ANSWER_MS)
        except (ZeroconfError, NotRunningException):
            return  # a name that makes no sense, or we are closing
        except AssertionError:
            if closing.is_set():
                return  # it asserts that its loop runs, which closing has just ended
            raise
        peer = None if info is None else from_properties(info.properties)
        if peer is not None:
            found(peer)

    ServiceBrowser(service, SERVICE_TYPE, handlers=[changed])


def _describe(me: PeerAddress) -> ServiceInfo:
    hosts, port = _hosts_and_port(sane(me).addresses)
    return ServiceInfo(
        SERVICE_TYPE,
        f"{me.peer}.{SERVICE_TYPE}",
        addresses=[socket.inet_aton(host) for host in hosts],
        port=port,
        properties=to_properties(me),
        server=f"{me.peer[-32:]}.local.",
    )


def _hosts_and_port(addresses: Sequence[str]) -> tuple[list[str], int]:
    """What DNS wants besides the multiaddrs: the IPv4 addresses among them, and the first one's port."""
    hosts: list[str] = []
    port = 0
    for address in addresses:
        parts = address.split("/")
        if len(parts) >= 5 and parts[1] == "ip4" and parts[3] == "tcp" and parts[4].isdecimal():
            try:
                hosts.append(str(ip_address(parts[2])))
            except ValueError:
                continue
            port = port or min(int(parts[4]), 65535)
    return hosts, port
