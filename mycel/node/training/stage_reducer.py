"""What a round makes of the gradients of all stages at once: each stage's rows are reduced for themselves.

A body is the coded part of one stage's vector; which stage, and of how many numbers, its author signs as the offer's
weight. So a liar has one row, in one stage. Part k of a round's result holds part k of every stage that contributed.

    body    version, loss | coded part k of the stage's gradient, times microbatches / counted
    result  for each stage: stage, version, loss, size | coded part k of the stage's sum

Every number counts alike where nobody is expected to lie; else stated weights are capped as in every round.

Legend: N rows, P elements of a stage.

Ring: algorithms.
"""

from __future__ import annotations

import math
import struct
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mycel.protocols.errors import RemoteProtocolError
from mycel.protocols.training import MAX_STAGES
from mycel.swarm.codecs import Codec, Encoder, Layout
from mycel.swarm.rounds.reducer import Bytes, Row, ShardWork, VectorReducer
from mycel.swarm.rounds.terms import GroupTerms

__all__ = ["StageReducer", "StageSum", "weight_of"]

_BODY = struct.Struct("<Qd")  # version, loss
_PART = struct.Struct("<BQdI")  # stage, version, loss, bytes
_SIZE = struct.Struct("<I")
# An element of a sum beyond this is no gradient; and what a step applies must be finite.
MAX_SUM = float(1 << 18)
_MAX_LOSS = 1e12


@dataclass(frozen=True, slots=True)
class StageSum:
    """What a round brought a stage: the coded parts of the sum of step `version`'s gradients."""

    version: int
    loss: float
    parts: tuple[Bytes, ...]


def weight_of(stage: int, n_counted: int) -> int:
    """What an offer states as its weight."""
    return n_counted * MAX_STAGES + stage


@dataclass(frozen=True, slots=True)
class _Seen:
    """A row of one stage. `body` is None where it is no contribution to the step that the round is about."""

    place: int  # among all rows
    n_counted: int
    staleness: int
    loss: float
    body: Bytes | None


