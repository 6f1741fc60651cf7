"""Sums of gradients: what a stage's peers ask of each other to make a step, and how they answer.

`SumService` answers from the ledger and the table of sums, `SumClient` asks. What may be asked of whom, and when, is
decided in `mycel/swarm/training/step.py`.

Ring: shell.
"""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial

import torch
import trio
from torch import Tensor

from mycel.node.training.ledger import Ledger
from mycel.node.training.sum_table import SumTable
from mycel.protocols.codec import reduce_codec
from mycel.protocols.errors import PeerError, PeerRefused, PeerTimeout, PeerUnreachable, RemoteProtocolError
from mycel.protocols.ids import REDUCE
from mycel.protocols.ports import Compute, Stream, Transport
from mycel.protocols.tensors import from_wire, to_wire
from mycel.protocols.training import MAX_MICROBATCHES, GetPartial, GetSum, NotNow, ReduceMessage, Slice
from mycel.swarm.training.actions import Range
from mycel.swarm.training.bell import Bell
from mycel.swarm.training.lattice import check_partial
from mycel.swarm.training.numbers import from_bytes, to_bytes

PIECE_ELEMENTS = 1 << 20  # in one answer: 8 MiB of a partial sum
# How long a question for a sum that is about to be there waits, and how long an answer is waited for.
SUM_PATIENCE_S = 3.0
REPLY_PATIENCE_S = 30.0
# Of the service: for a question, for a reader, streams of one peer and of all, answers under way.
IDLE_S = 120.0
STREAMS_PER_PEER, MAX_STREAMS, MAX_ANSWERS = 4, 256, 16
# Of the client.
KEPT_STREAMS = 2
PARTIALS_AT_ONCE = 8
_MAX_SUM = 64.0 * MAX_MICROBATCHES  # two ends of a tied table, each +-32 a microbatch


def pieces(start: int, end: int) -> Iterable[Range]:
    """[start, end) in answers' sizes."""
    return ((low, min(low + PIECE_ELEMENTS, end)) for low in range(start, end, PIECE_ELEMENTS))


# ---- answering


@dataclass(eq=False)
class SumService:
    """Answers for one stage from its ledger and its table, whose changes ring `bell`."""

    transport: Transport
    run: bytes
    stage: int
    ledger: Ledger
    table: SumTable
    compute: Compute
    bell: Bell
    sent_bytes: int = field(default=0, init=False)
    _streams: dict[str, int] = field(default_factory=dict, init=False)
    _answers: trio.Semaphore = field(default_factory=lambda: trio.Semaphore(MAX_ANSWERS), init=False)

    def start(self) -> None:
        """Answer from now on."""
        self.transport.serve(REDUCE, self._serve)

    async def _serve(self, stream: Stream) -> None:
        mine = self._streams.get(stream.peer, 0)
        if mine >= STREAMS_PER_PEER or sum(self._streams.values()) >= MAX_STREAMS:
            return
        self._streams[stream.peer] = mine + 1
        try:
            while (frame := await _receive(stream, IDLE_S)) is not None:
                question = reduce_codec.decode_only(frame)
                if not isinstance(question, GetPartial | GetSum):
                    raise RemoteProtocolError(f"{type(question).__name__} is no question", stream.peer)
                await self._answer(stream, question)
        finally:
            self._streams[stream.peer] -= 1
            if not self._streams[stream.peer]:
                del self._streams[stream.peer]

    async def _answer(self, stream: Stream, question: GetPartial | GetSum) -> None:
        end = question.start + question.count
        if question.count > PIECE_ELEMENTS or (self._is_ours(question) and end > self.ledger.n_elements):
            raise RemoteProtocolError(f"asks for {question.count} elements from {question.start} on", stream.peer)
        if isinstance(question, GetSum):
            await self._await_sum(question)
        async with self._answers:
            answer = await self._find(question)
            if isinstance(answer, NotNow):
                parts = reduce_codec.encode(answer)
            else:
                loss, scale, part = answer
                parts = reduce_codec.encode(Slice(question.start, loss, scale), [to_wire(part)])
            with trio.move_on_after(REPLY_PATIENCE_S) as patience:
                await stream.send(*parts)
        if patience.cancelled_caught:
            raise PeerTimeout(stream.peer, "asked, and does not read the answer")
        self.sent_bytes += sum(map(len, parts))

    def _is_ours(self, question: GetPartial | GetSum) -> bool:
        return question.run == self.run and question.stage == self.stage

    async def _await_sum(self, question: GetSum) -> None:
        """Wait a little for what is about to be there, also if the asker is a step ahead of us."""
        with trio.move_on_after(SUM_PATIENCE_S):
            while self._is_ours(question) and 0 <= question.version - self.table.version <= 1:
                seen = self.bell.count
                if self._slice(question) is not None:
                    return
                await self.bell.after(seen)

    def _slice(self, question: GetSum) -> Tensor | None:
        end = question.start + question.count
        return self.table.slice(question.version, question.start, end, tied=question.tied)

    async def _find(self, question: GetPartial | GetSum) -> tuple[float, float, Tensor] | NotNow:
        """Loss, scale and values, or why not."""
        if not self._is_ours(question):
            return NotNow(f"this peer is at stage {self.stage}")
        if isinstance(question, GetSum):
            part, final = self._slice(question), self.table.finals.get(question.version)
            if part is None:
                return NotNow(f"has not that sum of step {question.version}, and is at step {self.table.version}")
            return self.table.loss_of(question.version), 0.0 if final is None else final.scale, part
        wanted = from_bytes(question.counted)
        found = await own_partial(self.compute, self.ledger, question.version, wanted, question.start, question.count)
        if found is None:
            return NotNow(f"has not counted just these of step {question.version}, and is at step {self.table.version}")
        return found[1], 0.0, found[0]


