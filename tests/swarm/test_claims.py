"""Of those who chose at the same time the first goes on, and the others notice."""

from __future__ import annotations

from itertools import permutations

from mycel.swarm.claims import must_yield
from tests.swarm.swarms import peer, view_of

THERE = (peer("x", 0, 4), peer("y", 4, 8))


def joining(name: str, start: int, end: int):
    return peer(name, start, end, state="joining")


def test_of_two_newcomers_at_one_place_the_second_chooses_again():
    before = view_of(8, *THERE)
    view = view_of(8, *THERE, joining("a", 0, 4), joining("b", 0, 4))
    assert must_yield(view, "a", before) is None
    assert must_yield(view, "b", before) == "chooses again: a came first, and other blocks than 0:4 help more"


def test_two_newcomers_that_do_not_meet_both_go_on():
    before = view_of(8, *THERE)
    view = view_of(8, *THERE, joining("a", 0, 4), joining("b", 4, 8))
    assert must_yield(view, "a", before) is None
    assert must_yield(view, "b", before) is None


def test_two_that_go_for_one_hole_of_two():
    before = view_of(8, peer("x", 2, 6))
    view = view_of(8, peer("x", 2, 6), joining("a", 0, 2), joining("b", 0, 2))
    assert must_yield(view, "a", before) is None
    assert must_yield(view, "b", before) is not None


def test_who_knew_of_the_other_when_it_chose_goes_on():
    """b chose after a had announced its place: there is nothing new to it. And a does not mind b, which comes later."""
    known = view_of(8, *THERE, joining("a", 0, 4))
    view = view_of(8, *THERE, joining("a", 0, 4), joining("b", 0, 4))
    assert must_yield(view, "b", known) is None


def test_who_serves_already_was_first_whatever_its_id():
    before = view_of(8, *THERE)
    view = view_of(8, *THERE, joining("a", 0, 4), peer("b", 0, 4))
    assert must_yield(view, "a", before) is not None


def test_of_movers_that_did_not_know_of_each_other_one_goes_on():
    home = [peer("a", 0, 4), peer("b", 0, 4), peer("c", 0, 4), peer("d", 0, 4)]
    before = view_of(8, *home, peer("y", 4, 8))
    for a, b, c in permutations([(4, 8), (3, 7), (2, 6)]):
        moving = [peer(n, 0, 4, moving_to=to) for n, to in (("a", a), ("b", b), ("c", c))]
        view = view_of(8, *moving, home[3], peer("y", 4, 8))
        assert must_yield(view, "a", before) is None
        for other in "bc":
            assert must_yield(view, other, before) == "goes back to 0:4: a moved at the same time and comes first"


def test_a_mover_goes_back_when_its_blocks_are_left_to_it_alone():
    before = view_of(8, peer("a", 0, 4), peer("b", 0, 4), peer("y", 4, 8))
    view = view_of(8, peer("a", 0, 4, moving_to=(2, 6)), peer("b", 0, 4, state="leaving"), peer("y", 4, 8))
    assert must_yield(view, "a", before) == "goes back to 0:4: nobody else serves 0:2 any more"


def test_a_mover_counts_on_who_will_go_back_and_not_on_who_joins():
    before = view_of(8, peer("a", 0, 4), peer("b", 0, 4), peer("y", 4, 8))
    both = view_of(8, peer("a", 0, 4, moving_to=(4, 8)), peer("b", 0, 4, moving_to=(4, 8)), peer("y", 4, 8))
    assert must_yield(both, "a", before) is None
    joined = view_of(8, peer("a", 0, 4, moving_to=(4, 8)), joining("b", 0, 4), peer("y", 4, 8))
    assert "nobody else serves 0:4" in must_yield(joined, "a", before)


def test_a_newcomer_does_not_stop_a_mover():
    before = view_of(8, peer("b", 0, 4), peer("c", 0, 4), peer("y", 4, 8))
    view = view_of(8, peer("b", 0, 4, moving_to=(4, 8)), peer("c", 0, 4), peer("y", 4, 8), joining("a", 4, 8))
    assert must_yield(view, "b", before) is None
