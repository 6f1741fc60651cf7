"""One process of the averaging benchmark: says who it is, hears who the others are, averages when it is told to."""

from __future__ import annotations

import json
import sys
import time
import warnings
from typing import Any

import torch
import trio

SAY = "/bench/say/1"


def vector_of(number: int, n_elements: int) -> torch.Tensor:
    return torch.randn(n_elements, generator=torch.Generator().manual_seed(number))


def expected(n_peers: int, n_elements: int) -> torch.Tensor:
    total = vector_of(0, n_elements)
    for number in range(1, n_peers):
        total += vector_of(number, n_elements)
    return total / n_peers


def say(what: object) -> None:
    print(json.dumps(what), flush=True)


def run(engine: str, number: int, n_elements: int) -> None:
    torch.set_num_threads(1)
    if engine == "blobs":
        try:
            trio.run(_blobs, number, n_elements)
        except* SystemExit:
            pass
    elif engine.startswith("group"):
        try:
            trio.run(_group, engine, number, n_elements)
        except* SystemExit:
            pass
    elif engine == "hivemind":
        _hivemind(number, n_elements)
    else:
        raise SystemExit(f"no engine {engine}")


# ---- ours, without offers and certificates


async def _hear() -> Any:
    line = await trio.to_thread.run_sync(sys.stdin.readline, abandon_on_cancel=True)
    if not line:
        raise SystemExit(0)
    return json.loads(line)


async def _blobs(number: int, n_elements: int) -> None:
    from mycel.node.libp2p_transport import open_transport
    from mycel.node.rounds.blobs import BlobExchange
    from mycel.node.rounds.bulk import BulkLanes
    from mycel.security.identity import Identity

    async with open_transport(Identity.generate()) as transport, trio.open_nursery() as nursery:
        await _hear()
        lanes = BulkLanes(transport, ("/ip4/127.0.0.1/tcp/0",))
        exchange = BlobExchange(transport, lanes=lanes)
        await nursery.start(exchange.run)
        say([transport.peer_id, list(transport.addresses)])
        contacts = await _hear()
        for peer, addresses in contacts:
            if peer != transport.peer_id:
                transport.learn(peer, addresses)
        averaging = _Averaging(transport, exchange, [peer for peer, _ in contacts], vector_of(number, n_elements))
        await averaging.meet(number)
        say("ready")
        while True:
            options = await _hear()
            averaging.begin(options["round"] * 10 + len(options["variant"]))
            exchange._lanes = None if options["variant"] == "plain" else lanes
            say("set")
            await _hear()
            mean = await averaging.round(options["variant"])
            say(f"ok{_error(mean, options, number, len(contacts))}")


class _Averaging:
    def __init__(self, transport: Any, exchange: Any, peers: list[str], mine: torch.Tensor) -> None:
        self.transport, self.exchange, self.peers, self.mine = transport, exchange, peers, mine
        self.me = peers.index(transport.peer_id)
        self.store = exchange.store(bytes(32), "bench")
        self.streams: dict[str, Any] = {}
        self.inbox: dict[tuple[int, str], tuple[trio.MemorySendChannel[Any], trio.MemoryReceiveChannel[Any]]] = {}
        self.number = 0
        transport.serve(SAY, self._listen)

    def box(self, number: int, kind: str) -> Any:
        return self.inbox.setdefault((number, kind), trio.open_memory_channel(1000))

    async def _listen(self, stream: Any) -> None:
        while (frame := await stream.receive()) is not None:
            number, kind, index, what = json.loads(bytes(frame))
            self.box(number, kind)[0].send_nowait((index, what))

    async def meet(self, number: int) -> None:
        await trio.sleep(0.5)
        for peer in self.peers:
            if peer != self.transport.peer_id:
                self.streams[peer] = await self.transport.open(peer, SAY)

    def begin(self, number: int) -> None:
        self.store.drop_before(number)
        self.number = number

    async def say(self, kind: str, what: Any) -> None:
        frame = json.dumps([self.number, kind, self.me, what]).encode()
        self.box(self.number, kind)[0].send_nowait((self.me, what))
        for stream in self.streams.values():
            await stream.send(frame)

    async def round(self, variant: str) -> torch.Tensor:
        n = len(self.peers)
        parts = self.mine.tensor_split(n)
        coded = variant == "int8"
        results: list[torch.Tensor] = [torch.empty(0)] * n
        async with trio.open_nursery() as nursery:
            bodies = [await self._coded(part, coded) for part in parts]
            digests = [await self.store.put(body, self.number) for body in bodies]
            await self.say("offer", [digest.hex() for digest in digests])
            nursery.start_soon(self._reduce, parts[self.me].numel(), len(bodies[self.me]), coded)
            for _ in range(n):
                index, (digest, size) = await self.box(self.number, "result")[1].receive()
                nursery.start_soon(self._take, results, index, digest, size, coded, parts[index].numel())
        return torch.cat(results)

    async def _reduce(self, count: int, size: int, coded: bool) -> None:
        bodies: dict[int, memoryview] = {}

        async def fetch(index: int, digest: str) -> None:
            bodies[index] = await self.store.fetch(bytes.fromhex(digest), size, [self.peers[index]], self.number)

        async with trio.open_nursery() as nursery:
            for _ in self.peers:
                index, digests = await self.box(self.number, "offer")[1].receive()
                nursery.start_soon(fetch, index, digests[self.me])

        def reduce() -> memoryview:
            total = self._decoded(bodies[0], coded, count).clone()
            for index in range(1, len(self.peers)):
                total += self._decoded(bodies[index], coded, count)
            return self._encoded(total / len(self.peers), coded)

        result = await trio.to_thread.run_sync(reduce)
        digest = await self.store.put(result, self.number)
        await self.say("result", [digest.hex(), len(result)])

    async def _take(
        self, results: list[torch.Tensor], index: int, digest: str, size: int, coded: bool, count: int
    ) -> None:
        data = await self.store.fetch(bytes.fromhex(digest), size, [self.peers[index]], self.number)
        results[index] = await trio.to_thread.run_sync(self._decoded, data, coded, count)

    async def _coded(self, part: torch.Tensor, coded: bool) -> memoryview:
        return await trio.to_thread.run_sync(self._encoded, part, coded)

    def _encoded(self, part: torch.Tensor, coded: bool) -> memoryview:
        if not coded:
            return memoryview(part.numpy()).cast("B")
        from mycel.swarm.codecs import Layout, make_codec

        layout = Layout(((part.numel(),),))
        return memoryview(make_codec("int8").encoder(layout).encode(part, b""))

    def _decoded(self, data: memoryview, coded: bool, count: int) -> torch.Tensor:
        if not coded:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # the memory is not written to
                return torch.frombuffer(data, dtype=torch.float32)
        from mycel.swarm.codecs import Layout, make_codec

        return make_codec("int8").decode(data, Layout(((count,),)))


