"""The reference task in short: every byte encoded, counted and decoded, and bounds derived for so few steps.

`python -m benchmarks.rounds` measures the whole table.
"""

from __future__ import annotations

import pytest
import torch

from benchmarks.toy_text import Outcome, Setting, alone, float32_data_parallel_bytes, run

STEPS = 80
DILOCO = {"name": "diloco", "inner_steps": 10}


def outcome(**fields: object) -> Outcome:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        setting = Setting(
            **{"steps": STEPS, "warm_steps": 100, "result_codec": "float32", "codec": "float32", **fields}
        )
        return alone(setting) if fields.get("n_peers") == 1 else run(setting)
    finally:
        torch.set_num_threads(before)


@pytest.mark.slow
def test_what_few_bytes_cost_and_what_peers_gain() -> None:
    by_itself = outcome(method=DILOCO, n_peers=1)
    diloco = outcome(method=DILOCO)
    coded = outcome(method=DILOCO, codec="e3m0+zip+ef", result_codec="int4+zip")
    shown = [round(one.loss, 4) for one in (by_itself, diloco, coded)]
    assert len(diloco.digests) == len(coded.digests) == 1
    assert diloco.total_bytes == float32_data_parallel_bytes(STEPS) / 10
    assert coded.total_bytes <= float32_data_parallel_bytes(STEPS) / 80
    assert diloco.loss <= by_itself.loss - 0.02, shown
    assert coded.loss <= 1.015 * diloco.loss, shown


@pytest.mark.slow
def test_the_same_numbers_train_the_same_parameters() -> None:
    setting = {"method": DILOCO, "codec": "int2:stochastic+ef", "result_codec": "int4", "dropped": 0.5, "steps": 20}
    first, second, other = outcome(**setting), outcome(**setting), outcome(**{**setting, "dropped": 0.0})
    assert first.digests == second.digests
    assert first.digests != other.digests
