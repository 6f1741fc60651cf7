"""The models that loopback swarms serve, and the process that their nodes are forked from."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.loopback.node_process import fork_server
from tests.tiny_models import make_tiny_model, make_tiny_tokenizer


@pytest.fixture(scope="session")
def forking() -> Iterator[None]:
    with fork_server():
        yield


@pytest.fixture(scope="session")
def llama(forking: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four blocks, a context of 4096 tokens and no end-of-text token: it talks for as long as it is let."""
    directory = tmp_path_factory.mktemp("llama")
    make_tiny_model("llama", directory, 4, max_position_embeddings=4096, eos_token_id=None)
    return make_tiny_tokenizer(directory)
