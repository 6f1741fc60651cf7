"""Rules against short references that work on the rows themselves; and the defects of ByzFL 0.0.11, not repeated.

benchmarks/aggregators.py compares with ByzFL itself where it is right.
"""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
import torch

from mycel.security.aggregators import aggregate, parse_rule
from tests.security.aggregators.cases import ALL, error, honest_rows, run


def mean(x, f):
    return x.mean(axis=0)


def median(x, f):
    return np.median(x, axis=0)


def trimmed_mean(x, f):
    return np.sort(x, axis=0)[f : len(x) - f].mean(axis=0)


def meamed(x, f):
    order = np.argsort(np.abs(x - np.median(x, axis=0)), axis=0, kind="stable")[: len(x) - f]
    return np.take_along_axis(x, order, axis=0).mean(axis=0)


def far(x):
    return ((x[:, None] - x[None]) ** 2).sum(axis=-1)


def krum_scores(x, f):
    return np.sort(far(x), axis=1)[:, : len(x) - f].sum(axis=1)


def krum(x, f):
    return x[np.argmin(krum_scores(x, f))]


def multi_krum(x, f):
    return x[np.argsort(krum_scores(x, f))[: len(x) - f]].mean(axis=0)


def geometric_median(x, f):
    z = np.median(x, axis=0)
    for _ in range(3000):
        b = 1.0 / np.maximum(np.linalg.norm(x - z, axis=1), 1e-9)
        z = b @ x / b.sum()
    return z


