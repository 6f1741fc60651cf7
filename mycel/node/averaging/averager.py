"""Averaging a dictionary of tensors with whoever is in the group: a library for other trainers.

Whoever creates a group says what is averaged and how: its charter, whose SHA-256 is the id of the group and stands in
the invite. Who joins gets the charter from the peers of the invite, and must bring tensors of the same names, shapes
and dtypes. Every call of `average` is a contribution to a round of `node/rounds`; between rounds nothing is shared.

Legend: P all elements of the tensors together.

Ring: shell.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import msgspec
import trio
from torch import Tensor

from mycel.node.averaging.charter import (
    AverageOptions,
    Charter,
    charter_of,
    check_tensors,
    encode_charter,
    flat,
    read_charter,
    unflat,
)
from mycel.node.background import background
from mycel.node.compute import DeviceCompute
from mycel.node.endpoints import parse_endpoint
from mycel.node.events import EventSink, no_events
from mycel.node.file_transfer import DiskThreads, FileOptions, ask
from mycel.node.network import Network, open_network
from mycel.node.rounds.blobs import BlobExchange
from mycel.node.rounds.bulk import BulkLanes
from mycel.node.rounds.group import Committed, Contribution, Group, GroupPlace, GroupPorts, NeedState, Standing
from mycel.node.rounds.round_streams import RoundDoor
from mycel.protocols.codec import file_codec
from mycel.protocols.errors import ConfigError, PeerError, PeerTimeout, PeerUnreachable, RemoteProtocolError
from mycel.protocols.ids import FILES
from mycel.protocols.messages import GetManifest, ManifestBytes, NotHere, PeerAddress
from mycel.protocols.ports import Stream
from mycel.security.identity import Identity, load_or_create
from mycel.swarm.codecs import Encoder
from mycel.swarm.invite import make_invite, parse_invite
from mycel.swarm.rounds.reducer import VectorReducer
from mycel.swarm.training.bell import Bell

__all__ = ["Averaged", "Averager"]

SCOPE = "average"
INVITE_LIFETIME_S = 30 * 24 * 3600.0
FIND_S = 2.0
MAX_WEIGHT = 2**32
# All members share this, and nothing else, between rounds.
_STATE = hashlib.sha256(b"mycel average").digest()
_CHARTER, _PEERS = "charter", "peers"
_MAX_NOTED = 64
_peers_encoder = msgspec.msgpack.Encoder()
_peers_decoder = msgspec.msgpack.Decoder(tuple[PeerAddress, ...])


@dataclass(frozen=True, slots=True)
class Averaged:
    """What came of one `average`: new tensors, and how many of how many members are in them."""

    tensors: dict[str, Tensor]
    contributors: int
    members: int
    round: int


class Averager:
    """A member of a group. Made by `create` and `join`, which are async context managers."""

    def __init__(self, group: Group, charter: Charter, network: Network, compute: DeviceCompute, folder: Path) -> None:
        self._group, self._charter, self._network, self._compute = group, charter, network, compute
        self._folder, self._noted = folder, b""
        self._reducer = VectorReducer(charter.layout(), charter.terms())
        self._encoders: dict[int, list[Encoder]] = {}
        self._room_P: Tensor | None = None
        self._turn = trio.Lock()
        self._wanted = 0  # the round whose result is waited for
        self._done: Committed | None = None
        self._moved = Bell()

    @staticmethod
    @asynccontextmanager
    async def create(
        tensors: Mapping[str, Tensor],
        *,
        options: AverageOptions | None = None,
        listen: Sequence[str] = ("/ip4/0.0.0.0/tcp/0",),
        folder: Path | None = None,
        event: EventSink = no_events,
    ) -> AsyncIterator[Averager]:
        """A new group for tensors like these; `.invite` is what others join with.

        `folder` keeps the identity, the group, who is in it and what was signed: a later life with the same folder goes
        on in that group, whoever made it, and needs no invite. Without one this peer comes as a new one each time.
        Raises ConfigError for tensors that cannot be averaged and options that say nothing.
        """
        async with _opened(listen, folder, event) as (network, path):
            data = _stored_charter(path)
            if data is None:
                data = encode_charter(charter_of(tensors, options or AverageOptions(), network.identity.peer_id))
            check_tensors(read_charter(data), tensors)
            async with _member(network, data, path, await _return_to(network, path), event) as averager:
                yield averager

    @staticmethod
    @asynccontextmanager
    async def join(
        invite: str,
        tensors: Mapping[str, Tensor],
        *,
        listen: Sequence[str] = ("/ip4/0.0.0.0/tcp/0",),
        folder: Path | None = None,
        event: EventSink = no_events,
    ) -> AsyncIterator[Averager]:
        """The group of an invite. Raises ConfigError if the tensors are others than the group's, saying which.

        A `folder` that is of a group already needs no invite to go on there: see `create`. Raises PeerUnreachable if
        nobody of the invite answers, other PeerErrors if nobody tells what the group is.
        """
        parsed = parse_invite(invite, time.time())
        async with _opened(listen, folder, event) as (network, path):
            data = _stored_charter(path)
            if data is not None and hashlib.sha256(data).digest() != parsed.swarm:
                raise ConfigError(f"the folder {path} is of another group than the invite")
            await network.join(parsed.bootstrap)
            if data is None:
                data = await _fetch_charter(network, network.answering_first(parsed.bootstrap), parsed.swarm)
            check_tensors(read_charter(data), tensors)
            async with _member(network, data, path, parsed.bootstrap, event) as averager:
                yield averager

    # ---- what is seen from outside

    @property
    def invite(self) -> str:
        """One line for others to join with; good for a month."""
        me = PeerAddress(self._network.identity.peer_id, self._network.transport.addresses[:8])
        run = self._group.place.run
        made = make_invite(self._network.identity, run, SCOPE, [me], now=time.time(), lifetime_s=INVITE_LIFETIME_S)
        return made.text

    @property
    def members(self) -> int:
        """How many members the group has, as far as is known here."""
        return len(self._group.members)

    @property
    def sent_bytes(self) -> int:
        """All that was told and given to others."""
        return self._group.said_bytes + self._group.given_bytes

    async def joined(self, members: int = 1) -> None:
        """Wait until this peer is a member, and the group has so many."""
        while not (self._group.is_member and self.members >= members):
            await self._group.bell.after(self._group.bell.count)

    # ---- averaging

    async def average(self, tensors: Mapping[str, Tensor], *, weight: int = 1, timeout_s: float = 120.0) -> Averaged:
        """The weighted mean (or what the rule makes) of these tensors and those of the others who average now.

        Waits for the next round in which ours are; the tensors may change once this returns. Raises ConfigError for
        other tensors than the group's, and PeerTimeout if there is no such round in time.
        """
        if not 1 <= weight <= MAX_WEIGHT:
            raise ConfigError(f"a weight is a whole number from 1 to {MAX_WEIGHT}, not {weight}")
        check_tensors(self._charter, tensors)
        async with self._turn:
            with trio.move_on_after(timeout_s):
                vector_P = (await self._compute.run(partial(self._flat, tensors))).value
                while True:
                    done = await self._one_round(vector_P, weight)
                    if done is not None:
                        return await self._averaged(done)
        raise PeerTimeout("", f"no average within {timeout_s:.0f} s: the group has {self.members} members")

    async def _one_round(self, vector_P: Tensor, weight: int) -> Committed | None:
        """Contribute to the round in hand, and wait for its end; None if ours is not in it."""
        await self.joined(self._charter.min_members)
        seen, number, n_shards = self._group.bell.count, self._group.round, self._group.n_shards
        encoders, bodies = (await self._compute.run(partial(self._encode, vector_P, n_shards))).value
        accepted = False
        self._wanted, self._done = number, None
        try:
            if not await self._group.contribute(Contribution(tuple(bodies), weight), number):
                await self._group.bell.after(seen)
                return None
            while (done := self._result()) is None and self._group.round <= number:
                await self._moved.after(self._moved.count)
            accepted = done is not None and done.accepted
            return done if accepted else None
        finally:
            self._wanted = 0
            for encoder in encoders:
                encoder.settle(accepted)

    def _flat(self, tensors: Mapping[str, Tensor]) -> Tensor:
        vector_P = flat(self._charter, tensors, self._room_P)
        self._room_P = vector_P if len(self._charter.names) > 1 else None
        return vector_P

    def _result(self) -> Committed | None:
        return self._done

    def _encode(self, vector_P: Tensor, n_shards: int) -> tuple[list[Encoder], list[bytes]]:
        parts = self._reducer.shards(n_shards)
        encoders = self._encoders.get(n_shards)
        if encoders is None:
            encoders = [self._reducer.codec.encoder(part) for part in parts]
            self._encoders = {n_shards: encoders}  # what another division owes is lost with it
        seed = os.urandom(32)
        vectors = self._reducer.cut(vector_P, n_shards)
        bodies = [encoder.encode(part_P, seed) for encoder, part_P in zip(encoders, vectors, strict=True)]
        return encoders, bodies + [b""] * (n_shards - len(bodies))

    async def _averaged(self, done: Committed) -> Averaged:
        outcome = done.certificate.outcome
        try:
            mean_P = (await self._compute.run(partial(self._reducer.decode, done.results))).value
        except RemoteProtocolError as error:
            raise RemoteProtocolError(f"the group agreed on a result that is none: {error.reason}") from None
        tensors = unflat(self._charter, mean_P)
        return Averaged(tensors, len(outcome.contributors), len(outcome.members), outcome.round)

    # ---- in the background

    async def _follow(self) -> None:
        """Go on from round to round, whoever contributes: there is no state that one could lack."""
        while True:
            match await self._group.committed():
                case NeedState() as need:
                    await self._group.resume(need.round, _STATE)
                case Committed() as done:
                    if done.round == self._wanted:
                        self._done = done
                    self._group.applied(_STATE)
            self._moved.ring()
            await self._note_peers()

    async def _note_peers(self) -> None:
        """Have on disk where the others are, for a later life of ours."""
        found = tuple(PeerAddress(*known) for known in sorted(self._group.addresses.items())[:_MAX_NOTED])
        data = _peers_encoder.encode(found)
        if found and data != self._noted:
            self._noted = data
            await trio.to_thread.run_sync(_replace, self._folder / _PEERS, data)

    async def _find(self) -> None:
        """Meet the members that the group names and nobody has brought us together with."""
        while True:
            for peer in self._group.members:
                if peer != self._network.identity.peer_id and peer not in self._group.present:
                    try:
                        address = await self._network.records.find_peer(peer)
                    except PeerError:
                        continue
                    if address is not None:
                        self._group.meet(address)
            with trio.move_on_after(FIND_S):
                await self._group.bell.after(self._group.bell.count)


# ---- making one


@asynccontextmanager
async def _opened(listen: Sequence[str], folder: Path | None, event: EventSink) -> AsyncIterator[tuple[Network, Path]]:
    with tempfile.TemporaryDirectory(prefix="mycel-") as temporary:
        path = folder or Path(temporary)
        path.mkdir(parents=True, exist_ok=True)
        identity = load_or_create(path / "identity") if folder is not None else Identity.generate()
        async with open_network(identity, listen, event) as network:
            yield network, path


@asynccontextmanager
async def _member(
    network: Network, data: bytes, path: Path, bootstrap: Sequence[PeerAddress], event: EventSink
) -> AsyncIterator[Averager]:
    charter, run = read_charter(data), hashlib.sha256(data).digest()
    transport, compute = network.transport, DeviceCompute()
    lanes = BulkLanes(transport, _any_port(network.listening), event=event)
    exchange = BlobExchange(transport, lanes=lanes, event=event)
    ports = GroupPorts(RoundDoor(transport), exchange, network.identity, compute, DiskThreads(), event)
    if not (path / _CHARTER).exists():
        (path / _CHARTER).write_bytes(data)
    place = GroupPlace(run, SCOPE, charter.terms(), charter.founder)
    reducer = VectorReducer(charter.layout(), charter.terms())
    group = Group(place, ports, reducer, path / run.hex()[:16], Standing(_STATE))
    averager = Averager(group, charter, network, compute, path)
    transport.serve(FILES, partial(_give_charter, run, data))
    async with background() as tasks:
        await tasks.start(exchange.run)
        await tasks.start(group.run)
        for address in bootstrap:
            group.meet(address)
        tasks.start_soon(averager._follow)
        tasks.start_soon(averager._find)
        yield averager


def _stored_charter(path: Path) -> bytes | None:
    """Of the group that the folder is of, if it is of one."""
    return (path / _CHARTER).read_bytes() if (path / _CHARTER).exists() else None


async def _return_to(network: Network, path: Path) -> tuple[PeerAddress, ...]:
    """The members that were there in an earlier life; they may all be gone, and come back later."""
    if not (path / _PEERS).exists():
        return ()
    try:
        known = _peers_decoder.decode((path / _PEERS).read_bytes())
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path / _PEERS} cannot be read: {error}") from None
    with suppress(PeerUnreachable):
        await network.join(known)
    return known


def _replace(path: Path, data: bytes) -> None:
    """All of it or what was there before."""
    new = path.with_suffix(".new")
    new.write_bytes(data)
    new.replace(path)


def _any_port(listening: Sequence[str]) -> tuple[str, ...]:
    endpoints = [parse_endpoint(text) for text in listening]
    return tuple(dict.fromkeys(f"/{found.kind}/{found.host}/tcp/0" for found in endpoints if found is not None))


async def _give_charter(run: bytes, data: bytes, stream: Stream) -> None:
    """The files protocol, of which a group has one file."""
    while (frame := await stream.receive()) is not None:
        question = file_codec.decode_only(frame)
        is_ours = isinstance(question, GetManifest) and question.swarm == run
        await stream.send(*file_codec.encode(ManifestBytes(data) if is_ours else NotHere("not a file of this group")))


async def _fetch_charter(network: Network, peers: Sequence[str], run: bytes) -> bytes:
    """Raises PeerError if nobody gives it."""
    failure: PeerError = PeerTimeout("", "nobody of the invite could be asked what the group is")
    for peer in peers:
        try:
            answer = await ask(network.transport, peer, GetManifest(run), FileOptions())
        except PeerError as error:
            failure = error
            continue
        if isinstance(answer, ManifestBytes) and hashlib.sha256(answer.manifest).digest() == run:
            return answer.manifest
        failure = RemoteProtocolError("described another group than that of the invite", peer)
    raise failure
