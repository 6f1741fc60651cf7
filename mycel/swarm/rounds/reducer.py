"""From the coded bodies of a shard to the coded result: what every aggregator computes to the same bits.

A body that is no vector is a liar's: its row counts for nothing in any shard if the rule looks at distances, and in
its own shard otherwise. Distances are taken from the aggregate of the round before, which all members have.

Legend: N rows, P elements of a shard.

Ring: algorithms.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mycel.protocols.errors import ConfigError, RemoteProtocolError
from mycel.security.aggregators import (
    UNIT,
    Decision,
    Standing,
    capped,
    combine,
    decide,
    decide_standing,
    finite_rows,
    gram,
    parse_rule,
)
from mycel.swarm.codecs import Layout, make_codec
from mycel.swarm.rounds.claims import STANDING
from mycel.swarm.rounds.terms import GroupTerms

__all__ = ["Row", "ShardWork", "VectorReducer"]

Bytes = bytes | memoryview
_SPARSE = ("topk", "dgc", "kmeans")


@dataclass(frozen=True, slots=True)
class Row:
    """A contribution to one shard. Its weight is what its author states, its standing what all know of its author."""

    body: Bytes
    weight: int = 1
    staleness: int = 0
    peer: str = ""
    standing: int = 0


@dataclass(frozen=True, slots=True)
class ShardWork:
    """Rows of `shard` of `n_shards`, in the order of the plan; `before` are the coded results of the last round."""

    plan: bytes
    shard: int
    n_shards: int
    rows: tuple[Row, ...]
    before: tuple[Bytes, ...] = ()


class VectorReducer:
    """For vectors of one layout. Holds no state of a round: the same arguments give the same bytes."""

    def __init__(self, layout: Layout, terms: GroupTerms) -> None:
        """Raises ConfigError for terms that name no rule or codec, ValueError for terms of another vector."""
        if layout.n_elements != terms.n_elements:
            raise ValueError(f"a layout of {layout.n_elements} elements, terms of {terms.n_elements}")
        self.layout, self.terms = layout, terms
        self.keeps_standing = terms.rule.startswith(STANDING)
        self.rule = parse_rule(terms.rule.removeprefix(STANDING))
        if self.keeps_standing and (self.rule.per_coordinate or not self.rule.needs_gram):
            raise ConfigError(f"round.rule: a standing needs a rule that weighs whole contributions, not {self.rule}")
        self.codec, self.result_codec = make_codec(terms.codec), make_codec(terms.result_codec)
        if not self.result_codec.repeatable:
            raise ConfigError(f"results in {terms.result_codec}: aggregators would not make the same bytes of them")
        # Rows of these are zero at most places, where an attacker must not be alone.
        self._is_sparse = self.codec.name.split(":")[0] in _SPARSE and terms.liars > 0

    @property
    def needs_before(self) -> bool:
        """Whether the rule measures from the last aggregate."""
        return self.rule.needs_gram and not self.keeps_standing

    def shards(self, n_shards: int) -> tuple[Layout, ...]:
        """The parts of the vector. There are fewer than `n_shards` if it has fewer rows: the others are empty."""
        return self.layout.cut(n_shards)

    def cut(self, vector_P: Tensor, n_shards: int) -> list[Tensor]:
        """A whole vector's parts, in order, without a copy."""
        parts = self.shards(n_shards)
        return list(torch.split(vector_P, [part.n_elements for part in parts]))

    def max_bytes(self, shard: int, n_shards: int) -> int:
        """The longest body of a shard."""
        part = self._part(shard, n_shards)
        return 0 if part is None else self.codec.max_bytes(part)

    # ---- what aggregators claim

    def gram(self, work: ShardWork) -> bytes:
        """float32 upper triangle of <x_i - c, x_j - c>, c the aggregate before; NaN along a row that is no vector."""
        n_rows = len(work.rows)
        part = self._part(work.shard, work.n_shards)
        if part is None:
            return bytes(2 * n_rows * (n_rows + 1))
        rows = self._rows(work, part)
        good = [number for number, row in enumerate(rows) if row is not None]
        gram_NN = torch.full((n_rows, n_rows), math.nan, dtype=torch.float64)
        if good:
            place = torch.tensor(good)
            gram_NN[place[:, None], place] = gram([row for row in rows if row is not None], self._center(work, part))
        upper = torch.triu_indices(n_rows, n_rows)
        return gram_NN[upper[0], upper[1]].to(torch.float32).numpy().astype("<f4").tobytes()

    def decide(self, rows: Sequence[Row], grams: Sequence[bytes], plan: bytes) -> bytes:
        """What the rule makes of the sum of the shards' Gram matrices.

        Each row's standing after it (int32), which rows count at all (a bit each), and the decision on those. The
        bodies of `rows` are not looked at. A matrix of another size counts as one of NaN.
        """
        n_rows = len(rows)
        total_NN = torch.zeros(n_rows, n_rows, dtype=torch.float64)
        for data in grams:
            total_NN += _square(data, n_rows)
        good = [number for number in range(n_rows) if bool(total_NN[number, number].isfinite())]
        mask = bytearray(-(-n_rows // 8))
        for number in good:
            mask[number // 8] |= 1 << number % 8
        if not good:
            return _standings([row.standing for row in rows]) + bytes(mask)
        place = torch.tensor(good)
        # Between rows of finite length all is finite, unless a whole jury lied: no reason to fall over.
        gram_NN = total_NN[place[:, None], place].nan_to_num(0.0, 0.0, 0.0)
        chosen = [rows[number] for number in good]
        if not self.keeps_standing:
            decision = self._decide(chosen, n_rows, gram_NN, plan)
            return _standings([row.standing for row in rows]) + bytes(mask) + decision.to_bytes()
        # By its place: who is in no group has no name.
        names = [f"{number:05d}" for number in range(n_rows)]
        known = Standing({name: row.standing for name, row in zip(names, rows, strict=True)})
        inside = [names[number] for number in good]
        n_liars = self._n_liars(n_rows, len(good))
        decision, known = decide_standing(self.rule, gram_NN, n_liars, peers=inside, standing=known, seed=plan)
        outside = [name for name in names if name not in inside]
        known = known.after(outside, [-UNIT] * len(outside))  # no vector at all pulls straight backwards
        return _standings([known.scores[name] for name in names]) + bytes(mask) + decision.to_bytes()

    def reduce(self, work: ShardWork, decision: bytes) -> bytes:
        """The coded result. `decision` is empty for a rule that needs none; RemoteProtocolError if it is none."""
        part = self._part(work.shard, work.n_shards)
        if part is None:
            return b""
        result_P = self._combine(work, part, decision)
        return self.result_codec.encoder(part).encode(result_P, work.plan)

    # ---- what everybody does with the results

    def decode(self, results: Sequence[Bytes]) -> Tensor:
        """The whole aggregate, float32 [P]. Raises RemoteProtocolError for bytes that are no results."""
        parts = self.shards(len(results))
        whole_P = torch.empty(self.layout.n_elements)
        places = torch.split(whole_P, [part.n_elements for part in parts])
        # Each goes to its place at once: holding all of them until the end would take as much memory again.
        for body, part, place_P in zip(results, parts, places, strict=False):
            place_P.copy_(self.result_codec.decode(body, part))
        return whole_P

    # ---- one shard

    def _part(self, shard: int, n_shards: int) -> Layout | None:
        parts = self.shards(n_shards)
        return parts[shard] if shard < len(parts) else None

    def _rows(self, work: ShardWork, part: Layout) -> list[Tensor | None]:
        """Each decoded, or None if it is no vector."""
        rows: list[Tensor | None] = []
        for row in work.rows:
            try:
                row_P = self.codec.decode(row.body, part)
            except RemoteProtocolError:
                rows.append(None)
            else:
                rows.append(row_P if finite_rows([row_P])[0] else None)
        return rows

    def _center(self, work: ShardWork, part: Layout) -> Tensor | None:
        """This shard of the aggregate before, of which other shards may have been made."""
        if not work.before or not self.needs_before:
            return None
        start = sum(other.n_elements for other in self.shards(work.n_shards)[: work.shard])
        end, at, pieces = start + part.n_elements, 0, []
        for body, other in zip(work.before, self.shards(len(work.before)), strict=False):
            if at < end and at + other.n_elements > start:
                vector_P = self.result_codec.decode(body, other)
                pieces.append(vector_P[max(start - at, 0) : end - at])
            at += other.n_elements
        return torch.cat(pieces)

    def _decide(self, rows: Sequence[Row], n_planned: int, gram_NN: Tensor, plan: bytes) -> Decision:
        """Rows that were left out are liars that the rule need not withstand any more."""
        n_liars = self._n_liars(n_planned, len(rows))
        return decide(self.rule, gram_NN, n_liars, seed=plan, weights=_weights(rows))

    def _n_liars(self, n_planned: int, n_good: int) -> int:
        n_liars = self.terms.n_liars(n_planned) - (n_planned - n_good)
        return max(0, min(n_liars, (n_good - 1) // 2))

    def _combine(self, work: ShardWork, part: Layout, decision: bytes) -> Tensor:
        rows, n_rows = self._rows(work, part), len(work.rows)
        if decision:
            mask, n_mask = decision[4 * n_rows :], -(-n_rows // 8)
            if len(mask) < n_mask:
                raise RemoteProtocolError("a decision about other rows")
            good = [number for number in range(n_rows) if mask[number // 8] >> number % 8 & 1]
        else:
            good = [number for number in range(n_rows) if rows[number] is not None]
        if not good:
            return torch.zeros(part.n_elements)
        if decision:
            chosen = Decision.from_bytes(mask[n_mask:])
        else:
            none_NN = torch.zeros(len(good), len(good), dtype=torch.float64)
            chosen = self._decide([work.rows[number] for number in good], n_rows, none_NN, work.plan)
        center = self._center(work, part)
        # Every shard's rows were decoded before the decision: one that fails now was let in by false claims.
        still = torch.zeros(part.n_elements) if center is None else center
        vectors = [still if (row := rows[number]) is None else row for number in good]
        n_liars = self._n_liars(n_rows, len(good))
        return combine(self.rule, vectors, chosen, center, n_liars, quorum_touch=self._is_sparse)


def _weights(rows: Sequence[Row]) -> list[int]:
    """What authors state, capped; a late contribution counts for 1 / (1 + rounds late). In units of 1 / 720720."""
    late = [720720 // (1 + row.staleness) for row in rows]  # divisible by 1 to 16
    return [weight * part for weight, part in zip(capped([row.weight for row in rows]), late, strict=True)]


def _standings(scores: Sequence[int]) -> bytes:
    return struct.pack(f"<{len(scores)}i", *scores)


def _square(data: bytes, n_rows: int) -> Tensor:
    """Symmetric float64 [N, N] from the upper triangle; all NaN where it has another size."""
    square_NN = torch.full((n_rows, n_rows), math.nan, dtype=torch.float64)
    if len(data) == 2 * n_rows * (n_rows + 1):
        upper = torch.triu_indices(n_rows, n_rows)
        values = torch.frombuffer(bytearray(data), dtype=torch.float32).to(torch.float64) if n_rows else torch.empty(0)
        square_NN[upper[0], upper[1]] = values
        square_NN[upper[1], upper[0]] = values
    return square_NN
