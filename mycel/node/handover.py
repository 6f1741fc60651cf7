"""A session's state on its way from a leaving hop to its successor: keys, values, and the outputs for its log.

The giver pushes what it has at one moment and goes on computing; whatever it computes after that, the successor gets
from its neighbour as history. The taker begins with all of the state or with nothing of it.

Ring: shell.
"""

from __future__ import annotations

from collections.abc import Awaitable, Iterator
from dataclasses import dataclass, field
from itertools import chain
from typing import TYPE_CHECKING, TypeVar

import torch
import trio
from torch import Tensor

from mycel.node.hop_links import Logged
from mycel.node.span_port import StateIntake, StatePiece
from mycel.protocols import hop, ids
from mycel.protocols.codec import handover_codec
from mycel.protocols.errors import PeerError, PeerRefused, PeerTimeout, RemoteProtocolError
from mycel.protocols.hop import OutputLog
from mycel.protocols.messages import (
    GiveState,
    HandedOver,
    Message,
    PeerAddress,
    StatePart,
    StateRefused,
    StateTaken,
)
from mycel.protocols.ports import Stream
from mycel.protocols.tensors import from_wire, to_wire
from mycel.protocols.wire import WireTensor
from mycel.swarm.handover import RateMeter, plan_handover
from mycel.swarm.placement import show_bytes

if TYPE_CHECKING:
    from mycel.node.hop_session import HopSession

# Without a part for so long, a taker begins with nothing; without an acknowledgement, a giver gives up.
PATIENCE_S = 10.0
# On their way unacknowledged: as much as has arrived, so that a slow link is not flooded, between these.
LEAST_WINDOW_BYTES = 512 * 1024
MOST_WINDOW_BYTES = 1024 * 1024
OUTPUTS = -1  # the `block` of the output log
OUTPUT_BYTES = 128 * 1024
MAX_RATES = 256

T = TypeVar("T")


class HandoverRates:
    """Bytes a second to peers, as they were when something was last handed over to them."""

    def __init__(self) -> None:
        self._rates: dict[str, float] = {}

    def get(self, peer: str) -> float | None:
        return self._rates.get(peer)

    @property
    def best(self) -> float:
        """What this node's own link can do at least; 0 before anything was handed over."""
        return max(self._rates.values(), default=0.0)

    def learn(self, peer: str, bytes_per_s: float) -> None:
        self._rates.pop(peer, None)
        self._rates[peer] = bytes_per_s
        if len(self._rates) > MAX_RATES:
            del self._rates[next(iter(self._rates))]


# ---- giving --------------------------------------------------------------------------------------------------------


async def hand_over(session: HopSession, taker: PeerAddress, scope: trio.CancelScope) -> None:
    """Give the session's state to `taker`, or tell it that nothing comes; then tell the client which, and why."""
    with scope:
        giver = await _Giver.of(session, taker)
        try:
            position, reason = await giver.give()
        except PeerError as error:
            position, reason = 0, f"the successor did not take the state: {error.reason}"
        session.service.event("session.handed_over", peer=taker.peer, tokens=position, reason=reason)
        await session.tell(HandedOver(position, reason[:400]))


