"""What liars send who know all honest rows of the round and the rule itself, and act as one.

mu and sigma are mean and standard deviation of each coordinate over the honest rows; n peers, f of them liars.

Ring: algorithms.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from statistics import NormalDist

import torch
from torch import Tensor

from mycel.protocols.errors import ConfigError
from mycel.security.attacks.alone import LONERS, play
from mycel.security.attacks.scene import DELAY_ROUNDS, Attack, Scene

# What the searching attacks try as their factor, least first.
IPM_FACTORS = (0.1, 0.25, 0.5, 0.75, 1.0, 1.5, 2.5, 5.0, 10.0, 100.0)
ALIE_FACTORS = (0.25, 0.5, 1.0, 1.5, 2.0, 3.0, 5.0, 10.0, -0.5, -1.5, -3.0)
# How long a traitor earns trust before it spends it.
TURN_ROUNDS = 20
# Steps of bisection: to a thousandth of the widest that is tried.
_BISECTIONS = 12


def flip_labels(labels: Tensor, n_classes: int) -> Tensor:
    """Label c becomes `n_classes - 1 - c`: honest code on wrong data, so that the row looks like any other.

    Source: Fung et al. 2020 (FoolsGold); as 9 - y in Karimireddy et al. 2022.
    """
    return n_classes - 1 - labels


def label_flip(scene: Scene) -> Tensor:
    """The rows that honest code made of flipped labels (`flip_labels`); the caller has made them so."""
    return scene.own.clone()


def delayed(scene: Scene) -> Tensor:
    """The honest mean of DELAY_ROUNDS rounds ago, from all liars: valid once, stale now (BTARD, section 4)."""
    means = scene.memory.means
    return scene.all_send(means[-DELAY_ROUNDS] if len(means) >= DELAY_ROUNDS else scene.mean)


def copies(scene: Scene) -> Tensor:
    """All send the first honest row: its owner's weight is F + 1 peers' (copy-cat; robust.md D9)."""
    return scene.all_send(scene.honest[0])


def mimic(scene: Scene) -> Tensor:
    """All copy the honest peer that is furthest along the direction of greatest variance.

    `i* = argmax_i |<x_i - mu, v>|`, v the top right singular vector of the centred rows, learned by one power step a
    round (Karimireddy, He and Jaggi 2022, section 3.2). No row of it is false; what it takes is the others' share.
    """
    centred_NP = scene.honest - scene.mean
    v_P = scene.memory.directions.get("mimic")
    if v_P is None:
        v_P = torch.randn(centred_NP.shape[1], generator=scene.rng)
    scores_N = centred_NP @ v_P
    step_P = centred_NP.T @ scores_N
    scene.memory.directions["mimic"] = step_P / step_P.norm().clamp_min(1e-30)
    return scene.all_send(scene.honest[int(scores_N.abs().argmax())])


def alie(scene: Scene) -> Tensor:
    """A little is enough: `mu - z sigma`, so near that enough honest rows lie further out.

    `z = Phi^-1((n - f - s) / (n - f))`, `s = floor(n / 2 + 1) - f` (Baruch et al. 2019, algorithm 3).
    """
    n, f = len(scene.honest) + scene.n_liars, scene.n_liars
    supporters = n // 2 + 1 - f
    share = (n - f - supporters) / (n - f)
    z = NormalDist().inv_cdf(min(max(share, 0.01), 0.99))
    return scene.all_send(scene.mean - z * scene.spread)


def opt_alie(scene: Scene) -> Tensor:
    """`mu - z sigma` with the z, of either sign, that takes the rule in force furthest from mu.

    Source: Shejwalkar and Houmansadr 2021, algorithm 1; ByzFL's Optimal ALIE.
    """
    mean_P, spread_P = scene.mean, scene.spread
    return _furthest(scene, (scene.all_send(mean_P - z * spread_P) for z in ALIE_FACTORS))


def opt_ipm(scene: Scene) -> Tensor:
    """`-eps mu` with the eps that takes the rule in force furthest from mu (as `opt_alie`, along the mean)."""
    mean_P = scene.mean
    return _furthest(scene, (scene.all_send(-eps * mean_P) for eps in IPM_FACTORS))


def opt_shift(scene: Scene) -> Tensor:
    """`x_i - c mu`, each liar's own row shifted against the mean, with the c that leaves least of the descent.

    `c = argmin <aggregate, mu>`. The liars are as far apart as honest peers: a rule that knows liars by their
    likeness to each other, or by their norms, sees nothing. Ours; written against such rules.
    """
    mean_P = scene.mean
    shifted = (scene.own - c * mean_P for c in (0.0, *IPM_FACTORS))
    return min(shifted, key=lambda rows_FP: float(scene.aggregate(rows_FP) @ mean_P))


def min_max(scene: Scene) -> Tensor:
    """`mu - gamma sigma` with the largest gamma for which no honest row is further away than two honest ones are.

    `max_i |mu - gamma sigma - x_i| <= max_ij |x_i - x_j|` (Shejwalkar and Houmansadr 2021, section 4.2).
    """
    honest_NP = scene.honest
    bound = float(torch.cdist(honest_NP, honest_NP).max())
    return _widest(scene, lambda row_P: float((honest_NP - row_P).norm(dim=1).max()) <= bound)


def min_sum(scene: Scene) -> Tensor:
    """As `min_max` with sums: `sum_i |row - x_i|^2 <= max_i sum_j |x_i - x_j|^2` (the same paper and section)."""
    honest_NP = scene.honest
    bound = float(torch.cdist(honest_NP, honest_NP).square().sum(dim=1).max())
    return _widest(scene, lambda row_P: float((honest_NP - row_P).square().sum()) <= bound)


def _traitor() -> Attack:
    """Honest rows for TURN_ROUNDS rounds, then `opt_ipm` for as many, and so on. Ours; against rules with a memory."""
    rounds = 0

    def send(scene: Scene) -> Tensor:
        nonlocal rounds
        rounds += 1
        return opt_ipm(scene) if (rounds - 1) // TURN_ROUNDS % 2 else scene.own.clone()

    return send


def _ipm(eps: float) -> Attack:
    """Inner product manipulation, fall of empires: `-eps mu` (Xie, Koyejo and Gupta 2020, section 3)."""
    return lambda scene: scene.all_send(-eps * scene.mean)


def _lone(name: str) -> Attack:
    """Every liar plays `name` for itself; what it keeps from round to round lives as long as the attack."""
    plays: list[Callable[[Tensor, int], Tensor]] = []
    rounds = 0

    def send(scene: Scene) -> Tensor:
        nonlocal rounds
        while len(plays) < scene.n_liars:
            plays.append(play(name, seed=len(plays)))
        rows = [plays[i](row_P, rounds) for i, row_P in enumerate(scene.own)]
        rounds += 1
        return torch.stack(rows)

    return send


def _steady(send: Attack) -> Callable[[], Attack]:
    return lambda: send


def _loner(name: str) -> Callable[[], Attack]:
    return lambda: _lone(name)


_MAKERS: dict[str, Callable[[], Attack]] = {
    **{name: _loner(name) for name in LONERS},
    "delayed": _steady(delayed),
    "label-flip": _steady(label_flip),
    "ipm-0.1": _steady(_ipm(0.1)),
    "ipm-10": _steady(_ipm(10.0)),
    "alie": _steady(alie),
    "opt-alie": _steady(opt_alie),
    "opt-ipm": _steady(opt_ipm),
    "opt-shift": _steady(opt_shift),
    "traitor": _traitor,
    "min-max": _steady(min_max),
    "min-sum": _steady(min_sum),
    "mimic": _steady(mimic),
    "copies": _steady(copies),
}
# The names that `attack` knows, and those of them for which the liars' rows must come from flipped labels.
ATTACKS = tuple(_MAKERS)
DATA_ATTACKS = ("label-flip",)


def attack(name: str) -> Attack:
    """The attack called `name`, fresh for one run. ConfigError: there is no such name."""
    if name not in _MAKERS:
        raise ConfigError(f"no attack is called {name!r}; possible: {', '.join(ATTACKS)}")
    return _MAKERS[name]()


def _furthest(scene: Scene, tried: Iterable[Tensor]) -> Tensor:
    """Of several sets of rows that for which the aggregate is furthest from the honest mean; the first of equals."""
    mean_P = scene.mean
    return max(tried, key=lambda rows_FP: float((scene.aggregate(rows_FP) - mean_P).norm()))


def _widest(scene: Scene, hidden: Callable[[Tensor], bool]) -> Tensor:
    """`mu - gamma sigma` with the largest gamma, by bisection below 100, for which the row is still `hidden`."""
    mean_P, spread_P = scene.mean, scene.spread
    low, high = 0.0, 100.0
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        if hidden(mean_P - middle * spread_P):
            low = middle
        else:
            high = middle
    return scene.all_send(mean_P - low * spread_P)
