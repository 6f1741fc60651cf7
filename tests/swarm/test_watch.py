"""The picture at hand: read once for many, kept through failures, and without whoever's time is over."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from functools import partial

import pytest
import trio
from trio.testing import MockClock

from mycel.dht.directory import Located
from mycel.dht.records import Announcement
from mycel.protocols.errors import PeerUnreachable
from mycel.swarm.watch import REFRESH_S, RETRY_S, SwarmWatch

SWARM = bytes(32)


@dataclass
class Directory:
    """Says what it is told to say, after a while."""

    located: dict[str, Located] = field(default_factory=dict)
    takes_s: float = 0.5
    fails: int = 0
    n_reads: int = 0

    def announce(self, peer: str, seq: int, ttl_s: float, end: int = 4) -> None:
        self.located[peer] = Located(peer, Announcement(SWARM, 0, end), seq, trio.current_time() + ttl_s)

    async def find(self, swarm: bytes) -> tuple[Located, ...]:
        assert swarm == SWARM
        self.n_reads += 1
        await trio.sleep(self.takes_s)
        if self.fails:
            self.fails -= 1
            raise PeerUnreachable("", "nobody answers")
        return tuple(self.located.values())


def run(scenario: Callable[[Directory, SwarmWatch], Awaitable[None]]) -> None:
    async def main() -> None:
        directory = Directory()
        await scenario(directory, SwarmWatch(directory, SWARM, 8, trio.current_time))  # type: ignore[arg-type]

    trio.run(main, clock=MockClock(autojump_threshold=0))


def test_the_first_look_reads_and_the_next_are_at_hand() -> None:
    async def scenario(directory: Directory, watch: SwarmWatch) -> None:
        directory.announce("a", 1, 100)
        assert set((await watch.view()).peers) == {"a"}
        began = trio.current_time()
        directory.announce("b", 1, 100)
        assert set((await watch.view()).peers) == {"a"}
        assert (trio.current_time(), directory.n_reads) == (began, 1)
        assert set((await watch.view(fresh=True)).peers) == {"a", "b"}
        assert directory.n_reads == 2

    run(scenario)


def test_many_that_ask_at_once_share_a_read() -> None:
    async def scenario(directory: Directory, watch: SwarmWatch) -> None:
        directory.announce("a", 1, 100)
        seen: list[set[str]] = []

        async def look() -> None:
            seen.append(set((await watch.view(fresh=True)).peers))

        async with trio.open_nursery() as nursery:
            for _ in range(20):
                nursery.start_soon(look)
        assert seen == [{"a"}] * 20
        assert directory.n_reads == 1

    run(scenario)


@pytest.mark.parametrize("how", ["fails", "is cancelled"])
def test_who_waited_for_a_read_that_came_to_nothing_reads_again(how: str) -> None:
    async def scenario(directory: Directory, watch: SwarmWatch) -> None:
        directory.announce("a", 1, 100)
        directory.fails = how == "fails"

        async def first() -> None:
            with trio.move_on_after(0.2 if how == "is cancelled" else 9), pytest.raises(PeerUnreachable):
                await watch.refresh()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(first)
            await trio.sleep(0.1)
            assert set((await watch.view()).peers) == {"a"}
        assert directory.n_reads == 2

    run(scenario)


def test_whose_time_is_over_is_gone_also_while_nobody_answers() -> None:
    async def scenario(directory: Directory, watch: SwarmWatch) -> None:
        directory.announce("a", 1, 3.0)
        directory.announce("b", 1, 30.0)
        assert set((await watch.view()).peers) == {"a", "b"}
        directory.fails = 10**6
        async with trio.open_nursery() as nursery:
            nursery.start_soon(watch.run)
            await trio.sleep(3.0)
            assert set((await watch.view()).peers) == {"b"}
            await trio.sleep(20.0)
            assert set((await watch.view()).peers) == {"b"}
            await trio.sleep(10.0)
            assert (await watch.view()).peers == {}
            nursery.cancel_scope.cancel()
        assert directory.n_reads > 33 / (RETRY_S + directory.takes_s) - 2, "failures do not end the watching"

    run(scenario)


def test_nobody_waits_for_a_read_that_is_under_way_unless_he_wants_it() -> None:
    """A session whose hop failed has a fresh view read beside its own work, and everybody gets it."""

    async def scenario(directory: Directory, watch: SwarmWatch) -> None:
        directory.announce("a", 1, 100)
        await watch.view()
        directory.announce("b", 1, 100)
        directory.takes_s = 3.0
        async with trio.open_nursery() as nursery:
            nursery.start_soon(partial(watch.view, fresh=True))
            for _ in range(5):
                began = trio.current_time()
                assert set((await watch.view()).peers) == {"a"}
                assert trio.current_time() == began
                await trio.sleep(0.5)
        assert set((await watch.view()).peers) == {"a", "b"}
        assert directory.n_reads == 2

    run(scenario)


def test_a_read_that_failed_is_repeated_soon() -> None:
    async def scenario(directory: Directory, watch: SwarmWatch) -> None:
        directory.announce("a", 1, 100)
        directory.fails = 1
        async with trio.open_nursery() as nursery:
            nursery.start_soon(watch.run)
            await trio.sleep(2 * directory.takes_s + RETRY_S + 0.1)
            assert directory.n_reads == 2
            assert set((await watch.view()).peers) == {"a"}
            await trio.sleep(REFRESH_S)
            assert directory.n_reads == 3
            nursery.cancel_scope.cancel()

    run(scenario)


def test_the_newest_word_of_a_peer_counts() -> None:
    async def scenario(directory: Directory, watch: SwarmWatch) -> None:
        directory.announce("a", 5, 100, end=6)
        assert (await watch.view()).peers["a"].end == 6
        directory.announce("a", 4, 100, end=2)  # a holder that missed the newest
        assert (await watch.view(fresh=True)).peers["a"].end == 6
        directory.announce("a", 6, 100, end=3)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(watch.run)
            await trio.sleep(1.0)
            assert (await watch.view()).peers["a"].end == 3
            nursery.cancel_scope.cancel()

    run(scenario)
