"""A machine's speed is measured on made-up weights, for whatever architecture, with none of the model's own at hand."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from mycel.node.speed import measure_block_s
from tests.tiny_models import make_tiny_model


@pytest.mark.parametrize("family", ["llama", "gemma2", "mixtral", "gpt2"])
def test_a_block_is_timed_without_its_weights(tmp_path: Path, family: str) -> None:
    directory = tmp_path / family
    make_tiny_model(family, directory)
    for weights in directory.glob("*.safetensors"):
        # The headers stay (a joiner makes them from the manifest); every weight is a hole.
        size_bytes, header_bytes = weights.stat().st_size, 8 + int.from_bytes(weights.read_bytes()[:8], "little")
        head = weights.read_bytes()[:header_bytes]
        with weights.open("wb") as file:
            file.write(head)
            file.truncate(size_bytes)
    assert 0.0 < measure_block_s(directory, torch.float32) < 10.0
