"""The recipe: everything that makes a training run this run and no other. One TOML file, checked once.

`parse_recipe` reads it, `published` leaves out what only its author's machine knows, and `canonical` writes what then
travels with the run's manifest as recipe.toml.

Ring: pure.
"""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Iterator
from typing import Annotated, Any, Literal, get_args, get_type_hints

import msgspec
from msgspec import Meta, Struct

from mycel.protocols.errors import ConfigError, one_line
from mycel.protocols.training import MAX_MICROBATCHES
from mycel.swarm.methods.options import DataParallelOptions, MethodOptions
from mycel.swarm.zeroth.options import ZerothOptions

__all__ = [
    "BorderPart",
    "CheckpointPart",
    "DataPart",
    "ExactOptions",
    "MethodPart",
    "ModelPart",
    "OptimizerPart",
    "Recipe",
    "RoundPart",
    "SchedulePart",
    "StepPart",
    "canonical",
    "check_recipe",
    "n_steps",
    "parse_recipe",
    "published",
]

MAX_RECIPE_CHARS = 1 << 16
MAX_STEPS = 1 << 30

Positive = Annotated[int, Meta(ge=1, le=1 << 48)]
Fraction = Annotated[float, Meta(ge=0.0, le=1.0)]
NonNegative = Annotated[float, Meta(ge=0.0, le=1e6)]  # the bound keeps infinity out, every comparison NaN


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
    "auto" by the files' names. `sequence` is how many target tokens a sample has. The fraction `held_out` of all
    samples is never trained on. `fingerprint` is that of the tokens, in hex: a run's founder fills it in, and a trainer
    whose text gives another is refused.
    """

    kind: Literal["auto", "text", "jsonl", "parquet", "dataset", "python-topics"] = "auto"
    files: tuple[str, ...] = ()
    field: str = "text"
    sequence: Annotated[int, Meta(ge=2, le=1 << 20)] = 128
    held_out: Annotated[float, Meta(ge=0.0, le=0.5)] = 0.0
    fingerprint: Annotated[str, Meta(pattern=r"^([0-9a-f]{64})?\Z")] = ""


class OptimizerPart(Struct, frozen=True, forbid_unknown_fields=True):
    """`clip` bounds the norm of the gradient of the whole model, 0 for not at all. sgd: `momentum`, no betas."""

    name: Literal["adamw", "sgd"] = "adamw"
    learning_rate: Annotated[float, Meta(gt=0.0, le=1e3)] = 1e-3
    betas: tuple[Fraction, Fraction] = (0.9, 0.95)
    epsilon: Annotated[float, Meta(gt=0.0, le=1.0)] = 1e-8
    momentum: Fraction = 0.9
    weight_decay: NonNegative = 0.1
    clip: NonNegative = 1.0


class SchedulePart(Struct, frozen=True, forbid_unknown_fields=True):
    """The learning rate: up over `warmup_steps`, then to `final` times its height at the last step."""

    name: Literal["cosine", "linear", "constant"] = "cosine"
    warmup_steps: Annotated[int, Meta(ge=0, le=MAX_STEPS)] = 0
    final: Fraction = 0.1


class StepPart(Struct, frozen=True, forbid_unknown_fields=True):
    """How long and in what portions: either `steps` or `tokens` in all.

    `batch_tokens` a step, in microbatches of `microbatch` sequences; it must be a multiple of those.
    """

    steps: Annotated[int, Meta(ge=0, le=MAX_STEPS)] = 0
    tokens: Annotated[int, Meta(ge=0, le=1 << 62)] = 0
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


class ExactOptions(Struct, frozen=True, forbid_unknown_fields=True, tag_field="name", tag="exact"):
    """Each step's gradients are summed as integers: trusts everybody, sends everything, and needs no rounds."""


MethodPart = ExactOptions | MethodOptions | ZerothOptions


class RoundPart(Struct, frozen=True, forbid_unknown_fields=True):
    """How the peers of a group agree on what their contributions come to; not for the method "exact".

    `rule` brings contributions together and withstands the share `liars` of them; "" is Mycel's choice. `aggregators`
    reduce each shard independently, 0: everybody everything. `open`: more than two thirds of the members sign, else a
    majority of members who are trusted. It begins with `peers`; `contributors` is the share of them that is waited for.
    """

    rule: Annotated[str, Meta(max_length=128)] = ""
    liars: Annotated[float, Meta(ge=0.0, le=0.49)] = 0.25
    aggregators: Annotated[int, Meta(ge=0, le=15)] = 3
    open: bool = True
    peers: Annotated[int, Meta(ge=1, le=256)] = 1
    contributors: Annotated[float, Meta(gt=0.0, le=1.0)] = 0.66
    absences: Annotated[int, Meta(ge=1, le=1000)] = 3
    audits: Annotated[int, Meta(ge=0, le=256)] = 1
    patience_s: Annotated[float, Meta(ge=0.1, le=1e6)] = 60.0


