"""The verdict on a chaotic run, from made-up records."""

from __future__ import annotations

import json

from mycel.cli.verdict import Answer, Gone, Injected, as_json, judge, verdict_rows
from mycel.protocols.messages import PeerAddress
from mycel.swarm.generation import NewToken, RouteChosen
from mycel.swarm.routing import Hop
from mycel.swarm.trace import RouteTrace

EXPECTED = (7, 8, 9, 10)


def answer(tokens=EXPECTED, *, began_s=10.0, step_s=0.1, finish="length", **more) -> Answer:
    times = [began_s + step_s * (n + 1) for n in range(len(tokens))]
    return Answer(1, '"A" (greedy, 4 tokens)', EXPECTED, began_s, list(tokens), times, finish=finish, **more)


def test_all_well():
    verdict = judge([answer(), answer(began_s=20.0)], [], 30.0)
    assert verdict.ok
    assert (verdict.done, verdict.failed, verdict.cut_short) == (2, 0, 0)
    assert (verdict.tokens_compared, verdict.tokens_different) == (8, 0)
    assert verdict.tokens_per_s == 8 / 30
    assert verdict.first_token is not None
    assert verdict.first_token.count == 2
    assert not any(verdict.pauses.values())


def test_a_wrong_token_is_named():
    verdict = judge([answer(), answer((7, 8, 1, 2))], [], 30.0)
    assert not verdict.ok
    assert verdict.reason == 'token 3 of "A" (greedy, 4 tokens) is 1, not 9'
    assert verdict.tokens_different == 2
    assert verdict.done == 2


def test_too_few_and_too_many_tokens_are_wrong():
    assert "has 2 tokens, not 4" in judge([answer((7, 8))], [], 30.0).reason
    assert "has 5 tokens, not 4" in judge([answer((*EXPECTED, 11))], [], 30.0).reason
    assert "has 5 tokens, not 4" in judge([answer(), answer((*EXPECTED, 11), finish="")], [], 30.0).reason


def test_a_failed_request_is_a_failure():
    verdict = judge([answer(), answer((7,), finish="", error="no live peer serves blocks 0:2")], [], 30.0)
    assert not verdict.ok
    assert verdict.reason == '"A" (greedy, 4 tokens) failed: no live peer serves blocks 0:2'
    assert (verdict.done, verdict.failed) == (1, 1)
    assert ("lost", "1 request") in verdict_rows(verdict)


def test_what_was_cut_short_is_right_so_far():
    assert judge([answer(), answer((7, 8), finish="")], [], 30.0).cut_short == 1
    assert judge([answer(), answer((7, 8), finish="")], [], 30.0).ok
    assert not judge([answer(), answer((7, 1), finish="")], [], 30.0).ok


def test_nothing_done_is_no_success():
    verdict = judge([], [], 30.0)
    assert (verdict.ok, verdict.broken, verdict.reason) == (False, False, "no request finished")
    assert not judge([answer((7,), finish="")], [], 30.0).ok


def test_a_node_that_ends_by_itself_is_a_failure():
    verdict = judge([answer()], [], 30.0, ["node-2 ended by itself with exit code 1"])
    assert (verdict.ok, verdict.broken, verdict.reason) == (False, True, "node-2 ended by itself with exit code 1")


def test_the_pause_lasts_from_the_fault_to_the_token_of_the_mended_chain():
    """A token that was on its way already does not end it."""
    hit = answer(gone=[Gone(2, "B", "the connection was lost")])
    hit.times_s = [10.1, 10.22, 11.0, 11.1]
    verdict = judge([hit], [Injected(5.0, "kill", "C"), Injected(10.2, "kill", "B")], 30.0)
    assert verdict.failovers == {"kill": 1, "stop": 0, "leave": 0}
    pauses = verdict.pauses["kill"]
    assert pauses is not None
    assert round(pauses.max_s, 6) == 0.8
    assert verdict.unexplained == ()
    assert verdict.ok


