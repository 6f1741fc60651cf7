"""Peers of the same network, found by multicast DNS and handed to the record store.

Ring: shell.
"""

from __future__ import annotations

from collections.abc import Sequence

from mycel.node.events import EventSink
from mycel.node.mdns import open_mdns
from mycel.node.network import Network
from mycel.protocols.errors import ConfigError
from mycel.protocols.messages import PeerAddress


async def meet_neighbours(network: Network, event: EventSink, interfaces: Sequence[str] | None = None) -> None:
    """Announce this node inside its network, and join the record store through every peer that is seen, for ever.

    `interfaces`: the addresses of those to use; all unless told.
    """
    me = PeerAddress(network.identity.peer_id, network.transport.addresses)
    try:
        async with open_mdns(me, interfaces) as found:
            async for peer in found:
                if peer.peer not in network.transport.connected():
                    await network.records.join([peer])
                    event("mdns.met", peer=peer.peer)
    except ConfigError as error:
        event("mdns.off", reason=str(error))
