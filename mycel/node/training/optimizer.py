"""A stage's parameters with their optimizer: steps, and the whole state as bytes.

The optimizers are torch's own, over pieces of the flat tensor instead of one tensor for each parameter. They work
element by element, so the pieces and the number of threads make no difference: equal states and gradients give equal
bits.

Legend: P parameters, M moments of the optimizer (AdamW 2, SGD with momentum 1), N = (1 + M) * P numbers of the state.

Ring: algorithms.
"""

from __future__ import annotations

import hashlib
import sys
from typing import Any

import torch
from torch import Tensor

from mycel.protocols.errors import ConfigError, RemoteProtocolError
from mycel.swarm.training.recipe import OptimizerPart, SchedulePart
from mycel.swarm.training.schedule import learning_rate

__all__ = ["FlatState"]

_ITEM_BYTES = 4
# Elements that the optimizer and the checks take at a time, so that temporary tensors stay small.
_PIECE = 1 << 20
# The moments by the names of torch's optimizers.
_MOMENTS = {"adamw": ("exp_avg", "exp_avg_sq"), "sgd": ("momentum_buffer",)}


class FlatState:
    """The `StateHolder` over `params_P` (float32), which stays the caller's tensor and is changed in place.

    Elements [0, decay_end) get the weight decay, the others none. The state's bytes are the parameters, then each
    moment, as little-endian float32.
    """

    def __init__(
        self, params_P: Tensor, decay_end: int, optimizer: OptimizerPart, schedule: SchedulePart, n_steps: int
    ) -> None:
        if params_P.dim() != 1 or params_P.dtype != torch.float32 or not params_P.is_contiguous():
            raise ValueError(f"flat float32 parameters are needed, not {list(params_P.shape)} {params_P.dtype}")
        if not 0 <= decay_end <= params_P.numel():
            raise ValueError(f"{decay_end} is no end within {params_P.numel()} parameters")
        if sys.byteorder != "little":
            raise ConfigError("training needs a little-endian processor")
        self._params_P = params_P.detach()
        self._recipe, self._schedule, self._n_steps = optimizer, schedule, n_steps
        self._version = 0
        names = _MOMENTS[optimizer.name] if optimizer.name == "adamw" or optimizer.momentum else ()
        self._moments_MP = torch.zeros(len(names), params_P.numel(), dtype=torch.float32, device=params_P.device)
        pieces = [*_pieces(0, decay_end), *_pieces(decay_end, params_P.numel())]
        # Pairs of a piece's range and its leaf.
        self._leaves = [((start, end), self._params_P[start:end]) for start, end in pieces]
        self._optimizer = self._make_optimizer(decay_end)
        self._give_moments(names)

    def _make_optimizer(self, decay_end: int) -> torch.optim.Optimizer:
        recipe = self._recipe
        groups: list[dict[str, Any]] = [
            {"params": [leaf for (start, _), leaf in self._leaves if start < decay_end]},
            {"params": [leaf for (start, _), leaf in self._leaves if start >= decay_end], "weight_decay": 0.0},
        ]
        groups = [group for group in groups if group["params"]]
        rate, decay = recipe.learning_rate, recipe.weight_decay
        if recipe.name == "adamw":
            return torch.optim.AdamW(
                groups, rate, betas=recipe.betas, eps=recipe.epsilon, weight_decay=decay, foreach=False, fused=False
            )
        return torch.optim.SGD(groups, rate, momentum=recipe.momentum, weight_decay=decay, foreach=False, fused=False)

    def _give_moments(self, names: tuple[str, ...]) -> None:
        """Views of our moments in place of those that torch would make at the first step; its steps change in place."""
        for (start, end), leaf in self._leaves:
            state: dict[str, Tensor] = {name: self._moments_MP[i, start:end] for i, name in enumerate(names)}
            if self._recipe.name == "adamw":
                state["step"] = torch.tensor(0.0)
            self._optimizer.state[leaf] = state

    @property
    def version(self) -> int:
        """Steps made."""
        return self._version

    @property
    def n_moments(self) -> int:
        """Moments that the optimizer keeps of each parameter."""
        return int(self._moments_MP.shape[0])

    @property
    def size_bytes(self) -> int:
        """Of `snapshot`."""
        return (1 + self.n_moments) * self._params_P.numel() * _ITEM_BYTES

    def apply(self, sum_P: Tensor, scale: float) -> None:
        """One step with the gradient `sum_P * scale`; `sum_P` stays as it is."""
        if sum_P.shape != self._params_P.shape or sum_P.dtype != torch.float32:
            raise ValueError(f"a gradient of {list(self._params_P.shape)} float32 is needed")
        rate = learning_rate(self._schedule, self._recipe.learning_rate, self._version, self._n_steps)
        for group in self._optimizer.param_groups:
            group["lr"] = rate
        for (start, end), leaf in self._leaves:
            leaf.grad = sum_P[start:end] * scale
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        self._version += 1

    def begin_at(self, version: int) -> None:
        """The next step has the learning rate of the one after `version`; parameters and moments stay."""
        self._version = version

    def params_digest(self) -> bytes:
        """SHA-256 of the parameters' bytes."""
        return hashlib.sha256(_bytes_of(self._params_P)).digest()

    def snapshot(self) -> memoryview:
        """A copy of parameters and moments as bytes."""
        return _bytes_of(torch.cat((self._params_P, self._moments_MP.view(-1))))

    def load(self, data: memoryview, version: int) -> None:
        """Become the state of which `data` is the snapshot, after `version` steps; training goes on bit for bit.

        Raises RemoteProtocolError, and changes nothing, for another size or for numbers that no training gives.
        """
        if data.nbytes != self.size_bytes:
            raise RemoteProtocolError(f"a state of {data.nbytes} bytes, where {self.size_bytes} are needed")
        data = data.cast("B")
        targets = [self._params_P, *self._moments_MP]
        for index in range(len(targets)):
            for start, end in _pieces(0, self._params_P.numel()):
                self._check_piece(index, self._read(data, index, start, end))
        for index, target_P in enumerate(targets):
            for start, end in _pieces(0, self._params_P.numel()):
                target_P[start:end].copy_(self._read(data, index, start, end))
        for _, leaf in self._leaves:
            if "step" in self._optimizer.state[leaf]:
                self._optimizer.state[leaf]["step"].fill_(version)
        self._version = version

    def _check_piece(self, index: int, piece: Tensor) -> None:
        if not bool(piece.isfinite().all()):
            raise RemoteProtocolError("a state with numbers that are not finite")
        # AdamW takes its root.
        if self._recipe.name == "adamw" and index == 2 and bool((piece < 0).any()):
            raise RemoteProtocolError("a state with negative second moments")

    def _read(self, data: memoryview, index: int, start: int, end: int) -> Tensor:
        """Elements [start, end) of part `index` (0: the parameters); a copy, as `data` may be read-only."""
        offset = index * self._params_P.numel()
        piece = bytearray(data[(offset + start) * _ITEM_BYTES : (offset + end) * _ITEM_BYTES])
        return torch.frombuffer(piece, dtype=torch.float32)


def _pieces(start: int, end: int) -> list[tuple[int, int]]:
    return [(at, min(at + _PIECE, end)) for at in range(start, end, _PIECE)]


def _bytes_of(flat_P: Tensor) -> memoryview:
    return flat_P.cpu().view(torch.uint8).numpy().data