async def own_partial(
    compute: Compute, ledger: Ledger, version: int, counted: int, start: int, count: int
) -> tuple[Tensor, float] | None:
    """This peer's own share, with its loss, if it has counted exactly `counted`."""

    def job() -> tuple[Tensor, float] | None:
        part = ledger.partial(version, counted, start, count)
        return None if part is None else (part, math.fsum(ledger.losses.values()))

    return (await compute.run(job)).value


# ---- asking


@dataclass(frozen=True, eq=False, slots=True)
class Given:
    """An answer: values, and what was said with them."""

    values_N: Tensor  # noqa: N815 - its shape
    loss: float
    scale: float


@dataclass(eq=False)
class SumClient:
    """Asks peers of one run, over streams that are kept; one question at a time on each."""

    transport: Transport
    run: bytes
    sent_bytes: int = field(default=0, init=False)
    _idle: dict[str, list[Stream]] = field(default_factory=dict, init=False)

    async def fetch_partial(
        self, peer: str, stage: int, version: int, counted: int, start: int, end: int
    ) -> tuple[Tensor, float]:
        """One peer's sum of exactly `counted` (int64, at most a piece) and its loss. Raises PeerError."""
        count = end - start
        question = GetPartial(self.run, stage, version, to_bytes(counted), start, count)
        given = await self._ask(peer, question)
        return check_partial(given.values_N, count, counted.bit_count(), peer), given.loss

    async def fetch_partials(
        self, sources: Sequence[tuple[str, int]], stage: int, version: int, start: int, end: int
    ) -> tuple[Tensor, list[float]]:
        """The sum of several peers' shares, each of exactly its set (int64), and their losses. Raises PeerError."""
        total_N = torch.zeros(end - start, dtype=torch.int64)
        losses: list[float] = []
        turn = trio.Semaphore(PARTIALS_AT_ONCE)

        async def fetch(peer: str, counted: int) -> None:
            async with turn:
                share_N, loss = await self.fetch_partial(peer, stage, version, counted, start, end)
            total_N.add_(share_N)
            losses.append(loss)

        await all_of([partial(fetch, *source) for source in sources])
        return total_N, losses

    async def fetch_sum(
        self, peers: Sequence[str], stage: int, version: int, start: int, end: int, *, tied: bool
    ) -> Given:
        """Elements [start, end) of a step's sum (float32), of the first of `peers` that gives them; who fails is left.

        `scale` is 0 unless somebody who gave has made the step. Raises the last PeerError.
        """
        given_P = torch.empty(end - start, dtype=torch.float32)
        left, loss, scale = list(peers), 0.0, 0.0
        if not left:
            raise PeerRefused("", f"nobody has the sum of step {version}")
        for low, high in pieces(start, end):
            given = await self._fetch_piece(left, GetSum(self.run, stage, version, low, high - low, tied))
            given_P[low - start : high - start] = given.values_N
            loss, scale = given.loss, given.scale or scale
        return Given(given_P, loss, scale)

    async def _fetch_piece(self, left: list[str], question: GetSum) -> Given:
        while True:
            try:
                return _checked(await self._ask(left[0], question), question, left[0])
            except PeerError:
                left.pop(0)
                if not left:
                    raise

    async def _ask(self, peer: str, question: GetPartial | GetSum) -> Given:
        """Raises PeerRefused for NotNow, other PeerErrors as they come."""
        idle = self._idle.setdefault(peer, [])
        while idle:  # a kept stream may have ended without a word
            with suppress(PeerUnreachable):
                return await self._ask_on(idle.pop(), question)
        return await self._ask_on(await self.transport.open(peer, REDUCE), question)

    async def _ask_on(self, stream: Stream, question: GetPartial | GetSum) -> Given:
        """One question; the stream is kept unless it is not clear what is still to come on it."""
        is_clean, peer, name = False, stream.peer, type(question).__name__
        try:
            parts = reduce_codec.encode(question)
            with trio.move_on_after(REPLY_PATIENCE_S) as patience:
                await stream.send(*parts)
                self.sent_bytes += sum(map(len, parts))
                frame = await stream.receive()
            if patience.cancelled_caught:
                raise PeerTimeout(peer, f"no answer to {name} within {REPLY_PATIENCE_S:.0f} s")
            if frame is None:
                raise PeerUnreachable(peer, "takes no more questions on this stream")
            answer, tensors = _decoded(frame, peer)
            is_clean = True
        finally:
            idle = self._idle.setdefault(peer, [])
            if is_clean and len(idle) < KEPT_STREAMS:
                idle.append(stream)
            else:
                with trio.CancelScope(shield=True):
                    await stream.reset()
        if isinstance(answer, NotNow) and not tensors:
            raise PeerRefused(peer, answer.reason)
        if not isinstance(answer, Slice) or answer.start != question.start or len(tensors) != 1:
            raise RemoteProtocolError(f"{type(answer).__name__} is no answer to {name}", peer)
        return Given(tensors[0], answer.loss, answer.scale)

    async def forget(self, peers: Iterable[str]) -> None:
        """Close what is kept to these."""
        for peer in peers:
            for stream in self._idle.pop(peer, ()):
                await stream.aclose()