class StageReducer:
    """The `Reducer` of a run's stages; `layouts` are theirs. Distances are measured from zero: steps may be taken back.

    Raises ConfigError as VectorReducer.
    """

    needs_before = False

    def __init__(self, layouts: Sequence[Layout], terms: GroupTerms, n_microbatches: int) -> None:
        self.layouts, self.terms, self.n_microbatches = tuple(layouts), terms, n_microbatches
        self._stages = [VectorReducer(layout, replace(terms, n_elements=layout.n_elements)) for layout in layouts]
        self.rule = self._stages[0].rule
        self._counts_numbers = self.rule.base == "mean" and not self.rule.pre and terms.liars == 0

    @property
    def codec(self) -> Codec:
        return self._stages[0].codec

    # ---- one peer's contribution

    def encoders(self, stage: int, n_shards: int) -> list[Encoder]:
        """A new contributor's."""
        return [self.codec.encoder(part) for part in self._stages[stage].shards(n_shards)]

    def encode(
        self,
        stage: int,
        encoders: Sequence[Encoder],
        vector_P: Tensor,
        version: int,
        loss: float,
        seeds: Sequence[bytes],
    ) -> list[bytes]:
        """The bodies; ValueError for a vector that is not finite."""
        head = _BODY.pack(version, loss)
        parts = self._stages[stage].cut(vector_P, len(seeds))
        bodies = [
            head + encoder.encode(part, seed) for encoder, part, seed in zip(encoders, parts, seeds, strict=False)
        ]
        return bodies + [head] * (len(seeds) - len(bodies))

    # ---- what aggregators claim

    def max_bytes(self, shard: int, n_shards: int) -> int:
        return _BODY.size + max(stage.max_bytes(shard, n_shards) for stage in self._stages)

    def gram(self, work: ShardWork) -> bytes:
        """All rows' upper triangle: rows of two stages have nothing in common, and who is no vector has NaN."""
        n_rows = len(work.rows)
        gram_NN = torch.zeros(n_rows, n_rows)
        for stage, seen in self._seen(work).items():
            for row in seen:
                gram_NN[row.place, :] = gram_NN[:, row.place] = math.nan if row.body is None else 0.0
            valid = [row for row in seen if row.body is not None]
            if valid:
                place = torch.tensor([row.place for row in valid])
                gram_NN[place[:, None], place] = _square(self._stages[stage].gram(_work(work, valid)), len(valid))
        return _triangle(gram_NN)

    def decide(self, rows: Sequence[Row], grams: Sequence[bytes], plan: bytes) -> bytes:
        """Each row's standing after it (int32), then each stage's decision, with its length before it.

        The bodies of `rows` are not looked at. Who states no stage stands as before.
        """
        squares = [_square(data, len(rows)) for data in grams]
        standings = [row.standing for row in rows]
        decisions = []
        for stage, reducer in enumerate(self._stages):
            places = [place for place, row in enumerate(rows) if self._stage_of(row) == stage]
            decision = b""
            if places:
                at = torch.tensor(places)
                own = [_triangle(gram_NN[at[:, None], at]) for gram_NN in squares]
                stage_rows = [replace(rows[place], weight=rows[place].weight // MAX_STAGES) for place in places]
                decision = reducer.decide(stage_rows, own, plan)
                for place, standing in zip(places, struct.unpack_from(f"<{len(places)}i", decision), strict=True):
                    standings[place] = standing
            decisions.append(_SIZE.pack(len(decision)) + decision)
        return struct.pack(f"<{len(rows)}i", *standings) + b"".join(decisions)

    def reduce(self, work: ShardWork, decision: bytes) -> bytes:
        """Part `work.shard` of the sums of all stages that contributed. RemoteProtocolError for no decision of ours."""
        seen, version = self._seen(work), self._version(work)
        n_standings = 4 * len(work.rows)
        decisions = _split(decision[n_standings:], len(self._stages)) if decision else [b""] * len(self._stages)
        parts = []
        for stage, reducer in enumerate(self._stages):
            rows = seen.get(stage, [])
            valid = [row for row in rows if row.body is not None]
            own = decisions[stage]
            # Behind the standings a bit for each row that counts.
            if not valid or (own and not any(own[4 * len(rows) :][: -(-len(rows) // 8)])):
                continue
            if self._counts_numbers:
                data = self._mean(reducer, _work(work, valid))
            else:
                # A decision is about all rows of the stage.
                data = reducer.reduce(_work(work, rows if own else valid), own)
            parts.append(_PART.pack(stage, version, self._loss(valid), len(data)) + data)
        return b"".join(parts)

    # ---- what everybody does with the results

    def read(self, results: Sequence[Bytes]) -> dict[int, StageSum]:
        """What a round brought each stage, not decoded yet. Raises RemoteProtocolError for bytes that are no results.

        A stage of which parts are missing, or are of different steps, has got nothing.
        """
        found: dict[int, list[tuple[int, float, Bytes]]] = {}
        for result in results:
            for stage, version, loss, data in _entries(result, len(self._stages)):
                found.setdefault(stage, []).append((version, loss, data))
        return {
            stage: StageSum(parts[0][0], parts[0][1], tuple(data for *_, data in parts))
            for stage, parts in found.items()
            if len(parts) == len(results) and len({version for version, *_ in parts}) == 1
        }

    def decode(self, stage: int, found: StageSum) -> Tensor:
        """The sum of the stage's gradients, float32 [P]. Raises RemoteProtocolError for bytes that are no results."""
        sum_P = self._stages[stage].decode(found.parts)
        return sum_P.clamp_(-MAX_SUM, MAX_SUM)

    # ---- rows

    def _stage_of(self, row: Row) -> int | None:
        """Of a row that states a stage of this run and a number of numbers that a step has."""
        n_counted, stage = divmod(row.weight, MAX_STAGES)
        return stage if stage < len(self._stages) and 1 <= n_counted <= self.n_microbatches else None

    def _version(self, work: ShardWork) -> int:
        """The step that most rows are of; of equally many the earliest."""
        said = Counter(_BODY.unpack_from(row.body)[0] for row in work.rows if self._is_whole(row))
        return min(said, key=lambda version: (-said[version], version), default=0)

    def _is_whole(self, row: Row) -> bool:
        return self._stage_of(row) is not None and len(row.body) >= _BODY.size

    def _seen(self, work: ShardWork) -> dict[int, list[_Seen]]:
        """The rows of each stage, in their order."""
        due, found = self._version(work), dict[int, list[_Seen]]()
        for place, row in enumerate(work.rows):
            if (stage := self._stage_of(row)) is None:
                continue
            body, loss = None, math.nan
            if self._is_whole(row):
                version, loss = _BODY.unpack_from(row.body)
                body = memoryview(row.body)[_BODY.size :] if version == due else None
            found.setdefault(stage, []).append(_Seen(place, row.weight // MAX_STAGES, row.staleness, loss, body))
        return found

    def _mean(self, reducer: VectorReducer, work: ShardWork) -> bytes:
        """sum_i n_i x_i / sum_i n_i, in the order of the plan; x_i is sum_i * microbatches / n_i."""
        parts = reducer.shards(work.n_shards)
        if work.shard >= len(parts):
            return b""
        part = parts[work.shard]
        total_P, n_counted = torch.zeros(part.n_elements), 0
        for row in work.rows:
            try:
                row_P = reducer.codec.decode(row.body, part)
            except RemoteProtocolError:
                continue  # trusted or not: what is no vector is in no mean
            total_P += row_P * float(row.weight)
            n_counted += row.weight
        # What overflows in the sum is no gradient either.
        mean_P = (total_P / float(max(n_counted, 1))).nan_to_num_(0.0, MAX_SUM, -MAX_SUM).clamp_(-MAX_SUM, MAX_SUM)
        return reducer.result_codec.encoder(part).encode(mean_P, work.plan)

    def _loss(self, valid: Sequence[_Seen]) -> float:
        """The sum of all losses of the step, as far as it was said; with liars about, by the median of what was."""
        said = [row for row in valid if math.isfinite(row.loss) and abs(row.loss) <= _MAX_LOSS]
        if not said:
            return 0.0
        if self._counts_numbers:
            loss = math.fsum(row.loss for row in said) / sum(row.n_counted for row in said)
        else:
            each = sorted(row.loss / row.n_counted for row in said)
            loss = each[(len(each) - 1) // 2]
        return max(-_MAX_LOSS, min(loss * self.n_microbatches, _MAX_LOSS))


def _work(work: ShardWork, rows: Sequence[_Seen]) -> ShardWork:
    """Of one stage alone; what is no contribution has an empty body, and no place in a decision."""
    own = tuple(Row(b"" if row.body is None else row.body, row.n_counted, row.staleness) for row in rows)
    return replace(work, rows=own, before=())


def _square(data: bytes, n_rows: int) -> Tensor:
    """float32 [N, N] from the upper triangle; all NaN where it has another size."""
    square_NN = torch.full((n_rows, n_rows), math.nan)
    if n_rows and len(data) == 2 * n_rows * (n_rows + 1):
        upper = torch.triu_indices(n_rows, n_rows)
        values = torch.frombuffer(bytearray(data), dtype=torch.float32)
        square_NN[upper[0], upper[1]] = values
        square_NN[upper[1], upper[0]] = values
    return square_NN


def _triangle(square_NN: Tensor) -> bytes:
    upper = torch.triu_indices(len(square_NN), len(square_NN))
    return square_NN[upper[0], upper[1]].numpy().astype("<f4").tobytes()


def _split(decision: bytes, n_stages: int) -> list[bytes]:
    parts, at = [], 0
    for _ in range(n_stages):
        if len(decision) < at + _SIZE.size:
            raise RemoteProtocolError("a decision about other stages")
        [size] = _SIZE.unpack_from(decision, at)
        at += _SIZE.size
        parts.append(decision[at : at + size])
        at += size
    return parts


def _entries(result: Bytes, n_stages: int) -> list[tuple[int, int, float, Bytes]]:
    """(stage, version, loss, coded part), each stage once."""
    view, found, at = memoryview(result), dict[int, tuple[int, int, float, Bytes]](), 0
    while at < len(view):
        if len(view) < at + _PART.size:
            raise RemoteProtocolError("a result that ends in the middle")
        stage, version, loss, size = _PART.unpack_from(view, at)
        at += _PART.size
        if stage >= n_stages or stage in found or at + size > len(view) or not abs(loss) <= _MAX_LOSS:
            raise RemoteProtocolError("a result of other stages than the run has")
        found[stage] = stage, version, loss, view[at : at + size]
        at += size
    return list(found.values())
