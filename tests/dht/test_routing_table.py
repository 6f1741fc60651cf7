"""The routing table: bounds under anything, who stays, and how the dead are treated."""

from __future__ import annotations

from functools import cache

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from mycel.dht.budget import BudgetLimits, Budgets
from mycel.dht.keys import bucket_index, distance, position_of
from mycel.dht.routing_table import RoutingTable, TableLimits
from mycel.protocols.messages import PeerAddress

SMALL = TableLimits(bucket_size=2, replacements=2, dead=5)


@cache
def in_bucket(index: int, count: int) -> tuple[PeerAddress, ...]:
    """`count` peers of bucket `index` of the peer "me"."""
    mine, found, i = position_of("me"), [], 0
    while len(found) < count:
        i += 1
        if bucket_index(mine, position_of(f"p{i}")) == index:
            found.append(PeerAddress(f"p{i}", (f"/memory/{i}",)))
    return tuple(found)


ALIVE = (in_bucket(1, 1)[0], 1e9)  # somebody who stays: in an empty table nobody is dead


def table(limits: TableLimits = SMALL) -> RoutingTable:
    return RoutingTable("me", limits)


def test_the_nearest_come_first() -> None:
    known = table(TableLimits())
    peers = [PeerAddress(f"p{i}", ("/memory/1",)) for i in range(30)]
    for peer in peers:
        known.heard_from(peer, 0.0)
    key = position_of("somewhere")
    expected = sorted((p for p in peers if p.peer in known), key=lambda p: distance(position_of(p.peer), key))
    assert list(known.closest(key, 8)) == expected[:8]
    assert list(known.closest(key, 8, without=[expected[0].peer])) == expected[1:9]


def test_a_full_bucket_keeps_who_was_there_and_the_latest_wait() -> None:
    known, (a, b, c, d, e) = table(), in_bucket(0, 5)
    assert known.heard_from(a, 0.0)
    assert known.heard_from(b, 1.0)
    assert not any(known.heard_from(peer, 2.0) for peer in (c, d, e))
    known.failed(a, 3.0)
    assert set(known.known_peers()) == {b.peer, e.peer}
    known.failed(b, 3.0)
    assert set(known.known_peers()) == {e.peer, d.peer}, "c had to make place for e in the waiting room"


def test_the_dead_come_back_by_their_own_voice_alone() -> None:
    known, (a, *_) = table(), in_bucket(0, 5)
    known.heard_from(a, 0.0)
    known.heard_from(*ALIVE)
    known.failed(a, 10.0)
    assert a.peer not in known
    assert known.is_dead(a.peer, 69.9)
    assert known.to_probe(69.9, quiet_s=60.0, count=9) == ()
    assert not known.is_dead(a.peer, 70.0)
    assert known.to_probe(70.0, quiet_s=60.0, count=9) == (a,), "its address is kept for a probe"
    assert known.heard_from(a, 71.0)
    assert not known.is_dead(a.peer, 71.0)


def test_the_backoff_grows_and_ends() -> None:
    known, (a, *_) = table(), in_bucket(0, 5)
    known.heard_from(*ALIVE)
    now, waits, probed = 0.0, [], []
    for _ in range(8):
        known.failed(a, now)
        known.failed(PeerAddress(a.peer), now)  # calls that fail together count once
        until = next(now + step for step in range(10, 1000, 10) if not known.is_dead(a.peer, now + step))
        waits.append(until - now)
        now = until
        probed.append(known.to_probe(now, 60.0, 9) == (a,))
    assert waits == [60, 120, 240, 480, 600, 600, 600, 600]
    assert probed == [True] * 5 + [False] * 3, "in the end we ask no more by ourselves"


def test_who_cannot_be_dialled_is_left_out_and_leaves() -> None:
    known, (a, b, c, *_) = table(), in_bucket(0, 5)
    assert not known.heard_from(PeerAddress(a.peer), 0.0)
    for peer in (a, b, c):
        known.heard_from(peer, 0.0)
    known.heard_from(PeerAddress(a.peer), 1.0)  # it became a client
    assert set(known.known_peers()) == {b.peer, c.peer}
    assert not known.heard_from(PeerAddress("me", ("/memory/1",)), 0.0)


def test_quiet_peers_are_probed_longest_first() -> None:
    known, (a, b, *_) = table(), in_bucket(0, 5)
    known.heard_from(b, 1.0)
    known.heard_from(a, 5.0)
    assert known.to_probe(62.0, 60.0, 9) == (b,)
    assert known.to_probe(66.0, 60.0, 9) == (b, a)
    assert known.to_probe(66.0, 60.0, 1) == (b,)


def test_when_everybody_is_dead_it_is_us() -> None:
    known, (a, b, *_) = table(), in_bucket(0, 5)
    known.heard_from(a, 0.0)
    known.heard_from(b, 0.0)
    known.failed(a, 10.0)
    assert known.is_dead(a.peer, 11.0)
    known.failed(b, 12.0)
    assert not known.is_dead(a.peer, 12.0)
    assert set(known.to_probe(12.0, 60.0, 9)) == {a, b}


peers = st.sampled_from([f"p{i}" for i in range(40)] + ["me"])


class Anything(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.table, self.now = table(), 0.0

    @rule(peer=peers, dialable=st.booleans())
    def heard_from(self, peer: str, dialable: bool) -> None:
        stands = self.table.heard_from(PeerAddress(peer, ("/memory/1",) * dialable), self.now)
        assert stands == (peer in self.table)
        assert not self.table.is_dead(peer, self.now)

    @rule(peer=peers)
    def failed(self, peer: str) -> None:
        self.table.failed(PeerAddress(peer, ("/memory/1",)), self.now)
        assert peer not in self.table

    @rule(dt=st.floats(0, 100))
    def wait(self, dt: float) -> None:
        self.now += dt

    @invariant()
    def bounds_hold(self) -> None:
        known = self.table.known_peers()
        assert len(known) == len(set(known)) == len(self.table)
        assert "me" not in known
        assert not any(self.table.is_dead(peer, self.now) for peer in known)
        buckets = [bucket_index(self.table.own_position, position_of(peer)) for peer in known]
        assert all(buckets.count(index) <= SMALL.bucket_size for index in buckets)
        assert len(self.table.to_probe(1e9, 0.0, 10**6)) <= len(known) + SMALL.dead
        assert all(address.addresses for address in self.table.closest(bytes(32), 99))


Anything.TestCase.settings = settings(max_examples=30, stateful_step_count=40)
TestAnything = Anything.TestCase


def test_budgets_slow_down_the_greedy_alone() -> None:
    budgets = Budgets(BudgetLimits(rate_per_s=10.0, burst=5.0, peers=3))
    waits = [budgets.spend("greedy", 0.0) for _ in range(25)]
    assert waits[:5] == [0.0] * 5
    assert waits[-1] == 2.0
    assert budgets.spend("modest", 0.0) == 0.0
    assert budgets.spend("greedy", 10.0) == 0.0
    for i in range(10):
        budgets.spend(f"p{i}", 0.0)
    assert len(budgets) == 3