@dataclass(eq=False, slots=True)
class _Giver:
    """What one hop has to give at one moment, and how far it got."""

    session: HopSession
    taker: PeerAddress
    position: int
    parts: Iterator[tuple[StatePart, list[WireTensor]]]
    size_bytes: int
    history_bytes: int
    prefill_s: float
    meter: RateMeter = field(default_factory=RateMeter)
    sent_bytes: int = 0

    @classmethod
    async def of(cls, session: HopSession, taker: PeerAddress) -> _Giver:
        """The state between two steps."""
        o, span = session.machine.opening, session.service.span
        async with session.step_lock:
            count = session.machine.position
            pieces = session.model.state_pieces(session.cache, count) if count else iter(())
            size_bytes = session.model.state_bytes(session.cache, count) if count else 0
            values = [output.value.value for output in session.log.outputs]
        outputs = [from_wire(value) for value in values if isinstance(value, WireTensor)]  # a last hop has tokens
        size_bytes += sum(hidden_TD.nbytes for hidden_TD in outputs)
        parts = (
            (StatePart(block, position), [to_wire(tensor) for tensor in tensors])
            for block, position, tensors in chain(pieces, _output_pieces(outputs))
        )
        history_bytes = 0 if session.machine.is_first else count * span.hidden_size * span.dtype.itemsize
        prefill_s = span.prefill_cost_s(o.start, o.end, count)
        return cls(session, taker, count, parts, size_bytes, history_bytes, prefill_s)

    async def give(self) -> tuple[int, str]:
        """How many tokens' state the taker has now, and why. Raises PeerError."""
        rates, transport = self.session.service.rates, self.session.service.transport
        push, reason = self._plan(rates.get(self.taker.peer))
        transport.learn(self.taker.peer, self.taker.addresses)
        stream = await transport.open(self.taker.peer, ids.HANDOVER)
        try:
            began_s = trio.current_time()
            if push:
                position, reason = await self._push(stream)
                if position:
                    reason = f"{show_bytes(self.size_bytes)} of state pushed in {trio.current_time() - began_s:.2g} s"
            else:
                position = 0
                await _say(stream, GiveState(self.session.machine.opening.session, 0))
        except BaseException:
            await stream.reset()
            raise
        await stream.aclose()
        if self.meter.bytes_per_s is not None:
            rates.learn(self.taker.peer, self.meter.bytes_per_s)
        return position, reason

    def _plan(self, bytes_per_s: float | None) -> tuple[bool, str]:
        if not self.position:
            return False, "replaying: nothing has been computed here yet"
        if bytes_per_s is None:
            return True, ""  # its first parts tell
        left_bytes = self.size_bytes - self.meter.newest_bytes
        return plan_handover(left_bytes, self.history_bytes, bytes_per_s, self.prefill_s)

    async def _push(self, stream: Stream) -> tuple[int, str]:
        await _say(stream, GiveState(self.session.machine.opening.session, self.position, self.size_bytes))
        for part, tensors in self.parts:
            size_bytes = sum(len(tensor.data) for tensor in tensors)
            while self.sent_bytes and self.sent_bytes + size_bytes > self._window_bytes():
                await self._hear(stream)
                if self.meter.is_settled:
                    push, reason = self._plan(self.meter.bytes_per_s)
                    if not push:
                        await _say(stream, StateRefused(reason[:400]))
                        return 0, reason
            await _in_time(self.taker.peer, stream.send(*handover_codec.encode(part, tensors)))
            self.sent_bytes += size_bytes
        while not (position := await self._hear(stream)):
            pass
        return position, ""

    def _window_bytes(self) -> int:
        """How far sending may be, in bytes from the beginning."""
        arrived = self.meter.newest_bytes
        return arrived + min(max(arrived, LEAST_WINDOW_BYTES), MOST_WINDOW_BYTES)

    async def _hear(self, stream: Stream) -> int:
        """The next acknowledgement; its position. Raises PeerRefused if the taker wants no more."""
        frame = await _in_time(self.taker.peer, stream.receive())
        message = handover_codec.decode_only(frame) if frame is not None else None
        if isinstance(message, StateRefused):
            raise PeerRefused(self.taker.peer, message.reason)
        if not isinstance(message, StateTaken) or not self.meter.newest_bytes <= message.size_bytes <= self.sent_bytes:
            raise RemoteProtocolError("acknowledged what it was not given", self.taker.peer)
        if message.position and (message.size_bytes != self.size_bytes or message.position > self.position):
            raise RemoteProtocolError("began with a state that it was not given", self.taker.peer)
        self.meter.acknowledged(message.size_bytes, trio.current_time())
        return message.position


