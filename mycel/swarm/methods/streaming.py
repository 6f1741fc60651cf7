"""Streaming DiLoCo: a fragment of the parameters at a time, while training goes on.

The parameters are cut into consecutive parts of about equal size, some for each fragment, and dealt out in turn, so
that every fragment has early, middle and late layers. Round r is about fragment r mod n. Its result comes in some steps
later, when the peer has trained on; what it holds then is mixed: local <- mix * local + (1 - mix) * theta.

Source: arXiv 2501.18512, algorithm 2 and section 2.2 (strided fragments, overlap, mixing).

Ring: algorithms.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from mycel.swarm.codecs.layout import Layout
from mycel.swarm.methods.method import Sends
from mycel.swarm.methods.options import StreamingOptions
from mycel.swarm.methods.outer import SharedState, check_result, nesterov_step, slices

__all__ = ["Fragment", "Streaming", "fragments"]

STRIDES = 4  # parts of each fragment


@dataclass(frozen=True, slots=True)
class Fragment:
    """Some of the parameters: where they lie, and what they are made of."""

    scope: tuple[slice, ...]
    layout: Layout


class Streaming:
    """See above; the shared state is the parameters and the outer momentum."""

    name = "streaming"
    sends: Sends = "parameters"

    def __init__(self, options: StreamingOptions, layout: Layout, theta_P: Tensor) -> None:
        self._fragments = fragments(layout, options.fragments)
        self.n_scopes = len(self._fragments)
        self.inner_steps, self.delay = options.inner_steps // self.n_scopes, options.delay
        self.codec, self.result_codec = options.codec, options.result_codec
        self._options = options
        self.state = SharedState(theta_P, 1)

    def scope(self, number: int) -> tuple[slice, ...]:
        return self._fragments[number % self.n_scopes].scope

    def layout(self, number: int) -> Layout:
        return self._fragments[number % self.n_scopes].layout

    def contribution(self, number: int, local_P: Tensor) -> Tensor:
        scope = self.scope(number)
        return slices(scope, self.state.theta_P).sub_(slices(scope, local_P))

    def apply(self, number: int, result_S: Tensor, contributors: int = 1) -> None:
        check_result(result_S, self.layout(number).n_elements)
        options = self._options
        nesterov_step(self.state, self.scope(number), result_S, options.rate, options.momentum, options.braking)
        self.state.version += 1

    def merge(self, number: int, local_P: Tensor) -> Tensor:
        merged_P = local_P.detach().clone()
        for part in self.scope(number):
            merged_P[part].mul_(self._options.mix).add_(self.state.theta_P[part] * (1.0 - self._options.mix))
        return merged_P

    def restart(self) -> Tensor:
        return self.state.theta_P.clone()


def fragments(layout: Layout, n: int) -> tuple[Fragment, ...]:
    """The layout in `n` fragments of about equal size, each of strided parts; fewer if there are fewer rows.

    >>> [fragment.scope for fragment in fragments(Layout(((4, 2), (4, 2))), 2)][0]
    (slice(0, 2, None), slice(4, 6, None), slice(8, 10, None), slice(12, 14, None))
    """
    parts = layout.cut(n * STRIDES)
    n = min(n, len(parts))
    start, scopes, shapes = 0, [[] for _ in range(n)], [[] for _ in range(n)]  # type: ignore[var-annotated]
    for index, part in enumerate(parts):
        scopes[index % n].append(slice(start, start + part.n_elements))
        shapes[index % n].extend(part.shapes)
        start += part.n_elements
    return tuple(Fragment(tuple(scope), Layout(tuple(shape))) for scope, shape in zip(scopes, shapes, strict=True))
