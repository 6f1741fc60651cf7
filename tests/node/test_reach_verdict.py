"""Can this machine be reached? Judged from answers that are made up."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pytest

from mycel.node.diagnosis import Check
from mycel.node.reach_rules import NOT_TRIED
from mycel.node.reach_verdict import Reach, judge_reach
from mycel.protocols.messages import Dialled, DialResult

SEEN = "/ip4/8.8.4.4/tcp/50123"
MAPPED = "/ip4/8.8.4.4/tcp/4001"
PRIVATE = "/ip4/192.168.1.5/tcp/4001"
LOCAL = "/ip4/127.0.0.1/tcp/4001"
NOT_THERE = NOT_TRIED + "you come from 8.8.4.4, and only that host is dialled"


def judged(
    told: Sequence[str],
    results: Mapping[str, str],
    *,
    seen: str = SEEN,
    wanted: bool = True,
    fixed_port: bool = True,
    more: Sequence[Dialled] = (),
) -> list[Check]:
    answer = Dialled(tuple(DialResult(address, failure) for address, failure in results.items()), seen, 0.0)
    answers = {str(number): each for number, each in enumerate([answer, *more])}
    return judge_reach(Reach(told, list(results), answers, wanted=wanted, fixed_port=fixed_port))


def test_reached_where_others_are_told() -> None:
    seen, reach = judged([MAPPED], {MAPPED: ""})
    assert seen.found == "8.8.4.4 by 1 peer"
    assert (reach.mark, reach.found, reach.advice) == ("ok", "reachable at 8.8.4.4:4001", "")


def test_a_forwarded_port_that_nobody_is_told_of() -> None:
    _, reach = judged([PRIVATE], {MAPPED: "", PRIVATE: NOT_THERE})
    assert (reach.mark, reach.advice) == ("warn", f"Start the node with --announce {MAPPED}")
    _, reach = judged([PRIVATE], {MAPPED: "", PRIVATE: NOT_THERE}, fixed_port=False)
    assert reach.advice == f"Start the node with --port 4001 --announce {MAPPED}"


def test_behind_a_router_without_a_forwarded_port() -> None:
    results = {MAPPED: "no answer within 3 s", PRIVATE: NOT_THERE}
    _, reach = judged([PRIVATE], results)
    assert (reach.mark, "only a client" in reach.found) == ("fail", True)
    assert f"--announce {MAPPED}" in reach.advice
    _, reach = judged([PRIVATE], results, wanted=False)
    assert reach.mark == "warn"


def test_an_announced_port_that_is_shut() -> None:
    _, reach = judged([MAPPED], {MAPPED: "connection refused"})
    assert (reach.mark, reach.found) == ("fail", "not reachable at 8.8.4.4:4001: connection refused")
    assert "Open TCP port 4001" in reach.advice


def test_a_port_that_leads_elsewhere() -> None:
    for told in (MAPPED, PRIVATE):
        _, reach = judged([told], {MAPPED: "another peer answers there"})
        assert (reach.mark, "forwarded to another machine" in reach.advice) == ("fail", True)


def test_one_of_two_addresses_works() -> None:
    other = "/ip6/2606:4700::1/tcp/4001"
    _, *checks = judged([MAPPED, other], {MAPPED: "", other: "no answer within 3 s"})
    assert [check.mark for check in checks] == ["ok", "warn"]


def test_what_one_peer_could_not_try_another_could() -> None:
    elsewhere = Dialled((DialResult(MAPPED, ""),), SEEN, 0.0)
    _, reach = judged([MAPPED], {MAPPED: NOT_TRIED + "too many peers ask at once"}, more=[elsewhere])
    assert reach.mark == "ok"
    (_, reach) = judged([MAPPED], {MAPPED: "no answer within 3 s"}, more=[elsewhere])
    assert reach.mark == "ok"


def test_announcing_an_address_that_is_not_ours() -> None:
    wrong = "/ip4/8.8.8.8/tcp/4001"
    _, reach = judged([wrong], {wrong: NOT_THERE})
    assert (reach.mark, reach.found) == ("warn", "others are told 8.8.8.8:4001, but see this machine as 8.8.4.4")


def test_peers_of_this_network_cannot_try_the_address_of_another() -> None:
    _, reach = judged([MAPPED], {PRIVATE: "", MAPPED: NOT_TRIED + "no"}, seen="/ip4/192.168.1.5/tcp/5")
    assert (reach.mark, "8.8.4.4:4001 could not be tried" in reach.found) == ("skip", True)


def test_listening_on_loopback_reaches_nobody_else() -> None:
    _, reach = judged([LOCAL], {MAPPED: "connection refused", LOCAL: NOT_THERE})
    assert (reach.mark, "loopback alone" in reach.found) == ("fail", True)


def test_peers_on_this_machine_say_nothing_of_others() -> None:
    seen, reach = judged([PRIVATE], {LOCAL: "", PRIVATE: NOT_TRIED + "no"}, seen="/ip4/127.0.0.1/tcp/5")
    assert "says nothing of other machines" in seen.found
    assert reach.mark == "skip"
    _, reach = judged([LOCAL], {LOCAL: ""}, seen="/ip4/127.0.0.1/tcp/5")
    assert reach.mark == "ok"


def test_peers_that_are_too_busy() -> None:
    _, reach = judged([MAPPED], {MAPPED: NOT_TRIED + "too many peers ask at once"})
    assert (reach.mark, reach.found) == ("skip", "nobody tried: too many peers ask at once")


@pytest.mark.parametrize("seen", ["", "nonsense", "/dns4/evil.example/tcp/1", "/ip4/1.2.3/tcp/1"])
def test_a_peer_that_says_nonsense_of_where_we_are_is_not_believed(seen: str) -> None:
    assert [check.mark for check in judged([MAPPED], {MAPPED: "", "/dns4/evil.example/tcp/4001": ""}, seen=seen)] == [
        "skip"
    ]


def test_no_answer_at_all() -> None:
    (check,) = judge_reach(Reach([MAPPED], [MAPPED], {}, wanted=True, fixed_port=True))
    assert check.mark == "skip"
