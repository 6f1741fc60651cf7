"""A client of a swarm: it needs an invite and the tokenizer, and no torch.

`connect` (trio) gives a Model; `mycel.connect` wraps it for ordinary code (sync_client.py).

Ring: shell.
"""

from __future__ import annotations

import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

import trio

from mycel.node.background import background, cause_of
from mycel.node.events import EventSink, no_events
from mycel.node.files import fetch_manifest, fetch_small_files
from mycel.node.model_store import ModelStore
from mycel.node.network import Network, open_network
from mycel.node.text import TextCodec, TextStream
from mycel.protocols.errors import ConfigError, MycelError, RouteUnavailable
from mycel.protocols.messages import SamplingParams
from mycel.security.identity import Identity
from mycel.swarm.batch import choose_batch
from mycel.swarm.estimate import Estimate, estimate
from mycel.swarm.generation import NewToken, Request, SessionEvent
from mycel.swarm.invite import Invite, parse_invite
from mycel.swarm.manifest import Manifest
from mycel.swarm.routing import Chain
from mycel.swarm.session import InferenceSession
from mycel.swarm.trace import RouteTrace
from mycel.swarm.view import View
from mycel.swarm.watch import SwarmWatch

PATIENCE_S = 60.0


@dataclass(frozen=True, slots=True)
class Piece:
    """Some text and the token that made it certain; `finish` is "" until the last: "stop" or "length"."""

    text: str
    token: int
    finish: str


@dataclass(eq=False, slots=True)
class Generation:
    """An answer on its way: iterate for its pieces; `text`, `tokens` and `trace` grow with it."""

    trace: RouteTrace
    _events: trio.MemoryReceiveChannel[SessionEvent]
    _over: trio.Event
    _stream: TextStream
    text: str = ""
    tokens: list[int] = field(default_factory=list)
    finish: str = ""

    def __aiter__(self) -> Generation:
        return self

    async def __anext__(self) -> Piece:
        while not self.finish:
            try:
                event = await self._events.receive()
            except trio.EndOfChannel:
                # The session says why it ended only after its last event; leaving the block before would cancel it.
                await self._over.wait()
                break
            self.trace.apply(event)
            if isinstance(event, NewToken):
                return self._piece(event)
        raise StopAsyncIteration

    def _piece(self, event: NewToken) -> Piece:
        self.tokens.append(event.token)
        text = self._stream.push(event.token)
        self.finish = "stop" if self._stream.stopped else event.finish
        if event.finish:
            text += self._stream.finish()
        self.text += text
        return Piece(text, event.token, self.finish)


