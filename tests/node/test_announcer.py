"""What a node says of itself can always be said, and is said again in time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import trio
from hypothesis import given
from hypothesis import strategies as st
from trio.testing import MockClock

from mycel.dht.records import MAX_ADDRESSES, Announcement, decode_announcement, encode_announcement
from mycel.node.announcer import Announcer, announced
from mycel.node.endpoints import MAX_ADDRESS_CHARS
from mycel.protocols.errors import PeerUnreachable


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


@dataclass
class Heard:
    """A directory that remembers what was said and when; its first `deaf` times it hears nothing."""

    deaf: int = 0
    said: list[tuple[float, int, str, float]] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)

    async def announce(self, announcement: Announcement, ttl_s: float) -> int:
        self.deaf -= 1
        if self.deaf >= 0:
            raise PeerUnreachable("", "nobody answers")
        self.said.append((trio.current_time(), announcement.start, announcement.state, ttl_s))
        return 3

    def event(self, name: str, /, **fields: object) -> None:
        self.failures.append(f"{name}: {fields['reason']}")


def announcing(heard: Heard, describe: Callable[[], Announcement]) -> Announcer:
    directory: Any = heard
    return Announcer(directory, describe, heard.event, ttl_s=30.0)


def test_it_is_said_every_third_of_its_life_and_a_change_at_once() -> None:
    heard, now = Heard(), Announcement(bytes(32), 1, 9, state="joining")

    async def main() -> None:
        nonlocal now
        async with trio.open_nursery() as nursery:
            announcer = announcing(heard, lambda: now)
            assert await nursery.start(announcer.run) == 3
            await trio.sleep(15)
            now = Announcement(bytes(32), 2, 9)
            assert await announcer.say() == 3
            await trio.sleep(10)
            nursery.cancel_scope.cancel()

    trio.run(main, clock=MockClock(autojump_threshold=0))
    joining, serving = (1, "joining", 30.0), (2, "serving", 30.0)
    assert heard.said == [(0, *joining), (10, *joining), (15, *serving), (20, *serving)]


def test_a_node_is_ready_once_somebody_heard_of_it() -> None:
    heard = Heard(deaf=2)

    async def main() -> None:
        async with trio.open_nursery() as nursery:
            announcer = announcing(heard, lambda: Announcement(bytes(32), 1, 9))
            assert await nursery.start(announcer.run) == 3
            assert trio.current_time() == 20
            nursery.cancel_scope.cancel()

    trio.run(main, clock=MockClock(autojump_threshold=0))
    assert heard.failures == ["announce.failed: nobody answers"] * 2
