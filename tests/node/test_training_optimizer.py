"""The flat state against torch's optimizers over ordinary parameters, and its bytes."""

from __future__ import annotations

import hashlib

import pytest
import torch

from mycel.node.training import optimizer as optimizer_module
from mycel.node.training.optimizer import FlatState
from mycel.protocols.errors import RemoteProtocolError
from mycel.swarm.training.recipe import OptimizerPart, SchedulePart
from mycel.swarm.training.schedule import learning_rate

# Tables and matrices decay, what has one dimension does not.
DECAYED = ((7, 5), (3, 11))
PLAIN = ((5,), (11,), (2,))
N_STEPS = 20
P = 7 * 5 + 3 * 11 + 5 + 11 + 2
DECAY_END = 7 * 5 + 3 * 11

ADAMW = OptimizerPart(learning_rate=3e-2, weight_decay=0.3)
SGD = OptimizerPart(name="sgd", learning_rate=0.1, momentum=0.9, weight_decay=0.05)
PLAIN_SGD = OptimizerPart(name="sgd", learning_rate=0.1, momentum=0.0, weight_decay=0.05)
COSINE = SchedulePart("cosine", warmup_steps=4)
RECIPES = pytest.mark.parametrize("part", [ADAMW, SGD, PLAIN_SGD], ids=["adamw", "sgd", "sgd without momentum"])


def first_params() -> torch.Tensor:
    return torch.randn(P, generator=torch.Generator().manual_seed(0))


def grad_of(version: int) -> torch.Tensor:
    return torch.randn(P, generator=torch.Generator().manual_seed(100 + version))


def flat_state(part: OptimizerPart, params_P: torch.Tensor | None = None) -> FlatState:
    return FlatState(first_params() if params_P is None else params_P, DECAY_END, part, COSINE, N_STEPS)


def walked(part: OptimizerPart, n_steps: int) -> FlatState:
    state = flat_state(part)
    for version in range(n_steps):
        state.apply(grad_of(version), 0.5)
    return state


