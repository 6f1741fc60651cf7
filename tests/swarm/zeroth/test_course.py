"""What a certified round comes to: which offers count, who is banned, and one state by whatever way."""

from __future__ import annotations

import random
from dataclasses import replace

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mycel.protocols.errors import RemoteProtocolError, VerificationError
from mycel.protocols.rounds import Joining, Offer, Scalars, offer_digest, restored, shortened
from mycel.security.identity import Identity
from mycel.swarm.rounds.statements import make_offer
from mycel.swarm.rounds.terms import beacon_of, genesis
from mycel.swarm.zeroth.chain import BadLine
from mycel.swarm.zeroth.course import MOST_ACCUSATIONS, Accusation, Course, mark_of, pack_scalars, said_by
from mycel.swarm.zeroth.lattice import from_float, state_hash
from mycel.swarm.zeroth.options import ZerothOptions, make_rule
from mycel.swarm.zeroth.run_log import LogHead, extents, read_head
from mycel.swarm.zeroth.shortcut import SumTable, pack_summed, read_epochs

RUN = bytes(range(32))
PEERS = sorted((Identity.from_seed(bytes([n]) * 32) for n in range(4)), key=lambda peer: peer.peer_id)
THETA = from_float(np.linspace(-1, 1, 300, dtype=np.float32))
GENESIS = genesis(RUN, "run", PEERS[0].peer_id)


def made_course(**options) -> Course:
    return Course(make_rule(ZerothOptions(updates=8, **options), RUN, state_hash(THETA), 300), RUN, THETA)


def offers_of(course: Course, accusations: dict[int, list[Accusation]] | None = None) -> list[Offer]:
    outcome = replace_round(course.number)
    return [
        make_offer(
            peer,
            outcome,
            course.digest(),
            weight=8,
            scalars=pack_scalars(random.Random(n + 10 * course.number).randbytes(8), (accusations or {}).get(n, [])),
        )
        for n, peer in enumerate(PEERS)
    ]


def replace_round(number: int):
    return msgspec.structs.replace(GENESIS, round=number)


def go_on(course: Course, offers: list[Offer]) -> None:
    course.apply(course.step(course.number + 1, beacon_of(replace_round(course.number)), offers))


def test_the_order_of_offers_does_not_matter() -> None:
    one, other = made_course(), made_course()
    offers = offers_of(one)
    go_on(one, offers)
    go_on(other, offers[::-1])
    assert one.digest() == other.digest() != made_course().digest()
    assert (one.version, one.recent[-1].n_updates) == (1, 32)


@pytest.mark.parametrize(
    "change",
    [
        {"state": bytes(32)},
        {"staleness": 1},
        {"bodies": (bytes(32),), "sizes": (1,)},
        {"weight": 9},
        {"weight": 7},
        {"weight": 2**32},
        {"scalars": bytes(200), "weight": 8},
        {"scalars": bytes(9), "weight": 9},
        {"peer": "QmNoEd25519Key"},
    ],
)
def test_what_is_not_due_or_not_in_form_counts_for_nothing(change: dict[str, object]) -> None:
    course, honest = made_course(), made_course()
    offers = offers_of(course)
    bad = msgspec.structs.replace(offers[2], **change)
    go_on(course, [*offers[:2], bad, offers[3]])
    go_on(honest, [*offers[:2], offers[3]])
    assert course.digest() == honest.digest()


def test_more_than_half_of_the_others_ban_and_fewer_do_not() -> None:
    course = made_course()
    go_on(course, offers_of(course))
    liar = mark_of(PEERS[1].peer_id)
    lie = Accusation(liar, 1, 0, 64)
    one, two = course, made_course()
    go_on(two, offers_of(two))
    go_on(one, offers_of(one, {0: [lie], 1: [lie]}))  # of the two accusers one is the liar itself
    assert one.banned == ()
    go_on(two, offers_of(two, {0: [lie], 2: [lie, lie]}))
    assert two.banned == (liar,)
    before = two.recent[-1]
    go_on(two, offers_of(two))
    assert (before.n_updates, two.recent[-1].n_updates) == (32, 24)


