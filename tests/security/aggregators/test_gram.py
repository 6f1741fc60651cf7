"""The Gram matrix: exact, hence the same bits in any order; and the gate before it."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from mycel.protocols.errors import LocalProtocolError
from mycel.security.aggregators import finite_rows, gram
from mycel.security.aggregators.gram import MAX_ABS, measure
from mycel.security.aggregators.small import distances
from tests.security.aggregators.cases import honest_rows

CHUNK = 1 << 14


def by_integers(rows):
    """The same rounding with integers that cannot lose a bit, one chunk after the other."""
    whole = np.zeros((len(rows), len(rows)))
    for start in range(0, rows.shape[1], CHUNK):
        part = rows[:, start : start + CHUNK].double().numpy()
        _, exponents = np.frexp(np.abs(part).max(axis=1))
        integers = np.rint(np.ldexp(part, 19 - exponents[:, None])).astype(np.int64)
        whole += np.ldexp((integers @ integers.T).astype(np.float64), exponents[:, None] + exponents[None] - 38)
    return whole


def test_the_gram_matrix_is_exact_after_rounding():
    rows = honest_rows(5, 3 * CHUNK // 2)
    assert np.array_equal(gram(list(rows), None).numpy(), by_integers(rows))


def test_it_has_the_same_bits_in_any_order_of_columns_and_with_any_number_of_threads():
    rows = honest_rows(12, CHUNK)
    before, threads = gram(list(rows), None), torch.get_num_threads()
    shuffled = rows[:, torch.randperm(CHUNK, generator=torch.Generator().manual_seed(3))]
    assert torch.equal(gram(list(shuffled), None), before)
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            assert torch.equal(gram(list(rows), None), before)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("p", [0, 1, 7, 1000, 40_000])
@pytest.mark.parametrize("with_center", [False, True])
def test_it_is_the_gram_matrix_about_the_centre(p, with_center):
    rows = honest_rows(6, p, mean=10.0)
    center = rows[0] * 0.9 if with_center else None
    about = (rows - (center if with_center else 0.0)).double()
    exact = about @ about.T
    np.testing.assert_allclose(gram(list(rows), center).numpy(), exact.numpy(), rtol=5e-6, atol=1e-5)


def test_rows_of_very_different_size_keep_their_digits():
    rows = honest_rows(4, 1000) * torch.tensor([1e-30, 1e-3, 1.0, 1e30])[:, None]
    exact = rows.double() @ rows.double().T
    scale = exact.diagonal().sqrt()
    assert ((gram(list(rows), None) - exact).abs() <= 1e-6 * scale[:, None] * scale[None]).all()


def test_identical_rows_are_at_distance_zero():
    row = honest_rows(1, 1000)[0]
    assert not distances(gram([row] * 4, row * 0.5).numpy()).any()


def test_parameters_of_32_peers_keep_their_distances_about_a_centre():
    # Norm 3e3 and a spread of 1e-3: float32 distances by the matrix product are off by a factor of 5 there.
    base = honest_rows(1, 10_000, mean=30.0)[0]
    apart = 1e-3 / 100 * torch.randn(32, 10_000, generator=torch.Generator().manual_seed(1))
    rows = base + apart
    exact = (rows - base).double()
    far = distances((exact @ exact.T).numpy())
    np.testing.assert_allclose(distances(gram(list(rows), base).numpy()), far, rtol=1e-4, atol=1e-12)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf, 3e38])
@pytest.mark.parametrize("at", [0, 70_000, 99_999])
def test_the_gate_finds_a_bad_entry_anywhere(bad, at):
    rows = list(honest_rows(3, 100_000))
    before = gram([rows[0], rows[2]], None)
    rows[1][at] = bad
    assert finite_rows(rows) == [True, False, True]
    with pytest.raises(LocalProtocolError):
        gram(rows, None)
    for center in (None, torch.zeros(100_000)):
        together, finite = measure(rows, center)
        assert finite == [True, False, True]
        assert torch.allclose(together[[0, 2]][:, [0, 2]], before, rtol=1e-6)


def test_the_largest_rows_that_pass_stay_finite():
    rows = [torch.full((100,), MAX_ABS), torch.full((100,), -MAX_ABS)]
    assert finite_rows(rows) == [True, True]
    assert torch.isfinite(gram(rows, rows[1])).all()


def test_rows_of_another_kind_are_our_bug():
    for rows in ([torch.zeros(3), torch.zeros(4)], [torch.zeros(3).double()], [torch.zeros(3, 1)]):
        with pytest.raises(LocalProtocolError):
            gram(rows, None)
    with pytest.raises(LocalProtocolError):
        gram([torch.zeros(3)], torch.zeros(4))
