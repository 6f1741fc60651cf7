"""Bytes by their SHA-256: what a group's members keep for each other, and fetching what one lacks.

A `BlobStore` holds one group's blobs, each until the round is over that it was kept for; `BlobExchange` serves those of
all groups of a node, and asks other nodes for theirs. Bytes that come in are believed once their hash is right, whoever
gave them. Knows nothing of what a blob means.

Ring: shell.
"""

from __future__ import annotations

import hashlib
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol, TypeVar

import trio

from mycel.node.events import EventSink, no_events
from mycel.node.file_transfer import DiskThreads
from mycel.node.rounds.blobs_links import BlobLimits, BlobLink, Question
from mycel.node.rounds.bulk_stream import room
from mycel.protocols.codec import blob_codec
from mycel.protocols.errors import (
    LocalProtocolError,
    PeerError,
    PeerRefused,
    PeerTimeout,
    PeerUnreachable,
    RemoteProtocolError,
    RouteUnavailable,
    VerificationError,
)
from mycel.protocols.ids import BLOBS
from mycel.protocols.ports import Compute, Handler, Stream, Transport
from mycel.protocols.rounds import (
    Blob,
    BlobMessage,
    Certificates,
    GetBlob,
    GetCertificates,
    GetOffers,
    NotHere,
    Offers,
)
from mycel.protocols.wire import TensorHeader, WireTensor

__all__ = ["BlobExchange", "BlobLimits", "BlobStore", "Hook"]

T = TypeVar("T")

_SMALL_BYTES = 64 * 1024
# A lane costs a few round trips more to open than a stream.
LANE_BYTES = 1 << 17

Hook = Callable[[str, GetCertificates | GetOffers], Certificates | Offers | NotHere]
"""Answers what is no question for a blob: (who asks, the question)."""


class Lanes(Protocol):
    """Another way to peers for large blobs: see bulk.py."""

    async def run(self, protocol: str, handler: Handler, *, task_status: trio.TaskStatus[None]) -> None: ...

    async def open(self, peer: str) -> Stream: ...

    def rest(self, peer: str, reason: str) -> None: ...


@dataclass(slots=True)
class _Kept:
    data: memoryview
    last_round: int  # kept until this round is over


