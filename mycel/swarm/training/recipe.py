"""The recipe: everything that makes a training run this run and no other. One TOML file, checked once.

Ring: pure.
"""

from __future__ import annotations

from typing import Annotated, Literal

from msgspec import Meta, Struct

__all__ = [
    "BorderPart",
    "CheckpointPart",
    "DataPart",
    "ModelPart",
    "OptimizerPart",
    "Recipe",
    "SchedulePart",
    "StepPart",
]

Positive = Annotated[int, Meta(ge=1)]
Fraction = Annotated[float, Meta(ge=0.0, le=1.0)]
NonNegative = Annotated[float, Meta(ge=0.0)]


class ModelPart(Struct, frozen=True, forbid_unknown_fields=True):
    """`path` is a Hugging Face directory, or "demo" for the configuration and tokenizer inside Mycel.

    With `start = "scratch"` its config.json and tokenizer are taken and the weights drawn from the recipe's seed; with
    "weights" training goes on from its weights.
    """

    path: str = "demo"
    start: Literal["scratch", "weights"] = "scratch"


class DataPart(Struct, frozen=True, forbid_unknown_fields=True):
    """Where the text is: `files` are paths or glob patterns, relative to the recipe.

    `kind`: "text" (one document a file), "jsonl" or "parquet" (one document a row, in `field`), "dataset" (a Hugging
    Face dataset directory, as save_to_disk writes it), "python-topics" (the help texts inside Python; no files), or
    "auto" by the files' names. `sequence` is how many target tokens a sample has.
    """

    kind: Literal["auto", "text", "jsonl", "parquet", "dataset", "python-topics"] = "auto"
    files: tuple[str, ...] = ()
    field: str = "text"
    sequence: Annotated[int, Meta(ge=2, le=1 << 20)] = 128


class OptimizerPart(Struct, frozen=True, forbid_unknown_fields=True):
    """`clip` bounds the norm of the gradient of the whole model, 0 for not at all. sgd: `momentum`, no betas."""

    name: Literal["adamw", "sgd"] = "adamw"
    learning_rate: Annotated[float, Meta(gt=0.0)] = 1e-3
    betas: tuple[Fraction, Fraction] = (0.9, 0.95)
    epsilon: Annotated[float, Meta(gt=0.0)] = 1e-8
    momentum: Fraction = 0.9
    weight_decay: NonNegative = 0.1
    clip: NonNegative = 1.0


class SchedulePart(Struct, frozen=True, forbid_unknown_fields=True):
    """The learning rate: up over `warmup_steps`, then to `final` times its height at the last step."""

    name: Literal["cosine", "linear", "constant"] = "cosine"
    warmup_steps: Annotated[int, Meta(ge=0)] = 0
    final: Fraction = 0.1


class StepPart(Struct, frozen=True, forbid_unknown_fields=True):
    """How long and in what portions: either `steps` or `tokens` in all.

    `batch_tokens` a step, in microbatches of `microbatch` sequences; it must be a multiple of those.
    """

    steps: Annotated[int, Meta(ge=0)] = 0
    tokens: Annotated[int, Meta(ge=0)] = 0
    batch_tokens: Positive = 8192
    microbatch: Annotated[int, Meta(ge=1, le=4096)] = 8


class BorderPart(Struct, frozen=True, forbid_unknown_fields=True):
    """What crosses from stage to stage: `codec` for activations and their gradients, and a learned `bottleneck`.

    The bottleneck sends 1/`factor` of the hidden size: "linear" (norm, down, norm | up), "maxout" (norm, maximum of
    groups, norm | up).
    """

    codec: Literal["int8", "bfloat16", "float32"] = "int8"
    bottleneck: Literal["none", "linear", "maxout"] = "none"
    factor: Literal[2, 4, 8] = 2


class CheckpointPart(Struct, frozen=True, forbid_unknown_fields=True):
    """A checkpoint every `every` steps and at the end (0: at the end alone); the newest `keep` stay."""

    every: Annotated[int, Meta(ge=0)] = 100
    keep: Positive = 2


class Recipe(Struct, frozen=True, forbid_unknown_fields=True):
    """One training run. `stages` spans of about equal cost; `recompute` trades compute for memory."""

    name: Annotated[str, Meta(min_length=1, max_length=64, pattern=r"^[A-Za-z0-9._-]+$")]
    model: ModelPart = ModelPart()
    data: DataPart = DataPart()
    optimizer: OptimizerPart = OptimizerPart()
    schedule: SchedulePart = SchedulePart()
    step: StepPart = StepPart()
    border: BorderPart = BorderPart()
    checkpoint: CheckpointPart = CheckpointPart()
    stages: Annotated[int, Meta(ge=1, le=64)] = 1
    seed: Annotated[int, Meta(ge=0, le=2**63 - 1)] = 0
    recompute: Literal["auto", "always", "never"] = "auto"
