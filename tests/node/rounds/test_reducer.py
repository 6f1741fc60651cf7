"""Shards reduced by themselves give what the rule gives on the whole; a body that is no vector counts for nothing."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from mycel.protocols.errors import ConfigError
from mycel.security.aggregators import Decision, aggregate, parse_rule
from mycel.swarm.codecs import Layout, make_codec
from mycel.swarm.rounds.claims import standing_after
from mycel.swarm.rounds.reducer import Row, ShardWork, VectorReducer
from mycel.swarm.rounds.terms import GroupTerms

LAYOUT = Layout(((40, 16), (100,), (7, 3, 5), ()))
P = LAYOUT.n_elements
N_SHARDS = 5
PLAN = bytes(range(32))


def reducer_of(rule: str, liars: float = 0.25, **changes: str) -> VectorReducer:
    return VectorReducer(LAYOUT, GroupTerms(P, rule=rule, liars=liars, **changes))


def rows_of(n_rows: int, seed: int = 0) -> list[torch.Tensor]:
    """Around one direction, two of them far away."""
    generator = torch.Generator().manual_seed(seed)
    rows = [1 + 0.1 * torch.randn(P, generator=generator) for _ in range(n_rows)]
    return [*rows[:-2], -5 * rows[-2], 30 * torch.randn(P, generator=generator)]


def bodies_of(reducer: VectorReducer, row_P: torch.Tensor) -> list[bytes]:
    parts = reducer.shards(N_SHARDS)
    return [
        reducer.codec.encoder(part).encode(slice_P, PLAN)
        for slice_P, part in zip(reducer.cut(row_P, N_SHARDS), parts, strict=True)
    ]


def reduced(
    reducer: VectorReducer, contributions: list[list[bytes]], before: tuple[bytes, ...] = (), **rows: list[int]
) -> list[bytes]:
    """All shards, as aggregators do it."""
    meta = [dict(zip(rows, values, strict=True)) for values in zip(*rows.values(), strict=True)] if rows else []
    works = [
        ShardWork(
            PLAN,
            shard,
            N_SHARDS,
            tuple(Row(bodies[shard], **(meta[i] if meta else {})) for i, bodies in enumerate(contributions)),
            before,
        )
        for shard in range(N_SHARDS)
    ]
    decision = b""
    if reducer.rule.needs_gram:
        grams = [reducer.gram(work) for work in works]
        assert {len(gram) for gram in grams} == {2 * len(contributions) * (len(contributions) + 1)}
        decision = reducer.decide([replace(row, body=b"") for row in works[0].rows], grams, PLAN)
    return [reducer.reduce(work, decision) for work in works]


@pytest.mark.parametrize("rule", ["mean", "median", "trimmed-mean", "nnm+geometric-median", "krum", "centered-clip"])
@pytest.mark.parametrize("with_center", [False, True])
def test_shards_together_give_what_the_rule_gives_on_the_whole(rule: str, with_center: bool) -> None:
    reducer, rows = reducer_of(rule), rows_of(8)
    center_P, before = None, ()
    if with_center:
        before = tuple(reduced(reducer_of("median"), [bodies_of(reducer, row) for row in rows_of(5, seed=9)]))
        center_P = reducer.decode(before)
    results = reduced(reducer, [bodies_of(reducer, row) for row in rows], before)
    whole = aggregate(rows, parse_rule(rule), 2, center=center_P if reducer.needs_before else None, seed=PLAN)
    assert torch.allclose(reducer.decode(results), whole.vector, atol=1e-5)
    if rule != "mean":
        assert float((reducer.decode(results) - 1).abs().max()) < 0.6


def test_weights_are_capped_and_late_contributions_count_less() -> None:
    reducer, rows = reducer_of("mean", liars=0.0), [torch.full((P,), float(i)) for i in (0, 10, 100)]
    contributions = [bodies_of(reducer, row) for row in rows]
    plain = reducer.decode(reduced(reducer, contributions))
    assert torch.allclose(plain, torch.full((P,), 110 / 3))
    greedy = reducer.decode(reduced(reducer, contributions, weight=[4, 4, 2**32], staleness=[0, 0, 0]))
    assert torch.allclose(greedy, torch.full((P,), (10 + 200) / 4), rtol=1e-5)
    late = reducer.decode(reduced(reducer, contributions, weight=[1, 1, 1], staleness=[0, 0, 3]))
    assert torch.allclose(late, torch.full((P,), (10 + 25) / 2.25), rtol=1e-5)


@pytest.mark.parametrize("rule", ["mean", "nnm+geometric-median"])
@pytest.mark.parametrize("body", [b"", b"nonsense", b"\xff" * 4000])
def test_a_body_that_is_no_vector_counts_for_nothing(rule: str, body: bytes) -> None:
    """By distances in no shard, else in none where it is none."""
    reducer = reducer_of(rule, liars=0.2)
    good = [bodies_of(reducer, torch.full((P,), float(value))) for value in (1, 1, 1, 2)]
    bad = bodies_of(reducer, torch.full((P,), 1.5))
    bad[2] = body
    results = reduced(reducer, [*good, bad])
    if rule == "mean":
        assert results[2] == reduced(reducer, good)[2]
    else:  # one of five was to be withstood, and it is out already
        assert results == reduced(VectorReducer(LAYOUT, replace(reducer.terms, liars=0.0)), good)
    nobody = reducer.decode(reduced(reducer, [[body] * N_SHARDS] * 3))
    assert torch.equal(nobody, torch.zeros(P))


def test_huge_rows_and_false_grams_bring_nothing_down() -> None:
    reducer = reducer_of("nnm+geometric-median")
    huge = [bodies_of(reducer, torch.full((P,), value)) for value in (1.0, 1.0, 1.0, 1e30)]
    assert torch.allclose(reducer.decode(reduced(reducer, huge)), torch.ones(P))
    rows = [Row(b"")] * 4
    for false in (b"", b"\xff" * 40, bytes(39), b"\x00\x00\x80\x7f" * 10):
        decision = reducer.decide(rows, [false, bytes(40)], PLAN)
        work = ShardWork(PLAN, 0, N_SHARDS, tuple(Row(bodies[0]) for bodies in huge))
        assert len(reducer.reduce(work, decision)) > 0


def test_a_vector_with_fewer_rows_than_shards_has_empty_ones() -> None:
    layout = Layout(((2, 50),))
    reducer = VectorReducer(layout, GroupTerms(100, rule="nnm+median", liars=0.3))
    assert [reducer.max_bytes(shard, 4) > 0 for shard in range(4)] == [True, True, False, False]
    rows = [torch.full((100,), float(value)) for value in (1, 2, 30)]
    results, grams = [], []
    for kind in ("gram", "sum"):
        for shard in range(4):
            bodies = [reducer.cut(row, 4)[shard].numpy().tobytes() if shard < 2 else b"" for row in rows]
            parts = layout.cut(4)
            if shard < 2:
                bodies = [
                    make_codec("float32").encoder(parts[shard]).encode(reducer.cut(row, 4)[shard], PLAN) for row in rows
                ]
            work = ShardWork(PLAN, shard, 4, tuple(map(Row, bodies)))
            if kind == "gram":
                grams.append(reducer.gram(work))
            else:
                results.append(reducer.reduce(work, reducer.decide([Row(b"")] * 3, grams, PLAN)))
    assert results[2:] == [b"", b""]
    assert reducer.decode(results).shape == (100,)


def test_bad_terms_are_one_line() -> None:
    with pytest.raises(ConfigError):
        reducer_of("average")
    with pytest.raises(ConfigError):
        reducer_of("mean", codec="float5")
    with pytest.raises(ValueError, match="a layout of"):
        VectorReducer(LAYOUT, GroupTerms(P + 1))


def test_who_pulls_backwards_loses_its_standing_and_then_its_say() -> None:
    reducer = reducer_of("standing+caf", liars=0.4)
    generator = torch.Generator().manual_seed(3)
    standing = [0] * 5
    for _ in range(3):
        rows = [1 + 0.3 * torch.randn(P, generator=generator) for _ in range(5)]
        rows[1] = -0.2 * rows[1]  # from within the honest spread
        contributions = [bodies_of(reducer, row) for row in rows]
        works = [
            ShardWork(PLAN, shard, N_SHARDS, tuple(Row(bodies[shard]) for bodies in contributions))
            for shard in range(N_SHARDS)
        ]
        known = [Row(b"", standing=score) for score in standing]
        decision = reducer.decide(known, [reducer.gram(work) for work in works], PLAN)
        before, standing = standing, list(standing_after(decision, 5))
        assert standing[1] < before[1]
        assert all(now > then for number, (now, then) in enumerate(zip(standing, before, strict=True)) if number != 1)
    weights = Decision.from_bytes(decision[4 * 5 + 1 :]).weights
    assert weights[1] == 0
    assert reducer.reduce(works[0], decision)
    with pytest.raises(ConfigError, match="standing"):
        reducer_of("standing+median")