# ---- ours, as a library's caller has it


async def _group(engine: str, number: int, n_elements: int) -> None:
    from mycel.node.averaging import AverageOptions, Averager

    words = engine.split(":")[1:]
    contacts, n_peers = await _hear(), int(sys.argv[-1])
    options = AverageOptions(
        codec="int8" if "int8" in words else "float32",
        aggregators=3 if "open" in words else 1,
        open="open" in words,
        min_members=n_peers,
        quorum=1.0,
    )
    tensors, here = {"vector": vector_of(number, n_elements).reshape(-1, 1000)}, ("/ip4/127.0.0.1/tcp/0",)
    opened = Averager.join(contacts[0], tensors, listen=here) if contacts else None
    async with opened or Averager.create(tensors, options=options, listen=here) as averager:
        say([averager.invite])
        await _hear()
        await averager.joined(n_peers)
        say("ready")
        while True:
            asked = await _hear()
            say("set")
            await _hear()
            done = await averager.average(tensors)
            error = _error(done.tensors["vector"].reshape(-1), asked, number, n_peers)
            say(f"{done.contributors} of {done.members}{error}")


# ---- hivemind's


def _hivemind(number: int, n_elements: int) -> None:
    import hivemind
    from hivemind.averaging import DecentralizedAverager
    from hivemind.averaging.control import AveragingStage

    def hear() -> Any:
        line = sys.stdin.readline()
        if not line:
            raise SystemExit(0)
        return json.loads(line)

    mine = vector_of(number, n_elements)
    dht = hivemind.DHT(start=True, initial_peers=hear(), host_maddrs=["/ip4/127.0.0.1/tcp/0"])
    say([str(address) for address in dht.get_visible_maddrs()])
    n_peers = len(hear())
    averager = DecentralizedAverager(
        [mine.clone()],
        dht,
        start=True,
        prefix="bench",
        target_group_size=n_peers,
        min_matchmaking_time=2.0,
    )
    say("ready")
    while True:
        options = hear()
        with averager.get_tensors() as tensors:
            tensors[0].copy_(mine)
        control = averager.step(wait=False, require_trigger=True, timeout=60)
        while control.stage.value < AveragingStage.AWAITING_TRIGGER.value:
            time.sleep(0.02)
        say("set")
        hear()
        control.allow_allreduce()
        group = control.result(60)
        with averager.get_tensors() as tensors:
            mean = tensors[0].clone()
        say(f"group of {len(group)}{_error(mean, options, number, n_peers)}")


def _error(mean: torch.Tensor, options: dict[str, Any], number: int, n_peers: int) -> str:
    """Checked once, by one."""
    if options["round"] or number:
        return ""
    want = expected(n_peers, len(mean))
    return f", error {float((mean - want).norm() / want.norm()):.2g}"
