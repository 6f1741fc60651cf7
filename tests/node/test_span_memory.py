"""What a process holds for a span: its weights and hardly more, as the system sees it.

Decoding steps only: the activations and kernel buffers of a long prefill (7 to 14 MB for 32 tokens of these models) are
the step's memory and not the span's.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from mycel.node.model_info import inspect_model, span_bytes
from tests.tiny_models import make_tiny_model

# Measures this process's resident memory after the imports, then after loading and running a span.
_PROBE = """
import json, sys
from pathlib import Path
import psutil, torch
torch.set_num_threads(1)
from mycel.node.span import Span
from mycel.node.weights_load import release_free_memory

def run(directory, start, end):
    span = Span.load(directory, start, end)
    for tensor in span.tensors:
        tensor.sum()  # reads every page: a step reads only some rows of an embedding and some of the experts
    cache = span.new_cache()
    for token in range(4):
        step = torch.tensor([token]) if span.is_first else torch.ones(1, span.info.hidden_size)
        output = span.forward(step, cache)
        output = span.logits(output) if span.is_last else output
    return span, cache, output

small, directory, start, end = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
run(small, 0, 1)  # imports the model's module and the libraries of the first step: the bare process
release_free_memory()
before = psutil.Process().memory_info().rss
kept = run(directory, start, end)
print(json.dumps({"held": psutil.Process().memory_info().rss - before, "weights": kept[0].nbytes}))
"""

_SIZES: dict[str, Any] = {
    "hidden_size": 512,
    "intermediate_size": 1376,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
}


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Models of some 100 MB, so that what a process holds besides weights does not decide."""
    directory = tmp_path_factory.mktemp("large")
    return {
        "llama": make_tiny_model("llama", directory / "llama", n_blocks=10, vocab_size=8000, **_SIZES),
        "mixtral": make_tiny_model("mixtral", directory / "mixtral", n_blocks=3, vocab_size=2000, **_SIZES),
    }


@pytest.mark.slow
@pytest.mark.parametrize(
    ("architecture", "start", "end"), [("llama", 0, 10), ("llama", 0, 5), ("llama", 5, 10), ("mixtral", 0, 2)]
)
def test_a_span_holds_at_most_a_tenth_more_than_its_weights(
    architecture: str, start: int, end: int, large: dict[str, Path], tmp_path: Path
) -> None:
    directory = large[architecture]
    # As wide as the large one, so that it brings in the same kernels.
    small = make_tiny_model(architecture, tmp_path / "small", n_blocks=1, **_SIZES)
    command = [sys.executable, "-c", _PROBE, str(small), str(directory), str(start), str(end)]
    output = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout
    held = json.loads(output.splitlines()[-1])
    expected_bytes = span_bytes(inspect_model(directory), start, end)
    assert expected_bytes > 60e6
    assert held["weights"] == pytest.approx(expected_bytes, rel=0.01)
    # Not far less either: the measure would miss the weights.
    assert 0.9 * expected_bytes < held["held"] < 1.1 * expected_bytes, held["held"] / expected_bytes
