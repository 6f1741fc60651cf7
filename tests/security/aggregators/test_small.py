"""Small matrices: right, and the same whatever the library underneath does."""

from __future__ import annotations

import numpy as np
import pytest

from mycel.security.aggregators.small import centred, distances, eigen, product, times, top_eigen, total


@pytest.fixture
def rng():
    return np.random.default_rng(1)


def psd(rng, n, rank=None):
    rows = rng.standard_normal((n, rank or n + 2))
    return rows @ rows.T


def test_sums_are_taken_in_order(rng):
    values = rng.standard_normal(1000) * 10.0 ** rng.integers(-8, 8, 1000)
    in_order = 0.0
    for value in values:
        in_order += value
    assert total(values) == in_order


def test_products_and_centring(rng):
    left, right, vector = rng.standard_normal((5, 5)), rng.standard_normal((5, 5)), rng.standard_normal(5)
    np.testing.assert_allclose(product(left, right), left @ right, rtol=1e-13, atol=1e-13)
    np.testing.assert_allclose(times(left, vector), left @ vector, rtol=1e-13, atol=1e-13)
    rows, weights = rng.standard_normal((5, 9)), np.array([0.1, 0.2, 0.3, 0.4, 0.0])
    about = rows - weights @ rows
    np.testing.assert_allclose(centred(rows @ rows.T, weights), about @ about.T, atol=1e-12)
    far = ((rows[:, None] - rows[None]) ** 2).sum(axis=-1)
    np.testing.assert_allclose(distances(rows @ rows.T), far, atol=1e-12)


@pytest.mark.parametrize("n", [1, 2, 3, 8, 17, 64])
def test_jacobi_finds_all_eigenvalues(rng, n):
    matrix = psd(rng, n)
    values, vectors = eigen(matrix)
    np.testing.assert_allclose(values, np.linalg.eigvalsh(matrix)[::-1], atol=1e-10 * max(1.0, values[0]))
    np.testing.assert_allclose(vectors.T @ vectors, np.eye(n), atol=1e-12)
    np.testing.assert_allclose(matrix @ vectors, vectors * values, atol=1e-10 * values[0])


def test_jacobi_on_entries_of_any_size():
    matrix = np.diag([1e60, 1.0, 1e-60, 0.0])
    matrix[0, 1] = matrix[1, 0] = 1e29
    values, _ = eigen(matrix)
    assert np.isfinite(values).all()
    assert values[0] == pytest.approx(1e60)


@pytest.mark.parametrize("n", [1, 2, 7, 30])
def test_the_top_eigenpair(rng, n):
    stack = np.stack([psd(rng, n), psd(rng, n), np.zeros((n, n)), np.eye(n)])
    values, vectors = top_eigen(stack)
    for matrix, value, vector in zip(stack, values, vectors, strict=True):
        most = np.linalg.eigvalsh(matrix)[-1]
        assert value == pytest.approx(most, rel=1e-3, abs=1e-12)
        assert vector @ matrix @ vector == pytest.approx(most, rel=1e-3, abs=1e-12)
