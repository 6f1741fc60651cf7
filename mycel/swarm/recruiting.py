"""Finding peers for blocks of a session and opening hops at them; it remembers who failed.

Ring: shell.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from random import Random
from typing import Protocol

import trio

from mycel.protocols import ids
from mycel.protocols.codec import session_codec
from mycel.protocols.errors import PeerError, PeerRefused, PeerTimeout, RemoteProtocolError, RouteUnavailable
from mycel.protocols.messages import Generation, HopOpened, HopRefused, OpenHop
from mycel.protocols.ports import Transport
from mycel.swarm.chain import Mend, opening
from mycel.swarm.control import Control, dismiss_all
from mycel.swarm.failures import Failures
from mycel.swarm.generation import Request
from mycel.swarm.routing import Chain, Hop, choose_chain
from mycel.swarm.view import View, ranges

# A hop answers its opening at once. So a silent one is left after the time that a silence may take at any other moment,
# or somewhat more where a connection has to be made first; and each time that a peer was left, the next try may take
# twice as long: perhaps it is slow and not silent, and the only one.
OPEN_PATIENCE_S = 2.0
CONNECT_PATIENCE_S = 5.0
OPEN_ROUND_TRIPS = 5.0
MAX_OPEN_PATIENCE_S = 15.0


class ViewSource(Protocol):
    """Where a session learns who serves what."""

    async def view(self, *, fresh: bool = False) -> View:
        """The view of peers alive now; with `fresh`, read from the directory for this call."""
        ...


@dataclass(eq=False, slots=True)
class Recruiter:
    """Chooses and opens hops for one session. `in_flight` counts the hops of all this client's sessions, by peer."""

    transport: Transport
    source: ViewSource
    swarm: bytes
    session_id: bytes
    request: Request
    rng: Random
    in_flight: Counter[str]
    failures: Failures = field(default_factory=Failures)
    _n_links: int = field(default=0, init=False)
    _steps_s: dict[str, float] = field(default_factory=dict, init=False)
    _reading: bool = field(default=False, init=False)

    def new_link(self) -> int:
        """A number that no link of this session had."""
        self._n_links += 1
        return self._n_links

    def note(self, peer: str, reason: str) -> None:
        """A peer failed or refused."""
        self.failures.note(peer, reason, trio.current_time())

    def rtts(self) -> dict[str, float]:
        """The measured round trips to the peers that we are connected to."""
        transport = self.transport
        return {peer: rtt for peer in transport.connected() if (rtt := transport.rtt_s(peer)) is not None}

    async def view(self, *, fresh: bool) -> View:
        """The view at hand or a fresh one; the one at hand also where the directory does not answer just now."""
        if fresh:
            with suppress(PeerError):
                return await self.source.view(fresh=True)
        return await self.source.view()

    async def refresh(self) -> None:
        """Read the directory in the background, so that the view at hand is a new one soon."""
        if self._reading:
            return
        self._reading = True
        try:
            await self.view(fresh=True)
        except PeerError:
            pass  # nobody answers just now: whoever needs a route reads again
        finally:
            self._reading = False

    def choose(self, view: View, hops: Sequence[Hop], stretch: range) -> tuple[range, Chain]:
        """A chain in the place of hops[stretch], or else of all hops (of no hops: the first one); and in whose place.

        All hops, where perhaps only those that are left hold the lost blocks, and one hop cannot be two. Whoever failed
        of late is taken only if there is no other way. Raises RouteUnavailable.
        """
        now = trio.current_time()
        unavailable: RouteUnavailable | None = None
        for failed in (self.failures.avoided(now), self.failures.barred(now)):
            for part in (stretch, range(len(hops))):
                try:
                    return part, self._choose(view, hops, part, failed)
                except RouteUnavailable as error:
                    unavailable = error if part == stretch or unavailable is None else unavailable
        assert unavailable is not None
        raise unavailable

    def is_replaceable(self, view: View, hops: Sequence[Hop], index: int) -> bool:
        """Whether somebody who has not failed of late could take the place of a hop, without its peer."""
        failed = self.failures.avoided(trio.current_time()) | {hops[index].peer.peer}
        for part in (range(index, index + 1), range(len(hops))):
            with suppress(RouteUnavailable):
                self._choose(view, hops, part, failed)
                return True
        return False

    def choose_successors(self, view: View, hops: Sequence[Hop], leaving: Sequence[int]) -> tuple[range, Chain]:
        """For the first of the leaving hops that can be replaced while it works: its place, and who is to take it.

        One hop at a time, since one peer can then be given its state. But not in a way that leaves another leaver
        without a successor: then neighbours that leave are replaced together, if that can be done.

        Raises RouteUnavailable.
        """
        unavailable, found = RouteUnavailable(()), None
        for index in leaving:
            stretch = range(index, index + 1)
            try:
                chain = self._choose_successor(view, hops, stretch)
            except RouteUnavailable as error:
                unavailable = error
                continue
            found = found or (stretch, chain)
            after = [*hops[:index], *chain.hops, *hops[index + 1 :]]
            shift = len(chain.hops) - 1
            if all(self._has_successor(view, after, i + shift if i > index else i) for i in leaving if i != index):
                return stretch, chain
        for stretch in _runs(leaving):
            with suppress(RouteUnavailable):
                return stretch, self._choose_successor(view, hops, stretch)
        if found is None:
            raise unavailable
        return found

    def _has_successor(self, view: View, hops: Sequence[Hop], index: int) -> bool:
        with suppress(RouteUnavailable):
            self._choose_successor(view, hops, range(index, index + 1))
            return True
        return False

    def _choose_successor(self, view: View, hops: Sequence[Hop], stretch: range) -> Chain:
        """A chain in the place of hops that still work: none of theirs, and one peer for all if there is such a one."""
        now = trio.current_time()
        start, end = hops[stretch.start].start, hops[stretch.stop - 1].end
        leaving = frozenset(hops[index].peer.peer for index in stretch)
        whole = view.without([peer.peer for peer in view.peers.values() if not peer.covers(start, end)])
        for failed in (self.failures.avoided(now), self.failures.barred(now)):
            with suppress(RouteUnavailable):
                return self._choose(whole, hops, stretch, failed | leaving)
        return self._choose(view, hops, stretch, self.failures.barred(now) | leaving)

    def _choose(self, view: View, hops: Sequence[Hop], stretch: range, failed: frozenset[str]) -> Chain:
        everything = len(stretch) == len(hops)
        chain = choose_chain(
            view,
            rtts=self.rtts(),
            max_tokens=self.request.max_tokens,
            start=hops[stretch.start].start if hops else 0,
            end=hops[stretch.stop - 1].end if hops else view.n_blocks,
            failed=failed,
            in_chain=frozenset(hop.peer.peer for index, hop in enumerate(hops) if index not in stretch),
            previous=None if everything else hops[stretch.start - 1].peer.peer,
            following=None if everything else hops[stretch.stop % len(hops)].peer.peer,
            load=self.in_flight,
            rng=self.rng,
        )
        self.expect(view, chain)
        return chain

    def expect(self, view: View, chain: Chain) -> None:
        """Remember what a token should take each hop of `chain`, as far as the view knows."""
        for hop in chain.hops:
            if (peer := view.peers.get(hop.peer.peer)) is not None:
                self._steps_s[peer.peer] = peer.overhead_s + (hop.end - hop.start) * peer.block_time_s

    def unavailable(self, error: RouteUnavailable) -> RouteUnavailable:
        """The error with whom we tried and why it came to nothing."""
        told = self.failures.told()
        return RouteUnavailable(error.missing, f"{error}; tried {told}" if told else str(error))

    async def open_all(
        self, plan: Mend, tokens: Sequence[int], *, n_history: int | None = None, giver: str = ""
    ) -> list[Control] | None:
        """Open the new hops side by side; None if any failed (which is noted; the others are closed again).

        A last hop is told `n_history` of the tokens (all, if None), and passes on those after them once more.
        """
        opened: dict[int, Control] = {}
        generation = Generation(
            self.request.sampling, tuple(tokens[:n_history]), self.request.max_tokens, self.request.eos_token_ids
        )

        async def attempt(index: int) -> None:
            message = opening(
                plan, index, self.session_id, self.swarm, self.request.max_tokens, generation, giver=giver
            )
            asked_s = trio.current_time()
            try:
                opened[index] = await self._open(plan.hops[index], message)
            except PeerError as error:
                # From when it was asked: who stayed silent for seconds was waited for, and may be the only one.
                self.failures.note(plan.hops[index].peer.peer, error.reason, asked_s)

        complete = False
        try:
            async with trio.open_nursery() as nursery:
                for index in plan.opened:
                    nursery.start_soon(attempt, index)
            complete = len(opened) == len(plan.opened)
        finally:
            if not complete:  # also when the caller does not want them any more
                await dismiss_all(opened.values())
        return [opened[index] for index in plan.opened] if complete else None

    async def _open(self, hop: Hop, message: OpenHop) -> Control:
        """Open one hop. Raises PeerError if it cannot be reached, refuses, or does not answer in time."""
        address = hop.peer
        self.transport.learn(address.peer, address.addresses)
        patience_s = self._open_patience_s(address.peer)
        with trio.move_on_after(patience_s):
            stream = await self.transport.open(address.peer, ids.SESSION)
            try:
                await stream.send(*session_codec.encode(message))
                frame = await stream.receive()
                answer = session_codec.decode_only(frame) if frame is not None else None
            except BaseException:
                await stream.reset()
                raise
            if isinstance(answer, HopOpened):
                return Control(hop, stream, self._steps_s.get(address.peer, 0.0), inbound=message.inbound)
            await stream.reset()
            if isinstance(answer, HopRefused):
                raise PeerRefused(address.peer, answer.reason)
            raise RemoteProtocolError("did not answer the opening of a session", address.peer)
        raise PeerTimeout(address.peer, f"did not open the session within {patience_s:.0f} s")

    def _open_patience_s(self, peer: str) -> float:
        rtt_s, failure = self.transport.rtt_s(peer), self.failures.by_peer.get(peer)
        once_s = CONNECT_PATIENCE_S if rtt_s is None else max(OPEN_PATIENCE_S, OPEN_ROUND_TRIPS * rtt_s)
        return min(once_s * 2.0 ** min(failure.count if failure else 0, 4), MAX_OPEN_PATIENCE_S)


def _runs(indices: Sequence[int]) -> list[range]:
    """Neighbouring indices as ranges, those of more than one."""
    return [range(start, end) for start, end in ranges(sorted(indices)) if end - start > 1]
