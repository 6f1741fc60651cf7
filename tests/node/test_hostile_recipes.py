"""A run of somebody else whose recipe asks for more than this machine has: one line, before anything is made."""

from __future__ import annotations

from pathlib import Path

import pytest

from mycel.node.config import NodeConfig
from mycel.node.training.ground import _kept_bytes, _left_bytes
from mycel.protocols.errors import ConfigError
from mycel.swarm.training.plan import make_plan
from mycel.swarm.training.recipe import parse_recipe

RECIPE = """
name = "huge"
stages = 2
[data]
kind = "python-topics"
sequence = {sequence}
[step]
steps = 1
microbatch = {microbatch}
batch_tokens = {batch}
"""


def test_a_step_that_fits_into_no_memory_is_refused(tmp_path: Path) -> None:
    sequence, microbatch = 1 << 20, 4096
    text = RECIPE.format(sequence=sequence, microbatch=microbatch, batch=sequence * microbatch * 8192)
    recipe = parse_recipe(text, "recipe.toml")
    plan = make_plan(recipe, bytes(32), [1, 1])
    config = NodeConfig(data_dir=tmp_path, listen=(), model=tmp_path, memory_bytes=1 << 40)
    with pytest.raises(ConfigError, match=r"not enough memory: the microbatches of one step take .* may be used"):
        _left_bytes(config, _kept_bytes(plan, recipe, 4096))


def test_what_is_kept_of_a_step_is_taken_from_the_memory_that_may_be_used(tmp_path: Path) -> None:
    config = NodeConfig(data_dir=tmp_path, listen=(), model=tmp_path, memory_bytes=1000)
    assert _left_bytes(config, 400) == 600
