"""libp2p's swarm, with what it takes to live with it: one security, one muxer, its own limits on, its noise off.

Ring: shell.
"""

from __future__ import annotations

import errno
import ipaddress
import logging
import socket
from collections.abc import Callable, Sequence

import psutil
import trio
from libp2p.abc import IMuxedConn, IRawConnection, ISecureConn
from libp2p.crypto.ed25519 import create_new_key_pair
from libp2p.crypto.x25519 import create_new_key_pair as create_noise_key_pair
from libp2p.network.config import ConnectionConfig, RetryConfig
from libp2p.network.connection import swarm_connection
from libp2p.network.connection.swarm_connection import SwarmConn
from libp2p.network.swarm import Swarm
from libp2p.peer.id import ID
from libp2p.peer.peerstore import PeerStore
from libp2p.rcmgr import ResourceLimits, ResourceManager, new_resource_manager
from libp2p.rcmgr.connection_limits import ConnectionLimits
from libp2p.security.noise.transport import PROTOCOL_ID as NOISE
from libp2p.security.noise.transport import Transport as NoiseTransport
from libp2p.stream_muxer.yamux.yamux import PROTOCOL_ID as YAMUX
from libp2p.stream_muxer.yamux.yamux import Yamux
from libp2p.transport.upgrader import TransportUpgrader
from multiaddr import Multiaddr
from multiaddr.exceptions import Error as MultiaddrError

from mycel.node.libp2p_transport.limits import TransportLimits
from mycel.node.libp2p_transport.tcp import SteadyTcp
from mycel.protocols.errors import ConfigError
from mycel.security.identity import Identity

MakeMuxer = Callable[[ISecureConn, ID], IMuxedConn]


class ConnectionEndedError(Exception):
    """Tells libp2p that a connection is over: its inbound handler gives the slot back, a dial fails."""


class _Upgrader(TransportUpgrader):
    """Noise or nothing, then our Yamux.

    libp2p's default also offers TLS, SecIO and plaintext: whoever sits on the path could refuse the others until both
    sides agree on plaintext.
    """

    def __init__(self, noise: NoiseTransport, make_muxer: MakeMuxer) -> None:
        # The class of the muxer is libp2p's only to name the protocol; upgrade_connection makes ours.
        super().__init__({NOISE: noise}, {YAMUX: Yamux})  # type: ignore[dict-item]
        self._make_muxer = make_muxer

    async def upgrade_connection(self, conn: ISecureConn, peer_id: ID) -> IMuxedConn:
        await self.muxer_multistream.select_transport(conn)
        return self._make_muxer(conn, peer_id)


def quiet_libp2p() -> None:
    """Send libp2p's logging nowhere: our events say what happened. To be called after libp2p was imported."""
    logger = logging.getLogger("libp2p")
    # libp2p removes the handlers of its logger, and Python then prints what children of any level say: a handler that
    # does nothing is what stops it. A higher level alone does not, for some of the children set their own.
    logger.handlers = [logging.NullHandler()]
    logger.propagate = False
    logger.setLevel(logging.CRITICAL + 1)
    # This module logs to the root logger, and so would give it a handler on standard error.
    setattr(swarm_connection, "logging", logger)  # noqa: B010 - the module does not export it


def new_swarm(identity: Identity, tcp: SteadyTcp, make_muxer: MakeMuxer, limits: TransportLimits) -> Swarm:
    """A swarm that runs when its service is started. Its resource manager is on, without what hurts beside a model."""
    key_pair = create_new_key_pair(identity.seed)
    peer_id = ID.from_pubkey(key_pair.public_key)
    assert str(peer_id) == identity.peer_id
    peerstore = PeerStore()
    peerstore.add_key_pair(peer_id, key_pair)
    noise = NoiseTransport(key_pair, create_noise_key_pair().private_key)
    swarm = Swarm(
        peer_id,
        peerstore,
        _Upgrader(noise, make_muxer),
        [tcp],
        retry_config=RetryConfig(max_retries=0),
        connection_config=ConnectionConfig(
            max_connections=limits.max_connections,
            min_connections=0,
            low_watermark=0,  # never dial on its own
            high_watermark=limits.max_connections,  # never prune on its own
            # Above ours: libp2p closes the older of two connections, each side another one.
            max_connections_per_peer=limits.max_connections_per_peer + 4,
            inbound_upgrade_timeout=limits.dial_timeout_s,
            outbound_upgrade_timeout=limits.dial_timeout_s,
        ),
    )
    manager = _resource_manager(limits)
    swarm.set_resource_manager(manager)
    assert swarm._resource_manager is manager, "libp2p's resource manager is off"
    _release_inbound_slots(swarm)
    _forget_stillborn(swarm)
    # It dials nobody here (min_connections is 0), and would remember every client that ever left.
    swarm.auto_connector.record_disconnect = _forget  # type: ignore[method-assign]
    return swarm


