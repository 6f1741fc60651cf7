"""The expiring store: its invariants hold in any order of puts, sweeps and time."""

from __future__ import annotations

from functools import cache

import msgspec
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from mycel.dht.keys import distance
from mycel.dht.store import ExpiringStore, StoreLimits, record_size_bytes
from mycel.protocols.messages import SignedRecord
from mycel.security.envelope import sign_record
from mycel.security.identity import Identity

WRITERS = [Identity.from_seed(bytes([i]) * 32) for i in range(5)]
KEYS = [bytes([1 << i]) + bytes(31) for i in range(6)]  # KEYS[0] is nearest to OWN, KEYS[5] farthest
OWN = bytes(32)


@cache
def record(writer: int, key: int, seq: int, expires_at: float, size_bytes: int = 4) -> SignedRecord:
    return sign_record(WRITERS[writer], KEYS[key], seq, expires_at, bytes(size_bytes))


def store(**limits: int) -> ExpiringStore:
    return ExpiringStore(OWN, StoreLimits(**limits))


def test_a_record_comes_back_until_it_ends() -> None:
    shelf = store()
    assert shelf.put(record(0, 0, 1, 100.0), 0.0) == (True, "stored")
    assert shelf.put(record(1, 0, 1, 50.0), 0.0).accepted
    assert [r.writer for r in shelf.get(KEYS[0], 49.0)] == sorted(WRITERS[i].peer_id for i in (0, 1))
    assert [r.writer for r in shelf.get(KEYS[0], 50.0)] == [WRITERS[0].peer_id]
    assert shelf.get(KEYS[1], 0.0) == ()
    assert (shelf.sweep(60.0), len(shelf)) == (1, 1)
    assert (shelf.sweep(100.0), len(shelf), shelf.size_bytes) == (1, 0, 0)


def test_only_a_higher_seq_replaces() -> None:
    shelf = store()
    assert shelf.put(record(0, 0, 5, 100.0), 0.0).accepted
    assert shelf.put(record(0, 0, 5, 100.0), 1.0) == (True, "already held")
    assert shelf.put(record(0, 0, 5, 120.0), 1.0) == (False, "seq 5 is not newer than 5")
    assert shelf.put(record(0, 0, 4, 200.0), 1.0) == (False, "seq 4 is not newer than 5")
    assert shelf.put(record(0, 0, 6, 90.0), 1.0).accepted
    assert shelf.get(KEYS[0], 1.0) == (record(0, 0, 6, 90.0),)


def test_what_does_not_verify_is_refused() -> None:
    shelf = store()
    true = record(0, 0, 1, 100.0)
    assert "signature" in shelf.put(msgspec.structs.replace(true, seq=2), 0.0).reason
    assert "expired" in shelf.put(true, 100.0).reason
    assert "longer" in shelf.put(record(0, 0, 1, 1000.0), 0.0).reason
    assert len(shelf) == 0


def test_a_forgery_displaces_nothing() -> None:
    shelf = store(records=1)
    assert shelf.put(record(0, 1, 1, 100.0), 0.0).accepted
    for forged in (
        msgspec.structs.replace(record(0, 1, 1, 100.0), seq=9),
        msgspec.structs.replace(record(1, 0, 1, 100.0), seq=9),
    ):
        assert not shelf.put(forged, 0.0).accepted
    assert shelf.get(KEYS[1], 0.0) == (record(0, 1, 1, 100.0),)


def test_quotas() -> None:
    shelf = store(writers_per_key=2, keys_per_writer=2)
    assert shelf.put(record(0, 0, 1, 100.0), 0.0).accepted
    assert shelf.put(record(1, 0, 1, 10.0), 0.0).accepted
    assert shelf.put(record(2, 0, 1, 100.0), 0.0) == (False, "the key has 2 writers already")
    assert shelf.put(record(0, 0, 2, 100.0), 0.0).accepted, "a present writer may go on"
    assert shelf.put(record(2, 0, 1, 100.0), 10.0).accepted, "the place of an expired record is free"
    assert shelf.put(record(0, 1, 1, 20.0), 10.0).accepted
    assert shelf.put(record(0, 2, 1, 100.0), 10.0) == (False, "the writer has 2 keys already")
    assert shelf.put(record(0, 2, 1, 100.0), 20.0).accepted


