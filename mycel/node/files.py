"""Files between peers: the service that reads pieces of shared blobs, and the fetching of manifest and small files.

One stream carries many requests, answered in order, so a fetcher keeps a window of them under way. Everything that
arrives is checked against a SHA-256 that follows from the swarm's id. Units are fetched in `fetch_units.py`.

Ring: shell.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import trio

from mycel.node.fetch_units import Fetched, Given, Repository, fetch_chunk_list, fetch_units
from mycel.node.file_transfer import FetchProgress, FileLimits, FileOptions, ask, fetch_blob, nobody
from mycel.node.model_store import ModelStore
from mycel.protocols.codec import file_codec
from mycel.protocols.errors import (
    ConfigError,
    PeerError,
    PeerTimeout,
    PeerUnreachable,
    RemoteProtocolError,
    RouteUnavailable,
    VerificationError,
)
from mycel.protocols.ids import FILES
from mycel.protocols.messages import FileChunk, FileMessage, GetFile, GetManifest, ManifestBytes, NotHere
from mycel.protocols.ports import Handler, Stream, Transport
from mycel.swarm.manifest import Manifest, decode_manifest, swarm_id

__all__ = [
    "FetchProgress",
    "Fetched",
    "FileLimits",
    "FileOptions",
    "Given",
    "Repository",
    "fetch_chunk_list",
    "fetch_manifest",
    "fetch_small_files",
    "fetch_units",
    "serve_files",
]


@dataclass(slots=True)
class _Service:
    store: ModelStore
    options: FileOptions
    open_streams: dict[str, int] = field(default_factory=dict)

    async def handle(self, stream: Stream) -> None:
        """One stream, until the peer ends it, idles too long or has had its number of requests."""
        peer = stream.peer
        limits = self.options.limits
        mine = self.open_streams.get(peer, 0)
        if mine >= limits.streams_per_peer or sum(self.open_streams.values()) >= limits.streams:
            # An end before any answer: the fetcher backs off, or asks someone else.
            self.options.event(
                "files.refused", peer=peer, reason=f"{mine} streams of this peer are open, too many in all"
            )
            return
        self.open_streams[peer] = mine + 1
        try:
            await self._answer_all(stream)
        finally:
            self.open_streams[peer] -= 1
            if not self.open_streams[peer]:
                del self.open_streams[peer]

    async def _answer_all(self, stream: Stream) -> None:
        for _ in range(self.options.limits.requests_per_stream):
            with trio.move_on_after(self.options.limits.idle_timeout_s):
                try:
                    frame = await stream.receive()
                    if frame is None:
                        return
                    answer = await self._answer(stream.peer, frame)
                    await stream.send(*file_codec.encode(answer))
                except PeerUnreachable:
                    return  # a fetcher may go at any time
                continue
            raise PeerTimeout(stream.peer, f"neither asked nor read for {self.options.limits.idle_timeout_s:.0f} s")

    async def _answer(self, peer: str, frame: memoryview) -> FileMessage:
        try:
            request = file_codec.decode_only(frame)
        except RemoteProtocolError as error:
            raise RemoteProtocolError(error.reason, peer) from None
        if isinstance(request, GetManifest):
            data = self.store.shared_manifest(request.swarm)
            return NotHere("this swarm is not shared here") if data is None else ManifestBytes(data)
        if not isinstance(request, GetFile):
            raise RemoteProtocolError(f"{type(request).__name__} is not a request", peer)
        if not self.store.has(request.swarm, request.digest):
            return NotHere("no such file here")
        read = partial(self.store.read, request.swarm, request.digest, request.offset, request.size_bytes)
        try:
            return FileChunk(await self.options.run(read))
        except ConfigError as error:
            # Out of range, or the owner changed a file. The peer need not know where it lies on this disk.
            self.options.event("files.unreadable", peer=peer, reason=str(error))
            return NotHere("these bytes cannot be read here")


def serve_files(store: ModelStore, options: FileOptions | None = None) -> tuple[str, Handler]:
    """Protocol and handler for `Transport.serve`: answers requests for what `store` shares, now and later."""
    return FILES, _Service(store, options or FileOptions()).handle


async def fetch_manifest(
    transport: Transport, peers: Sequence[str], swarm: bytes, options: FileOptions | None = None
) -> Manifest:
    """The manifest of the swarm with this id, from the first of `peers` that has it.

    The transport must know the peers' addresses. Raises RouteUnavailable if nobody gives it, and ConfigError if it is
    one that this Mycel cannot use.
    """
    options = options or FileOptions()
    failures: list[PeerError] = []
    for peer in peers:
        try:
            return await _ask_manifest(transport, peer, swarm, options)
        except PeerError as error:
            options.failed(error, "manifest")
            failures.append(error)
    raise RouteUnavailable((), nobody("the manifest of the swarm", failures))


async def _ask_manifest(transport: Transport, peer: str, swarm: bytes, options: FileOptions) -> Manifest:
    answer = await ask(transport, peer, GetManifest(swarm), options)
    if not isinstance(answer, ManifestBytes):
        raise RemoteProtocolError(f"{type(answer).__name__} is no answer to GetManifest", peer)
    if hashlib.sha256(answer.manifest).digest() != swarm:
        raise VerificationError(peer, "sent a manifest that is not this swarm's")
    try:
        return decode_manifest(answer.manifest)
    except RemoteProtocolError as error:
        # The bytes are what the id says, so the swarm's founder is to blame and not the peer; nobody has better ones.
        raise ConfigError(f"this swarm cannot be joined: {error.reason}") from None


async def fetch_small_files(
    transport: Transport,
    peers: Sequence[str],
    store: ModelStore,
    manifest: Manifest,
    options: FileOptions | None = None,
) -> Path:
    """The model's directory with configuration, tokenizer and licence in it; what is not here yet comes from `peers`.

    Raises RouteUnavailable if nobody has a file, ConfigError for the disk.
    """
    options = options or FileOptions()
    directory = await options.run(partial(store.save_manifest, manifest))
    useful = list(peers)
    for file in await options.run(partial(store.missing_files, manifest)):
        blob = (swarm_id(manifest), file.sha256, file.size_bytes)
        data = await fetch_blob(transport, useful, blob, file.name, options)
        await options.run(partial(store.save_file, manifest, file, data))
    return directory
