"""The directory of a swarm: who serves which blocks. Announce ours, find everybody's.

A peer is in the directory for as long as its last announcement lives; nothing is ever deleted. Works over any
`RecordStore`.

Ring: shell.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import msgspec

from mycel.dht.keys import span_key
from mycel.dht.records import Announcement, decode_announcement, encode_announcement, newer
from mycel.protocols.errors import RemoteProtocolError
from mycel.protocols.messages import SignedRecord
from mycel.protocols.ports import RecordStore
from mycel.security.envelope import sign_record
from mycel.security.signatures import Signer

TTL_S = 30.0
WITHDRAWN_S = 5.0


@dataclass(frozen=True, slots=True)
class Located:
    """What `peer` announced, with the record's seq and end (unix time, s). It may be "leaving": look at the state."""

    peer: str
    announcement: Announcement
    seq: int
    expires_at: float


class Directory:
    """Announcements under the span key of each swarm, written and read through `store`."""

    def __init__(self, store: RecordStore, identity: Signer, clock: Callable[[], float]) -> None:
        self._store = store
        self._identity = identity
        self._clock = clock
        self._seq = 0
        self._announced: dict[bytes, tuple[Announcement, float]] = {}  # swarm -> what we said, and until when

    async def announce(self, announcement: Announcement, ttl_s: float = TTL_S) -> int:
        """Say what this node serves, for `ttl_s` seconds; the number of peers that hold it now.

        Repeat before the time is over (every third of it is a good habit): the store repeats the same words to new
        holders, but cannot make them last longer. Raises LocalProtocolError for an announcement nobody would accept.
        """
        return await self._write(announcement, self._clock() + ttl_s)

    async def withdraw(self, swarm_id: bytes) -> int:
        """Say that this node leaves the swarm; the number of peers that hold the word, 0 if there was nothing to say.

        The last word outlives all that were said before: otherwise a peer that missed it could bring an older one back.
        """
        said, until = self._announced.pop(swarm_id, (None, 0.0))
        if said is None or until <= self._clock():
            return 0
        leaving = msgspec.structs.replace(said, state="leaving")
        holders = await self._write(leaving, max(until, self._clock() + WITHDRAWN_S))
        self._announced.pop(swarm_id, None)
        return holders

    async def find(self, swarm_id: bytes) -> tuple[Located, ...]:
        """Everybody's newest live announcement for the swarm, in order of peer id; asked of the network every time.

        The store has checked signatures; the content is checked here, and an announcement that makes no sense is left
        out as if its peer had said nothing.
        """
        key, newest = span_key(swarm_id), dict[str, SignedRecord]()
        for record in await self._store.get(key):
            newest[record.writer] = newer(newest.get(record.writer, record), record)
        now = self._clock()
        located = (self._read(record, key, swarm_id) for record in newest.values() if record.expires_at > now)
        return tuple(sorted((each for each in located if each is not None), key=lambda each: each.peer))

    async def _write(self, announcement: Announcement, expires_at: float) -> int:
        value = encode_announcement(announcement)
        self._seq = max(self._seq + 1, int(self._clock() * 1000))  # above what an earlier life of this node wrote
        self._announced[announcement.swarm] = (announcement, expires_at)
        key = span_key(announcement.swarm)
        return await self._store.put(sign_record(self._identity, key, self._seq, expires_at, value))

    @staticmethod
    def _read(record: SignedRecord, key: bytes, swarm_id: bytes) -> Located | None:
        try:
            announcement = decode_announcement(record.value)
        except RemoteProtocolError:
            return None
        if record.key != key or announcement.swarm != swarm_id:
            return None
        return Located(record.writer, announcement, record.seq, record.expires_at)
