"""Placement: holes are closed first, then the slowest blocks are helped; shares are even in bytes."""

from __future__ import annotations

from itertools import combinations, pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mycel.protocols.errors import ConfigError
from mycel.swarm.placement import capacity_blocks, choose_span, even_spans, judge, show_bytes
from mycel.swarm.throughput import covered_blocks, max_flow, own_supply, supplies
from mycel.swarm.view import View
from tests.swarm.swarms import peer, view_of, views


def test_the_first_node_of_a_swarm_starts_at_the_first_block():
    assert choose_span(View(8), 3, block_time_s=0.001) == (
        0,
        3,
        "blocks 0:3 of 8: nobody served 0:3, 3:8 still nobody's",
    )


def test_nodes_that_come_one_after_another_cover_the_model():
    view, taken = View(28), []
    for name in "abcde":
        start, end, _ = choose_span(view, 6, block_time_s=0.001)
        taken.append((start, end))
        view = view_of(28, *view.peers.values(), peer(name, start, end))
    assert taken == [(0, 6), (6, 12), (12, 18), (18, 24), (22, 28)]
    assert view.missing() == ()


def test_a_hole_is_closed():
    view = view_of(8, peer("a", 0, 3), peer("b", 5, 8), peer("c", 0, 3))
    start, end, reason = choose_span(view, 2, block_time_s=0.001)
    assert (start, end) == (3, 5)
    assert reason == "blocks 3:5 of 8: nobody served 3:5, and the model is whole: 250 tokens a second"


def test_a_hole_too_large_is_begun_at_its_edge():
    assert choose_span(view_of(9, peer("a", 0, 2)), 3, block_time_s=0.001)[:2] == (2, 5)


def test_a_hole_that_can_be_closed_goes_before_a_part_of_a_larger_one():
    view = view_of(10, peer("a", 0, 1), peer("b", 5, 8))
    assert choose_span(view, 2, block_time_s=0.001)[:2] == (8, 10)


def test_the_weakest_stretch_is_helped():
    view = view_of(6, peer("a", 0, 6), peer("b", 0, 2), peer("c", 4, 6))
    start, end, reason = choose_span(view, 2, block_time_s=0.001)
    assert (start, end) == (2, 4)
    assert reason == "blocks 2:4 of 6: the weakest stretch, raises the swarm from 365 to 532 tokens a second"


def test_slow_replicas_are_weaker_than_a_fast_one():
    view = view_of(
        4, peer("a", 0, 2, block_time_s=0.0001), peer("b", 2, 4, block_time_s=0.1), peer("c", 2, 4, block_time_s=0.1)
    )
    assert choose_span(view, 2, block_time_s=0.001)[:2] == (2, 4)


def test_who_can_hold_everything_does():
    view = view_of(4, peer("a", 0, 4))
    for capacity in (4, 9):
        start, end, reason = choose_span(view, capacity, block_time_s=0.001)
        assert (start, end) == (0, 4)
        assert (
            reason
            == "blocks 0:4, the whole model: the weakest stretch, raises the swarm from 200 to 450 tokens a second"
        )


def test_who_joins_counts_and_who_leaves_does_not():
    there = peer("a", 0, 2), peer("b", 2, 4)
    assert choose_span(view_of(4, *there, peer("c", 0, 2, state="joining")), 2, block_time_s=0.001)[:2] == (2, 4)
    leaving = view_of(4, peer("a", 0, 2, state="leaving"), peer("b", 2, 4), peer("c", 2, 4))
    assert choose_span(leaving, 2, block_time_s=0.001)[:2] == (0, 2)


def test_a_slow_link_limits_what_a_peer_adds():
    view = view_of(2, peer("a", 0, 1, overhead_s=0.0), peer("b", 1, 2, overhead_s=0.0, link_bytes_per_s=800.0))
    assert choose_span(view, 1, block_time_s=0.001, bytes_per_token=1.0)[:2] == (1, 2)
    assert choose_span(view, 1, block_time_s=0.001)[:2] == (0, 1)


