"""Snapshot, sums and log lead to one state, a reader goes on from any of them, and false ones are refused."""

from __future__ import annotations

import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mycel.protocols.errors import LocalProtocolError, RemoteProtocolError, VerificationError
from mycel.swarm.zeroth.choose import Way, choose
from mycel.swarm.zeroth.compact import (
    Sums,
    _number,
    _numbers,
    apply_sums,
    compact,
    open_checkpoint,
    pack_checkpoint,
    pack_state,
    sums_of_epochs,
    unpack_state,
)
from mycel.swarm.zeroth.lattice import state_hash
from mycel.swarm.zeroth.log import Log
from mycel.swarm.zeroth.replay import State, replay, replay_from
from mycel.swarm.zeroth.rule import Rule
from tests.swarm.zeroth.logs import PEERS, THETA0, go_on, made_log, made_rule

POOLED = {"pool": 7, "epoch": 3}


def test_sums_lead_to_the_same_state_as_the_log():
    log, state = made_log(8, **POOLED)
    assert state.hash() == replay(THETA0, Log.read(log.pack())).hash()
    found = State(THETA0)
    closes = {closed.number: closed.close for closed in log.rounds}
    all_sums = sums_of_epochs(log)
    assert [(sums.first, sums.last) for sums in all_sums] == [(0, 2), (3, 5), (6, 8)]
    for sums in all_sums:
        sent = Sums.unpack(sums.pack(), log.rule)
        assert sent == sums
        apply_sums(found, log.rule, sent, closes[sums.last].state)
    assert found.hash() == state.hash()


def test_a_pool_has_few_directions_and_epochs_their_own():
    log, _ = made_log(8, **POOLED)
    used = [{seed for seed, _ in log.updates(closed)} for closed in log.rounds]
    assert len(used[3] | used[4] | used[5]) <= 7
    assert not (used[5] & used[6])


def test_false_sums_are_refused_and_leave_the_state():
    log, _ = made_log(3, **POOLED)
    sums = compact(log, 0, 2)
    state = State(THETA0)
    false = Sums(sums.first, sums.last, sums.epoch_beacon, (*sums.steps[:-1], sums.steps[-1] + 1))
    with pytest.raises(VerificationError, match="lead to another state"):
        apply_sums(state, log.rule, false, log.rounds[2].close.state)
    assert state.hash() == state_hash(THETA0)
    with pytest.raises(LocalProtocolError, match="have no sums"):
        compact(log, 1, 3)


@given(st.binary(max_size=120))
def test_any_bytes_are_sums_or_refused(data):
    with pytest.raises(RemoteProtocolError):
        Sums.unpack(data, made_rule(**POOLED))


@given(st.lists(st.integers(-(1 << 58), 1 << 58), max_size=9))
def test_numbers_survive_and_have_one_form(numbers):
    data = b"".join(map(_number, numbers))
    assert _numbers(data, len(numbers), "") == tuple(numbers)
    if numbers:
        longer = data[:-1] + bytes([data[-1] | 0x80, 0])
        with pytest.raises(RemoteProtocolError, match="no number"):
            _numbers(longer, len(numbers), "")


