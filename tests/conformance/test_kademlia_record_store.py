"""The record store passes its suite over real connections on loopback (in virtual time: test_sim_record_store)."""

from __future__ import annotations

import time
from functools import partial

import pytest
import trio

from mycel.dht.kademlia import Kademlia
from mycel.node.libp2p_transport import open_transport
from mycel.protocols.messages import PeerAddress
from mycel.security.identity import Identity
from tests.conformance.record_store_suite import CHECKS, Check, Node

LIMIT_S = 60.0


class LoopbackRig:
    """Nodes in this process, each with a listener on 127.0.0.1; the first is everyone's bootstrap."""

    def __init__(self, nursery: trio.Nursery) -> None:
        self._nursery = nursery
        self._scopes: dict[str, tuple[trio.CancelScope, trio.Event]] = {}
        self._bootstrap: list[PeerAddress] = []
        self._skipped_s = 0.0

    async def start(self) -> Node:
        return await self._nursery.start(self._live)

    async def _live(self, *, task_status: trio.TaskStatus[Node]) -> None:
        identity, over = Identity.generate(), trio.Event()
        with trio.CancelScope() as scope:
            async with open_transport(identity, listen=("/ip4/127.0.0.1/tcp/0",)) as transport:
                store = Kademlia(transport, identity, self.now_s)
                async with trio.open_nursery() as nursery:
                    await nursery.start(store.run)
                    await store.join(self._bootstrap)
                    address = PeerAddress(transport.peer_id, transport.addresses)
                    self._bootstrap = self._bootstrap or [address]
                    self._scopes[identity.peer_id] = (scope, over)
                    task_status.started(Node(store, identity, address))
                    await trio.sleep_forever()
        over.set()

    async def kill(self, node: Node) -> None:
        scope, over = self._scopes[node.identity.peer_id]
        scope.cancel()
        await over.wait()

    def now_s(self) -> float:
        return time.time() + self._skipped_s

    async def pass_time(self, duration_s: float) -> None:
        self._skipped_s += duration_s

    async def settle(self) -> None:
        await trio.lowlevel.checkpoint()


@pytest.mark.slow
@pytest.mark.loopback
@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_record_store_on_loopback(check: Check) -> None:
    async def main(check: Check) -> None:
        with trio.fail_after(LIMIT_S):
            async with trio.open_nursery() as nursery:
                await check(LoopbackRig(nursery))
                nursery.cancel_scope.cancel()

    trio.run(partial(main, check))
