"""What was typed counts before what the model recommends, and a peer's file cannot ask for nonsense."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mycel.cli.sampling_options import recommended, sampling_params
from mycel.node.demo import demo_model_dir
from mycel.protocols.messages import SamplingParams


def directory_with(tmp_path: Path, config: object) -> Path:
    (tmp_path / "generation_config.json").write_text(json.dumps(config))
    return tmp_path


def test_greedy_without_a_word(tmp_path: Path) -> None:
    assert sampling_params({"seed": 3}, tmp_path) == SamplingParams(seed=3)


def test_the_model_recommends(tmp_path: Path) -> None:
    config = {"do_sample": True, "temperature": 0.7, "top_p": 0.9, "repetition_penalty": 1.1, "max_new_tokens": 120}
    assert sampling_params({"seed": 3}, directory_with(tmp_path, config)) == SamplingParams(
        temperature=0.7, top_p=0.9, repetition_penalty=1.1, seed=3
    )


def test_what_is_typed_counts_more(tmp_path: Path) -> None:
    directory = directory_with(tmp_path, {"do_sample": True, "temperature": 0.7, "top_p": 0.9})
    params = sampling_params({"temperature": 0.0, "top_k": 5, "top_p": None, "seed": 0}, directory)
    assert params == SamplingParams(temperature=0.0, top_k=5, top_p=0.9, seed=0)


def test_without_do_sample_a_model_is_greedy(tmp_path: Path) -> None:
    directory = directory_with(tmp_path, {"temperature": 0.7, "top_p": 0.9, "repetition_penalty": 1.2})
    assert recommended(directory) == {"repetition_penalty": 1.2}


def test_do_sample_alone_means_temperature_one(tmp_path: Path) -> None:
    assert recommended(directory_with(tmp_path, {"do_sample": True})) == {"temperature": 1.0}


@pytest.mark.parametrize(
    "config",
    [
        [],
        "text",
        {"do_sample": True, "temperature": -1, "top_p": 0, "top_k": 10**12, "repetition_penalty": 0},
        {"do_sample": True, "temperature": "hot", "top_p": [], "top_k": 1.5, "repetition_penalty": {}},
    ],
)
def test_nonsense_is_ignored(tmp_path: Path, config: object) -> None:
    assert recommended(directory_with(tmp_path, config)) == {}


def test_a_damaged_file_is_ignored(tmp_path: Path) -> None:
    (tmp_path / "generation_config.json").write_text("[" * 100_000)
    assert recommended(tmp_path) == {}


def test_each_run_draws_its_own_seed(tmp_path: Path) -> None:
    assert len({sampling_params({}, tmp_path).seed for _ in range(8)}) > 1


def test_the_models_own_recommendation_is_read() -> None:
    assert recommended(demo_model_dir())["repetition_penalty"] > 1
