"""What a run's author may choose about training with one byte per update: one table of the recipe, checked once.

    [method]
    name = "zeroth-order"
    parameters = "lora"
    updates = 256

Ring: pure.
"""

from __future__ import annotations

from typing import Annotated, Literal

from msgspec import Meta, Struct

from mycel.swarm.zeroth.rule import Rule, in_rate, in_units

__all__ = ["MAX_UPDATES", "ZerothOptions", "make_rule"]

MAX_UPDATES = 8000


class ZerothOptions(Struct, frozen=True, forbid_unknown_fields=True, tag_field="name", tag="zeroth-order"):
    """A step of the recipe is a round, in which each peer sends up to `updates` slopes of one byte each.

    A slope is measured on `step.microbatch` sequences by two forward passes `epsilon` to either side. `parameters` are
    all of the model's, low-rank additions of `rank` (scaled by `alpha`), or a prompt of `prompt_tokens` vectors. `clip`
    is how many code steps over the median an update counts for, at most; `pool` and `epoch` as in a `Rule`, 0 for none.
    The share `audits` of all updates is measured again by another peer.
    """

    updates: Annotated[int, Meta(ge=1, le=MAX_UPDATES)] = 256
    parameters: Literal["full", "lora", "prompt"] = "full"
    rate: Annotated[float, Meta(gt=0.0, lt=64.0)] = 1e-3
    epsilon: Annotated[float, Meta(gt=1e-9, lt=16.0)] = 1e-3
    rank: Annotated[int, Meta(ge=1, le=1024)] = 8
    alpha: Annotated[float, Meta(gt=0.0, le=1e4)] = 16.0
    prompt_tokens: Annotated[int, Meta(ge=1, le=4096)] = 16
    clip: Annotated[int, Meta(ge=0, le=127)] = 16
    pool: Annotated[int, Meta(ge=0, le=1 << 16)] = 0
    epoch: Annotated[int, Meta(ge=0, le=1 << 20)] = 0
    audits: Annotated[float, Meta(ge=0.0, le=1.0)] = 0.1

    def __post_init__(self) -> None:
        if bool(self.pool) != bool(self.epoch):
            raise ValueError("a pool needs an epoch, and an epoch a pool")


def make_rule(options: ZerothOptions, run: bytes, theta: bytes, n_elements: int) -> Rule:
    """The rule of a run: `theta` is the hash of its first parameters. Raises ConfigError."""
    return Rule(
        run,
        theta,
        n_elements,
        in_rate(options.rate),
        in_units(options.epsilon),
        clip=options.clip,
        samples=options.updates,
        pool=options.pool,
        epoch=options.epoch,
    ).checked()
