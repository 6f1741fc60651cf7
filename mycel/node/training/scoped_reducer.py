"""What aggregators compute where a round is about a part of the parameters, another part in each round.

Ring: algorithms.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from torch import Tensor

from mycel.swarm.codecs import Codec, Layout
from mycel.swarm.methods.method import Method
from mycel.swarm.rounds.reducer import Row, ShardWork, VectorReducer
from mycel.swarm.rounds.terms import GroupTerms

__all__ = ["ScopedReducer"]


@dataclass(eq=False)
class ScopedReducer:
    """A `Reducer` for the round that makes result number `version`: all members are at the same one.

    The method's own count runs ahead of it between the moment that a result is applied and the beginning of the next
    round. What is still reduced then is about the round that is over, and to be signed.
    """

    method: Method
    terms: GroupTerms
    version: int = 0
    _by_scope: dict[int, VectorReducer] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        """Raises ConfigError for terms that no reducer can be made of."""
        self.at(self.version)

    def at(self, version: int) -> VectorReducer:
        """For the round that makes result number `version`."""
        scope = version % self.method.n_scopes
        found = self._by_scope.get(scope)
        if found is None:
            layout = self.method.layout(version)
            found = VectorReducer(layout, replace(self.terms, n_elements=layout.n_elements))
            self._by_scope[scope] = found
        return found

    @property
    def now(self) -> VectorReducer:
        return self.at(self.version)

    @property
    def codec(self) -> Codec:
        return self.now.codec

    @property
    def needs_before(self) -> bool:
        """The result before is about other parameters, if there are several scopes: distances are then from zero."""
        return self.method.n_scopes == 1 and self.now.needs_before

    def shards(self, version: int, n_shards: int) -> tuple[Layout, ...]:
        return self.at(version).shards(n_shards)

    def cut(self, vector_S: Tensor, version: int, n_shards: int) -> list[Tensor]:
        return self.at(version).cut(vector_S, n_shards)

    def max_bytes(self, shard: int, n_shards: int) -> int:
        return self.now.max_bytes(shard, n_shards)

    def gram(self, work: ShardWork) -> bytes:
        return self.now.gram(self._here(work))

    def decide(self, rows: Sequence[Row], grams: Sequence[bytes], plan: bytes) -> bytes:
        return self.now.decide(rows, grams, plan)

    def reduce(self, work: ShardWork, decision: bytes) -> bytes:
        return self.now.reduce(self._here(work), decision)

    def _here(self, work: ShardWork) -> ShardWork:
        return work if self.method.n_scopes == 1 else replace(work, before=())