class CheckpointPart(Struct, frozen=True, forbid_unknown_fields=True):
    """A checkpoint every `every` steps and at the end (0: at the end alone); the newest `keep` stay."""

    every: Annotated[int, Meta(ge=0, le=MAX_STEPS)] = 100
    keep: Positive = 2


class Recipe(Struct, frozen=True, forbid_unknown_fields=True):
    """One training run. `stages` spans of about equal cost; `recompute` trades compute for memory."""

    name: Annotated[str, Meta(max_length=64, pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*\Z")]
    model: ModelPart = ModelPart()
    data: DataPart = DataPart()
    optimizer: OptimizerPart = OptimizerPart()
    schedule: SchedulePart = SchedulePart()
    step: StepPart = StepPart()
    border: BorderPart = BorderPart()
    checkpoint: CheckpointPart = CheckpointPart()
    method: MethodPart = ExactOptions()
    round: RoundPart = RoundPart()
    stages: Annotated[int, Meta(ge=1, le=64)] = 1
    seed: Annotated[int, Meta(ge=0, le=2**63 - 1)] = 0
    recompute: Literal["auto", "always", "never"] = "auto"

    @property
    def has_bottlenecks(self) -> bool:
        """Whether there is a border, and what crosses it is narrowed: then it trains no Hugging Face model."""
        return self.border.bottleneck != "none" and self.stages > 1


_PLACE = re.compile(r" - at `\$\.?(.*)`\Z", re.DOTALL)
_UNKNOWN = re.compile(r"Object contains unknown field `(.*)`\Z", re.DOTALL)
_MISSING = re.compile(r"Object missing required field `(.*)`\Z")
_TYPES = {"`object`": "a table", "`array`": "a list", "`str`": "text", "`int`": "a whole number", "`float`": "a number"}


def parse_recipe(text: str, name: str) -> Recipe:
    """The recipe in `text`, all of it checked. `name` is what errors call it, a path for example.

    Raises ConfigError, one line that names the key and what is wanted there.
    """
    if len(text) > MAX_RECIPE_CHARS:
        raise ConfigError(f"{name} is no recipe: it has more than {MAX_RECIPE_CHARS} characters")
    try:
        raw = tomllib.loads(text)
    except (ValueError, RecursionError) as error:  # TOMLDecodeError is a ValueError; an endless number is another
        raise ConfigError(f"{name} is not valid TOML: {_short(error)}") from None
    try:
        recipe = msgspec.convert(raw, Recipe)
    except (msgspec.ValidationError, RecursionError) as error:
        raise ConfigError(f"{name}: {_mistake(str(error), raw)}") from None
    check_recipe(recipe, name)
    return recipe


def check_recipe(recipe: Recipe, name: str) -> None:
    """What no single key can say. Raises ConfigError, one line."""
    for flaw in _flaws(recipe):
        raise ConfigError(f"{name}: {flaw}")


def _flaws(recipe: Recipe) -> Iterator[str]:
    yield from _length_flaws(recipe)
    yield from _data_flaws(recipe.data)
    if max(recipe.optimizer.betas) >= 1.0:
        yield "optimizer.betas: both must be less than 1"
    if recipe.optimizer.momentum >= 1.0:
        yield "optimizer.momentum: must be less than 1"
    if recipe.stages > 1:
        yield from _stage_flaws(recipe.method)
    if not recipe.model.path:
        yield 'model.path: must name a model directory, or "demo"'


def _stage_flaws(method: MethodPart) -> Iterator[str]:
    """What the peers of a pipeline's stages can share in rounds: each step's gradient, and nothing else yet."""
    if isinstance(method, ExactOptions):
        return
    if not isinstance(method, DataParallelOptions):
        name = method.__struct_config__.tag
        yield f'method.name: with stages > 1 it must be "exact" or "data-parallel", not "{name}"; or stages = 1'
        return
    for key in DataParallelOptions.__struct_fields__:
        if key not in ("codec", "result_codec") and getattr(method, key) != getattr(DataParallelOptions(), key):
            yield f"method.{key}: with stages > 1 every step is shared and [optimizer] makes it: leave this out"


def _length_flaws(recipe: Recipe) -> Iterator[str]:
    step, sequence = recipe.step, recipe.data.sequence
    if not step.steps and not step.tokens:
        yield "step: say how long to train, in steps or in tokens"
    if step.steps and step.tokens:
        yield "step: say steps or tokens, not both"
    portion = step.microbatch * sequence
    n_microbatches, rest = divmod(step.batch_tokens, portion)
    if rest or not n_microbatches:
        near = f"{n_microbatches * portion} or " if n_microbatches else ""
        what = f"step.microbatch ({step.microbatch}) times data.sequence ({sequence}), which is {portion}"
        yield f"step.batch_tokens: must be a multiple of {what}: {near}{(n_microbatches + 1) * portion}, for example"
    if n_microbatches > MAX_MICROBATCHES:
        yield f"step.microbatch: a step would have {n_microbatches} microbatches, more than {MAX_MICROBATCHES}"
    steps = n_steps(recipe)
    if steps > MAX_STEPS:
        yield f"step.tokens: that is {steps} steps, more than {MAX_STEPS}"
    if recipe.schedule.warmup_steps > steps:
        yield f"schedule.warmup_steps: {recipe.schedule.warmup_steps} is more than all {steps} steps of the run"


def _data_flaws(data: DataPart) -> Iterator[str]:
    if data.kind == "python-topics":
        if data.files:
            yield 'data.files: kind = "python-topics" reads no files'
    elif not data.files and not data.fingerprint:
        yield 'data.files: must name the text to train on (or kind = "python-topics")'
    if not all(data.files):
        yield "data.files: a name in it is empty"
    if not data.field:
        yield "data.field: must not be empty"


def n_steps(recipe: Recipe) -> int:
    """How many steps the run has; `tokens` are rounded up to whole steps."""
    return recipe.step.steps or -(-recipe.step.tokens // recipe.step.batch_tokens)


def published(recipe: Recipe, fingerprint: str) -> Recipe:
    """What travels: no place of the author's machine, and the fingerprint (hex) of the tokens to train on."""
    path = re.split(r"[/\\]", recipe.model.path.rstrip("/\\"))[-1] or "model"
    return msgspec.structs.replace(
        recipe,
        model=msgspec.structs.replace(recipe.model, path=path),
        data=msgspec.structs.replace(recipe.data, files=(), fingerprint=fingerprint),
    )


def canonical(recipe: Recipe) -> str:
    """The recipe as TOML, every key written out: equal recipes give equal text, and parsing it gives the recipe."""
    values = {field: getattr(recipe, field) for field in Recipe.__struct_fields__}
    lines = [f"{key} = {_toml(value)}" for key, value in values.items() if not isinstance(value, Struct)]
    for section, part in values.items():
        if isinstance(part, Struct):
            lines += ["", f"[{section}]"]
            if (tag := part.__struct_config__.tag) is not None:
                lines.append(f"name = {_toml(str(tag))}")
            lines += [f"{key} = {_toml(getattr(part, key))}" for key in part.__struct_fields__]
    return "\n".join(lines) + "\n"


def _toml(value: str | float | tuple[str | float, ...]) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple):
        return f"[{', '.join(_toml(item) for item in value)}]"
    if isinstance(value, str):
        # JSON's escapes are TOML's, but TOML wants that of DEL as well.
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    return repr(value)


# ---- mistakes, in the words of the file


def _mistake(message: str, raw: dict[str, Any]) -> str:
    """What msgspec says of a value, in the words of a recipe and with the key in front."""
    place = _PLACE.search(message)
    key, problem = (place[1], message[: place.start()]) if place else ("", message)
    if unknown := _UNKNOWN.match(problem):
        known = ", ".join(_section(key, raw).__struct_fields__)
        return f"{_short(_join(key, unknown[1]))}: there is no such key; known are {known}"
    if missing := _MISSING.match(problem):
        return f"{_join(key, missing[1])}: must be given"
    if key == "method.name":
        names = ", ".join(str(choice.__struct_config__.tag) for choice in get_args(MethodPart))
        return f"method.name: must be one of {names}, not {_short(_value(raw, key))}"
    if problem.startswith("Invalid enum value"):
        choices = ", ".join(str(choice) for choice in get_args(get_type_hints(_section(key, raw))[_last(key)]))
        return f"{key}: must be one of {choices}, not {_short(_value(raw, key))}"
    if key == "name":
        return "name: must be 1 to 64 letters, digits, dots, underscores and hyphens, a letter or digit first"
    if key == "data.fingerprint":
        return "data.fingerprint: must be 64 hexadecimal digits, as a run's founder writes them; or leave it out"
    for technical, plain in _TYPES.items():
        problem = problem.replace(technical, plain)
    return f"{key}: {problem[:1].lower()}{problem[1:].replace('`', '')}"


def _section(key: str, raw: dict[str, Any]) -> type[Struct]:
    """The part of a recipe that `key` is, or is in."""
    name = key.partition(".")[0]
    part = get_type_hints(Recipe).get(name)
    if name == "method":
        chosen = raw["method"].get("name")
        part = next(choice for choice in get_args(MethodPart) if choice.__struct_config__.tag == chosen)
    return part if isinstance(part, type) and issubclass(part, Struct) else Recipe


def _last(key: str) -> str:
    return key.rpartition(".")[2]


def _join(section: str, key: str) -> str:
    return f"{section}.{key}" if section else key


def _value(raw: dict[str, Any], key: str) -> object:
    section, _, last = key.rpartition(".")
    return (raw[section] if section else raw)[last]


def _short(what: object) -> str:
    return one_line(" ".join(str(what).split()))[:160]