@given(st.binary(max_size=140), st.integers(0, 2**32))
def test_any_scalars_are_read_or_refused(scalars: bytes, weight: int) -> None:
    offer = msgspec.structs.replace(offers_of(made_course())[0], scalars=scalars, weight=weight)
    said = said_by(offer, 8)
    if said is not None:
        assert pack_scalars(said.codes, said.accusations) == scalars
        assert len(said.codes) == weight <= 8
        assert len(said.accusations) <= MOST_ACCUSATIONS


def test_a_snapshot_leads_to_the_same_state_and_a_damaged_one_to_none() -> None:
    course, late = made_course(pool=4, epoch=2), made_course(pool=4, epoch=2)
    for _ in range(3):
        go_on(course, offers_of(course))
    course.banned = (mark_of("somebody"),)
    data = course.pack()
    late.load(data, course.digest())
    assert late.digest() == course.digest()
    go_on(course, offers := offers_of(course))
    go_on(late, offers)
    assert late.digest() == course.digest()
    for at in range(0, len(data), 7):
        damaged = bytearray(data)
        damaged[at] ^= 1
        before = late.digest()
        with pytest.raises((RemoteProtocolError, VerificationError)):
            late.load(bytes(damaged), made_course().digest())
        assert late.digest() == before


def test_sums_lead_to_the_state_that_the_rounds_lead_to() -> None:
    course, table = made_course(pool=4, epoch=2), SumTable()
    for _ in range(5):
        go_on(course, offers_of(course))
        table.add(course, course.recent[-1])
        if course.number == 4:
            expected = course.digest()
    assert [(epoch.sums.first, epoch.sums.last) for epoch in table.epochs] == [(0, 1), (2, 3)]
    packed = pack_summed(table.epochs, b"")
    late = made_course(pool=4, epoch=2)
    epochs, end = read_epochs(packed[2:], late, 2)
    assert end == len(packed) - 2
    for epoch in epochs:
        late.skip(epoch.sums, epoch.version, epoch.banned)
    assert late.digest() == expected
    for cut in range(len(packed) - 2):
        with pytest.raises(RemoteProtocolError):
            read_epochs(packed[2 : 2 + cut], late, 2)


def test_updates_beyond_the_lattice_are_passed_over_by_all() -> None:
    course = made_course(rate=63.0, clip=127)
    far = Course(course.rule, RUN, np.full(300, (1 << 62) - 1, np.int64))
    offers = offers_of(far)
    before = far.state.theta_P.copy()
    go_on(far, offers)
    assert (far.state.theta_P == before).all()
    assert far.number == 1


def test_a_shortened_offer_is_the_same_again_and_only_where_it_fits() -> None:
    offer = offers_of(made_course())[0]
    joining = Joining(RUN, "run", 1, offer.last, offer.state)
    short = shortened(offer, joining, offer.peer)
    assert isinstance(short, Scalars)
    assert restored(short, joining, offer.peer) == offer
    assert restored(short, msgspec.structs.replace(joining, round=2), offer.peer) is None
    assert restored(msgspec.structs.replace(short, beside=255), joining, offer.peer) is None
    for other in (
        msgspec.structs.replace(joining, state=bytes(32)),
        msgspec.structs.replace(joining, last=bytes(range(32))),
        msgspec.structs.replace(joining, round=2),
    ):
        assert shortened(offer, other, offer.peer) is offer
    assert shortened(offer, joining, PEERS[3].peer_id) is offer
    heavy = msgspec.structs.replace(offer, weight=300)
    assert shortened(heavy, joining, offer.peer) is heavy
    assert offer_digest(offer) == offer_digest(restored(short, joining, offer.peer))


@given(st.binary(max_size=300))
def test_any_bytes_are_a_head_or_refused(data: bytes) -> None:
    head = LogHead(RUN, "run", PEERS[0].peer_id, made_course().rule.pack(), True, "")
    assert read_head(head.pack() + data) == (head, len(head.pack()))
    extents(data)
    with pytest.raises(BadLine):
        read_head(data)


def test_a_ban_outlives_the_epoch_and_the_disk() -> None:
    course = made_course()
    course.banned = tuple(sorted(mark_of(str(n)) for n in range(3)))
    late = made_course()
    late.load(course.pack(), course.digest())
    assert late.banned == course.banned
    assert replace(Accusation(bytes(16), 1, 2, 3), code=4).pack() == bytes(16) + bytes([1, 2, 0, 4])
