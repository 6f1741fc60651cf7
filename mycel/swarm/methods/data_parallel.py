"""Synchronous data parallel: the mean gradient, and one optimizer that every peer runs on it.

Ring: algorithms.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from mycel.swarm.codecs.layout import Layout
from mycel.swarm.methods.method import Sends
from mycel.swarm.methods.options import DataParallelOptions
from mycel.swarm.methods.outer import SharedState, adamw_step, check_result, momentum_step, plain_step

__all__ = ["DataParallel", "decay"]


class DataParallel:
    """theta <- AdamW or SGD with momentum of the aggregate; decoupled weight decay, for matrices alone."""

    name = "data-parallel"
    sends: Sends = "gradient"
    n_scopes = 1

    def __init__(
        self, options: DataParallelOptions, layout: Layout, theta_P: Tensor, schedule: Callable[[int], float]
    ) -> None:
        self.inner_steps, self.delay = options.inner_steps, options.delay
        self.codec, self.result_codec = options.codec, options.result_codec
        self._options, self._layout, self._schedule = options, layout, schedule
        self.state = SharedState(theta_P, 2 if options.optimizer == "adamw" else int(options.momentum > 0.0))

    def scope(self, number: int) -> tuple[slice, ...]:
        return (slice(0, self.state.n_elements),)

    def layout(self, number: int) -> Layout:
        return self._layout

    def contribution(self, number: int, local_P: Tensor) -> Tensor:
        return local_P.detach().clone()

    def apply(self, number: int, result_S: Tensor, contributors: int = 1) -> None:
        check_result(result_S, self.state.n_elements)
        options, scope = self._options, self.scope(number)
        rate = options.rate * self._schedule(self.state.version)
        decay(self.state, self._layout, rate * options.weight_decay)
        if options.optimizer == "adamw":
            adamw_step(self.state, scope, result_S, rate, options.betas, options.epsilon)
        elif options.momentum > 0.0:
            momentum_step(self.state, scope, result_S, rate, options.momentum)
        else:
            plain_step(self.state, scope, result_S, rate)
        self.state.version += 1

    def merge(self, number: int, local_P: Tensor) -> Tensor:
        return self.restart()

    def restart(self) -> Tensor:
        return self.state.theta_P.clone()


def decay(state: SharedState, layout: Layout, amount: float) -> None:
    """theta <- (1 - amount) * theta, for tensors of two dimensions and more: norms and biases are no weights."""
    if amount > 0.0:
        for part, shape in layout.pieces():
            if len(shape) >= 2:
                state.theta_P[part].mul_(1.0 - amount)
