"""What a peer's rows have been worth so far: who has pulled against the others all along loses its say.

To first order, <row of a peer, what was applied>, summed over the rounds, is by how much the peer's own loss fell. For
an honest peer of a run that makes progress the sum is positive, however unlike its data are; a liar that pulls
backwards from within the honest spread, where one round's distances show nothing, makes it negative. So this is a
pre-step with a memory: of the rows whose cosines have a negative moving average the worst, n_liars at most, are set
aside, and a rule decides on the others. All follows from the round's Gram matrix and integers that all peers share.

A liar can earn first and harm later: the best past pays for 45 rounds of pulling straight backwards, and the rule on
its own stands against those. That rule must hold the swarm's course, or honest peers are set aside: use it with caf.
Rows are updates; the cosines of parameters say nothing.

    N rows

Ring: algorithms.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType

import numpy as np
from torch import Tensor

from mycel.protocols.errors import ConfigError
from mycel.security.aggregators.decide import decide
from mycel.security.aggregators.decision import UNIT, Decision
from mycel.security.aggregators.rules import Rule
from mycel.security.aggregators.small import Array, times, total

# A round's cosine has this share in the score.
_SHARE = 64


@dataclass(frozen=True, slots=True)
class Standing:
    """Each peer's score, in units of 2^-20: the same integers at all peers, as part of what a certificate covers."""

    scores: Mapping[str, int] = field(default_factory=lambda: MappingProxyType({}))

    def set_aside(self, peers: Sequence[str], n_liars: int) -> tuple[int, ...]:
        """The indices of the peers with the lowest scores below nought, `n_liars` at most; ties by name."""
        worst = sorted((self.scores.get(name, 0), name, i) for i, name in enumerate(peers))
        limit = max(0, min(n_liars, (len(peers) - 1) // 2))
        return tuple(sorted(i for score, _, i in worst[:limit] if score < 0))

    def after(self, peers: Sequence[str], cosines: Sequence[int]) -> Standing:
        """The standing after a round in which these peers' rows had these cosines with the aggregate."""
        moved = dict(self.scores)
        for name, cosine in zip(peers, cosines, strict=True):
            score = moved.get(name, 0)
            # Floor division: integers go down alike everywhere. A score lives between -UNIT and UNIT.
            moved[name] = score + (cosine - score) // _SHARE
        return Standing(MappingProxyType(moved))

    def of(self, members: Iterable[str]) -> Standing:
        """Those who are still in the run; who comes back starts anew."""
        return Standing(MappingProxyType({name: self.scores[name] for name in members if name in self.scores}))


def decide_standing(
    rule: Rule, gram_NN: Tensor, n_liars: int, *, peers: Sequence[str], standing: Standing, seed: bytes
) -> tuple[Decision, Standing]:
    """The decision of `rule` without the rows that `standing` sets aside, and the standing after this round.

    `gram_NN` is about no centre (`gram(rows, None)`). Raises ConfigError for a rule that gives rows no weights.
    """
    aside = standing.set_aside(peers, n_liars)
    kept = [i for i in range(len(peers)) if i not in aside]
    inner = decide(rule, gram_NN[kept][:, kept], n_liars, seed=seed)
    if not kept:
        return inner, standing
    if not inner.weights:
        raise ConfigError(f"a standing needs a rule that weighs whole rows, which {rule} does not")
    weights = [0] * len(peers)
    for i, weight in zip(kept, inner.weights, strict=True):
        weights[i] = weight
    outliers = tuple(sorted({*aside, *(kept[i] for i in inner.outliers)}))
    said = f"{len(aside)} of {len(peers)} rows set aside for their standing; {inner.reason}"
    decision = Decision(len(peers), weights=tuple(weights), outliers=outliers, reason=said[:200])
    return decision, standing.after(peers, _cosines(gram_NN.numpy(), np.array(weights, dtype=np.float64) / UNIT))


def _cosines(gram_NN: Array, weights_N: Array) -> list[int]:
    """cos(x_i, sum_j w_j x_j) = (G w)_i / sqrt(G_ii w'Gw), in units of 2^-20; 0 where either is nought."""
    to_sum_N = times(gram_NN, weights_N)
    square_N = np.maximum(np.diagonal(gram_NN), 0.0) * max(float(total(to_sum_N * weights_N)), 0.0)
    cosine_N = np.where(square_N > 0.0, to_sum_N / np.sqrt(np.where(square_N > 0.0, square_N, 1.0)), 0.0)
    return [int(cosine) for cosine in np.rint(np.clip(cosine_N, -1.0, 1.0) * UNIT)]
