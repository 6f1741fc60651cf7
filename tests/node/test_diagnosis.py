"""What findings mean, with findings made up: marks, the one line, the advice, and the cause that is named."""

from __future__ import annotations

import pytest

from mycel.node import diagnosis
from mycel.node.diagnosis import Check, Dial, conclusion, judge_dials, swarm_is_reached
from mycel.node.endpoints import Endpoint
from mycel.swarm.view import PeerView, View

PUBLIC = "/ip4/8.8.4.4/tcp/4001"
ANY = Endpoint("ip4", "0.0.0.0", 4001)  # noqa: S104 - nothing is bound
LOOPBACK = Endpoint("ip4", "127.0.0.1", 0)
A, B = "12D3KooWaaaaaaaa", "12D3KooWbbbbbbbb"


def node(peer: str, start: int, end: int) -> PeerView:
    return PeerView(peer, (), start, end, "serving", 0.0, 0.0, 0.0, 0, 0, (), 1, 1e10)


@pytest.mark.parametrize(
    ("check", "mark", "words"),
    [
        (diagnosis.judge_software({"torch": "2.9", "libp2p": "0.8.1"}, {"libp2p": "0.8.1"}), "ok", "torch 2.9"),
        (diagnosis.judge_software({"torch": "2.9", "libp2p": "0.8.0"}, {"libp2p": "0.8.1"}), "fail", "libp2p==0.8.1"),
        (diagnosis.judge_software({"torch": None, "libp2p": "0.8.1"}, {}), "fail", "torch not installed"),
        (diagnosis.judge_disk(10**8, "/x"), "fail", "100 MB free"),
        (diagnosis.judge_disk(10**9, "/x"), "warn", "1.0 GB free"),
        (diagnosis.judge_disk(10**11, "/x"), "ok", "100 GB free"),
        (diagnosis.judge_memory(5 * 10**8, 10**10), "warn", "500 MB of 10 GB"),
        (diagnosis.judge_memory(8 * 10**9, 10**10), "ok", "8.0 GB of 10 GB"),
        (diagnosis.judge_network(["127.0.0.1", "::1"], [ANY]), "fail", "no network but loopback"),
        (diagnosis.judge_network(["127.0.0.1"], [LOOPBACK]), "ok", "loopback only, as asked for"),
        (diagnosis.judge_network(["127.0.0.1", "10.0.0.5"], [ANY]), "ok", "private address 10.0.0.5"),
        (diagnosis.judge_network(["8.8.8.8", "2606:4700::1"], [ANY]), "ok", "public address 8.8.8.8, 2606:4700::1"),
        (diagnosis.judge_port(ANY, "", "", running=False), "ok", "port 4001 can be listened on"),
        (
            diagnosis.judge_port(ANY, "in use", "nginx (process 7)", running=False),
            "fail",
            "in use by nginx (process 7)",
        ),
        (diagnosis.judge_port(ANY, "in use", "", running=True), "ok", "the node that runs already"),
        (diagnosis.judge_port(ANY, "not permitted", "", running=False), "fail", "may not be listened on"),
        (diagnosis.judge_port(ANY, "no such address", "", running=False), "fail", "has no address 0.0.0.0"),
        (diagnosis.judge_port(ANY, "it rains", "", running=False), "fail", "0.0.0.0:4001: it rains"),
        (diagnosis.judge_neighbours({"10.0.0.5": ""}), "ok", "works on 10.0.0.5"),
        (diagnosis.judge_neighbours({"10.0.0.5": "no such device"}), "warn", "no such device"),
        (diagnosis.judge_neighbours({}), "warn", "no network for it"),
        (diagnosis.judge_round_trips({A: 0.012}), "ok", "12.0 ms"),
        (diagnosis.judge_round_trips({A: 0.9}), "warn", "900.0 ms"),
        (diagnosis.judge_round_trips({}), "skip", "none was measured"),
    ],
)
def test_one_finding(check: Check, mark: str, words: str) -> None:
    assert (check.mark, words in check.found) == (mark, True), check
    assert bool(check.advice) == (mark in ("warn", "fail"))


@pytest.mark.parametrize(
    ("outcome", "found", "advice"),
    [
        ("refused", "nothing listens there (connection refused)", "has ended or has another port"),
        ("silent", "no answer (within 5 s)", "open TCP port 4001"),
        ("unreachable", "no way there (within 5 s)", "this machine's own network"),
        ("mute", "accepts connections but stays silent", "stopped or overloaded"),
        ("another", "another peer answers there", "has a new key"),
        ("stranger", "no Mycel node", "another port by now"),
    ],
)
def test_each_way_to_miss_a_peer_has_its_own_advice(outcome: str, found: str, advice: str) -> None:
    (check,) = judge_dials([Dial(A, PUBLIC, outcome, "within 5 s")])
    assert check.mark == "fail"
    assert found in check.found
    assert advice in check.advice


