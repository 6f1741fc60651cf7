"""What a run computes, for all its peers: stages, steps, and which samples each microbatch holds.

Everything follows from the recipe and the run's id, so that any peer can run any microbatch, and no two disagree about
what belongs to a step.

Ring: pure.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from mycel.protocols.errors import ConfigError
from mycel.swarm.placement import even_spans
from mycel.swarm.training.numbers import all_numbers
from mycel.swarm.training.recipe import Recipe, n_steps

_WORK_DOMAIN = b"mycel microbatch v1"
_OWNER_DOMAIN = b"mycel owner v1"


@dataclass(frozen=True, slots=True)
class Work:
    """One microbatch of one step: sequences [first, first + count) of the run's endless order of samples."""

    id: bytes
    version: int
    number: int
    first: int
    count: int


@dataclass(frozen=True, slots=True)
class RunPlan:
    """`run` is the id of the run, `spans` the blocks [start, end) of each stage, in order.

    A step takes `n_microbatches` of `n_sequences` sequences with `n_tokens` target tokens each.
    """

    run: bytes
    spans: tuple[tuple[int, int], ...]
    n_steps: int
    n_microbatches: int
    n_sequences: int
    n_tokens: int

    @property
    def n_stages(self) -> int:
        return len(self.spans)

    @property
    def step_tokens(self) -> int:
        """Target tokens of a step: what a loss and a gradient are divided by."""
        return self.n_microbatches * self.n_sequences * self.n_tokens

    @property
    def everything(self) -> int:
        """The set of all numbers of a step."""
        return all_numbers(self.n_microbatches)

    def work(self, version: int, number: int) -> Work:
        """The microbatch; its id is SHA-256 of run, step and sample range."""
        first = (version * self.n_microbatches + number) * self.n_sequences
        fields = b"".join(value.to_bytes(8, "little") for value in (version, first, self.n_sequences))
        return Work(hashlib.sha256(_WORK_DOMAIN + self.run + fields).digest(), version, number, first, self.n_sequences)

    def owner(self, work: Work, trainers: Collection[str]) -> str:
        """Who of these drives it: the lowest hash of peer and work. Who joins or leaves moves no other's share."""
        return min(trainers, key=lambda peer: hashlib.sha256(_OWNER_DOMAIN + work.id + peer.encode()).digest())


def make_plan(
    recipe: Recipe, run: bytes, block_costs: Sequence[int], *, embed_cost: int = 0, head_cost: int = 0
) -> RunPlan:
    """The plan of a checked recipe, its stages of about equal cost, in whatever unit the costs are.

    The first stage carries `embed_cost`, the last `head_cost`. Raises ConfigError for more stages than blocks.
    """
    if recipe.stages > len(block_costs):
        raise ConfigError(f"{recipe.name}: stages: {recipe.stages} are more than the model's {len(block_costs)} blocks")
    return RunPlan(
        run=run,
        spans=even_spans(block_costs, recipe.stages, embed_bytes=embed_cost, head_bytes=head_cost),
        n_steps=n_steps(recipe),
        n_microbatches=recipe.step.batch_tokens // (recipe.step.microbatch * recipe.data.sequence),
        n_sequences=recipe.step.microbatch,
        n_tokens=recipe.data.sequence,
    )


def shards(n_elements: int, members: Sequence[str]) -> dict[str, tuple[int, int]]:
    """Elements [start, end) that each of `members` (in order) sums up for all: even shares, empty ones left out."""
    n = len(members)
    bounds = [n_elements * i // n for i in range(n + 1)]
    return {peer: (bounds[i], bounds[i + 1]) for i, peer in enumerate(members) if bounds[i] < bounds[i + 1]}