def centered_clip(x, f):
    v = np.zeros(x.shape[1])
    for _ in range(3):
        length = np.linalg.norm(x - v, axis=1)
        tau = np.sort(length)[(len(x) - 1) // 2]
        v = v + ((x - v) * np.minimum(1.0, tau / length)[:, None]).mean(axis=0)
    return v


def caf(x, f):
    c, best, least = np.ones(len(x)), x.mean(axis=0), np.inf
    while f and c.sum() > len(x) - 2 * f:
        mu = c @ x / c.sum()
        about = (x - mu) * np.sqrt(c)[:, None]
        _, values, directions = np.linalg.svd(about, full_matrices=False)
        if values[0] ** 2 / c.sum() < least:
            best, least = mu, values[0] ** 2 / c.sum()
        tau = ((x - mu) @ directions[0]) ** 2 * (c > 0)
        c = c * (1.0 - tau / tau.max())
    return best


def best_subset(x, f, spread):
    subsets = list(combinations(range(len(x)), len(x) - f))
    return x[list(min(subsets, key=lambda s: spread(x[list(s)])))].mean(axis=0)


def mda(x, f):
    return best_subset(x, f, lambda y: (far(y).max(), far(y).sum()))


def smea(x, f):
    return best_subset(x, f, lambda y: np.linalg.svd(y - y.mean(axis=0), compute_uv=False)[0])


def flag(x, f):
    length = np.linalg.norm(x, axis=1)
    u, m, w = x / length[:, None], (len(x) + 1) // 2, np.ones(len(x))
    for _ in range(5):
        y = np.linalg.svd((u * np.sqrt(w)[:, None]).T, full_matrices=False)[0][:, :m]
        w = 1.0 / np.sqrt(np.maximum(1.0 - ((u @ y) ** 2).sum(axis=1), 1e-6))
    t = np.minimum(length, np.sort(length)[(len(x) - 1) // 2])
    return y @ (y.T @ (u * t[:, None]).mean(axis=0))


def nnm(x, f):
    return np.stack([x[np.argsort(row, kind="stable")[: len(x) - f]].mean(axis=0) for row in far(x)])


def clip_to(x, limit):
    length = np.linalg.norm(x, axis=1)
    return x * np.minimum(1.0, limit / length)[:, None]


def arc(x, f):
    k = 2 * f * (len(x) - f) // len(x)
    return clip_to(x, np.sort(np.linalg.norm(x, axis=1))[len(x) - 1 - k])


def clip(x, f):
    return clip_to(x, np.sort(np.linalg.norm(x, axis=1))[(len(x) - 1) // 2])


REFERENCES = {
    "mean": mean,
    "median": median,
    "trimmed-mean": trimmed_mean,
    "meamed": meamed,
    "geometric-median": geometric_median,
    "krum": krum,
    "multi-krum": multi_krum,
    "centered-clip": centered_clip,
    "caf": caf,
    "mda": mda,
    "smea": smea,
    "flag": flag,
    "nnm": nnm,
    "arc": arc,
    "clip": clip,
}


def reference(rule, rows, f):
    x = rows.double().numpy()
    for step in rule.split("+"):
        x = REFERENCES[step](x, f)
    return torch.from_numpy(x)


@pytest.mark.parametrize(
    "rule",
    [
        *(k for k in REFERENCES if k not in ("nnm", "arc", "clip")),
        "nnm+trimmed-mean",
        "nnm+meamed",
        "nnm+geometric-median",
        "arc+nnm+median",
        "clip+mean",
        "nnm+krum",
        "arc+caf",
    ],
)
@pytest.mark.parametrize(("n", "p"), [(5, 1), (8, 7), (12, 1000), (27, 40)])
def test_it_equals_its_reference(rule, n, p):
    f = max(1, n // 5) if n < 20 or rule not in ("mda", "smea") else 2
    if p == 1 and rule in ("flag", "krum", "nnm+krum"):
        p = 2  # on a line all directions are the same, and many rows tie
    rows = honest_rows(n, p)
    rows[:f] += 1.5
    assert float((run(rule, rows, f) - reference(rule, rows, f)).abs().max()) < 1e-4


# ------------------------------------------------------------------------------------------- ByzFL's defects, not ours


@pytest.mark.parametrize("rule", ALL)
def test_one_nan_does_not_poison_it_and_all_infinite_rows_leave_the_centre(rule):
    rows = honest_rows(9, 20)
    rows[3, 7] = torch.nan
    result = aggregate(list(rows), parse_rule(rule), 2)
    assert torch.isfinite(result.vector).all()
    assert result.rejected == (3,)
    nothing = aggregate([torch.full((4,), torch.inf)] * 3, parse_rule(rule), 1)
    assert torch.equal(nothing.vector, torch.zeros(4))
    assert nothing.rejected == (0, 1, 2)


def test_the_geometric_median_is_converged():
    rows = honest_rows(10, 50)
    rows[:3] += 5.0
    z = run("geometric-median", rows, 3).double()
    # At the minimum the unit vectors from it to the rows cancel out.
    pull = torch.nn.functional.normalize(rows.double() - z, dim=1).mean(dim=0)
    assert pull.norm() < 1e-4


def test_centered_clipping_keeps_nothing_from_one_call_to_the_next():
    rows, center = honest_rows(8, 30), honest_rows(1, 30, seed=1)[0]
    first = run("centered-clip", rows, 2, center)
    run("centered-clip", 100.0 * rows, 2)
    assert torch.equal(run("centered-clip", rows, 2, center), first)


def test_smea_finds_the_right_subset():
    for seed in range(5):
        honest = honest_rows(9, 30, seed=seed)
        rows = torch.cat([honest_rows(3, 30, seed=seed + 50), honest])
        assert error(run("smea", rows, 3), honest) < 1e-4


def test_caf_is_the_same_in_each_run():
    rows = honest_rows(12, 30)
    assert len({run("caf", rows, 3).numpy().tobytes() for _ in range(5)}) == 1


def test_caf_does_not_linger_over_huge_rows():
    rows = honest_rows(20, 30)
    rows[:8] = torch.logspace(3, 30, 8)[:, None]
    assert error(run("caf", rows, 8), rows[8:]) < 1.0


@pytest.mark.parametrize("rule", ["multi-krum", "nnm+mean", "nnm+geometric-median", "nnm+trimmed-mean"])
def test_averaging_the_parameters_of_32_peers(rule):
    # Norm 3e3, spread 1e-3; the liars are as near to the honest as these to each other times 10.
    base = honest_rows(1, 10_000, mean=30.0)[0]
    apart = torch.randn(32, 10_000, generator=torch.Generator().manual_seed(1))
    apart[:6] = 10.0 * apart[0]
    rows = base + 1e-3 * apart
    error_of = (run(rule, rows, 6, base).double() - rows[6:].double().mean(dim=0)).norm() / (1e-3 * 100)
    assert error_of < (0.8 if rule == "nnm+mean" else 0.3)
