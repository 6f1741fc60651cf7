"""The lookup machine: it ends whatever is answered, never waits for the silent for ever, and finds the nearest."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mycel.dht.keys import distance, position_of
from mycel.dht.lookup import Lookup, LookupLimits
from mycel.protocols.errors import LocalProtocolError
from mycel.protocols.messages import PeerAddress
from mycel.security.envelope import sign_record
from mycel.security.identity import Identity

KEY = position_of("the key")
WRITER = Identity.from_seed(bytes(32))


def peer(i: int) -> PeerAddress:
    return PeerAddress(f"p{i}", (f"/memory/{i}",))


def by_distance(count: int) -> list[PeerAddress]:
    return sorted((peer(i) for i in range(count)), key=lambda each: distance(position_of(each.peer), KEY))


def record(seq: int, value: bytes = b"") -> object:
    return sign_record(WRITER, KEY, seq, 100.0, value)


@pytest.mark.parametrize("seed", range(5))
def test_the_nearest_of_a_network_are_found(seed: int) -> None:
    rng = random.Random(seed)
    network = {each.peer: rng.sample(range(200), 30) for each in by_distance(200)}

    def knows(name: str) -> list[PeerAddress]:
        # Everybody knows some of everybody and all of the nearest 20: what Kademlia's buckets bring about.
        return sorted(
            [peer(i) for i in network[name]] + by_distance(200)[:20],
            key=lambda each: distance(position_of(each.peer), KEY),
        )[:16]

    lookup = Lookup(KEY, "me", LookupLimits(), [peer(rng.randrange(200))])
    while not lookup.done:
        for query in lookup.next_queries():
            lookup.answered(query.peer, knows(query.peer))
    assert list(lookup.closest()[:8]) == by_distance(200)[:8]
    assert lookup.n_queries <= 30


def test_a_silent_peer_is_passed_over_and_may_still_answer() -> None:
    limits = LookupLimits(wanted=2, parallel=1)
    near, middle, far = by_distance(3)
    lookup = Lookup(KEY, "me", limits, [near, middle, far])
    assert lookup.next_queries() == (near,)
    assert lookup.next_queries() == (), "one at a time"
    lookup.slow(near.peer)
    assert lookup.next_queries() == (middle,)
    lookup.answered(middle.peer, [])
    assert lookup.next_queries() == (far,)
    lookup.answered(near.peer, [])
    assert lookup.done
    assert lookup.closest() == (near, middle)
    lookup.answered(far.peer, [])
    assert lookup.closest() == (near, middle, far)


def test_it_waits_for_a_slow_peer_where_there_is_no_other() -> None:
    near, far = by_distance(2)
    lookup = Lookup(KEY, "me", LookupLimits(), [near, far])
    assert set(lookup.next_queries()) == {near, far}
    lookup.answered(near.peer, [])
    lookup.slow(far.peer)
    assert not lookup.done
    lookup.failed(far.peer)
    assert lookup.done


def test_a_read_ends_with_enough_replicas_and_keeps_the_newest() -> None:
    peers = by_distance(6)
    lookup = Lookup(KEY, "me", LookupLimits(enough_replicas=2), peers)
    lookup.next_queries()
    lookup.answered(peers[0].peer, [], [record(3)])
    lookup.answered(peers[1].peer, [], [])
    lookup.answered(peers[0].peer, [], [record(9)])  # a second answer counts for nothing
    assert not lookup.done
    lookup.answered(peers[2].peer, [], [record(2), record(4)])
    assert lookup.done
    assert lookup.next_queries() == ()
    assert [each.seq for each in lookup.records.values()] == [4]


def test_it_has_no_seeds() -> None:
    assert Lookup(KEY, "me", LookupLimits()).done


def test_an_answer_of_somebody_who_was_not_asked() -> None:
    lookup = Lookup(KEY, "me", LookupLimits(parallel=1), by_distance(2))
    lookup.next_queries()
    lookup.answered("stranger", by_distance(9), [record(1)])
    assert not lookup.records
    with pytest.raises(LocalProtocolError):
        lookup.answered(by_distance(2)[1].peer, [])


def test_addresses_of_the_first_witness_are_not_displaced() -> None:
    near, far = by_distance(2)
    lookup = Lookup(KEY, "me", LookupLimits(parallel=1, addresses=3), [near, far])
    lookup.next_queries()
    lookup.answered(near.peer, [PeerAddress(far.peer, ("/lie/1", "/lie/2", "/lie/3"))])
    assert lookup.next_queries() == (PeerAddress(far.peer, (*far.addresses, "/lie/1", "/lie/2")),)


anybody = st.builds(peer, st.integers(0, 300)) | st.just(PeerAddress("me", ("/memory/0",))) | st.just(PeerAddress("x"))


@given(st.lists(anybody, max_size=20), st.integers(0, 3), st.data())
def test_it_ends_whatever_is_answered(seeds: list[PeerAddress], enough: int, data: st.DataObject) -> None:
    limits = LookupLimits(wanted=3, parallel=3, enough_replicas=enough, candidates=12, queries=10)
    lookup = Lookup(KEY, "me", limits, seeds)
    waiting: list[str] = []
    asked: set[str] = set()
    for _ in range(200):
        queries = lookup.next_queries()
        for query in queries:
            assert query.peer != "me"
            assert query.peer not in asked, "nobody is asked twice"
            assert query.addresses
        asked |= {query.peer for query in queries}
        waiting += [query.peer for query in queries]
        if lookup.done:
            break
        assert waiting, "not done and nobody to wait for"
        who = data.draw(st.sampled_from(waiting))
        fate = data.draw(st.sampled_from(["answer", "records", "fail", "slow"]))
        if fate == "slow":
            lookup.slow(who)
            # A driver ends every wait in the end.
            if data.draw(st.booleans()):
                continue
            fate = "fail"
        waiting.remove(who)
        if fate == "fail":
            lookup.failed(who)
        else:
            lookup.answered(who, data.draw(st.lists(anybody, max_size=40)), [record(1)] * (fate == "records"))
    for who in waiting:
        lookup.failed(who)
    for query in lookup.next_queries():
        lookup.failed(query.peer)
    assert len(asked) <= limits.queries
    assert lookup.n_queries <= limits.queries
    closest = [distance(position_of(each.peer), KEY) for each in lookup.closest()]
    assert closest == sorted(closest)
