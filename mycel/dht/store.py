"""The records that this node keeps for others: several writers under one key, each gone at its time, all bounded.

A record is checked before it is kept. It replaces its writer's older one only by a higher seq; the same bytes again are
welcome (writers repeat their puts). Quotas bound the writers of a key, the keys of a writer, and the whole. A full
store gives up what it is least responsible for: the keys farthest from its own position, and of those the record that
ends first; a record that is itself the least wanted is refused, so a flood of far keys displaces nothing near. A full
key refuses new writers rather than displace the present ones, who refresh.

Ring: pure (`now` is unix time in seconds).
"""

from __future__ import annotations

from dataclasses import dataclass
from heapq import heapify, heappop, heappush
from typing import NamedTuple

from mycel.dht.keys import distance
from mycel.protocols.errors import RemoteProtocolError
from mycel.protocols.messages import SignedRecord
from mycel.security.envelope import check_record


@dataclass(frozen=True, slots=True)
class StoreLimits:
    """What a store holds at most; `size_bytes` counts values and a flat RECORD_OVERHEAD_BYTES for each record."""

    max_ttl_s: float = 300.0
    writers_per_key: int = 256
    keys_per_writer: int = 64
    records: int = 16_384
    size_bytes: int = 16 * 1024 * 1024


class Decision(NamedTuple):
    """Whether a record is now held, and why."""

    accepted: bool
    reason: str


RECORD_OVERHEAD_BYTES = 512  # key, ids, signature, and Python's own books
SWEEP_S = 1.0  # a full store looks through everything for expired records at most this often


def record_size_bytes(record: SignedRecord) -> int:
    return len(record.value) + RECORD_OVERHEAD_BYTES


