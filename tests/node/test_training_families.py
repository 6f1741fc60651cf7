"""Every tested architecture trains in stages as it does unsplit, and is served and saved from the same memory."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers.utils import logging as transformers_logging

from tests.node.training_walk import assert_equals_unsplit, assert_serves_what_it_trains, load, same, tokens_of, walk
from tests.tiny_models import MORE_TINY_ARCHITECTURES, TINY_ARCHITECTURES, make_tiny_model

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", autouse=True)
def _quiet_transformers() -> Iterator[None]:
    torch.set_num_threads(1)
    transformers_logging.disable_progress_bar()
    yield
    transformers_logging.enable_progress_bar()


@pytest.mark.parametrize("architecture", [*TINY_ARCHITECTURES, *MORE_TINY_ARCHITECTURES])
def test_an_architecture_trains_in_stages_as_it_does_unsplit(architecture: str, tmp_path: Path) -> None:
    directory = make_tiny_model(architecture, tmp_path / "model")
    for n_stages in (1, 2, 3):
        assert_equals_unsplit(directory, n_stages)
    kept, recomputed = (walk(load(directory, 3, recompute=mode), tokens_of()) for mode in ("never", "always"))
    assert same(kept, recomputed)
    assert_serves_what_it_trains(directory, 2, tmp_path / "saved")
