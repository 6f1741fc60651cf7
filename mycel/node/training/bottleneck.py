"""Learned bottlenecks at the borders of stages: 1/c of the hidden size crosses, and both ends are trained too.

    linear:  LayerNorm -> Linear(d, d/c) -> LayerNorm   | border |   Linear(d/c, d)
    maxout:  LayerNorm -> maximum of c neighbours -> LayerNorm   | border |   Linear(d/c, d)

Source: SWARM (Ryabinin et al., arXiv 2301.11913), the compression-aware architectures of its appendix. A model with
them is no Hugging Face model any more: its hidden states live only in this run.

Legend: B sequences, T tokens, D hidden, W = D / c.

Ring: algorithms.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor, nn

from mycel.protocols.errors import ConfigError
from mycel.swarm.training.recipe import BorderPart

__all__ = ["Narrow", "StageEnds", "border_width"]

_DOMAIN = b"mycel border v1"
PREFIX = "mycel.border."


def border_width(part: BorderPart, hidden_size: int) -> int:
    """How many numbers of a token cross a border. Raises ConfigError if the factor does not divide the hidden size."""
    if part.bottleneck == "none":
        return hidden_size
    if hidden_size % part.factor:
        raise ConfigError(f"a bottleneck of factor {part.factor} does not divide the hidden size {hidden_size}")
    return hidden_size // part.factor


class Narrow(nn.Module):
    """The sending side: hidden_BTD -> sent_BTW. Without `linear`, the maximum of each `D / W` neighbours."""

    def __init__(self, hidden_size: int, width: int, *, linear: bool) -> None:
        super().__init__()
        self.before = nn.LayerNorm(hidden_size)
        self.down = nn.Linear(hidden_size, width) if linear else None
        self.after = nn.LayerNorm(width)
        self._width = width

    def forward(self, hidden_BTD: Tensor) -> Tensor:
        normed_BTD = self.before(hidden_BTD)
        if self.down is not None:
            narrow_BTW = self.down(normed_BTD)
        else:
            # The index of the first maximum takes the gradient; amax would share it out among equals.
            narrow_BTW = normed_BTD.unflatten(-1, (self._width, -1)).max(dim=-1).values
        sent_BTW: Tensor = self.after(narrow_BTW)
        return sent_BTW


class StageEnds:
    """What stage `index` does at its borders: `up` widens what comes in, `down` narrows what goes out; else None."""

    def __init__(self, part: BorderPart, hidden_size: int, index: int, n_stages: int) -> None:
        width = border_width(part, hidden_size)
        self.up: nn.Linear | None = None
        self.down: Narrow | None = None
        self._index = index
        if part.bottleneck == "none":
            return
        if index > 0:
            self.up = nn.Linear(width, hidden_size)
        if index + 1 < n_stages:
            self.down = Narrow(hidden_size, width, linear=part.bottleneck == "linear")

    def named_parameters(self) -> dict[str, nn.Parameter]:
        """By names that tell the border: border 0 lies between stages 0 and 1."""
        named: dict[str, nn.Parameter] = {}
        if self.up is not None:
            named |= {f"{PREFIX}{self._index - 1}.up.{name}": p for name, p in self.up.named_parameters()}
        if self.down is not None:
            named |= {f"{PREFIX}{self._index}.{name}": p for name, p in self.down.named_parameters()}
        return named

    def initialise(self, seed: int) -> None:
        """Linear layers as torch does it, U(-1/sqrt(n_in), 1/sqrt(n_in)), biases 0; from the seed and each name alone.

        So every peer of a stage begins with the same numbers.
        """
        for name, parameter in self.named_parameters().items():
            if parameter.dim() < 2:
                continue  # norms begin as 1 and 0 of their own accord; biases follow below
            digest = hashlib.sha256(_DOMAIN + seed.to_bytes(8, "little") + name.encode()).digest()
            generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))
            bound = parameter.shape[1] ** -0.5
            with torch.no_grad():
                parameter.uniform_(-bound, bound, generator=generator)
        for linear in (self.up, self.down.down if self.down is not None else None):
            if linear is not None:
                nn.init.zeros_(linear.bias)