@given(st.lists(st.integers(-(2**62), 2**62), min_size=1, max_size=9))
def test_snapshots_survive(units):
    theta = np.array(units, np.int64)
    rule = Rule(bytes(32), bytes(32), len(units), 1, 1)
    data = pack_state(theta)
    width = max((abs(2 * unit + 1)).bit_length() for unit in units)
    assert len(data) == 9 + len(units) * -(-width // 8)
    assert unpack_state(data, rule, state_hash(theta)).theta_P.tolist() == units


def test_a_reader_goes_on_from_a_snapshot():
    log, state = made_log(6)
    checkpoint, snapshot = pack_checkpoint(log), pack_state(state.theta_P)
    kept = log.n_lines
    rng = random.Random(5)
    go_on(log, state, rng)
    log.append(log.make_join(PEERS[5]))
    go_on(log, state, rng)

    late = open_checkpoint(checkpoint, log.rounds[6].close.link)
    theirs = unpack_state(snapshot, late.rule, late.last_close.state)
    late.extend(log.pack(first_line=kept + 1))
    replay_from(theirs, late, late.rounds)
    assert (late.link, theirs.hash()) == (log.link, state.hash())
    go_on(late, theirs, random.Random(6))
    go_on(log, state, random.Random(6))
    assert pack_checkpoint(late) == pack_checkpoint(log)


def test_a_reader_goes_on_within_an_epoch():
    log, state = made_log(4, **POOLED)
    late = open_checkpoint(pack_checkpoint(log))
    theirs = State(state.theta_P)
    kept = log.n_lines
    go_on(log, state, random.Random(5))
    late.extend(log.pack(first_line=kept + 1))
    replay_from(theirs, late, late.rounds)
    assert theirs.hash() == state.hash()


def test_no_bit_of_a_checkpoint_or_snapshot_can_be_changed():
    log, state = made_log(4)
    checkpoint, snapshot = pack_checkpoint(log), pack_state(state.theta_P)
    rng = random.Random(0)
    for bit in rng.sample(range(8 * len(checkpoint)), 200):
        damaged = bytearray(checkpoint)
        damaged[bit // 8] ^= 1 << bit % 8
        with pytest.raises((RemoteProtocolError, VerificationError)):
            open_checkpoint(bytes(damaged), log.link)
    for bit in rng.sample(range(8 * len(snapshot)), 200):
        damaged = bytearray(snapshot)
        damaged[bit // 8] ^= 1 << bit % 8
        with pytest.raises((RemoteProtocolError, VerificationError)):
            unpack_state(bytes(damaged), log.rule, state.hash())


def test_a_checkpoint_stands_between_rounds():
    log, _ = made_log(4)
    log.append(log.make_entry(PEERS[0], [1]))
    with pytest.raises(LocalProtocolError, match="between two rounds"):
        pack_checkpoint(log)


# ------------------------------------------------------------------------------------------------------- choosing


def ways(n_elements, n_updates, pool):
    return [
        Way("snapshot", 4 * n_elements, 0),
        Way("log", 2 * n_updates, n_updates),
        Way("sums", 5 * pool, pool),
    ]


@pytest.mark.parametrize(
    ("n_elements", "n_updates", "bytes_per_s", "best"),
    [
        (1_000_000_000, 20, 12e6, "log"),  # a few updates since: 11 s to compute, 333 s to fetch
        (1_000_000_000, 100_000, 12e6, "snapshot"),
        (100_000, 100_000, 10e3, "sums"),  # an adapter of LoRA, on a slow line: 40 s, 25 s or 2.5 s
    ],
)
def test_each_way_has_its_place(n_elements, n_updates, bytes_per_s, best):
    choice = choose(ways(n_elements, n_updates, 4096), n_elements, bytes_per_s, 0.55e-9)
    assert choice.way.name == best
    assert choice.reason.startswith(f"{best}: ")


@given(st.integers(1, 10**9), st.integers(0, 10**6), st.floats(1e3, 1e9), st.floats(0, 1e-7))
def test_no_other_way_is_faster(n_elements, n_updates, bytes_per_s, s_per_element):
    offered = ways(n_elements, n_updates, 1024)
    choice = choose(offered, n_elements, bytes_per_s, s_per_element)
    assert choice.seconds == min(way.seconds(n_elements, bytes_per_s, s_per_element) for way in offered)


def test_no_choice_without_ways_or_speeds():
    for arguments in (([], 1, 1.0, 1.0), (ways(1, 1, 1), 1, 0.0, 1.0), (ways(1, 1, 1), 1, float("nan"), 1.0)):
        with pytest.raises(ValueError, match="needs a way"):
            choose(*arguments)