def _resource_manager(limits: TransportLimits) -> ResourceManager:
    # Off: limits on the memory of the whole process, which holds a model's weights; a circuit breaker that shuts
    # everyone out after five failures of one; limits that shrink under load; ten connections a second for each peer.
    manager = new_resource_manager(
        # Twice: each inbound connection is counted before and after its handshake.
        limits=ResourceLimits(max_connections=2 * limits.max_connections, max_streams=10**9),
        connection_limits=ConnectionLimits(max_established_total=limits.max_connections),
        enable_memory_limits=False,
        enable_circuit_breaker=False,
        enable_graceful_degradation=False,
    )
    manager.connection_rate_limiter = None
    return manager


def _release_inbound_slots(swarm: Swarm) -> None:
    """libp2p keeps a slot and a task for each inbound connection until the swarm ends; then it refuses all."""
    upgrade = swarm.upgrade_inbound_raw_conn

    async def upgrade_and_wait(raw_conn: IRawConnection, maddr: Multiaddr) -> IMuxedConn:
        muxed_conn = await upgrade(raw_conn, maddr)
        closed = getattr(muxed_conn, "closed", None)
        assert isinstance(closed, trio.Event)
        await closed.wait()
        raise ConnectionEndedError

    swarm.upgrade_inbound_raw_conn = upgrade_and_wait  # type: ignore[method-assign]


def _forget_stillborn(swarm: Swarm) -> None:
    """libp2p registers a connection that closed while it was being added, and keeps it: at 1000 it refuses all."""
    add_conn = swarm.add_conn

    async def add_living(muxed_conn: IMuxedConn, direction: str = "unknown") -> SwarmConn:
        try:
            swarm_conn = await add_conn(muxed_conn, direction)
        finally:
            for known in tuple(swarm.connections.get(muxed_conn.peer_id, ())):
                if known.is_closed:
                    swarm.remove_conn(known)  # type: ignore[arg-type]
        if swarm_conn.is_closed:
            raise ConnectionEndedError("it ended while it was being added")
        return swarm_conn

    swarm.add_conn = add_living  # type: ignore[method-assign]


def _forget(peer_id: ID) -> None:
    """Instead of a book that is never read."""


# ---- listening


async def listen(swarm: Swarm, tcp: SteadyTcp, addresses: Sequence[str]) -> tuple[str, ...]:
    """Listen at multiaddrs such as /ip4/0.0.0.0/tcp/4001; where others can dial. Raises ConfigError if we cannot."""
    maddrs = [_checked(text) for text in addresses]
    if maddrs:
        await swarm.listen(*maddrs)
    bound: list[Multiaddr] = []
    for maddr in maddrs:
        listener = swarm.listeners.get(str(maddr))
        if listener is None:
            error = tcp.listen_errors.get(str(maddr), OSError("it says no reason"))
            in_use = error.errno == errno.EADDRINUSE
            why = "the port is in use" if in_use else (error.strerror or str(error)).lower()
            raise ConfigError(f"cannot listen on {' port '.join(str(value) for _, value in maddr.items())}: {why}")
        bound.extend(listener.get_addrs())
    return tuple(dict.fromkeys(text for maddr in bound for text in _reachable(maddr)))


def _checked(text: str) -> Multiaddr:
    try:
        maddr = Multiaddr(text)
        if [protocol.name for protocol in maddr.protocols()] in (["ip4", "tcp"], ["ip6", "tcp"]):
            return maddr
    except (MultiaddrError, ValueError):
        pass
    raise ConfigError(f"not an address to listen on: {text!r}; it looks like /ip4/0.0.0.0/tcp/4001")


def _reachable(maddr: Multiaddr) -> list[str]:
    """The address, or for the unspecified one those of all interfaces; loopback only where there is nothing else."""
    name = next(iter(maddr.protocols())).name
    host, port = str(maddr.value_for_protocol(name)), maddr.value_for_protocol("tcp")
    if not ipaddress.ip_address(host).is_unspecified:
        return [str(maddr)]
    family = socket.AF_INET6 if name == "ip6" else socket.AF_INET
    found = [address for addresses in psutil.net_if_addrs().values() for address in addresses]
    hosts = [ipaddress.ip_address(a.address.partition("%")[0]) for a in found if a.family == family]
    usable = [ip for ip in hosts if not ip.is_link_local]
    outside = [ip for ip in usable if not ip.is_loopback]
    return [f"/{name}/{ip}/tcp/{port}" for ip in outside or usable]
