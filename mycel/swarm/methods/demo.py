"""DeMo: peers share the fast components of their momentum alone, and step by the sign of what they have together.

    m <- decay * m + gradient;  q = the largest coefficients of the DCT of m's chunks;  m <- m - q   (each peer)
    theta <- theta - rate * sign(mean of all q)                                                    (everybody)

The first line is a codec with error feedback that fades, "dct:32+ef:0.999": what was not sent is the momentum. Source:
Decoupled Momentum Optimization, arXiv 2411.19870, algorithm 1.

Ring: algorithms.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from mycel.swarm.codecs.layout import Layout
from mycel.swarm.methods.data_parallel import decay
from mycel.swarm.methods.method import Sends
from mycel.swarm.methods.options import DemoOptions
from mycel.swarm.methods.outer import SharedState, check_result, plain_step

__all__ = ["Demo"]


class Demo:
    """See above; the shared state is the parameters alone."""

    name = "demo"
    sends: Sends = "gradient"
    n_scopes = 1

    def __init__(self, options: DemoOptions, layout: Layout, theta_P: Tensor, schedule: Callable[[int], float]) -> None:
        self.inner_steps, self.delay = options.inner_steps, options.delay
        self.codec, self.result_codec = options.codec, options.result_codec
        self._options, self._layout, self._schedule = options, layout, schedule
        self.state = SharedState(theta_P, 0)

    def scope(self, number: int) -> tuple[slice, ...]:
        return (slice(0, self.state.n_elements),)

    def layout(self, number: int) -> Layout:
        return self._layout

    def contribution(self, number: int, local_P: Tensor) -> Tensor:
        return local_P.detach().clone()

    def apply(self, number: int, result_S: Tensor, contributors: int = 1) -> None:
        check_result(result_S, self.state.n_elements)
        rate = self._options.rate * self._schedule(self.state.version)
        decay(self.state, self._layout, rate * self._options.weight_decay)
        plain_step(self.state, self.scope(number), result_S.sign(), rate)
        self.state.version += 1

    def merge(self, number: int, local_P: Tensor) -> Tensor:
        return self.restart()

    def restart(self) -> Tensor:
        return self.state.theta_P.clone()