class BlobStore:
    """One group's blobs. Made by `BlobExchange.store`.

    What is put must not change while it is kept: nothing is copied. `failed` hears of every peer that did not give what
    it was asked for; a VerificationError is one that gave other bytes.
    """

    def __init__(self, exchange: BlobExchange, run: bytes, scope: str, max_bytes: int) -> None:
        self.failed: Callable[[PeerError], None] = lambda error: None
        self.hook: Hook = lambda peer, question: NotHere("nothing of this kind is kept here")
        self.given_bytes = 0  # payloads given to others and taken from them
        self.fetched_bytes = 0
        self._exchange = exchange
        self._run, self._scope = run, scope
        self._max_bytes = max_bytes
        self._kept: dict[bytes, _Kept] = {}
        self._kept_bytes = 0
        self._fetching: dict[bytes, trio.Event] = {}

    # ---- keeping

    async def put(self, data: bytes | bytearray | memoryview, last_round: int) -> bytes:
        """Keep bytes until `last_round` is over, and give them to whoever asks; their SHA-256."""
        view = memoryview(data).cast("B")
        digest = await self._exchange.hashed(view, partial(_sha256, view))
        self.put_hashed(digest, view, last_round)
        return digest

    def put_hashed(self, digest: bytes, data: bytes | bytearray | memoryview, last_round: int) -> None:
        """As `put`, for bytes whose hash is known. Raises LocalProtocolError if the store would become too large."""
        if self.keep(digest, last_round):
            return
        view = memoryview(data).cast("B").toreadonly()
        if self._kept_bytes + len(view) > self._max_bytes:
            raise LocalProtocolError(f"{self._kept_bytes + len(view)} bytes to keep are over {self._max_bytes}")
        self._kept[digest] = _Kept(view, last_round)
        self._kept_bytes += len(view)

    def keep(self, digest: bytes, last_round: int) -> bool:
        """Keep a blob that is here at least until `last_round` is over; False if it is not here."""
        kept = self._kept.get(digest)
        if kept is not None:
            kept.last_round = max(kept.last_round, last_round)
        return kept is not None

    def get(self, digest: bytes) -> memoryview | None:
        """The bytes, if they are here."""
        kept = self._kept.get(digest)
        return None if kept is None else kept.data

    def drop_before(self, first_round: int) -> None:
        """Forget what was kept for rounds before this one alone."""
        for digest in [digest for digest, kept in self._kept.items() if kept.last_round < first_round]:
            self._kept_bytes -= len(self._kept.pop(digest).data)

    @property
    def kept_bytes(self) -> int:
        return self._kept_bytes

    def close(self) -> None:
        """Give nothing any more."""
        self._exchange.forget(self._run, self._scope)
        self._kept.clear()
        self._kept_bytes = 0

    # ---- fetching

    async def fetch(self, digest: bytes, size_bytes: int, peers: Sequence[str], last_round: int) -> memoryview:
        """The blob with this hash and size, which is then kept here, too: from here or the first of `peers` to give it.

        Who does not give it, or is slow about it, loses its turn to the next. Never holds more than `size_bytes` for
        each peer that is trying. Raises RouteUnavailable if nobody gives it.
        """
        while True:
            found = self.get(digest)
            if found is not None:
                self.keep(digest, last_round)
                return found
            other = self._fetching.get(digest)
            if other is None:
                break
            await other.wait()
        over = self._fetching[digest] = trio.Event()
        try:
            data = await self._fetch_from_any(digest, size_bytes, [*dict.fromkeys(peers)])
            self.put_hashed(digest, data, last_round)
            return data
        finally:
            del self._fetching[digest]
            over.set()

    async def _fetch_from_any(self, digest: bytes, size_bytes: int, peers: list[str]) -> memoryview:
        """One peer after the other, and beside one that takes long the next."""
        if not size_bytes and digest == _sha256(b""):
            return memoryview(b"")
        peers = [peer for peer in peers if peer != self._exchange.transport.peer_id]
        given: list[memoryview] = []
        failures: list[PeerError] = []

        async def try_peer(download: _Download, peer: str, failed: trio.Event) -> None:
            try:
                given.append(await self._fetch_from(peer, download))
                nursery.cancel_scope.cancel()
            except PeerError as error:
                self._exchange.event("blob.failed", peer=peer, reason=error.reason, kind=type(error).__name__)
                self.failed(error)
                failures.append(error)
            failed.set()

        async with trio.open_nursery() as nursery:
            for peer in peers if size_bytes else ():
                download, failed, seen_bytes = _Download(digest, size_bytes), trio.Event(), -1
                nursery.start_soon(try_peer, download, peer, failed)
                while not failed.is_set() and download.done_bytes > seen_bytes:
                    seen_bytes = download.done_bytes
                    with trio.move_on_after(self._exchange.limits.turn_s):
                        await failed.wait()
        if given:
            return given[0].toreadonly()
        asked = f"{len(peers)} asked; the last: {failures[-1]}" if failures else "nobody to ask"
        raise RouteUnavailable((), f"no peer gave blob {digest.hex()[:12]} of {size_bytes} bytes: {asked}")

    async def _fetch_from(self, peer: str, download: _Download) -> memoryview:
        """Over a lane if it is large, and again without one if that broke. Raises PeerError."""
        if self._exchange.has_lanes(download.size_bytes):
            link = await self._exchange.link(peer, bulk=True)
            try:
                return await self._fetch_on(link, download)
            except PeerUnreachable as error:
                self._exchange.lane_broke(error)
                download.restart()
        return await self._fetch_on(await self._exchange.link(peer), download)

    async def _fetch_on(self, link: BlobLink, download: _Download) -> memoryview:
        """Asks ahead, and hashes a piece while the next one arrives. Raises PeerError."""
        questions: deque[tuple[int, Question]] = deque()
        asked = 0
        while download.done_bytes < download.size_bytes:
            while asked < download.size_bytes and len(questions) < link.limits.ask_ahead:
                count = min(link.piece_bytes, download.size_bytes - asked)
                question = await link.ask(GetBlob(self._run, self._scope, download.digest, asked, count))
                questions.append((count, question))
                asked += count
            count, question = questions.popleft()
            answer, tensors = await link.answer(question)
            try:
                piece = _piece_of(link.peer, answer, tensors, download.done_bytes, count)
            except RemoteProtocolError as error:
                raise link.fail(error) from None
            download.take(piece)
            await self._exchange.hashed(piece, partial(download.hash.update, piece))
            self.fetched_bytes += count
        return download.finish(link.peer)

    async def ask(self, peer: str, question: GetCertificates | GetOffers) -> Certificates | Offers:
        """The peer's answer. Raises PeerRefused if it has none, and other PeerErrors."""
        link = await self._exchange.link(peer)
        answer, tensors = await link.answer(await link.ask(question))
        if isinstance(answer, NotHere):
            raise PeerRefused(peer, answer.reason)
        expected = Certificates if isinstance(question, GetCertificates) else Offers
        if tensors or not isinstance(answer, expected):
            raise link.fail(RemoteProtocolError(f"answered {type(question).__name__} with something else", peer))
        return answer


