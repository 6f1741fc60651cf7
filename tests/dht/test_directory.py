"""The directory over any record store: what it believes of what the store gives it."""

from __future__ import annotations

import pytest
import trio

from mycel.dht.directory import TTL_S, WITHDRAWN_S, Directory
from mycel.dht.keys import span_key
from mycel.dht.records import Announcement, encode_announcement
from mycel.protocols.errors import LocalProtocolError
from mycel.protocols.messages import PeerAddress, SignedRecord
from mycel.security.envelope import check_record, sign_record
from mycel.security.identity import Identity

SWARM, OTHER_SWARM = b"\x05" * 32, b"\x06" * 32
KEY = span_key(SWARM)
ME, YOU = Identity.from_seed(b"\x01" * 32), Identity.from_seed(b"\x02" * 32)


class Shelf:
    """A store that gives back whatever was put."""

    def __init__(self) -> None:
        self.records: list[SignedRecord] = []
        self.now = 1000.0

    async def put(self, record: SignedRecord) -> int:
        check_record(record, self.now, 60.0)
        self.records.append(record)
        return 1

    async def get(self, key: bytes) -> tuple[SignedRecord, ...]:
        return tuple(self.records)

    async def find_peer(self, peer: str) -> PeerAddress | None:
        return None


def directory(shelf: Shelf, identity: Identity = ME) -> Directory:
    return Directory(shelf, identity, lambda: shelf.now)


def value(end: int, swarm: bytes = SWARM) -> bytes:
    return encode_announcement(Announcement(swarm, 0, end))


def test_the_newest_word_of_each_peer() -> None:
    async def main() -> None:
        shelf = Shelf()
        mine, yours = directory(shelf), directory(shelf, YOU)
        await mine.announce(Announcement(SWARM, 0, 1))
        await yours.announce(Announcement(SWARM, 0, 2))
        await mine.announce(Announcement(SWARM, 0, 3))
        found = await mine.find(SWARM)
        assert [each.peer for each in found] == sorted([ME.peer_id, YOU.peer_id])
        assert {each.peer: each.announcement.end for each in found} == {ME.peer_id: 3, YOU.peer_id: 2}
        assert all(each.expires_at == shelf.now + TTL_S for each in found)
        shelf.now += TTL_S
        assert await mine.find(SWARM) == ()

    trio.run(main)


def test_seq_grows_also_if_the_clock_stands_or_goes_back() -> None:
    async def main() -> None:
        shelf = Shelf()
        mine = directory(shelf)
        for step_s in (0.0, 0.0, -5.0, 10.0):
            shelf.now += step_s
            await mine.announce(Announcement(SWARM, 0, 1))
        seqs = [record.seq for record in shelf.records]
        assert seqs == sorted(set(seqs))
        restarted = directory(shelf)
        shelf.now += 1.0
        await restarted.announce(Announcement(SWARM, 0, 1))
        assert shelf.records[-1].seq > seqs[-1]

    trio.run(main)


@pytest.mark.parametrize(
    "record",
    [
        sign_record(YOU, KEY, 1, 1010.0, b"\xc1"),
        sign_record(YOU, KEY, 1, 1010.0, b""),
        sign_record(YOU, KEY, 1, 1010.0, value(1, OTHER_SWARM)),
        sign_record(YOU, span_key(OTHER_SWARM), 1, 1010.0, value(1)),
        sign_record(YOU, KEY, 1, 999.0, value(1)),
    ],
    ids=["no announcement", "empty", "another swarm", "another key", "expired"],
)
def test_what_makes_no_sense_is_left_out(record: SignedRecord) -> None:
    async def main() -> None:
        shelf = Shelf()
        mine = directory(shelf)
        await mine.announce(Announcement(SWARM, 0, 1))
        shelf.records.append(record)
        assert [each.peer for each in await mine.find(SWARM)] == [ME.peer_id]

    trio.run(main)


def test_the_last_word_outlives_the_others() -> None:
    async def main() -> None:
        shelf = Shelf()
        mine = directory(shelf)
        assert await mine.withdraw(SWARM) == 0
        await mine.announce(Announcement(SWARM, 0, 1), ttl_s=20.0)
        shelf.now += 1.0
        assert await mine.withdraw(SWARM) == 1
        assert shelf.records[-1].expires_at == shelf.records[-2].expires_at
        (found,) = await mine.find(SWARM)
        assert found.announcement.state == "leaving"
        assert await mine.withdraw(SWARM) == 0
        await mine.announce(Announcement(SWARM, 0, 1), ttl_s=2.0)
        await mine.withdraw(SWARM)
        assert shelf.records[-1].expires_at == shelf.now + WITHDRAWN_S

    trio.run(main)


def test_nonsense_is_not_announced() -> None:
    async def main() -> None:
        shelf = Shelf()
        with pytest.raises(LocalProtocolError):
            await directory(shelf).announce(Announcement(SWARM, 3, 3))
        assert not shelf.records

    trio.run(main)
