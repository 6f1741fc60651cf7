"""The conformance suite of the `RecordStore` port.

How a store plugs in: give a `Rig`, made fresh for each check, and run every check of `CHECKS` with it. `pass_time`
moves the clock that the stores read, so that no check waits for an expiry in real time. A store that settles in the
background (holders that learn a record late) gets its time from `Rig.settle`, after each write.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from hashlib import sha256
from typing import Protocol

import msgspec
import pytest

from mycel.protocols.errors import LocalProtocolError
from mycel.protocols.messages import PeerAddress, SignedRecord
from mycel.protocols.ports import RecordStore
from mycel.security.envelope import sign_record
from mycel.security.identity import Identity

KEY = sha256(b"a key of the suite").digest()
TTL_S = 30.0


@dataclass(frozen=True)
class Node:
    """One member of the network: its store, and who and where it is."""

    store: RecordStore
    identity: Identity
    address: PeerAddress


class Rig(Protocol):
    async def start(self) -> Node:
        """A new member that has joined: it knows the others, and they know it."""
        ...

    async def kill(self, node: Node) -> None: ...

    def now_s(self) -> float:
        """Unix time, as the stores read it."""
        ...

    async def pass_time(self, duration_s: float) -> None: ...

    async def settle(self) -> None: ...


Check = Callable[[Rig], Awaitable[None]]


def _record(rig: Rig, writer: Identity, seq: int, value: bytes, ttl_s: float = TTL_S, key: bytes = KEY) -> SignedRecord:
    return sign_record(writer, key, seq, rig.now_s() + ttl_s, value)


async def _nodes(rig: Rig, count: int) -> list[Node]:
    return [await rig.start() for _ in range(count)]


async def _put(rig: Rig, node: Node, record: SignedRecord) -> int:
    n_holders = await node.store.put(record)
    await rig.settle()
    return n_holders


async def what_one_puts_all_get(rig: Rig) -> None:
    nodes = await _nodes(rig, 5)
    record = _record(rig, nodes[1].identity, 1, b"hello")
    assert 2 <= await _put(rig, nodes[1], record) <= 5
    for node in nodes:
        assert await node.store.get(KEY) == (record,)
        assert await node.store.get(sha256(b"another key").digest()) == ()


async def a_node_alone_keeps_its_own(rig: Rig) -> None:
    (alone,) = await _nodes(rig, 1)
    record = _record(rig, alone.identity, 1, b"hello")
    assert await _put(rig, alone, record) == 1
    assert await alone.store.get(KEY) == (record,)


async def writers_share_a_key(rig: Rig) -> None:
    nodes = await _nodes(rig, 4)
    records = [_record(rig, node.identity, 1, f"value {i}".encode()) for i, node in enumerate(nodes)]
    for node, record in zip(nodes, records, strict=True):
        await _put(rig, node, record)
    expected = tuple(sorted(records, key=lambda record: record.writer))
    for node in nodes:
        assert await node.store.get(KEY) == expected


async def the_newest_of_a_writer_wins(rig: Rig) -> None:
    """Also when the older one comes later, from whomever."""
    nodes = await _nodes(rig, 4)
    old, middle, new = (_record(rig, nodes[0].identity, seq, b"seq %d" % seq) for seq in (1, 2, 3))
    await _put(rig, nodes[0], middle)
    await _put(rig, nodes[0], new)
    await _put(rig, nodes[2], old)
    for node in nodes:
        assert await node.store.get(KEY) == (new,)


async def a_record_ends_at_its_time(rig: Rig) -> None:
    nodes = await _nodes(rig, 4)
    brief = _record(rig, nodes[0].identity, 1, b"brief", ttl_s=20)
    lasting = _record(rig, nodes[1].identity, 1, b"lasting", ttl_s=100)
    await _put(rig, nodes[0], brief)
    await _put(rig, nodes[1], lasting)
    await rig.pass_time(5)
    for node in nodes:
        assert set(await node.store.get(KEY)) == {brief, lasting}
    await rig.pass_time(20)
    for node in nodes:
        assert await node.store.get(KEY) == (lasting,)
    await rig.pass_time(100)
    for node in nodes:
        assert await node.store.get(KEY) == ()


async def a_forged_record_is_our_bug(rig: Rig) -> None:
    """No store passes on what its own check refuses; nobody ever reads it."""
    nodes = await _nodes(rig, 3)
    good = _record(rig, nodes[0].identity, 1, b"good")
    forgeries = {
        "value": msgspec.structs.replace(good, value=b"evil"),
        "writer": msgspec.structs.replace(good, writer=nodes[1].identity.peer_id),
        "seq": msgspec.structs.replace(good, seq=2),
        "lifetime": msgspec.structs.replace(good, expires_at=good.expires_at + 1),
        "key": msgspec.structs.replace(good, key=sha256(b"another key").digest()),
        "expired": _record(rig, nodes[0].identity, 3, b"late", ttl_s=-1),
        "immortal": _record(rig, nodes[0].identity, 3, b"for ever", ttl_s=1e9),
    }
    for name, forged in forgeries.items():
        with pytest.raises(LocalProtocolError):
            await nodes[0].store.put(forged)
        assert await nodes[2].store.get(forged.key) == (), name
    await _put(rig, nodes[0], good)
    assert await nodes[2].store.get(KEY) == (good,)


async def records_outlive_their_holders(rig: Rig) -> None:
    nodes = await _nodes(rig, 6)
    record = _record(rig, nodes[0].identity, 1, b"hello")
    await _put(rig, nodes[0], record)
    for node in nodes[:2]:
        await rig.kill(node)
    for node in nodes[2:]:
        assert await node.store.get(KEY) == (record,)


async def peers_are_found(rig: Rig) -> None:
    nodes = await _nodes(rig, 5)
    await rig.settle()
    for node in nodes:
        for other in nodes:
            if other is not node:
                assert await node.store.find_peer(other.address.peer) == other.address
        assert await node.store.find_peer(Identity.from_seed(b"\x05" * 32).peer_id) is None


CHECKS: tuple[Check, ...] = (
    what_one_puts_all_get,
    a_node_alone_keeps_its_own,
    writers_share_a_key,
    the_newest_of_a_writer_wins,
    a_record_ends_at_its_time,
    a_forged_record_is_our_bug,
    records_outlive_their_holders,
    peers_are_found,
)
