"""Routing: right by comparison with all chains there are, and in the ways that a person would check by hand."""

from __future__ import annotations

from collections import Counter
from itertools import groupby, pairwise, product
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mycel.protocols.errors import RouteUnavailable
from mycel.swarm import path
from mycel.swarm.routing import DEFAULT_RTT_S, MAX_CANDIDATES, MAX_DEARER, MAX_RTT_S, Chain, choose_chain
from mycel.swarm.view import View
from tests.swarm.swarms import NAMES, peer, view_of, views

MAX_TOKENS = 50  # some of the drawn peers have room for 100, some for none


def chain_of(view: View, **arguments) -> Chain:
    return choose_chain(view, **{"rtts": {}, "max_tokens": MAX_TOKENS, **arguments})


def walk_of(chain: Chain) -> list[tuple[str, int, int]]:
    return [(hop.peer.peer, hop.start, hop.end) for hop in chain.hops]


# ---- a second opinion: every chain there is, priced from the formula ----


def half_rtt_s(view: View, rtts: dict[str, float], a: str, b: str) -> float:
    announced = [
        rtt_s for x, y in ((a, b), (b, a)) if x in view.peers for other, rtt_s in view.peers[x].rtts if other == y
    ]
    if announced:
        return max(announced) / 2
    return (rtts[a] + rtts[b]) / 2 if a in rtts and b in rtts else DEFAULT_RTT_S / 2


def price(view, rtts, walk, previous=None, following=None) -> tuple[int, float]:
    """(hops without KV memory, seconds a token)."""
    full, seconds = 0, 0.0
    for name, start, end in walk:
        p = view.peers[name]
        full += p.kv_free_tokens < MAX_TOKENS
        seconds += p.queue_s + p.overhead_s + (end - start) * p.block_time_s
    names = [name for name, _, _ in walk]
    if previous is None and following is None and len(names) > 1:
        names = [*names, names[0]]
    names = [n for n in (previous, *names, following) if n is not None]
    return full, seconds + sum(half_rtt_s(view, rtts, a, b) for a, b in pairwise(names))


def all_walks(view, start, end, exclude=frozenset(), cuts=None):
    """Every chain in which no peer is used twice; with `cuts`, only those that hand over at one of them."""
    holders = [[p.peer for p in view.holders(b) if p.peer not in exclude] for b in range(start, end)]
    for owners in product(*holders):
        walk, at = [], start
        for name, run in groupby(owners):
            length = len(list(run))
            walk.append((name, at, at + length))
            at += length
        twice = max(Counter(name for name, _, _ in walk).values()) > 1
        if not twice and (cuts is None or all(begin in cuts for _, begin, _ in walk[1:])):
            yield walk


def check_against_all(request, rtts, cuts=None):
    view, start, end, exclude, previous, following = request
    barred = exclude | {previous, following}
    walks = list(all_walks(view, start, end, barred, cuts))
    arguments = {"start": start, "end": end, "failed": exclude, "previous": previous, "following": following}
    if not walks:
        with pytest.raises(RouteUnavailable) as caught:
            chain_of(view, rtts=rtts, **arguments)
        missing = {block for first, last in caught.value.missing for block in range(first, last)}
        served = {b for b in range(start, end) if any(p.peer not in barred for p in view.holders(b))}
        assert missing == set(range(start, end)) - served
        return
    chain = chain_of(view, rtts=rtts, **arguments)
    walk = walk_of(chain)
    assert walk in list(all_walks(view, start, end, barred))  # once each block, only what is served, nobody excluded
    full, seconds = price(view, rtts, walk, previous, following)
    assert chain.expected_s_per_token == pytest.approx(seconds)
    best_full, best_seconds = min(price(view, rtts, other, previous, following) for other in walks)
    assert full == best_full
    assert seconds <= best_seconds + 1e-9


@st.composite
def requests(draw, **options):
    view = draw(views(**options))
    start = draw(st.integers(0, view.n_blocks - 1))
    end = draw(st.integers(start + 1, view.n_blocks))
    beside = st.none() | st.sampled_from(NAMES)
    exclude = draw(st.frozensets(st.sampled_from(NAMES), max_size=2))
    return view, start, end, exclude, draw(beside), draw(beside)


@settings(max_examples=300)
@given(requests(metric=True))
def test_never_dearer_than_any_chain_where_distances_are_distances(request):
    view, start, end, exclude, previous, following = request
    rtts = dict.fromkeys(NAMES, 0.002)  # for neighbours that are not in the view
    view_only = {None, *view.peers}
    previous, following = (n if n in view_only else None for n in (previous, following))
    check_against_all((view, start, end, exclude, previous, following), rtts)


