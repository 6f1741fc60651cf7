"""SparseLoCo: DiLoCo whose contributions are so sparse that what was not sent yet does the outer momentum's work.

    e <- 0.95 * e + (theta - theta_local);  q = the largest of e, in 2 bits;  e <- e - q            (each peer's codec)
    theta <- theta - mean of all q                                                                (everybody)

The mean is over all contributors, those that did not send an index included: over its senders alone, as published, one
liar would have every index to itself that nobody else sent. Source: arXiv 2508.15706, algorithm 1.

Ring: algorithms.
"""

from __future__ import annotations

from torch import Tensor

from mycel.swarm.codecs.layout import Layout
from mycel.swarm.methods.method import Sends
from mycel.swarm.methods.options import SparseLocoOptions
from mycel.swarm.methods.outer import SharedState, check_result, plain_step

__all__ = ["SparseLoco"]


class SparseLoco:
    """See above; the shared state is the parameters alone."""

    name = "sparseloco"
    sends: Sends = "parameters"
    n_scopes = 1
    delay = 0

    def __init__(self, options: SparseLocoOptions, layout: Layout, theta_P: Tensor) -> None:
        self.inner_steps = options.inner_steps
        self.codec, self.result_codec = options.codec, options.result_codec
        self._rate, self._layout = options.rate, layout
        self.state = SharedState(theta_P, 0)

    def scope(self, number: int) -> tuple[slice, ...]:
        return (slice(0, self.state.n_elements),)

    def layout(self, number: int) -> Layout:
        return self._layout

    def contribution(self, number: int, local_P: Tensor) -> Tensor:
        return self.state.theta_P - local_P

    def apply(self, number: int, result_S: Tensor, contributors: int = 1) -> None:
        check_result(result_S, self.state.n_elements)
        plain_step(self.state, self.scope(number), result_S, self._rate)
        self.state.version += 1

    def merge(self, number: int, local_P: Tensor) -> Tensor:
        return self.restart()

    def restart(self) -> Tensor:
        return self.state.theta_P.clone()
