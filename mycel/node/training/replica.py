"""A peer that holds all of what its group trains: works alone for a round, contributes, applies what all certified.

    work from the shared state -> contribution -> coded, offered -> certificate -> applied by all alike -> work

What is shared, and how work becomes a contribution, is the method's affair (swarm/methods); who contributed, and what
came of it, the group's (node/rounds); when this peer works, and for how long, its own (own_work.py). Here is what
becomes of the shared state: results are applied in their order, the state is on disk before anybody hears of it, and
who has missed too much fetches it from others.

Ring: shell.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TypeVar

import trio
from torch import Tensor

from mycel.node.background import background
from mycel.node.events import EventSink
from mycel.node.rounds.group import Group
from mycel.node.rounds.group_port import Committed, NeedState
from mycel.node.training.outgoing import Outgoing
from mycel.node.training.own_work import OwnWork
from mycel.node.training.scoped_reducer import ScopedReducer
from mycel.node.training.shared_state import SharedHolder, save_shared
from mycel.node.training.state_fetch import fetch_state
from mycel.node.training.state_service import StateService
from mycel.node.training.work_port import Work
from mycel.protocols.errors import PeerError, RemoteProtocolError, VerificationError
from mycel.protocols.ports import Compute, Transport
from mycel.swarm.methods.method import Method
from mycel.swarm.training.bell import Bell

__all__ = ["Applied", "Kept", "Replica", "ReplicaPorts"]

T = TypeVar("T")

FIRST_REST_S, LONGEST_REST_S = 0.5, 16.0


@dataclass(frozen=True, slots=True)
class Applied:
    """A result that this peer has applied: `version` results are behind the run now, and `digest` is the state's.

    `loss` is this peer's own, of a target token, in the inner steps that it made for the round (None: it made none).
    `accepted`: they are in it. `contributors` of `members` had theirs in it.
    """

    version: int
    round: int
    digest: bytes
    loss: float | None
    accepted: bool
    contributors: int
    members: int
    seconds: float


@dataclass(frozen=True, slots=True)
class Kept:
    """Where the shared state is kept between two lives, and who else wants it: `after_round` is awaited after each."""

    path: Path
    holder: SharedHolder
    states: StateService
    after_round: Callable[[int], Awaitable[None]] | None = None


@dataclass(frozen=True, slots=True)
class ReplicaPorts:
    """What a replica works with. `disk` writes files."""

    transport: Transport
    compute: Compute
    disk: Compute
    event: EventSink


def _ignore(_: object) -> None:
    """For who does not listen."""


@dataclass(eq=False)
class Replica:
    """One peer's part. `run` until the run is over (`n_rounds` results) and for ever after: others may still come.

    A peer without `work` looks on; `shown_P` is then what it answers inference with, and follows the shared parameters.
    """

    ports: ReplicaPorts
    group: Group
    method: Method
    reducer: ScopedReducer
    outgoing: Outgoing
    kept: Kept
    n_rounds: int
    work: Work | None = None
    shown_P: Tensor | None = None  # noqa: N815 - its shape
    on_applied: Callable[[Applied], None] = _ignore
    bell: Bell = field(default_factory=Bell, init=False)
    ready: trio.Event = field(default_factory=trio.Event, init=False)
    own: OwnWork | None = field(default=None, init=False)
    _applied_s: float = field(default=0.0, init=False)

    def __post_init__(self) -> None:
        self.reducer.version = self.version
        if self.work is not None:
            ports = self.ports
            self.own = OwnWork(
                self.group,
                self.method,
                self.work,
                self.outgoing,
                ports.compute,
                ports.event,
                ports.transport.peer_id,
                self.n_rounds,
                self.bell,
            )

    @property
    def version(self) -> int:
        """Results that the shared state has taken."""
        return self.method.state.version

    async def run(self) -> None:
        """Take part until cancelled. Raises ConfigError for a disk that does not take what has to be kept."""
        self._applied_s = trio.current_time()
        if self.own is None:
            self.group.look_on()
            await self._on_compute(self._show)
        async with background() as tasks:
            await tasks.start(self.group.run)
            await tasks.start(self.kept.states.run)
            self.ready.set()
            tasks.start_soon(self._listen)
            tasks.start_soon(self._apply_all)
            if self.own is not None:
                tasks.start_soon(self.own.run)
            await trio.sleep_forever()

    async def leave(self) -> None:
        """Have the others go on without this peer, if there are any who still train."""
        others = self.group.present & set(self.group.members)
        if self.group.is_member and others and self.version < self.n_rounds:
            await self.group.leave()

    async def _listen(self) -> None:
        """What has changed in the group may be what one of our tasks waits for."""
        while True:
            seen = self.group.bell.count
            self.bell.ring()
            await self.group.bell.after(seen)

    # ---- what others certified

    async def _apply_all(self) -> None:
        while True:
            match await self.group.committed():
                case NeedState() as need:
                    await self._take_state(need)
                case Committed() as committed:
                    while self.own is not None and self.own.holds:
                        await self.bell.after(self.bell.count)
                    await self._apply(committed)

    async def _apply(self, committed: Committed) -> None:
        outcome, number, own = committed.certificate.outcome, committed.round, self.own
        worked = None if own is None else await own.decided(number, accepted=committed.accepted)
        if refused := await self._on_compute(partial(self._take, committed)):
            self.ports.event("round.refused", round=number, reason=refused)
        digest = await self._keep(number)
        now, was_member = trio.current_time(), self.group.is_member
        self.group.applied(digest)
        self.reducer.version = self.version
        seconds, self._applied_s = now - self._applied_s, now
        n_contributors, n_members = len(outcome.contributors), len(outcome.members)
        if any(committed.results):
            loss = None if worked is None else worked.loss
            self.on_applied(
                Applied(self.version, number, digest, loss, committed.accepted, n_contributors, n_members, seconds)
            )
            if own is not None and was_member:
                own.measure(seconds, accepted=committed.accepted)
        self.ports.event("round.done", round=number, version=self.version, contributors=n_contributors)
        self.bell.ring()

    def _take(self, committed: Committed) -> str:
        """Apply a result; why it moves nothing, if it does not. Certified as it is, everybody passes over it."""
        self.kept.holder.version = committed.round
        if not any(committed.results):
            return ""
        method, refused = self.method, ""
        try:
            result_S = self.reducer.now.decode(committed.results)
            method.apply(method.state.version, result_S, len(committed.certificate.outcome.contributors))
        except RemoteProtocolError as error:
            method.state.version += 1
            refused = error.reason
        self._show()
        return refused

    def _show(self) -> None:
        if self.own is None and self.shown_P is not None:
            self.shown_P.copy_(self.method.state.theta_P)

    async def _keep(self, number: int) -> bytes:
        """The shared state is that after round `number`: on disk before others hear of it, and there for newcomers."""
        state, kept = self.method.state, self.kept
        digest, snapshot = await self._on_compute(lambda: (state.digest(), state.snapshot()))
        await self.ports.disk.run(partial(save_shared, kept.path, number, snapshot))
        await self.group.saved(number)
        await kept.states.after_step(number)
        if kept.after_round is not None:
            await kept.after_round(number)
        return digest

    # ---- what was missed

    async def _take_state(self, need: NeedState) -> None:
        """From peers that are ahead; the group then goes on from there."""
        self.ports.event("round.state", round=need.round, reason=need.reason)
        rest_s, ahead = FIRST_REST_S, 0
        while True:
            number, peers, expected = self._givers(need)
            try:
                # In quick rounds the state that was said is gone when we ask: every other time that to come is asked.
                await self._fetch(number + ahead, peers, expected if not ahead else b"")
                return
            except PeerError as error:
                self.ports.event("round.state_failed", round=number + ahead, peer=error.peer, reason=error.reason)
            ahead = 1 - ahead
            await trio.sleep(rest_s)
            rest_s = min(2 * rest_s, LONGEST_REST_S)

    def _givers(self, need: NeedState) -> tuple[int, list[str], bytes]:
        """The newest state that is said by now: the round it is after, who has it, and what most say that it is."""
        said = {peer: (number, state) for peer, (number, state) in self.group.states.items() if number >= need.round}
        if not said:
            return need.round, list(need.peers), _most(list(need.states.values()))
        newest = max(number for number, _ in said.values())
        peers = sorted(peer for peer, (number, _) in said.items() if number == newest)
        return newest, peers, _most([said[peer][1] for peer in peers])

    async def _fetch(self, number: int, peers: list[str], expected: bytes) -> None:
        """Go on from the state after round `number`. Raises PeerError if it cannot be had."""
        ports, size_bytes = self.ports, self.method.state.size_bytes
        fetched = await fetch_state(
            ports.transport,
            self.group.place.run,
            0,
            [(peer, number) for peer in peers],
            ports.event,
            fits=lambda size: size == size_bytes,
            version=number,
            expected=lambda _: expected,
        )
        self.kept.states.forget()
        digest = await self._on_compute(partial(self._load, fetched.data, fetched.digest, number))
        await self.group.resume(number, digest)
        self.reducer.version = self.version
        if self.own is not None:
            self.own.replaced()
        self.bell.ring()
        await self._keep(number)
        self._applied_s = trio.current_time()
        self.ports.event("round.state_taken", round=number, version=self.version)
        self.bell.ring()

    def _load(self, data: memoryview, said: bytes, number: int) -> bytes:
        """Raises RemoteProtocolError for what is no state, VerificationError for another than was said."""
        self.method.state.load(data)
        self.kept.holder.version = number
        self._show()
        digest = self.method.state.digest()
        if digest != said:
            raise VerificationError("", "the state that was fetched is another than its givers said")
        return digest

    async def _on_compute(self, job: Callable[[], T]) -> T:
        return (await self.ports.compute.run(job)).value


def _most(states: list[bytes]) -> bytes:
    """What most peers say that the state is."""
    return Counter(states).most_common(1)[0][0] if states else b""
