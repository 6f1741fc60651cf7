"""Fetching a stage's state from several of its peers at once, every MiB verified before it is kept.

All are asked for the same version. What most of them offer alike is fetched from all of those, by whoever is free; who
sends a wrong byte, falls silent or dies is named and left, and the others go on. Nothing waits for a single peer.

Ring: shell.
"""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict, deque
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass

import trio

from mycel.node.background import background
from mycel.node.events import EventSink
from mycel.node.training.state_service import PIN_PATIENCE_S
from mycel.protocols.codec import state_codec
from mycel.protocols.errors import (
    PeerError,
    PeerRefused,
    PeerTimeout,
    PeerUnreachable,
    RemoteProtocolError,
    VerificationError,
)
from mycel.protocols.ids import STATE
from mycel.protocols.messages import MAX_FILE_CHUNK_BYTES
from mycel.protocols.ports import Stream, Transport
from mycel.protocols.training import (
    GetStateChunk,
    NotNow,
    PinState,
    StateChunk,
    StateMessage,
    StateOffer,
)
from mycel.swarm.fetch_plan import PATIENCE_S, FetchPlan, Piece
from mycel.swarm.training.bell import Bell

__all__ = ["MAX_DONORS", "FetchedState", "fetch_state"]

# So many peers are asked; the list of hashes of each may take 8 MiB.
MAX_DONORS = 8
# For the step to be reached, and then for the copy and its hashes.
OFFER_PATIENCE_S = PIN_PATIENCE_S + 15.0
# All peers of a stage reach a step at about the same moment, so others that offer do it soon after the first.
GRACE_S = 3.0
# Of a peer no more is asked ahead than it sends in this time, and no more than so many chunks.
AHEAD_S = 2.0
WINDOW = 8
# A chunk has to come in this time. A peer is given up after so many streams in a row that brought nothing.
CHUNK_PATIENCE_S = 30.0
MAX_FAILURES = 3
FIRST_REST_S = 1.0
_UNIT = "state"


@dataclass(frozen=True, slots=True)
class FetchedState:
    """A stage's state after `version` steps; `digest` is the SHA-256 of the parameters in it, as its givers say.

    `by_peer` are the bytes that each gave. Whether it is the run's state is for the fetcher to see.
    """

    version: int
    data: memoryview
    digest: bytes
    by_peer: Mapping[str, int]


async def fetch_state(  # noqa: PLR0913 - the question, and how to judge the answers
    transport: Transport,
    plan_run: bytes,
    stage: int,
    donors: Sequence[tuple[str, int]],
    event: EventSink,
    *,
    fits: Callable[[int], bool],
    version: int | None = None,
    expected: Callable[[int], bytes] = lambda _: b"",
    least: int = 1,
) -> FetchedState:
    """The state after `version` steps, by default the newest that `donors` (peer, version) have.

    An offer is taken if `fits` (its size in bytes). Of different ones that of most peers, of equally many the one whose
    parameters are `expected` of that version. Raises PeerRefused if fewer than `least` peers offer the same, and if
    none of them is left before all is here.
    """
    if not donors:
        raise PeerRefused("", f"no peer that has the state of stage {stage} is known")
    newest = max(known for _, known in donors) if version is None else version
    asked = _spread(transport.peer_id, [peer for peer, _ in donors])[:MAX_DONORS]
    fetch = _Fetch(transport, PinState(plan_run, stage, newest), asked, fits, event)
    return await fetch.run(expected, least)


def _spread(me: str, peers: Sequence[str]) -> list[str]:
    """In an order that differs from fetcher to fetcher, so that newcomers do not all come to the same peers."""
    return sorted(set(peers), key=lambda peer: hashlib.sha256(f"{me} {peer}".encode()).digest())


