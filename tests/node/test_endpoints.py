"""Addresses that people type and peers claim: what is one, what may be announced, how far it leads."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mycel.dht.records import Announcement, decode_announcement, encode_announcement
from mycel.node.endpoints import Endpoint, checked_announce, parse_endpoint, plain_host, scope_of, tcp_multiaddr
from mycel.protocols.errors import ConfigError
from mycel.security.identity import Identity

PEER = Identity.from_seed(bytes(32)).peer_id


@pytest.mark.parametrize(
    ("text", "endpoint"),
    [
        ("/ip4/192.0.2.1/tcp/4001", Endpoint("ip4", "192.0.2.1", 4001)),
        ("/ip6/2001:DB8:0::1/tcp/1", Endpoint("ip6", "2001:db8::1", 1)),
        ("/dns4/node.example.org/tcp/65535", Endpoint("dns4", "node.example.org", 65535)),
        ("/dns/localhost/tcp/0", Endpoint("dns", "localhost", 0)),
        (f"/ip4/192.0.2.1/tcp/4001/p2p/{PEER}", Endpoint("ip4", "192.0.2.1", 4001, PEER)),
    ],
)
def test_an_endpoint(text: str, endpoint: Endpoint) -> None:
    assert parse_endpoint(text) == endpoint


@pytest.mark.parametrize(
    "text",
    [
        "",
        "192.0.2.1:4001",
        "/ip4/192.0.2.1/udp/4001/quic-v1",
        "/ip4/192.0.2.256/tcp/1",
        "/ip4/::1/tcp/1",
        "/ip6/192.0.2.1/tcp/1",
        "/ip4/192.0.2.1/tcp/65536",
        "/ip4/192.0.2.1/tcp/4001/",
        "/ip4/192.0.2.1/tcp/4001/p2p/nobody",
        "/dns4/-x/tcp/1",
        "/dns4/a..b/tcp/1",
        f"/dns4/{'a' * 64}.org/tcp/1",
        "/ip4/192.0.2.1/tcp/4001\n",
        "/ip4/192.0.2.1/tcp/٤٠٠١",
    ],
)
def test_no_endpoint(text: str) -> None:
    assert parse_endpoint(text) is None


@settings(max_examples=60)
@given(st.text(max_size=80) | st.text("/ip46dnstc.:0123456789ab%-", max_size=40).map(lambda text: "/ip4/" + text))
def test_any_text_is_an_endpoint_or_not(text: str) -> None:
    endpoint = parse_endpoint(text)
    if endpoint is not None:
        assert parse_endpoint(endpoint.multiaddr) == Endpoint(endpoint.kind, endpoint.host, endpoint.port)


@pytest.mark.parametrize(
    ("host", "scope"),
    [
        ("127.8.9.1", "loopback"),
        ("::1", "loopback"),
        ("::ffff:127.0.0.1", "loopback"),
        ("fe80::1%eth0", "link-local"),
        ("169.254.0.1", "link-local"),
        ("10.1.2.3", "private"),
        ("100.64.0.1", "private"),
        ("fd00::1", "private"),
        ("8.8.8.8", "public"),
        ("2606:4700::1111", "public"),
    ],
)
def test_scopes(host: str, scope: str) -> None:
    assert scope_of(host) == scope


def test_two_forms_of_one_host_compare_equal() -> None:
    assert plain_host("::FFFF:192.0.2.1") == plain_host("192.0.2.1") == "192.0.2.1"
    assert tcp_multiaddr("fe80:0::1%3", 5) == "/ip6/fe80::1/tcp/5"


def test_what_is_announced_can_be_said_in_a_record() -> None:
    name = ".".join(["a" * 60, "b" * 60, "org"])
    told = checked_announce(["/ip4/203.0.113.7/tcp/4001", "/ip4/203.0.113.7/tcp/4001", f"/dns4/{name}/tcp/4001"])
    assert len(told) == 2
    announcement = Announcement(bytes(32), 0, 1, addresses=told)
    assert decode_announcement(encode_announcement(announcement)) == announcement


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("203.0.113.7:4001", "not an address to announce"),
        ("/ip4/203.0.113.7/udp/1", "not an address to announce"),
        (f"/ip4/203.0.113.7/tcp/1/p2p/{PEER}", "without /p2p/"),
        ("/ip4/203.0.113.7/tcp/0", "port 0"),
        ("/ip4/0.0.0.0/tcp/1", "not the address of one machine"),
        ("/ip6/ff02::1/tcp/1", "not the address of one machine"),
        ("/dns4/" + ".".join(["a" * 60] * 3) + "/tcp/1", "more than 160 characters"),
    ],
)
def test_what_cannot_be_announced_is_refused_in_one_line(text: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says) as caught:
        checked_announce([text])
    assert "\n" not in str(caught.value)


def test_too_many_addresses_are_refused() -> None:
    with pytest.raises(ConfigError, match="at most 8"):
        checked_announce([f"/ip4/203.0.113.7/tcp/{port}" for port in range(1, 10)])
