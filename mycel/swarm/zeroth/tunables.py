"""What of a causal language model is trained: all parameters, low-rank additions to some matrices, or a soft prompt.

    LoRA     y = W x + (alpha / rank) B A x    for chosen matrices W; A of +-1/sqrt(in), B of zeros
    prompt   n vectors before the embeddings of every sequence; at first those of given tokens

(Hu et al., "LoRA", ICLR 2022; Lester et al., "The power of scale for parameter-efficient prompt tuning", EMNLP 2021.) A
is drawn from a seed by directions.py, so that every peer starts from the same one. They take any model of transformers
that answers with logits; W is an nn.Linear, or the Conv1D of GPT-2.

Legend: B sequences, T tokens, D hidden, R rank, P parameters.

Ring: algorithms.
"""

from __future__ import annotations

import fnmatch
import hashlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

from mycel.protocols.errors import ConfigError
from mycel.swarm.zeroth.directions import signs
from mycel.swarm.zeroth.scalars import Batch

__all__ = ["LORA_TARGETS", "FullParameters", "Lora", "SoftPrompt", "causal_loss"]

Shapes = Sequence[tuple[str, tuple[int, ...]]]

# The products of attention, as the model families call them.
LORA_TARGETS = ("*.q_proj", "*.v_proj", "*.qkv_proj", "*.query_key_value", "*.c_attn")
_INIT = b"mycel/zeroth/lora/1\0"


def causal_loss(model: nn.Module, batch: Batch) -> float:
    """The mean cross entropy of a transformers model, in float32. NaN without a target that counts."""
    return _cross_entropy(model(input_ids=batch.tokens, use_cache=False).logits, batch.targets)


def _cross_entropy(logits_BTV: Tensor, targets_BT: Tensor) -> float:
    return functional.cross_entropy(logits_BTV.flatten(0, 1).float(), targets_BT.flatten()).item()


def _one_row(parameters: Sequence[tuple[str, nn.Parameter]]) -> Tensor:
    """Moves the parameters into one row [P], of which they are views from now on. Raises ConfigError."""
    if not parameters:
        raise ConfigError("nothing of this model would be trained")
    for name, parameter in parameters:
        if parameter.dtype != torch.float32 or parameter.device.type != "cpu":
            raise ConfigError(f"{name} is {parameter.dtype} on {parameter.device}: updates of one byte need float32")
    flat_P = torch.cat([parameter.detach().reshape(-1) for _, parameter in parameters])
    at = 0
    for _, parameter in parameters:
        parameter.data = flat_P[at : at + parameter.numel()].view(parameter.shape)
        at += parameter.numel()
    return flat_P


def _shapes(parameters: Iterable[tuple[str, nn.Parameter]]) -> Shapes:
    return tuple((name, tuple(parameter.shape)) for name, parameter in parameters)


class FullParameters:
    """Every parameter of a module, shared ones once. Any `loss` of any module will do."""

    def __init__(self, model: nn.Module, loss: Callable[[nn.Module, Batch], float] = causal_loss) -> None:
        """Raises ConfigError for a model that is not float32 on the CPU."""
        parameters = list(model.named_parameters())
        self.flat = _one_row(parameters)
        self.shapes = _shapes(parameters)
        self._model = model.eval().requires_grad_(False)
        self._loss = loss

    def loss(self, batch: Batch) -> float:
        return self._loss(self._model, batch)


class _Adapter(nn.Module):
    """W and what is added to it. The additions take the place of W in its module, W becomes a part of them."""

    def __init__(self, base: nn.Module, n_in: int, n_out: int, rank: int, alpha: float, seed: bytes) -> None:
        super().__init__()
        self.base = base
        drawn = torch.from_numpy(signs(seed, 0, rank * n_in)).to(torch.float32)
        self.a_RD = nn.Parameter(drawn.view(rank, n_in) * n_in**-0.5)
        self.b_DR = nn.Parameter(torch.zeros(n_out, rank))
        self.scale = alpha / rank

    def forward(self, x: Tensor) -> Tensor:
        added = functional.linear(functional.linear(x.to(torch.float32), self.a_RD), self.b_DR)
        out: Tensor = self.base(x)
        return out + (self.scale * added).to(out.dtype)


class Lora:
    """Low-rank additions to the matrices whose full names match one of `targets` (shell patterns).

    Changes the model in place; what it had stays as it is, in whatever dtype.
    """

    def __init__(
        self, model: nn.Module, rank: int = 8, alpha: float = 16.0, targets: Sequence[str] = LORA_TARGETS
    ) -> None:
        """Raises ConfigError where no matrix matches."""
        if not 1 <= rank <= 1024:
            raise ConfigError(f"a rank is 1 to 1024, not {rank}")
        self._model = model.eval().requires_grad_(False)
        found = [
            (name, module)
            for name, module in model.named_modules()
            if _sizes(module) and any(fnmatch.fnmatchcase(name, target) for target in targets)
        ]
        if not found:
            raise ConfigError(f"no matrix of this model is called {' or '.join(targets)}")
        adapters = {name: _adapter(name, module, rank, alpha) for name, module in found}
        for name, adapter in adapters.items():
            parent, _, last = name.rpartition(".")
            setattr(model.get_submodule(parent), last, adapter)
        parameters = [
            (f"{name}.{part}", parameter)
            for name, adapter in adapters.items()
            for part, parameter in (("a", adapter.a_RD), ("b", adapter.b_DR))
        ]
        self.flat = _one_row(parameters)
        self.shapes = _shapes(parameters)

    def loss(self, batch: Batch) -> float:
        return causal_loss(self._model, batch)


def _sizes(module: nn.Module) -> tuple[int, int] | None:
    """The inputs and outputs of a module that is a matrix."""
    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features
    if isinstance(module, Conv1D):
        return module.nx, module.nf
    return None


def _adapter(name: str, module: nn.Module, rank: int, alpha: float) -> _Adapter:
    sizes = _sizes(module)
    assert sizes is not None, "only matrices are chosen"
    seed = hashlib.sha256(_INIT + name.encode()).digest()
    return _Adapter(module, *sizes, rank=rank, alpha=alpha, seed=seed)


class SoftPrompt:
    """Vectors [n, D] before every sequence; the model stays as it is."""

    def __init__(self, model: Any, tokens: Sequence[int]) -> None:
        """One vector for each of these tokens, which it is at first. Raises ConfigError for none, or an unknown one."""
        self._model = model.eval().requires_grad_(False)
        self._embed: nn.Embedding = model.get_input_embeddings()
        if not tokens or not all(0 <= token < self._embed.num_embeddings for token in tokens):
            raise ConfigError("a soft prompt begins as one token or more of the model's vocabulary")
        first = self._embed(torch.tensor(list(tokens))).detach().to(torch.float32)
        self._prompt = nn.Parameter(first.clone(), requires_grad=False)
        parameters = [("prompt", self._prompt)]
        self.flat = _one_row(parameters)
        self.shapes = _shapes(parameters)

    def loss(self, batch: Batch) -> float:
        embedded_BTD = self._embed(batch.tokens)
        prompt_BTD = self._prompt.to(embedded_BTD.dtype).expand(len(batch.tokens), -1, -1)
        inputs_BTD = torch.cat((prompt_BTD, embedded_BTD), dim=1)
        logits_BTV = self._model(inputs_embeds=inputs_BTD, use_cache=False).logits
        return _cross_entropy(logits_BTV[:, self._prompt.shape[0] :], batch.targets)
