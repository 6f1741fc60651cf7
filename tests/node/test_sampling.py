"""The sampler against transformers' logits processors, and its draws against the distribution."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from mycel.node.sampling import probabilities, sample, uniform
from mycel.protocols.messages import SamplingParams

VOCAB = 500


def _logits(seed: int) -> Tensor:
    return 3.0 * torch.randn(VOCAB, generator=torch.Generator().manual_seed(seed))


def _reference(logits_V: Tensor, history: list[int], params: SamplingParams) -> Tensor:
    """What transformers' generate would draw from, in its own order of processors."""
    steps = LogitsProcessorList()
    if params.repetition_penalty != 1.0:
        steps.append(RepetitionPenaltyLogitsProcessor(params.repetition_penalty))
    steps.append(TemperatureLogitsWarper(params.temperature))
    if params.top_k:
        steps.append(TopKLogitsWarper(params.top_k))
    if params.top_p < 1.0:
        steps.append(TopPLogitsWarper(params.top_p))
    if params.min_p > 0.0:
        steps.append(MinPLogitsWarper(params.min_p))
    ids: Any = torch.tensor([history], dtype=torch.long)
    return torch.softmax(steps(ids, logits_V[None].double())[0], dim=0)


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(temperature=1.0),
        SamplingParams(temperature=0.7, top_k=20),
        SamplingParams(temperature=1.3, top_p=0.8),
        SamplingParams(temperature=0.9, min_p=0.05),
        SamplingParams(temperature=1.1, repetition_penalty=1.8),
        SamplingParams(temperature=0.8, top_k=40, top_p=0.9, min_p=0.02, repetition_penalty=1.3),
        SamplingParams(temperature=2.0, top_k=1),
        SamplingParams(temperature=1.0, top_p=0.01),
        SamplingParams(temperature=1.0, min_p=1.0),
        SamplingParams(temperature=1.0, top_k=10 * VOCAB),
    ],
)
def test_keeps_and_weighs_the_same_tokens_as_transformers(params: SamplingParams) -> None:
    for seed in range(10):
        history = [int(i) for i in torch.randint(0, VOCAB, (30,), generator=torch.Generator().manual_seed(seed))]
        expected_V = _reference(_logits(seed), history, params)
        actual_V = probabilities(_logits(seed), history, params)
        assert torch.equal(actual_V > 0, expected_V > 0)
        assert torch.allclose(actual_V, expected_V, rtol=1e-9, atol=1e-12)


def test_draws_follow_the_distribution() -> None:
    """Pearson's chi-square over 20 000 positions and 8 tokens: 24.3 is passed once in a thousand by chance."""
    logits_V = torch.tensor([0.0, 1.0, 2.0, 0.5, 1.5, -1.0, 1.0, 0.2])
    params = SamplingParams(temperature=1.0, seed=11)
    draws = 20_000
    counts = torch.zeros(8, dtype=torch.float64)
    for position in range(draws):
        counts[sample(logits_V, [], params, position)] += 1
    expected = draws * torch.softmax(logits_V.double(), dim=0)
    statistic = float(((counts - expected) ** 2 / expected).sum())
    assert statistic < 24.3
    # The same statistic against the wrong temperature fails by far, so the bound above can.
    wrong = draws * torch.softmax(logits_V.double() / 1.2, dim=0)
    assert float(((counts - wrong) ** 2 / wrong).sum()) > 100


def test_draws_of_neighbouring_seeds_and_positions_are_unrelated() -> None:
    grid = torch.tensor([[uniform(seed, position) for position in range(200)] for seed in range(200)])
    assert float(grid.min()) >= 0.0
    assert float(grid.max()) < 1.0
    assert abs(float(grid.mean()) - 0.5) < 0.01
    for other in (grid.roll(1, 0), grid.roll(1, 1)):
        assert abs(float(torch.corrcoef(torch.stack([grid.flatten(), other.flatten()]))[0, 1])) < 0.02


def test_a_position_depends_on_seed_and_position_alone() -> None:
    params = SamplingParams(temperature=1.0, seed=5)
    forward = [sample(_logits(1), [], params, position) for position in range(50)]
    backward = [sample(_logits(1), [], params, position) for position in reversed(range(50))]
    assert forward == backward[::-1]
    assert forward != [sample(_logits(1), [], SamplingParams(temperature=1.0, seed=6), i) for i in range(50)]


def test_greedy_takes_the_lowest_id_among_the_largest_whatever_the_seed() -> None:
    logits_V = torch.tensor([1.0, 3.0, 3.0, 0.0])
    assert [sample(logits_V, [], SamplingParams(seed=seed), 9) for seed in range(5)] == [1] * 5
    assert sample(logits_V, [1], SamplingParams(repetition_penalty=1.1), 9) == 2
    assert sample(-logits_V, [3], SamplingParams(repetition_penalty=1.1), 9) == 3


def test_never_draws_a_filtered_token() -> None:
    params = SamplingParams(temperature=1.5, top_k=3, seed=2)
    top = set(torch.topk(_logits(4), 3).indices.tolist())
    drawn = {sample(_logits(4), [], params, position) for position in range(200)}
    assert drawn == top


@pytest.mark.parametrize("largest", [1 - 2.0**-53, 0.0])
def test_the_ends_of_the_unit_interval_are_tokens_with_a_probability(
    largest: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mycel.node.sampling.uniform", lambda _seed, _position: largest)
    logits_V = torch.full((50,), -5.0)
    logits_V[[10, 30]] = 5.0
    assert sample(logits_V, [], SamplingParams(temperature=1.0, top_k=2), 0) == (30 if largest else 10)


def test_low_precision_logits_are_accepted_and_bad_ones_refused() -> None:
    assert sample(_logits(0).bfloat16(), [], SamplingParams(), 0) == int(_logits(0).bfloat16().argmax())
    with pytest.raises(ValueError, match="not finite"):
        sample(torch.tensor([0.0, float("nan")]), [], SamplingParams(), 0)
    for history in ([2], [-1]):
        with pytest.raises(ValueError, match="outside of the vocabulary"):
            sample(torch.tensor([0.0, 1.0]), history, SamplingParams(repetition_penalty=1.5), 0)
