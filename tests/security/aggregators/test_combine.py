"""From rows to one vector: the same bits everywhere, shard by shard, and not a liar's alone where few touch."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
import torch

from mycel.protocols.errors import LocalProtocolError
from mycel.security.aggregators import UNIT, Decision, aggregate, capped, combine, decide, gram, parse_rule
from mycel.security.aggregators.coordinates import sort_rows
from tests.security.aggregators.cases import ALL, honest_rows, run

TEST_VECTORS = {
    "mean": "6d2c81a98f53b4af",
    "median": "5d9146c6b29d805d",
    "trimmed-mean": "51ea2d54785b89f5",
    "meamed": "149207c9714d647a",
    "geometric-median": "557554c6bbd17581",
    "krum": "137ab936ece2e1ad",
    "multi-krum": "2674772de9c001b8",
    "centered-clip": "b9e1344dd261e7de",
    "caf": "3b65000d8f0c6eea",
    "mda": "ee755fcc01fe2133",
    "smea": "ea75c79c38a42c16",
    "flag": "cf2fdb9c33d167e5",
    "nnm+trimmed-mean": "2045572fa9dafb3f",
    "nnm+geometric-median": "5387195dde022ecc",
    "nnm+meamed": "0a4ffce0bf85f609",
    "bucketing:2+caf": "b9ea273e6582ad22",
    "arc+nnm+median": "88850445d2fd8662",
    "clip+mean": "d20008c7b0e33ce6",
}
LONG = 40_000  # more than a thread's share of an elementwise operation, and than a chunk


@pytest.mark.parametrize("rule", ["trimmed-mean", "nnm+geometric-median", "nnm+meamed"])
def test_the_same_bits_with_any_number_of_threads(rule):
    rows, center = honest_rows(7, LONG), honest_rows(1, LONG, seed=3)[0]
    threads, results = torch.get_num_threads(), set()
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            result = aggregate(list(rows), parse_rule(rule), 2, center=center)
            results.add((result.vector.numpy().tobytes(), result.decision.to_bytes()))
    finally:
        torch.set_num_threads(threads)
    assert len(results) == 1


def test_fused_and_separate_products_make_the_same_sum():
    # 24 bits of a float32 times 28 of a weight are exact in a float64, so an FMA has nothing to round less.
    rows = honest_rows(9, 1000) * 10.0 ** torch.arange(-4, 5)[:, None]
    weights = tuple(
        int(w) for w in torch.randint(-(1 << 27), 1 << 27, (9,), generator=torch.Generator().manual_seed(1))
    )
    out = combine(parse_rule("flag"), list(rows), Decision(9, weights), rows[0], 2)
    separate = (UNIT - sum(weights)) * rows[0].numpy().astype(np.float64)
    for row, weight in zip(rows.numpy(), weights, strict=True):
        separate = separate + row.astype(np.float64) * weight
        exact = [int(w) * float(x).as_integer_ratio()[0] for w, x in zip([weight], row[:1], strict=True)]
        assert float(row[0]) * weight == exact[0] / float(row[0]).as_integer_ratio()[1]
    assert out.numpy().tobytes() == (separate / UNIT).astype(np.float32).tobytes()


@pytest.mark.parametrize("rule", ALL)
def test_shards_share_one_decision_and_make_the_whole(rule):
    rule, f = parse_rule(rule), 2
    rows, center = honest_rows(9, 40_000), honest_rows(1, 40_000, seed=3)[0]
    rows[0] += 2.0
    shards = [(0, 17_000), (17_000, 17_001), (17_001, 40_000)]
    together = sum(gram(list(rows[:, s:e]), center[s:e]) for s, e in shards)
    decision = decide(rule, together, f, seed=b"test")
    parts = [combine(rule, list(rows[:, s:e]), decision, center[s:e], f) for s, e in shards]
    whole = combine(rule, list(rows), decision, center, f)
    assert torch.equal(torch.cat(parts), whole)
    at_once = aggregate(list(rows), rule, f, center=center, seed=b"test")
    assert at_once.decision.outliers == decision.outliers
    assert float((at_once.vector - whole).abs().max()) < 1e-4


def test_no_negative_zero_comes_out():
    rows = [torch.tensor([-0.0, 0.0, -1.0]), torch.tensor([0.0, -0.0, 1.0]), torch.tensor([-0.0, -0.0, 0.0])]
    for rule in ALL:
        assert not torch.signbit(run(rule, rows, 1)[:2]).any(), rule


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 8, 13, 24, 25, 40])
def test_each_rank_that_is_asked_for_is_right(n):
    block = torch.randn(n, 300, generator=torch.Generator().manual_seed(n))
    right = block.sort(dim=0).values
    for first, last in [(0, n), (n // 2, n // 2 + 1), (n // 4, n - n // 4)]:
        ranked = sort_rows(block.clone(), first, last)
        assert torch.equal(torch.stack([ranked[i] for i in range(first, last)]), right[first:last])


def test_network_and_sort_agree_to_the_bit():
    rows = honest_rows(24, 500)
    around = torch.cat([rows, torch.full((1, 500), 1e6), torch.full((1, 500), -1e6)])
    assert torch.equal(run("median", around, 5), run("median", rows, 5))
    assert torch.equal(run("trimmed-mean", around, 6), run("trimmed-mean", rows, 5))


def test_a_decision_about_other_rows_is_refused():
    rows, rule = list(honest_rows(4, 10)), parse_rule("krum")
    for decision in (Decision(3, (UNIT, 0, 0)), Decision(4), Decision(4, (UNIT, 0, 0, 1 << 30))):
        with pytest.raises(LocalProtocolError, match="does not fit"):
            combine(rule, rows, decision, None, 1)
    with pytest.raises(LocalProtocolError):
        decide(rule, None, 1, seed=b"", n_rows=4)
    with pytest.raises(LocalProtocolError):
        decide(rule, torch.full((4, 4), torch.nan, dtype=torch.float64), 1, seed=b"")


# ------------------------------------------------------------------------------------------------------ stated weights


def test_a_stated_weight_counts_twice_the_median_at_most():
    assert capped([]) == ()
    assert capped([0, 0, 5]) == (0, 0, 0)
    assert capped([3, -7, 10**18, 4]) == (3, 0, 6, 4)
    rows = [torch.tensor([0.0]), torch.tensor([0.0]), torch.tensor([1.0])]
    claims = aggregate(rows, parse_rule("mean"), 0, weights=[10, 10, 10**18])
    assert float(claims.vector) == pytest.approx(0.5)
    assert float(aggregate(rows, parse_rule("mean"), 0, weights=[10, 10, 5]).vector) == pytest.approx(0.2, abs=1e-6)
    assert float(aggregate(rows, parse_rule("mean"), 0, weights=[0, 0, 0]).vector) == pytest.approx(1 / 3, abs=1e-6)


@pytest.mark.parametrize("rule", [rule for rule in ALL if rule != "mean"])
def test_robust_rules_do_not_listen_to_stated_weights(rule):
    rows = list(honest_rows(7, 10))
    stated = aggregate(rows, parse_rule(rule), 1, seed=b"test", weights=[1, 1, 1, 1, 1, 1, 10**6])
    assert torch.equal(stated.vector, run(rule, rows, 1))


# --------------------------------------------------------------------------------------------------------- sparse rows


def top_k_rows(n, p, k, f):
    """Honest rows keep their k largest entries; the liars put all of theirs where nobody else is likely to."""
    dense = honest_rows(n, p)
    rows = torch.zeros(n, p)
    for row, full in zip(rows, dense, strict=True):
        top = full.abs().topk(k).indices
        row[top] = full[top]
    alone = dense.abs().mean(dim=0).topk(k, largest=False).indices
    rows[:f] = 0.0
    rows[:f, alone] = 50.0
    return rows, alone


@pytest.mark.parametrize("rule", [rule for rule in ALL if rule != "flag"])
def test_where_few_touch_an_index_a_liar_does_not_get_it_alone(rule):
    n, f = 10, 2
    rows, alone = top_k_rows(n, 2000, 40, f)
    usual = float(rows[f:].abs().max())
    # What sparse codecs do: the mean over those who touch an index. The liars move each of theirs by all they want.
    contributors = rows.sum(dim=0) / (rows != 0.0).sum(dim=0).clamp(min=1)
    assert (contributors[alone] == 50.0).all()
    ours = aggregate(list(rows), parse_rule(rule), f, seed=b"test", quorum_touch=True).vector
    assert ours[alone].abs().max() <= f * usual / n + 1e-4
    assert ours.abs().max() <= usual


@pytest.mark.parametrize("rule", ["median", "trimmed-mean", "meamed"])
def test_what_enough_honest_rows_touch_is_learned(rule):
    n, f = 10, 1
    rows = torch.zeros(n, 6)
    rows[1:9, 0] = 1.0  # eight of ten
    rows[1:5, 1] = 1.0  # four: 2f + 1 at least, fewer than half
    rows[1:3, 2] = 1.0  # two: too few
    rows[0] = torch.tensor([-9.0, -9.0, 0.0, -9.0, 0.0, 0.0])  # the liar
    got = aggregate(list(rows), parse_rule(rule), f, quorum_touch=True).vector
    assert got[0] == pytest.approx(0.9)
    assert got[1] == pytest.approx(0.5)
    assert got[2] == pytest.approx(0.2, abs=1e-5)
    assert got[3] == pytest.approx(-0.1, abs=1e-5)  # as much as the usual largest entry, shared by all
    assert not got[4:].any()
    if rule == "median":  # without it, what fewer than half touch is never learned
        assert run(rule, list(rows), f)[1] == 0.0


def test_dense_rows_are_not_changed_by_the_quorum():
    rows = honest_rows(10, 500)
    for rule in ALL:
        plain = run(rule, rows, 2)
        touched = aggregate(list(rows), parse_rule(rule), 2, seed=b"test", quorum_touch=True).vector
        assert float((plain - touched).abs().max()) < 1e-6


# -------------------------------------------------------------------------------------------------------- test vectors


def drawn(n, p):
    """Rows that follow from SHA-256 alone: many sizes, both signs, and two that are far away."""
    draw = b"".join(hashlib.sha256(i.to_bytes(4, "little")).digest() for i in range(n * p // 8))
    whole = torch.frombuffer(bytearray(draw), dtype=torch.int32).view(n, p)
    rows = (whole >> 8).float() * 2.0**-23 + 0.5
    rows[:2] *= 1000.0
    return list(rows)


@pytest.mark.parametrize(("rule", "digest"), sorted(TEST_VECTORS.items()))
def test_every_machine_gets_these_bytes(rule, digest):
    # Peers sign digests of these, and who signs another one is taken for a liar: no processor, BLAS or release may
    # change a bit. If it must change, rounds of another version must not meet.
    rows = drawn(10, 20_000)
    result = aggregate(rows, parse_rule(rule), 3, center=rows[5] * 0.25, seed=b"test", quorum_touch="median" in rule)
    whole = hashlib.sha256(result.decision.to_bytes() + result.vector.numpy().astype("<f4").tobytes())
    assert whole.hexdigest()[:16] == digest
