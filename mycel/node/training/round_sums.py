"""The sums of a run whose peers trust nobody's word: each comes out of a round of all the run's peers.

    counted gradients -> float, times microbatches / counted -> coded, offered -> certificate -> the stage's own sum

One group holds all peers of the run, whatever their stage (docs/decisions/0015): the run's founder, who is a peer of
some stage, is the first member, nobody has to be admitted anew when it moves, and a stage that has lost all its peers
still has a quorum to let new ones in. What a peer brings is about its own stage alone (stage_reducer).

The state of the group is the same for ever: whether peers have the same parameters is held against their hashes in
every status, as in a run that sums exactly.

Ring: shell.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TypeVar

import torch
import trio
from torch import Tensor

from mycel.node.background import background
from mycel.node.events import EventSink
from mycel.node.rounds.group import Group
from mycel.node.rounds.group_port import Committed, Contribution, GroupPlace, GroupPorts, NeedState, Standing
from mycel.node.rounds.vote_book import Books
from mycel.node.training.ledger import Ledger
from mycel.node.training.stage_reducer import StageReducer, StageSum, weight_of
from mycel.node.training.sum_table import SumTable
from mycel.protocols.errors import PeerError, PeerRefused, RemoteProtocolError, RouteUnavailable
from mycel.protocols.messages import PeerAddress
from mycel.protocols.ports import Compute
from mycel.protocols.training import StageStatus
from mycel.swarm.codecs import Encoder
from mycel.swarm.rounds.terms import genesis
from mycel.swarm.training.actions import Contribute
from mycel.swarm.training.attendance import IDLE_S, brings_nothing
from mycel.swarm.training.bell import Bell
from mycel.swarm.training.lattice import to_float
from mycel.swarm.training.members import Members
from mycel.swarm.training.plan import RunPlan
from mycel.swarm.training.step import RoundFacts

__all__ = ["SCOPE", "RoundSums", "StageTwist", "make_group"]

T = TypeVar("T")

SCOPE = "stages"
# What a member says that brings nothing.
PRESENT = b"\0"
# Who leaves the run waits so long for the others to go on without it.
LEAVE_S = 5.0
FIRST_REST_S, LONGEST_REST_S = 0.5, 8.0

# What is offered in place of an honest vector [P], in experiments that have liars in them.
StageTwist = Callable[[Tensor, int], Tensor]


async def make_group(place: GroupPlace, ports: GroupPorts, reducer: StageReducer, folder: Path) -> Group:
    """The run's group, going on after the last round of which the certificate is in `folder`.

    Raises ConfigError if what is in there cannot be used.
    """
    books = Books.of(folder, genesis(place.run, place.scope, place.founder), ports.disk)
    await books.open()
    newest = books.certificates.newest
    books.close()
    return Group(place, ports, reducer, folder, Standing(_state(place.run), newest))


def _state(run: bytes) -> bytes:
    return hashlib.sha256(b"mycel stage rounds v1" + run).digest()


@dataclass(eq=False)
class _Held:
    """The stage that this peer holds: where its gradients are, where its sums go, and its side of the codec."""

    stage: int
    ledger: Ledger
    table: SumTable
    encoders: list[Encoder]
    encoded: int = -1  # the step that these have encoded last


@dataclass(eq=False)
class RoundSums:
    """One peer's part in the rounds. `attach` first, then `run`; `hold` a stage at a time.

    The first step is made when the group has `begins_with` members. `twist` makes this peer a liar, on purpose.
    """

    plan: RunPlan
    group: Group
    reducer: StageReducer
    compute: Compute
    event: EventSink
    begins_with: int = 1
    twist: StageTwist | None = None
    _members: Members = field(init=False)
    _bell: Bell = field(init=False)
    _describe: Callable[[], StageStatus] = field(init=False)
    _held: _Held | None = field(default=None, init=False)
    # What the newest round that brought a stage anything brought it.
    _brought: dict[int, StageSum] = field(default_factory=dict, init=False)
    _offered: int = field(default=0, init=False)
    _pending: list[Encoder] = field(default_factory=list, init=False)
    _begun: tuple[int, float] = field(default=(0, 0.0), init=False)
    _encoding: trio.Lock = field(default_factory=trio.Lock, init=False)

    def attach(self, members: Members, bell: Bell, describe: Callable[[], StageStatus]) -> None:
        """Whose rounds these are: what it knows of the others, what wakes it, what it says of itself."""
        self._members, self._bell, self._describe = members, bell, describe

    def meet(self, address: PeerAddress) -> None:
        """Speak to this peer from now on."""
        self.group.meet(address)

    def hold(self, stage: int, ledger: Ledger, table: SumTable) -> None:
        """This peer is at another stage now; of the one before nothing is kept."""
        encoders = self.reducer.encoders(stage, self.group.n_shards)
        self._held = _Held(stage, ledger, table, encoders)

    def let_go(self) -> None:
        """Hold no stage."""
        self._held = None

    @property
    def sent_bytes(self) -> int:
        """Statements, bodies and results, to all peers together."""
        return self.group.said_bytes + self.group.given_bytes

    @property
    def facts(self) -> RoundFacts:
        """What decisions about the step need."""
        group = self.group
        has_begun = bool(self._brought) or self._describe().version > 0
        made = (self._brought.get(stage) for stage in range(self.plan.n_stages))
        return RoundFacts(
            group.round,
            group.is_member and (has_begun or len(group.members) >= self.begins_with),
            self._offered >= group.round,
            tuple(-1 if one is None else one.version for one in made),
        )

    # ---- the rounds

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Take part until cancelled. Raises ConfigError if what is on the disk cannot be used."""
        async with background() as tasks:
            await tasks.start(self.group.run)
            task_status.started()
            tasks.start_soon(self._listen)
            tasks.start_soon(self._attend)
            tasks.start_soon(self._follow)
            await trio.sleep_forever()

    async def leave(self) -> None:
        """Have the others go on without this peer, if they do so soon."""
        with trio.move_on_after(LEAVE_S):
            await self.group.leave()

    async def _listen(self) -> None:
        """What has changed in the group may be what one of the peer's tasks waits for."""
        while True:
            seen = self.group.bell.count
            self._bell.ring()
            await self.group.bell.after(seen)

    async def _follow(self) -> None:
        while True:
            match await self.group.committed():
                case NeedState() as need:
                    await self._skip(need)
                case Committed() as committed:
                    await self._settle(committed.round, accepted=committed.accepted)
                    self._note(committed)
                    self.group.applied(_state(self.plan.run))
            self._bell.ring()

    def _note(self, committed: Committed) -> None:
        try:
            brought = self.reducer.read(committed.results)
        except RemoteProtocolError as error:
            # Certified, and the same for all: everybody passes over it.
            self.event("round.refused", round=committed.round, reason=error.reason)
            return
        self._brought |= brought
        stages = {stage: one.version for stage, one in brought.items()}
        self.event("round.brought", round=committed.round, stages=stages, accepted=committed.accepted)

    async def _skip(self, need: NeedState) -> None:
        """The sums of rounds that were missed are had from peers of the stage, as ever."""
        # It may have been taken: what is sent twice does more harm than what is lost.
        await self._settle(need.round, accepted=True)
        rest_s = FIRST_REST_S
        while True:
            try:
                await self.group.resume(need.round, _state(self.plan.run))
            except (RouteUnavailable, PeerError) as error:
                self.event("round.state_failed", round=need.round, reason=str(error))
                await trio.sleep(rest_s)
                rest_s = min(2 * rest_s, LONGEST_REST_S)
            else:
                return

    # ---- what this peer brings

    async def contribute(self, pull: Contribute) -> None:
        """Offer what is counted. Raises PeerRefused, of oneself, if that has changed meanwhile."""
        held, me = self._held, self._members.me
        assert held is not None, "who makes steps holds a stage"
        counted = dict(pull.sources).get(me, 0)
        if not counted:
            await self._say_present(pull.number, "has counted nothing of this step")
            return
        # The codec's memory changes with it: all of it or nothing.
        with trio.CancelScope(shield=True):
            async with self._encoding:
                if self._offered >= pull.number:
                    return
                await self._unsettled(accepted=False)
                bodies = await self._on_compute(partial(self._encode, held, counted, pull.number, self.group.beacon))
                if bodies is None:
                    raise PeerRefused(me, "has counted or taken back something meanwhile")
                self._offered = pull.number
                weight = weight_of(held.stage, counted.bit_count())
                if not await self.group.contribute(Contribution(tuple(bodies), weight), pull.number):
                    await self._unsettled(accepted=False)

    def _encode(self, held: _Held, counted: int, number: int, beacon: bytes) -> list[bytes] | None:
        """On the compute thread."""
        ledger, version, n_shards = held.ledger, held.ledger.version, self.group.n_shards
        sum_P = ledger.partial(version, counted, 0, ledger.n_elements)
        if sum_P is None or version != held.table.version:
            return None
        vector_P = to_float(sum_P).mul_(self.plan.n_microbatches / counted.bit_count())
        if self.twist is not None:
            vector_P = self.twist(vector_P, number)
        if version not in (held.encoded, held.encoded + 1):
            # What was not sent yet belongs to steps that were taken back, or made without us.
            held.encoders = self.reducer.encoders(held.stage, n_shards)
        held.encoded = version
        loss = math.fsum(ledger.losses.values())
        seeds = [
            hashlib.sha256(beacon + self._members.me.encode() + shard.to_bytes(4, "little")).digest()
            for shard in range(n_shards)
        ]
        if not bool(torch.isfinite(vector_P).all()):
            # A liar's: honest sums come from the lattice.
            return [vector_P.numpy().tobytes() for _ in range(n_shards)]
        bodies = self.reducer.encode(held.stage, held.encoders, vector_P, version, loss, seeds)
        self._pending = held.encoders
        return bodies

    async def _settle(self, number: int, *, accepted: bool) -> None:
        """Round `number` is over: the codec learns whether what it made for it was taken."""
        async with self._encoding:
            if self._offered <= number:
                await self._unsettled(accepted=accepted)

    async def _unsettled(self, *, accepted: bool) -> None:
        encoders, self._pending = self._pending, []

        def job() -> None:
            for encoder in encoders:
                encoder.settle(accepted)

        if encoders:
            await self._on_compute(job)

    async def _attend(self) -> None:
        """Say so where this peer brings nothing and others wait for it."""
        while True:
            seen = self._bell.count
            number = self.group.round
            if number != self._begun[0]:
                self._begun = number, trio.current_time()
            if self.group.is_member and (reason := self._absence()):
                await self._say_present(number, reason)
            with trio.move_on_after(IDLE_S):
                await self._bell.after(seen)

    def _absence(self) -> str:
        here = set(self.group.members)
        return brings_nothing(
            self.plan,
            self._members,
            self._describe(),
            self.facts,
            outsiders=any(peer not in here for peer in self.group.present),
            since_s=trio.current_time() - self._begun[1],
        )

    async def _say_present(self, number: int, reason: str) -> None:
        async with self._encoding:
            if self._offered >= number:
                return
            self._offered = number
            if await self.group.contribute(Contribution((), 0, PRESENT), number):
                self.event("round.attended", round=number, reason=reason)

    # ---- what it brought

    async def take(self) -> None:
        """Write what a round has brought this peer's stage into its table."""
        held = self._held
        assert held is not None, "who makes steps holds a stage"
        brought, table = self._brought.get(held.stage), held.table
        if brought is None or brought.version != table.version:
            raise PeerRefused(self._members.me, "is at another step meanwhile")
        try:
            sum_P = await self._on_compute(partial(self.reducer.decode, held.stage, brought))
        except RemoteProtocolError as error:
            # As little use to all the others: another round has to bring it.
            self.event("round.refused", stage=held.stage, reason=error.reason)
            del self._brought[held.stage]
            return
        if brought.version == table.version:
            table.write(0, sum_P)
            table.loss = brought.loss
            self._bell.ring()

    async def _on_compute(self, job: Callable[[], T]) -> T:
        return (await self.compute.run(job)).value
