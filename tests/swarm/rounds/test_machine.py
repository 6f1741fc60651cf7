"""What a machine refuses, keeps and ignores; any order of messages; real signatures."""

from __future__ import annotations

import hashlib
import math
from contextlib import suppress
from dataclasses import replace

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mycel.protocols.errors import LocalProtocolError, RemoteProtocolError, VerificationError
from mycel.protocols.rounds import (
    NOTHING,
    Certificate,
    Claim,
    Held,
    Joining,
    Offer,
    Outcome,
    Plan,
    Proposal,
    Request,
    Vote,
    offer_digest,
    outcome_digest,
    vote_part,
)
from mycel.security.identity import Identity
from mycel.swarm.rounds.actions import Collect, Commit, FallenBehind, FetchOffers, Name, Reduce, Remember, Repeat, Say
from mycel.swarm.rounds.machine import RoundMachine, make_offer
from mycel.swarm.rounds.statements import UNSIGNED, sign
from mycel.swarm.rounds.terms import GroupTerms

RUN, STATE = bytes(range(32)), b"s" * 32
TERMS = GroupTerms(1 << 15, patience_s=20.0, attempt_s=2.0, longest_grace_s=4.0)
PEERS = sorted((Identity.from_seed(bytes([number]) * 32) for number in range(4)), key=lambda peer: peer.peer_id)
NAMES = tuple(peer.peer_id for peer in PEERS)
FIRST = Outcome(RUN, "run", 0, NOTHING, (), (), (), (), NOTHING, NAMES, (0, 0, 0, 0))
ME, OTHER, THIRD = PEERS[0], PEERS[1], PEERS[2]
PLACE = (RUN, "run", 1)


def machine(terms: GroupTerms = TERMS, votes=()) -> RoundMachine:
    made = RoundMachine(ME, terms, FIRST, STATE, votes)
    made.start(0.0)
    made.present(frozenset(NAMES), 0.0)
    return made


def offer_of(peer: Identity, weight: int = 1, outcome: Outcome = FIRST) -> Offer:
    bodies = [hashlib.sha256(f"{peer.peer_id}{shard}".encode()).digest() for shard in range(2)]
    return make_offer(peer, outcome, STATE, weight=weight, bodies=bodies, sizes=[10, 10])


def vote_of(peer: Identity, value: bytes, kind: str = "prevote", attempt: int = 0) -> Vote:
    return sign(peer, Vote(*PLACE, attempt, kind, peer.peer_id, value, UNSIGNED))


def certificate(signers, outcome: Outcome | None = None) -> Certificate:
    decided = outcome or Outcome(*PLACE, outcome_digest(FIRST), (), (), (), (), NOTHING, NAMES, (0, 0, 0, 0))
    covered = vote_part(decided, 0, "precommit", outcome_digest(decided))
    return Certificate(decided, 0, tuple(peer.peer_id for peer in signers), tuple(p.sign(covered) for p in signers))


def test_a_false_signature_is_its_senders_fault():
    forged = msgspec.structs.replace(offer_of(OTHER), weight=9)
    with pytest.raises(RemoteProtocolError, match="false signature") as caught:
        machine().receive(THIRD.peer_id, forged, 1.0)
    assert caught.value.peer == THIRD.peer_id


@pytest.mark.parametrize(
    ("statement", "why"),
    [
        (Held(1, 2, ()), "shard 2 of 2"),
        (Joining(b"x" * 32, "run", 1, NOTHING, STATE), "another group"),
        (Joining(RUN, "else", 1, NOTHING, STATE), "another group"),
        (sign(OTHER, Plan(RUN, "else", 1, 0, OTHER.peer_id, (), UNSIGNED)), "another group"),
        (sign(OTHER, Claim(*PLACE, NOTHING, "sum", 2, OTHER.peer_id, NOTHING, 1, b"", UNSIGNED)), "shard 2 of 2"),
        (sign(OTHER, Claim(*PLACE, NOTHING, "gram", 0, OTHER.peer_id, NOTHING, 4, b"abcd", UNSIGNED)), "another hash"),
        (sign(OTHER, Claim(*PLACE, NOTHING, "gram", 0, OTHER.peer_id, NOTHING, 9, b"abcd", UNSIGNED)), "another size"),
        (sign(OTHER, Claim(*PLACE, NOTHING, "sum", 0, OTHER.peer_id, NOTHING, 9, b"abcd", UNSIGNED)), "with data"),
        (make_offer(OTHER, FIRST, STATE), "nothing"),
        (make_offer(OTHER, FIRST, STATE, bodies=[NOTHING], sizes=[1]), "1 bodies, not 2"),
        (make_offer(OTHER, FIRST, STATE, bodies=[NOTHING] * 2, sizes=[1, 1 << 30]), "more than a vector"),
    ],
)
def test_what_is_out_of_form_breaks_the_rules(statement, why):
    with pytest.raises(RemoteProtocolError, match=why):
        machine().receive(OTHER.peer_id, statement, 1.0)


