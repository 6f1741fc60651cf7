"""The download plan: every chunk comes, whatever breaks in between, and one unit from many at once."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mycel.swarm.fetch_plan import PATIENCE_S, FetchPlan, Piece

UNITS = ("embed", "block.0", "block.1", "head")
PEERS = ("a", "b", "c")
ONE_EACH = dict.fromkeys(UNITS, (0,))
holdings = st.fixed_dictionaries({unit: st.sets(st.sampled_from(PEERS)) for unit in UNITS})
lacking = st.fixed_dictionaries({unit: st.sets(st.integers(0, 5)) for unit in UNITS})


def test_the_rarest_unit_comes_first() -> None:
    holders = {"embed": ("a", "b"), "block.0": PEERS, "block.1": ("a",), "head": ("b", "a")}
    plan = FetchPlan(ONE_EACH, holders)
    claims = [plan.claim("a", 0.0) for _ in range(5)]
    assert claims == [Piece("block.1", 0), Piece("embed", 0), Piece("head", 0), Piece("block.0", 0), None]


def test_one_unit_comes_from_all_who_have_it_in_order() -> None:
    plan = FetchPlan({"embed": range(6)}, {"embed": PEERS})
    claims = [(peer, plan.claim(peer, 0.0)) for peer in ("a", "b", "c", "a", "c", "b")]
    assert [piece.chunk for _, piece in claims if piece] == [0, 1, 2, 3, 4, 5]
    assert [plan.done(piece) for _, piece in claims if piece] == [False] * 5 + [True]
    assert plan.finished


def test_what_broke_off_is_the_next_that_anybody_claims() -> None:
    plan = FetchPlan({"embed": range(4)}, {"embed": PEERS})
    first, second = plan.claim("a", 0.0), plan.claim("a", 0.0)
    assert first is not None
    assert second is not None
    assert plan.claim("b", 0.0) == Piece("embed", 2)
    plan.give_back(first, "a")
    plan.give_back(first, "a")  # once is enough
    plan.drop("a")
    assert not plan.useful("a")
    assert plan.claim("b", 0.0) == first
    assert plan.claim("b", 0.0) == Piece("embed", 3)
    assert plan.claim("b", PATIENCE_S) == second  # not given back yet, and late
    plan.give_back(second, "a")
    assert plan.claim("c", 1.0) is None


def test_a_chunk_that_takes_too_long_is_asked_of_a_second_source_when_nothing_else_is_left() -> None:
    plan = FetchPlan({"embed": range(2), "head": [0]}, {"embed": ("a", "b", "c"), "head": ("b",)})
    slow = plan.claim("a", 0.0)
    assert slow == Piece("embed", 0)
    assert plan.claim("b", PATIENCE_S) == Piece("head", 0)
    assert plan.claim("b", PATIENCE_S) == Piece("embed", 1)
    assert plan.claim("b", PATIENCE_S - 0.1) is None
    assert plan.claim("b", PATIENCE_S) == slow
    assert plan.claim("c", PATIENCE_S * 1.5) is None  # two are enough
    plan.give_back(slow, "a")
    assert plan.wanted(slow)
    assert plan.claim("a", PATIENCE_S * 1.5) is None  # the second one is still asked, and not late
    plan.done(slow)
    assert not plan.wanted(slow)
    plan.give_back(slow, "b")
    assert plan.claim("c", PATIENCE_S * 1.9) is None


def test_a_unit_is_hopeless_when_nobody_is_left_who_might_have_it() -> None:
    plan = FetchPlan(ONE_EACH, {unit: ("a", "b") for unit in UNITS if unit != "head"})
    assert plan.hopeless() == ("head",)
    embed = plan.claim("a", 0.0)
    assert embed == Piece("embed", 0)
    plan.drop("b")
    assert plan.lacks("block.1", "a")
    assert not plan.lacks("block.1", "a")
    assert plan.hopeless() == ("block.1", "head")
    plan.drop("a")
    assert plan.hopeless() == ("block.0", "block.1", "head")  # embed is still being sent
    plan.give_back(embed, "a")
    assert plan.hopeless() == UNITS
    assert plan.sources == ()
    plan.offer("head", "c")
    assert plan.hopeless() == UNITS[:3]
    assert plan.claim("c", 0.0) == Piece("head", 0)


def test_a_unit_that_is_all_here_takes_no_part() -> None:
    plan = FetchPlan({"embed": (), "head": (3,)}, {"embed": (), "head": ("a",)})
    assert plan.hopeless() == ()
    assert plan.claim("a", 0.0) == Piece("head", 3)
    assert plan.done(Piece("head", 3))
    assert not plan.done(Piece("head", 3))
    assert plan.finished


@given(lacking, holdings, st.randoms(use_true_random=False))
def test_any_order_of_events_ends_with_every_chunk_done_or_its_unit_hopeless(
    missing: dict[str, set[int]], holders: dict[str, set[str]], rng: random.Random
) -> None:
    plan = FetchPlan(missing, holders)
    claimed: list[tuple[Piece, str]] = []
    done: set[Piece] = set()
    gone: set[str] = set()
    now = 0.0
    while any(plan.useful(peer) for peer in PEERS) or claimed:
        now += rng.choice((0.0, PATIENCE_S))
        peer = rng.choice(PEERS)
        if (piece := plan.claim(peer, now)) is not None:
            assert peer not in gone
            assert piece not in done
            assert piece.chunk in missing[piece.unit]
            assert peer in holders[piece.unit]
            others = [other for taken, other in claimed if taken == piece]
            assert len(others) < 2
            assert peer not in others
            claimed.append((piece, peer))
        elif claimed:
            piece, peer = claimed.pop(rng.randrange(len(claimed)))
            if rng.random() < 0.4:
                before = piece in done
                assert plan.wanted(piece) != before
                plan.done(piece)
                done.add(piece)
            elif rng.random() < 0.3:
                plan.drop(peer)
                gone.add(peer)
            plan.give_back(piece, peer)
    wanted = {Piece(unit, chunk) for unit, chunks in missing.items() for chunk in chunks}
    assert {piece.unit for piece in wanted - done} == set(plan.hopeless())
    assert plan.finished == (done == wanted)


@pytest.mark.parametrize("unit", UNITS)
def test_without_holders_every_unit_that_lacks_something_is_hopeless(unit: str) -> None:
    assert FetchPlan({unit: [0]}, {}).hopeless() == (unit,)
