"""Giving a stage's state to those that come: copies of parameters and optimizer, taken between two steps.

A copy is taken once, however many ask for it, and held while somebody fetches it; training goes on meanwhile. Who
fetches checks every MiB by its hash, so all peers of a stage can give parts of one and the same state.

Ring: shell.
"""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import trio

from mycel.node.events import EventSink
from mycel.node.training.stage_port import StateHolder
from mycel.protocols.codec import state_codec
from mycel.protocols.errors import PeerTimeout, PeerUnreachable, RemoteProtocolError
from mycel.protocols.ids import STATE
from mycel.protocols.messages import MAX_FILE_CHUNK_BYTES
from mycel.protocols.ports import Compute, Stream, Transport
from mycel.protocols.training import (
    MAX_STATE_CHUNKS,
    GetStateChunk,
    NotNow,
    PinState,
    StateChunk,
    StateMessage,
    StateOffer,
)
from mycel.swarm.training.bell import Bell

__all__ = ["PIN_PATIENCE_S", "StateService"]

# How long a question for the state of a later step waits for it.
PIN_PATIENCE_S = 15.0
# A copy gives way to another version if nobody who asked for it is still there, or has asked for so long.
BUSY_S = 10.0
# Streams at once, and questions on each.
MAX_STREAMS = 32
STREAMS_PER_PEER = 4
REQUESTS_PER_STREAM = MAX_STATE_CHUNKS + 64


# (stage, version) -> the state's bytes and the SHA-256 of its parameters, or None if it is not there.
Archive = Callable[[int, int], Awaitable[tuple[memoryview, bytes] | None]]
_BUSY = "as many states as may be held are being fetched"


@dataclass(eq=False, slots=True)
class _Held:
    """A copy of a state after `version` steps, when it was last asked for, and, once it is hashed, its offer."""

    version: int
    data: memoryview
    params: bytes
    used_s: float
    offer: StateOffer | None = None
    # The streams on which it was asked for.
    users: set[int] = field(default_factory=set)


