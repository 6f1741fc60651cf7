"""Rules with a peer's own gradient or test data."""

from __future__ import annotations

import math
from random import Random

import pytest
import torch

from mycel.security.aggregators.local import (
    bristle_average,
    bristle_candidates,
    bristle_foreign_weights,
    bristle_weights,
    monna,
    nearest,
    own_cosine,
    squared_distances,
)
from tests.security.aggregators.cases import error, honest_rows

BAD = [torch.full((60,), torch.nan), torch.full((60,), 1e30), torch.full((60,), torch.inf)]


def test_own_cosine_withstands_a_majority_that_points_elsewhere():
    honest = honest_rows(4, 60)
    own, rows = honest[0], [*(-1000.0 * honest), *(-honest), *BAD, *honest[1:]]
    vector = own_cosine(rows, own)
    assert torch.nn.functional.cosine_similarity(vector, own, dim=0) > 0.8
    assert vector.norm() <= 1.001 * own.norm()


def test_own_cosine_equals_its_formula_and_has_an_answer_where_nobody_agrees():
    rows, own = honest_rows(5, 60, mean=0.1, spread=1.0), honest_rows(1, 60, seed=3)[0]
    cosine = torch.nn.functional.cosine_similarity(rows, own[None], dim=1).clamp(min=0.0)
    right = (cosine[:, None] * rows / rows.norm(dim=1, keepdim=True)).sum(dim=0) * own.norm() / cosine.sum()
    assert torch.allclose(own_cosine(list(rows), own), right, atol=1e-5)
    assert not own_cosine([-own, torch.zeros(60)], own).any()
    assert not own_cosine([own], torch.zeros(60)).any()
    assert not own_cosine([], own).any()


@pytest.mark.parametrize("lie", [1e3, 1e30, math.inf, math.nan])
def test_monna_takes_the_nearest(lie):
    honest = honest_rows(7, 60)
    rows = [torch.full((60,), lie)] * 3 + list(honest[1:])
    assert error(monna(rows, honest[0], 3), honest) < 1e-5
    assert torch.equal(monna(BAD, honest[0], 3), honest[0])


def test_distances_to_ones_own():
    rows, own = honest_rows(3, 100_000), honest_rows(1, 100_000, seed=1)[0]
    right = (rows.double() - own.double()).square().sum(dim=1)
    assert squared_distances([*rows, own * torch.nan], own) == pytest.approx([*right.tolist(), math.inf])
    assert nearest([3.0, math.inf, 1.0, 2.0], 5) == [2, 3, 0]


def test_bristle_takes_the_nearest_and_some_others():
    d2 = [float(i) for i in range(40)]
    chosen = bristle_candidates(d2, [], Random(1))
    assert chosen[:20] == list(range(20))
    assert len(set(chosen)) == 25
    assert chosen == bristle_candidates(d2, [], Random(1))
    assert chosen != bristle_candidates(d2, [], Random(2))
    # Earlier models fill the comparison: a model that arrives alone, and is farther than they are, is not near.
    assert bristle_candidates([100.0], [1.0] * 30, Random(1), n_near=5, n_random=0) == []
    assert bristle_candidates([0.5, 100.0], [1.0] * 30, Random(1), n_near=5, n_random=0) == [0]
    assert bristle_candidates([100.0], [], Random(1), n_near=5, n_random=0) == [0]
    assert bristle_candidates([math.inf, 1.0], [], Random(1)) == [1]


def test_bristle_weighs_by_what_a_model_does_on_my_data():
    own = [0.9, 0.5]
    better, same, worse = [0.95, 0.9], [0.9, 0.5], [0.1, 0.0]
    weights = bristle_weights(own, [better, same, worse])
    assert weights[0][1] > weights[1][1] > weights[2][1]
    assert weights[2] == [0.0, 0.0]
    # The formula, by hand: 10 |0.5 - 0.9| = 4, 4^3.5 = 128; certainty 0.925 - 0.025.
    assert weights[0][1] == pytest.approx((10 / (1 + math.exp(-1.28)) - 4) * 0.9)
    foreign = bristle_foreign_weights(own, [better, worse])
    assert foreign[0] > 1.0
    assert foreign[1] == 0.0


def test_bristle_punishes_a_row_of_bad_models():
    own, bad = [0.9], [0.7]
    weights = [row[0] for row in bristle_weights(own, [bad] * 5)]
    assert weights[0] > 0.0
    assert weights[1:] == [0.0] * 4


def test_bristle_averages_each_class_by_its_weights():
    own, peers = torch.zeros(3, 2), [torch.ones(3, 2), torch.full((3, 2), torch.nan), torch.full((3, 2), 5.0)]
    weights = torch.tensor([[1.0, 3.0], [9.0, 9.0], [0.0, 0.0]])
    mixed = bristle_average(own, peers, weights)
    assert torch.allclose(mixed, torch.tensor([0.5, 0.75]).expand(3, 2))
