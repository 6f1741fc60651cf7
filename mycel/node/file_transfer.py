"""Bytes of blobs from one peer: requests asked ahead, answers in order, every failure a PeerError with a name.

Knows nothing of manifests, models or who else could be asked. The caller verifies.

Ring: shell.
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import TypeVar

import trio

from mycel.node.events import EventSink, no_events
from mycel.protocols.codec import file_codec
from mycel.protocols.errors import (
    ConfigError,
    PeerError,
    PeerRefused,
    PeerTimeout,
    PeerUnreachable,
    RemoteProtocolError,
)
from mycel.protocols.ids import FILES
from mycel.protocols.messages import MAX_FILE_CHUNK_BYTES, FileChunk, FileMessage, GetFile, NotHere
from mycel.protocols.ports import Compute, Done, Stream, Transport

__all__ = ["DiskThreads", "FileLimits", "FileNotHere", "FileOptions", "ask", "download", "nobody"]

T = TypeVar("T")
Keep = Callable[[bytes], Awaitable[None]]


@dataclass(frozen=True, slots=True)
class FileLimits:
    """Bounds of both sides. A chunk must fit through the slowest link that shall work within `answer_timeout_s`."""

    chunk_bytes: int = MAX_FILE_CHUNK_BYTES
    # Requests under way on a stream: 8 MiB cover 100 Mbit/s at 600 ms.
    window: int = 8
    answer_timeout_s: float = 30.0
    # The service: how long a stream may idle or not read, its number of requests, and streams at once.
    idle_timeout_s: float = 60.0
    requests_per_stream: int = 16_384
    streams: int = 32
    streams_per_peer: int = 4


class DiskThreads:
    """The `Compute` port for files: blocking calls on trio's worker threads, several at once."""

    async def run(self, job: Callable[[], T], *, cost_s: float = 0.0) -> Done[T]:
        """Run `job`; its exception is raised here. A cancelled caller waits for a job that runs."""
        began_s = time.perf_counter()
        value = await trio.to_thread.run_sync(job)
        return Done(value, 0.0, time.perf_counter() - began_s)


@dataclass(frozen=True, slots=True)
class FileOptions:
    """Where blocking calls run, the bounds, and who hears of peers that failed."""

    disk: Compute = field(default_factory=DiskThreads)
    limits: FileLimits = field(default_factory=FileLimits)
    event: EventSink = no_events

    async def run(self, job: Callable[[], T]) -> T:
        """A blocking call, off the event loop."""
        return (await self.disk.run(job)).value

    def failed(self, error: PeerError, what: str) -> None:
        """Tell of a peer that failed to give `what`."""
        self.event("fetch.failed", peer=error.peer, what=what, reason=error.reason, kind=type(error).__name__)


class FileNotHere(PeerRefused):
    """The peer answers, but does not have this file."""


async def ask(transport: Transport, peer: str, request: FileMessage, options: FileOptions) -> FileMessage:
    """One request on a stream of its own. Raises FileNotHere, or other PeerErrors as they come."""
    async with _file_stream(transport, peer, options) as stream:
        await stream.send(*file_codec.encode(request))
        return await _receive(stream, options)


async def download(
    transport: Transport, peer: str, blob: tuple[bytes, bytes], extent: range, keep: Keep, options: FileOptions
) -> None:
    """The bytes `extent` of a blob (swarm id, digest) from one peer, to `keep` in order, by the chunk; not verified.

    Raises FileNotHere if the peer lacks the blob, other PeerErrors as they come, and ConfigError from `keep`.
    """
    step = options.limits.chunk_bytes
    starts = range(extent.start, extent.stop, step)
    requests = [GetFile(*blob, start, min(step, extent.stop - start)) for start in starts]
    if not requests:
        return
    async with _file_stream(transport, peer, options) as stream:
        # Raised here and not inside, so that no exception group reaches the caller.
        if failure := await _pump(stream, requests, keep, options):
            raise failure


async def _pump(
    stream: Stream, requests: Sequence[GetFile], keep: Keep, options: FileOptions
) -> PeerError | ConfigError | None:
    """Ask ahead by a window of requests and keep what comes; what went wrong, if anything."""
    window = trio.Semaphore(options.limits.window)
    failure: PeerError | ConfigError | None = None

    async def ask_ahead() -> None:
        try:
            for request in requests:
                await window.acquire()
                await stream.send(*file_codec.encode(request))
        except PeerUnreachable:
            return  # the receiving side meets the same end, after what still arrived

    async with trio.open_nursery() as nursery:
        nursery.start_soon(ask_ahead)
        try:
            for request in requests:
                answer = await _receive(stream, options)
                if not isinstance(answer, FileChunk) or len(answer.data) != request.size_bytes:
                    raise RemoteProtocolError(f"sent no chunk of {request.size_bytes} bytes", stream.peer)
                await keep(answer.data)
                window.release()
        except (PeerError, ConfigError) as error:
            failure = error
        nursery.cancel_scope.cancel()
    return failure


@asynccontextmanager
async def _file_stream(transport: Transport, peer: str, options: FileOptions) -> AsyncIterator[Stream]:
    """A stream of the files protocol: ended when the block is done, abandoned when it fails."""
    with trio.move_on_after(options.limits.answer_timeout_s) as scope:
        stream = await transport.open(peer, FILES)
    if scope.cancelled_caught:
        raise PeerTimeout(peer, f"opened no stream within {options.limits.answer_timeout_s:.0f} s")
    try:
        yield stream
    except BaseException:
        await stream.reset()
        raise
    await stream.aclose()


async def _receive(stream: Stream, options: FileOptions) -> FileMessage:
    """The next answer. Raises FileNotHere, or other PeerErrors for silence, an end or nonsense."""
    with trio.move_on_after(options.limits.answer_timeout_s) as scope:
        frame = await stream.receive()
    if scope.cancelled_caught:
        raise PeerTimeout(stream.peer, f"sent nothing for {options.limits.answer_timeout_s:.0f} s")
    if frame is None:
        raise PeerUnreachable(stream.peer, "ended the stream before it had sent everything")
    try:
        answer = file_codec.decode_only(frame)
    except RemoteProtocolError as error:
        raise RemoteProtocolError(error.reason, stream.peer) from None
    if isinstance(answer, NotHere):
        raise FileNotHere(stream.peer, answer.reason)
    return answer


def nobody(what: str, failures: Sequence[PeerError]) -> str:
    """The line for the user when no source is left."""
    if not failures:
        return f"no peer is known that could send {what}"
    last = failures[-1]
    return f"no peer could send {what}: {len({error.peer for error in failures})} asked; the last: {last}"
