"""Eager updates: DiLoCo in which a round travels while the next phase of training goes on.

At the end of phase t the result of round t - 1 has come in, that of round t has not. The shared state takes what has
come. The peer goes on from the shared state moved by what it knows already of round t, its own part:

    start = theta - offset,  offset = Nesterov's answer to the sequence d_t = w own_t - w own_{t-1}

which is what the paper's rule, own_t / n plus the others' of round t - 1, comes to for w = 1 / n, as Nesterov's step is
linear in its gradients. So what belongs to all is kept apart from what belongs to one peer, and stays the same bits
everywhere.

With w = 1 / n the part 1 - 1 / n of every result comes a round late, and rate 0.7 with momentum 0.9 does not bear that:
where a phase trains a direction to its end, the error grows by 1.14 a round for 4 peers and 1.28 for many, while
DiLoCo's shrinks by 0.52; and rates that are stable learn little. But a peer's own contribution is an unbiased guess of
the mean where data are alike. So what it counts for is the option `own`: with 0.85 and rate 0.5 the error shrinks by
0.73 a round where it is common to the peers and 0.67 where it differs between them, whatever n is.

Source: arXiv 2502.12996, algorithm 2; `own` and its default are ours.

Ring: algorithms.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mycel.swarm.codecs.layout import Layout
from mycel.swarm.methods.method import Sends
from mycel.swarm.methods.options import EagerOptions
from mycel.swarm.methods.outer import SharedState, check_result, nesterov_step

__all__ = ["Eager"]


class Eager:
    """See above; the shared state is the parameters and the outer momentum."""

    name = "eager"
    sends: Sends = "parameters"
    n_scopes = 1

    def __init__(self, options: EagerOptions, layout: Layout, theta_P: Tensor) -> None:
        self.inner_steps = self.delay = options.inner_steps
        self.codec, self.result_codec = options.codec, options.result_codec
        self._options, self._layout = options, layout
        self.state = SharedState(theta_P, 1)
        self._start_P = self.state.theta_P.clone()
        zeros_4P = torch.zeros(4, self.state.n_elements)
        self._own_P: Tensor = zeros_4P[0]  # the last contribution
        self._counted_P: Tensor = zeros_4P[1]  # the own part that `_offset_P` answers to
        self._momentum_P: Tensor = zeros_4P[2]
        self._offset_P: Tensor = zeros_4P[3]

    def scope(self, number: int) -> tuple[slice, ...]:
        return (slice(0, self.state.n_elements),)

    def layout(self, number: int) -> Layout:
        return self._layout

    def contribution(self, number: int, local_P: Tensor) -> Tensor:
        self._own_P = self._start_P - local_P
        self._start_P = local_P.detach().clone()  # if no result comes in now, the next phase goes on from here
        return self._own_P.clone()

    def apply(self, number: int, result_S: Tensor, contributors: int = 1) -> None:
        check_result(result_S, self.state.n_elements)
        nesterov_step(self.state, self.scope(number), result_S, self._options.rate, self._options.momentum)
        self.state.version += 1

    def merge(self, number: int, local_P: Tensor) -> Tensor:
        """What was learned since the last contribution (nothing, if the result came in time) is kept."""
        momentum, rate = self._options.momentum, self._options.rate
        share_P = self._own_P * self._options.own
        step_P = share_P - self._counted_P
        self._counted_P = share_P
        self._momentum_P.mul_(momentum).add_(step_P)
        self._offset_P.add_(step_P.add_(self._momentum_P * momentum).mul_(rate))
        start_P = self.state.theta_P - self._offset_P
        merged_P = local_P.detach() - self._start_P + start_P
        self._start_P = start_P
        return merged_P

    def restart(self) -> Tensor:
        self._start_P = self.state.theta_P.clone()
        for own_P in (self._own_P, self._counted_P, self._momentum_P, self._offset_P):
            own_P.zero_()
        return self._start_P.clone()