def _decoded(frame: memoryview, peer: str) -> tuple[ReduceMessage, list[Tensor]]:
    try:
        answer, tensors = reduce_codec.decode(frame)
        return answer, [from_wire(tensor) for tensor in tensors]
    except RemoteProtocolError as error:
        raise RemoteProtocolError(error.reason, peer) from None


def _checked(given: Given, question: GetSum, peer: str) -> Given:
    values_N = given.values_N
    if values_N.dtype != torch.float32 or values_N.shape != (question.count,):
        raise RemoteProtocolError(f"a sum of {list(values_N.shape)} {values_N.dtype}", peer)
    least, most = torch.aminmax(values_N)
    if not (float(least) >= -_MAX_SUM and float(most) <= _MAX_SUM):  # also false for NaN
        raise RemoteProtocolError("no gradients have such a sum", peer)
    return given


async def _receive(stream: Stream, patience_s: float) -> memoryview | None:
    with trio.move_on_after(patience_s):
        return await stream.receive()
    return None


async def all_of(jobs: Iterable[Callable[[], Awaitable[None]]]) -> None:
    """Do all at once; the first PeerError ends the others and is raised, bare."""
    failures: list[PeerError] = []

    async def attempt(job: Callable[[], Awaitable[None]]) -> None:
        try:
            await job()
        except PeerError as error:
            failures.append(error)
            nursery.cancel_scope.cancel()

    async with trio.open_nursery() as nursery:
        for job in jobs:
            nursery.start_soon(attempt, job)
    if failures:
        raise failures[0]
