"""A linear layer that takes oneDNN's float32 kernel where torch's own choice of BLAS is slow.

Decoding is bound by these products. torch's x86 wheels call MKL, which keeps to slow kernels on processors that are not
Intel's: measured on an AMD EPYC with AVX-512, one thread, oneDNN of the same wheel takes 0.40 to 0.75 of its time for
large weights, down to one token. The choice goes by the processor's maker alone, so a machine always computes the same.

Ring: shell (asks which processor this is).
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

__all__ = ["FastLinear", "mkl_is_slow", "use_fast_linear"]

# A call into oneDNN costs about 10 us more: too much for a small product.
_MIN_MULTIPLICATIONS = 400_000


class FastLinear(nn.Linear):
    """nn.Linear whose forward without gradients runs in oneDNN. Same result up to the order of summation."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - torch calls it by this name
        weight = self.weight
        if torch.is_grad_enabled() or input.numel() * weight.shape[0] < _MIN_MULTIPLICATIONS:
            return functional.linear(input, weight, self.bias)
        output: Tensor = torch.ops.mkldnn._linear_pointwise.default(input, weight, self.bias, "none", [], "")
        return output


def use_fast_linear(model: nn.Module) -> None:
    """Turns every plain float32 linear layer of `model` into a FastLinear, in place, where that is faster."""
    if not mkl_is_slow():
        return
    for module in model.modules():
        # Exactly nn.Linear: a subclass may compute something else.
        if type(module) is nn.Linear and module.weight.dtype == torch.float32 and module.weight.device.type == "cpu":
            module.__class__ = FastLinear


@cache
def mkl_is_slow() -> bool:
    """Whether torch would call MKL on an AMD processor, and oneDNN is there instead."""
    has_onednn: bool = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    has_mkl: bool = torch.backends.mkl.is_available()  # type: ignore[no-untyped-call]
    if not has_mkl or not has_onednn or not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return False
    # Linux alone says who made the processor without a clock or a process; elsewhere torch's own choice stands.
    path = Path("/proc/cpuinfo")
    return path.is_file() and "AuthenticAMD" in path.read_text(encoding="utf-8", errors="replace")[:4096]