def test_a_slow_newcomer_is_told_that_it_adds_nothing():
    view = view_of(4, *(peer(name, 0, 4, link_bytes_per_s=100.0) for name in "abc"))
    slow = judge(view, 0, 2, block_time_s=0.007, link_bytes_per_s=1.0, bytes_per_token=1.0)
    assert slow.reason == (
        "this machine is 7 times slower than the median peer; the swarm will route around it unless others leave"
    )
    assert (slow.adds, slow.times_slower) == (False, 7.0)


def test_a_newcomer_is_told_what_it_adds():
    view = view_of(4, peer("a", 0, 2), peer("b", 2, 4))
    assert (
        judge(view, 0, 4, block_time_s=0.001).reason == "this machine raises the swarm from 333 to 583 tokens a second"
    )
    assert judge(view, 0, 4, block_time_s=0.003).reason == (
        "this machine raises the swarm from 333 to 417 tokens a second; it is 3 times slower than the median peer"
    )
    reserve = judge(view, 0, 2, block_time_s=0.001)
    assert not reserve.adds
    assert reserve.reason == (
        "this machine adds nothing to the 333 tokens a second of the swarm, which other blocks limit; "
        "it is a reserve for 0:2"
    )
    hole = judge(view_of(4, peer("a", 0, 2)), 2, 4, block_time_s=1.0)
    assert hole.adds
    assert hole.reason == "this machine closes a hole"


@given(views(), st.integers(1, 6), st.sampled_from([0.0, 0.001, 0.1]))
def test_no_window_covers_more_or_does_more(view, capacity, block_time_s):
    start, end, _ = choose_span(view, capacity, block_time_s=block_time_s)
    assert 0 <= start < end <= view.n_blocks
    assert end - start == min(capacity, view.n_blocks)
    others, own = supplies(view), own_supply(end - start, block_time_s, 0.0, 0.0, 0.0)

    def outcome(first: int) -> tuple[int, float]:
        """(blocks covered, tokens a second) with the newcomer at `first`."""
        given = [*others, own.at(first)]
        return covered_blocks(given).bit_count(), max_flow(given, view.n_blocks).tokens_per_s

    covered, flow = outcome(start)
    for other in range(view.n_blocks - (end - start) + 1):
        other_covered, other_flow = outcome(other)
        assert covered >= other_covered
        assert flow >= other_flow * (1 - 1e-6)


def test_who_can_hold_nothing_is_told():
    with pytest.raises(ConfigError):
        choose_span(View(4), 0, block_time_s=0.001)


MODEL = {"block_bytes": [500] * 28, "kv_bytes_per_token": [2] * 28, "kv_tokens": 60}


def capacity(memory_bytes: int, embed: int = 0, head: int = 0, shared: int = 0) -> int:
    ends = {"embed_bytes": embed, "head_bytes": head, "shared_bytes": shared}
    return capacity_blocks(memory_bytes, **ends, **MODEL)[0]


def test_capacity_counts_the_cache_and_one_end_of_the_model():
    assert capacity(619) == 0
    assert capacity(620) == 1
    assert capacity(6 * 620 + 100, embed=100, head=80) == 6
    assert capacity(6 * 620 + 99, embed=100, head=80) == 5


def test_capacity_for_the_whole_model_counts_both_ends_and_what_they_share_once():
    whole = 28 * 620 + 100 + 80
    assert capacity(whole, embed=100, head=80) == 28
    assert capacity(whole - 1, embed=100, head=80) == 27
    assert capacity(whole - 70, embed=100, head=80, shared=70) == 28