def test_a_full_store_keeps_the_nearest_keys() -> None:
    shelf = store(records=3)
    for key in (5, 3, 4):
        assert shelf.put(record(0, key, 1, 100.0), 0.0).accepted
    assert shelf.put(record(0, 1, 1, 100.0), 0.0).accepted
    assert not shelf.get(KEYS[5], 0.0), "the farthest gave way"
    assert shelf.put(record(1, 5, 1, 100.0), 0.0) == (False, "the store is full of records for nearer keys")
    assert shelf.put(record(1, 4, 1, 90.0), 0.0) == (False, "the store is full of records that live longer")
    assert shelf.put(record(1, 4, 1, 110.0), 0.0).accepted
    assert [r.writer for r in shelf.get(KEYS[4], 0.0)] == [WRITERS[1].peer_id]


def test_the_bound_on_bytes() -> None:
    shelf = store(size_bytes=3 * record_size_bytes(record(0, 0, 1, 100.0, 1000)))
    for key in range(6):
        shelf.put(record(0, key, 1, 100.0, 1000), 0.0)
    assert len(shelf) == 3
    assert all(shelf.get(KEYS[key], 0.0) for key in range(3))
    tiny = store(size_bytes=10)
    assert "at most" in tiny.put(record(0, 0, 1, 100.0), 0.0).reason
    assert len(tiny) == 0


class AnyOrder(RuleBasedStateMachine):
    """Against a model: the accepted record with the highest seq of each (key, writer), unless it was displaced."""

    limits = StoreLimits(writers_per_key=3, keys_per_writer=3, records=7, size_bytes=6 * 700)

    def __init__(self) -> None:
        super().__init__()
        self.store = ExpiringStore(OWN, self.limits)
        self.now = 0.0

    def everything(self) -> dict[tuple[int, int], SignedRecord]:
        ids = {writer.peer_id: i for i, writer in enumerate(WRITERS)}
        return {(k, ids[r.writer]): r for k, key in enumerate(KEYS) for r in self.store.get(key, self.now)}

    @rule(
        writer=st.integers(0, 4),
        key=st.integers(0, 5),
        seq=st.integers(0, 4),
        ttl_s=st.integers(-1, 4),
        size_bytes=st.sampled_from([0, 200, 1000]),
        forged=st.booleans(),
    )
    def put(self, writer: int, key: int, seq: int, ttl_s: int, size_bytes: int, forged: bool) -> None:
        true = record(writer, key, seq, max(0.5, self.now + 10.0 * ttl_s), size_bytes)
        given = msgspec.structs.replace(true, signature=bytes(64)) if forged else true
        before = self.everything()
        decision = self.store.put(given, self.now)
        after = self.everything()
        held = before.get((key, writer))
        assert decision.reason
        if decision.accepted:
            assert not forged
            assert given.expires_at > self.now
            assert after[key, writer] == given
            assert held is None or held == given or held.seq < given.seq
        for (k, w), kept in before.items():
            if (k, w) == (key, writer) or (k, w) in after:
                continue
            assert decision.accepted, "a refused record displaces nobody"
            assert distance(KEYS[k], OWN) >= distance(KEYS[key], OWN), "nor does a farther one"
            assert kept.expires_at <= given.expires_at or k != key
        assert {who for who in after if who not in before} <= {(key, writer)}

    @rule(dt=st.floats(0, 30))
    def wait(self, dt: float) -> None:
        self.now += dt

    @rule()
    def sweep(self) -> None:
        before = self.everything()
        self.store.sweep(self.now)
        assert self.everything() == before
        assert len(self.store) == len(before)

    @invariant()
    def bounds_hold(self) -> None:
        everything = self.everything()
        assert len(everything) <= len(self.store) <= self.limits.records
        assert self.store.size_bytes <= self.limits.size_bytes
        assert all(r.expires_at > self.now for r in everything.values())
        for k in range(len(KEYS)):
            assert sum(key == k for key, _ in everything) <= self.limits.writers_per_key
        for w in range(len(WRITERS)):
            assert sum(writer == w for _, writer in everything) <= self.limits.keys_per_writer


AnyOrder.TestCase.settings = settings(max_examples=30, stateful_step_count=30)
TestAnyOrder = AnyOrder.TestCase


@pytest.mark.parametrize("n_keys", [3000])
def test_a_flood_stays_cheap(n_keys: int) -> None:
    """A full store finds its farthest key without looking through all."""
    shelf = ExpiringStore(OWN, StoreLimits(records=500, keys_per_writer=n_keys))
    refused = 0
    for i in range(n_keys):
        key = (i * 2654435761 % 2**32).to_bytes(4, "big") + bytes(28)
        refused += not shelf.put(sign_record(WRITERS[0], key, 1, 100.0, b""), 0.0).accepted
    assert len(shelf) == 500
    assert 0 < refused < n_keys
