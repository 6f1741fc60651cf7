"""Tendermint's rules for one peer: locks, proofs of a later quorum, votes for two things, time."""

from __future__ import annotations

import pytest

from mycel.protocols.rounds import NOTHING, Outcome, Proposal, Vote, outcome_digest
from mycel.swarm.rounds.terms import GroupTerms
from mycel.swarm.rounds.voting import Step, Voting

MEMBERS = ("a", "b", "c", "d")
TERMS = GroupTerms(1 << 14, attempt_s=2.0)
RUN = bytes(32)


def outcome(name: str) -> Outcome:
    return Outcome(RUN, "run", 1, NOTHING, (), (), (), (), name.encode().ljust(32), MEMBERS, (0, 0, 0, 0))


A, B = outcome("A"), outcome("B")
DIGEST_A, DIGEST_B = outcome_digest(A), outcome_digest(B)


def proposal(value: Outcome, attempt: int, valid_attempt: int = -1) -> Proposal:
    return Proposal(attempt, MEMBERS[attempt % 4], value, valid_attempt, (), bytes(64))


def vote(peer: str, attempt: int, kind: str, value: bytes) -> Vote:
    return Vote(RUN, "run", 1, attempt, kind, peer, value, bytes(64))


def voting(attempt: int = 0) -> Voting:
    made = Voting(MEMBERS, TERMS)
    made.enter(attempt)
    return made


def locked_on_a() -> Voting:
    made = voting()
    made.propose(proposal(A, 0))
    made.step = Step.PREVOTE
    for peer in "abc":
        made.add(vote(peer, 0, "prevote", DIGEST_A))
    assert made.precommit(frozenset(), 0.0) == DIGEST_A
    made.step = Step.PRECOMMIT
    return made


def test_an_accepted_proposal_is_prevoted_a_refused_one_is_not_and_one_not_judged_waits_for_its_time():
    made = voting()
    assert made.prevote(None, refuted=False, out_of_time=False) is None
    made.propose(proposal(A, 0))
    assert made.prevote(True, refuted=False, out_of_time=False) == DIGEST_A
    assert made.prevote(False, refuted=False, out_of_time=False) == NOTHING
    assert made.prevote(None, refuted=False, out_of_time=False) is None
    assert made.prevote(None, refuted=False, out_of_time=True) == NOTHING


def test_who_is_locked_prevotes_nothing_else_without_proof_that_a_quorum_did_later():
    made = locked_on_a()
    made.enter(1)
    made.propose(proposal(B, 1))
    assert made.prevote(True, refuted=False, out_of_time=False) == NOTHING
    made.enter(3)
    made.propose(proposal(B, 3, valid_attempt=2))
    assert made.prevote(True, refuted=False, out_of_time=False) is None
    for peer in "bcd":
        made.add(vote(peer, 2, "prevote", DIGEST_B))
    assert made.prevote(None, refuted=False, out_of_time=False) == DIGEST_B
    assert made.prevote(None, refuted=True, out_of_time=False) == NOTHING


def test_a_proof_older_than_the_lock_frees_nobody():
    made = voting()
    for peer in "bcd":
        made.add(vote(peer, 0, "prevote", DIGEST_B))
    made.enter(1)
    made.propose(proposal(A, 1))
    made.step = Step.PREVOTE
    for peer in "abc":
        made.add(vote(peer, 1, "prevote", DIGEST_A))
    assert made.precommit(frozenset(), 0.0) == DIGEST_A
    made.enter(2)
    made.propose(proposal(B, 2, valid_attempt=0))
    assert made.prevote(True, refuted=False, out_of_time=False) == NOTHING


def test_a_proof_from_the_future_is_none():
    made = voting(1)
    made.propose(proposal(A, 1, valid_attempt=1))
    assert made.prevote(True, refuted=False, out_of_time=False) == NOTHING


def test_what_i_know_to_be_false_is_not_precommitted_whoever_prevoted_it():
    made = voting()
    made.propose(proposal(A, 0))
    made.step = Step.PREVOTE
    for peer in "abcd":
        made.add(vote(peer, 0, "prevote", DIGEST_A))
    assert made.precommit(frozenset({DIGEST_A}), 0.0) is None
    assert made.locked[0] == -1


def test_a_quorum_for_nothing_ends_the_attempt_and_a_divided_one_when_its_time_is_over():
    made = voting()
    made.step = Step.PREVOTE
    for peer, value in zip("abc", (DIGEST_A, NOTHING, NOTHING), strict=True):
        made.add(vote(peer, 0, "prevote", value))
    assert made.precommit(frozenset(), 10.0) is None
    assert made.wake_at == 12.0
    assert made.precommit(frozenset(), 12.0) == NOTHING
    made.step = Step.PRECOMMIT
    made.add(vote("a", 0, "precommit", NOTHING))
    made.add(vote("b", 0, "precommit", NOTHING))
    assert not made.attempt_over(12.0)
    made.add(vote("c", 0, "precommit", NOTHING))
    assert made.attempt_over(12.0)


def test_who_votes_for_two_outcomes_counts_for_both_but_once_for_each():
    """Otherwise it could show one half a quorum that the other half never sees, and stall the round for ever."""
    made = voting()
    made.propose(proposal(A, 0))
    made.add(vote("d", 0, "prevote", NOTHING))
    for peer in "ab":
        made.add(vote(peer, 0, "prevote", DIGEST_A))
    for _ in range(3):
        made.add(vote("d", 0, "prevote", DIGEST_A))
    assert made.polka(0) == DIGEST_A
    made.add(vote("d", 0, "prevote", DIGEST_B))  # nobody proposed that: not kept
    assert made.proof(0, DIGEST_B) == []


def test_one_liar_alone_calls_nobody_into_a_later_attempt():
    made = voting()
    made.add(vote("d", 900, "prevote", NOTHING))
    assert made.later_attempt() is None
    made.add(vote("c", 7, "prevote", NOTHING))
    assert made.later_attempt() == 7


def test_a_restarted_peer_stands_by_its_votes():
    made = Voting(MEMBERS, TERMS)
    said = [vote("a", 0, "prevote", DIGEST_A), vote("a", 0, "precommit", DIGEST_A), vote("a", 1, "prevote", NOTHING)]
    made.restore(said, [proposal(A, 0)])
    assert (made.attempt, made.step, made.locked) == (1, Step.PREVOTE, (0, DIGEST_A))
    assert made.valid == (0, proposal(A, 0))


@pytest.mark.parametrize(
    ("n_members", "quorum", "n_faulty"), [(1, 1, 0), (3, 3, 0), (4, 3, 1), (7, 5, 2), (64, 43, 21)]
)
def test_any_two_quorums_share_an_honest_member(n_members, quorum, n_faulty):
    made = Voting([str(number) for number in range(n_members)], TERMS)
    assert (made.quorum, made.n_faulty) == (quorum, n_faulty)
    assert 2 * quorum - n_members > n_faulty
