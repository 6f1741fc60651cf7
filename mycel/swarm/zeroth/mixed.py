"""Weak peers beside strong ones: scalars and pseudo-gradients in one round, from one committed state.

The state is a method's, in float32 (swarm/methods/outer.py). After the outer step of the vectors come the scalars,

    theta <- theta - (step / 2^30) z        for each update, in the order of the offers' authors and of their samples

each a single float32 subtraction for every element: equal states and equal offers give equal bits on every machine.
The steps are those of a rule: averaged, bounded by the median. (In a run of scalars alone the lattice makes the order
irrelevant, too; here the offers of a certificate have one.)

Legend: P parameters.

Ring: algorithms.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from mycel.protocols.rounds import Offer
from mycel.security.signatures import public_key_of
from mycel.swarm.zeroth.course import said_by
from mycel.swarm.zeroth.defence import Measured
from mycel.swarm.zeroth.directions import BLOCK, signs
from mycel.swarm.zeroth.lattice import SCALE_BITS, Update
from mycel.swarm.zeroth.rule import Rule
from mycel.swarm.zeroth.seeds import seed_of

__all__ = ["apply_scalars", "measure_float", "scalar_updates"]

_PIECE = 2048 * BLOCK


def scalar_updates(rule: Rule, run: bytes, beacon: bytes, state: bytes, offers: Sequence[Offer]) -> list[Update]:
    """What the scalars of a round's offers come to; `state` is the digest that they have to be made from.

    Late ones count for nothing, and so does one whose scalars are not as they have to be.
    """
    codes, seeds = bytearray(), []
    for offer in sorted(offers, key=lambda offer: offer.peer):
        key, said = public_key_of(offer.peer), said_by(offer, rule.samples)
        if offer.bodies or key is None or said is None or offer.state != state or offer.staleness:
            continue
        codes += said.codes
        seeds += [seed_of(run, beacon, key, sample) for sample in range(len(said.codes))]
    return list(zip(seeds, rule.steps(codes), strict=True))


def apply_scalars(theta_P: Tensor, updates: Sequence[Update]) -> None:
    """Moves the parameters, in place, by these updates in their order."""
    if theta_P.dtype != torch.float32 or theta_P.dim() != 1:
        raise ValueError(f"parameters are one row of float32, not {theta_P.dtype} {list(theta_P.shape)}")
    for start in range(0, theta_P.numel(), _PIECE):
        part_P = theta_P[start : start + _PIECE]
        for seed, step in updates:
            part_P.sub_(_moved(seed, step, start, start + part_P.numel()))


def measure_float(theta_P: Tensor, direction: bytes, rule: Rule, loss: Callable[[Tensor], float]) -> Measured:
    """The slope at theta along the direction of this seed, by two losses at float32 points; theta stays what it is."""
    away_P = _moved(direction, rule.spread, 0, theta_P.numel())
    plus, minus = loss(theta_P + away_P), loss(theta_P - away_P)
    g = (plus - minus) / (2.0 * rule.spread / 2.0**SCALE_BITS) if math.isfinite(plus + minus) else math.nan
    return Measured(g, plus, minus)


def _moved(seed: bytes, step: int, start: int, end: int) -> Tensor:
    """step z in float32: the step is rounded once, and +-1 rounds nothing."""
    return torch.from_numpy(signs(seed, start, end)).to(torch.float32).mul_(step / 2.0**SCALE_BITS)
