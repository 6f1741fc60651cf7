"""A membership in the network: transport, record store and directory, opened together and closed together.

Ring: shell.
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass

from mycel.dht.directory import Directory
from mycel.dht.kademlia import Kademlia
from mycel.node.background import background
from mycel.node.events import EventSink
from mycel.protocols.errors import PeerUnreachable
from mycel.protocols.messages import PeerAddress
from mycel.protocols.ports import Transport
from mycel.security.identity import Identity


@dataclass(frozen=True, slots=True)
class Network:
    """What a node or a client does with the network."""

    identity: Identity
    transport: Transport
    records: Kademlia
    directory: Directory

    async def join(self, bootstrap: Sequence[PeerAddress]) -> None:
        """Enter through known peers. Raises PeerUnreachable if none of them answers."""
        others = [address for address in bootstrap if address.peer != self.identity.peer_id]
        if others and not await self.records.join(others):
            shown = ", ".join(f"{address.peer[-8:]} at {' '.join(address.addresses)}" for address in others[:3])
            raise PeerUnreachable("", f"no peer of the invite answers: {shown}")


@asynccontextmanager
async def open_network(identity: Identity, listen: Sequence[str], event: EventSink) -> AsyncIterator[Network]:
    """Open everything; without `listen` addresses as a client, which others cannot dial.

    Raises ConfigError if an address cannot be listened on.
    """
    from mycel.node.libp2p_transport import open_transport

    async with open_transport(identity, listen=listen, event=event) as transport, background() as tasks:
        records = Kademlia(transport, identity, time.time)
        await tasks.start(records.run)
        yield Network(identity, transport, records, Directory(records, identity, time.time))
