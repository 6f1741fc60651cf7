"""Bytes of blobs from one peer: requests asked ahead, answers in order, every failure a PeerError with a name.

Knows nothing of manifests or models.

Ring: shell.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import TypeVar

import trio

from mycel.node.events import EventSink, no_events
from mycel.protocols.codec import file_codec
from mycel.protocols.errors import (
    PeerError,
    PeerRefused,
    PeerTimeout,
    PeerUnreachable,
    RemoteProtocolError,
    RouteUnavailable,
    VerificationError,
)
from mycel.protocols.ids import FILES
from mycel.protocols.messages import MAX_FILE_CHUNK_BYTES, FileChunk, FileMessage, GetFile, NotHere
from mycel.protocols.ports import Compute, Done, Stream, Transport

__all__ = [
    "DiskThreads",
    "FetchProgress",
    "FileLimits",
    "FileNotHere",
    "FileOptions",
    "ask",
    "fetch_blob",
    "file_stream",
    "nobody",
    "receive",
    "receive_chunk",
]

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class FileLimits:
    """Bounds of both sides. 1 MiB must fit through the slowest link that shall work within `answer_timeout_s`."""

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
class FetchProgress:
    """What a person wants to see: bytes done and in all (of what was missing), and what moved last."""

    done_bytes: int
    total_bytes: int
    unit: str
    peer: str


def no_progress(progress: FetchProgress) -> None:
    """For who does not watch."""


@dataclass(frozen=True, slots=True)
class FileOptions:
    """Where blocking calls run, the bounds, who hears of peers that failed, and who watches a download."""

    disk: Compute = field(default_factory=DiskThreads)
    limits: FileLimits = field(default_factory=FileLimits)
    event: EventSink = no_events
    progress: Callable[[FetchProgress], None] = no_progress

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
    async with file_stream(transport, peer, options) as stream:
        await stream.send(*file_codec.encode(request))
        return await receive(stream, options)


async def fetch_blob(
    transport: Transport, peers: list[str], blob: tuple[bytes, bytes, int], what: str, options: FileOptions
) -> bytes:
    """A small blob (swarm id, SHA-256, size in bytes), whole and verified, from the first of `peers` that gives it.

    Those that fail are taken out of the list. Raises RouteUnavailable if none is left.
    """
    failures: list[PeerError] = []
    while peers:
        try:
            data = await _download(transport, peers[0], blob, options)
            if hashlib.sha256(data).digest() == blob[1]:
                return data
            raise VerificationError(peers[0], f"sent wrong bytes as {what}")
        except PeerError as error:
            options.failed(error, what)
            failures.append(error)
            peers.pop(0)
    raise RouteUnavailable((), nobody(what, failures))


async def _download(transport: Transport, peer: str, blob: tuple[bytes, bytes, int], options: FileOptions) -> bytes:
    swarm, digest, size_bytes = blob
    starts = range(0, size_bytes, MAX_FILE_CHUNK_BYTES)
    requests = [GetFile(swarm, digest, start, min(MAX_FILE_CHUNK_BYTES, size_bytes - start)) for start in starts]
    data = bytearray()
    if requests:
        async with file_stream(transport, peer, options) as stream:
            asked = 0
            for answered, request in enumerate(requests):
                while asked < min(len(requests), answered + options.limits.window):
                    await stream.send(*file_codec.encode(requests[asked]))
                    asked += 1
                data += await receive_chunk(stream, request.size_bytes, options)
    return bytes(data)


@asynccontextmanager
async def file_stream(transport: Transport, peer: str, options: FileOptions) -> AsyncIterator[Stream]:
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


async def receive(stream: Stream, options: FileOptions) -> FileMessage:
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


async def receive_chunk(stream: Stream, size_bytes: int, options: FileOptions) -> bytes:
    """The next answer, which must be a chunk of that size. Raises FileNotHere, or other PeerErrors."""
    answer = await receive(stream, options)
    if not isinstance(answer, FileChunk) or len(answer.data) != size_bytes:
        raise RemoteProtocolError(f"sent no chunk of {size_bytes} bytes", stream.peer)
    return answer.data


def nobody(what: str, failures: Sequence[PeerError]) -> str:
    """The line for the user when no source is left."""
    if not failures:
        return f"no peer is known that could send {what}"
    last = failures[-1]
    return f"no peer could send {what}: {len({error.peer for error in failures})} asked; the last: {last}"
