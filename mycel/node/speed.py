"""How fast this machine computes a block of a model, before it has any of its weights.

Where a machine helps most depends on its speed, and it has to choose its blocks before it fetches them: so it makes up
the weights of one block. How long dense arithmetic takes does not depend on the numbers.

Ring: shell (reads a model directory, and the clock).
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from mycel.node.fast_linear import use_fast_linear
from mycel.node.model_info import inspect_model, load_config
from mycel.node.served_span import ServedSpan
from mycel.node.span import Span
from mycel.node.structure import cut, empty_model
from mycel.node.weights_load import release_free_memory

_STD = 0.02


def measure_block_s(directory: Path, dtype: torch.dtype) -> float:
    """Seconds of a decode step through one block in the middle of the model. Runs on the compute thread."""
    info, config = inspect_model(directory), load_config(directory)
    block = info.n_blocks // 2
    model = empty_model(config, dtype)
    cut(model, block, block + 1)
    with torch.no_grad():
        for module in model.modules():
            for name, parameter in list(module.named_parameters(recurse=False)):
                if parameter.is_meta:
                    made_up = torch.empty(parameter.shape, dtype=parameter.dtype).normal_(std=_STD)
                    setattr(module, name, nn.Parameter(made_up, requires_grad=False))
    use_fast_linear(model)
    served = ServedSpan(Span(info, block, block + 1, model, config), dtype)
    served.measure()
    measured_s = served.block_time_s
    del served, model
    release_free_memory()
    return measured_s
