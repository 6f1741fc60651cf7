"""How a stage's sum comes together in one peer: doing what `mycel/swarm/training/step.py` decides about sums.

What has come stays in the table, whatever ends the doing; so it may be cancelled at any time and begun again.

Ring: shell.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from mycel.node.training.ledger import Ledger
from mycel.node.training.round_sums import RoundSums
from mycel.node.training.sum_table import FinalSum, SumTable, digest, sum_of_squares
from mycel.node.training.sums import SumClient, all_of, own_partial, pieces
from mycel.protocols.errors import PeerError, PeerRefused, VerificationError
from mycel.protocols.ports import Compute
from mycel.protocols.training import Reduced
from mycel.swarm.training.actions import (
    AddTied,
    Contribute,
    Range,
    Reduce,
    Seal,
    TakeResult,
    TakeShards,
    TakeSum,
)
from mycel.swarm.training.bell import Bell
from mycel.swarm.training.lattice import to_float

__all__ = ["Pull", "Reducer", "TiedEnd"]

Pull = Reduce | TakeShards | Contribute | TakeResult | AddTied | Seal | TakeSum


@dataclass(frozen=True, slots=True)
class TiedEnd:
    """Where the other copy of a tied table begins: among the parameters of which stage, at which element."""

    stage: int
    start: int


@dataclass(eq=False)
class Reducer:
    """For the stage that `table` is of. `tied_end` is set exactly if `table.tied` is.

    `counts_tied`: whether the norm of this stage's gradient has the tied table in it; one end alone has. `rounds`:
    where sums come from in a run that does not sum exactly.
    """

    me: str
    stage: int
    ledger: Ledger
    compute: Compute
    table: SumTable
    client: SumClient
    bell: Bell
    tied_end: TiedEnd | None = None
    counts_tied: bool = True
    rounds: RoundSums | None = None
    # What the step was multiplied with, as whoever gave us its sum said.
    scale: float = field(default=0.0, init=False)

    async def do(self, pull: Pull) -> None:
        """Raises PeerError, which names who did not give what was asked for."""
        match pull:
            case Reduce():
                for low, high in (piece for ends in pull.ranges for piece in pieces(*ends)):
                    await self._reduce(pull, low, high)
            case TakeShards():
                await all_of([partial(self._take_shard, *share) for share in pull.shares])
            case Contribute():
                assert self.rounds is not None, "decided from what they say"
                await self.rounds.contribute(pull)
            case TakeResult():
                assert self.rounds is not None, "decided from what they say"
                await self.rounds.take()
            case Seal():
                await self._seal(self.table.own_sum(), None, self.table.loss or 0.0)
            case AddTied():
                await self._add_tied(pull)
            case TakeSum():
                await self._take_sum(pull)

    async def _reduce(self, pull: Reduce, low: int, high: int) -> None:
        version, own = self.table.version, dict(pull.sources).get(self.me)
        others = [source for source in pull.sources if source[0] != self.me]
        total_N, losses = await self.client.fetch_partials(others, self.stage, version, low, high)
        if own is not None:
            found = await own_partial(self.compute, self.ledger, version, own, low, high - low)
            if found is None:
                raise PeerRefused(self.me, "has counted or taken back something meanwhile")
            total_N += found[0]
            losses.append(found[1])
        self.table.write(low, to_float(total_N))
        self.table.loss = math.fsum(losses)
        self.bell.ring()

    async def _take_shard(self, owner: str, ranges: tuple[Range, ...]) -> None:
        version = self.table.version
        for low, high in (piece for ends in ranges for piece in pieces(*ends)):
            given = await self.client.fetch_sum([owner], self.stage, version, low, high, tied=False)
            self.table.write(low, given.values_N)
            if self.table.loss is None:
                self.table.loss = given.loss
        self.bell.ring()

    async def _add_tied(self, pull: AddTied) -> None:
        """What is being read of the stage's own sum must stay as it is, so the sum to apply is another tensor."""
        tied, end, version = self.table.tied, self.tied_end, self.table.version
        assert tied is not None
        assert end is not None
        there = end.start, end.start + tied[1] - tied[0]
        given = await self.client.fetch_sum(pull.peers, end.stage, version, *there, tied=False)
        sum_P = self.table.own_sum().clone()
        own_tied = sum_P[slice(*tied)].clone()
        sum_P[slice(*tied)] += given.values_N
        await self._seal(sum_P, own_tied, self.table.loss or 0.0)

    async def _take_sum(self, pull: TakeSum) -> None:
        """From one peer alone at a time: so it is known who gave something else than it said."""
        failure: PeerError | None = None
        for peer in pull.peers:
            try:
                given = await self.client.fetch_sum(
                    [peer], self.stage, pull.version, 0, self.table.n_elements, tied=True
                )
                own_tied = None
                if (tied := self.table.tied) is not None:
                    share = await self.client.fetch_sum([peer], self.stage, pull.version, *tied, tied=False)
                    own_tied = share.values_N
                if (await self.compute.run(partial(digest, given.values_N))).value != pull.digest:
                    raise VerificationError(peer, "gave another sum than it said it has")
            except PeerError as error:
                failure = error
                continue
            self.scale = given.scale
            await self._seal(given.values_N, own_tied, given.loss)
            return
        raise failure or PeerRefused("", f"nobody has the sum of step {pull.version}")

    async def _seal(self, sum_P: Tensor, own_tied: Tensor | None, loss: float) -> None:
        version = self.table.version
        leave_out = None if self.counts_tied else self.table.tied

        def job() -> Reduced:
            assert bool(torch.isfinite(sum_P).all()), "a lattice holds finite numbers alone"
            return Reduced(version, digest(sum_P), sum_of_squares(sum_P, leave_out), loss)

        reduced = (await self.compute.run(job)).value
        self.table.finish(FinalSum(sum_P, own_tied, reduced))
