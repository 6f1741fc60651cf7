"""Linear layers whose forward and backward take oneDNN's float32 kernel where torch's own choice of BLAS is slow.

The same choice as `mycel.node.fast_linear` makes for inference, for all three products of training. Measured on an AMD
EPYC with AVX-512, one thread: the products take 0.2 to 0.75 of the time, forward and backward of a small Llama 0.6. The
choice goes by the processor's maker and the sizes alone, so a machine always computes the same bits.

Legend: R rows, I inputs, O outputs of a layer.

Ring: shell (asks which processor this is).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from mycel.node.fast_linear import FastLinear, mkl_is_slow

__all__ = ["TrainedConv1D", "TrainedLinear", "use_fast_products"]

# A call from Python and into oneDNN costs some 30 us more: too much for a small product.
_MIN_MULTIPLICATIONS = 1_000_000


class _Product(torch.autograd.Function):
    """x_RI W_OI^T + b_O, with x of any number of leading dimensions."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, weight_OI: Tensor, bias_O: Tensor | None) -> Tensor:  # noqa: A002
        ctx.save_for_backward(input, weight_OI)
        return _onednn(input, weight_OI, bias_O)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        input, weight_OI = ctx.saved_tensors  # noqa: A001
        grad = grads[0].contiguous()
        grad_RO, input_RI = grad.flatten(0, -2), input.flatten(0, -2)
        needs_input, needs_weight, needs_bias = ctx.needs_input_grad
        return (
            _onednn(grad, weight_OI.t()) if needs_input else None,
            _onednn(grad_RO.t(), input_RI.t()) if needs_weight else None,
            grad_RO.sum(dim=0) if needs_bias else None,
        )


def _onednn(input: Tensor, weight_OI: Tensor, bias_O: Tensor | None = None) -> Tensor:  # noqa: A002
    output: Tensor = torch.ops.mkldnn._linear_pointwise.default(input, weight_OI, bias_O, "none", [], "")
    return output


_product: Any = _Product.apply


def _is_large(input: Tensor, n_outputs: int) -> bool:  # noqa: A002
    return input.dim() >= 2 and input.numel() * n_outputs >= _MIN_MULTIPLICATIONS


class TrainedLinear(FastLinear):
    """nn.Linear; without gradients a FastLinear. Same result up to the order of summation."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - torch calls it by this name
        if not torch.is_grad_enabled() or not _is_large(input, self.weight.shape[0]):
            return super().forward(input)
        output: Tensor = _product(input, self.weight, self.bias)
        return output


class TrainedConv1D(Conv1D):
    """GPT-2's linear layer, whose weight lies the other way around."""

    def forward(self, x: Tensor) -> Tensor:
        plain: Any = super().forward
        fast = torch.is_grad_enabled() and _is_large(x, self.nf)
        output: Tensor = _product(x, self.weight.t(), self.bias) if fast else plain(x)
        return output


_FAST: dict[type[nn.Module], type[nn.Module]] = {nn.Linear: TrainedLinear, Conv1D: TrainedConv1D}


def use_fast_products(*models: nn.Module) -> None:
    """Turns every plain linear layer of float32 `models` into a fast one, in place, where that is faster."""
    if not mkl_is_slow():
        return
    for module in (module for model in models for module in model.modules()):
        # Exactly these classes: a subclass may compute something else.
        if type(module) in _FAST:
            module.__class__ = _FAST[type(module)]
