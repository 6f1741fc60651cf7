"""Whose claims are believed, when others step in, and who is proved to lie."""

from __future__ import annotations

from dataclasses import replace

from mycel.protocols.rounds import Claim
from mycel.security.aggregators import parse_rule
from mycel.swarm.rounds.claims import Task, decision_digest, needs_gram, sum_key
from mycel.swarm.rounds.terms import GroupTerms

TERMS = GroupTerms(1 << 14, attempt_s=2.0, patience_s=20.0)
RING = tuple("abcdefg")
ALL = frozenset(RING)
TRUE, FALSE = b"t" * 32, b"f" * 32


def claim(peer: str, value: bytes = TRUE, size: int = 9) -> Claim:
    return Claim(bytes(32), "run", 1, bytes(32), "sum", 0, peer, value, size, b"", bytes(64))


def task(*claims: Claim, now: float = 0.0) -> Task:
    made = Task("sum", bytes(32), 0, RING, 0.0)
    for each in claims:
        made.add(each, now)
    return made


def accepted(made: Task, now: float = 1.0, present: frozenset[str] = ALL) -> bytes | None:
    made.judge(present, TERMS, now)
    return made.accepted[0] if made.accepted else None


def test_a_value_is_accepted_when_the_whole_jury_claims_it():
    assert accepted(task(claim("a"), claim("b"))) is None
    assert accepted(task(claim("a"), claim("b"), claim("c"))) == TRUE


def test_claims_of_others_do_not_fill_the_jury():
    assert accepted(task(claim("a"), claim("b"), claim("e"), claim("f"), claim("g"))) is None


def test_one_contradiction_by_anybody_takes_acceptance_back_until_i_have_computed_it():
    made = task(claim("a"), claim("b"), claim("c"))
    assert accepted(made) == TRUE
    made.add(claim("g", FALSE), 1.0)
    assert accepted(made) is None
    assert made.liars() == []
    made.own = (FALSE, 9)
    assert accepted(made) == FALSE
    assert [each.peer for each in made.liars()] == ["a", "b", "c"]


def test_another_size_of_the_same_value_is_a_contradiction():
    made = task(claim("a"), claim("b"), claim("c", TRUE, 10))
    assert made.disputed()
    assert accepted(made) is None


def test_a_gram_of_a_size_that_cannot_be_is_not_believed_though_all_say_so():
    made = task(claim("a"), claim("b"), claim("c"))
    made.size = 10
    assert accepted(made) is None


def test_who_is_gone_is_replaced_at_once_and_who_is_silent_after_a_while():
    made = task(claim("a"), claim("b"), claim("d"))
    assert made.window(ALL, TERMS, 1.9) == ("a", "b", "c")
    assert accepted(made, present=ALL - {"c"}) == TRUE
    silent = task(claim("a"), claim("b"), claim("d"))
    assert accepted(silent, 1.9) is None
    assert silent.window(ALL, TERMS, 2.0) == tuple("abcdef")
    assert accepted(silent, 2.0) == TRUE


def test_while_nobody_has_claimed_the_first_get_half_of_the_patience():
    made = task()
    assert made.window(ALL, TERMS, 9.9) == ("a", "b", "c")
    assert len(made.window(ALL, TERMS, 10.0)) == 6
    assert made.own_at(TERMS) == 14.0


def test_without_aggregators_only_what_i_computed_counts():
    made = task(*(claim(peer) for peer in RING))
    made.judge(ALL, replace(TERMS, aggregators=0), 100.0)
    assert made.accepted is None


def test_a_sum_is_of_a_set_and_a_decision():
    keys = {sum_key(plan, decision) for plan in (bytes(32), TRUE) for decision in (b"", b"x", b"y")}
    assert len(keys) == 6
    assert decision_digest(b"") == bytes(32)


def test_the_rules_that_need_distances_are_those_of_the_aggregators():
    for rule in ("mean", "median", "trimmed-mean", "meamed", "krum", "geometric-median", "nnm+median", "caf"):
        assert needs_gram(rule) == parse_rule(rule).needs_gram, rule