def test_only_whose_turn_it_is_may_plan():
    made = machine()
    turn = next(attempt for attempt in range(4) if made._round.proposers[attempt] != OTHER.peer_id)
    with pytest.raises(RemoteProtocolError, match="turn"):
        made.receive(OTHER.peer_id, sign(OTHER, Plan(*PLACE, turn, OTHER.peer_id, (), UNSIGNED)), 1.0)


def test_my_own_words_from_another_and_words_of_strangers_are_ignored():
    stranger = Identity.from_seed(b"9" * 32)
    made = machine()
    assert made.receive(OTHER.peer_id, offer_of(ME), 1.0) == []
    assert made.receive(OTHER.peer_id, offer_of(stranger), 1.0) == []
    assert made.receive(stranger.peer_id, Held(1, 0, (NOTHING,)), 1.0) == []
    assert not made.offers


def test_bodies_are_collected_by_those_whose_turn_it_is_and_mine_are_held_at_once():
    made = machine(replace(TERMS, aggregators=4))
    wanted = [a for a in made.receive(OTHER.peer_id, offer_of(OTHER), 1.0) if isinstance(a, Collect)]
    assert [action.shard for action in wanted] == [0, 1]
    said = made.offer(offer_of(ME), 1.0)
    assert said[:2] == [Remember(offer_of(ME)), Say(offer_of(ME))]
    held = [action.message for action in said if isinstance(action, Say) and isinstance(action.message, Held)]
    assert {message.shard for message in held} == {0, 1}
    assert all(message.offers == (offer_digest(offer_of(ME)),) for message in held)


def test_a_member_offers_once_and_for_the_round_in_hand():
    made = machine()
    with pytest.raises(LocalProtocolError):
        made.offer(offer_of(OTHER), 1.0)
    made.offer(offer_of(ME), 1.0)
    with pytest.raises(LocalProtocolError):
        made.offer(offer_of(ME, 2), 1.0)
    restarted = machine(votes=[offer_of(ME)])
    assert restarted.my_offer == offer_of(ME)
    with pytest.raises(LocalProtocolError):
        restarted.offer(offer_of(ME, 2), 1.0)


def test_two_offers_of_one_peer_are_a_lie_that_everybody_is_told_and_neither_is_planned():
    made = machine()
    first, second = offer_of(OTHER), offer_of(OTHER, 2)
    made.receive(OTHER.peer_id, first, 1.0)
    actions = made.receive(THIRD.peer_id, second, 1.0)
    assert any(isinstance(action, Name) and action.peer == OTHER.peer_id for action in actions)
    assert [action for action in actions if isinstance(action, Say)] == [Say(first), Say(second)]
    assert made.receive(OTHER.peer_id, second, 1.0) == []
    assert not made._round.countable()


def test_a_lie_of_an_older_round_is_named_too_and_said_on_in_the_next():
    made = machine()
    made.advance(certificate(PEERS[:3]), STATE, 2.0)
    assert made.round == 2
    assert made.receive(THIRD.peer_id, vote_of(OTHER, NOTHING), 3.0) == []
    actions = made.receive(THIRD.peer_id, vote_of(OTHER, STATE), 3.0)
    assert [action.peer for action in actions if isinstance(action, Name)] == [OTHER.peer_id]
    following = Outcome(RUN, "run", 2, made._round.last, (), (), (), (), NOTHING, NAMES, (0, 0, 0, 0))
    said = made.advance(certificate(PEERS[:3], following), STATE, 4.0)
    assert {action.message for action in said if isinstance(action, Say) and isinstance(action.message, Vote)} == {
        vote_of(OTHER, NOTHING),
        vote_of(OTHER, STATE),
    }


