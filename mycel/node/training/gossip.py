"""Every peer of a run tells every other how far it is: one stream to each, on which the newest status goes.

What others wait for goes at once; that one more microbatch is counted can wait a moment, so that many go together. Who
cannot be reached is tried again ever more seldom, and forgotten at last; the directory names it again if it is there.

Ring: shell.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

import msgspec
import trio

from mycel.node.events import EventSink
from mycel.protocols.codec import train_codec
from mycel.protocols.errors import PeerError, PeerRefused, PeerTimeout
from mycel.protocols.ids import TRAIN
from mycel.protocols.messages import PeerAddress
from mycel.protocols.ports import Stream, Transport
from mycel.protocols.training import StageStatus
from mycel.swarm.training.bell import Bell
from mycel.swarm.training.members import HEARTBEAT_S, MAX_MEMBERS, SILENT_S, Members, check_status
from mycel.swarm.training.plan import RunPlan

# Between two statuses to one peer if nothing but numbers have changed, for each peer there is, and at least.
GAP_S, LEAST_GAP_S, LONGEST_GAP_S = 0.01, 0.05, 1.0
FIRST_REST_S, LONGEST_REST_S = 1.0, 8.0
# Who refuses the protocol is no peer of a run; who is unreachable for so many tries in a row may be gone for good.
REFUSED_REST_S = 60.0
MAX_FAILURES = 12
# Statuses taken from one peer: so many at once, and then so many a second. More wait in the stream.
BURST, PER_SECOND = 50, 50.0
SEND_PATIENCE_S = 10.0


@dataclass(eq=False)
class Gossip:
    """`describe` gives this peer's status as of now; its `seq` is set here.

    `members` is kept, oneself included, and `bell` rung when something in it has changed that somebody may wait for.
    """

    transport: Transport
    plan: RunPlan
    members: Members
    describe: Callable[[], StageStatus]
    bell: Bell
    event: EventSink
    unix_time_s: Callable[[], float] = time.time
    _current: StageStatus | None = field(default=None, init=False)
    _changed: Bell = field(default_factory=Bell, init=False)
    # Whom we speak to; rung to try again at once.
    _known: dict[str, Bell] = field(default_factory=dict, init=False)
    _meetings: list[str] = field(default_factory=list, init=False)
    _met: Bell = field(default_factory=Bell, init=False)
    # The listening to each peer's newest stream; to an older one nobody listens.
    _listening: dict[str, trio.CancelScope] = field(default_factory=dict, init=False)
    _seq: int = field(default=0, init=False)

    async def run(self) -> None:
        """Speak and listen until cancelled."""
        # A peer that was started again is believed only with higher numbers than in its life before.
        self._seq = int(self.unix_time_s() * 1e6)
        self.transport.serve(TRAIN, self._listen)
        self.say()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._beat)
            nursery.start_soon(self._look)
            while True:
                seen = self._met.count
                for peer in self._meetings:
                    nursery.start_soon(self._tell, peer)
                self._meetings.clear()
                await self._met.after(seen)

    def meet(self, address: PeerAddress) -> None:
        """Speak to this peer from now on."""
        if address.addresses:
            self.transport.learn(address.peer, address.addresses)
        if address.peer == self.members.me or address.peer in self._known or len(self._known) >= MAX_MEMBERS:
            return
        self._known[address.peer] = Bell()
        self._meetings.append(address.peer)
        self._met.ring()

    def say(self) -> None:
        """Something that others wait for may have changed: look, and tell them. Before `run` nobody is told."""
        if self._seq:
            self._describe(only_changes=True)

    def _describe(self, *, only_changes: bool) -> None:
        before, status = self._current, msgspec.structs.replace(self.describe(), seq=self._seq + 1)
        is_news = before is None or _matters(before) != _matters(status)
        if only_changes and not is_news:
            return
        self._seq = status.seq
        self._current = status
        self.members.hear(self.members.me, status, trio.current_time())
        self._changed.ring()
        if is_news:
            self.bell.ring()

    async def _look(self) -> None:
        """Whoever rings the bell may have changed what is to be said."""
        while True:
            seen = self.bell.count
            self.say()
            await self.bell.after(seen)

    async def _beat(self) -> None:
        """Say that we live, and notice who does not."""
        while True:
            await trio.sleep(HEARTBEAT_S)
            self._describe(only_changes=False)
            silent = self.members.expire(trio.current_time())
            for peer in silent:
                self.event("peer.lost", peer=peer, reason=f"has said nothing for {SILENT_S:.0f} s")
            if silent:
                self.bell.ring()

    # ---- speaking

    async def _tell(self, peer: str) -> None:
        """Keep one peer informed for as long as it is there."""
        failures, again = 0, self._known[peer]
        while failures < MAX_FAILURES:
            seen, began_s, rest_s = again.count, trio.current_time(), REFUSED_REST_S
            try:
                await self._tell_once(peer)
            except PeerRefused as refusal:
                self.event("peer.refused", peer=peer, reason=refusal.reason)
                failures += 1
            except PeerError as error:
                has_worked = trio.current_time() - began_s > LONGEST_REST_S
                failures = 1 if has_worked else failures + 1
                rest_s = 0.0 if has_worked else min(FIRST_REST_S * 2 ** (failures - 1), LONGEST_REST_S)
                if failures == 1:
                    self.event("peer.unreachable", peer=peer, reason=error.reason)
            with trio.move_on_after(rest_s):
                await again.after(seen)
        del self._known[peer]

    async def _tell_once(self, peer: str) -> None:
        """Raises PeerError in the end."""
        stream = await self.transport.open(peer, TRAIN)
        try:
            await self._tell_on(stream)
        finally:
            with trio.CancelScope(shield=True):
                await stream.aclose()

    async def _tell_on(self, stream: Stream) -> None:
        """Send each newest status; returns never. Raises PeerError."""
        sent: StageStatus | None = None
        sent_s = 0.0
        while True:
            seen, status = self._changed.count, self._current
            assert status is not None
            wait_s = 0.0
            if sent is not None and _urgent(sent) == _urgent(status):
                gap_s = min(max(LEAST_GAP_S, GAP_S * len(self._known)), LONGEST_GAP_S)
                wait_s = sent_s + gap_s - trio.current_time()
            if status is sent or wait_s > 0:
                # Until something urgent comes, or the gap is over.
                with trio.move_on_after(wait_s if status is not sent else 2 * HEARTBEAT_S):
                    await self._changed.after(seen)
                continue
            with trio.move_on_after(SEND_PATIENCE_S) as patience:
                await stream.send(*train_codec.encode(status))
            if patience.cancelled_caught:
                raise PeerTimeout(stream.peer, "takes in nothing")
            sent, sent_s = status, trio.current_time()

    # ---- listening

    async def _listen(self, stream: Stream) -> None:
        """One peer's statuses, until its stream ends: then it is gone, unless it speaks on another already."""
        peer, reason = stream.peer, "ended its stream"
        if (older := self._listening.get(peer)) is not None:
            older.cancel()
        elif len(self._listening) >= MAX_MEMBERS:
            return
        with trio.CancelScope() as scope:
            self._listening[peer] = scope
            try:
                await self._hear(stream)
            except PeerError as error:
                reason = error.reason
                raise
            finally:
                if self._listening.get(peer) is scope:
                    del self._listening[peer]
                    self._lose(peer, reason)

    def _lose(self, peer: str, reason: str) -> None:
        if self.members.lose(peer):
            self.event("peer.lost", peer=peer, reason=reason)
            self.bell.ring()

    async def _hear(self, stream: Stream) -> None:
        peer, allowed, at_s = stream.peer, float(BURST), trio.current_time()
        while (frame := await stream.receive()) is not None:
            now = trio.current_time()
            allowed, at_s = min(BURST, allowed + (now - at_s) * PER_SECOND) - 1, now
            if allowed < 0:
                await trio.sleep(1 / PER_SECOND)
            status = check_status(train_codec.decode_only(frame), self.plan, peer)
            before = self.members.hears(peer)
            if not self.members.hear(peer, status, trio.current_time()):
                continue
            if before is None:
                self.event("peer.heard", peer=peer, stage=status.stage, state=status.state, version=status.version)
                self.meet(PeerAddress(peer, status.addresses))
                if peer in self._known:
                    self._known[peer].ring()
            if before is None or _matters(before.status) != _matters(status):
                self.bell.ring()


def _matters(status: StageStatus) -> StageStatus:
    """What a task may wait for."""
    return msgspec.structs.replace(status, seq=0, queue_s=0.0, sequences_per_s=0.0, sent_bytes=0)


def _urgent(status: StageStatus) -> StageStatus:
    return msgspec.structs.replace(_matters(status), counted=b"")
