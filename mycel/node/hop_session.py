"""One session at one hop: takes inputs from the ring, computes, logs what it put out, and passes it on.

Inputs come over a ring stream from the previous hop, outputs go over one to the next; both may be replaced at any time
(Relink). Outputs are logged before they are sent, so that a broken link loses nothing, and inputs that were computed
before are skipped, so that a resend harms nothing. Admission and limits are hop_service's.

Ring: shell.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import torch
import trio
from torch import Tensor

from mycel.node.sampling import sample
from mycel.protocols import ids
from mycel.protocols.codec import ring_codec, session_codec
from mycel.protocols.errors import LocalProtocolError, PeerError, RemoteProtocolError
from mycel.protocols.hop import HopMachine, OutputLog
from mycel.protocols.messages import (
    Attach,
    HopFailed,
    HopTiming,
    Message,
    NextToken,
    Relink,
    Sampled,
    Step,
)
from mycel.protocols.ports import Stream
from mycel.protocols.tensors import from_wire, to_wire
from mycel.protocols.wire import WireTensor

if TYPE_CHECKING:
    from mycel.node.hop_service import HopService

PREFILL_CHUNK_TOKENS = 256

Timings = tuple[HopTiming, ...]


class SpanModel(Protocol):
    """What a session needs of the blocks that it runs; torch modules in life, arithmetic in a simulation."""

    def new_cache(self) -> Any: ...

    def forward(self, inputs: Tensor, cache: Any) -> Tensor:
        """Token ids [T] (first span) or hidden_TD -> hidden_TD."""
        ...

    def logits(self, hidden_TD: Tensor) -> Tensor:
        """logits_TV; last span only."""
        ...


class SpanSource(Protocol):
    """The blocks that this node serves, and what a stretch of them costs."""

    @property
    def start(self) -> int: ...
    @property
    def end(self) -> int: ...
    @property
    def n_blocks(self) -> int: ...
    @property
    def max_positions(self) -> int: ...
    @property
    def vocab_size(self) -> int: ...
    @property
    def hidden_size(self) -> int: ...
    @property
    def dtype(self) -> torch.dtype: ...

    def part(self, start: int, end: int) -> SpanModel: ...

    def session_bytes(self, start: int, end: int, max_tokens: int) -> int:
        """KV cache and output history of a session over blocks [start, end)."""
        ...

    def step_cost_s(self, start: int, end: int, count: int) -> float:
        """Expected seconds of compute for `count` tokens."""
        ...

    def observe(self, start: int, end: int, count: int, compute_s: float) -> None:
        """Learn from a step that was computed."""
        ...


@dataclass(eq=False, slots=True)
class HopSession:
    """One session at this hop: the rules (machine), the cache, the log of outputs and the two links."""

    service: HopService
    machine: HopMachine
    model: SpanModel
    control: Stream
    cache: Any = field(init=False)
    tokens: list[int] = field(init=False)
    log: OutputLog[_Logged] = field(default_factory=OutputLog, init=False)
    finish: str = field(default="", init=False)
    _link: Stream | None = field(default=None, init=False)
    _link_lost: bool = field(default=False, init=False)
    _inbound: trio.CancelScope = field(default_factory=trio.CancelScope, init=False)
    _prefilled: trio.Event = field(default_factory=trio.Event, init=False)
    _step_lock: trio.Lock = field(default_factory=trio.Lock, init=False)
    _link_lock: trio.Lock = field(default_factory=trio.Lock, init=False)
    _control_lock: trio.Lock = field(default_factory=trio.Lock, init=False)
    _nursery: trio.Nursery = field(init=False)
    _scope: trio.CancelScope = field(default_factory=trio.CancelScope, init=False)
    _ended: str = field(default="", init=False)

    def __post_init__(self) -> None:
        self.cache = self.model.new_cache()
        generation = self.machine.opening.generation
        self.tokens = list(generation.tokens) if generation else []
        if generation is not None:
            # The last hop before us may have died with the newest token on its way to the first hop: say it again.
            self.log.append(len(self.tokens) - 1, 1, _Logged(self.tokens[-1], ()))

    async def run(self) -> str:
        """Until the client ends the control stream or vanishes; then the links are closed. Says why it ended."""
        with self._scope:
            async with trio.open_nursery() as nursery:
                self._nursery = nursery
                if self.machine.is_first:
                    nursery.start_soon(self._prefill)
                else:
                    self._prefilled.set()
                    nursery.start_soon(self._flush)
                try:
                    self.end(await self._obey())
                finally:
                    self.end("a failure of this node")
                    link, self._link = self._link, None
                    if link is not None:
                        with trio.CancelScope(shield=True):
                            await link.aclose()
        return self._ended

    def end(self, reason: str) -> None:
        """Let go of whatever the session does or waits for. The first reason counts."""
        self._ended = self._ended or reason
        self._inbound.cancel()
        self._scope.cancel()

    async def _obey(self) -> str:
        """Follow the client's words until there are no more; why there are no more."""
        try:
            while (frame := await self.control.receive()) is not None:
                message = session_codec.decode_only(frame)
                if not isinstance(message, Relink):
                    return f"the client sent {type(message).__name__} in a running session"
                if not self.machine.is_alone and self.service.transport.peer_id in (
                    message.previous.peer,
                    message.next.peer,
                ):
                    return "the client linked this hop to itself"
                await self._relink(message)
        except PeerError as error:
            return error.reason
        return "done"

    # ---- inputs -------------------------------------------------------------------------------------------------

    async def _prefill(self) -> None:
        """Feed the prompt in chunks, so that the next hops work while this one goes on; alone, go on to the end."""
        prompt = torch.tensor(self.machine.opening.prompt, dtype=torch.int64)
        for position in range(0, len(prompt), PREFILL_CHUNK_TOKENS):
            await self.feed(position, prompt[position : position + PREFILL_CHUNK_TOKENS], ())
        self._prefilled.set()
        while self.machine.is_last and not self.finish:
            await self.feed(self.machine.position, torch.tensor(self.tokens[-1:], dtype=torch.int64), ())

    async def take_inputs(self, stream: Stream) -> None:
        """Feed what the previous hop pushes; a newer link or another previous hop ends this one."""
        if self._ended:
            return
        self._inbound.cancel()
        with trio.CancelScope() as self._inbound:
            await self._prefilled.wait()
            try:
                while (frame := await stream.receive()) is not None:
                    message, tensors = ring_codec.decode(frame)
                    position, inputs, timings = self._check(message, tensors)
                    await self.feed(position, inputs, timings)
            except RemoteProtocolError as error:
                await self._tell(HopFailed(stream.peer, error.reason[:400]))
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
        hidden_TD = from_wire(tensors[0])
        if hidden_TD.ndim != 2 or hidden_TD.shape[1] != span.hidden_size or hidden_TD.dtype != span.dtype:
            raise RemoteProtocolError(f"hidden states of shape {tuple(hidden_TD.shape)} and {hidden_TD.dtype}")
        if len(hidden_TD) > PREFILL_CHUNK_TOKENS:
            raise RemoteProtocolError(f"a step of {len(hidden_TD)} tokens; {PREFILL_CHUNK_TOKENS} are allowed")
        if not bool(torch.isfinite(hidden_TD).all()):
            raise RemoteProtocolError("hidden states that are not finite")
        return message.position, hidden_TD, message.timings

    # ---- compute ------------------------------------------------------------------------------------------------

    async def feed(self, position: int, inputs: Tensor, timings: Timings) -> None:
        """Compute what is new of `inputs`, log it, send it. Cancelled, it leaves the log and the cache in step."""
        sampled: list[Sampled] = []
        async with self._step_lock:
            skip = self.machine.accept(position, len(inputs))
            if skip == len(inputs):
                return
            position += skip
            o, span = self.machine.opening, self.service.span
            cost_s = span.step_cost_s(o.start, o.end, len(inputs) - skip)
            with trio.CancelScope(shield=True):
                done = await self.service.compute.run(lambda: self._compute(position, inputs[skip:]), cost_s=cost_s)
            span.observe(o.start, o.end, len(inputs) - skip, done.compute_s)
            own = HopTiming(_microseconds(done.queue_s), _microseconds(done.compute_s))
            sampled = self._record(position, len(inputs) - skip, done.value, (*timings, own))
        try:
            await self._flush()
            for message in sampled:
                await self._tell(message)
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
            self.log.append(position, count, _Logged(value, timings))
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
                self.log.append(at, 1, _Logged(token, ()))
        return sampled

    # ---- outputs ------------------------------------------------------------------------------------------------

    async def _flush(self) -> None:
        """Give the next hop everything that it has not been given; a broken link is reported and waits for Relink."""
        if self.machine.is_alone:
            return
        async with self._link_lock:
            peer, link = self.machine.next.peer, self._link
            try:
                while not self._link_lost and (output := self.log.pending()) is not None:
                    if link is None:
                        link = self._link = await self._attach()
                        self._nursery.start_soon(self._watch, link)
                    await link.send(*output.value.encode(output.position))
                    self.log.given()
            except LocalProtocolError:
                if self._link is link:
                    raise
                # _relink let go of the link while we were sending: it starts the next one.
            except PeerError as error:
                await self._lose(peer, error.reason)

    async def _watch(self, link: Stream) -> None:
        """Notice a link that breaks while nothing is being sent: an output on its way is lost, and all would wait."""
        try:
            while await link.receive() is not None:
                pass  # the next hop has nothing to say here
        except LocalProtocolError:
            if self._link is link:
                raise
        except PeerError as error:
            if self._link is link:
                await self._lose(link.peer, error.reason)

    async def _lose(self, peer: str, reason: str) -> None:
        """The link to the next hop is gone: tell the client, once, and wait for its Relink."""
        if self._link_lost:
            return
        self._link_lost = True
        self.service.event("hop.failed", peer=peer, reason=reason)
        if peer == self.machine.next.peer:
            await self._tell(HopFailed(peer, reason[:400]))

    async def _attach(self) -> Stream:
        address, attach = self.machine.next, Attach(self.machine.opening.session, self.machine.outbound)
        self.service.transport.learn(address.peer, address.addresses)
        link = await self.service.transport.open(address.peer, ids.RING)
        try:
            await link.send(*ring_codec.encode(attach))
        except BaseException:
            await link.reset()
            raise
        return link

    async def _send_late(self, sampled: list[Sampled]) -> None:
        await self._flush()
        for message in sampled:
            await self._tell(message)

    async def _relink(self, message: Relink) -> None:
        """Links changed: let go of the old ones, and give everything to the next hop if the link to it is new."""
        new_inbound, new_outbound = self.machine.relink(message)
        if new_inbound:
            self._inbound.cancel()
        if new_outbound:
            self._link_lost = True  # nobody may go on where the old neighbour stopped
            await self._drop_link()  # also ends a send that is stuck on a silent peer
            async with self._link_lock:
                await self._drop_link()  # one that was being opened to the old neighbour
                self._link_lost = False
                self.log.rewind()
            self._nursery.start_soon(self._flush)
        self.service.changed()

    async def _drop_link(self) -> None:
        if self._link is not None:
            link, self._link = self._link, None
            await link.reset()

    async def _tell(self, message: Message) -> None:
        """Say something to the client; if it is gone, so is the session."""
        try:
            async with self._control_lock:
                await self.control.send(*session_codec.encode(message))
        except PeerError as error:
            self.end(error.reason)


@dataclass(frozen=True, slots=True)
class _Logged:
    """An output as it will travel: hidden states with the timings so far, or a token for the first hop."""

    value: WireTensor | int
    timings: Timings

    def encode(self, position: int) -> list[bytes | memoryview]:
        if isinstance(self.value, WireTensor):
            return ring_codec.encode(Step(position, self.timings), [self.value])
        return ring_codec.encode(NextToken(position, self.value))


def _microseconds(seconds: float) -> int:
    return min(round(seconds * 1e6), 2**31 - 1)  # as much as a message may say
