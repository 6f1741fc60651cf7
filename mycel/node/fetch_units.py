"""Fetching units: the chunks that are missing, verified one by one, from all who have them; resumed after any end.

How the sources are driven stands in `fetch_job.py`, what lies on disk meanwhile in `partial.py`.

Ring: shell.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Collection, Mapping, Sequence
from contextlib import AbstractContextManager, asynccontextmanager
from functools import partial
from typing import TypeVar

import trio

from mycel.node.fetch_job import Fetched, FetchJob, Given, Repository
from mycel.node.file_transfer import FetchProgress, FileOptions, fetch_blob
from mycel.node.model_store import ModelStore
from mycel.protocols.errors import ConfigError, RemoteProtocolError
from mycel.protocols.ports import Transport
from mycel.swarm.manifest import Manifest, split_chunk_list, swarm_id

__all__ = ["FetchProgress", "Fetched", "Given", "Repository", "fetch_chunk_list", "fetch_units"]

T = TypeVar("T")


async def fetch_units(
    transport: Transport,
    holders: Sequence[str] | Mapping[str, Collection[str]],
    store: ModelStore,
    manifest: Manifest,
    units: Sequence[str],
    options: FileOptions | None = None,
    *,
    repository: Repository | None = None,
) -> Fetched:
    """Bring `units` into the store, and nothing of any other; those that are there already cost nothing.

    `holders` are the peers that may have them, or for each unit those that may have it; the transport must know their
    addresses. `repository` is read where no peer is left. What is unfinished when this is cancelled, fails or is killed
    is resumed by the next call. Raises RouteUnavailable if nobody is left who has a unit, and ConfigError if the disk
    is too small or fails.
    """
    options = options or FileOptions()
    await options.run(partial(store.save_manifest, manifest))
    missing = await options.run(partial(store.missing_units, manifest, units))
    await options.run(partial(store.require_space, manifest, missing))
    if not missing:
        return Fetched(0, 0.0, {}, {}, ())
    by_unit = holders if isinstance(holders, Mapping) else dict.fromkeys(missing, holders)
    peers = sorted({peer for unit in missing for peer in by_unit.get(unit, ())})
    hashes = await fetch_chunk_list(transport, peers, store, manifest, options)
    async with _opened(options, store.downloading(manifest, missing)) as folder:
        parts = {}
        for unit in missing:
            parts[unit] = await options.run(partial(folder.unit, manifest.unit(unit), hashes[unit]))
        return await FetchJob(transport, options, manifest, parts, by_unit, repository).run()


async def fetch_chunk_list(
    transport: Transport,
    peers: Sequence[str],
    store: ModelStore,
    manifest: Manifest,
    options: FileOptions | None = None,
) -> dict[str, bytes]:
    """unit -> the hashes of its chunks, for all units; the first of `peers` that gives the list if it is not here.

    Raises RouteUnavailable if nobody gives it, ConfigError for the disk or a swarm that was founded wrong.
    """
    options = options or FileOptions()
    found = await options.run(partial(store.chunk_list, manifest))
    if found is not None:
        return found
    blob = (swarm_id(manifest), manifest.chunks, manifest.chunk_list_bytes)
    data = await fetch_blob(transport, list(peers), blob, "the list of chunks", options)
    try:
        found = split_chunk_list(manifest, data)
    except RemoteProtocolError as error:
        # The bytes are what the manifest says, so the founder is to blame and not the peer; nobody has better ones.
        raise ConfigError(f"this swarm cannot be joined: {error.reason}") from None
    await options.run(partial(store.save_chunk_list, manifest, data))
    return found


@asynccontextmanager
async def _opened(options: FileOptions, context: AbstractContextManager[T]) -> AsyncIterator[T]:
    """A context that blocks, entered and left where blocking is allowed; cancelling never leaves it open."""
    with trio.CancelScope(shield=True):
        value = await options.run(context.__enter__)
    try:
        await trio.lowlevel.checkpoint_if_cancelled()
        yield value
    finally:
        with trio.CancelScope(shield=True):
            await options.run(partial(context.__exit__, None, None, None))
