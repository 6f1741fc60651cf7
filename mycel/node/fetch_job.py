"""One download: every chunk from whoever is free, verified before it is kept; who sends a wrong one is named and left.

All sources work at the same unit, the rarest first, as far as they have it. What is whole gets its name at once. Units
that no peer has come from the model's repository, if one is given.

Ring: shell.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import trio

from mycel.node.file_transfer import FetchProgress, FileNotHere, FileOptions, file_stream, nobody, receive_chunk
from mycel.node.partial import PartialUnit
from mycel.protocols.codec import file_codec
from mycel.protocols.errors import ConfigError, PeerError, RemoteProtocolError, RouteUnavailable, VerificationError
from mycel.protocols.messages import GetFile
from mycel.protocols.ports import Stream, Transport
from mycel.swarm.fetch_plan import PATIENCE_S, FetchPlan, Piece
from mycel.swarm.manifest import Manifest, swarm_id

__all__ = ["FetchJob", "Fetched", "Given", "Repository"]

# A source is given up after this many failures in a row without a chunk; it rests before each further try.
MAX_FAILURES = 3
FIRST_REST_S = 1.0
# Of a source no more is asked ahead than it sends in this time, so that little waits behind a slow one.
AHEAD_S = 2.0
# How a repository is read: so many requests at once, each for so many neighbouring chunks.
REPOSITORY_TASKS = 4
REPOSITORY_CHUNKS = 8


class Repository(Protocol):
    """Where the model's files lie besides the peers (see hub.py)."""

    @property
    def name(self) -> str:
        """What it is called in events and errors, in the place of a peer."""
        ...

    async def read(self, unit: str, extent: range) -> bytes:
        """Bytes `extent` of the unit's blob, not verified. Raises PeerError when trying again has not helped."""
        ...


@dataclass(frozen=True, slots=True)
class Given:
    """What one source gave: bytes that were kept, and for how long it was asked for them (its streams together)."""

    size_bytes: int
    seconds: float


@dataclass(frozen=True, slots=True)
class Fetched:
    """What came of it: bytes that were kept and how long that took, from whom, and which sources failed how.

    `sources` are, for each unit that became whole, those who gave chunks of it.
    """

    size_bytes: int
    seconds: float
    by_peer: Mapping[str, Given]
    sources: Mapping[str, tuple[str, ...]]
    failures: tuple[PeerError, ...]

    @property
    def bytes_per_s(self) -> float:
        """The rate of all sources together, 0.0 if nothing had to be fetched."""
        return self.size_bytes / self.seconds if self.seconds else 0.0


