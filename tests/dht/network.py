"""A simulated network of record stores, for the tests of this folder."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import trio

from mycel.dht.directory import Directory
from mycel.dht.kademlia import DEFAULTS, Kademlia, KademliaParams
from mycel.dht.records import Announcement
from mycel.protocols.messages import FindRecords, Found, PeerAddress, Stored, StoreRecord
from mycel.protocols.ports import Handler, Stream
from tests.sim.transport import SimTransport
from tests.sim.world import World

SWARM = b"\x05" * 32


class ClientOnly:
    """A transport that only dials: nobody is told where it could be dialled."""

    def __init__(self, transport: SimTransport) -> None:
        self._transport = transport

    peer_id = property(lambda self: self._transport.peer_id)
    addresses: tuple[str, ...] = ()

    async def open(self, peer: str, protocol: str) -> Stream:
        return await self._transport.open(peer, protocol)

    def serve(self, protocol: str, handler: Handler) -> None:
        self._transport.serve(protocol, handler)

    def learn(self, peer: str, addresses: Sequence[str]) -> None:
        self._transport.learn(peer, addresses)

    def rtt_s(self, peer: str) -> float | None:
        return self._transport.rtt_s(peer)

    def connected(self) -> frozenset[str]:
        return self._transport.connected()


class Net:
    """Nodes n0, n1, ... of a world, each with a record store and a directory; n0 is everybody's bootstrap peer."""

    def __init__(self, world: World, params: KademliaParams = DEFAULTS) -> None:
        self.world, self.params = world, params
        self.stores: dict[str, Kademlia] = {}
        self.directories: dict[str, Directory] = {}

    def bootstrap(self) -> list[PeerAddress]:
        first = self.world.node("n0")
        return [PeerAddress(first.peer_id, first.addresses)]

    async def add(self, name: str, *, client: bool = False, bootstrap: list[PeerAddress] | None = None) -> Kademlia:
        """Start a node and have it join."""
        transport = self.world.restart(name) if name in self.stores else self.world.add_node(name)
        port = ClientOnly(transport) if client else transport
        store = Kademlia(port, transport.identity, self.world.unix_time_s, self.params)
        self.stores[name] = store
        self.directories[name] = Directory(store, transport.identity, self.world.unix_time_s)
        ready = trio.Event()
        self.world.start(name, partial(self._run, store, ready))
        await ready.wait()
        await store.join(self.bootstrap() if bootstrap is None else bootstrap)
        return store

    @staticmethod
    async def _run(store: Kademlia, ready: trio.Event, _: SimTransport) -> None:
        async with trio.open_nursery() as nursery:
            await nursery.start(store.run)
            ready.set()

    async def grow(self, n_nodes: int) -> None:
        for i in range(n_nodes):
            await self.add(f"n{i}")

    def keep_announcing(self, name: str, announcement: Announcement, ttl_s: float = 30.0) -> None:
        """What a serving node does, until it crashes."""
        directory = self.directories[name]

        async def main(_: SimTransport) -> None:
            while True:
                await directory.announce(announcement, ttl_s)
                await trio.sleep(ttl_s / 3)

        self.world.start(name, main)

    def make_liar(self, name: str, lie: Callable[[FindRecords | StoreRecord], Found | Stored]) -> None:
        """From now on a node answers with what `lie` makes up; it still asks like anybody."""
        self.stores[name]._service.answer = lambda peer, request, now: lie(request)

    def peer(self, name: str) -> str:
        return self.world.node(name).peer_id

    async def found_by(self, name: str) -> dict[str, Announcement]:
        """Announcements by node name, as `name` sees them."""
        located = await self.directories[name].find(SWARM)
        return {self.world.name_of(each.peer): each.announcement for each in located}

    def true_holders(self, key: bytes, distance: Callable[[bytes, bytes], int], alive: Sequence[str]) -> list[str]:
        """The names of the nodes nearest to a key."""
        return sorted(alive, key=lambda name: distance(self.stores[name].table.own_position, key))


def serving(start: int, end: int, **more: object) -> Announcement:
    return Announcement(SWARM, start, end, **more)