def test_capacity_is_said_in_a_sentence():
    mega = 10**6
    model = {"block_bytes": [500 * mega] * 28, "kv_bytes_per_token": [mega] * 28, "kv_tokens": 120}
    ends = {"embed_bytes": 0, "head_bytes": 0}
    assert capacity_blocks(4_100 * mega, **ends, **model) == (
        6,
        "can host 6 of 28 blocks: 4.1 GB free, 620 MB a block with its KV cache",
    )
    assert capacity_blocks(1, **ends, **model)[1].startswith("can host none of 28 blocks: 1 bytes free")
    assert capacity_blocks(10**11, **ends, **model)[1].startswith("can host all 28 blocks: 100 GB free")
    with_embedding = capacity_blocks(4_100 * mega, embed_bytes=400 * mega, head_bytes=0, **model)[1]
    assert with_embedding.endswith(", 400 MB kept for the embedding or the head")


@given(
    st.integers(0, 5000),
    st.lists(st.tuples(st.integers(1, 300), st.integers(0, 5)), min_size=1, max_size=8),
    st.integers(0, 500),
    st.integers(0, 500),
)
def test_what_fits_by_the_count_fits_wherever_it_lies(memory, blocks, embed, head):
    sizes, caches = [size for size, _ in blocks], [kv for _, kv in blocks]
    count, _ = capacity_blocks(
        memory, block_bytes=sizes, kv_bytes_per_token=caches, embed_bytes=embed, head_bytes=head, kv_tokens=10
    )
    for start in range(len(blocks) - count + 1):
        end = start + count
        needed = sum(sizes[start:end]) + 10 * sum(caches[start:end])
        needed += embed * (start == 0) + head * (end == len(blocks))
        assert count == 0 or needed <= memory


def test_even_spans_of_a_plain_model():
    assert even_spans([1] * 8, 4) == ((0, 2), (2, 4), (4, 6), (6, 8))
    assert even_spans([1] * 8, 1) == ((0, 8),)


def test_even_spans_carry_the_embedding_and_the_head():
    assert even_spans([10] * 8, 3, embed_bytes=40, head_bytes=0) == ((0, 1), (1, 5), (5, 8))


def test_even_spans_with_replicas():
    assert even_spans([1] * 4, 4, replicas=2) == ((0, 2), (2, 4), (0, 2), (2, 4))
    assert even_spans([1] * 4, 5, replicas=2) == ((0, 2), (2, 4), (0, 2), (2, 4), (0, 2))
    assert even_spans([1] * 4, 3, replicas=3) == ((0, 4),) * 3


@pytest.mark.parametrize(("n_nodes", "replicas"), [(5, 1), (10, 2), (0, 1), (2, 3), (2, 0)])
def test_spans_that_would_be_empty_are_refused(n_nodes, replicas):
    with pytest.raises(ConfigError):
        even_spans([1] * 4, n_nodes, replicas=replicas)


@given(st.lists(st.integers(1, 50), min_size=1, max_size=7), st.data(), st.integers(0, 60), st.integers(0, 60))
def test_no_other_cut_has_a_lighter_heaviest_span(sizes, data, embed, head):
    n_nodes = data.draw(st.integers(1, len(sizes)))
    spans = even_spans(sizes, n_nodes, embed_bytes=embed, head_bytes=head)
    assert [block for start, end in spans for block in range(start, end)] == list(range(len(sizes)))
    assert all(start < end for start, end in spans)
    weights = list(sizes)
    weights[0] += embed
    weights[-1] += head

    def heaviest(cuts: tuple[int, ...]) -> int:
        edges = (0, *cuts, len(weights))
        return max(sum(weights[a:b]) for a, b in pairwise(edges))

    best = min(heaviest(cuts) for cuts in combinations(range(1, len(weights)), n_nodes - 1))
    assert heaviest(tuple(start for start, _ in spans[1:])) == best


@pytest.mark.parametrize(
    ("size", "shown"), [(999, "999 bytes"), (1500, "1.5 kB"), (620 * 10**6, "620 MB"), (4.1e9, "4.1 GB")]
)
def test_sizes_for_sentences(size, shown):
    assert show_bytes(int(size)) == shown