class FetchJob:
    """A task for each source, around one plan."""

    def __init__(
        self,
        transport: Transport,
        options: FileOptions,
        manifest: Manifest,
        parts: Mapping[str, PartialUnit],
        holders: Mapping[str, Collection[str]],
        repository: Repository | None,
    ) -> None:
        self.transport, self.options, self.manifest, self.parts = transport, options, manifest, parts
        self.repository = repository
        self.swarm = swarm_id(manifest)
        self.plan = FetchPlan({unit: sorted(part.missing) for unit, part in parts.items()}, holders)
        self.total_bytes = sum(part.unit.size_bytes for part in parts.values())
        missing = (part.unit.chunk(index) for part in parts.values() for index in part.missing)
        self.here_before = self.total_bytes - sum(map(len, missing))
        # what each source gave and for how long it was asked; of which unit last; who gave chunks of each unit
        self.given: defaultdict[str, int] = defaultdict(int)
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self.asked_last: dict[str, str] = {}
        self.senders: defaultdict[str, set[str]] = defaultdict(set)
        self.failures: list[PeerError] = []
        # streams, with what was asked on them and has not come
        self.streams: dict[trio.CancelScope, deque[Piece]] = {}
        self.repository_tasks = 0
        self.changed = trio.Event()
        self.fatal: ConfigError | RouteUnavailable | None = None

    async def run(self) -> Fetched:
        began = trio.current_time()
        for part in self.parts.values():
            if not part.missing:  # an earlier run was ended between the last chunk and the name
                await self.options.run(part.finish)
        async with trio.open_nursery() as self.nursery:
            for source in self.plan.sources:
                self.nursery.start_soon(self._work, source, partial(self._from_peer, source))
            self._notice()
        if self.fatal is not None:
            raise self.fatal
        return Fetched(
            size_bytes=sum(self.given.values()),
            seconds=trio.current_time() - began,
            by_peer={peer: Given(size, self.seconds[peer]) for peer, size in self.given.items() if size},
            sources={unit: tuple(sorted(senders)) for unit, senders in self.senders.items()},
            failures=tuple(self.failures),
        )

    def _notice(self) -> None:
        """Something changed in the plan: wake the idle, and see whether all is here or a unit has come out of reach."""
        self.changed.set()
        self.changed = trio.Event()
        if self.plan.finished:
            for scope, under_way in self.streams.items():
                if under_way:  # asked of a second source, and here from the first
                    scope.cancel()
            return
        lost = self.plan.hopeless()
        if lost and self.repository is not None:
            self._turn_to(self.repository, lost)
        elif lost and self.fatal is None:
            blocks = tuple((int(unit[6:]), int(unit[6:]) + 1) for unit in lost if unit.startswith("block."))
            self.fatal = RouteUnavailable(blocks, nobody(", ".join(lost), self.failures))
        if self.fatal is not None:
            self.nursery.cancel_scope.cancel()

    def _turn_to(self, repository: Repository, units: Sequence[str]) -> None:
        """Have `units`, which no peer is left to give, read from the repository."""
        self.options.event("fetch.repository", repository=repository.name, what=", ".join(units))
        for unit in units:
            self.plan.offer(unit, repository.name)
        while self.repository_tasks < REPOSITORY_TASKS:
            self.repository_tasks += 1
            self.nursery.start_soon(self._work, repository.name, partial(self._from_repository, repository))

    async def _work(self, source: str, transfer: Callable[[], Awaitable[bool]]) -> None:
        """Take from one source until it is of no more use; `transfer` gives False if there was nothing to ask for."""
        fruitless = 0
        while self.plan.useful(source) and self.fatal is None:
            began, given_before = trio.current_time(), self.given[source]
            asked = True
            try:
                asked = await transfer()
                fruitless = 0
            except PeerError as error:
                fruitless = 0 if self.given[source] > given_before else fruitless + 1
                self._blame(error, source, fruitless)
            except ConfigError as error:
                self.fatal = error
            if asked:
                self.seconds[source] += trio.current_time() - began
                self._notice()
            if fruitless and self.plan.useful(source):
                await trio.sleep(FIRST_REST_S * 2 ** (fruitless - 1))
            elif not asked:
                with trio.move_on_after(PATIENCE_S):
                    await self.changed.wait()
        if self.repository is not None and source == self.repository.name:
            self.repository_tasks -= 1

    def _blame(self, error: PeerError, source: str, fruitless: int) -> None:
        """Decide what a failure means for its source: it is given up, or may try again."""
        self.failures.append(error)
        self.options.failed(error, self.asked_last[source])
        from_repository = self.repository is not None and source == self.repository.name
        if from_repository:
            self.repository = None  # it has tried again itself
        if from_repository or isinstance(error, VerificationError | RemoteProtocolError) or fruitless >= MAX_FAILURES:
            self.plan.drop(source)

    # ---- from a peer

    async def _from_peer(self, source: str) -> bool:
        """One stream: ask ahead for what the plan gives and keep what comes, until there is nothing more to ask.

        Raises PeerError if the source fails or lied, ConfigError if the disk fails.
        """
        first = self._claim(source)
        if first is None:
            return False
        under_way = deque([first])
        with trio.CancelScope() as scope:
            self.streams[scope] = under_way
            try:
                async with file_stream(self.transport, source, self.options) as stream:
                    await self._ask(stream, first)
                    await self._drain(stream, under_way)
            finally:
                del self.streams[scope]
                for piece in under_way:
                    self.plan.give_back(piece, source)
        return True

    def _claim(self, source: str) -> Piece | None:
        piece = self.plan.claim(source, trio.current_time())
        if piece is not None:
            self.asked_last[source] = piece.unit
        return piece

    async def _ask(self, stream: Stream, piece: Piece) -> None:
        spec = self.parts[piece.unit].unit
        extent = spec.chunk(piece.chunk)
        request = GetFile(self.swarm, spec.sha256, extent.start, len(extent))
        await stream.send(*file_codec.encode(request))

    async def _drain(self, stream: Stream, under_way: deque[Piece]) -> None:
        limits, asked, taken = self.options.limits, 1, 0
        began = trio.current_time()
        while under_way:
            elapsed = trio.current_time() - began
            ahead = 1 + int(taken / elapsed * AHEAD_S) if elapsed else 1
            while len(under_way) < min(max(2, ahead), limits.window) and asked < limits.requests_per_stream:
                piece = self._claim(stream.peer)
                if piece is None:
                    break
                under_way.append(piece)
                asked += 1
                await self._ask(stream, piece)
            taken += await self._take(stream, under_way)

    async def _take(self, stream: Stream, under_way: deque[Piece]) -> int:
        """The answer to what was asked first; the number of chunks that were kept."""
        piece, source = under_way[0], stream.peer
        extent = self.parts[piece.unit].unit.chunk(piece.chunk)
        try:
            data = await receive_chunk(stream, len(extent), self.options)
        except FileNotHere as error:
            under_way.popleft()
            if self.plan.lacks(piece.unit, source):
                self.failures.append(error)
                self.options.failed(error, piece.unit)
            self.plan.give_back(piece, source)
            self._notice()
            return 0
        under_way.popleft()
        try:
            return await self._keep(piece, source, data)
        finally:
            self.plan.give_back(piece, source)

    async def _keep(self, piece: Piece, source: str, data: bytes | memoryview) -> int:
        """Verify and keep a chunk; 1, or 0 if it is here already. Raises VerificationError if it is wrong."""
        unit, index = piece
        part = self.parts[unit]
        if not await self.options.run(partial(part.keep, index, data)):
            raise VerificationError(source, f"sent wrong bytes as chunk {index} of {unit}")
        if not self.plan.wanted(piece):
            return 0
        self.given[source] += len(data)
        self.senders[unit].add(source)
        whole = self.plan.done(piece)
        if whole:
            await self.options.run(part.finish)
        done_bytes = self.here_before + sum(self.given.values())
        self.options.progress(FetchProgress(done_bytes, self.total_bytes, unit, source))
        self._notice()
        return 1

    # ---- from the repository

    async def _from_repository(self, repository: Repository) -> bool:
        """A few neighbouring chunks. Raises PeerError if that fails or they are wrong, ConfigError for the disk."""
        pieces = self._run_of_pieces(repository.name)
        if not pieces:
            return False
        spec = self.parts[pieces[0].unit].unit
        extent = range(spec.chunk(pieces[0].chunk).start, spec.chunk(pieces[-1].chunk).stop)
        try:
            data = memoryview(await repository.read(spec.name, extent))
            if len(data) != len(extent):
                raise RemoteProtocolError(f"sent {len(data)} bytes for {len(extent)}", repository.name)
            for piece in pieces:
                at = spec.chunk(piece.chunk)
                await self._keep(piece, repository.name, data[at.start - extent.start : at.stop - extent.start])
        finally:
            for piece in pieces:
                self.plan.give_back(piece, repository.name)
        return True

    def _run_of_pieces(self, source: str) -> list[Piece]:
        """Neighbouring chunks of one unit."""
        pieces: list[Piece] = []
        while len(pieces) < REPOSITORY_CHUNKS and (piece := self._claim(source)) is not None:
            if pieces and piece != (pieces[-1].unit, pieces[-1].chunk + 1):
                self.plan.give_back(piece, source)
                break
            pieces.append(piece)
        if pieces:
            self.asked_last[source] = pieces[0].unit
        return pieces