def test_a_request_that_began_after_the_fault_pauses_from_its_beginning():
    hit = answer(gone=[Gone(0, "B", "silent")])
    pauses = judge([hit], [Injected(4.0, "stop", "B")], 30.0).pauses["stop"]
    assert pauses is not None
    assert round(pauses.max_s, 6) == 0.1


def test_a_healthy_peer_that_was_blamed_is_told():
    verdict = judge([answer(gone=[Gone(1, "B", "silent")])], [Injected(20.0, "kill", "B")], 30.0)
    assert len(verdict.unexplained) == 1
    assert "silent" in verdict.unexplained[0]
    assert verdict.failovers == {"kill": 0, "stop": 0, "leave": 0}
    assert any("1 without a fault" in text for word, text in verdict_rows(verdict) if word == "failovers")


def test_a_planned_exit_is_told_with_the_longest_gap_since_its_notice():
    moved = answer(gone=[Gone(2, "B", "the state was pushed", planned=True)])
    moved.times_s = [10.1, 10.3, 10.45, 11.0]
    leave = Injected(10.15, "leave", "B")
    verdict = judge([moved], [leave], 30.0)
    assert (verdict.handovers, verdict.failovers["leave"]) == (1, 0)
    pauses = verdict.pauses["leave"]
    assert pauses is not None
    assert round(pauses.max_s, 6) == 0.2
    fell_back = answer(gone=[Gone(2, "B", "it is gone")])
    verdict = judge([fell_back], [leave], 30.0)
    assert (verdict.handovers, verdict.failovers["leave"]) == (0, 1)


def test_tokens_are_taken_in_with_their_route():
    trace = RouteTrace(0.0)
    one, other = (Hop(PeerAddress(peer, ()), 0, 8) for peer in "AB")
    taken = Answer(1, "x", EXPECTED, 0.0)
    trace.apply(RouteChosen((one,), "cheapest"))
    trace.apply(NewToken(3, 7, "", (), 0.5))
    assert taken.note(7, trace, 0.5) == ()
    trace.apply(RouteChosen((other,), "cheapest", (("A", "gone"),)))
    trace.apply(NewToken(4, 8, "", (), 0.9))
    assert taken.note(8, trace, 0.9) == (Gone(1, "A", "gone"),)
    trace.apply(RouteChosen((one,), "cheapest", moved=(("B", "the state was pushed"),)))
    trace.apply(NewToken(5, 9, "", (), 1.2))
    assert taken.note(9, trace, 1.2) == (Gone(2, "B", "the state was pushed", planned=True),)
    assert (taken.tokens, taken.times_s) == ([7, 8, 9], [0.5, 0.9, 1.2])
    trace.apply(RouteChosen((one,), "cheapest", (("C", "gone"),)))
    assert taken.note_route(trace, 3) == (Gone(3, "C", "gone"),)
    assert judge([taken], [Injected(0.7, "kill", "C")], 1.0).failovers["kill"] == 0, "no token came after it"


def test_the_table_and_the_json_say_the_same():
    hit = answer(gone=[Gone(2, "B", "the connection was lost")])
    verdict = judge([hit], [Injected(10.2, "kill", "B")], 2.0)
    rows = dict(verdict_rows(verdict))
    assert rows["verdict"] == "PASS: every request finished with the right tokens"
    assert rows["requests"] == "1 done, 0 failed"
    assert rows["tokens"] == "4 compared with one process, none different"
    assert rows["faults"] == "1 killed"
    assert rows["failovers"] == "1 after a kill"
    assert rows["pause"] == "p50 0.10 s, p95 0.10 s, max 0.10 s after a kill (1)"
    assert rows["lost"] == "no request"
    value = json.loads(json.dumps(as_json(verdict)))
    assert value["ok"] is True
    assert value["pauses"]["kill"] == {"count": 1, "p50_s": 0.1, "p95_s": 0.1, "max_s": 0.1}
    assert value["faults"] == {"kill": 1, "stop": 0, "leave": 0}