def _output_pieces(outputs: list[Tensor]) -> Iterator[StatePiece]:
    """Hidden states as pieces of a bounded size: many outputs of one token go together, one of many is cut."""
    position = 0
    rows: list[Tensor] = []
    for hidden_TD in outputs:
        n_max = min(max(OUTPUT_BYTES // max(hidden_TD[0].nbytes, 1), 1), hop.MAX_STEP_TOKENS)
        for at in range(0, len(hidden_TD), n_max):
            piece_TD = hidden_TD[at : at + n_max]
            if rows and sum(map(len, rows)) + len(piece_TD) > n_max:
                yield OUTPUTS, position, (torch.cat(rows),)
                position += sum(map(len, rows))
                rows = []
            rows.append(piece_TD)
    if rows:
        yield OUTPUTS, position, (torch.cat(rows),)


# ---- taking --------------------------------------------------------------------------------------------------------


@dataclass(eq=False, slots=True)
class Takeover:
    """A session that may be given a state waits for it here, before its first input."""

    session: HopSession
    _over: bool = field(default=False, init=False)
    _taking: bool = field(default=False, init=False)
    _work: trio.CancelScope = field(default_factory=trio.CancelScope, init=False)
    _settled: trio.Event = field(default_factory=trio.Event, init=False)
    _patience: trio.CancelScope = field(default_factory=trio.CancelScope, init=False)

    async def wait(self) -> None:
        """Until the giver is through: with the state, without one, or silent for too long."""
        try:
            if self.session.machine.opening.giver:
                self._prolong()
                with self._patience:
                    await self._settled.wait()
        finally:
            self._over = True
            self._work.cancel()  # also when the session ends: what was taken so far is in its memory

    def _prolong(self) -> None:
        self._patience.deadline = trio.current_time() + PATIENCE_S

    async def take(self, stream: Stream, give: GiveState) -> None:
        """Take what the giver gives, and let the session begin. Raises PeerError if the giver breaks off."""
        if self._over or self._taking:
            await _say(stream, StateRefused("the session has begun, or is being given a state already"))
            return
        self._taking = True
        self._prolong()
        try:
            with self._work:
                if give.position:
                    await self._take(stream, give)
            if self._work.cancelled_caught:
                raise PeerRefused("", "the session has begun, or ended, meanwhile")
        except PeerRefused as refusal:
            await _say(stream, StateRefused(refusal.reason[:400]))
        finally:
            self._settled.set()

    async def _take(self, stream: Stream, give: GiveState) -> None:
        usable = self._admit(give)
        model, compute = self.session.model, self.session.service.compute
        intake = (await compute.run(lambda: model.state_intake(give.position, usable))).value
        outputs = OutputLog[Logged]()
        taken_bytes = 0
        while taken_bytes < give.size_bytes:
            frame = await stream.receive()
            self._prolong()
            message, tensors = handover_codec.decode(frame) if frame is not None else (None, ())
            if isinstance(message, StateRefused):
                return  # replaying is quicker
            size_bytes = sum(len(tensor.data) for tensor in tensors)
            if not isinstance(message, StatePart) or not 0 < size_bytes <= give.size_bytes - taken_bytes:
                raise RemoteProtocolError("the state is not what was announced", stream.peer)
            self._keep(message, [from_wire(tensor) for tensor in tensors], intake, outputs)
            taken_bytes += size_bytes
            if taken_bytes < give.size_bytes:
                await _say(stream, StateTaken(taken_bytes))
        self._begin(give.position, usable, intake, outputs)
        await _say(stream, StateTaken(taken_bytes, usable))

    def _admit(self, give: GiveState) -> int:
        """How many tokens' state is of use here. Raises PeerRefused for one that does not fit."""
        machine, span = self.session.machine, self.session.service.span
        o, usable = machine.opening, machine.usable(give.position)
        room_bytes = span.session_bytes(o.start, o.end, o.max_tokens)
        refusals = (
            (give.position >= o.max_tokens, f"{give.position} tokens of a session of {o.max_tokens}"),
            (
                give.size_bytes > room_bytes,
                f"a state of {show_bytes(give.size_bytes)}; {show_bytes(room_bytes)} reserved",
            ),
            (usable < 1, "a last hop begins before this state"),
        )
        for refused, reason in refusals:
            if refused:
                raise PeerRefused("", reason)
        return usable

    def _keep(self, part: StatePart, tensors: list[Tensor], intake: StateIntake, outputs: OutputLog[Logged]) -> None:
        """Check a part and keep it. Raises RemoteProtocolError."""
        if part.block != OUTPUTS:
            intake.take(part.block, part.position, tensors)
            return
        span = self.session.service.span
        if len(tensors) != 1 or self.session.machine.is_last:
            raise RemoteProtocolError(f"{len(tensors)} tensors of outputs")
        hidden_TD = tensors[0]
        if hidden_TD.ndim != 2 or hidden_TD.shape[1] != span.hidden_size or hidden_TD.dtype != span.dtype:
            raise RemoteProtocolError(f"outputs of shape {tuple(hidden_TD.shape)} and {hidden_TD.dtype}")
        if not 0 < len(hidden_TD) <= hop.MAX_STEP_TOKENS or part.position != _end(outputs):
            raise RemoteProtocolError(f"{len(hidden_TD)} outputs from position {part.position}")
        if not bool(torch.isfinite(hidden_TD).all()):
            raise RemoteProtocolError("outputs that are not finite")
        outputs.append(part.position, len(hidden_TD), Logged(to_wire(hidden_TD), ()))

    def _begin(self, count: int, usable: int, intake: StateIntake, outputs: OutputLog[Logged]) -> None:
        """All at once: the cache, the outputs, the position. Raises PeerError if something is missing, or too late."""
        session = self.session
        if self._over:
            raise PeerRefused("", "the session has begun meanwhile")
        if not session.machine.is_last and _end(outputs) != count:
            raise RemoteProtocolError(f"outputs end at position {_end(outputs)} instead of {count}")
        session.cache = intake.finish()
        session.machine.take_over(usable)
        session.log.outputs[:0] = outputs.outputs


def _end(log: OutputLog[Logged]) -> int:
    return log.outputs[-1].end if log.outputs else 0


async def _say(stream: Stream, message: Message) -> None:
    await stream.send(*handover_codec.encode(message))


async def _in_time(peer: str, action: Awaitable[T]) -> T:
    """What comes of an action. Raises PeerTimeout if the other end keeps us waiting."""
    with trio.move_on_after(PATIENCE_S):
        return await action
    raise PeerTimeout(peer, f"took nothing of the state for {PATIENCE_S:.0f} s")
