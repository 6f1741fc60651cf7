"""The chain of open hops that a session holds: who is in it, which links there are, who of it is lost or leaves.

Ring: shell.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

import trio

from mycel.protocols.errors import one_line
from mycel.protocols.messages import AskProgress, HopFailed
from mycel.swarm.chain import Mend, relinking
from mycel.swarm.control import Control
from mycel.swarm.liveness import Liveness
from mycel.swarm.routing import Hop


@dataclass(eq=False, slots=True)
class OpenChain:
    """Hops in ring order; none before the first chain is set up. `in_flight` counts hops of all sessions, by peer."""

    in_flight: Counter[str]
    liveness: Liveness = field(default_factory=Liveness)
    controls: list[Control] = field(default_factory=list, init=False)
    _counted: tuple[Hop, ...] = field(default=(), init=False)

    @property
    def hops(self) -> tuple[Hop, ...]:
        return tuple(control.hop for control in self.controls)

    @property
    def links(self) -> list[int]:
        """The number of the link into each hop."""
        return [control.inbound for control in self.controls]

    @property
    def leaving(self) -> bool:
        """Whether any hop wants to be replaced."""
        return any(control.leaving for control in self.controls)

    def lost_stretch(self) -> range | None:
        """The first run of neighbouring lost hops, or None; an empty one if there is no chain at all."""
        if not self.controls:
            return range(0)
        lost = [i for i, control in enumerate(self.controls) if control.lost]
        if not lost:
            return None
        end = lost[0] + 1
        while end in lost:
            end += 1
        return range(lost[0], end)

    def blame_neighbour(self, control: Control, what: HopFailed) -> None:
        """Blame the peer that failed, and it alone: a hop's report names its neighbour, not itself."""
        index, n_hops = self.controls.index(control), len(self.controls)
        for neighbour in (self.controls[index - 1], self.controls[(index + 1) % n_hops]):
            if neighbour.peer == what.peer and neighbour is not control:
                neighbour.lost = neighbour.lost or f"failed its neighbour: {one_line(what.reason)}"

    async def splice(self, stretch: range, opened: list[Control], plan: Mend) -> None:
        """Put `opened` in the place of `stretch`, and tell their neighbours."""
        self.controls[stretch.start : stretch.stop] = opened
        self._count(self.hops)
        await self.relink(plan)
        steps = [(control.peer, control.step_s) for control in self.controls]
        self.liveness.begin(trio.current_time(), steps, {control.peer for control in opened})

    async def relink(self, plan: Mend) -> None:
        """Number the links as the plan says, and tell those whom it concerns."""
        for control, inbound in zip(self.controls, plan.links, strict=True):
            control.inbound = inbound
        async with trio.open_nursery() as nursery:
            for index in plan.relinked:
                nursery.start_soon(self.controls[index].tell, relinking(plan.hops, plan.links, index))

    def ask(self, nursery: trio.Nursery) -> None:
        """Ask every hop how far it is, without waiting for those who do not hear."""
        for control in self.controls:
            nursery.start_soon(control.tell, AskProgress())

    def clear(self) -> list[Control]:
        """No chain any more; what it was made of."""
        controls, self.controls = self.controls, []
        self._count(())
        return controls

    def _count(self, hops: tuple[Hop, ...]) -> None:
        """Let this client's other sessions know where this one is at work."""
        self.in_flight.subtract(hop.peer.peer for hop in self._counted)
        self.in_flight.update(hop.peer.peer for hop in hops)
        for peer in {hop.peer.peer for hop in self._counted}:
            if not self.in_flight[peer]:
                del self.in_flight[peer]
        self._counted = hops
