"""The estimate that an update is made of: how the loss changes along a direction, by two forward passes.

    g = (loss(theta + epsilon z) - loss(theta - epsilon z)) / (2 epsilon)

(Malladi et al., "Fine-tuning language models with just forward passes", NeurIPS 2023.) theta +- epsilon z is a point of
the lattice as well, so that everybody who measures again measures at the same float32 parameters; and what is put back
afterwards is made from the lattice, never by adding and subtracting floats.

Legend: B sequences, T tokens, P parameters.

Ring: algorithms.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from mycel.swarm.zeroth.defence import Measured
from mycel.swarm.zeroth.lattice import SCALE_BITS, Lattice, from_float, write_float

__all__ = ["Batch", "Tunable", "load", "measure", "start"]


class Batch(NamedTuple):
    """Tokens and what follows each of them, int64 [B, T]; -100 where that does not count."""

    tokens: Tensor
    targets: Tensor


class Tunable(Protocol):
    """What of a model is trained: the parameters [P] as one row, and the loss that they give.

    `flat` is float32 on the CPU, and the model computes with what stands there: writing into it is setting them.
    `shapes` says what stands where, in order.
    """

    @property
    def shapes(self) -> Sequence[tuple[str, tuple[int, ...]]]: ...

    @property
    def flat(self) -> Tensor: ...

    def loss(self, batch: Batch) -> float:
        """The mean over the batch's targets, without a gradient."""
        ...


def start(tunable: Tunable) -> Lattice:
    """The parameters as they are, on the lattice; those of the model become the lattice's. Raises ValueError."""
    theta_P = from_float(tunable.flat.numpy())
    load(tunable, theta_P)
    return theta_P


def load(tunable: Tunable, theta_P: Lattice) -> None:
    write_float(theta_P, tunable.flat.numpy())


def measure(tunable: Tunable, theta_P: Lattice, direction: bytes, spread: int, batch: Batch) -> Measured:
    """The slope at theta along the direction of this seed; `spread` is epsilon in units of 2^-30.

    Leaves the model at theta, bit for bit. The slope is NaN where a loss is not finite.
    """
    flat_P = tunable.flat.numpy()
    try:
        write_float(theta_P, flat_P, [(direction, -spread)])
        plus = _loss(tunable, batch)
        write_float(theta_P, flat_P, [(direction, spread)])
        minus = _loss(tunable, batch)
    finally:
        write_float(theta_P, flat_P)
    g = (plus - minus) / (2.0 * spread / 2.0**SCALE_BITS) if math.isfinite(plus) and math.isfinite(minus) else math.nan
    return Measured(g, plus, minus)


def _loss(tunable: Tunable, batch: Batch) -> float:
    with torch.no_grad():
        return tunable.loss(batch)
