"""What liars send is what the papers say, and what a real training run makes of it under our rule and under others."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from mycel.protocols.errors import ConfigError
from mycel.security.aggregators import UNIT, aggregate, combine, gram, parse_rule
from mycel.security.aggregators.standing import Standing, decide_standing
from mycel.security.attacks import ATTACKS, LONERS, Play, Scene, attack, flip_labels, play
from mycel.security.attacks.scene import DELAY_ROUNDS, Memory
from mycel.security.attacks.together import TURN_ROUNDS

ROOT = Path(__file__).parents[2]
N_HONEST, N_LIARS, N_PARAMETERS = 16, 4, 50


def _rows(seed: int, n: int = N_HONEST) -> Tensor:
    """Honest rows: a common direction, and as much of their own."""
    generator = torch.Generator().manual_seed(seed)
    return torch.ones(N_PARAMETERS) + torch.randn(n, N_PARAMETERS, generator=generator)


def _scene(seed: int = 0, rule: str = "mean", memory: Memory | None = None) -> Scene:
    honest_NP = _rows(seed)

    def swarm(rows_FP: Tensor) -> Tensor:
        return aggregate([*honest_NP, *rows_FP], parse_rule(rule), N_LIARS).vector

    rng = torch.Generator().manual_seed(seed)
    return Scene(honest_NP, _rows(seed + 1000, N_LIARS), swarm, memory or Memory(), rng)


# ------------------------------------------------------------------------------------------------------------- together


@pytest.mark.parametrize("name", ATTACKS)
def test_each_attack_gives_a_row_for_each_liar_and_leaves_the_honest_rows_alone(name: str) -> None:
    scene = _scene()
    honest_NP, own_FP = scene.honest.clone(), scene.own.clone()
    rows_FP = attack(name)(scene)
    assert rows_FP.shape == (N_LIARS, N_PARAMETERS)
    assert rows_FP.dtype == torch.float32
    rows_FP += 1.0  # they are the liars' own, no views
    assert torch.equal(scene.honest, honest_NP)
    assert torch.equal(scene.own, own_FP)


@pytest.mark.parametrize("name", ATTACKS)
def test_an_attack_depends_on_what_it_sees_alone(name: str) -> None:
    torch.testing.assert_close(attack(name)(_scene(3)), attack(name)(_scene(3)), rtol=0, atol=0, equal_nan=True)


def test_little_is_enough_takes_its_z_from_the_numbers_of_peers() -> None:
    # n = 20, f = 4: 11 make a majority, so 7 honest ones must lie further out: Phi(z) = 9 / 16.
    scene = _scene()
    z = (scene.mean - attack("alie")(scene)[0]) / scene.spread
    torch.testing.assert_close(z, torch.full_like(z, 0.1573), rtol=0, atol=1e-3)


def test_inner_product_manipulation_is_the_mean_backwards() -> None:
    scene = _scene()
    assert torch.equal(attack("ipm-0.1")(scene)[0], -0.1 * scene.mean)
    assert torch.equal(attack("ipm-10")(scene)[3], -10.0 * scene.mean)


@pytest.mark.parametrize("name", ["min-max", "min-sum"])
def test_the_hidden_row_is_as_far_out_as_it_can_be_and_no_further(name: str) -> None:
    scene = _scene()
    row_P = attack(name)(scene)[0]

    def size(rows_NP: Tensor) -> float:
        apart = torch.cdist(rows_NP, scene.honest)
        return float(apart.max() if name == "min-max" else apart.square().sum(dim=1).max())

    beyond_P = scene.mean + 1.05 * (row_P - scene.mean)
    assert size(row_P[None]) <= size(scene.honest) < size(beyond_P[None])


def test_mimics_copy_the_honest_peer_that_is_furthest_out() -> None:
    honest_NP = 0.01 * _rows(0)
    honest_NP[5, 7] += 10.0
    scene = Scene(honest_NP, honest_NP[:N_LIARS], lambda rows: rows[0], Memory(), torch.Generator().manual_seed(0))
    lie = attack("mimic")
    for _ in range(3):
        rows_FP = lie(scene)
    assert all(torch.equal(row_P, honest_NP[5]) for row_P in rows_FP)


@pytest.mark.parametrize("rule", ["mean", "trimmed-mean", "multi-krum", "centered-clip", "nnm+geometric-median"])
@pytest.mark.parametrize(("searching", "fixed"), [("opt-ipm", ("ipm-0.1", "ipm-10")), ("opt-alie", ("alie",))])
def test_a_search_does_more_harm_to_the_rule_in_force_than_a_fixed_factor(
    rule: str, searching: str, fixed: tuple[str, ...]
) -> None:
    scene = _scene(rule=rule)

    def harm(name: str) -> float:
        return float((scene.aggregate(attack(name)(scene)) - scene.mean).norm())

    # z = 0.16 of alie is not among those that are tried: a hundredth is granted.
    assert harm(searching) >= 0.99 * max(harm(name) for name in fixed)
    assert harm(searching) > float((scene.aggregate(scene.own) - scene.mean).norm())


def test_a_search_is_against_the_rule_not_against_a_guess() -> None:
    # Against the mean the largest factor does most; trimming takes that one off, and a small one does more.
    chosen = {
        rule: float(attack("opt-ipm")(_scene(rule=rule)).abs().max()) for rule in ("mean", "trimmed-mean", "krum")
    }
    assert chosen["mean"] > 50.0
    assert chosen["krum"] < 2.0


def test_the_shifted_rows_are_as_unlike_as_honest_ones() -> None:
    scene = _scene(rule="caf")
    rows_FP = attack("opt-shift")(scene)
    assert float(scene.aggregate(rows_FP) @ scene.mean) < float(scene.aggregate(scene.own) @ scene.mean)
    torch.testing.assert_close(torch.cdist(rows_FP, rows_FP), torch.cdist(scene.own, scene.own), rtol=1e-3, atol=1e-3)


def test_delayed_rows_are_the_honest_mean_of_long_ago() -> None:
    memory, lie = Memory(), attack("delayed")
    means = []
    for seed in range(2 * DELAY_ROUNDS):
        scene = _scene(seed, memory=memory)
        rows_FP = lie(scene)
        means.append(scene.mean)
        expected_P = means[-1] if seed < DELAY_ROUNDS else means[seed - DELAY_ROUNDS]
        assert torch.equal(rows_FP[0], expected_P)
        memory.remember(scene.mean)
    assert len(memory.means) <= DELAY_ROUNDS + 1


def test_traitors_are_honest_for_a_while_before_they_pull_backwards() -> None:
    lie, honest, lies = attack("traitor"), 0, 0
    for seed in range(2 * TURN_ROUNDS):
        scene = _scene(seed)
        rows_FP = lie(scene)
        honest += seed < TURN_ROUNDS and torch.equal(rows_FP, scene.own)
        lies += seed >= TURN_ROUNDS and float(rows_FP[0] @ scene.mean) < 0.0
    assert (honest, lies) == (TURN_ROUNDS, TURN_ROUNDS)


def test_flipped_labels_are_flipped_back_by_flipping_again() -> None:
    labels = torch.arange(10)
    assert flip_labels(labels, 10).tolist() == list(range(9, -1, -1))
    assert torch.equal(flip_labels(flip_labels(labels, 10), 10), labels)


# ---------------------------------------------------------------------------------------------------------------- alone


@pytest.mark.parametrize("name", LONERS)
def test_each_lone_liar_sends_a_row_and_keeps_its_own(name: str) -> None:
    lie, own_P = play(name, seed=1), _rows(0)[0]
    before_P = own_P.clone()
    for round_ in range(3):
        assert lie(own_P, round_).shape == own_P.shape
    assert torch.equal(own_P, before_P)


@pytest.mark.parametrize(("name", "n_bad"), [("nan", 1), ("inf", N_PARAMETERS), ("huge", 0)])
def test_rows_that_are_no_numbers(name: str, n_bad: int) -> None:
    row_P = play(name)(_rows(0)[0], 0)
    assert int((~torch.isfinite(row_P)).sum()) == n_bad
    assert name != "huge" or float(row_P.abs().min()) > 9e29


def test_what_lone_liars_keep_from_round_to_round() -> None:
    rows_NP = _rows(0, 30)
    sent = {name: [play_(row_P, i) for i, row_P in enumerate(rows_NP)] for name, play_ in _players().items()}
    assert all(torch.equal(row_P, rows_NP[0]) for row_P in sent["replay"])
    assert torch.equal(sent["delayed"][29], rows_NP[29 - DELAY_ROUNDS])
    directions = [row_P / row_P.norm() for row_P in sent["constant"]]
    assert all(torch.allclose(direction, directions[0], atol=1e-5) for direction in directions)
    assert not torch.allclose(sent["gaussian"][0], sent["gaussian"][1])


def _players() -> dict[str, Play]:
    return {name: play(name) for name in ("replay", "delayed", "constant", "gaussian")}


def test_unknown_names_are_refused_with_those_there_are() -> None:
    with pytest.raises(ConfigError, match=r"'nice'; possible: sign-flip, "):
        play("nice")
    with pytest.raises(ConfigError, match=r"'nice'; possible: .*opt-ipm"):
        attack("nice")
    with pytest.raises(ConfigError):
        play("opt-ipm")  # that one has to know the others


# ------------------------------------------------------------------------------------------------------------- standing

PEERS = tuple(f"peer {i:02d}" for i in range(N_HONEST + N_LIARS))


def _round(standing: Standing, seed: int, liars_FP: Tensor, rule: str = "caf") -> tuple[Tensor, Standing, str]:
    rows = [*_rows(seed), *liars_FP]
    decision, after = decide_standing(
        parse_rule(rule), gram(rows, None), N_LIARS, peers=PEERS, standing=standing, seed=b"beacon"
    )
    return combine(parse_rule(rule), rows, decision, None, N_LIARS), after, decision.reason


def test_who_pulls_backwards_is_set_aside_and_no_one_else() -> None:
    standing = Standing()
    for seed in range(3):
        backwards_FP = -0.3 * _rows(seed).mean(dim=0).expand(N_LIARS, -1)
        vector_P, standing, reason = _round(standing, seed, backwards_FP)
    assert standing.set_aside(PEERS, N_LIARS) == tuple(range(N_HONEST, N_HONEST + N_LIARS))
    assert reason.startswith("4 of 20 rows set aside for their standing; caf of 16 rows")
    assert float(vector_P.mean()) > 0.9


def test_never_more_are_set_aside_than_may_lie() -> None:
    bad = Standing(dict.fromkeys(PEERS, -5))
    assert bad.set_aside(PEERS, N_LIARS) == (0, 1, 2, 3)
    assert bad.set_aside(PEERS, 0) == ()
    assert len(bad.set_aside(PEERS, 100)) == 9
    assert bad.set_aside((), 4) == ()


def test_standing_belongs_to_names_not_to_places() -> None:
    rows, order = list(_rows(0, len(PEERS))), list(reversed(range(len(PEERS))))
    rule = parse_rule("caf")
    _, forward = decide_standing(rule, gram(rows, None), 4, peers=PEERS, standing=Standing(), seed=b"")
    turned = [rows[i] for i in order]
    names = [PEERS[i] for i in order]
    _, backward = decide_standing(rule, gram(turned, None), 4, peers=names, standing=Standing(), seed=b"")
    assert all(abs(forward.scores[name] - backward.scores[name]) <= 1 for name in PEERS)
    assert forward.of(PEERS[:2]).scores == {name: forward.scores[name] for name in PEERS[:2]}


def test_the_best_past_pays_for_45_rounds() -> None:
    standing, rounds = Standing({"traitor": UNIT, "other": UNIT, "third": UNIT}), 0
    while not standing.set_aside(("traitor", "other", "third"), 1):
        standing, rounds = standing.after(("traitor", "other", "third"), (-UNIT, UNIT, UNIT)), rounds + 1
    assert rounds == 45


def test_scores_stay_within_one_cosine_and_rows_of_nought_move_nothing() -> None:
    standing = Standing()
    for seed in range(30):
        _, standing, _ = _round(standing, seed, torch.zeros(N_LIARS, N_PARAMETERS))
    assert all(0 <= standing.scores[name] <= UNIT for name in PEERS)
    assert all(standing.scores[name] == 0 for name in PEERS[N_HONEST:])


def test_a_rule_without_weights_has_no_standing() -> None:
    with pytest.raises(ConfigError, match="which trimmed-mean does not"):
        _round(Standing(), 0, _rows(1, N_LIARS), rule="trimmed-mean")


# ------------------------------------------------------------------------------------------------- a real training run


def _matrix(*arguments: str) -> dict[str, dict[str, float]]:
    """The cells of one part of benchmarks/attackers.py, in a process of its own: numpy counts its threads at import."""
    environment = {**os.environ, "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "benchmarks.attackers", "--seeds", "1", "--json", "/dev/stdout", *arguments]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    cells: dict[str, dict[str, dict[str, float]]] = json.loads(done.stdout[done.stdout.index("\n{\n") :])
    return cells[arguments[1]]


@pytest.mark.slow
def test_beacon_data_and_our_rule_keep_the_accuracy_where_the_mean_is_lost() -> None:
    # 60 steps; the bounds are those of the whole matrix.
    cells = _matrix(
        *("--parts", "iid20", "--steps", "60", "--rules", "mean,standing+caf"),
        *("--attacks", "label-flip,sign-flip,x1000,nan,huge,opt-ipm"),
    )
    oracle = cells["oracle"]["none"]
    assert all(accuracy >= oracle - 5.0 for accuracy in cells["standing+caf"].values()), cells
    assert sum(not accuracy >= oracle - 30.0 for accuracy in cells["mean"].values()) >= 2, cells


@pytest.mark.slow
def test_on_unlike_data_our_rule_beats_every_classical_one_in_its_worst_cell() -> None:
    cells = _matrix(
        *("--parts", "dir20", "--steps", "120", "--attacks", "sign-flip,opt-ipm"),
        *("--rules", "trimmed-mean,multi-krum,geometric-median,standing+caf"),
    )
    worst = {rule: min(accuracies.values()) for rule, accuracies in cells.items()}
    assert worst["standing+caf"] >= 15.0 + max(worst[rule] for rule in worst if rule not in ("oracle", "standing+caf"))
