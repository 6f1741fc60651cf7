"""The download plan: every unit from one source at a time, whatever breaks in between."""

from __future__ import annotations

import random

from hypothesis import given
from hypothesis import strategies as st

from mycel.swarm.fetch_plan import FetchPlan

UNITS = ("embed", "block.0", "block.1", "head")
PEERS = ("a", "b", "c")
holdings = st.fixed_dictionaries({unit: st.sets(st.sampled_from(PEERS)) for unit in UNITS})


def test_the_rarest_unit_comes_first() -> None:
    plan = FetchPlan(UNITS, {"embed": ("a", "b"), "block.0": ("a", "b", "c"), "block.1": ("a",), "head": ("b", "a")})
    assert [plan.claim("a") for _ in range(5)] == ["block.1", "embed", "head", "block.0", None]


def test_a_unit_that_broke_off_can_be_claimed_by_another() -> None:
    plan = FetchPlan(("embed",), {"embed": PEERS})
    assert plan.claim("a") == "embed"
    assert plan.claim("b") is None
    assert plan.useful("b")
    plan.give_back("embed")
    assert plan.claim("b") == "embed"
    plan.done("embed")
    assert plan.finished
    assert not plan.useful("a")


def test_a_unit_is_hopeless_when_nobody_is_left_who_might_have_it() -> None:
    plan = FetchPlan(UNITS, {unit: ("a", "b") for unit in UNITS if unit != "head"})
    assert plan.hopeless() == ("head",)
    assert plan.claim("a") == "embed"
    plan.drop("b")
    plan.lacks("block.1", "a")
    assert plan.hopeless() == ("block.1", "head")
    plan.drop("a")
    assert plan.hopeless() == ("block.0", "block.1", "head")  # embed is still being sent
    plan.give_back("embed")
    assert plan.hopeless() == UNITS
    assert plan.sources == ()


@given(holdings, st.randoms(use_true_random=False))
def test_any_order_of_events_ends_with_every_unit_done_or_hopeless(
    holders: dict[str, set[str]], rng: random.Random
) -> None:
    plan = FetchPlan(UNITS, holders)
    claimed: dict[str, str] = {}
    done: set[str] = set()
    gone: set[str] = set()
    while any(plan.useful(peer) for peer in PEERS) or claimed:
        peer = rng.choice(PEERS)
        if peer not in gone and (unit := plan.claim(peer)) is not None:
            assert unit not in claimed
            assert unit not in done
            assert peer in holders[unit]
            claimed[unit] = peer
        elif claimed:
            unit = rng.choice(sorted(claimed))
            holder = claimed.pop(unit)
            if rng.random() < 0.4:
                plan.done(unit)
                done.add(unit)
                continue
            plan.give_back(unit)
            if rng.random() < 0.3:
                plan.drop(holder)
                gone.add(holder)
    assert done | set(plan.hopeless()) == set(UNITS)
    assert not done & set(plan.hopeless())
    assert plan.finished == (done == set(UNITS))
