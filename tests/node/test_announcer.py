"""What a node says of itself can always be said."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from mycel.dht.records import MAX_ADDRESSES, Announcement, decode_announcement, encode_announcement
from mycel.node.announcer import MAX_ADDRESS_CHARS, announced


def test_the_longest_address_that_fits_is_kept_and_the_next_is_not() -> None:
    longest = "/dns4/".ljust(MAX_ADDRESS_CHARS, "a")
    assert announced([longest + "a", longest, longest, "/dns4/bücher/tcp/1", "nonsense"]) == (longest,)


def test_a_machine_of_many_networks_names_the_first() -> None:
    many = [f"/ip4/192.0.2.{i}/tcp/4001" for i in range(20)]
    assert announced(many) == tuple(many[:MAX_ADDRESSES])


_NEARLY = st.text("/ip4tcdns.:é \n0", max_size=200).map(lambda text: "/ip4/" + text)


@given(st.lists(st.text(max_size=200) | _NEARLY, max_size=12))
def test_any_addresses_make_an_announcement(addresses: list[str]) -> None:
    announcement = Announcement(bytes(32), 0, 1, addresses=announced(addresses))
    assert decode_announcement(encode_announcement(announcement)) == announcement
