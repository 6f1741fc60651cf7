"""Who is a member of the next round."""

from __future__ import annotations

from dataclasses import replace

import msgspec
from hypothesis import given
from hypothesis import strategies as st

from mycel.protocols.rounds import MAX_GROUP, NOTHING, Outcome, Request
from mycel.swarm.rounds.membership import gathering, next_members
from mycel.swarm.rounds.terms import GroupTerms, genesis

TERMS = GroupTerms(1, absences=2)
NAMES = "abcdefgh"


def outcome(members: str, missed: tuple[int, ...] | None = None, convicted: str = "") -> Outcome:
    counts = missed or (0,) * len(members)
    return Outcome(NOTHING, "run", 1, NOTHING, (), (), (), (), NOTHING, tuple(members), counts, tuple(convicted))


def wish(peer: str, wants: str) -> Request:
    return Request(NOTHING, "run", 2, peer, wants, bytes(64))


def test_who_contributes_nothing_for_as_many_rounds_as_are_forgiven_is_out():
    first = next_members(outcome("abc"), "ab", (), (), TERMS, {})
    assert (first.members, first.missed) == (("a", "b", "c"), (0, 0, 1))
    second = next_members(outcome("abc", first.missed), "ab", (), (), TERMS, {})
    assert second.members == ("a", "b")
    back = next_members(outcome("abc", first.missed), "abc", (), (), TERMS, {})
    assert back.missed == (0, 0, 0)


def test_a_round_without_any_contribution_is_nobodys_absence():
    assert next_members(outcome("ab", (1, 0)), (), (), (), TERMS, {}).missed == (1, 0)


def test_wishes_are_granted_but_not_to_the_convicted():
    wishes = [wish("d", "member"), wish("a", "leave"), wish("x", "member")]
    after = next_members(outcome("abc", convicted="x"), "abc", wishes, ("b",), TERMS, {})
    assert after.members == ("c", "d")
    assert after.convicted == ("x", "b")


def test_a_group_never_loses_its_last_member():
    assert next_members(outcome("a"), "a", [wish("a", "leave")], (), TERMS, {}).members == ("a",)
    assert next_members(outcome("ab", (1, 1)), "x", (), ("a",), TERMS, {}).members == ("b",)
    assert next_members(outcome("ab"), "ab", (), ("a", "b"), TERMS, {}).members == ("a", "b")


def test_no_more_are_admitted_than_a_group_may_have():
    wishes = [wish(f"p{number:03}", "member") for number in range(MAX_GROUP + 9)]
    assert len(next_members(outcome("a"), "a", wishes, (), TERMS, {}).members) == MAX_GROUP


def test_a_group_gathers_until_it_has_enough():
    founder = genesis(NOTHING, "run", "a")
    assert gathering(founder, GroupTerms(1, min_members=2))
    assert not gathering(founder, TERMS)


@given(
    members=st.sets(st.sampled_from(NAMES), min_size=1),
    there=st.sets(st.sampled_from(NAMES)),
    wishes=st.lists(st.tuples(st.sampled_from(NAMES), st.sampled_from(["member", "leave"]))),
    convicted=st.sets(st.sampled_from(NAMES)),
    data=st.randoms(use_true_random=False),
)
def test_the_order_of_wishes_does_not_matter_and_the_result_is_well_formed(members, there, wishes, convicted, data):
    before = outcome("".join(sorted(members)))
    requests = [wish(*each) for each in wishes]
    after = next_members(before, sorted(there & members), requests, convicted, TERMS, {})
    data.shuffle(requests)
    assert next_members(before, sorted(there & members), requests, convicted, TERMS, {}) == after
    assert after.members
    assert list(after.members) == sorted(set(after.members))
    assert len(after.missed) == len(after.members)
    assert not set(after.members) & convicted or members <= convicted


def test_a_standing_goes_with_its_peer():
    first = next_members(outcome("abc"), "abc", (), (), TERMS, {"a": 5, "c": -7})
    assert first.standing == (5, 0, -7)
    before = msgspec.structs.replace(outcome("abc"), standing=first.standing)
    after = next_members(before, "ab", [wish("b", "leave"), wish("d", "member")], (), TERMS, {"a": 6})
    assert (after.members, after.standing) == (("a", "c", "d"), (6, -7, 0))
    assert next_members(outcome("ab"), "ab", (), (), TERMS, {}).standing == ()


def test_once_begun_a_group_goes_on_with_fewer():
    terms = replace(TERMS, min_members=3)
    assert gathering(outcome("ab"), terms)
    there = next_members(outcome("ab"), (), [wish("c", "member")], (), terms, {})
    assert there.begun
    before = msgspec.structs.replace(outcome("ab"), begun=True)
    assert not gathering(before, terms)
    assert next_members(before, "ab", (), (), terms, {}).begun
