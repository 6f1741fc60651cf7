"""What a run's author may choose about its method: one table, checked once.

    [method]
    name = "streaming"
    inner_steps = 100
    fragments = 4

Ring: pure.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Literal

import msgspec
from msgspec import Meta, Struct

from mycel.protocols.errors import ConfigError, one_line

__all__ = [
    "DataParallelOptions",
    "DemoOptions",
    "DilocoOptions",
    "EagerOptions",
    "MethodOptions",
    "SparseLocoOptions",
    "StreamingOptions",
    "parse_options",
]

Steps = Annotated[int, Meta(ge=1, le=1_000_000)]
Delay = Annotated[int, Meta(ge=0, le=1_000_000)]
Rate = Annotated[float, Meta(gt=0.0, le=1e3)]
Fraction = Annotated[float, Meta(ge=0.0, lt=1.0)]
Decay = Annotated[float, Meta(ge=0.0, le=1.0)]
Spec = Annotated[str, Meta(min_length=1, max_length=1024)]


class DataParallelOptions(Struct, frozen=True, forbid_unknown_fields=True, tag_field="name", tag="data-parallel"):
    """A gradient each round, of `inner_steps` batches; one optimizer for all. sgd: `momentum`, no betas."""

    inner_steps: Steps = 1
    delay: Delay = 0
    optimizer: Literal["adamw", "sgd"] = "adamw"
    rate: Rate = 1e-3
    betas: tuple[Fraction, Fraction] = (0.9, 0.95)
    epsilon: Annotated[float, Meta(gt=0.0, le=1.0)] = 1e-8
    momentum: Fraction = 0.9
    weight_decay: Decay = 0.1
    codec: Spec = "float16"
    result_codec: Spec = "float16"


class DilocoOptions(Struct, frozen=True, forbid_unknown_fields=True, tag_field="name", tag="diloco"):
    """`inner_steps` of the peer's own optimizer between rounds; Nesterov outside. `braking`: 0 for none."""

    inner_steps: Steps = 100
    rate: Rate = 0.7
    momentum: Fraction = 0.9
    braking: Annotated[float, Meta(ge=0.0, le=4.0)] = 0.0
    codec: Spec = "e3m0+zip+ef"
    result_codec: Spec = "int4"


class StreamingOptions(Struct, frozen=True, forbid_unknown_fields=True, tag_field="name", tag="streaming"):
    """Each of `fragments` goes once in `inner_steps`, one after another, while training goes on for `delay` steps.

    What comes back is mixed in: `mix` parts the peer's own parameters, the rest the shared ones. The defaults are the
    paper's, for long delays; with a delay of a step or two and few rounds, rate 0.7 and mix 0 learn faster.
    """

    inner_steps: Steps = 100
    fragments: Annotated[int, Meta(ge=1, le=256)] = 2
    delay: Delay = 1
    mix: Decay = 0.5
    rate: Rate = 0.4
    momentum: Fraction = 0.9
    braking: Annotated[float, Meta(ge=0.0, le=4.0)] = 0.0
    codec: Spec = "e3m0+zip+ef"
    result_codec: Spec = "int4"

    def __post_init__(self) -> None:
        if self.inner_steps < self.fragments:
            raise ValueError(f"{self.fragments} fragments need at least as many inner_steps")
        if self.delay >= self.inner_steps:
            raise ValueError(
                f"a delay of {self.delay} is not less than the {self.inner_steps} steps between two rounds"
            )


class EagerOptions(Struct, frozen=True, forbid_unknown_fields=True, tag_field="name", tag="eager"):
    """DiLoCo that never waits: a round's result comes in at the end of the next one.

    `own`: what a peer's own contribution counts for until then; 1 / peers is the paper's, and needs a much lower rate.
    """

    inner_steps: Steps = 100
    rate: Rate = 0.5
    momentum: Fraction = 0.9
    own: Decay = 0.85
    codec: Spec = "e3m0+zip+ef"
    result_codec: Spec = "int4"


class SparseLocoOptions(Struct, frozen=True, forbid_unknown_fields=True, tag_field="name", tag="sparseloco"):
    """No momentum outside: what a peer could not send yet takes its place, fading by the codec's decay."""

    inner_steps: Steps = 30
    rate: Rate = 1.0
    codec: Spec = "topk:0.015625,values=int2+ef:0.95"
    result_codec: Spec = "int4"


class DemoOptions(Struct, frozen=True, forbid_unknown_fields=True, tag_field="name", tag="demo"):
    """A gradient each round, whose momentum is what the codec has not sent; the sign of the result is the step."""

    inner_steps: Steps = 1
    delay: Delay = 0
    rate: Rate = 1e-3
    weight_decay: Decay = 0.0
    codec: Spec = "dct:32+ef:0.999"
    result_codec: Spec = "int4"


MethodOptions = DataParallelOptions | DilocoOptions | StreamingOptions | EagerOptions | SparseLocoOptions | DemoOptions


def parse_options(table: Mapping[str, object]) -> MethodOptions:
    """The options in a table with "name" and what differs from the defaults. Raises ConfigError, one line.

    >>> parse_options({"name": "diloco", "inner_steps": 20}).rate
    0.7
    """
    try:
        # Numbers of TOML without a point stay welcome where fractions are meant; NaN fails every bound.
        options: MethodOptions = msgspec.convert(dict(table), type=MethodOptions, strict=True)
    except msgspec.ValidationError as error:
        raise ConfigError(f"the method: {one_line(str(error))}") from None
    return options
