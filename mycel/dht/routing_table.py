"""Which peers this node knows, arranged by distance, and which of them are dead.

k-buckets: bucket i holds up to k peers that share exactly i leading bits with our position, least recently seen first.
Only first-hand contacts enter: a peer that spoke to us over an authenticated stream and can be dialled. A full bucket
keeps its old peers (who lived long lives longer, and a flood of new ids displaces nobody) and the newcomers wait as
replacements. A peer that fails leaves at once and stays on the dead list: what other nodes say does not bring it
back, its own voice does, and so does a probe of ours after the back-off. When the last one leaves, the back-offs end.

Ring: pure (`now` is monotonic time in seconds).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass, field
from heapq import nsmallest
from typing import NamedTuple

from mycel.dht.keys import SPACE_BITS, bucket_index, distance, position_of
from mycel.protocols.messages import PeerAddress


@dataclass(frozen=True, slots=True)
class TableLimits:
    """k of the buckets, and how the dead are remembered (back-off doubles from dead_s up to dead_max_s)."""

    bucket_size: int = 16
    replacements: int = 8
    dead: int = 1024
    dead_s: float = 60.0
    dead_max_s: float = 600.0
    dead_probes: int = 6  # failures in a row after which we ask no more by ourselves


class Contact(NamedTuple):
    address: PeerAddress
    position: bytes
    seen_at: float


@dataclass(slots=True)
class _Bucket:
    contacts: OrderedDict[str, Contact] = field(default_factory=OrderedDict)
    waiting: OrderedDict[str, Contact] = field(default_factory=OrderedDict)


@dataclass(slots=True)
class _Dead:
    address: PeerAddress
    until: float
    failures: int


class RoutingTable:
    """The known peers of `own_peer`."""

    def __init__(self, own_peer: str, limits: TableLimits) -> None:
        self._own_peer = own_peer
        self.own_position = position_of(own_peer)
        self.limits = limits
        self._buckets: dict[int, _Bucket] = {}
        self._dead: OrderedDict[str, _Dead] = OrderedDict()

    def __len__(self) -> int:
        return sum(len(bucket.contacts) for bucket in self._buckets.values())

    def __contains__(self, peer: str) -> bool:
        bucket = self._bucket_of(peer)
        return bucket is not None and peer in bucket.contacts

    def heard_from(self, address: PeerAddress, now: float) -> bool:
        """A peer spoke to us itself; whether it now stands in the table. A peer without addresses never does."""
        index = bucket_index(self.own_position, position := position_of(address.peer))
        if index is None:
            return False
        self._dead.pop(address.peer, None)
        bucket = self._buckets.setdefault(index, _Bucket())
        contact = Contact(address, position, now)
        known = bucket.contacts.pop(address.peer, None)
        bucket.waiting.pop(address.peer, None)
        if not address.addresses:  # a client: nobody could dial it, so nobody is told of it
            self._promote(bucket)
            return False
        if known is not None or len(bucket.contacts) < self.limits.bucket_size:
            bucket.contacts[address.peer] = contact
            return True
        bucket.waiting[address.peer] = contact
        while len(bucket.waiting) > self.limits.replacements:
            bucket.waiting.popitem(last=False)
        return False

    def failed(self, address: PeerAddress, now: float) -> None:
        """A peer did not answer: it leaves the table, and is dead for a back-off that grows with each failure."""
        if address.peer == self._own_peer:
            return
        bucket = self._bucket_of(address.peer)
        if bucket is not None:
            contact = bucket.contacts.pop(address.peer, None) or bucket.waiting.pop(address.peer, None)
            address = contact.address if contact is not None else address
            self._promote(bucket)
        dead = self._dead.pop(address.peer, None)
        failures = 1
        if dead is not None:
            address = dead.address if dead.address.addresses else address
            # Several calls that fail together are one failure.
            failures = dead.failures + (now >= dead.until)
        failures = min(failures, self.limits.dead_probes)
        backoff_s = min(self.limits.dead_s * 2 ** (failures - 1), self.limits.dead_max_s)
        self._dead[address.peer] = _Dead(address, now + backoff_s, failures)
        while len(self._dead) > self.limits.dead:
            self._dead.popitem(last=False)
        if not len(self):  # everybody dead at once: it was our own link that failed, so ask them again
            for each in self._dead.values():
                each.until = now

    def is_dead(self, peer: str, now: float) -> bool:
        """Whether a peer failed and its back-off still runs."""
        dead = self._dead.get(peer)
        return dead is not None and now < dead.until

    def address_of(self, peer: str) -> PeerAddress | None:
        """What a peer in the table told us about itself."""
        bucket = self._bucket_of(peer)
        contact = None if bucket is None else bucket.contacts.get(peer) or bucket.waiting.get(peer)
        return None if contact is None else contact.address

    def known_peers(self) -> tuple[str, ...]:
        """The ids in the table, bucket by bucket, least recently seen first."""
        return tuple(peer for bucket in self._buckets.values() for peer in bucket.contacts)

    def closest(self, key: bytes, count: int, without: Iterable[str] = ()) -> tuple[PeerAddress, ...]:
        """The `count` known peers nearest to `key`, nearest first."""
        left_out = set(without)
        contacts = (
            contact
            for bucket in self._buckets.values()
            for contact in bucket.contacts.values()
            if contact.address.peer not in left_out
        )
        nearest = nsmallest(count, contacts, key=lambda contact: distance(contact.position, key))
        return tuple(contact.address for contact in nearest)

    def to_probe(self, now: float, quiet_s: float, count: int) -> tuple[PeerAddress, ...]:
        """Whom to ask for a sign of life: peers not heard from for `quiet_s`, longest first, then due dead ones."""
        quiet = sorted(
            (contact for bucket in self._buckets.values() for contact in bucket.contacts.values()),
            key=lambda contact: contact.seen_at,
        )
        due = [contact.address for contact in quiet if now - contact.seen_at >= quiet_s]
        hopeful = (dead for dead in self._dead.values() if dead.failures < self.limits.dead_probes)
        due += [dead.address for dead in hopeful if now >= dead.until]
        return tuple(due[:count])

    def farthest_buckets(self, count: int) -> tuple[int, ...]:
        """The indices of the buckets worth filling: the farthest up to the nearest that has a peer, at most `count`."""
        filled = [index for index, bucket in self._buckets.items() if bucket.contacts]
        return tuple(range(min(max(filled, default=-1) + 1, count, SPACE_BITS)))

    def _bucket_of(self, peer: str) -> _Bucket | None:
        index = bucket_index(self.own_position, position_of(peer))
        return None if index is None else self._buckets.get(index)

    def _promote(self, bucket: _Bucket) -> None:
        """Give a free place to the replacement heard from last."""
        while bucket.waiting and len(bucket.contacts) < self.limits.bucket_size:
            peer, contact = bucket.waiting.popitem(last=True)
            bucket.contacts[peer] = contact
            bucket.contacts.move_to_end(peer, last=False)  # it was not heard from since it had to wait
