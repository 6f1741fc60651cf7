"""What a round makes of several stages' rows: each for itself, and nothing of what is no contribution."""

from __future__ import annotations

import struct
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mycel.node.training.stage_reducer import MAX_SUM, StageReducer, weight_of
from mycel.protocols.errors import RemoteProtocolError
from mycel.swarm.codecs import Layout
from mycel.swarm.rounds.reducer import Row, ShardWork
from mycel.swarm.rounds.terms import GroupTerms

LAYOUTS = (Layout(((40, 8),)), Layout(((3, 8), (8,))))
SHARDS, NUMBERS, PLAN = 4, 8, bytes(32)


def reducer_of(rule: str = "mean", liars: float = 0.0, codec: str = "float32") -> StageReducer:
    return StageReducer(LAYOUTS, GroupTerms(320, rule, codec, liars=liars), NUMBERS)


def vector(stage: int, seed: int) -> Tensor:
    return torch.randn(LAYOUTS[stage].n_elements, generator=torch.Generator().manual_seed(seed))


def bodies(reducer: StageReducer, stage: int, vector_P: Tensor, version: int = 7, loss: float = 2.0) -> list[bytes]:
    encoders, seeds = reducer.encoders(stage, SHARDS), [bytes(32)] * SHARDS
    return reducer.encode(stage, encoders, vector_P, version, loss, seeds)


Brought = tuple[int, int, list[bytes]]  # stage, numbers counted, bodies


def round_of(reducer: StageReducer, brought: list[Brought]) -> list[bytes]:
    """The results, shard by shard, as aggregators make them."""
    works = [
        ShardWork(PLAN, shard, SHARDS, tuple(Row(own[shard], weight_of(stage, n)) for stage, n, own in brought))
        for shard in range(SHARDS)
    ]
    decision = b""
    if reducer.rule.needs_gram:
        rows = [replace(row, body=b"") for row in works[0].rows]
        decision = reducer.decide(rows, [reducer.gram(work) for work in works], PLAN)
    return [reducer.reduce(work, decision) for work in works]


def test_every_number_counts_alike_and_each_stage_for_itself() -> None:
    reducer = reducer_of()
    a_P, b_P, c_P = vector(0, 1), vector(0, 2), vector(1, 3)
    brought = [(0, 7, bodies(reducer, 0, a_P, loss=7.0)), (1, 8, bodies(reducer, 1, c_P, loss=0.0))]
    brought.append((0, 1, bodies(reducer, 0, b_P, loss=3.0)))
    found = reducer.read(round_of(reducer, brought))
    assert {stage: (one.version, one.loss) for stage, one in found.items()} == {0: (7, 10.0), 1: (7, 0.0)}
    torch.testing.assert_close(reducer.decode(0, found[0]), (7 * a_P + b_P) / 8)
    torch.testing.assert_close(reducer.decode(1, found[1]), c_P)


@pytest.mark.parametrize("rule", ["median", "nnm+geometric-median", "caf", "standing+caf"])
def test_a_liar_is_outvoted_in_its_stage_and_unheard_in_the_other(rule: str) -> None:
    reducer = reducer_of(rule, 0.3)
    good_P, other_P = vector(0, 1), vector(1, 2)
    brought = [(0, 2, bodies(reducer, 0, good_P + 0.01 * vector(0, 10 + peer))) for peer in range(3)]
    brought += [(1, 2, bodies(reducer, 1, other_P)) for _ in range(3)]
    brought.append((0, 2, bodies(reducer, 0, -1000 * good_P, loss=1e9)))
    found = reducer.read(round_of(reducer, brought))
    assert float((reducer.decode(0, found[0]) - good_P).abs().max()) < 0.1
    torch.testing.assert_close(reducer.decode(1, found[1]), other_P)
    assert found[0].loss == 8.0, "the median's, for all numbers"


@pytest.mark.parametrize("rule", ["mean", "median", "nnm+geometric-median"])
def test_what_is_no_contribution_is_passed_over(rule: str) -> None:
    reducer = reducer_of(rule)
    good_P = vector(0, 1)
    good = [(0, 2, bodies(reducer, 0, good_P)) for _ in range(3)]
    bad = [
        (0, 2, [b""] * SHARDS),
        (0, 2, [b"\xff" * 50] * SHARDS),
        (0, 2, bodies(reducer, 0, good_P, version=9)),
        (5, 2, bodies(reducer, 0, good_P)),
        (0, NUMBERS + 1, bodies(reducer, 0, -good_P)),
        (0, 0, bodies(reducer, 0, -good_P)),
        (1, 2, [b""] * SHARDS),
    ]
    found = reducer.read(round_of(reducer, good + bad))
    assert list(found) == [0]
    torch.testing.assert_close(reducer.decode(0, found[0]), good_P)


def test_a_round_of_nothing_brings_nothing() -> None:
    for rule in ("mean", "caf"):
        assert reducer_of(rule).read(round_of(reducer_of(rule), [])) == {}


def test_a_sum_stays_within_what_a_step_can_apply() -> None:
    reducer = reducer_of()
    found = reducer.read(round_of(reducer, [(1, 8, bodies(reducer, 1, torch.full((32,), 1e38)))] * 2))
    assert float(reducer.decode(1, found[1]).max()) == MAX_SUM


@settings(max_examples=60, deadline=None)
@given(st.lists(st.binary(max_size=60), min_size=1, max_size=4), st.data())
def test_hostile_results_are_read_or_refused(results: list[bytes], data: st.DataObject) -> None:
    reducer = reducer_of()
    head = struct.pack("<BQdI", data.draw(st.integers(0, 3)), 1, 0.0, data.draw(st.integers(0, 70)))
    for given_ in (results, [head + result for result in results]):
        try:
            found = reducer.read(given_)
            for stage, one in found.items():
                assert len(reducer.decode(stage, one)) <= LAYOUTS[stage].n_elements
        except RemoteProtocolError:
            pass
