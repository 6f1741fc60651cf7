"""The log: what is written is read, whatever was changed is found in its line, and little of it travels."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mycel.protocols.errors import ConfigError, LocalProtocolError
from mycel.security.identity import Identity
from mycel.swarm.zeroth.byte import LARGEST, VOID, decode
from mycel.swarm.zeroth.chain import NO_HASH, BadLine, ForgedLine
from mycel.swarm.zeroth.lines import Entry, Head, Join, parse
from mycel.swarm.zeroth.log import Log
from mycel.swarm.zeroth.replay import replay
from mycel.swarm.zeroth.rule import NO_CLIP, Rule, in_rate
from tests.swarm.zeroth.logs import PEERS, THETA0, begun, go_on, lines_of, made_log, made_rule

LOG, STATE = made_log()
DATA = LOG.pack()
LINES = lines_of(DATA)


def test_a_log_is_read_as_it_was_written():
    found = Log.read(DATA, LOG.run)
    assert (found.pack(), found.link, found.round) == (DATA, LOG.link, LOG.round)
    assert [member.banned for member in found.members] == [False, True, False, False, False]
    assert replay(THETA0, found).hash() == STATE.hash()


def test_a_log_is_read_in_parts():
    found = Log.read(b"".join(LINES[:9]))
    for line in LINES[9:]:
        found.extend(line)
    assert found.link == LOG.link
    assert found.pack(first_line=10) == b"".join(LINES[9:])


def test_the_order_of_arrival_makes_no_difference():
    logs = [begun(made_rule()) for _ in range(2)]
    codes = [[64, 70], [200], [3], [90, 91]]
    for order, (log, state) in zip(([0, 1, 2, 3], [2, 0, 3, 1]), logs, strict=True):
        for number in order:
            log.append(log.make_entry(PEERS[number], codes[number]))
        state.apply(log.updates())
        log.close_round(state.hash())
    assert logs[0][0].pack() == logs[1][0].pack()


def test_every_flipped_bit_is_located_to_its_line():
    where = [number for number, line in enumerate(LINES, 1) for _ in line]
    rng = random.Random(0)
    # Two bits of the first byte of every line, where its kind stands, and many others.
    starts = [sum(map(len, LINES[:number])) for number in range(len(LINES))]
    bits = {8 * start + bit for start in starts for bit in (0, 2)} | set(rng.sample(range(8 * len(DATA)), 150))
    for bit in sorted(bits):
        damaged = bytearray(DATA)
        damaged[bit // 8] ^= 1 << bit % 8
        with pytest.raises((BadLine, ForgedLine)) as caught:
            replay(THETA0, Log.read(bytes(damaged)))
        assert caught.value.line == where[bit // 8], caught.value


@pytest.mark.parametrize("cut", [1, 50, len(LINES[-1])])
def test_a_log_that_ends_early_says_where(cut):
    if cut == len(LINES[-1]):  # a whole line less: that is how a log looks during a round
        assert Log.read(DATA[:-cut]).round == LOG.round - 1
        return
    with pytest.raises(BadLine, match=rf"line {len(LINES)} of the log: the close ends"):
        Log.read(DATA[:-cut])


@given(st.binary(max_size=300))
def test_any_bytes_are_a_log_or_refused(data):
    with pytest.raises(BadLine):
        Log.read(data)


@given(st.integers(1, len(LINES)), st.binary(max_size=200))
@settings(max_examples=50)
def test_any_bytes_after_a_log_are_lines_or_refused(kept, data):
    log = Log.read(b"".join(LINES[:kept]))
    before = log.pack()
    if data:  # no random signature is ever right
        with pytest.raises((BadLine, ForgedLine), match=rf"line {kept + 1} of the log"):
            log.extend(data)
    assert log.pack() == before


@pytest.mark.parametrize("line", range(1, len(LINES)))
def test_no_line_can_be_left_out_or_said_twice(line):
    for lines in ([*LINES[:line], *LINES[line + 1 :]], [*LINES[: line + 1], *LINES[line:]]):
        try:
            log = Log.read(b"".join(lines))
        except (BadLine, ForgedLine):
            continue
        # Without its last close a log is one whose round goes on.
        assert line == len(LINES) - 1
        assert log.round == LOG.round - 1


def test_a_log_of_another_run_is_refused():
    with pytest.raises(ForgedLine, match="this is run"):
        Log.read(DATA, bytes(32))


def test_a_state_that_the_lines_do_not_lead_to_is_found():
    log, state = begun(made_rule())
    go_on(log, state, random.Random(1))
    log.append(log.make_entry(PEERS[0], [64]))
    log.close_round(b"\1" * 32)  # a close in order, of a false state
    line = log.n_lines
    go_on(log, state, random.Random(2))
    with pytest.raises(ForgedLine, match="round 2 leads to another state") as caught:
        replay(THETA0, Log.read(log.pack()))
    assert caught.value.line == line
    with pytest.raises(BadLine, match="other parameters"):
        replay(THETA0 + 1, log)


# ------------------------------------------------------------------------------------------------- what is refused


def test_a_newcomer_contributes_from_the_next_round_on():
    log, _ = begun(made_rule())
    log.append(log.make_join(PEERS[5]))
    with pytest.raises(BadLine, match="from the next round on"):
        log.append(log.make_entry(PEERS[5], [64]))


def test_a_banned_peer_sends_no_more():
    with pytest.raises(BadLine, match="is banned"):
        LOG.append(LOG.make_entry(PEERS[1], [64]))


def test_entries_fit_their_place():
    log, state = begun(made_rule(samples=4))
    first = log.make_entry(PEERS[0], [64, 65])
    log.append(first)
    with pytest.raises(BadLine, match="does not follow on"):
        log.append(first)
    with pytest.raises(BadLine, match="more than 4 updates"):
        log.append(log.make_entry(PEERS[0], [1, 2, 3]))
    log.append(log.make_entry(PEERS[0], [66]))
    assert [(part.first_sample, part.codes) for part in log._open.parts] == [(0, b"@A"), (2, b"B")]
    late = log.make_entry(PEERS[1], [64])
    log.close_round(state.hash())
    with pytest.raises(BadLine, match="an entry of round 1 in round 2"):
        log.append(late)


def test_nobody_writes_in_the_name_of_another():
    log, _ = begun(made_rule())
    mine = log.make_entry(PEERS[0], [64])
    with pytest.raises(BadLine, match="does not follow on"):
        log.append(Entry(1, mine.round, mine.base_tag, mine.previous_tag, mine.codes, mine.signature))
    theirs = log.make_entry(PEERS[1], [64])
    with pytest.raises(ForgedLine, match="the signature is not the peer's") as caught:
        log.append(Entry(1, theirs.round, theirs.base_tag, theirs.previous_tag, b"A", theirs.signature))
    assert parse(memoryview(caught.value.evidence))[0].codes == b"A"
    with pytest.raises(BadLine, match="there is no peer 9"):
        log.append(Entry(9, 1, theirs.base_tag, theirs.previous_tag, b"A", theirs.signature))


def test_one_key_joins_once_under_the_next_number():
    log, _ = begun(made_rule())
    with pytest.raises(BadLine, match="in the list already"):
        log.append(log.make_join(PEERS[0]))
    wanted = log.make_join(PEERS[5])
    with pytest.raises(BadLine, match="joins as number 4"):
        log.append(Join(7, wanted.key, wanted.signature))


def test_bans_say_what_can_be_checked():
    log, state = begun(made_rule())
    go_on(log, state, random.Random(0))
    said = log.code_of(2, 1, 0)
    with pytest.raises(BadLine, match="no sample 3"):
        log.append(log.make_ban(PEERS[0], 2, 1, 3, 1))
    with pytest.raises(BadLine, match="no lie"):
        log.append(log.make_ban(PEERS[0], 2, 1, 0, said))
    log.append(log.make_ban(PEERS[0], 2, 1, 0, said ^ 0x40))
    with pytest.raises(BadLine, match="banned already"):
        log.append(log.make_ban(PEERS[1], 2, 1, 0, said ^ 0x40))


def test_hashes_stand_where_the_rule_has_them():
    log, state = made_log(5, hash_every=3)
    assert [closed.close.state != NO_HASH for closed in log.rounds] == [True, False, False, True, False, False]
    assert replay(THETA0, Log.read(log.pack())).hash() == state.hash()


def test_a_stranger_writes_nothing():
    with pytest.raises(LocalProtocolError, match="not in the log's list"):
        LOG.make_entry(Identity.from_seed(bytes([77]) * 32), [64])


# ------------------------------------------------------------------------------------------------- bytes and steps


def test_256_updates_cost_at_most_one_and_a_half_bytes_each_on_the_wire():
    log, _ = begun(made_rule())
    entry = log.make_entry(PEERS[0], range(256))
    yamux, noise, frame = 12, 2 + 16, 8
    assert len(entry.pack()) == 336
    assert (len(entry.pack()) + yamux + noise + frame) / 256 <= 1.5
    log.append(entry)
    assert len(Log.read(log.pack()).updates()) == 256


def test_rules_survive_bytes_and_refuse_what_makes_no_sense():
    rule = made_rule(pool=16, epoch=4, hash_every=2, samples=9)
    assert Rule.unpack(rule.pack()) == rule
    assert parse(memoryview(Head(rule).pack()))[0] == Head(rule)
    for wrong in ({"pool": 3}, {"epoch": 3}, {"clip": 128}, {"samples": 0}, {"hash_every": 0}):
        with pytest.raises(ConfigError):
            made_rule(**wrong)
    with pytest.raises(ConfigError, match="learning rate"):
        Rule(bytes(32), bytes(32), 1, in_rate(64.0), 1).checked()
    with pytest.raises(ConfigError, match="no length"):
        in_rate(float("nan"))


@given(st.lists(st.integers(0, 255), min_size=1, max_size=40), st.integers(0, NO_CLIP))
def test_steps_are_a_mean_of_clipped_slopes(codes, clip):
    rule = made_rule(clip=clip)
    counted = sorted(code & LARGEST for code in codes if code != VOID)
    cap = max(counted[(len(counted) - 1) // 2], 1) + clip if counted and clip != NO_CLIP else LARGEST
    for code, step in zip(codes, rule.steps(codes), strict=True):
        g = decode(min(code & LARGEST, cap, LARGEST)) * (-1 if code & 0x80 else 1)
        assert abs(step / 2**30 - 1e-2 * g / max(1, len(counted))) <= 2**-31 + 1e-9 * abs(g)


def test_liars_below_half_count_for_little():
    honest = [60, 62, 64, 66, 68, 188, 190, 192]
    steps = made_rule().steps([*honest, 127, 127, 255])
    assert max(map(abs, steps[-3:])) <= 2 * max(map(abs, steps[:-3]))
