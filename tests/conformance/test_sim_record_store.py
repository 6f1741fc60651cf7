"""The record suite in virtual time: the oracle that simulations use, and the real store over simulated streams."""

from __future__ import annotations

import pytest
import trio

from mycel.dht.kademlia import Kademlia
from mycel.protocols.messages import PeerAddress
from mycel.protocols.ports import RecordStore
from tests.conformance.record_store_suite import CHECKS, Check, Node
from tests.sim.records import SimRecords, SimRecordStore
from tests.sim.transport import SimTransport
from tests.sim.world import World, run_world


class OracleRig:
    """Members of a `SimRecords`."""

    def __init__(self, world: World) -> None:
        self.world = world
        self._records = SimRecords(world, copies=4, staleness_s=2.0)
        self._n_nodes = 0

    async def start(self) -> Node:
        self._n_nodes += 1
        transport = self.world.add_node(f"n{self._n_nodes}")
        return self._node(transport, SimRecordStore(self._records, transport.name))

    @staticmethod
    def _node(transport: SimTransport, store: RecordStore) -> Node:
        return Node(store, transport.identity, PeerAddress(transport.peer_id, transport.addresses))

    async def kill(self, node: Node) -> None:
        self.world.crash(self.world.name_of(node.identity.peer_id))

    def now_s(self) -> float:
        return self.world.unix_time_s()

    async def pass_time(self, duration_s: float) -> None:
        await trio.sleep(duration_s)

    async def settle(self) -> None:
        await trio.sleep(2.5)


class KademliaRig(OracleRig):
    """The real store, each node running it as its program; the first node is everyone's bootstrap."""

    async def start(self) -> Node:
        self._n_nodes += 1
        transport = self.world.add_node(f"n{self._n_nodes}")
        store = Kademlia(transport, transport.identity, self.world.unix_time_s)
        running = trio.Event()

        async def main(transport: SimTransport) -> None:
            async with trio.open_nursery() as nursery:
                await nursery.start(store.run)
                first = self.world.nodes()[0]
                await store.join([PeerAddress(first.peer_id, first.addresses)])
                running.set()

        self.world.start(transport.name, main)
        await running.wait()
        return self._node(transport, store)

    async def settle(self) -> None:
        await trio.sleep(0.5)


@pytest.mark.parametrize("rig", [OracleRig, KademliaRig])
@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_record_store(check: Check, rig: type[OracleRig]) -> None:
    async def scenario(world: World) -> None:
        await check(rig(world))

    for seed in (1, 2):
        run_world(seed, scenario, limit_s=300)
