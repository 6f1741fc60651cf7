"""DiLoCo: each peer trains alone for many steps; how far it came is a gradient for one optimizer that all share.

    contribution = theta - theta_local;  theta <- Nesterov(theta, mean of contributions);  every peer goes on from theta

Source: arXiv 2311.08105, algorithm 1. The peers' own optimizers (their Adam moments) stay with them.

Ring: algorithms.
"""

from __future__ import annotations

from torch import Tensor

from mycel.swarm.codecs.layout import Layout
from mycel.swarm.methods.method import Sends
from mycel.swarm.methods.options import DilocoOptions
from mycel.swarm.methods.outer import SharedState, check_result, nesterov_step

__all__ = ["Diloco"]


class Diloco:
    """See above; the shared state is the parameters and the outer momentum."""

    name = "diloco"
    sends: Sends = "parameters"
    n_scopes = 1
    delay = 0

    def __init__(self, options: DilocoOptions, layout: Layout, theta_P: Tensor) -> None:
        self.inner_steps = options.inner_steps
        self.codec, self.result_codec = options.codec, options.result_codec
        self._options, self._layout = options, layout
        self.state = SharedState(theta_P, 1)

    def scope(self, number: int) -> tuple[slice, ...]:
        return (slice(0, self.state.n_elements),)

    def layout(self, number: int) -> Layout:
        return self._layout

    def contribution(self, number: int, local_P: Tensor) -> Tensor:
        # Against the shared state and not where this phase began: after a round that came to nothing the peer went on
        # from its own parameters, and what it learned then is still part of this.
        return self.state.theta_P - local_P

    def apply(self, number: int, result_S: Tensor, contributors: int = 1) -> None:
        check_result(result_S, self.state.n_elements)
        options = self._options
        nesterov_step(self.state, self.scope(number), result_S, options.rate, options.momentum, options.braking)
        self.state.version += 1

    def merge(self, number: int, local_P: Tensor) -> Tensor:
        return self.restart()

    def restart(self) -> Tensor:
        return self.state.theta_P.clone()
