"""hivemind's DHT in a process of its own: `python -m mycel.node.hivemind_engine.dht_process FD`.

Serves the requests of `dht_messages` on an inherited socket until it ends; then everything here ends, whatever ended
the other side. Of hivemind only its DHT is used, none of its codecs, and its reader of messages for what is shallow.

Ring: shell.
"""

from __future__ import annotations

import asyncio  # noqa: TID251 - hivemind is written for it; this is the process of its own
import itertools
import os
import shutil
import socket
import sys
import tempfile
from pathlib import Path
from typing import Any

import hivemind
import uvloop
from hivemind.dht.node import DHTNode
from hivemind.dht.protocol import DHTProtocol
from hivemind.dht.routing import DHTID
from hivemind.p2p import P2P
from hivemind.utils import MSGPackSerializer

from mycel.node.hivemind_engine import dht_messages as said
from mycel.node.hivemind_engine.depth import is_shallow
from mycel.protocols.messages import MAX_RECORD_VALUE_BYTES

_REPLICAS = 5
_CANDIDATES = 15
_ASK_S = 30.0
_MAX_VALUE_BYTES = MAX_RECORD_VALUE_BYTES + 1024  # a record and its frame
_read = MSGPackSerializer.loads


class ShallowSerializer(MSGPackSerializer):  # type: ignore[misc]
    """hivemind's own, which a message of 714 bytes can crash, for messages that are not nested deeply.

    What cannot be read is None: one bad value must not keep a search from ending.
    """

    @classmethod
    def loads(cls, buf: bytes) -> object:
        try:
            return _read(buf) if is_shallow(buf) else None
        except Exception:  # noqa: BLE001 - whatever a stranger's bytes make of it
            return None


class Service:
    """The DHT nodes of this process, by number."""

    def __init__(self, writer: asyncio.StreamWriter) -> None:
        self._writer = writer
        self._nodes: dict[int, tuple[DHTNode, bool]] = {}  # and whether it only asks
        self._numbers = itertools.count(1)

    async def answer(self, asked: said.Asked) -> None:
        try:
            reply = await asyncio.wait_for(self._answer(asked.body), _ASK_S)
        except Exception as error:  # noqa: BLE001 - the root of a request; the asker hears of it
            reply = said.Failed(f"{type(error).__name__}: {error}"[:1000])
        self._writer.write(said.to_frame(said.Answered(asked.number, reply)))
        await self._writer.drain()

    async def _answer(self, body: said.Request) -> said.Reply:
        match body:
            case said.Start():
                return await self._start(body)
            case said.Put():
                return said.Kept(await self._put(body))
            case said.Get():
                return said.Got(await self._get(body))
            case said.Stop():
                await self._nodes.pop(body.node)[0].shutdown()
                return said.Stopped()

    async def _start(self, body: said.Start) -> said.Started:
        client = not body.listen
        where: dict[str, Any] = {"no_listen": True} if client else {"host_maddrs": list(body.listen)}
        node = await DHTNode.create(
            initial_peers=list(body.initial),
            client_mode=client,
            num_replicas=_REPLICAS,
            cache_locally=False,  # a record is asked for when it is wanted as it is now
            cache_on_store=False,
            cache_nearest=0,
            nat_port_map=False,
            auto_nat=False,
            **where,
        )
        number = next(self._numbers)
        self._nodes[number] = (node, client)
        addresses = () if client else tuple(map(str, await node.get_visible_maddrs()))
        return said.Started(number, addresses)

    async def _put(self, body: said.Put) -> int:
        """hivemind's own `store` with a count: the nearest nodes in turn, until enough have kept it."""
        node, client = self._nodes[body.node]
        key = DHTID.generate(source=body.key)
        found = await node.find_nearest_nodes([key], k_nearest=_CANDIDATES, exclude_self=client)
        candidates = list(found[key].items())
        value = ShallowSerializer.dumps(body.value)

        async def give(name: DHTID, peer: Any) -> bool:
            if name == node.node_id:
                return bool(node.protocol.storage.store(key, value, body.expires_at, subkey=body.subkey))
            kept = await node.protocol.call_store(peer, [key], [value], [body.expires_at], subkeys=[body.subkey])
            return bool(kept and kept[0])

        n_kept = 0
        while candidates and n_kept < _REPLICAS:
            turn, candidates = candidates[: _REPLICAS - n_kept], candidates[_REPLICAS - n_kept :]
            n_kept += sum(await asyncio.gather(*(give(name, peer) for name, peer in turn)))
        return n_kept

    async def _get(self, body: said.Get) -> tuple[bytes, ...]:
        found = await self._nodes[body.node][0].get(body.key, latest=True)
        if found is None or not isinstance(found.value, dict):
            return ()
        values = (entry.value for entry in found.value.values())
        sane = (value for value in values if isinstance(value, bytes) and len(value) <= _MAX_VALUE_BYTES)
        return tuple(itertools.islice(sane, said.MAX_VALUES))

    async def stop(self) -> None:
        await asyncio.gather(*(node.shutdown() for node, _ in self._nodes.values()), return_exceptions=True)


async def serve(sock: socket.socket) -> None:
    """Answer until the other side closes."""
    reader, writer = await asyncio.open_connection(sock=sock)
    service, room, tasks = Service(writer), asyncio.Semaphore(said.MAX_IN_FLIGHT), set[asyncio.Task[None]]()

    async def answer(asked: said.Asked) -> None:
        try:
            await service.answer(asked)
        finally:
            room.release()

    try:
        while True:
            head = await reader.readexactly(said.PREFIX_BYTES)
            asked = said.read_asked(await reader.readexactly(said.body_bytes(head)))
            await room.acquire()
            task = asyncio.create_task(answer(asked))
            tasks.add(task)
            task.add_done_callback(tasks.discard)
    except (asyncio.IncompleteReadError, ConnectionError):
        pass  # the node has ended, or wants no more of us
    finally:
        await service.stop()
        writer.close()


def main(descriptor: int) -> None:
    assert hivemind.__version__ == "1.1.12", "the private names used here are those of this version"
    DHTProtocol.serializer = ShallowSerializer
    MSGPackSerializer.loads = ShallowSerializer.loads
    folder = Path(tempfile.mkdtemp(prefix="mycel-dht-"))
    P2P._UNIX_SOCKET_PREFIX = f"/unix{folder}/"
    try:
        with socket.socket(fileno=descriptor) as sock:
            sock.setblocking(False)
            uvloop.run(serve(sock))
    finally:
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    os.setsid()  # a Ctrl-C in the terminal is the node's to handle: it has to carry its last words
    main(int(sys.argv[1]))
