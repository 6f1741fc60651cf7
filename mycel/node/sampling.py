"""Choosing the next token from logits, as a function of the logits, the history, the settings and the position alone.

No state and no generator: the draw for a position is a hash of (seed, position), so a replacement hop that is given the
same history chooses the same token.

Legend: V vocabulary, K kept tokens.

Ring: algorithms.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor

from mycel.protocols.messages import SamplingParams

__all__ = ["probabilities", "sample", "uniform"]

_DOMAIN = b"mycel/sampling/1"


def sample(logits_V: Tensor, history: Sequence[int], params: SamplingParams, position: int) -> int:
    """The token at `position`, given the logits there and every token before (prompt included).

    Temperature 0 takes the largest logit (the lowest id among equals) after the repetition penalty. Otherwise the
    inverse of the cumulative distribution, in order of token id and in float64, at `uniform(seed, position)`.
    Raises ValueError if the logits are not finite or `history` names a token outside of the vocabulary.

    >>> sample(torch.tensor([0.0, 2.0, 1.0]), [1], SamplingParams(repetition_penalty=4.0), position=1)
    2
    """
    if params.temperature == 0.0:
        return int(_penalised(logits_V, history, params.repetition_penalty).argmax())
    cumulative_V = probabilities(logits_V, history, params).cumsum(0)
    target = uniform(params.seed, position) * float(cumulative_V[-1])
    index = int(torch.searchsorted(cumulative_V, target, right=True))
    # Rounding may put the target on the very end: the last token with a probability, not the last of the vocabulary.
    last = int(torch.searchsorted(cumulative_V, cumulative_V[-1]))
    return min(index, last)


def probabilities(logits_V: Tensor, history: Sequence[int], params: SamplingParams) -> Tensor:
    """probabilities_V (float64, summing to 1) that `sample` draws from at a temperature above 0.

    In the order of transformers' `generate`: repetition penalty, temperature, top-k, top-p, min-p; each filter looks at
    what the ones before have left. Raises ValueError as `sample` does.
    """
    scores_V = _penalised(logits_V, history, params.repetition_penalty) / params.temperature
    kept_K, scores_K = _top_k(scores_V, params.top_k)
    chances_K = torch.softmax(scores_K, dim=0)
    if params.top_p < 1.0:
        chances_K = _top_p(chances_K, params.top_p)
    if params.min_p > 0.0:
        chances_K = torch.where(chances_K < params.min_p * chances_K.max(), 0.0, chances_K)
    return torch.zeros_like(scores_V).index_copy_(0, kept_K, chances_K / chances_K.sum())


def uniform(seed: int, position: int) -> float:
    """A number in [0, 1), uniform over positions and seeds: 53 bits of BLAKE2b of both.

    >>> 0.0 <= uniform(0, 0) < 1.0 and uniform(7, 3) == uniform(7, 3) != uniform(7, 4)
    True
    """
    message = _DOMAIN + seed.to_bytes(8, "little") + position.to_bytes(8, "little")
    digest = hashlib.blake2b(message, digest_size=8).digest()
    return (int.from_bytes(digest, "little") >> 11) / 2.0**53


def _penalised(logits_V: Tensor, history: Sequence[int], penalty: float) -> Tensor:
    """Scores in float64: for each token of the history, s / penalty if s > 0, else s * penalty (CTRL, section 4.1)."""
    scores_V = logits_V.to(torch.float64)
    if not bool(torch.isfinite(scores_V).all()):
        raise ValueError("the logits are not finite")
    if penalty == 1.0 or not history:
        return scores_V
    seen = torch.tensor(sorted(set(history)))
    if int(seen[0]) < 0 or int(seen[-1]) >= scores_V.shape[0]:
        raise ValueError(f"the history has a token outside of the vocabulary of {scores_V.shape[0]}")
    seen_scores = scores_V[seen]
    return scores_V.index_copy(0, seen, torch.where(seen_scores < 0, seen_scores * penalty, seen_scores / penalty))


def _top_k(scores_V: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """(ids, scores) of the k largest, with all that equal the smallest of them, in order of id; of all for k = 0."""
    if k == 0 or k >= scores_V.shape[0]:
        return torch.arange(scores_V.shape[0]), scores_V
    threshold = torch.topk(scores_V, k).values[-1]
    kept_K = torch.nonzero(scores_V >= threshold).squeeze(1)
    return kept_K, scores_V[kept_K]


def _top_p(chances_K: Tensor, top_p: float) -> Tensor:
    """The chances with all but the likeliest zeroed: as few as reach `top_p` together, at least one.

    Among equals the lower id is likelier. Not normalised again. (Holtzman et al. 2019, section 3.1)
    """
    sorted_K, order_K = torch.sort(chances_K, descending=True, stable=True)
    before_K = sorted_K.cumsum(0) - sorted_K
    return torch.zeros_like(chances_K).index_copy_(0, order_K, torch.where(before_K < top_p, sorted_K, 0.0))
