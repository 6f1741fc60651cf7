"""What the liars of one run know in a round: all of it.

Legend: N honest rows, F liars, P parameters.

Ring: algorithms.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from torch import Generator, Tensor

# Rows of this many rounds ago are what a delayed liar sends; no more are kept.
DELAY_ROUNDS = 20


@dataclass(slots=True)
class Memory:
    """What the liars of a run keep from round to round: the honest means, newest last, and directions by name."""

    means: list[Tensor] = field(default_factory=list)
    directions: dict[str, Tensor] = field(default_factory=dict)

    def remember(self, mean_P: Tensor) -> None:
        self.means.append(mean_P)
        del self.means[: -DELAY_ROUNDS - 1]


@dataclass(frozen=True, slots=True)
class Scene:
    """One round as the liars see it.

    `honest` is [N, P]. `own` [F, P] is what the liars would have sent had they been honest, or, for an attack on the
    data, what honest code made of it. `aggregate` gives for any F rows of theirs what the swarm would make of all rows:
    the rule in force with its centre, its seed and its state. `memory` lives as long as the run.
    """

    honest: Tensor
    own: Tensor
    aggregate: Callable[[Tensor], Tensor]
    memory: Memory
    rng: Generator

    @property
    def n_liars(self) -> int:
        return len(self.own)

    @property
    def mean(self) -> Tensor:
        return self.honest.mean(dim=0)

    @property
    def spread(self) -> Tensor:
        """The standard deviation of every coordinate over the honest rows; nought for one row."""
        return self.honest.std(dim=0, unbiased=False)

    def all_send(self, row_P: Tensor) -> Tensor:
        """The same row from every liar."""
        return row_P.expand(self.n_liars, -1).clone()


# From a round to the rows of the liars, [F, P].
Attack = Callable[[Scene], Tensor]
