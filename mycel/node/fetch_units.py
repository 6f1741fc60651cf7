"""Fetching units: several peers at once, each unit from one peer at a time, verified whole, resumed where it broke.

A unit has one digest. So a peer that sent all of a unit that turns out wrong is a liar and gets no second chance; a
unit put together from several peers (or from an earlier run) that turns out wrong accuses nobody, is thrown away, and
from then on comes from one peer only.

Ring: shell.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import AsyncIterator, Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager, asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import TypeVar

import trio

from mycel.node.file_transfer import FileNotHere, FileOptions, download, nobody
from mycel.node.model_store import ModelStore
from mycel.node.partial import PartialFolder
from mycel.protocols.errors import ConfigError, PeerError, RemoteProtocolError, RouteUnavailable, VerificationError
from mycel.protocols.ports import Transport
from mycel.swarm.fetch_plan import FetchPlan
from mycel.swarm.manifest import Manifest, swarm_id

__all__ = ["FetchProgress", "Fetched", "fetch_units"]

T = TypeVar("T")

# A source is given up after this many failures in a row without a byte; it rests before each further try.
MAX_FAILURES = 3
FIRST_REST_S = 1.0


@dataclass(frozen=True, slots=True)
class FetchProgress:
    """What a person wants to see: bytes done and in all (of what was missing), and what moved last."""

    done_bytes: int
    total_bytes: int
    unit: str
    peer: str


@dataclass(frozen=True, slots=True)
class Fetched:
    """What came of it: who completed each unit that was missing, and which peers failed how."""

    sources: Mapping[str, str]
    failures: tuple[PeerError, ...]


async def fetch_units(
    transport: Transport,
    holders: Sequence[str] | Mapping[str, Collection[str]],
    store: ModelStore,
    manifest: Manifest,
    units: Sequence[str],
    options: FileOptions | None = None,
    *,
    on_progress: Callable[[FetchProgress], None] = lambda _: None,
) -> Fetched:
    """Bring `units` into the store; those that are there already cost nothing.

    `holders` are the peers that may have them, or for each unit those that may have it; the transport must know their
    addresses. What is unfinished when this is cancelled or fails is resumed by the next call. Raises RouteUnavailable
    if nobody is left who has a unit, and ConfigError if the disk is too small or fails.
    """
    options = options or FileOptions()
    await options.run(partial(store.save_manifest, manifest))
    missing = await options.run(partial(store.missing_units, manifest, units))
    await options.run(partial(store.require_space, manifest, missing))
    if not missing:
        return Fetched({}, ())
    by_unit = holders if isinstance(holders, Mapping) else dict.fromkeys(missing, holders)
    async with _opened(options, store.downloading(manifest, missing)) as folder:
        job = _Job(transport, options, manifest, FetchPlan(missing, by_unit), folder, on_progress)
        job.total_bytes = sum(manifest.unit(unit).size_bytes for unit in missing)
        await job.run()
    return Fetched(job.completed_by, tuple(job.failures))


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


@dataclass(slots=True)
class _Job:
    """One call of fetch_units: a task for each source, around one plan."""

    transport: Transport
    options: FileOptions
    manifest: Manifest
    plan: FetchPlan
    folder: PartialFolder
    on_progress: Callable[[FetchProgress], None]
    total_bytes: int = 0
    completed_by: dict[str, str] = field(default_factory=dict)
    failures: list[PeerError] = field(default_factory=list)
    # unit -> bytes here; unit -> who sent them, "" for an earlier run; peer -> bytes it sent
    arrived: dict[str, int] = field(default_factory=dict)
    senders: dict[str, set[str]] = field(default_factory=dict)
    sent: Counter[str] = field(default_factory=Counter)
    single_source: set[str] = field(default_factory=set)
    changed: trio.Event = field(default_factory=trio.Event)
    fatal: ConfigError | RouteUnavailable | None = None

    async def run(self) -> None:
        async with trio.open_nursery() as nursery:
            for source in self.plan.sources:
                nursery.start_soon(self._work, source, nursery.cancel_scope)
            self._notice(nursery.cancel_scope)
        if self.fatal is not None:
            raise self.fatal

    def _notice(self, scope: trio.CancelScope) -> None:
        """Something changed in the plan: wake the idle, and stop when a unit has come out of reach."""
        self.changed.set()
        self.changed = trio.Event()
        lost = self.plan.hopeless()
        if lost and self.fatal is None:
            blocks = tuple((int(unit[6:]), int(unit[6:]) + 1) for unit in lost if unit.startswith("block."))
            self.fatal = RouteUnavailable(blocks, nobody(", ".join(lost), self.failures))
            scope.cancel()

    async def _work(self, source: str, scope: trio.CancelScope) -> None:
        """Fetch unit after unit from one source until it is of no more use."""
        fruitless = 0
        while self.plan.useful(source):
            unit = self.plan.claim(source)
            if unit is None:
                await self.changed.wait()
                continue
            sent_before = self.sent[source]
            try:
                whole = await self._fetch(unit, source)
            except PeerError as error:
                # Bytes of a unit that must come from one peer are lost with the next change of peers: no progress.
                moved = self.sent[source] > sent_before and unit not in self.single_source
                fruitless = 0 if moved or isinstance(error, FileNotHere) else fruitless + 1
                self._blame(error, unit, source, fruitless)
            except ConfigError as error:
                self.fatal = self.fatal or error
                scope.cancel()
                return
            else:
                fruitless = 0
                if whole:
                    self.completed_by[unit] = source
                    self.plan.done(unit)
                else:
                    self.plan.give_back(unit)
            self._notice(scope)
            if fruitless and self.plan.useful(source):
                await trio.sleep(FIRST_REST_S * 2 ** (fruitless - 1))

    def _blame(self, error: PeerError, unit: str, source: str, fruitless: int) -> None:
        """Decide what a failure means for its source: it lacks this unit, is given up, or may try again."""
        self.failures.append(error)
        self.options.failed(error, unit)
        self.plan.give_back(unit)
        if isinstance(error, FileNotHere):
            self.plan.lacks(unit, source)
        elif isinstance(error, VerificationError | RemoteProtocolError) or fruitless >= MAX_FAILURES:
            self.plan.drop(source)

    async def _fetch(self, unit: str, source: str) -> bool:
        """One unit, from where it broke off; False if it turned out wrong and nobody alone is to blame.

        Raises PeerError if the source fails or lied, ConfigError if the disk fails.
        """
        run, spec = self.options.run, self.manifest.unit(unit)
        async with _opened(self.options, self.folder.unit(self.manifest, unit)) as part:
            senders = self.senders.setdefault(unit, {""} if part.received else set())
            if unit in self.single_source and not senders <= {source}:
                await run(part.restart)
                senders.clear()

            async def keep(chunk: bytes) -> None:
                await run(partial(part.append, chunk))
                senders.add(source)
                self.sent[source] += len(chunk)
                self._show(unit, source, part.received)

            self._show(unit, source, part.received)
            if part.received < spec.size_bytes:
                extent, blob = range(part.received, spec.size_bytes), (swarm_id(self.manifest), spec.sha256)
                await download(self.transport, source, blob, extent, keep, self.options)
            if await run(part.finish):
                return True
        self._show(unit, source, 0)
        lied = senders == {source}
        senders.clear()
        self.single_source.add(unit)
        if lied:
            raise VerificationError(source, f"sent wrong bytes as {unit}")
        self.options.event("fetch.wrong", what=unit, reason="put together from several sources; fetched again from one")
        return False

    def _show(self, unit: str, source: str, arrived_bytes: int) -> None:
        self.arrived[unit] = arrived_bytes
        self.on_progress(FetchProgress(sum(self.arrived.values()), self.total_bytes, unit, source))