class _Fetch:
    """A task for each peer that is asked: its offer, then chunks of the chosen one as far as it made the same."""

    def __init__(
        self,
        transport: Transport,
        pin: PinState,
        asked: Sequence[str],
        fits: Callable[[int], bool],
        event: EventSink,
    ) -> None:
        self.transport, self.pin, self.asked, self.fits, self.event = transport, pin, asked, fits, event
        self.offers: dict[str, StateOffer] = {}
        self.failures: dict[str, PeerError] = {}
        self.gone: set[str] = set()
        self.given: defaultdict[str, int] = defaultdict(int)
        # Since when a chunk has been waited for from whom.
        self.waiting_s: dict[str, float] = {}
        self.bell = Bell()
        self.chosen = trio.Event()

    async def run(self, expected: Callable[[int], bytes], least: int) -> FetchedState:
        async with background() as tasks:
            for peer in self.asked:
                tasks.start_soon(self._work, peer)
            await self._gather()
            self.offer = self._choose(expected(self.pin.version), least)
            size_bytes = self.offer.size_bytes
            self.data = bytearray(size_bytes)
            same = [peer for peer, offer in self.offers.items() if offer == self.offer]
            self.plan = FetchPlan({_UNIT: range(_n_chunks(size_bytes))}, {_UNIT: same})
            self.chosen.set()
            await self._finish()
            for peer, since_s in sorted(self.waiting_s.items()):
                if trio.current_time() - since_s >= PATIENCE_S:
                    self._tell(PeerTimeout(peer, "was too slow, and others gave what it had been asked for"))
        by_peer = {peer: size_bytes for peer, size_bytes in self.given.items() if size_bytes}
        return FetchedState(self.pin.version, memoryview(self.data), self.offer.params, by_peer)

    async def _gather(self) -> None:
        """Return once nothing better is to be expected: all have answered, or half have alike and the others lag."""
        latest_s = trio.current_time() + OFFER_PATIENCE_S
        grace_s = latest_s
        while True:
            seen = self.bell.count
            if self.offers and grace_s == latest_s:
                grace_s = min(latest_s, trio.current_time() + GRACE_S)
            open_peers = [peer for peer in self.asked if peer not in self.gone]
            if all(peer in self.offers for peer in open_peers):
                return
            most = max(Counter(self.offers.values()).values(), default=0)
            with trio.move_on_at(grace_s if 2 * most >= len(open_peers) else latest_s) as patience:
                await self.bell.after(seen)
            if patience.cancelled_caught:
                for peer in open_peers:
                    if peer not in self.offers:
                        self._tell(PeerTimeout(peer, f"said nothing of step {self.pin.version} in time"))
                return

    def _choose(self, expected: bytes, least: int) -> StateOffer:
        """What most offer. Raises PeerRefused if they are fewer than `least`."""
        what = f"the state of stage {self.pin.stage} after {self.pin.version} steps"
        groups = Counter(self.offers.values())
        if not groups or max(groups.values()) < least:
            error = next(reversed(self.failures.values()), None)
            shown = f"; the last: {error}" if error else ""
            raise PeerRefused("", f"{len(self.offers)} of {len(self.asked)} peers offer {what}{shown}")
        most = max(groups.values())
        best = [offer for offer in groups if groups[offer] == most]
        chosen = next((offer for offer in best if offer.params == expected), best[0])
        for peer, offer in self.offers.items():
            if offer != chosen:
                self._tell(VerificationError(peer, f"offers another state after {self.pin.version} steps than most"))
        return chosen

    async def _finish(self) -> None:
        """Return once all is here. Raises PeerRefused if nobody is left who could send what is missing."""
        while not self.plan.finished:
            seen = self.bell.count
            if not self.plan.sources:
                error = next(reversed(self.failures.values()), None)
                raise PeerRefused("", f"nobody is left to send the state of stage {self.pin.stage}; the last: {error}")
            await self.bell.after(seen)

    def _tell(self, error: PeerError) -> None:
        self.failures[error.peer] = error
        self.event(
            "state.failed",
            peer=error.peer,
            stage=self.pin.stage,
            version=self.pin.version,
            reason=error.reason,
            kind=type(error).__name__,
        )

    # ---- one peer

    async def _work(self, peer: str) -> None:
        """Ask, and take until nothing is missing or it is of no more use."""
        fruitless = 0
        while fruitless < MAX_FAILURES:
            before = self.given[peer]
            try:
                async with _stream(self.transport, peer) as stream:
                    await self._take_from(stream)
                    return
            except (PeerRefused, RemoteProtocolError, VerificationError) as error:
                self._tell(error)
                break
            except PeerError as error:
                self._tell(error)
                if peer not in self.offers:
                    break
                fruitless = 1 if self.given[peer] > before else fruitless + 1
                await trio.sleep(FIRST_REST_S * 2 ** (fruitless - 1))
        self.gone.add(peer)
        self.offers.pop(peer, None)
        if self.chosen.is_set():
            self.plan.drop(peer)
        self.bell.ring()

    async def _take_from(self, stream: Stream) -> None:
        peer = stream.peer
        if peer not in self.offers:
            self.offers[peer] = await self._ask_offer(stream)
            self.bell.ring()
        await self.chosen.wait()
        if self.offers[peer] != self.offer:
            return
        if not self.plan.finished:
            self.plan.offer(_UNIT, peer)  # it may have offered too late to be counted
        under_way: deque[Piece] = deque()
        try:
            await self._take_chunks(stream, under_way)
        finally:
            self.waiting_s.pop(peer, None)
            for piece in under_way:
                self.plan.give_back(piece, peer)

    async def _ask_offer(self, stream: Stream) -> StateOffer:
        offer = await self._ask(stream, self.pin, OFFER_PATIENCE_S)
        if not isinstance(offer, StateOffer) or offer.version != self.pin.version:
            raise RemoteProtocolError(f"{type(offer).__name__} is no answer to PinState", stream.peer)
        if not self.fits(offer.size_bytes) or len(offer.chunks) != 32 * _n_chunks(offer.size_bytes):
            raise RemoteProtocolError(f"offers a state of {offer.size_bytes} bytes, which cannot be", stream.peer)
        return offer

    async def _take_chunks(self, stream: Stream, under_way: deque[Piece]) -> None:
        peer, began, taken = stream.peer, trio.current_time(), 0
        while self.plan.useful(peer):
            seen = self.bell.count
            elapsed = trio.current_time() - began
            ahead = int(taken / elapsed * AHEAD_S) if elapsed else 0
            while len(under_way) < min(max(2, ahead), WINDOW):
                piece = self.plan.claim(peer, trio.current_time())
                if piece is None:
                    break
                under_way.append(piece)
                await self._send(stream, GetStateChunk(self.pin.run, self.pin.stage, self.pin.version, piece.chunk))
            if under_way:
                self.waiting_s[peer] = trio.current_time()
                self._keep(peer, under_way[0], await self._receive(stream, CHUNK_PATIENCE_S))
                self.plan.give_back(under_way.popleft(), peer)
                self.waiting_s.pop(peer)
                taken += 1
            else:
                with trio.move_on_after(PATIENCE_S):
                    await self.bell.after(seen)

    def _keep(self, peer: str, piece: Piece, answer: StateMessage) -> None:
        """Verify a chunk, here and now: a MiB takes about a millisecond. Raises PeerError for anything else."""
        start = piece.chunk * MAX_FILE_CHUNK_BYTES
        size_bytes = min(MAX_FILE_CHUNK_BYTES, self.offer.size_bytes - start)
        if not isinstance(answer, StateChunk) or len(answer.data) != size_bytes:
            raise RemoteProtocolError(f"sent no chunk of {size_bytes} bytes", peer)
        wanted = self.offer.chunks[32 * piece.chunk : 32 * (piece.chunk + 1)]
        if hashlib.sha256(answer.data).digest() != wanted:
            raise VerificationError(peer, f"sent wrong bytes as chunk {piece.chunk} of its state")
        if self.plan.wanted(piece):
            self.data[start : start + size_bytes] = answer.data
            self.given[peer] += size_bytes
            self.plan.done(piece)
            self.bell.ring()

    async def _ask(self, stream: Stream, request: StateMessage, patience_s: float) -> StateMessage:
        await self._send(stream, request)
        return await self._receive(stream, patience_s)

    async def _send(self, stream: Stream, request: StateMessage) -> None:
        with trio.move_on_after(CHUNK_PATIENCE_S) as patience:
            await stream.send(*state_codec.encode(request))
        if patience.cancelled_caught:
            raise PeerTimeout(stream.peer, f"took no question for {CHUNK_PATIENCE_S:.0f} s")

    async def _receive(self, stream: Stream, patience_s: float) -> StateMessage:
        """The next answer. Raises PeerRefused for NotNow, other PeerErrors for silence, an end or nonsense."""
        with trio.move_on_after(patience_s) as patience:
            frame = await stream.receive()
        if patience.cancelled_caught:
            raise PeerTimeout(stream.peer, f"sent nothing for {patience_s:.0f} s")
        if frame is None:
            raise PeerUnreachable(stream.peer, "ended the stream before it had sent everything")
        try:
            answer = state_codec.decode_only(frame)
        except RemoteProtocolError as error:
            raise RemoteProtocolError(error.reason, stream.peer) from None
        if isinstance(answer, NotNow):
            raise PeerRefused(stream.peer, answer.reason)
        return answer


@asynccontextmanager
async def _stream(transport: Transport, peer: str) -> AsyncIterator[Stream]:
    """A stream of the protocol: ended when the block is done, abandoned when it fails."""
    with trio.move_on_after(CHUNK_PATIENCE_S) as patience:
        stream = await transport.open(peer, STATE)
    if patience.cancelled_caught:
        raise PeerTimeout(peer, f"opened no stream within {CHUNK_PATIENCE_S:.0f} s")
    try:
        yield stream
    except BaseException:
        await stream.reset()
        raise
    await stream.aclose()


def _n_chunks(size_bytes: int) -> int:
    return -(-size_bytes // MAX_FILE_CHUNK_BYTES)
