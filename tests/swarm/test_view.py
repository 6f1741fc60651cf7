"""The view: newest announcements, in any order, until they expire."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mycel.dht.directory import Located
from mycel.dht.records import Announcement
from mycel.swarm.view import View, ranges, short_id, show_ranges
from tests.swarm.swarms import NAMES, peer, view_of, views

SWARM = bytes(32)


def located(name: str, start: int, end: int, seq: int = 1, expires_at: float = 100.0, **fields) -> Located:
    return Located(name, Announcement(swarm=SWARM, start=start, end=end, **fields), seq, expires_at)


found = st.builds(
    located,
    st.sampled_from(NAMES[:3]),
    st.integers(0, 3),
    st.integers(4, 6),
    seq=st.integers(0, 3),
    expires_at=st.sampled_from([50.0, 100.0]),
    state=st.sampled_from(["serving", "leaving"]),
    block_time_s=st.sampled_from([0.0, 0.1]),
)


def applied(view: View, announcements: list[Located]) -> View:
    for announcement in announcements:
        view = view.apply(announcement)
    return view


def test_an_announcement_becomes_a_peer():
    view = View(4).apply(
        located(
            "a",
            1,
            3,
            seq=7,
            addresses=("/ip4/1.2.3.4/tcp/5",),
            block_time_s=0.1,
            overhead_s=0.2,
            queue_s=0.3,
            kv_free_tokens=10,
            kv_total_tokens=20,
            sessions=2,
            rtts=(("b", 0.5),),
        )
    )
    seen = view.peers["a"]
    assert (seen.start, seen.end, seen.seq, seen.expires_at) == (1, 3, 7, 100.0)
    assert (seen.block_time_s, seen.overhead_s, seen.queue_s) == (0.1, 0.2, 0.3)
    assert (seen.kv_free_tokens, seen.sessions, seen.rtts) == (10, 2, (("b", 0.5),))
    assert seen.address.peer == "a"
    assert seen.address.addresses == ("/ip4/1.2.3.4/tcp/5",)
    assert view.coverage() == (0, 1, 1, 0)
    assert view.missing() == ((0, 1), (3, 4))


def test_the_newest_announcement_counts():
    old, new = located("a", 0, 2, seq=1), located("a", 2, 4, seq=2)
    assert applied(View(4), [new, old]).peers["a"].start == 2
    assert applied(View(4), [old, new]).peers["a"].start == 2


@given(st.lists(found, max_size=8), st.randoms(use_true_random=False))
def test_apply_is_independent_of_order_and_repetition(announcements, random):
    view = applied(View(6), announcements)
    shuffled = announcements * 2
    random.shuffle(shuffled)
    assert applied(View(6), shuffled) == view
    assert applied(view, announcements) == view


@given(st.lists(found, max_size=8), st.sampled_from([0.0, 49.9, 50.0, 99.9, 100.0, 200.0]))
def test_expire_forgets_what_is_over_and_nothing_else(announcements, now):
    view = applied(View(6), announcements)
    kept = view.expire(now)
    assert all(p.expires_at > now for p in kept.peers.values())
    assert all(kept.peers.get(name) == p for name, p in view.peers.items() if p.expires_at > now)
    assert kept.expire(now) == kept


def test_a_view_never_changes():
    view = View(4).apply(located("a", 0, 4))
    view.apply(located("b", 0, 4))
    view.expire(1000.0)
    view.without({"a"})
    assert set(view.peers) == {"a"}
    with pytest.raises(TypeError):
        view.peers["c"] = view.peers["a"]  # type: ignore[index]


@pytest.mark.parametrize(("start", "end"), [(0, 5), (4, 5), (3, 3), (3, 2)])
def test_a_span_outside_the_model_is_not_believed(start, end):
    view = View(4).apply(located("a", 0, 4, seq=1))
    assert view.apply(located("a", start, end, seq=2)) == view


def test_a_leaving_peer_covers_nothing():
    view = view_of(4, peer("a", 0, 4, state="leaving"), peer("b", 1, 3))
    assert view.coverage() == (0, 1, 1, 0)
    assert view.holders(0) == ()
    assert [p.peer for p in view.holders(1)] == ["b"]
    assert set(view.peers) == {"a", "b"}


def test_the_first_of_the_weakest_blocks():
    view = view_of(5, peer("a", 0, 5), peer("b", 0, 2), peer("c", 3, 4))
    assert view.coverage() == (2, 2, 1, 2, 1)
    assert view.weakest() == (2, 1)
    assert View(3).weakest() == (0, 0)


@given(views())
def test_the_ways_to_count_agree(view):
    coverage = view.coverage()
    assert coverage == tuple(len(view.holders(block)) for block in range(view.n_blocks))
    uncovered = {block for start, end in view.missing() for block in range(start, end)}
    assert uncovered == {block for block, replicas in enumerate(coverage) if replicas == 0}
    block, replicas = view.weakest()
    assert coverage[block] == replicas == min(coverage)


def test_without_takes_peers_away():
    view = view_of(4, peer("a", 0, 4), peer("b", 0, 4))
    assert set(view.without({"a", "z"}).peers) == {"b"}


def test_a_model_has_blocks():
    with pytest.raises(ValueError, match="at least one block"):
        View(0)


def test_ranges_and_ids_for_sentences():
    assert ranges([1, 2, 3, 7]) == ((1, 4), (7, 8))
    assert ranges([]) == ()
    assert show_ranges(((1, 4), (7, 8))) == "1:4, 7:8"
    assert short_id("12D3KooWabcdefghijklmnop") == "12D..lmnop"
    assert short_id("a") == "a"


def test_a_rate_is_finite_for_a_peer_that_has_not_measured_itself():
    assert 0 < replace(peer("a", 0, 4), block_time_s=0.0, overhead_s=0.0).steps_per_s < 1e7
    assert peer("a", 0, 4).steps_per_s == pytest.approx(200.0)
