"""What one liar plays that knows its own row and what it sent and saw before, not the rows of this round.

Each is a function of (row, round) that returns what is sent in the row's place. Its chance comes from a seed.

Ring: algorithms.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from mycel.protocols.errors import ConfigError
from mycel.security.attacks.scene import DELAY_ROUNDS

# (own row [P], round) -> the row that is sent.
Play = Callable[[Tensor, int], Tensor]


def sign_flip(own_P: Tensor, _round: int) -> Tensor:
    """`-x`: climbs the loss instead of descending it (Karimireddy et al. 2021, "bit-flipping")."""
    return -own_P


def times_1000(own_P: Tensor, _round: int) -> Tensor:
    """`-1000 x`: one row outweighs all others in a mean (BTARD, section 4)."""
    return -1000.0 * own_P


def zero(own_P: Tensor, _round: int) -> Tensor:
    """`0`: free riding; it slows down, and moves a median towards nought."""
    return torch.zeros_like(own_P)


def not_a_number(own_P: Tensor, _round: int) -> Tensor:
    """One NaN in an honest row: enough to poison every sum that it goes into."""
    row_P = own_P.clone()
    row_P[len(row_P) // 2] = math.nan
    return row_P


def infinite(own_P: Tensor, _round: int) -> Tensor:
    """+Inf and -Inf by turns: differences of such rows are NaN."""
    row_P = torch.full_like(own_P, math.inf)
    row_P[1::2] = -math.inf
    return row_P


def huge(own_P: Tensor, _round: int) -> Tensor:
    """1e30 with the signs of `-x`: finite, yet its square is beyond float32, and it drowns any sum it stands in."""
    return torch.where(own_P > 0, -1e30, 1e30).to(own_P.dtype)


def _gaussian(generator: torch.Generator) -> Play:
    """`N(0, s^2)`, s = 200 times the root mean square of the own row (Blanchard et al. 2017, section 5)."""

    def send(own_P: Tensor, _round: int) -> Tensor:
        return torch.randn(own_P.shape, generator=generator) * (200.0 * _rms(own_P))

    return send


def _constant(generator: torch.Generator) -> Play:
    """`1000 |x| u` with one unit direction u all along (BTARD, section 4, "random direction")."""
    direction: list[Tensor] = []

    def send(own_P: Tensor, _round: int) -> Tensor:
        if not direction:
            drawn_P = torch.randn(own_P.shape, generator=generator)
            direction.append(drawn_P / drawn_P.norm())
        return direction[0] * (1000.0 * float(own_P.norm()))

    return send


def _delayed(_generator: torch.Generator) -> Play:
    """`x` of DELAY_ROUNDS rounds ago, at first that of the first round (BTARD, section 4, "delayed gradient")."""
    sent: list[Tensor] = []

    def send(own_P: Tensor, _round: int) -> Tensor:
        sent.append(own_P.clone())
        del sent[: -DELAY_ROUNDS - 1]
        return sent[0].clone()

    return send


def _replay(_generator: torch.Generator) -> Play:
    """The row of the first round, again and again: what was signed once and costs no work."""
    first: list[Tensor] = []

    def send(own_P: Tensor, _round: int) -> Tensor:
        if not first:
            first.append(own_P.clone())
        return first[0].clone()

    return send


def _steady(send: Play) -> Callable[[torch.Generator], Play]:
    return lambda _generator: send


_PLAYS: dict[str, Callable[[torch.Generator], Play]] = {
    "sign-flip": _steady(sign_flip),
    "x1000": _steady(times_1000),
    "gaussian": _gaussian,
    "zero": _steady(zero),
    "constant": _constant,
    "delayed": _delayed,
    "replay": _replay,
    "nan": _steady(not_a_number),
    "inf": _steady(infinite),
    "huge": _steady(huge),
}
# The names that `play` knows.
LONERS = tuple(_PLAYS)


def play(name: str, seed: int = 0) -> Play:
    """What a liar called `name` sends in place of its row, round after round. ConfigError: there is no such name.

    >>> play("sign-flip")(torch.tensor([1.0, -2.0]), 0)
    tensor([-1.,  2.])
    """
    if name not in _PLAYS:
        raise ConfigError(f"no liar plays {name!r}; possible: {', '.join(LONERS)}")
    return _PLAYS[name](torch.Generator().manual_seed(seed))


def _rms(own_P: Tensor) -> float:
    return float(own_P.norm()) / math.sqrt(max(1, own_P.numel()))
