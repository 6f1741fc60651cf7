"""Multicast DNS: what is said and believed, and that two nodes on one interface find each other."""

from __future__ import annotations

import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st

from mycel.node.mdns import from_properties, open_mdns, to_properties
from mycel.protocols.errors import ConfigError
from mycel.protocols.messages import PeerAddress
from mycel.security.identity import Identity

PEER = Identity.from_seed(bytes(32)).peer_id
OTHER = Identity.from_seed(b"\x01" * 32).peer_id
HOME = ["127.0.0.1"]


def test_what_is_said_is_understood() -> None:
    me = PeerAddress(PEER, ("/ip4/127.0.0.1/tcp/4001", "/ip6/::1/tcp/4001"))
    assert from_properties(to_properties(me)) == me


def test_an_address_too_long_for_dns_is_left_out() -> None:
    me = PeerAddress(PEER, ("/dns4/" + "a" * 250, "/ip4/127.0.0.1/tcp/4001"))
    assert from_properties(to_properties(me)) == PeerAddress(PEER, me.addresses[1:])


@pytest.mark.parametrize(
    "properties",
    [
        {},
        {b"id": None},
        {b"id": PEER.encode()},
        {b"id": b"nobody", b"a0": b"/ip4/127.0.0.1/tcp/1"},
        {b"id": PEER.encode(), b"a0": b"nonsense"},
        {b"id": b"\xff\xfe", b"a0": b"/ip4/127.0.0.1/tcp/1"},
        {b"id": PEER.encode(), b"a0": b"/ip4/\xff/tcp/1"},
    ],
)
def test_half_a_claim_is_none(properties: dict) -> None:
    assert from_properties(properties) is None


@given(st.dictionaries(st.sampled_from([b"id", b"a0", b"a1", b"zz"]), st.none() | st.binary(max_size=255)))
def test_any_properties_are_a_peer_or_nothing(properties: dict) -> None:
    claimed = from_properties(properties)
    assert claimed is None or claimed.addresses


@pytest.mark.loopback
def test_two_nodes_find_each_other() -> None:
    async def main() -> None:
        first = PeerAddress(PEER, ("/ip4/127.0.0.1/tcp/4001",))
        second = PeerAddress(OTHER, ("/ip4/127.0.0.1/tcp/4002",))
        with trio.fail_after(30):
            async with open_mdns(first, HOME) as seen_by_first, open_mdns(second, HOME) as seen_by_second:
                assert await seen_by_first.receive() == second
                assert await seen_by_second.receive() == first
                async with open_mdns(PeerAddress(OTHER), HOME) as seen_by_client:
                    assert await seen_by_client.receive() == first

    trio.run(main)


def test_an_interface_that_is_not_there() -> None:
    async def main() -> None:
        async with open_mdns(PeerAddress(PEER), ["192.0.2.77"]):
            pass

    with pytest.raises(ConfigError, match="multicast DNS"):
        trio.run(main)
