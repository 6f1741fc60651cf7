"""The `RecordStore` port over an existing hivemind DHT: a swarm can be announced where other swarms are.

A record is a value under its key, its writer being the sub-key. hivemind keeps of each sub-key what expires last and
knows no signatures: records are checked here after reading, and whoever overwrites one can hide it, not forge it.

Ring: shell.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from hashlib import sha256

import msgspec
import trio

from mycel.dht.addresses import sane
from mycel.dht.records import newer
from mycel.dht.store import StoreLimits
from mycel.node.background import background
from mycel.node.hivemind_engine import dht_messages as said
from mycel.node.hivemind_engine.dht_client import DhtClient
from mycel.protocols.errors import LocalProtocolError, PeerUnreachable, RemoteProtocolError
from mycel.protocols.messages import PeerAddress, SignedRecord
from mycel.security.envelope import check_record, sign_record
from mycel.security.signatures import Signer

ADDRESS_TTL_S = 60.0
_ADDRESS_DOMAIN = b"mycel/key/address/1\0"
_STEP_S = 1e-3
_encoder = msgspec.msgpack.Encoder()
_records = msgspec.msgpack.Decoder(SignedRecord)
_addresses = msgspec.msgpack.Decoder(PeerAddress)


def address_key(peer: str) -> bytes:
    """Under which key a peer says where it can be dialled."""
    return sha256(_ADDRESS_DOMAIN + peer.encode()).digest()


class HivemindRecordStore:
    """See `mycel.protocols.ports.RecordStore`. `clock` gives unix time; `own` is what `find_peer` tells others.

    Made by `open_hivemind_records`.
    """

    def __init__(
        self, client: DhtClient, node: int, identity: Signer, clock: Callable[[], float], own: PeerAddress
    ) -> None:
        self.addresses: tuple[str, ...] = ()  # of the DHT node, for others to join through
        self._client = client
        self.node = node
        self._identity = identity
        self._clock = clock
        self._own = own
        self._max_ttl_s = StoreLimits().max_ttl_s
        self._ends: dict[bytes, tuple[int, float]] = {}  # of our records: seq, and the end that hivemind was told

    async def put(self, record: SignedRecord) -> int:
        """Store a record with the nodes nearest to its key; how many of them took it, this one included."""
        try:
            check_record(record, self._clock(), self._max_ttl_s)
        except RemoteProtocolError as error:
            raise LocalProtocolError(f"not stored: {error.reason}") from None
        request = said.Put(self.node, record.key, record.writer, _encoder.encode(record), self._end_of(record))
        return (await self._client.ask(request, said.Kept)).holders

    def _end_of(self, record: SignedRecord) -> float:
        """hivemind keeps what ends last, we what was said last: so a later word of ours never ends earlier."""
        if record.writer != self._identity.peer_id:
            return record.expires_at
        now = self._clock()
        self._ends = {key: said_before for key, said_before in self._ends.items() if said_before[1] > now}
        seq, end = self._ends.get(record.key, (-1, 0.0))
        if record.seq < seq:
            return record.expires_at
        end = max(record.expires_at, end + _STEP_S)
        self._ends[record.key] = (record.seq, end)
        return end

    async def get(self, key: bytes) -> tuple[SignedRecord, ...]:
        """The newest valid record of each writer under `key`, in order of writer id."""
        found = await self._client.ask(said.Get(self.node, key), said.Got)
        newest: dict[str, SignedRecord] = {}
        for value in found.values:
            record = self._checked(value, key)
            if record is not None:
                newest[record.writer] = newer(newest.get(record.writer, record), record)
        return tuple(newest[writer] for writer in sorted(newest))

    def _checked(self, value: bytes, key: bytes) -> SignedRecord | None:
        """The record in a stranger's bytes, or None for anything that is not a valid one of this key."""
        try:
            record = _records.decode(value)
            check_record(record, self._clock(), self._max_ttl_s)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError, RemoteProtocolError):
            return None
        return record if record.key == key else None

    async def find_peer(self, peer: str) -> PeerAddress | None:
        """Where a peer says that it can be dialled; that it answers there is for the caller to see."""
        if peer == self._own.peer:
            return self._own
        for record in await self.get(address_key(peer)):
            if record.writer == peer:
                try:
                    found = _addresses.decode(record.value)
                except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
                    return None
                return sane(found) if found.peer == peer else None
        return None

    async def tell_address(self) -> int:
        """Say where we can be dialled, for `ADDRESS_TTL_S`."""
        now = self._clock()
        value = _encoder.encode(self._own)
        key = address_key(self._own.peer)
        return await self.put(sign_record(self._identity, key, int(now * 1000), now + ADDRESS_TTL_S, value))

    async def run(self) -> None:
        """Repeat our address until cancelled."""
        while True:
            await trio.sleep(ADDRESS_TTL_S / 3)
            try:
                await self.tell_address()
            except PeerUnreachable:
                continue  # cut off for now: the next word may get through


@asynccontextmanager
async def open_hivemind_records(
    client: DhtClient,
    identity: Signer,
    clock: Callable[[], float],
    own: PeerAddress,
    *,
    initial: Sequence[str] = (),
    listen: Sequence[str] = ("/ip4/127.0.0.1/tcp/0",),
) -> AsyncIterator[HivemindRecordStore]:
    """A member of the DHT that the multiaddrs `initial` (ending in /p2p/...) lead to; with none, of a new one.

    Without `listen` addresses it keeps nothing for others. Raises PeerUnreachable if none of `initial` answers.
    """
    started = await client.ask(said.Start(tuple(initial), tuple(listen)), said.Started)
    store = HivemindRecordStore(client, started.node, identity, clock, own)
    store.addresses = started.addresses
    try:
        await store.tell_address()
        async with background() as tasks:
            tasks.start_soon(store.run)
            yield store
    finally:
        with trio.CancelScope(shield=True), trio.move_on_after(5):
            await client.ask(said.Stop(started.node), said.Stopped)