def test_a_certificate_needs_a_quorum_of_true_signatures_of_members_in_order_after_the_last_outcome():
    made = machine()
    good = certificate(PEERS[:3])
    made.check(good)
    stranger = Identity.from_seed(b"9" * 32)
    other = msgspec.structs.replace(good.outcome, last=STATE)
    for bad in (
        certificate(PEERS[:2]),
        certificate([*PEERS[:2], stranger]),
        certificate([PEERS[1], PEERS[0], PEERS[2]]),
        certificate([PEERS[0], PEERS[0], PEERS[1]]),
        certificate(PEERS[:3], other),
        certificate(PEERS[:3], msgspec.structs.replace(good.outcome, round=2)),
        certificate(PEERS[:3], msgspec.structs.replace(good.outcome, members=())),
        msgspec.structs.replace(good, signatures=good.signatures[:2]),
        msgspec.structs.replace(good, attempt=1),
        msgspec.structs.replace(good, signatures=(bytes(64), *good.signatures[1:])),
    ):
        with pytest.raises(VerificationError):
            made.check(bad)


def test_a_certificate_received_whole_ends_the_round_and_a_forged_one_the_stream():
    made = machine()
    with pytest.raises(RemoteProtocolError):
        made.receive(OTHER.peer_id, certificate(PEERS[:2]), 1.0)
    actions = made.receive(OTHER.peer_id, certificate(PEERS[1:]), 1.0)
    assert [type(action) for action in actions if not isinstance(action, Say)] == [Commit]
    assert made.phase == "committed"
    assert made.wake_at() == math.inf
    assert made.receive(THIRD.peer_id, certificate(PEERS[1:]), 1.0) == []


def test_offers_that_a_certificate_names_are_asked_for_before_it_is_committed():
    made, offer = machine(), offer_of(OTHER)
    changed = msgspec.structs.replace(
        certificate([]).outcome, offers=(offer_digest(offer),), contributors=(OTHER.peer_id,)
    )
    actions = made.receive(THIRD.peer_id, certificate(PEERS[:3], changed), 1.0)
    assert FetchOffers(THIRD.peer_id, (offer_digest(offer),)) in actions
    assert not any(isinstance(action, Commit) for action in actions)
    actions = made.expired(made.wake_at())
    assert [type(action) for action in actions] == [FetchOffers]
    committed = [a for a in made.receive(THIRD.peer_id, offer, 9.0) if isinstance(a, Commit)]
    assert committed[0].offers == (offer,)


def test_what_comes_a_round_early_is_kept_and_what_comes_too_early_is_not():
    made = machine()
    following = certificate(PEERS[:3])
    early = offer_of(OTHER, outcome=following.outcome)
    assert made.receive(OTHER.peer_id, early, 1.0) == []
    later = Outcome(RUN, "run", 2, NOTHING, (), (), (), (), NOTHING, NAMES, (0, 0, 0, 0))
    made.receive(OTHER.peer_id, offer_of(OTHER, outcome=later), 1.0)
    made.advance(following, STATE, 2.0)
    assert list(made.offers.values()) == [early]


def test_who_is_ahead_is_followed_once_and_who_was_behind_is_told_everything_again():
    made = machine()
    ahead = Joining(RUN, "run", 5, NOTHING, STATE)
    assert [type(action) for action in made.receive(OTHER.peer_id, ahead, 1.0)] == [FallenBehind]
    assert made.receive(OTHER.peer_id, ahead, 1.0) == []
    made.advance(certificate(PEERS[:3]), STATE, 2.0)
    made.receive(THIRD.peer_id, Joining(RUN, "run", 0, NOTHING, STATE), 2.0)
    told = made.receive(THIRD.peer_id, Joining(RUN, "run", 2, made._round.last, STATE), 2.5)
    assert told == [Repeat(THIRD.peer_id)]
    assert made.receive(THIRD.peer_id, Joining(RUN, "run", 2, made._round.last, STATE), 2.5) == []


def test_whose_state_most_others_do_not_share_is_told_so():
    made = machine()
    other = Joining(RUN, "run", 1, outcome_digest(FIRST), b"o" * 32)
    assert made.receive(NAMES[1], other, 1.0) == []
    assert made.receive(NAMES[2], other, 1.0) == []
    [action] = made.receive(NAMES[3], other, 1.0)
    assert isinstance(action, FallenBehind)
    assert "another state" in action.reason


