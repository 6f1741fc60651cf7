"""Chains for a batch: spread as the rates are, within the memory there is, and each of them a chain."""

from __future__ import annotations

from collections import Counter
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mycel.protocols.errors import RouteUnavailable
from mycel.swarm.batch import MAX_BATCH_CHOICES, choose_batch
from mycel.swarm.routing import Chain, choose_chain
from mycel.swarm.view import View
from tests.swarm.swarms import peer, view_of, views


def batch(view: View, n_streams: int, **arguments) -> tuple[Chain, ...]:
    return choose_batch(view, n_streams, **{"rtts": {}, "max_tokens": 10, **arguments})


def streams(chains: tuple[Chain, ...]) -> Counter[str]:
    return Counter(hop.peer.peer for chain in chains for hop in chain.hops)


def test_streams_are_spread_as_the_rates_are():
    rates = {"a": 1.0, "b": 2.0, "c": 3.0}
    view = view_of(4, *(peer(n, 0, 4, overhead_s=0.0, block_time_s=0.06 / r) for n, r in rates.items()))
    assert streams(batch(view, 12)) == {"a": 2, "b": 4, "c": 6}
    assert streams(batch(view, 1)) == {"c": 1}


def test_what_is_under_way_already_counts():
    view = view_of(4, peer("a", 0, 4), peer("b", 0, 4))
    assert streams(batch(view, 4, load={"a": 2})) == {"a": 1, "b": 3}


def test_each_place_of_a_chain_is_spread_by_itself():
    near = tuple((name, 0.0) for name in ("a1", "a2", "b1", "b2", "b3"))
    firsts = [peer(n, 0, 4, rtts=near, block_time_s=0.01) for n in ("a1", "a2")]
    lasts = [peer(n, 4, 8, rtts=near, block_time_s=0.01) for n in ("b1", "b2", "b3")]
    counts = streams(batch(view_of(8, *firsts, *lasts), 6))
    assert counts == {"a1": 3, "a2": 3, "b1": 2, "b2": 2, "b3": 2}


def test_memory_runs_out_where_streams_were_placed():
    view = view_of(4, peer("a", 0, 4, kv_free_tokens=25), peer("b", 0, 4, block_time_s=1.0))
    assert streams(batch(view, 5)) == {"a": 2, "b": 3}


def test_a_huge_batch_takes_a_bounded_number_of_choices():
    view = view_of(4, peer("a", 0, 4, kv_free_tokens=10**6), peer("b", 0, 4, kv_free_tokens=10**6))
    chains = batch(view, 10 * MAX_BATCH_CHOICES)
    assert len(chains) == 10 * MAX_BATCH_CHOICES
    assert len({id(chain) for chain in chains}) <= MAX_BATCH_CHOICES
    assert max(streams(chains).values()) <= 6 * MAX_BATCH_CHOICES


def test_batches_of_several_clients_do_not_all_begin_with_the_same_peer():
    view = view_of(4, *(peer(f"p{i}", 0, 4) for i in range(4)))
    assert len({batch(view, 1, rng=Random(seed))[0].hops[0].peer.peer for seed in range(40)}) == 4


@given(views(), st.integers(0, 9), st.integers(0, 2**16))
def test_a_batch_covers_every_block_for_each_stream_or_says_what_is_missing(view, n_streams, seed):
    try:
        choose_chain(view, rtts={}, max_tokens=10)
    except RouteUnavailable:
        if n_streams:
            with pytest.raises(RouteUnavailable):
                batch(view, n_streams)
        return
    chains = batch(view, n_streams, rng=Random(seed))
    assert len(chains) == n_streams
    for chain in chains:
        assert [b for hop in chain.hops for b in range(hop.start, hop.end)] == list(range(view.n_blocks))