class StateService:
    """Answers for one stage. The stepper awaits `after_step` after every step, before new work begins.

    At most `max_held` versions are held, each for `idle_s` after it was last asked for. Chunks are hashed on `hashing`,
    which in life should be a thread beside the compute thread; by default it is `compute`. What is not the present
    state of this stage may come out of `archive`. Versions that are `always` held are there for those who write
    checkpoints of all stages.
    """

    def __init__(  # noqa: PLR0913 - what it serves, with what, and two bounds
        self,
        transport: Transport,
        plan_run: bytes,
        index: int,
        state: StateHolder,
        compute: Compute,
        event: EventSink,
        *,
        max_held: int = 2,
        idle_s: float = 60.0,
        hashing: Compute | None = None,
        archive: Archive | None = None,
        always: Callable[[int], bool] = lambda _: False,
    ) -> None:
        self._transport, self._run_id, self._index = transport, plan_run, index
        self._state, self._compute, self._hashing = state, compute, hashing or compute
        self._event = event
        self._max_held, self._idle_s = max_held, idle_s
        self._archive, self._always = archive, always
        # (stage, version); of other stages, what came out of the archive
        self._held: dict[tuple[int, int], _Held] = {}
        self._wanted: Counter[int] = Counter()
        self._present = -1
        self._is_whole = True
        self._n_drops = 0
        self._taking, self._describing = trio.Lock(), trio.Lock()
        self._bell = Bell()
        self._streams: Counter[str] = Counter()
        self._n_served = 0
        self.sent_bytes = 0

    @property
    def held(self) -> tuple[int, ...]:
        """The versions that are held."""
        return tuple(sorted(version for stage, version in self._held if stage == self._index))

    async def run(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Answer, and let go of what nobody fetches any more, until cancelled: then all is let go of."""
        self._transport.serve(STATE, self._serve)
        task_status.started()
        try:
            while True:
                seen = self._bell.count
                now = trio.current_time()
                for key in [k for k, held in self._held.items() if held.used_s + self._idle_s <= now]:
                    self._drop(key, "nobody fetches it")
                with trio.move_on_at(min((h.used_s + self._idle_s for h in self._held.values()), default=math.inf)):
                    await self._bell.after(seen)
        finally:
            # In place of a handler that holds this service, and with it the stage.
            self._transport.serve(STATE, _refuse)
            self._held.clear()

    async def after_step(self, version: int) -> None:
        """The state is that after `version` steps, until this returns: copies it if somebody waits for it."""
        if version <= self._present:  # the run has gone back: what is held may be another state than that to come
            self._drop_from(version, "the run has gone back")
        self._present, self._is_whole = version, True
        if version in self._wanted or self._always(version):
            await self._hold(version)
        self._bell.ring()

    def forget(self) -> None:
        """The state was wrong, or is being replaced: give none before the next `after_step`."""
        self._is_whole = False
        self._drop_from(0, "the state is being replaced")

    # ---- copies

    def _drop_from(self, version: int, reason: str) -> None:
        for held in [v for v in self.held if v >= version]:
            self._drop((self._index, held), reason)
        self._n_drops += 1

    def _drop(self, key: tuple[int, int], reason: str) -> None:
        held = self._held.pop(key)
        self._event("state.dropped", stage=key[0], version=key[1], size_bytes=len(held.data), reason=reason)

    async def _find(self, stage: int, version: int) -> _Held | str:
        if stage != self._index:
            return await self._take_out(stage, version)
        held = await self._pin(version)
        if isinstance(held, str) and self._archive is not None and version < self._present:
            return await self._take_out(stage, version)
        return held

    async def _pin(self, version: int) -> _Held | str:
        """The state after `version` steps, waited for if it is not there yet; or why it cannot be had."""
        with self._waiting_for(version), trio.move_on_after(PIN_PATIENCE_S) as patience:
            while (self._index, version) not in self._held:
                seen = self._bell.count
                if await self._reached() >= version:
                    break
                await self._bell.after(seen)
        if patience.cancelled_caught:
            return f"step {version} was not reached within {PIN_PATIENCE_S:.0f} s"
        return await self._hold(version)

    @contextmanager
    def _waiting_for(self, version: int) -> Iterator[None]:
        self._wanted[version] += 1
        try:
            yield
        finally:
            self._wanted[version] -= 1
            if not self._wanted[version]:
                del self._wanted[version]

    async def _reached(self) -> int:
        return (await self._compute.run(lambda: self._state.version)).value

    async def _hold(self, version: int) -> _Held | str:
        """A copy of the present state if it is that of `version` and none is held yet; or why there is none."""
        async with self._taking:
            if (held := self._held.get((self._index, version))) is not None:
                held.used_s = trio.current_time()
                return held
            if not self._is_whole:
                return "the state is being replaced"
            if not self._make_room():
                return _BUSY

            n_drops = self._n_drops

            def copy() -> tuple[memoryview, bytes] | int:
                if self._state.version != version:
                    return self._state.version
                return self._state.snapshot(), self._state.params_digest()

            copied = (await self._compute.run(copy)).value
            if isinstance(copied, int):
                return f"this peer is at step {copied}"
            if self._n_drops != n_drops:
                return "the state was replaced meanwhile"
            return self._keep(self._index, _Held(version, *copied, trio.current_time()))

    async def _take_out(self, stage: int, version: int) -> _Held | str:
        """A state that was written to this machine's disk; or why it cannot be had."""
        async with self._taking:
            if (held := self._held.get((stage, version))) is not None:
                held.used_s = trio.current_time()
                return held
            if self._archive is None:
                return "this peer is of another stage"
            if not self._make_room():
                return _BUSY
            found = await self._archive(stage, version)
            if found is None:
                return f"step {version} of stage {stage} is not on this disk"
            return self._keep(stage, _Held(version, *found, trio.current_time()))

    def _keep(self, stage: int, held: _Held) -> _Held:
        self._held[stage, held.version] = held
        self._event("state.held", stage=stage, version=held.version, size_bytes=len(held.data))
        self._bell.ring()
        return held

    async def _describe(self, held: _Held) -> StateOffer:
        """Hash a copy, once; the stepper does not wait for it."""
        async with self._describing:
            if held.offer is None:
                chunks = (await self._hashing.run(lambda: _hash_chunks(held.data))).value
                held.offer = StateOffer(held.version, len(held.data), held.params, chunks)
            held.used_s = trio.current_time()
            return held.offer

    def _make_room(self) -> bool:
        """Let go of what is not being fetched, the longest unused first; whether one more may be held."""
        busy_s = trio.current_time() - BUSY_S
        while len(self._held) >= self._max_held:
            idle = [held for held in self._held.values() if not held.users or held.used_s <= busy_s]
            if not idle:
                return False
            oldest = min(idle, key=lambda held: held.used_s)
            self._drop(next(key for key, held in self._held.items() if held is oldest), "another is wanted")
        return True

    # ---- answers

    async def _serve(self, stream: Stream) -> None:
        """One stream, until the peer ends it, idles too long or has had its number of requests."""
        if self._streams[stream.peer] >= STREAMS_PER_PEER or self._streams.total() >= MAX_STREAMS:
            return  # an end before any answer: the fetcher asks others
        self._streams[stream.peer] += 1
        self._n_served += 1
        user = self._n_served
        try:
            for _ in range(REQUESTS_PER_STREAM):
                frame = await self._in_time(stream)
                if frame is None:
                    return
                await self._send(stream, await self._answer(stream.peer, frame, user))
        except PeerUnreachable:
            return  # a fetcher may go at any time
        finally:
            for held in self._held.values():
                held.users.discard(user)
            self._streams[stream.peer] -= 1
            if not self._streams[stream.peer]:
                del self._streams[stream.peer]

    async def _in_time(self, stream: Stream) -> memoryview | None:
        with trio.move_on_after(self._idle_s):
            return await stream.receive()
        raise PeerTimeout(stream.peer, f"asked for nothing for {self._idle_s:.0f} s")

    async def _send(self, stream: Stream, answer: StateMessage) -> None:
        parts = state_codec.encode(answer)
        with trio.move_on_after(self._idle_s) as patience:
            await stream.send(*parts)
        if patience.cancelled_caught:
            raise PeerTimeout(stream.peer, f"did not read for {self._idle_s:.0f} s")
        self.sent_bytes += sum(map(len, parts))

    async def _answer(self, peer: str, frame: memoryview, user: int) -> StateMessage:
        try:
            request = state_codec.decode_only(frame)
        except RemoteProtocolError as error:
            raise RemoteProtocolError(error.reason, peer) from None
        if not isinstance(request, PinState | GetStateChunk):
            raise RemoteProtocolError(f"{type(request).__name__} is no request", peer)
        if request.run != self._run_id:
            return NotNow("this peer is of another run")
        if isinstance(request, PinState):
            held = await self._find(request.stage, request.version)
            if isinstance(held, str):
                self._event("state.refused", peer=peer, version=request.version, reason=held)
                return NotNow(held[:400])
            held.users.add(user)
            return await self._describe(held)
        found = self._held.get((request.stage, request.version))
        start = request.index * MAX_FILE_CHUNK_BYTES
        if found is None or start >= len(found.data):
            return NotNow("no such part of a state is held here")
        found.users.add(user)
        found.used_s = trio.current_time()
        return StateChunk(bytes(found.data[start : start + MAX_FILE_CHUNK_BYTES]))


async def _refuse(_: Stream) -> None:
    """A handler that returns ends its stream."""


def _hash_chunks(data: memoryview) -> bytes:
    """The SHA-256 of each MiB, one after the other."""
    starts = range(0, len(data), MAX_FILE_CHUNK_BYTES)
    return b"".join(hashlib.sha256(data[start : start + MAX_FILE_CHUNK_BYTES]).digest() for start in starts)
