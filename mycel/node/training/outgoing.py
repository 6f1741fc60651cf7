"""What a peer offers: its vector in shards, coded, and what the codec keeps of it until the round is decided.

Legend: S elements of a round's scope.

Ring: algorithms.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from mycel.node.training.scoped_reducer import ScopedReducer
from mycel.swarm.codecs import Encoder

__all__ = ["Outgoing", "Twist"]

# What is offered in place of an honest vector [S], in experiments that have liars in them.
Twist = Callable[[Tensor, int], Tensor]


@dataclass(eq=False)
class Outgoing:
    """An encoder for each scope and shard. `encode`, then `settle`, in turns; all on the compute thread."""

    reducer: ScopedReducer
    twist: Twist | None = None
    _encoders: dict[tuple[int, int], Encoder] = field(default_factory=dict, init=False)
    _pending: list[Encoder] = field(default_factory=list, init=False)

    @property
    def carries(self) -> bool:
        """Whether the codec sends later what the round did not take."""
        return any(part in self.reducer.codec.name for part in ("+ef", "dgc"))

    def encode(self, vector_S: Tensor, version: int, number: int, n_shards: int, seed: bytes) -> list[bytes]:
        """A body for each shard, in the round `number` that makes result number `version`.

        Raises FloatingPointError for a vector with numbers that are not finite.
        """
        if self.twist is not None:
            vector_S = self.twist(vector_S, number)
        parts = self.reducer.cut(vector_S, version, n_shards)
        if bool(torch.isfinite(vector_S).all()):
            bodies = self._coded(parts, version, n_shards, seed)
        elif self.twist is None:
            raise FloatingPointError("this peer's own work has no finite result")
        else:
            bodies = [part.numpy().tobytes() for part in parts]
        # There are fewer parts than shards where the vector has fewer rows.
        return bodies + [b""] * (n_shards - len(bodies))

    def _coded(self, parts: list[Tensor], version: int, n_shards: int, seed: bytes) -> list[bytes]:
        scope, layouts = version % self.reducer.method.n_scopes, self.reducer.shards(version, n_shards)
        for shard, layout in enumerate(layouts):
            if (scope, shard) not in self._encoders:
                self._encoders[scope, shard] = self.reducer.codec.encoder(layout)
        self._pending = [self._encoders[scope, shard] for shard in range(len(layouts))]
        seeds = [hashlib.sha256(seed + shard.to_bytes(4, "little")).digest() for shard in range(len(parts))]
        return [one.encode(part, own) for one, part, own in zip(self._pending, parts, seeds, strict=True)]

    def settle(self, accepted: bool) -> None:
        """Whether the round took what was encoded last."""
        for encoder in self._pending:
            encoder.settle(accepted)
        self._pending = []

    def forget(self) -> None:
        """The shared state is not what the last rounds made of it: what they did not take is of no use to it."""
        self._encoders.clear()
        self._pending = []