@settings(max_examples=300)
@given(requests(), st.dictionaries(st.sampled_from(NAMES), st.sampled_from([0.0, 0.001, 0.04])))
def test_never_dearer_than_any_chain_that_hands_over_at_an_end_of_a_span(request, rtts):
    view, _, _, exclude, previous, following = request
    barred = exclude | {previous, following}
    cuts = {edge for p in view.peers.values() if p.serving and p.peer not in barred for edge in (p.start, p.end)}
    check_against_all(request, rtts, cuts)


@given(requests(max_peers=5))
def test_where_the_search_gives_up_the_chain_is_still_a_chain(request):
    view, start, end, exclude, previous, following = request
    barred = exclude | {previous, following}
    arguments = {"start": start, "end": end, "failed": exclude, "previous": previous, "following": following}
    walks = list(all_walks(view, start, end, barred))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(path, "MAX_WALKS", 0)
        if walks:
            walk = walk_of(chain_of(view, **arguments))
            assert walk in walks
            assert price(view, {}, walk)[0] == min(price(view, {}, other)[0] for other in walks)


@given(requests(), st.integers(0, 2**32))
def test_chance_has_its_price_and_its_bound(request, seed):
    view, start, end, exclude, previous, following = request
    arguments = {"start": start, "end": end, "failed": exclude, "previous": previous, "following": following}
    try:
        best = chain_of(view, **arguments)
    except RouteUnavailable:
        with pytest.raises(RouteUnavailable):
            chain_of(view, rng=Random(seed), **arguments)
        return
    drawn = chain_of(view, rng=Random(seed), **arguments)
    assert drawn == chain_of(view, rng=Random(seed), **arguments)
    full, seconds = price(view, {}, walk_of(drawn), previous, following)
    assert full == price(view, {}, walk_of(best), previous, following)[0]
    assert seconds <= best.expected_s_per_token * MAX_DEARER + 1e-9


# ---- by hand ----


def test_two_halves_and_the_sentence():
    view = view_of(8, peer("a", 0, 4, rtts=(("b", 0.004),)), peer("b", 4, 8))
    chain = chain_of(view)
    assert walk_of(chain) == [("a", 0, 4), ("b", 4, 8)]
    assert chain.hops[0].peer == view.peers["a"].address
    # two steps of 1 + 4 ms, there and back 2 ms each
    assert chain.expected_s_per_token == pytest.approx(0.014)
    assert chain.reason == "2 hops, 14.0 ms a token: a 0:4, b 4:8 (the only first hop)"


def test_one_hop_has_no_link_to_pay():
    view = view_of(8, peer("a", 0, 4), peer("b", 4, 8), peer("c", 0, 8))
    chain = chain_of(view)
    assert walk_of(chain) == [("c", 0, 8)]
    assert chain.reason == "1 hop, 9.0 ms a token: c 0:8 (cheapest of 2 first hops)"


def test_a_part_of_a_span_where_the_neighbour_is_faster():
    near = (("b", 0.0001),)
    view = view_of(8, peer("a", 0, 6, block_time_s=0.05, rtts=near), peer("b", 3, 8))
    assert walk_of(chain_of(view)) == [("a", 0, 3), ("b", 3, 8)]


def test_a_peer_is_used_once_even_where_twice_would_be_faster():
    near = tuple((name, 0.0001) for name in "ab")
    view = view_of(8, peer("a", 0, 8, block_time_s=0.02, rtts=near), peer("b", 3, 5, rtts=near))
    assert walk_of(chain_of(view)) == [("a", 0, 8)]


def test_nor_between_neighbours():
    near = tuple((name, 0.0001) for name in "abpq")
    view = view_of(8, peer("a", 0, 8, block_time_s=0.02, rtts=near), peer("b", 3, 5, rtts=near))
    assert walk_of(chain_of(view, previous="p", following="q")) == [("a", 0, 8)]


def test_a_peer_is_kept_for_where_it_is_the_only_one():
    """The cheapest way through the first two blocks uses up x, which alone serves the third."""
    near = tuple((name, 0.0001) for name in "pqwxy")
    view = view_of(
        3,
        peer("x", 0, 3, block_time_s=0.02, rtts=near),
        peer("y", 1, 2, rtts=near),
        peer("w", 0, 1, block_time_s=0.025, rtts=near),
    )
    cheapest = [("w", 0, 1), ("y", 1, 2), ("x", 2, 3)]
    assert walk_of(chain_of(view, previous="p", following="q")) == cheapest
    assert walk_of(chain_of(view)) == cheapest