class _Download:
    """A blob that arrives in order; whoever takes a piece also hashes it."""

    def __init__(self, digest: bytes, size_bytes: int) -> None:
        self.digest = digest
        self.size_bytes = size_bytes
        self.restart()

    def restart(self) -> None:
        """Nothing has arrived."""
        self._whole: memoryview | None = None
        self.hash = hashlib.sha256()
        self.done_bytes = 0

    def take(self, piece: memoryview) -> None:
        if len(piece) == self.size_bytes:
            self._whole = piece  # the frame's own memory
        else:
            if self._whole is None:
                self._whole = room(self.size_bytes)
            self._whole[self.done_bytes : self.done_bytes + len(piece)] = piece
        self.done_bytes += len(piece)

    def finish(self, peer: str) -> memoryview:
        """All of it. Raises VerificationError if it is not what was asked for."""
        assert self._whole is not None
        if self.hash.digest() != self.digest:
            raise VerificationError(peer, f"gave other bytes as blob {self.digest.hex()[:12]}")
        return self._whole


def _piece_of(peer: str, answer: BlobMessage, tensors: Sequence[WireTensor], start: int, count: int) -> memoryview:
    """The bytes of an answer to a GetBlob. Raises PeerRefused or RemoteProtocolError."""
    if isinstance(answer, NotHere):
        raise PeerRefused(peer, answer.reason)
    if not isinstance(answer, Blob) or answer.start != start or len(tensors) != 1:
        raise RemoteProtocolError("answered the question for a piece of a blob with something else", peer)
    header = tensors[0].header
    if (header.dtype, header.shape, header.codec) != ("uint8", (count,), "raw"):
        raise RemoteProtocolError(f"gave {header.dtype} {header.shape} as {count} bytes of a blob", peer)
    return tensors[0].data


