"""Where a peer gets the state of its stage from: its stage's peers, this machine's disk, others' disks, the beginning.

Ring: shell.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import trio
from torch import Tensor

from mycel.node.events import EventSink
from mycel.node.training.state_fetch import fetch_state
from mycel.node.training.state_join import Joiner
from mycel.node.training.state_service import StateService
from mycel.node.training.sums import SumClient
from mycel.node.training.workshop_port import Holding, Workshop
from mycel.protocols.errors import PeerError
from mycel.protocols.ports import Compute, Transport
from mycel.swarm.training.bell import Bell
from mycel.swarm.training.members import Member, Members
from mycel.swarm.training.plan import RunPlan

__all__ = ["StateSource"]


@dataclass(eq=False, slots=True)
class StateSource:
    """For one stage that is held. `took_s` is how long the state took when it last came from the stage's peers."""

    transport: Transport
    plan: RunPlan
    members: Members
    bell: Bell
    compute: Compute
    event: EventSink
    holding: Holding
    workshop: Workshop
    states: StateService
    client: SumClient
    took_s: float = 0.0

    async def fetch(self, version: int | None) -> int:
        """As stepping's `FetchState` has it."""
        state, stage = self.holding.state, self.holding.stage.index
        self.states.forget()  # what is held may be wrong, and what is here is half of one state and half of another
        mates = [
            m for m in self.members.of_stage(stage, "training", "observing", "leaving") if m.peer != self.members.me
        ]
        # Who is back before all others may have lost its disk: what is on ours may be newer than what they have.
        if version is None and max((m.version for m in mates), default=-1) >= self.workshop.kept:
            await self._join()
        else:
            await self.workshop.restore(self.holding, version)
            await self._take_newer(mates, version)
            self.event("stage.restored", stage=stage, version=state.version)
        await self.states.after_step(state.version)
        return state.version

    async def _join(self) -> None:
        stage, began_s = self.holding.stage.index, trio.current_time()
        joiner = Joiner(
            self.transport,
            stage,
            self.holding.state,
            self.compute,
            self.members,
            self.bell,
            self._fetch_sum,
            self.event,
        )
        joined = await joiner.run()
        self.took_s = trio.current_time() - began_s
        self.event("stage.joined", stage=stage, version=joined.version, attempts=joined.attempts, steps=joined.steps)

    async def _fetch_sum(self, version: int, /) -> tuple[Tensor, float]:
        stage = self.holding.stage
        others = [m for m in self.members.of_stage(stage.index) if m.peer != self.members.me]
        # Those who have made the step first: they know its scale.
        peers = [m.peer for m in sorted(others, key=lambda m: m.version <= version)]
        given = await self.client.fetch_sum(peers, stage.index, version, 0, stage.n_elements, tied=True)
        return given.values_N, given.scale

    async def _take_newer(self, mates: Sequence[Member], version: int | None) -> None:
        """What others have that is newer than what was here: peers of the stage, or who keeps all stages on its disk.

        Raises PeerError if it was a peer of the stage that did not give it.
        """
        here = self.holding.state.version
        if donors := [(m.peer, m.version) for m in mates if version is not None and here < m.version <= version]:
            await self._take(donors)
            return
        kept = [(m.peer, m.status.whole) for m in self.members if m.peer != self.members.me and m.status.whole > here]
        newest = max((whole for _, whole in kept if version is None or whole <= version), default=0)
        if not newest:
            return
        try:
            await self._take([(peer, newest) for peer, whole in kept if whole >= newest])
        except PeerError as error:
            self.event("state.failed", peer=error.peer, version=newest, reason=error.reason)

    async def _take(self, donors: Sequence[tuple[str, int]]) -> None:
        state, size_bytes = self.holding.state, self.holding.state.size_bytes
        fetched = await fetch_state(
            self.transport,
            self.plan.run,
            self.holding.stage.index,
            donors,
            self.event,
            fits=lambda offered_bytes: offered_bytes == size_bytes,
        )
        await self.compute.run(partial(state.load, fetched.data, fetched.version))
        # On our own disk, too: what others may go back to is what peers say they have there.
        await self.workshop.store(self.holding, fetched.version, fetched.data)