def by_torch(part: OptimizerPart, n_steps: int) -> torch.Tensor:
    """The same with one parameter for each tensor, torch's own loop and its own scheduler."""
    sizes = [torch.Size(shape).numel() for shape in (*DECAYED, *PLAIN)]
    parameters = [
        torch.nn.Parameter(piece.view(shape).clone())
        for piece, shape in zip(first_params().split(sizes), (*DECAYED, *PLAIN), strict=True)
    ]
    n = len(DECAYED)
    groups = [{"params": parameters[:n]}, {"params": parameters[n:], "weight_decay": 0.0}]
    if part.name == "adamw":
        optimizer = torch.optim.AdamW(
            groups, part.learning_rate, betas=part.betas, eps=part.epsilon, weight_decay=part.weight_decay
        )
    else:
        optimizer = torch.optim.SGD(groups, part.learning_rate, momentum=part.momentum, weight_decay=part.weight_decay)
    for version in range(n_steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(COSINE, part.learning_rate, version, N_STEPS)
        for parameter, piece in zip(parameters, (grad_of(version) * 0.5).split(sizes), strict=True):
            parameter.grad = piece.view(parameter.shape)
        optimizer.step()
    return torch.cat([parameter.detach().view(-1) for parameter in parameters])


@RECIPES
def test_twenty_steps_are_those_of_torch(part):
    params_P = first_params()
    state = flat_state(part, params_P)
    for version in range(N_STEPS):
        state.apply(grad_of(version), 0.5)
    assert state.version == N_STEPS
    torch.testing.assert_close(params_P, by_torch(part, N_STEPS), rtol=1e-6, atol=1e-6)
    assert (params_P - first_params()).abs().max() > 0.1


@RECIPES
def test_pieces_do_not_show(part, monkeypatch):
    whole = walked(part, 3).snapshot()
    monkeypatch.setattr(optimizer_module, "_PIECE", 7)
    assert walked(part, 3).snapshot() == whole
    state = flat_state(part)
    state.load(whole, 3)
    assert state.snapshot() == whole


def test_weight_decay_ends_where_it_is_told():
    state_P = torch.ones(P)
    FlatState(state_P, DECAY_END, ADAMW, SchedulePart("constant"), N_STEPS).apply(torch.zeros(P), 1.0)
    expected = torch.ones(P)
    expected[:DECAY_END] = 1.0 - ADAMW.learning_rate * ADAMW.weight_decay
    torch.testing.assert_close(state_P, expected)


@pytest.mark.parametrize("decay_end", [0, P])
def test_all_may_decay_or_none(decay_end):
    state_P = torch.ones(P)
    FlatState(state_P, decay_end, SGD, SchedulePart("constant"), N_STEPS).apply(torch.zeros(P), 1.0)
    assert bool((state_P < 1.0).all()) == (decay_end == P)


@RECIPES
def test_a_loaded_state_goes_on_bit_for_bit(part):
    went_on, snapshot = walked(part, 7), walked(part, 7).snapshot()
    params_P = torch.full((P,), 9.0)
    resumed = flat_state(part, params_P)
    resumed.apply(torch.ones(P), 1.0)  # whatever it was before
    resumed.load(snapshot.toreadonly(), 7)
    assert resumed.version == 7
    assert resumed.snapshot() == snapshot
    for version in range(7, N_STEPS):
        went_on.apply(grad_of(version), 0.5)
        resumed.apply(grad_of(version), 0.5)
    assert resumed.snapshot() == went_on.snapshot()
    assert resumed.params_digest() == went_on.params_digest()
    assert resumed.params_digest() == hashlib.sha256(params_P.numpy().tobytes()).digest()


@RECIPES
def test_the_snapshot_is_a_copy_of_parameters_and_moments(part):
    params_P = first_params()
    state = flat_state(part, params_P)
    state.apply(grad_of(0), 1.0)
    snapshot = state.snapshot()
    assert snapshot.nbytes == state.size_bytes == 4 * P * (1 + state.n_moments)
    assert snapshot[: 4 * P] == params_P.numpy().tobytes()
    before = bytes(snapshot)
    state.apply(grad_of(1), 1.0)
    assert snapshot == before
    assert state.snapshot() != before


def test_parameters_are_changed_where_they_lie():
    """A module whose weights are views of the flat tensor computes with what the step made of it."""
    params_P = first_params()
    weight = torch.nn.Parameter(params_P[:35].view(7, 5))
    before = weight.detach().clone()
    state = flat_state(ADAMW, params_P)
    state.apply(grad_of(0), 1.0)
    assert not torch.equal(weight, before)
    state.load(walked(ADAMW, 4).snapshot(), 4)
    assert weight.data_ptr() == params_P.data_ptr()
    assert torch.equal(weight, params_P[:35].view(7, 5))


def test_the_gradient_stays_as_it_was():
    sum_P = grad_of(0)
    flat_state(ADAMW).apply(sum_P, 0.25)
    assert torch.equal(sum_P, grad_of(0))


def damaged(index: int, value: float) -> memoryview:
    """A good state of AdamW with one number replaced."""
    data = walked(ADAMW, 2).snapshot()
    torch.frombuffer(data, dtype=torch.float32)[index] = value
    return data


@pytest.mark.parametrize(
    "data",
    [
        memoryview(b""),
        walked(ADAMW, 2).snapshot()[:-4],
        memoryview(bytes(walked(ADAMW, 2).snapshot()) + b"\0\0\0\0"),
        walked(SGD, 2).snapshot(),
        damaged(0, float("nan")),
        damaged(P - 1, float("inf")),
        damaged(P, float("nan")),
        damaged(3 * P - 1, float("inf")),
        damaged(2 * P, -1e-3),
    ],
)
def test_a_state_that_is_none_is_refused_and_changes_nothing(data):
    state = walked(ADAMW, 3)
    before = state.snapshot()
    with pytest.raises(RemoteProtocolError, match="a state "):
        state.load(data, 2)
    assert state.snapshot() == before
    assert state.version == 3


def test_a_first_moment_may_be_negative():
    flat_state(ADAMW).load(damaged(P, -1e-3), 2)


@pytest.mark.parametrize("grad", [torch.zeros(P - 1), torch.zeros(P, dtype=torch.float64)])
def test_a_gradient_of_another_shape_is_refused(grad):
    with pytest.raises(ValueError, match="is needed"):
        flat_state(ADAMW).apply(grad, 1.0)


# ---- the schedule


def rates(schedule: SchedulePart, n_steps: int) -> list[float]:
    return [learning_rate(schedule, 2.0, version, n_steps) for version in range(n_steps)]


@pytest.mark.parametrize("name", ["cosine", "linear"])
@pytest.mark.parametrize("warmup", [0, 1, 5])
def test_the_rate_goes_up_to_its_peak_and_down_to_its_end(name, warmup):
    schedule = SchedulePart(name, warmup_steps=warmup, final=0.25)
    values = rates(schedule, 30)
    top = max(0, warmup - 1)
    assert values[top] == max(values) == 2.0
    assert values[-1] == pytest.approx(0.5)
    assert values[:top] == pytest.approx([2.0 * (i + 1) / 5 for i in range(top)])
    assert values[top:] == sorted(values[top:], reverse=True)
    assert learning_rate(schedule, 2.0, 40, 30) == pytest.approx(0.5)  # never beyond its end


def test_halfway_down():
    assert learning_rate(SchedulePart("cosine", final=0.0), 2.0, 10, 21) == pytest.approx(1.0)
    assert learning_rate(SchedulePart("cosine", final=0.0), 2.0, 5, 21) == pytest.approx(1.0 + 0.5**0.5)
    assert learning_rate(SchedulePart("linear", final=0.5), 2.0, 10, 21) == pytest.approx(1.5)


def test_a_constant_rate_stays_after_the_warmup():
    assert rates(SchedulePart("constant", warmup_steps=2), 5) == [1.0, 2.0, 2.0, 2.0, 2.0]


def test_a_warmup_longer_than_the_run_never_comes_down():
    assert rates(SchedulePart("cosine", warmup_steps=8), 4) == [0.25, 0.5, 0.75, 1.0]
    assert rates(SchedulePart("cosine"), 1) == [2.0]
