"""What a served span learns from the steps that it computes."""

from __future__ import annotations

from typing import cast

import pytest
import torch

from mycel.node.served_span import PREFILL_TOKENS, ServedSpan
from mycel.node.span import Span


def test_decoding_and_prefill_are_learnt_from_their_own_steps() -> None:
    served = ServedSpan(cast(Span, None), torch.float32, block_time_s=0.01)
    assert served.prefill_cost_s(0, 4, 100) == pytest.approx(4.0), "until the first long step, as if one by one"
    served.observe(0, 4, PREFILL_TOKENS - 1, 100.0)  # neither the one nor the other
    served.observe(0, 4, 256, 4 * 256 * 0.001)
    assert served.prefill_block_s == pytest.approx(0.001)
    assert served.prefill_cost_s(1, 3, 100) == pytest.approx(0.2)
    for _ in range(200):
        served.observe(0, 2, 64, 2 * 64 * 0.002)
        served.observe(0, 2, 1, 2 * 0.03)
    assert served.prefill_block_s == pytest.approx(0.002)
    assert served.block_time_s == pytest.approx(0.03)
