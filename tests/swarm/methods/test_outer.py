"""The shared state: its steps against plain formulas, the same bits on any number of threads, hostile snapshots."""

from __future__ import annotations

import math
import struct

import pytest
import torch
from torch import Tensor

from mycel.protocols.errors import RemoteProtocolError
from mycel.swarm.methods.outer import (
    MAX_RESULT,
    SharedState,
    adamw_step,
    check_result,
    dot,
    momentum_step,
    nesterov_step,
    plain_step,
    slices,
)

P = 5000
ALL = (slice(0, P),)


def draw(seed: int, n: int = P) -> Tensor:
    return torch.randn(n, generator=torch.Generator().manual_seed(seed))


def test_nesterov_is_torchs_own() -> None:
    state = SharedState(draw(0), 1)
    theta_P = draw(0).requires_grad_()
    optimizer = torch.optim.SGD([theta_P], lr=0.7, momentum=0.9, nesterov=True)
    for seed in range(1, 8):
        theta_P.grad = draw(seed)
        optimizer.step()
        nesterov_step(state, ALL, draw(seed), 0.7, 0.9)
    torch.testing.assert_close(state.theta_P, theta_P.detach(), rtol=1e-5, atol=1e-5)


def test_momentum_is_torchs_own() -> None:
    state = SharedState(draw(0), 1)
    theta_P = draw(0).requires_grad_()
    optimizer = torch.optim.SGD([theta_P], lr=0.1, momentum=0.9)
    for seed in range(1, 8):
        theta_P.grad = draw(seed)
        optimizer.step()
        momentum_step(state, ALL, draw(seed), 0.1, 0.9)
    torch.testing.assert_close(state.theta_P, theta_P.detach(), rtol=1e-5, atol=1e-5)


def test_adamw_is_torchs_own() -> None:
    state = SharedState(draw(0), 2)
    theta_P = draw(0).requires_grad_()
    optimizer = torch.optim.AdamW([theta_P], lr=1e-2, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.0)
    for seed in range(1, 12):
        theta_P.grad = draw(seed)
        optimizer.step()
        adamw_step(state, ALL, draw(seed), 1e-2, (0.9, 0.95), 1e-8)
        state.version += 1
    torch.testing.assert_close(state.theta_P, theta_P.detach(), rtol=1e-5, atol=1e-5)


def _train(n_threads: int) -> bytes:
    before = torch.get_num_threads()
    torch.set_num_threads(n_threads)
    try:
        size = 300_001  # more than one piece, and enough for torch to share the work among threads
        state = SharedState(draw(0, size), 2)
        scope = (slice(0, size),)
        for seed in (1,):
            nesterov_step(state, scope, draw(seed, size), 0.7, 0.9, braking=2.0)
            adamw_step(state, scope, draw(seed, size), 1e-3, (0.9, 0.95), 1e-8)
            state.version += 1
        return state.digest()
    finally:
        torch.set_num_threads(before)


def test_the_number_of_threads_changes_no_bit() -> None:
    assert _train(1) == _train(2) == _train(5)


def test_steps_are_single_float32_operations() -> None:
    """Against numbers rounded after every operation: a fused multiply-add anywhere would give others."""
    theta_P, first_P, second_P = draw(0), draw(1), draw(2)
    state = SharedState(theta_P, 1)
    nesterov_step(state, ALL, first_P, 0.7, 0.9)
    nesterov_step(state, ALL, second_P, 0.7, 0.9)
    expected = []
    for theta, one, two in zip(theta_P.tolist(), first_P.tolist(), second_P.tolist(), strict=True):
        moment = 0.0
        for result in (one, two):
            moment = _round(_round(moment * _round(0.9)) + result)
            step = _round(_round(result + _round(moment * _round(0.9))) * _round(0.7))
            theta = _round(theta - step)  # noqa: PLW2901
        expected.append(theta)
    assert state.theta_P.tolist() == expected


def _round(value: float) -> float:
    # A product or sum of two float32 in float64, rounded once more: as float32 would have done it at once.
    return struct.unpack("<f", struct.pack("<f", value))[0]