class BlobExchange:
    """All blobs that one node keeps, and its links to others who have some.

    Large blobs come over `lanes`, where there are any, and over streams of the transport otherwise.
    Hashes are computed on `threads`, several at once.
    """

    def __init__(
        self,
        transport: Transport,
        *,
        lanes: Lanes | None = None,
        threads: Compute | None = None,
        limits: BlobLimits | None = None,
        event: EventSink = no_events,
    ) -> None:
        self.transport = transport
        self.limits = limits or BlobLimits()
        self.event = event
        self._lanes = lanes
        self._threads: Compute = threads or DiskThreads()
        self._stores: dict[tuple[bytes, str], BlobStore] = {}
        self._links: dict[tuple[str, bool], BlobLink] = {}  # by peer, and whether it is for large blobs
        self._opening: dict[tuple[str, bool], trio.Lock] = {}
        self._streams: Counter[str] = Counter()
        self._tasks: trio.Nursery | None = None

    def store(self, run: bytes, scope: str, *, max_bytes: int = 1 << 34) -> BlobStore:
        """The store of a group, made when it is asked for first."""
        found = self._stores.get((run, scope))
        if found is None:
            found = self._stores[run, scope] = BlobStore(self, run, scope, max_bytes)
        return found

    def forget(self, run: bytes, scope: str) -> None:
        self._stores.pop((run, scope), None)

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Serve and ask until cancelled."""
        try:
            async with trio.open_nursery() as self._tasks:
                if self._lanes is not None:
                    await self._tasks.start(self._lanes.run, BLOBS, self.serve)
                self.transport.serve(BLOBS, self.serve)
                task_status.started()
                await trio.sleep_forever()
        finally:
            self._tasks = None
            for link in list(self._links.values()):
                link.fail(PeerRefused(link.peer, "this node asks for nothing any more"))

    # ---- asking

    async def link(self, peer: str, *, bulk: bool = False) -> BlobLink:
        """The kept link to a peer, opened if there is none. Raises PeerError."""
        if self._tasks is None:
            raise LocalProtocolError("blobs are fetched while the exchange runs")
        kind = peer, bulk and self._lanes is not None
        async with self._opening.setdefault(kind, trio.Lock()):
            link = self._links.get(kind)
            if link is not None and link.is_up:
                return link
            with trio.move_on_after(self.limits.open_s) as scope:
                stream = await self._open(*kind)
            if scope.cancelled_caught:
                raise PeerTimeout(peer, f"opened no stream within {self.limits.open_s:.0f} s")
            link = self._links[kind] = BlobLink(stream, self.limits)
            self._tasks.start_soon(self._read, kind, link)
            return link

    async def _open(self, peer: str, bulk: bool) -> Stream:
        if bulk and self._lanes is not None:
            return await self._lanes.open(peer)
        return await self.transport.open(peer, BLOBS)

    async def _read(self, kind: tuple[str, bool], link: BlobLink) -> None:
        try:
            await link.run()
        finally:
            if self._links.get(kind) is link:
                del self._links[kind]

    def has_lanes(self, size_bytes: int) -> bool:
        """Whether a blob of this size comes over a lane."""
        return self._lanes is not None and size_bytes >= LANE_BYTES

    def lane_broke(self, error: PeerError) -> None:
        """What began on a lane is asked for again without one."""
        if self._lanes is not None:
            self._lanes.rest(error.peer, error.reason)

    async def hashed(self, data: memoryview, job: Callable[[], T]) -> T:
        """The result of hashing `data`, on a thread if that takes longer than going there."""
        return job() if len(data) < _SMALL_BYTES else (await self._threads.run(job)).value

    # ---- giving

    async def serve(self, stream: Stream) -> None:
        """Answer a peer's questions on one stream until it ends."""
        peer = stream.peer
        if self._streams[peer] >= self.limits.streams_per_peer or self._streams.total() >= self.limits.streams:
            self.event("stream.refused", peer=peer, reason="too many streams for blobs are open")
            return
        self._streams[peer] += 1
        try:
            while (frame := await stream.receive()) is not None:
                try:
                    answer, data = self._answer(peer, blob_codec.decode_only(frame))
                except RemoteProtocolError as error:
                    raise RemoteProtocolError(error.reason, peer) from None
                with trio.move_on_after(self.limits.send_s) as scope:
                    await stream.send(*blob_codec.encode(answer, data))
                if scope.cancelled_caught:
                    raise PeerTimeout(peer, f"took nothing for {self.limits.send_s:.0f} s")
        finally:
            self._streams[peer] -= 1
            if not self._streams[peer]:
                del self._streams[peer]

    def _answer(self, peer: str, question: BlobMessage) -> tuple[BlobMessage, list[WireTensor]]:
        if not isinstance(question, GetBlob | GetCertificates | GetOffers):
            raise RemoteProtocolError(f"asked with {type(question).__name__}, which is an answer")
        store = self._stores.get((question.run, question.scope))
        if store is None:
            return NotHere("this group is not here"), []
        if not isinstance(question, GetBlob):
            return store.hook(peer, question), []
        data = store.get(question.digest)
        if data is None:
            return NotHere("this blob is not here"), []
        piece = data[question.start : question.start + question.count]
        if len(piece) != question.count:
            return NotHere(f"this blob has {len(data)} bytes"), []
        store.given_bytes += len(piece)
        return Blob(question.start), [WireTensor(TensorHeader("uint8", (len(piece),)), piece)]


def _sha256(data: bytes | memoryview) -> bytes:
    return hashlib.sha256(data).digest()