def test_a_dearer_first_hop_may_close_the_ring_better():
    """Up to z the chains from f and g look alike, f even cheaper; only what follows tells."""
    near = 0.001
    view = view_of(
        3,
        peer("f", 0, 1, rtts=(("m", near), ("y", near), ("z", 1.0))),
        peer("g", 0, 1, rtts=(("m", near), ("y", 0.1), ("z", 0.1))),
        peer("m", 1, 2, rtts=(("y", near), ("z", near))),
        peer("y", 2, 3, queue_s=0.5),
        peer("z", 2, 3),
    )
    assert walk_of(chain_of(view)) == [("g", 0, 1), ("m", 1, 2), ("z", 2, 3)]


def test_the_way_back_to_the_first_hop_counts():
    far, near = 0.5, 0.002
    view = view_of(
        4,
        peer("a", 0, 2, rtts=(("x", near), ("y", 0.004))),
        peer("x", 2, 3, rtts=(("v", near), ("w", near))),
        peer("v", 3, 4, rtts=(("a", far),)),
        peer("w", 3, 4, queue_s=0.01, rtts=(("a", near),)),
    )
    assert walk_of(chain_of(view)) == [("a", 0, 2), ("x", 2, 3), ("w", 3, 4)]


def test_a_queue_sends_requests_elsewhere():
    view = view_of(4, peer("a", 0, 4, queue_s=1.0), peer("b", 0, 4))
    assert walk_of(chain_of(view)) == [("b", 0, 4)]


def test_the_longer_of_two_announced_round_trips_counts():
    view = view_of(4, peer("a", 0, 2, rtts=(("b", 0.1),)), peer("b", 2, 4, rtts=(("a", 0.0),)))
    assert chain_of(view).expected_s_per_token == pytest.approx(0.006 + 0.1)


def test_unknown_links_go_through_the_client_or_cost_the_default():
    view = view_of(4, peer("a", 0, 2), peer("b", 2, 4))
    assert chain_of(view, rtts={"a": 0.01, "b": 0.02}).expected_s_per_token == pytest.approx(0.006 + 0.03)
    assert chain_of(view, rtts={"a": 0.01}).expected_s_per_token == pytest.approx(0.006 + DEFAULT_RTT_S)


def test_an_absurd_round_trip_is_bounded():
    view = view_of(4, peer("a", 0, 2, rtts=(("b", 1e9),)), peer("b", 2, 4))
    assert chain_of(view).expected_s_per_token == pytest.approx(0.006 + MAX_RTT_S)


def test_a_full_peer_only_where_there_is_no_other():
    full = peer("a", 0, 4, kv_free_tokens=MAX_TOKENS - 1)
    other = peer("b", 0, 4, queue_s=100.0)
    assert walk_of(chain_of(view_of(4, full, other))) == [("b", 0, 4)]
    chain = chain_of(view_of(4, full))
    assert walk_of(chain) == [("a", 0, 4)]
    assert chain.expected_s_per_token == pytest.approx(0.005)
    assert chain.reason.endswith("; short of KV memory: a)")


def test_no_route_says_which_blocks_and_why():
    out = [peer("b", 3, 5, state="leaving"), peer("c", 5, 6), peer("d", 3, 8, state="joining"), peer("e", 4, 8)]
    view = view_of(8, peer("a", 0, 3), *out)
    with pytest.raises(RouteUnavailable) as caught:
        chain_of(view, failed=frozenset({"c"}), in_chain=frozenset({"e"}))
    assert caught.value.missing == ((3, 8),)
    assert str(caught.value) == (
        "no live peer serves blocks 3:8 (of those that hold them: 1 failed, 1 in this chain, 1 joining, 1 leaving)"
    )
    with pytest.raises(RouteUnavailable) as caught:
        chain_of(View(8))
    assert str(caught.value) == "no live peer serves blocks 0:8"


def test_a_lost_stretch_is_replaced_between_its_neighbours():
    view = view_of(
        8,
        peer("a", 0, 4, rtts=(("c", 0.2), ("d", 0.01))),
        peer("b", 6, 8, rtts=(("c", 0.2), ("d", 0.01))),
        peer("c", 4, 6),
        peer("d", 2, 7, block_time_s=0.002),
    )
    chain = chain_of(view, start=4, end=6, previous="a", following="b")
    assert walk_of(chain) == [("d", 4, 6)]
    assert chain.expected_s_per_token == pytest.approx(0.001 + 0.004 + 0.01)


def test_a_neighbour_is_not_used_a_second_time():
    view = view_of(4, peer("a", 0, 4))
    with pytest.raises(RouteUnavailable):
        chain_of(view, start=2, previous="a", following="a")


@pytest.mark.parametrize(("start", "end"), [(-1, 2), (2, 2), (3, 2), (0, 5)])
def test_a_range_outside_the_model_is_our_bug(start, end):
    with pytest.raises(ValueError, match="not a range of 4 blocks"):
        chain_of(view_of(4, peer("a", 0, 4)), start=start, end=end)