def test_a_scope_moves_nothing_outside_it() -> None:
    state = SharedState(draw(0), 1)
    scope = (slice(10, 20), slice(100, 4000))
    nesterov_step(state, scope, torch.ones(3910), 0.5, 0.9)
    moved = (state.theta_P != draw(0)).nonzero().flatten().tolist()
    assert moved == [*range(10, 20), *range(100, 4000)]
    assert slices(scope, state.moments_MP[0]).tolist() == [1.0] * 3910


def test_braking_shortens_a_step_along_the_momentum_and_lengthens_one_against_it() -> None:
    lengths = []
    for sign in (1.0, -1.0):
        state = SharedState(torch.zeros(P), 1)
        nesterov_step(state, ALL, draw(1), 1.0, 0.5)
        before = state.moments_MP[0] * 0.5
        nesterov_step(state, ALL, draw(1) * sign, 1.0, 0.5, braking=0.5)
        lengths.append(float((state.moments_MP[0] - before).norm() / draw(1).norm()))
    assert lengths == pytest.approx([0.5, 1.5], rel=1e-5)


def test_dot_is_the_exact_sum() -> None:
    for size in (0, 1, 4095, 4096, 4097, 300_001):
        left, right = draw(3, size), draw(4, size)
        exact = math.fsum((left.double() * right.double()).tolist())
        assert dot(left, right) == pytest.approx(exact, rel=1e-12, abs=1e-9)


def test_a_snapshot_becomes_the_same_state() -> None:
    state, other = SharedState(draw(0), 1), SharedState(draw(9), 1)
    nesterov_step(state, ALL, draw(1), 0.7, 0.9)
    state.version = 7
    snapshot = state.snapshot()
    assert len(snapshot) == state.size_bytes
    assert other.digest() != state.digest()
    other.load(snapshot)
    assert (other.version, other.digest()) == (7, state.digest())
    plain_step(other, ALL, draw(2), 0.1)  # the bytes stay the bytes
    assert state.snapshot() == snapshot


def test_the_digest_covers_every_part() -> None:
    digests = set()
    for change in range(4):
        state = SharedState(draw(0), 1)
        if change == 1:
            state.theta_P[-1] += 1.0
        elif change == 2:
            state.moments_MP[0, 0] = 1.0
        elif change == 3:
            state.version = 1
        digests.add(state.digest())
    assert len(digests) == 4


@pytest.mark.parametrize("spoil", ["short", "long", "empty", "nan", "inf", "moments", "elements", "version"])
def test_hostile_snapshots_change_nothing(spoil: str) -> None:
    state = SharedState(draw(0), 1)
    data = bytearray(state.snapshot())
    header = struct.Struct("<QQI")
    match spoil:
        case "short":
            data = data[:-1]
        case "long":
            data += b"\0"
        case "empty":
            data = bytearray()
        case "nan" | "inf":
            data[-4:] = struct.pack("<f", float(spoil))
        case "moments":
            data[: header.size] = header.pack(0, P // 2, 3)
        case "elements":
            data[: header.size] = header.pack(0, 1 << 63, 1)
        case "version":
            data[: header.size] = header.pack((1 << 64) - 1, P, 1)
    before = state.digest()
    with pytest.raises(RemoteProtocolError):
        state.load(bytes(data))
    assert state.digest() == before


@pytest.mark.parametrize(
    "result",
    [
        torch.full((P,), math.nan),
        torch.full((P,), math.inf),
        torch.full((P,), -2.0 * MAX_RESULT),
        torch.zeros(P - 1),
        torch.zeros(P, 1),
        torch.zeros(P, dtype=torch.float64),
    ],
)
def test_results_that_no_honest_round_gives(result: Tensor) -> None:
    with pytest.raises(RemoteProtocolError):
        check_result(result, P)


def test_the_largest_results_leave_the_state_finite() -> None:
    state = SharedState(torch.zeros(4), 1)
    for _ in range(200):
        nesterov_step(state, (slice(0, 4),), torch.full((4,), MAX_RESULT), 1000.0, 0.99)
    assert bool(state.theta_P.isfinite().all())
