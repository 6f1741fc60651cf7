"""Deep gradient compression: top-k of a velocity, with the momentum inside: "dgc:0.001".

    u <- m u + x;  v <- v + u;  send the largest of v;  at what was sent: v <- v - sent, u <- 0

Momentum correction: the momentum is applied before elements are chosen, so late elements arrive with all that they
would have moved. Factor masking: u is cleared where v was sent, or stale momentum would push twice. Warm-up: the first
updates keep 25 %, 6.25 %, 1.56 % ... of the elements until the density is reached. Clipping is left to the caller
(1/sqrt(N) of the threshold for N contributors). Source: Lin et al., arXiv 1712.01887, algorithm 4.

    body: one byte, how many steps the warm-up has made; then as in topk.py

Legend: P elements.

Ring: algorithms.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mycel.protocols.errors import RemoteProtocolError
from mycel.swarm.codecs.bits import Array, Reader
from mycel.swarm.codecs.codec import Encoder, Turn, check_vector
from mycel.swarm.codecs.layout import Layout
from mycel.swarm.codecs.topk import largest, max_sparse_bytes, pack_sparse, read_sparse

__all__ = ["Dgc", "DgcEncoder"]


class Dgc:
    """Each of the warm-up's steps lasts `warmup` accepted updates; 0 starts at the full sparsity."""

    layered = False
    repeatable = False  # as top-k, and it remembers

    def __init__(self, density: float, momentum: float = 0.9, warmup: int = 1, values: str = "float16") -> None:
        options = [f"{density}"]
        options += [f"momentum={momentum}"] * (momentum != 0.9)
        options += [f"values={values}"] * (values != "float16")
        options += [f"warmup={warmup}"] * (warmup != 1)
        self.name = "dgc:" + ",".join(options)
        self.momentum = momentum
        self.warmup = warmup
        self.values = values
        self.densities = [density]
        if warmup:
            ladder = [0.25**step for step in range(1, 7)]
            self.densities = [*(one for one in ladder if one > density), density]

    def encoder(self, layout: Layout) -> Encoder:
        return DgcEncoder(self, layout)

    def decode(self, body: bytes | memoryview, layout: Layout) -> Tensor:
        reader = Reader(body)
        step = reader.number(1)
        if step >= len(self.densities):
            raise RemoteProtocolError(f"an update is at step {step} of a warm-up of {len(self.densities) - 1}")
        x_P = read_sparse(reader, layout.n_elements, self.densities[step], self.values)
        reader.end()
        return x_P

    def max_bytes(self, layout: Layout) -> int:
        return 1 + max_sparse_bytes(layout.n_elements, self.densities[0], self.values)


class DgcEncoder:
    """Velocity `u_P` and what was not sent of its sum, `v_P`."""

    def __init__(self, codec: Dgc, layout: Layout) -> None:
        self.u_P = torch.zeros(layout.n_elements)
        self.v_P = torch.zeros(layout.n_elements)
        self._codec = codec
        self._layout = layout
        self._n_accepted = 0
        self._sent: tuple[Array, bytes] | None = None
        self._turn = Turn()

    def encode(self, x_P: Tensor, seed: bytes) -> bytes:
        self._turn.check_settled()
        codec = self._codec
        u_P = torch.add(check_vector(x_P, self._layout), self.u_P, alpha=codec.momentum)
        v_P = check_vector(self.v_P + u_P, self._layout)
        step = min(self._n_accepted // max(codec.warmup, 1), len(codec.densities) - 1)
        density = codec.densities[step]
        positions = largest(v_P, density)
        body = bytes([step]) + pack_sparse(v_P, positions, density, codec.values)
        self.u_P, self.v_P, self._sent = u_P, v_P, (positions, body)
        self._turn.encoded()
        return body

    def settle(self, accepted: bool) -> None:
        self._turn.settled()
        assert self._sent is not None
        positions, body = self._sent
        self._sent = None
        if accepted:
            self._n_accepted += 1
            self.v_P -= self._codec.decode(body, self._layout)
            self.u_P[torch.from_numpy(positions)] = 0.0
