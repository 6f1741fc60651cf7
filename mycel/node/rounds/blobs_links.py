"""One kept stream to a peer that gives blobs: questions asked ahead, answered in their order.

Whoever asked may be gone when the answer comes: it is then dropped, and the next one is whose it should be. Any failure
ends the link for all who wait on it; a new one is opened for who asks then.

Ring: shell.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

import trio

from mycel.protocols.codec import blob_codec
from mycel.protocols.errors import (
    PeerError,
    PeerRefused,
    PeerTimeout,
    PeerUnreachable,
    RemoteProtocolError,
)
from mycel.protocols.ports import Stream
from mycel.protocols.rounds import BlobMessage, GetBlob, GetCertificates, GetOffers
from mycel.protocols.wire import WireTensor

_SMALLEST_PIECE, _LARGEST_PIECE = 256 * 1024, 16 * 1024 * 1024
_QUICK_S, _SLOW_S = 0.5, 4.0


@dataclass(frozen=True, slots=True)
class BlobLimits:
    """Bounds of both sides, in seconds and counts."""

    # Whoever asks: questions under way on a link, silence while one is unanswered, and how long one peer tries alone.
    ask_ahead: int = 2
    open_s: float = 30.0
    answer_s: float = 30.0
    turn_s: float = 10.0
    # Whoever gives: how long an answer may take to leave, and streams that peers keep open.
    send_s: float = 60.0
    streams: int = 1024
    streams_per_peer: int = 4


Answer = tuple[BlobMessage, Sequence[WireTensor]]


@dataclass(eq=False, slots=True)
class Question:
    """One that was asked, and what came of it."""

    size_bytes: int
    asked_at: float
    done: trio.Event = field(default_factory=trio.Event)
    answer: Answer | None = None


class BlobLink:
    """Made for a stream; `run` reads it until it ends. `piece_bytes` is how much to ask for at once, as of now."""

    def __init__(self, stream: Stream, limits: BlobLimits) -> None:
        self.peer = stream.peer
        self.limits = limits
        self.piece_bytes = 1 << 20
        self._stream = stream
        self._failure: PeerError | None = None
        self._down = trio.Event()
        self._waiting: deque[Question] = deque()
        self._patience = trio.CancelScope()
        self._turn = trio.Lock()
        # A question that nobody waits for any more still has its place until it is answered.
        self._places = trio.Semaphore(4 * limits.ask_ahead)

    @property
    def is_up(self) -> bool:
        return self._failure is None

    async def ask(self, message: GetBlob | GetCertificates | GetOffers) -> Question:
        """Send a question; its answer is waited for with `answer`. Raises PeerError."""
        await self._places.acquire()
        async with self._turn:
            self._check()
            question = Question(message.count if isinstance(message, GetBlob) else 0, trio.current_time())
            self._waiting.append(question)
            if len(self._waiting) == 1:
                self._patience.deadline = trio.current_time() + self.limits.answer_s
            try:
                await self._stream.send(*blob_codec.encode(message))
            except PeerError as error:
                raise self.fail(error) from None
            except trio.Cancelled:
                # Whether the question went out is not known, and so nor what the next answer is about.
                self.fail(PeerUnreachable(self.peer, "a question was given up while it was asked"))
                raise
        return question

    async def answer(self, question: Question) -> Answer:
        """What was answered. Raises PeerError."""
        await question.done.wait()
        if question.answer is None:
            self._check()
        assert question.answer is not None
        return question.answer

    async def run(self) -> None:
        """Read answers until the link is down."""
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._read)
                await self._down.wait()
                nursery.cancel_scope.cancel()
        finally:
            with trio.CancelScope(shield=True):
                await self._stream.reset()

    async def _read(self) -> None:
        """Also while nothing is asked: so a link that ends is known before it is needed."""
        try:
            while True:
                patience_s = self.limits.answer_s if self._waiting else math.inf
                with trio.CancelScope(deadline=trio.current_time() + patience_s) as self._patience:
                    frame = await self._stream.receive()
                if self._patience.cancelled_caught:
                    raise PeerTimeout(self.peer, f"answered nothing for {self.limits.answer_s:.0f} s")
                if frame is None:
                    raise PeerUnreachable(self.peer, "ended the stream")
                if not self._waiting:
                    raise RemoteProtocolError("answered without being asked", self.peer)
                self._answered(frame)
        except PeerError as error:
            self.fail(error)

    def _answered(self, frame: memoryview) -> None:
        try:
            answer = blob_codec.decode(frame)
        except RemoteProtocolError as error:
            raise RemoteProtocolError(error.reason, self.peer) from None
        question = self._waiting.popleft()
        question.answer = answer
        self._pace(question)
        self._places.release()
        question.done.set()

    def _pace(self, question: Question) -> None:
        """Ask for more at once while that is quick, for less where a piece takes long."""
        took_s = trio.current_time() - question.asked_at
        if took_s < _QUICK_S and question.size_bytes >= self.piece_bytes:
            self.piece_bytes = min(2 * self.piece_bytes, _LARGEST_PIECE)
        elif took_s > _SLOW_S:
            self.piece_bytes = max(self.piece_bytes // 2, _SMALLEST_PIECE)

    def fail(self, error: PeerError) -> PeerError:
        """The link is over; `error` is what everybody hears who waits. Returns it, to be raised."""
        if self._failure is None:
            self._failure = error
            self._down.set()
            for question in self._waiting:
                question.done.set()
                self._places.release()
            self._waiting.clear()
        return error

    def _check(self) -> None:
        """Raise a new exception of the kind that ended the link: one that is raised twice collects both tracebacks."""
        failure = self._failure
        if failure is None:
            return
        if isinstance(failure, RemoteProtocolError):
            raise RemoteProtocolError(failure.reason, self.peer)
        kind = type(failure) if isinstance(failure, PeerTimeout | PeerRefused) else PeerUnreachable
        raise kind(self.peer, failure.reason)
