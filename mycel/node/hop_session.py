"""One session at one hop: takes inputs from the ring, computes, logs what it put out, and passes it on.

Inputs come over a ring stream from the previous hop, outputs go over one to the next (hop_links); both may be replaced
at any time (Relink). Outputs are logged before they are sent, so that a broken link loses nothing, and inputs that were
computed before are skipped, so that a resend harms nothing. Admission and limits are hop_service's, and what a leaving
node hands over is handover's.

Ring: shell.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
import trio
from torch import Tensor

from mycel.node.handover import Takeover, hand_over
from mycel.node.hop_links import Logged, Outbound, Timings
from mycel.node.sampling import sample
from mycel.node.span_port import SpanModel
from mycel.protocols import hop
from mycel.protocols.codec import ring_codec, session_codec
from mycel.protocols.errors import PeerError, RemoteProtocolError
from mycel.protocols.hop import HopMachine, OutputLog
from mycel.protocols.messages import (
    AskProgress,
    Attached,
    HandOver,
    HopFailed,
    HopTiming,
    Leaving,
    Message,
    NextToken,
    PeerAddress,
    Progress,
    Relink,
    Sampled,
    Step,
)
from mycel.protocols.ports import Stream
from mycel.protocols.tensors import from_wire, to_wire
from mycel.protocols.wire import WireTensor

if TYPE_CHECKING:
    from mycel.node.hop_service import HopService

MAX_TIMINGS = 256  # in one message


@dataclass(eq=False, slots=True)
class HopSession:
    """One session at this hop: the rules (machine), the cache, the log of outputs and the two links."""

    service: HopService
    machine: HopMachine
    model: SpanModel
    control: Stream
    cache: Any = field(init=False)
    tokens: list[int] = field(init=False)
    log: OutputLog[Logged] = field(default_factory=OutputLog, init=False)
    links: Outbound = field(init=False)
    takeover: Takeover = field(init=False)
    step_lock: trio.Lock = field(default_factory=trio.Lock, init=False)
    finish: str = field(default="", init=False)
    _inbound: trio.CancelScope = field(default_factory=trio.CancelScope, init=False)
    _giving: trio.CancelScope = field(default_factory=trio.CancelScope, init=False)
    _ready: trio.Event = field(default_factory=trio.Event, init=False)
    _busy_since_s: float | None = field(default=None, init=False)
    _asked: int = field(default=0, init=False)
    _control_lock: trio.Lock = field(default_factory=trio.Lock, init=False)
    _nursery: trio.Nursery = field(init=False)
    _scope: trio.CancelScope = field(default_factory=trio.CancelScope, init=False)
    _ended: str = field(default="", init=False)

    def __post_init__(self) -> None:
        self.cache = self.model.new_cache()
        self.takeover = Takeover(self)
        generation = self.machine.opening.generation
        self.tokens = list(generation.tokens) if generation else []
        if generation is not None:
            # The last hop before us may have died with the newest token on its way to the first hop: say it again.
            self.log.append(len(self.tokens) - 1, 1, Logged(self.tokens[-1], ()))

    async def run(self) -> str:
        """Until the client ends the control stream or vanishes; then the links are closed. Says why it ended."""
        with self._scope:
            async with trio.open_nursery() as nursery:
                self._nursery = nursery
                o, transport = self.machine.opening, self.service.transport
                self.links = Outbound(transport, nursery, o.session, self.log, self._link_lost)
                try:
                    if not self.machine.is_alone:
                        await self.links.relink(o.next, o.outbound, None, 0)
                    nursery.start_soon(self._begin)
                    nursery.start_soon(self._say_leaving)
                    self.end(await self._obey())
                finally:
                    self.end("a failure of this node")
                    with trio.CancelScope(shield=True):
                        await self.links.aclose()
        return self._ended

    def end(self, reason: str) -> None:
        """Let go of whatever the session does or waits for. The first reason counts."""
        self._ended = self._ended or reason
        self._inbound.cancel()
        self._scope.cancel()

    # ---- the client's words ---------------------------------------------------------------------------------------

    async def _obey(self) -> str:
        """Follow the client's words until there are no more; why there are no more."""
        try:
            while (frame := await self.control.receive()) is not None:
                message = session_codec.decode_only(frame)
                if isinstance(message, AskProgress):
                    await self._answer(message.position)
                elif isinstance(message, Relink | HandOver):
                    if wrong := self._misled(message):
                        return wrong
                    await (self._relink(message) if isinstance(message, Relink) else self._hand_over(message))
                else:
                    return f"the client sent {type(message).__name__} in a running session"
        except PeerError as error:
            return error.reason
        return "done"

    def _misled(self, message: Relink | HandOver) -> str:
        """What is wrong with what the client wants, or ""."""
        own = self.service.transport.peer_id
        if isinstance(message, HandOver):
            return "the client handed this hop over to itself" if message.taker.peer == own else ""
        spare = message.spare.peer if message.spare is not None else ""
        if own in (spare, *(() if self.machine.is_alone else (message.previous.peer, message.next.peer))):
            return "the client linked this hop to itself"
        if spare and message.spare_link == message.outbound:
            return "the client gave two links one number"
        return ""

    async def _relink(self, message: Relink) -> None:
        new_inbound, _ = self.machine.relink(message)
        if new_inbound:
            self._inbound.cancel()
        if not self.machine.is_alone:
            await self.links.relink(message.next, message.outbound, message.spare, message.spare_link)
        self.service.changed()

    async def _hand_over(self, message: HandOver) -> None:
        """Give our state to a successor, beside everything else; a newer wish replaces the one before."""
        self._giving.cancel()
        self._giving = trio.CancelScope()
        self._nursery.start_soon(hand_over, self, message.taker, self._giving)

    async def _answer(self, position: int) -> None:
        """Say how far we are, or will once `position` is reached."""
        if position > self.machine.position:
            self._asked = position
            return
        if position:
            self._asked = 0  # a newer question, and the newest counts
        received, now = self.machine.position, trio.current_time()
        given = received if self.machine.is_alone else self.links.given
        busy_s = 0.0 if self._busy_since_s is None else now - self._busy_since_s
        await self.tell(Progress(received, given, _microseconds(busy_s)))

    async def _say_leaving(self) -> None:
        """Once the node leaves, or at once if it does already: the session was admitted in the same instant."""
        await self.tell(Leaving(await self.service.departure()))

    # ---- inputs -------------------------------------------------------------------------------------------------

    async def _begin(self) -> None:
        """Wait for a state to begin from, if somebody may give one; feed the prompt; then inputs may come."""
        await self.takeover.wait()
        if not self.machine.is_alone:
            await self.links.push()  # the outputs that were handed over: the next hop may lack some of them
        if self.machine.is_first:
            await self._prefill()
        self._ready.set()
        while self.machine.is_alone and not self.finish:
            await self.feed(self.machine.position, torch.tensor(self.tokens[-1:], dtype=torch.int64), ())

    async def _prefill(self) -> None:
        """Feed what is new of the prompt in chunks, so that the next hops work while this one goes on."""
        prompt = torch.tensor(self.machine.opening.prompt, dtype=torch.int64)
        for position in range(self.machine.position, len(prompt), hop.MAX_STEP_TOKENS):
            await self.feed(position, prompt[position : position + hop.MAX_STEP_TOKENS], ())

    async def take_inputs(self, stream: Stream) -> None:
        """Say what we lack and feed what the previous hop pushes, until a newer link or another previous hop comes."""
        if self._ended:
            return
        self._inbound.cancel()
        with trio.CancelScope() as self._inbound:
            await self._ready.wait()
            try:
                await stream.send(*ring_codec.encode(Attached(self.machine.position)))
                while (frame := await stream.receive()) is not None:
                    message, tensors = ring_codec.decode(frame)
                    position, inputs, timings = self._check(message, tensors)
                    await self.feed(position, inputs, timings)
            except RemoteProtocolError as error:
                await self.tell(HopFailed(stream.peer, error.reason[:400]))
                raise
            except PeerError:
                raise  # the link broke: the client hears of it from its own stream, and relinks
            except Exception:
                # Our own failure: the cache may be behind the position. End here; the client looks elsewhere.
                self.end("a failure of this node")
                raise

    def _check(self, message: object, tensors: tuple[WireTensor, ...]) -> tuple[int, Tensor, Timings]:
        """A frame of the ring as position, inputs and timings, or RemoteProtocolError."""
        span = self.service.span
        if self.machine.is_first:
            if not isinstance(message, NextToken) or tensors:
                raise RemoteProtocolError("the first hop takes tokens")
            if message.token >= span.vocab_size:
                raise RemoteProtocolError(f"token {message.token} of a vocabulary of {span.vocab_size}")
            return message.position, torch.tensor([message.token], dtype=torch.int64), ()
        if not isinstance(message, Step) or len(tensors) != 1:
            raise RemoteProtocolError("a later hop takes one tensor of hidden states")
        if len(message.timings) > min(self.machine.opening.start, MAX_TIMINGS - 1):
            # Each hop before us has a block at least; with ours, too many would make *us* break the rules.
            raise RemoteProtocolError(f"{len(message.timings)} timings before block {self.machine.opening.start}")
        hidden_TD = from_wire(tensors[0])
        if hidden_TD.ndim != 2 or hidden_TD.shape[1] != span.hidden_size or hidden_TD.dtype != span.dtype:
            raise RemoteProtocolError(f"hidden states of shape {tuple(hidden_TD.shape)} and {hidden_TD.dtype}")
        if len(hidden_TD) > hop.MAX_STEP_TOKENS:
            raise RemoteProtocolError(f"a step of {len(hidden_TD)} tokens; {hop.MAX_STEP_TOKENS} are allowed")
        if not bool(torch.isfinite(hidden_TD).all()):
            raise RemoteProtocolError("hidden states that are not finite")
        return message.position, hidden_TD, message.timings

    # ---- compute ------------------------------------------------------------------------------------------------

    async def feed(self, position: int, inputs: Tensor, timings: Timings) -> None:
        """Compute what is new of `inputs`, log it, send it. Cancelled, it leaves the log and the cache in step."""
        sampled: list[Sampled] = []
        async with self.step_lock:
            skip = self.machine.accept(position, len(inputs))
            if skip == len(inputs):
                return
            position += skip
            o, span = self.machine.opening, self.service.span
            cost_s = span.step_cost_s(o.start, o.end, len(inputs) - skip)
            if 0 < self._asked <= self.machine.position:
                self._asked = 0
                self._nursery.start_soon(self._answer, 0)
            self._busy_since_s = trio.current_time()
            try:
                with trio.CancelScope(shield=True):
                    done = await self.service.compute.run(lambda: self._compute(position, inputs[skip:]), cost_s=cost_s)
            finally:
                self._busy_since_s = None
            span.observe(o.start, o.end, len(inputs) - skip, done.compute_s)
            own = HopTiming(_microseconds(done.queue_s), _microseconds(done.compute_s))
            sampled = self._record(position, len(inputs) - skip, done.value, (*timings, own))
        try:
            await self.links.push()
            for message in sampled:
                await self.tell(message)
        except trio.Cancelled:
            if not self._ended:
                # The link that brought the inputs was replaced: what they became must still go out.
                self._nursery.start_soon(self._send_late, sampled)
            raise

    def _compute(self, position: int, inputs: Tensor) -> WireTensor | list[int]:
        """On the compute thread: hidden states to pass on, or (last hop) the tokens that follow `inputs`."""
        hidden_TD = self.model.forward(inputs, self.cache)
        generation = self.machine.opening.generation
        if generation is None:
            return to_wire(hidden_TD)
        first = max(position, len(self.tokens) - 1)  # earlier positions are history: their tokens are known
        chosen: list[int] = []
        for at in range(first, position + len(inputs)):  # one, but for a replay
            row = at - position
            logits_V = self.model.logits(hidden_TD[row : row + 1])[0]
            history = [*self.tokens, *chosen] if chosen else self.tokens
            chosen.append(sample(logits_V, history, generation.sampling, at + 1))
            if chosen[-1] in generation.eos_token_ids:
                break
        return chosen

    def _record(self, position: int, count: int, value: WireTensor | list[int], timings: Timings) -> list[Sampled]:
        """Log an output; the tokens to tell the client."""
        if isinstance(value, WireTensor):
            self.log.append(position, count, Logged(value, timings))
            return []
        generation = self.machine.opening.generation
        assert generation is not None
        sampled = []
        for token in value:
            if self.finish:
                break
            at = len(self.tokens)
            self.tokens.append(token)
            self.finish = (
                "stop" if token in generation.eos_token_ids else "length" if at + 1 == generation.max_position else ""
            )
            sampled.append(Sampled(at, token, timings, self.finish))
            if not self.finish:
                self.log.append(at, 1, Logged(token, ()))
        return sampled

    # ---- outputs ------------------------------------------------------------------------------------------------

    async def _send_late(self, sampled: list[Sampled]) -> None:
        await self.links.push()
        for message in sampled:
            await self.tell(message)

    async def _link_lost(self, address: PeerAddress, reason: str) -> None:
        """A link out of here is gone, and its neighbour with it: the client has to find another."""
        self.service.event("hop.failed", peer=address.peer, reason=reason)
        await self.tell(HopFailed(address.peer, reason[:400]))

    async def tell(self, message: Message) -> None:
        """Say something to the client; if it is gone, so is the session."""
        try:
            async with self._control_lock:
                await self.control.send(*session_codec.encode(message))
        except PeerError as error:
            self.end(error.reason)


def _microseconds(seconds: float) -> int:
    return min(round(seconds * 1e6), 2**31 - 1)  # as much as a message may say
