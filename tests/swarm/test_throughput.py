"""The throughput of a swarm is the optimum of the linear program that defines it, and its bottleneck is a cut."""

from __future__ import annotations

import math
from random import Random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linprog

from mycel.swarm.throughput import (
    DEFAULT_BLOCK_TIME_S,
    Supply,
    cut_flow,
    kept_blocks,
    max_flow,
    measured,
    supply,
    swarm_flow,
)
from tests.swarm.swarms import peer, view_of, views

INF = math.inf


def by_linear_program(supplies: list[Supply], n_blocks: int) -> float:
    """Maximize F: x_ib <= link_i in the span and 0 elsewhere, sum_b x_ib <= work_i, sum_i x_ib >= F."""
    n = len(supplies)
    rows, bounds = [], [(0.0, None)]
    for i, each in enumerate(supplies):
        rows.append([0.0, *(float(j == i) for j in range(n) for _ in range(n_blocks))])
        bounds += [(0.0, min(each.link, each.work) if each.mask >> b & 1 else 0.0) for b in range(n_blocks)]
    rows += [[1.0, *(-float(c == b) for _ in range(n) for c in range(n_blocks))] for b in range(n_blocks)]
    limits = [each.work for each in supplies] + [0.0] * n_blocks
    objective = np.zeros(1 + n * n_blocks)
    objective[0] = -1.0
    return float(-linprog(objective, A_ub=np.array(rows), b_ub=limits, bounds=bounds).fun)


def draw(rng: Random, n_peers: int, n_blocks: int) -> list[Supply]:
    found = []
    for _ in range(n_peers):
        length = rng.randint(1, n_blocks)
        start = rng.randint(0, n_blocks - length)
        work = 100.0 * 10.0 ** rng.random()
        found.append(Supply(start, start + length, work, INF if rng.random() < 0.4 else work * rng.uniform(0.05, 1.2)))
    return found


@pytest.mark.parametrize("seed", range(100))
def test_it_is_the_optimum_of_the_linear_program(seed: int):
    rng = Random(seed)
    n_blocks = rng.randint(1, 12)
    supplies = draw(rng, rng.randint(1, 8), n_blocks)
    assert max_flow(supplies, n_blocks).tokens_per_s == pytest.approx(by_linear_program(supplies, n_blocks), rel=1e-6)


@given(st.randoms(use_true_random=False), st.integers(1, 10), st.integers(0, 7))
@settings(max_examples=50)
def test_the_bottleneck_allows_just_that_much_and_every_other_set_no_less(rng, n_blocks, n_peers):
    supplies = draw(rng, n_peers, n_blocks)
    found = max_flow(supplies, n_blocks)
    assert cut_flow(supplies, found.bottleneck) == pytest.approx(found.tokens_per_s)
    for blocks in range(1, 1 << n_blocks, 1 + (1 << n_blocks) // 64):
        assert cut_flow(supplies, blocks) >= found.tokens_per_s * (1 - 1e-9)
    assert found.blocks == tuple(b for b in range(n_blocks) if found.bottleneck >> b & 1)


@given(st.randoms(use_true_random=False), st.integers(1, 10), st.integers(0, 6))
@settings(max_examples=50)
def test_another_peer_never_makes_it_less(rng, n_blocks, n_peers):
    supplies = draw(rng, n_peers, n_blocks)
    (another,) = draw(rng, 1, n_blocks)
    more = max_flow([*supplies, another], n_blocks).tokens_per_s
    assert more >= max_flow(supplies, n_blocks).tokens_per_s * (1 - 1e-9)


def test_a_peer_gives_its_time_where_it_is_needed():
    # Both could do 100 of each of their blocks; block 1 is not left to both alike.
    assert max_flow([Supply(0, 2, 200.0, INF), Supply(1, 3, 200.0, INF)], 3).tokens_per_s == pytest.approx(400 / 3)


def test_a_link_carries_each_token_once_for_every_block():
    fast = Supply(0, 2, 1000.0, 50.0)
    assert max_flow([fast, Supply(0, 2, 40.0, INF)], 2).tokens_per_s == pytest.approx(70.0)


def test_some_must_take_over_from_others_in_a_row():
    """The one that ends first is not always the one to ask first when links count."""
    supplies = [Supply(0, 2, 10.0, 10.0), Supply(0, 3, 9.0, 3.0), Supply(2, 3, 4.0, 4.0)]
    assert max_flow(supplies, 3).tokens_per_s == pytest.approx(by_linear_program(supplies, 3))


def test_blocks_that_nobody_serves_are_the_bottleneck():
    found = max_flow([Supply(0, 2, 10.0, INF), Supply(3, 4, 10.0, INF)], 5)
    assert (found.tokens_per_s, found.blocks) == (0.0, (2, 4))
    assert max_flow([], 2).blocks == (0, 1)


def test_what_an_announcement_comes_to():
    announced = peer("a", 2, 6, block_time_s=0.002, overhead_s=0.002, link_bytes_per_s=6000.0)
    assert supply(announced, 60.0) == Supply(2, 6, pytest.approx(400.0), 100.0)
    assert supply(announced).link == INF
    assert supply(peer("a", 0, 1), 60.0).link == INF


@given(views())
def test_only_who_serves_counts(view):
    gone = [name for name, each in view.peers.items() if not each.serving]
    assert swarm_flow(view) == swarm_flow(view.without(gone))
    assert (swarm_flow(view).tokens_per_s > 0) == (not view.missing())


def test_who_has_not_measured_itself_counts_like_the_median():
    view = view_of(
        2, *(peer(n, 0, 2, block_time_s=t) for n, t in (("a", 0.0), ("b", 0.001), ("c", 0.004), ("d", 0.005)))
    )
    assert measured(view).peers["a"].block_time_s == 0.004
    assert measured(view_of(2, peer("a", 0, 2, block_time_s=0.0))).peers["a"].block_time_s == DEFAULT_BLOCK_TIME_S


def test_what_others_may_count_on():
    view = view_of(8, peer("a", 0, 4), peer("b", 0, 4, state="joining"), peer("c", 0, 4, state="leaving"))
    assert [kept_blocks(view, name) for name in "abc"] == [0b1111, 0, 0]
    moving = view_of(8, peer("a", 0, 4, moving_to=(2, 6)))
    assert kept_blocks(moving, "a") == 0b1100
