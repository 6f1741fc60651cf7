"""A membership in the network: transport, record store and directory, opened together and closed together.

Ring: shell.
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

from mycel.dht.directory import Directory
from mycel.dht.kademlia import Kademlia
from mycel.node.background import background
from mycel.node.events import EventSink
from mycel.node.reach import serve_reach
from mycel.node.shaped_transport import shaped
from mycel.protocols.errors import PeerUnreachable
from mycel.protocols.messages import PeerAddress
from mycel.protocols.ports import Transport
from mycel.security.identity import Identity
from mycel.swarm.chaos import Shape

ENGINES = ("auto", "libp2p", "p2pd")


@dataclass(frozen=True, slots=True)
class Network:
    """What a node or a client does with the network."""

    identity: Identity
    transport: Transport
    records: Kademlia
    directory: Directory
    # Where we listen, as seen from here; transport.addresses is what others are told.
    listening: tuple[str, ...] = ()

    async def join(self, bootstrap: Sequence[PeerAddress]) -> None:
        """Enter through known peers. Raises PeerUnreachable if none of them answers."""
        others = [address for address in bootstrap if address.peer != self.identity.peer_id]
        if others and not await self.records.join(others):
            shown = ", ".join(f"{address.peer[-8:]} at {' '.join(address.addresses)}" for address in others[:3])
            raise PeerUnreachable("", f"no peer of the invite answers: {shown}")

    def answering_first(self, bootstrap: Sequence[PeerAddress]) -> list[str]:
        """Peer ids, those that we are connected to first: one that is silent costs every question its time-out."""
        connected = self.transport.connected()
        return sorted((address.peer for address in bootstrap), key=lambda peer: peer not in connected)


@asynccontextmanager
async def open_network(
    identity: Identity,
    listen: Sequence[str],
    event: EventSink,
    *,
    announce: Sequence[str] = (),
    engine: str = "libp2p",
    shape: str = "",
) -> AsyncIterator[Network]:
    """Open everything; without `listen` addresses as a client, which others cannot dial.

    Others are told `announce` in place of the addresses listened on. `engine` is one of ENGINES, `shape` what every
    link is made like (swarm/chaos.py). Raises ConfigError if an address cannot be listened on or the engine does not
    run here.
    """
    links = Shape.parse(shape)
    async with (
        _engine(engine)(identity, listen=listen, announce=announce, event=event) as bare,
        shaped(bare, links) as transport,
        background() as tasks,
    ):
        records = Kademlia(transport, identity, time.time)
        await tasks.start(records.run)
        transport.serve(*serve_reach(bare.came_from, bare.probe, event=event))
        yield Network(identity, transport, records, Directory(records, identity, time.time), bare.listening)


def _engine(name: str) -> Any:
    """The function that opens a transport. Imports late: libp2p takes a second."""
    if name == "p2pd":
        from mycel.node.hivemind_engine.p2pd_transport import open_p2pd_transport

        return open_p2pd_transport
    from mycel.node import libp2p_transport

    return libp2p_transport.open_transport