def test_a_name_that_does_not_resolve() -> None:
    (check,) = judge_dials([Dial(A, "/dns4/node.invalid/tcp/4001", "nameless", "name or service not known")])
    assert "the name node.invalid cannot be resolved (name or service not known)" in check.found
    (check,) = judge_dials([Dial(A, "/dns4/printer.local/tcp/4001", "hidden")])
    assert "not to DNS" in check.found


@pytest.mark.parametrize(
    ("address", "outcome", "advice"),
    [
        ("/ip4/127.0.0.1/tcp/1", "refused", "an address of this machine itself"),
        ("/ip4/192.168.1.9/tcp/1", "silent", "is a private address"),
        ("/ip4/192.168.1.9/tcp/1", "unreachable", "--announce"),
        ("/ip4/192.168.1.9/tcp/1", "refused", "The machine is up"),
        ("/ip6/2606:4700::1/tcp/1", "unreachable", "whether it has IPv6"),
    ],
)
def test_what_kind_of_address_it_is_explains_much(address: str, outcome: str, advice: str) -> None:
    (check,) = judge_dials([Dial(A, address, outcome)])
    assert advice in check.advice


def test_an_address_that_fails_beside_one_that_answers_is_doubtful_and_no_more() -> None:
    checks = judge_dials([Dial(A, PUBLIC, "found"), Dial(A, "/ip4/10.0.0.5/tcp/4001", "silent"), Dial(B, "x", "odd")])
    assert [check.mark for check in checks] == ["ok", "warn", "warn"]


@pytest.mark.parametrize(
    ("skews_s", "mark", "words"),
    [
        ({A: 1.0, B: -2.0}, "ok", "0.5 s from 2 peers"),
        ({A: 8.0, B: 9.0}, "warn", "this machine's clock is 8 s behind 2 peers"),
        ({A: -61.0, B: -60.0}, "fail", "this machine's clock is 60 s ahead of 2 peers"),
        ({A: 0.1, B: 0.2, "c": 900.0}, "ok", "0.2 s from 3 peers"),
        ({}, "skip", "no peer told its time"),
    ],
)
def test_clocks(skews_s: dict[str, float], mark: str, words: str) -> None:
    check = diagnosis.judge_clock(skews_s)
    assert (check.mark, check.found) == (mark, words)


def test_of_two_clocks_either_may_be_wrong() -> None:
    assert "If ours is right" in diagnosis.judge_clock({A: 30.0}).advice


@pytest.mark.parametrize(
    ("nodes", "me", "mark", "words"),
    [
        ([], None, "fail", "nobody serves this swarm now"),
        ([node(A, 0, 2)], None, "warn", "1 node for 4 blocks; nobody serves blocks 2:4"),
        ([node(A, 0, 4), node(B, 1, 3)], None, "ok", "2 nodes for 4 blocks, all served"),
        ([node(A, 0, 4)], A, "ok", "all served"),
        ([node(A, 0, 4)], B, "warn", "the node that runs here is not among them"),
    ],
)
def test_the_directory(nodes: list[PeerView], me: str | None, mark: str, words: str) -> None:
    check = diagnosis.judge_directory(View(4, {each.peer: each for each in nodes}), me)
    assert (check.mark, words in check.found) == (mark, True), check


def test_the_conclusion_names_what_causes_the_rest() -> None:
    """Records end by the clock, so a wrong one empties the directory."""
    checks = [
        Check("peer", "ok", "answers"),
        Check("directory", "fail", "nobody serves this swarm now", "x"),
        Check("reach", "warn", "others are not told", "x"),
        Check("clock", "fail", "this machine's clock is 60 s ahead of 2 peers", "x"),
    ]
    assert conclusion(checks) == "Most probable cause: this machine's clock is 60 s ahead of 2 peers."
    assert conclusion(checks[:1] + checks[2:3]) == "Nothing has failed. To look at: others are not told."


def test_when_nothing_is_wrong_it_says_what_was_seen() -> None:
    swarm, reach = Check("swarm", "ok", "demo"), Check("reach", "ok", "reachable")
    assert "can be reached" in conclusion([swarm, reach])
    assert "could not be tried" in conclusion([swarm, Check("reach", "skip", "nobody is there")])
    assert "no swarm was asked" in conclusion([])


def test_the_swarm_is_not_reached_only_if_it_was_looked_for() -> None:
    assert swarm_is_reached([Check("invite", "fail", "expired")])
    assert not swarm_is_reached([Check("swarm", "fail", "no peer answers")])
