"""Whole groups of round machines in virtual time. What must never be broken is asserted by `Net` at every event."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from dataclasses import replace

import pytest

from mycel.protocols.rounds import outcome_digest
from mycel.swarm.rounds.machine import RoundMachine
from tests.sim.round_liars import PROVABLE, Liar, corrupt
from tests.sim.round_net import TERMS, Net, hashed_signatures
from tests.sim.round_scenes import Scene


@pytest.fixture(autouse=True)
def _signatures() -> Iterator[None]:
    with hashed_signatures():
        yield


def started(net: Net) -> Net:
    for peer in net.nodes:
        net.start(peer)
    return net


def goes_on(net: Net, rounds: int, deadline_s: float) -> None:
    """All honest peers that are up see `rounds` more rounds."""
    done = max(len(node.chain) for node in net.honest)
    assert net.run(lambda: net.rounds_done(done + rounds), deadline_s), net.describe()


@pytest.mark.parametrize("n_peers", [1, 2, 3, 4, 8, 16])
@pytest.mark.parametrize("aggregators", [0, 1, 3])
def test_in_peace_a_round_takes_one_attempt_and_everybodys_contribution(n_peers, aggregators):
    net = started(Net(n_peers, n_peers, replace(TERMS, aggregators=aggregators, rule="krum")))
    goes_on(net, 3 if n_peers < 16 else 1, 20.0)
    assert all(certificate.attempt == 0 for node in net.honest for certificate in node.chain)
    assert all(len(outcome.offers) >= (2 * n_peers + 2) // 3 for outcome in net.outcomes.values())
    assert {outcome.members for outcome in net.outcomes.values()} == {tuple(sorted(net.nodes))}


@pytest.mark.parametrize("tens", range(20))
def test_whatever_happens_nothing_false_is_certified_and_peace_brings_rounds(tens):
    for seed in range(10 * tens, 10 * tens + 10):
        scene = Scene(seed, (1, 2, 3, 4, 4, 5), 3.0)
        assert scene.run(), f"seed {seed}, liars {scene.habits}\n{scene.net.describe()}"


@pytest.mark.slow
@pytest.mark.parametrize("thirties", range(10))
def test_more_peers_more_trouble(thirties):
    for seed in range(1000 + 30 * thirties, 1030 + 30 * thirties):
        scene = Scene(seed, (4, 5, 7, 7, 8, 10), 8.0)
        assert scene.run(), f"seed {seed}, liars {scene.habits}\n{scene.net.describe()}"


@pytest.mark.parametrize("habit", sorted(PROVABLE))
@pytest.mark.parametrize("aggregators", [3, 4])
def test_whoever_is_proved_to_lie_is_named_by_all_and_out_for_good(habit, aggregators):
    """Also two colluding liars in a jury of three, who claim first what nobody could compute."""
    terms = replace(TERMS, rule="krum", aggregators=aggregators)
    net = Net(7, 7, terms)
    liars = set(corrupt(net, random.Random(habit), 2, (habit,)))
    if habit in ("false_results", "false_to_some"):
        for liar in liars:
            net.nodes[liar].slow = 0.05
    started(net)
    goes_on(net, 8, 200.0)
    for node in net.honest:
        assert set(node.named) == liars, net.describe()
    assert not liars & set(net.members)
    assert set(net.outcomes[max(net.outcomes)].convicted) == liars


def test_false_grams_are_refuted_before_anything_is_decided_from_them():
    net = Net(3, 7, replace(TERMS, rule="krum"))
    liars = set(corrupt(net, random.Random(3), 2, ("false_grams",)))
    started(net)
    goes_on(net, 3, 100.0)
    assert all(set(node.named) == liars for node in net.honest), net.describe()


def test_a_slow_honest_aggregator_is_waited_for_before_two_quick_liars_are_believed():
    """A majority of a jury is not enough: liars need not compute."""
    net = Net(5, 4, TERMS)
    net.nodes["p001"].slow = 6.0
    net.nodes["p000"].liar = Liar(net, "p000", "false_results")
    started(net)
    goes_on(net, 3, 100.0)
    assert all(set(node.named) == {"p000"} for node in net.honest), net.describe()


def test_the_censor_of_contributions_is_overruled():
    net = Net(1, 4, TERMS)
    net.nodes["p000"].liar = Liar(net, "p000", "censoring")
    started(net)
    goes_on(net, 12, 400.0)
    assert all(len(outcome.offers) >= 3 for outcome in net.outcomes.values())
    assert set(net.members) == set(net.nodes)


def test_of_a_partition_the_side_with_a_quorum_goes_on_and_the_other_follows_when_it_is_over():
    net = started(Net(2, 7))
    goes_on(net, 1, 20.0)
    cut_off = {"p000", "p003"}
    net.partition(cut_off)
    before = {peer: len(net.nodes[peer].chain) for peer in cut_off}
    majority = [node for node in net.honest if node.peer not in cut_off]
    assert net.run(lambda: all(len(node.chain) >= 3 for node in majority), 100.0), net.describe()
    assert {peer: len(net.nodes[peer].chain) for peer in cut_off} == before
    net.heal()
    goes_on(net, 2, 60.0)
    assert len({node.states[len(net.nodes["p000"].chain) - 1] for node in net.honest}) == 1


def test_without_a_quorum_on_either_side_nothing_is_certified():
    net = started(Net(4, 4))
    net.partition({"p000", "p001"})
    net.run(lambda: False, 100.0)
    assert not net.outcomes
    net.heal()
    goes_on(net, 2, 100.0)


@pytest.mark.parametrize("moment_s", [0.3, 0.7, 1.0, 1.2, 1.4, 1.6])
def test_a_group_that_loses_power_goes_on_from_what_it_wrote_down(moment_s):
    """Votes bind over a restart, and what they are for is known still; nobody seems to have said two things."""
    net = started(Net(11, 4))
    net.run(lambda: False, moment_s)
    for peer in net.nodes:
        net.kill(peer)
    for peer in net.nodes:
        net.start(peer)
    goes_on(net, 2, 200.0)
    assert not any(node.named for node in net.honest)


def test_a_peer_alone_goes_on_after_a_crash_between_its_vote_and_its_certificate():
    net = started(Net(1, 1))
    node = net.nodes["p000"]
    assert net.run(lambda: any(type(said).__name__ == "Vote" for said in node.book), 10.0)
    net.kill("p000")
    net.start("p000")
    goes_on(net, 1, 10.0)


def test_a_founder_alone_admits_others_and_waits_for_enough_of_them():
    net = Net(6, 5, replace(TERMS, min_members=4), founders=1)
    started(net)
    assert net.run(lambda: len(net.members) == 5, 30.0), net.describe()
    goes_on(net, 2, 60.0)
    gathered = [outcome for outcome in net.outcomes.values() if not outcome.offers]
    assert gathered
    assert all(not outcome.contributors for outcome in gathered)
    assert len(net.outcomes[max(net.outcomes)].offers) >= 4


@pytest.mark.parametrize("seed", range(3))
def test_members_come_and_go_through_twenty_rounds(seed):
    rng = random.Random(seed)
    net = Net(seed, 9, replace(TERMS, absences=2, patience_s=6.0, longest_grace_s=1.0), founders=3)
    for peer in sorted(net.nodes)[:3]:
        net.start(peer)
    for step in range(20):
        names = sorted(net.nodes)
        up = [peer for peer in names if net.nodes[peer].is_up and peer in net.members]
        down = [peer for peer in names if not net.nodes[peer].is_up]
        if down and (len(net.members) < 4 or rng.random() < 0.5):
            net.nodes[rng.choice(down)].wants = "member"
            net.start(rng.choice(down))
        elif len(up) == len(net.members) >= 4 and all(len(net.nodes[p].chain) == len(net.outcomes) for p in up):
            # Not before all know of the fourth: of three members all have to sign.
            leaver = net.nodes[rng.choice(up)]
            if rng.random() < 0.5:
                net.kill(leaver.peer)
            else:
                leaver.wants = "leave"
                leaver.act(leaver.machine.want("leave", net.now))
        done = max(len(node.chain) for node in net.honest)
        deadline_s = 120.0
        assert net.run(lambda: max(len(n.chain) for n in net.honest if n.is_up) > done, deadline_s), net.describe()  # noqa: B023
        assert net.members, step
    up = [node for node in net.nodes.values() if node.is_up]
    for node in up:
        assert [outcome_digest(c.outcome) for c in node.chain] == [
            outcome_digest(net.outcomes[number]) for number in range(1, len(node.chain) + 1)
        ]


def test_who_looks_on_learns_of_every_round_and_holds_nothing_up():
    net = Net(8, 5, TERMS, founders=4)
    net.nodes["p004"].wants = "observer"
    started(net)
    goes_on(net, 3, 30.0)
    assert "p004" not in net.members
    assert len(net.nodes["p004"].chain) == 3


def test_forgers_break_the_rules_and_change_nothing():
    net = Net(9, 4, TERMS)
    net.nodes["p002"].liar = Liar(net, "p002", "forging")
    started(net)
    goes_on(net, 4, 100.0)
    assert {peer for _, peer, _ in net.rules_broken} == {"p002"}
    assert set(net.members) == set(net.nodes)


@pytest.mark.slow
def test_the_machine_of_one_of_64_members_takes_little_time_for_a_round(monkeypatch):
    spent: dict[int, float] = {}
    receive = RoundMachine.receive

    def timed(machine, peer, message, now):
        begin = time.process_time()
        actions = receive(machine, peer, message, now)
        spent[id(machine)] = spent.get(id(machine), 0.0) + time.process_time() - begin
        return actions

    monkeypatch.setattr(RoundMachine, "receive", timed)
    net = started(Net(1, 64, replace(TERMS, n_elements=1 << 18, rule="krum")))
    goes_on(net, 1, 30.0)
    assert sum(spent.values()) / len(spent) < 0.3
