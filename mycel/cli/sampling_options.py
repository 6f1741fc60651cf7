"""How a token is chosen: what was typed, else what the model's own generation_config.json recommends, else greedily.

Ring: shell (reads a file, draws a seed).
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click
import msgspec

from mycel.cli.common import F, Number
from mycel.protocols.messages import SamplingParams

_FIELDS = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
_MAX_CONFIG_BYTES = 1 << 20

_OPTIONS = (
    click.option(
        "--temperature",
        type=Number(0, 100),
        help="0: always the likeliest token. Higher: more variety. [default: what the model recommends, else 0]",
    ),
    click.option("--top-k", type=click.IntRange(0, 2**31 - 1), help="Choose among the K likeliest tokens; 0: all."),
    click.option(
        "--top-p",
        type=Number(0, 1, min_open=True),
        help="Choose among the likeliest tokens that together have this probability.",
    ),
    click.option("--min-p", type=Number(0, 1), help="Leave out tokens less likely than this times the likeliest one."),
    click.option(
        "--repetition-penalty",
        type=Number(0, 100, min_open=True),
        help="Make tokens that were there already less likely; 1: not at all.",
    ),
    click.option(
        "--seed", type=click.IntRange(0, 2**63 - 1), help="The same seed gives the same text. [default: drawn anew]"
    ),
)


def sampling_options(command: F) -> F:
    """Add the options of sampling to a command."""
    for option in reversed(_OPTIONS):
        command = option(command)
    return command


def sampling_params(typed: Mapping[str, Any], model_directory: Path) -> SamplingParams:
    """What was typed, over what the model recommends. Values that a peer's file has out of range are ignored."""
    values = recommended(model_directory) | {name: typed[name] for name in _FIELDS if typed.get(name) is not None}
    seed = typed.get("seed")
    return SamplingParams(**values, seed=secrets.randbelow(2**31) if seed is None else seed)


def recommended(model_directory: Path) -> dict[str, Any]:
    """The sampling that generation_config.json recommends; empty without one. Most count with do_sample alone."""
    path = model_directory / "generation_config.json"
    try:
        if path.stat().st_size > _MAX_CONFIG_BYTES:
            return {}
        config = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    if not isinstance(config, dict):
        return {}
    names = _FIELDS if config.get("do_sample") is True else ("repetition_penalty",)
    given = {"temperature": 1.0} if "temperature" in names else {}
    given |= {name: config[name] for name in names if config.get(name) is not None}
    return {name: value for name, value in given.items() if _fits(name, value)}


def _fits(name: str, value: object) -> bool:
    defaults = msgspec.to_builtins(SamplingParams())
    defaults[SamplingParams.__struct_fields__.index(name)] = value
    try:
        msgspec.convert(defaults, SamplingParams)
    except msgspec.ValidationError:
        return False
    return True