def drawn(view: View, n_times: int, **arguments) -> Counter[str]:
    """How often each peer is in a chain."""
    rng = Random(2)
    return Counter(hop.peer.peer for _ in range(n_times) for hop in chain_of(view, rng=rng, **arguments).hops)


def test_chance_takes_one_that_is_twice_as_slow_a_quarter_as_often_and_never_a_far_dearer_one():
    costs = {"a": 1.0, "b": 2.0, "c": 1.0, "d": 1.01 * MAX_DEARER}
    view = view_of(1, *(peer(n, 0, 1, queue_s=s, block_time_s=0.0, overhead_s=0.0) for n, s in costs.items()))
    counts = drawn(view, 2000)
    assert set(counts) == {"a", "b", "c"}
    assert counts["a"] / 2000 == pytest.approx(4 / 9, abs=0.04)
    assert counts["b"] / 2000 == pytest.approx(1 / 9, abs=0.03)


@pytest.mark.parametrize("slowest", [1.0, 2.0, 3.9])
@pytest.mark.parametrize("n_fast", [1, 5, 20])
def test_a_burst_of_clients_with_one_view_stampedes_nobody(n_fast, slowest):
    """No peer is asked to do more than about twice its share of the work, as its rate is of all rates."""
    times = {f"fast{i}": 1.0 for i in range(n_fast)} | {f"slow{i}": slowest for i in range(20)}
    view = view_of(4, *(peer(name, 0, 4, block_time_s=0.01 * t, overhead_s=0.0) for name, t in times.items()))
    counts = drawn(view, 100)
    whole = sum(1 / t for t in times.values())
    for name, count in counts.items():
        share = 100 / times[name] / whole
        assert count <= 2 * share + 3 * (2 * share) ** 0.5, (name, count, share)  # within the noise of 100 draws


def test_a_burst_spreads_at_each_place_of_a_chain():
    near = tuple((f"{row}{i}", 0.001) for row in "ab" for i in range(10))
    row = [peer(f"{n}{i}", s, s + 4, block_time_s=0.01, rtts=near) for n, s in (("a", 0), ("b", 4)) for i in range(10)]
    counts = drawn(view_of(8, *row), 1000)
    assert len(counts) == 20
    assert max(counts.values()) < 1.4 * 100


def test_sessions_of_our_own_count_as_a_queue():
    view = view_of(4, peer("a", 0, 4), peer("b", 0, 4, overhead_s=0.002))
    assert walk_of(chain_of(view)) == [("a", 0, 4)]
    chain = chain_of(view, load={"a": 1})
    assert walk_of(chain) == [("b", 0, 4)]
    assert chain_of(view, load={"a": 1, "b": 1}).expected_s_per_token == pytest.approx(2 * 0.005)


def test_in_a_large_swarm_the_only_holder_of_a_block_is_kept():
    crowd = [peer(f"p{i:03d}", 0, 4) for i in range(3 * MAX_CANDIDATES)]
    chain = chain_of(view_of(8, *crowd, peer("alone", 4, 8, queue_s=9.0)))
    assert walk_of(chain) == [("p000", 0, 4), ("alone", 4, 8)]


@given(st.integers(MAX_CANDIDATES + 1, 120), st.integers(0, 2**32))
def test_a_large_swarm_is_still_covered_and_close_to_the_best(n_peers, seed):
    random, view = Random(seed), View(12)
    whole = peer("whole", 0, 12, queue_s=0.2)
    for i in range(n_peers):
        start = random.randrange(12)
        span = (start, random.randint(start + 1, 12))
        member = peer(f"p{i:03d}", *span, block_time_s=random.random() / 100, kv_free_tokens=random.choice([0, 99]))
        view = view_of(12, *view.peers.values(), member)
    chain = chain_of(view_of(12, whole, *view.peers.values()))
    assert [block for hop in chain.hops for block in range(hop.start, hop.end)] == list(range(12))
    assert all(view.peers.get(hop.peer.peer, whole).kv_free_tokens >= MAX_TOKENS for hop in chain.hops)
    assert chain.expected_s_per_token <= 0.2 + 0.013 + 1e-9  # what the whole model on one slow peer takes


def test_many_clients_spread_over_equal_peers():
    view = view_of(4, *(peer(name, 0, 4) for name in NAMES))
    counts = drawn(view, 1000)
    assert set(counts) == set(NAMES)
    assert max(counts.values()) < 1.2 * 200
    assert chain_of(view, rng=Random(1)).reason.endswith("(drawn at 1.00 times the cheapest of 5 first hops)")
