"""Being found, and finding, beside the record store: by multicast DNS, and in an existing hivemind DHT.

Ring: shell.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

import trio

from mycel.dht.directory import Directory
from mycel.node.announcer import Announcer
from mycel.node.events import EventSink
from mycel.node.mdns import open_mdns
from mycel.node.network import Network
from mycel.node.station import Station
from mycel.protocols.errors import ConfigError, LocalProtocolError, PeerError
from mycel.protocols.messages import PeerAddress

LAST_WORD_S = 2.0


async def meet_neighbours(network: Network, event: EventSink, interfaces: Sequence[str] | None = None) -> None:
    """Announce this node inside its network, and join the record store through every peer that is seen, for ever.

    `interfaces`: the addresses of those to use; all unless told.
    """
    me = PeerAddress(network.identity.peer_id, network.listening)
    try:
        async with open_mdns(me, interfaces) as found:
            async for peer in found:
                if peer.peer not in network.transport.connected():
                    await network.records.join([peer])
                    event("mdns.met", peer=peer.peer)
    except ConfigError as error:
        event("mdns.off", reason=str(error))


async def announce_in_hivemind(initial: Sequence[str], station: Station, ttl_s: float) -> None:
    """Announce the node in the hivemind DHT that `initial` leads to, for ever; if that cannot be, an event says why."""
    from mycel.node.hivemind_engine.dht_client import open_dht_process
    from mycel.node.hivemind_engine.record_store import open_hivemind_records

    network, event = station.network, station.event
    own = PeerAddress(network.identity.peer_id, network.transport.addresses)
    try:
        async with (
            open_dht_process() as client,
            open_hivemind_records(client, network.identity, time.time, own, initial=initial) as records,
        ):
            directory = Directory(records, network.identity, time.time)
            event("hivemind.announcing", members=" ".join(records.addresses))
            try:
                await Announcer(directory, station.describe, event, ttl_s).run()
            finally:
                with trio.CancelScope(shield=True), trio.move_on_after(LAST_WORD_S):
                    await directory.withdraw(station.model.swarm)
    except (ConfigError, PeerError, LocalProtocolError) as error:  # the last: its process has ended, ours need not
        event("hivemind.off", reason=str(error))