class ExpiringStore:
    """An expiring multi-writer store around `own_position` (32 bytes)."""

    def __init__(self, own_position: bytes, limits: StoreLimits) -> None:
        self._own_position = own_position
        self.limits = limits
        self._by_key: dict[bytes, dict[str, SignedRecord]] = {}
        self._keys_of: dict[str, set[bytes]] = {}
        self._farthest: list[tuple[int, bytes]] = []  # heap of (-distance, key); keys that are gone leave it late
        self._n_records = 0
        self._size_bytes = 0
        self._swept_at = float("-inf")

    def __len__(self) -> int:
        return self._n_records

    @property
    def size_bytes(self) -> int:
        return self._size_bytes

    def put(self, record: SignedRecord, now: float) -> Decision:
        """Keep `record` if it is valid, newer than its writer's last and within the quotas."""
        try:
            held = self._by_key.get(record.key, {}).get(record.writer)
            if held is not None and held.expires_at > now:
                if held == record:
                    return Decision(True, "already held")
                if record.seq <= held.seq:
                    return Decision(False, f"seq {record.seq} is not newer than {held.seq}")
            check_record(record, now, self.limits.max_ttl_s)
        except RemoteProtocolError as error:
            return Decision(False, error.reason)
        if held is None and (refusal := self._over_quota(record, now)):
            return Decision(False, refusal)
        # Its own predecessor frees room first; if the successor then finds none, the predecessor is outdated anyway.
        if held is not None:
            self._drop(held)
        if refusal := self._make_room(record, now):
            return Decision(False, refusal)
        if record.key not in self._by_key:
            self._by_key[record.key] = {}
            heappush(self._farthest, (-distance(record.key, self._own_position), record.key))
        self._by_key[record.key][record.writer] = record
        self._keys_of.setdefault(record.writer, set()).add(record.key)
        self._n_records += 1
        self._size_bytes += record_size_bytes(record)
        return Decision(True, "stored")

    def get(self, key: bytes, now: float) -> tuple[SignedRecord, ...]:
        """The live records under `key`, in order of writer id."""
        writers = self._by_key.get(key, {})
        return tuple(writers[writer] for writer in sorted(writers) if writers[writer].expires_at > now)

    def sweep(self, now: float) -> int:
        """Forget what has expired; how many records that were."""
        expired = [
            record for writers in self._by_key.values() for record in writers.values() if record.expires_at <= now
        ]
        for record in expired:
            self._drop(record)
        self._swept_at = now
        self._farthest = [(-distance(key, self._own_position), key) for key in self._by_key]
        heapify(self._farthest)
        return len(expired)

    def _over_quota(self, record: SignedRecord, now: float) -> str | None:
        """Why a writer new to its key is refused, or None."""
        limits = self.limits
        if len(self._by_key.get(record.key, {})) >= limits.writers_per_key:
            self._sweep_key(record.key, now)
            if len(self._by_key.get(record.key, {})) >= limits.writers_per_key:
                return f"the key has {limits.writers_per_key} writers already"
        if len(self._keys_of.get(record.writer, ())) >= limits.keys_per_writer:
            for key in tuple(self._keys_of[record.writer]):
                self._sweep_key(key, now)
            if len(self._keys_of.get(record.writer, ())) >= limits.keys_per_writer:
                return f"the writer has {limits.keys_per_writer} keys already"
        return None

    def _make_room(self, record: SignedRecord, now: float) -> str | None:
        """Free room for `record`, or say why there is none."""
        if self._has_room(record_size_bytes(record)):
            return None
        if now >= self._swept_at + SWEEP_S or now < self._swept_at:
            self.sweep(now)
            if self._has_room(record_size_bytes(record)):
                return None
        victims: list[SignedRecord] = []
        spared, refusal = self._choose_victims(record, victims)
        for key in spared:
            heappush(self._farthest, (-distance(key, self._own_position), key))
        if refusal is None:  # only now: a record that is refused displaces nobody
            for victim in victims:
                self._drop(victim)
        return refusal

    def _choose_victims(self, record: SignedRecord, victims: list[SignedRecord]) -> tuple[list[bytes], str | None]:
        """Fill `victims` until `record` has room; the keys taken off the heap, and why it cannot be done, or None."""
        taken: list[bytes] = []
        size_bytes, gap = record_size_bytes(record), distance(record.key, self._own_position)
        while (farthest := self._farthest_key()) is not None:
            heappop(self._farthest)
            if farthest in taken:
                continue  # it was given up and taken again before its first place in the heap was reached
            taken.append(farthest)
            if distance(farthest, self._own_position) < gap:
                return taken, "the store is full of records for nearer keys"
            for kept in sorted(self._by_key[farthest].values(), key=lambda kept: (kept.expires_at, kept.writer)):
                if farthest == record.key and kept.expires_at >= record.expires_at:
                    return taken, "the store is full of records that live longer"
                victims.append(kept)
                size_bytes -= record_size_bytes(kept)
                if self._n_records - len(victims) < self.limits.records and (
                    self._size_bytes + size_bytes <= self.limits.size_bytes
                ):
                    return taken, None
        return taken, f"the store holds {self.limits.records} records and {self.limits.size_bytes} bytes at most"

    def _farthest_key(self) -> bytes | None:
        while self._farthest and self._farthest[0][1] not in self._by_key:
            heappop(self._farthest)
        return self._farthest[0][1] if self._farthest else None

    def _has_room(self, size_bytes: int) -> bool:
        return self._n_records < self.limits.records and self._size_bytes + size_bytes <= self.limits.size_bytes

    def _sweep_key(self, key: bytes, now: float) -> None:
        for record in tuple(self._by_key.get(key, {}).values()):
            if record.expires_at <= now:
                self._drop(record)

    def _drop(self, record: SignedRecord) -> None:
        writers, keys = self._by_key[record.key], self._keys_of[record.writer]
        del writers[record.writer]
        keys.discard(record.key)
        if not writers:
            del self._by_key[record.key]
        if not keys:
            del self._keys_of[record.writer]
        self._n_records -= 1
        self._size_bytes -= record_size_bytes(record)
