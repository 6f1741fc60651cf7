"""Taking up a stage while its peers go on: fetch a state, make the steps made meanwhile, compare, be one of them.

While the state of one version comes from several peers, the sum of every step from that version on is collected. Loaded
and stepped forward, the parameters must have the hash that the stage's peers say; if not, or if the steps are faster
than their sums can be had, it begins again with a newer version, a bounded number of times.

Ring: shell.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Protocol

import trio
from torch import Tensor

from mycel.node.background import background
from mycel.node.events import EventSink
from mycel.node.training.stage_port import StateHolder
from mycel.node.training.state_fetch import MAX_DONORS, FetchedState, fetch_state
from mycel.protocols.errors import PeerError, PeerRefused, PeerTimeout, RemoteProtocolError, VerificationError
from mycel.protocols.ports import Compute, Transport
from mycel.swarm.training.bell import Bell
from mycel.swarm.training.members import SILENT_S, Member, Members

__all__ = ["MAX_ATTEMPTS", "FetchSum", "Joined", "Joiner"]

MAX_ATTEMPTS = 6
FIRST_REST_S = 0.5
LONGEST_REST_S = 8.0
# A run that steps while it is asked is asked for a version that it has yet to reach, so that all can copy it.
AHEAD = 2
# Peers keep the sums of the last two steps.
KEPT_SUMS = 2
SUM_TRIES = 8
SUM_REST_S = 0.25
# The sums that wait for the state may take so many times its size, or this if that is more.
SUMS_SHARE = 4
SUMS_BYTES = 256 << 20
# Of so many versions it is remembered what peers said their parameters were.
REMEMBERED = 64


class FetchSum(Protocol):
    """The sum that a step of the stage applied and its scale, checked for shape and finiteness. Raises PeerError."""

    async def __call__(self, version: int, /) -> tuple[Tensor, float]: ...


@dataclass(frozen=True, slots=True)
class Joined:
    """The state is loaded, and is that after `version` steps. `fetched` bytes came `by_peer`, then `steps` were made.

    `confirmed`: the stage's peers say the same of its parameters; else nobody is left who could.
    """

    version: int
    by_peer: Mapping[str, int]
    steps: int
    attempts: int
    confirmed: bool


@dataclass(eq=False)
class Joiner:
    """Takes up `stage`. `bell` is rung whenever `members` changes; `fetch_sum` asks the stage's peers."""

    transport: Transport
    stage: int
    state: StateHolder
    compute: Compute
    members: Members
    bell: Bell
    fetch_sum: FetchSum
    event: EventSink
    # version -> peer -> the hash of its parameters
    said: dict[int, dict[str, bytes]] = field(default_factory=dict, init=False)
    sums: dict[int, tuple[Tensor, float]] = field(default_factory=dict, init=False)
    suspects: set[str] = field(default_factory=set, init=False)
    steps: int = field(default=0, init=False)
    size_bytes: int = field(default=0, init=False)

    async def run(self) -> Joined:
        """Load into `state` what the stage's peers have, of their present version or the one before.

        Raises PeerError with the last reason if that fails MAX_ATTEMPTS times; what is in `state` then counts for
        nothing.
        """
        self.size_bytes = (await self.compute.run(lambda: self.state.size_bytes)).value
        async with background() as tasks:
            tasks.start_soon(self._listen)
            joined = await self._try_often()
        return joined  # noqa: RET504 - a return inside the block, and the type checker misses one behind it

    async def _try_often(self) -> Joined:
        ahead = 0
        for attempt in range(1, MAX_ATTEMPTS + 1):
            before = self._newest()
            try:
                return await self._attempt(attempt, before + ahead)
            except PeerError as error:
                self.event("state.retry", stage=self.stage, attempt=attempt, reason=str(error))
                if attempt == MAX_ATTEMPTS:
                    raise
            await trio.sleep(min(FIRST_REST_S * 2 ** (attempt - 1), LONGEST_REST_S))
            ahead = min(ahead + 1, AHEAD) if self._newest() > before else 0
        raise AssertionError("the last attempt returns or raises")

    async def _attempt(self, attempt: int, version: int) -> Joined:
        """One version from the question for it to the comparison. Raises PeerError."""
        donors = [(member.peer, member.version) for member in self._mates() if member.peer not in self.suspects]
        if not donors:  # nobody else has anything
            donors = [(member.peer, member.version) for member in self._mates()]
        self.sums.clear()
        self.steps = 0
        async with background() as tasks:
            tasks.start_soon(self._collect, version)
            fetched = await fetch_state(
                self.transport,
                self.members.run,
                self.stage,
                donors,
                self.event,
                fits=lambda size_bytes: size_bytes == self.size_bytes,
                version=version,
                expected=self._expected,
                # A run that steps on may have given the version to the last few only; at last a single one will do.
                least=(min(len(donors), MAX_DONORS) + 1) // 2 if attempt <= MAX_ATTEMPTS // 2 else 1,
            )
            try:
                confirmed = await self._take_up(fetched)
            except VerificationError:
                self.suspects |= set(fetched.by_peer)
                raise
        made = fetched.version + self.steps
        self.event("state.joined", stage=self.stage, version=made, fetched=fetched.version, donors=len(fetched.by_peer))
        return Joined(made, fetched.by_peer, self.steps, attempt, confirmed)

    # ---- what the others say

    def _mates(self) -> tuple[Member, ...]:
        """Who has the stage's state."""
        having = self.members.of_stage(self.stage, "training", "leaving", "observing")
        return tuple(member for member in having if member.peer != self.members.me)

    def _newest(self) -> int:
        """The newest version that they have: of one alone, at most a step more than the next of them."""
        versions = sorted(member.version for member in self._mates())
        return min(versions[-1], versions[-2] + 1) if len(versions) > 1 else max(versions, default=0)

    async def _listen(self) -> None:
        """Note every status: the next replaces it."""
        while True:
            seen = self.bell.count
            self._note()
            await self.bell.after(seen)

    def _note(self) -> None:
        """What everybody says of its parameters now."""
        for member in self._mates():
            if member.status.params:
                self.said.setdefault(member.version, {})[member.peer] = member.status.params
        for version in sorted(self.said)[:-REMEMBERED]:
            del self.said[version]

    def _expected(self, version: int) -> bytes:
        """The hash that most peers say, of equally many that of the smallest id; b"" if nobody has said one."""
        self._note()
        said = self.said.get(version, {})
        counts = Counter(said.values())
        return max((said[peer] for peer in sorted(said)), key=counts.__getitem__, default=b"")

    # ---- sums

    async def _collect(self, version: int) -> None:
        """Fetch the sum of every step from `version` on as soon as it is made. Raises PeerError if one is lost."""
        tries = 0
        while True:
            seen = self.bell.count
            if self._newest() <= version:
                await self.bell.after(seen)
                continue
            try:
                sum_P, scale = await self.fetch_sum(version)
                if not 0.0 < scale <= 1.0:
                    raise PeerRefused("", f"nobody says how step {version} was scaled")
            except PeerError as error:
                tries += 1
                if tries >= SUM_TRIES or self._newest() - version > KEPT_SUMS:
                    raise PeerRefused(error.peer, f"the sum of step {version} cannot be had: {error.reason}") from None
                await trio.sleep(SUM_REST_S)
                continue
            self.sums[version] = sum_P, scale
            held_bytes = sum(held_P.nbytes for held_P, _ in self.sums.values())
            if held_bytes > max(SUMS_SHARE * self.size_bytes, SUMS_BYTES):
                raise PeerRefused("", f"{len(self.sums)} steps were made while the state came: more than fit in memory")
            version, tries = version + 1, 0
            self.bell.ring()

    # ---- the state

    async def _take_up(self, fetched: FetchedState) -> bool:
        """Load it, make the steps, compare; whether anybody confirms it. Raises PeerError."""
        try:
            await self.compute.run(partial(self.state.load, fetched.data, fetched.version))
        except RemoteProtocolError as error:
            raise VerificationError(_first(fetched), f"gave a state that cannot be: {error.reason}") from None
        if await self._digest() != fetched.digest:
            raise VerificationError(_first(fetched), "gave a state that has not the parameters that it offered")
        version, confirmed = fetched.version, False
        silent_at = trio.current_time() + SILENT_S
        while True:
            seen = self.bell.count
            if (step := self.sums.pop(version, None)) is not None:
                await self.compute.run(partial(self.state.apply, *step))
                version, confirmed = version + 1, False
                self.steps += 1
                silent_at = trio.current_time() + SILENT_S
            if not confirmed and (expected := self._expected(version)):
                confirmed = await self._digest() == expected
                if not confirmed and 2 * list(self.said[version].values()).count(expected) > len(self._mates()):
                    raise VerificationError(_first(fetched), f"gave a state that is not its stage's at step {version}")
            newest = self._newest()
            if not self._mates() or (confirmed and newest - version <= 1):
                return confirmed
            if version in self.sums:
                continue
            with trio.move_on_at(silent_at) as patience:
                await self.bell.after(seen)
            if patience.cancelled_caught:
                raise PeerTimeout("", f"nobody confirms the state after {version} steps; the stage is at {newest}")

    async def _digest(self) -> bytes:
        return (await self.compute.run(self.state.params_digest)).value


def _first(fetched: FetchedState) -> str:
    """Who is named for a state that all of them gave alike."""
    return min(fetched.by_peer, default="")