def test_a_vote_is_written_down_before_it_is_said_and_never_changes():
    made = machine(replace(TERMS, patience_s=1.0))
    actions = made.expired(1.0) + made.expired(60.0)
    said = [action.vote for action in actions if isinstance(action, Remember)]
    votes = [action for action in actions if isinstance(action, Remember) and isinstance(action.vote, Vote)]
    assert votes
    for vote in votes:
        assert actions.index(vote) < actions.index(Say(vote.vote))
    restarted = RoundMachine(ME, TERMS, FIRST, STATE, said)
    again = restarted.start(0.0)
    assert not any(isinstance(action, Remember) for action in again)
    assert votes[0].vote in restarted.repeat()


def test_a_request_counts_from_its_author_alone():
    stranger = Identity.from_seed(b"9" * 32)
    made = RoundMachine(ME, replace(TERMS, min_members=5), FIRST, STATE)
    made.start(0.0)
    assert made.phase == "gathering"
    assert made.wake_at() == math.inf
    request = sign(stranger, Request(*PLACE, stranger.peer_id, "member", UNSIGNED))
    made.receive(OTHER.peer_id, request, 1.0)
    assert made.attempt == -1
    made.present(frozenset({*NAMES, stranger.peer_id}), 1.0)
    made.receive(stranger.peer_id, request, 1.0)
    assert made.attempt == 0


def test_a_peer_keeps_no_more_of_another_than_fits():
    made = machine()
    for number in range(2000):
        made.receive(OTHER.peer_id, vote_of(OTHER, NOTHING, attempt=number), 1.0)
        made.receive(OTHER.peer_id, Held(2, 0, (bytes([number % 256]) * 32,)), 1.0)
        made.receive(OTHER.peer_id, Held(1, 0, (number.to_bytes(32, "big"),)), 1.0)
    assert len(made._attempts.voting.votes) < 200
    assert made._early.count(OTHER.peer_id) <= 512
    assert len(made._round.holdings.of(OTHER.peer_id, 0)) < 100


def conversation() -> list:
    """Statements of all kinds of the other members, true and false, of this round and of others."""
    said: list = [Joining(RUN, "run", number, outcome_digest(FIRST), STATE) for number in (0, 1, 2, 7)]
    outcome = certificate([]).outcome
    for peer in PEERS[1:]:
        offers = (offer_digest(offer_of(peer)),)
        said += [offer_of(peer), offer_of(peer, 2), Held(1, 0, offers), Held(1, 1, offers), Held(2, 0, offers)]
        for attempt in range(3):
            said.append(sign(peer, Plan(*PLACE, attempt, peer.peer_id, offers, UNSIGNED)))
            said.append(sign(peer, Proposal(attempt, peer.peer_id, outcome, -1, (), UNSIGNED)))
            said += [
                vote_of(peer, value, kind, attempt) for value in (NOTHING, STATE) for kind in ("prevote", "precommit")
            ]
        for kind, data in (("gram", bytes(4)), ("sum", b"")):
            value = hashlib.sha256(data).digest()
            said.append(sign(peer, Claim(*PLACE, STATE, kind, 0, peer.peer_id, value, len(data), data, UNSIGNED)))
    return [*said, certificate(PEERS[:3]), certificate(PEERS[:2])]


SAID = conversation()


@settings(max_examples=60, deadline=None)
@given(
    order=st.lists(st.tuples(st.integers(1, 3), st.integers(0, len(SAID) - 1)), max_size=60),
    steps=st.lists(st.sampled_from([0.0, 0.1, 3.0, 30.0]), min_size=60, max_size=60),
)
def test_any_order_of_messages_is_survived_and_never_makes_me_say_two_things(order, steps):
    made, now = machine(replace(TERMS, rule="krum")), 0.0
    actions = made.offer(offer_of(ME), now)
    for (peer, number), step in zip(order, steps, strict=False):
        now += step
        with suppress(RemoteProtocolError):
            actions += made.receive(NAMES[peer], SAID[number], now)
        if made.wake_at() <= now:
            actions += made.expired(now)
        assert made.wake_at() > now
    for action in [each for each in actions if isinstance(each, Reduce) and each.kind == "gram"]:
        data = bytes(4)
        value = hashlib.sha256(data).digest()
        actions += made.computed("gram", action.plan, action.shard, value, data, 4, now)
    kept = [action.vote for action in actions if isinstance(action, Remember) and action.vote.peer == ME.peer_id]
    slots = [(type(said), getattr(said, "attempt", 0), getattr(said, "kind", "")) for said in kept]
    assert len(slots) == len(set(slots))
    assert set(made.named) <= set(NAMES[1:])