@dataclass(frozen=True, slots=True)
class Model:
    """A model that a swarm serves. Made by `connect`. `in_flight` counts the hops of its sessions, by peer."""

    network: Network
    manifest: Manifest
    codec: TextCodec
    watch: SwarmWatch
    in_flight: Counter[str] = field(default_factory=Counter)

    def encode(self, prompt: str | Sequence[int]) -> list[int]:
        """Token ids of a prompt. Raises ConfigError for an empty one and for tokens that the model does not have."""
        tokens = self.codec.encode(prompt) if isinstance(prompt, str) else list(prompt)
        if not tokens:
            raise ConfigError("the prompt is empty")
        if not all(0 <= token < self.manifest.vocab_size for token in tokens):
            raise ConfigError(f"the prompt has a token that is none of the model's {self.manifest.vocab_size}")
        return tokens

    @asynccontextmanager
    async def generate(
        self,
        prompt: str | Sequence[int],
        *,
        max_new_tokens: int = 128,
        sampling: SamplingParams | None = None,
        stop: Sequence[str] = (),
        patience_s: float = PATIENCE_S,
    ) -> AsyncIterator[Generation]:
        """Generate from text or token ids; leaving the block ends the session.

        Raises ConfigError for a request that the model cannot take; RouteUnavailable, PeerTimeout out of the block.
        """
        request = self._request(prompt, max_new_tokens, sampling, patience_s)
        async with self._run(request, stop) as generation:
            yield generation

    def _request(
        self, prompt: str | Sequence[int], max_new_tokens: int, sampling: SamplingParams | None, patience_s: float
    ) -> Request:
        tokens = self.encode(prompt)
        n_new = self._room(len(tokens), max_new_tokens)
        return Request(
            tuple(tokens),
            n_new,
            sampling or SamplingParams(),
            self.manifest.eos_token_ids,
            patience_s,
            self.manifest.vocab_size,
        )

    @asynccontextmanager
    async def _run(
        self, request: Request, stop: Sequence[str] = (), planned: Chain | None = None
    ) -> AsyncIterator[Generation]:
        """One session, over the chain `planned` to begin with if there is one."""
        send, receive = trio.open_memory_channel[SessionEvent](16)
        session = InferenceSession(
            self.network.transport,
            self.watch,
            self.watch.swarm,
            request,
            send,
            planned=planned,
            in_flight=self.in_flight,
        )
        failure: list[MycelError] = []
        over = trio.Event()

        async def drive() -> None:
            try:
                await session.run()
            except MycelError as error:
                failure.append(error)
            finally:
                over.set()

        async with background() as tasks:
            tasks.start_soon(drive)
            with receive:
                yield Generation(RouteTrace(trio.current_time()), receive, over, self.codec.stream(stop))
        if failure:
            raise failure[0]

    async def complete(
        self,
        prompts: Sequence[str | Sequence[int]],
        *,
        max_new_tokens: int = 128,
        sampling: SamplingParams | None = None,
    ) -> list[str]:
        """The texts for several prompts of any lengths, generated side by side, over chains that share the swarm."""
        requests = [self._request(prompt, max_new_tokens, sampling, PATIENCE_S) for prompt in prompts]
        texts = [""] * len(prompts)

        async def one(index: int, planned: Chain | None) -> None:
            async with self._run(requests[index], planned=planned) as generation:
                async for _ in generation:
                    pass
            texts[index] = generation.text

        try:
            chains = await self._plan(requests)
            async with trio.open_nursery() as nursery:
                for index, chain in enumerate(chains):
                    nursery.start_soon(one, index, chain)
        except BaseExceptionGroup as group:
            raise cause_of(group) from None
        return texts

    async def _plan(self, requests: Sequence[Request]) -> Sequence[Chain | None]:
        """Chains for requests that run together; none while blocks are missing, which each session then waits for."""
        if not requests:
            return ()
        most = max(request.max_tokens for request in requests)
        try:
            return choose_batch(
                await self.watch.view(),
                len(requests),
                rtts=self._rtts(),
                max_tokens=most,
                load=self.in_flight,
                rng=Random(),
            )
        except RouteUnavailable:
            return [None] * len(requests)

    def _rtts(self) -> dict[str, float]:
        transport = self.network.transport
        return {peer: rtt for peer in transport.connected() if (rtt := transport.rtt_s(peer)) is not None}

    async def view(self) -> View:
        """Who serves what, read from the directory now."""
        return await self.watch.view(fresh=True)

    async def estimate(self) -> Estimate:
        """What the swarm can do now."""
        return estimate(await self.view(), rtts=self._rtts())

    def _room(self, n_prompt: int, max_new_tokens: int) -> int:
        room = self.manifest.max_positions - n_prompt
        if room < 1 or max_new_tokens < 1:
            raise ConfigError(
                f"a prompt of {n_prompt} tokens and {max_new_tokens} new ones do not fit: the model's context is "
                f"{self.manifest.max_positions} tokens"
            )
        return min(room, max_new_tokens)


@asynccontextmanager
async def connect(
    invite: str | Invite, *, cache_dir: Path | None = None, event: EventSink = no_events, shape: str = ""
) -> AsyncIterator[Model]:
    """Join a swarm as a client. Files (manifest, tokenizer) are kept in `cache_dir`, or for this time only.

    `shape` makes the client's links worse on purpose (swarm/chaos.py).

    Raises ConfigError for an invite that is not one, PeerUnreachable if nobody of it answers.
    """
    parsed = parse_invite(invite, time.time()) if isinstance(invite, str) else invite
    with tempfile.TemporaryDirectory(prefix="mycel-") as temporary:
        store = ModelStore(cache_dir or Path(temporary))
        async with open_network(Identity.generate(), (), event, shape=shape) as network:
            await network.join(parsed.bootstrap)
            peers = network.answering_first(parsed.bootstrap)
            manifest = store.manifest(parsed.swarm) or await fetch_manifest(network.transport, peers, parsed.swarm)
            directory = store.save_manifest(manifest)
            await fetch_small_files(network.transport, peers, store, manifest)
            codec = TextCodec.load(directory, manifest.vocab_size)
            watch = SwarmWatch(network.directory, parsed.swarm, manifest.n_blocks, time.time)
            async with background() as tasks:
                tasks.start_soon(watch.run)
                yield Model(network, manifest, codec, watch)
