"""A node that is told what to tell others: its invite and its contacts carry that and nothing else."""

from __future__ import annotations

import time
from pathlib import Path

import psutil
import pytest
import trio

from mycel.node.events import no_events
from mycel.node.network import open_network
from mycel.protocols.messages import PeerAddress
from mycel.security.identity import Identity
from mycel.swarm.invite import parse_invite
from tests.loopback.node_process import NodeProcess, Nodes

pytestmark = [pytest.mark.slow, pytest.mark.loopback]

TOLD = ("/ip4/203.0.113.7/tcp/4001", "/dns4/node.example.org/tcp/4001")


def announced(node: NodeProcess) -> tuple[str, ...]:
    """What the directory says of a node, read past the addresses that lead nowhere."""

    async def main() -> tuple[str, ...]:
        listening = [f"/ip4/127.0.0.1/tcp/{port}" for port in ports(node)]
        async with open_network(Identity.generate(), (), no_events) as network:
            await network.join([PeerAddress(node.peer, tuple(listening))])
            (located,) = await network.directory.find(parse_invite(node.invite, time.time()).swarm)
            return located.announcement.addresses

    return trio.run(main)


def ports(node: NodeProcess) -> list[int]:
    found = psutil.Process(node.process.pid).net_connections("tcp")
    return [each.laddr.port for each in found if each.status == psutil.CONN_LISTEN and each.laddr]


def test_others_are_told_what_is_announced(llama: Path, tmp_path: Path) -> None:
    with Nodes(tmp_path, llama) as nodes:
        node = nodes.start_one(blocks=(0, 4), announce=TOLD)
        assert node.serving.addresses == TOLD
        invite = parse_invite(node.invite, time.time())
        assert invite.bootstrap == (PeerAddress(node.peer, TOLD),)
        assert announced(node) == TOLD


def test_contacts_are_told_it_too() -> None:
    """The record store says where it can be dialled with each question."""

    async def main() -> None:
        listen = ("/ip4/127.0.0.1/tcp/0",)
        with trio.fail_after(20):
            async with (
                open_network(Identity.generate(), listen, no_events) as one,
                open_network(Identity.generate(), listen, no_events, announce=TOLD) as other,
            ):
                await other.join([PeerAddress(one.identity.peer_id, one.transport.addresses)])
                found = one.records.table.address_of(other.identity.peer_id)
                assert found is not None
                assert found.addresses == TOLD

    trio.run(main)
