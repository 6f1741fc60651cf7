"""The two network engines beside each other on loopback: py-libp2p's adapter, the Go daemon, and mixed pairs.

    python -m benchmarks.engines [--seconds 30] [--rounds 3]

Each end of a pair is a process of its own. Within a round all pairs take turns, so that a busy machine slows all of
them alike. The mixed load is what a hop does while it is busy: steps of 2 KiB beside transfers and short streams.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import trio

from mycel.node.hivemind_engine.available import engine_available
from mycel.node.hivemind_engine.p2pd_transport import open_p2pd_transport
from mycel.node.libp2p_transport import open_transport
from mycel.protocols.errors import PeerError
from mycel.protocols.ports import Stream, Transport
from mycel.security.identity import Identity

ROOT = Path(__file__).resolve().parent.parent
ECHO, SINK = "/bench/echo/1", "/bench/sink/1"
PAIRS = (("libp2p", "libp2p"), ("p2pd", "p2pd"), ("libp2p", "p2pd"), ("p2pd", "libp2p"))
SIZES = (64, 2048, 8192)
BULK_BYTES = 128 * 2**20
CHUNK_BYTES = 2**20


def open_engine(name: str, listen: tuple[str, ...]) -> AbstractAsyncContextManager[Transport]:
    opener: Any = open_p2pd_transport if name == "p2pd" else open_transport
    opened: AbstractAsyncContextManager[Transport] = opener(Identity.generate(), listen=listen)
    return opened


# ---- the serving end


async def echo(stream: Stream) -> None:
    while (frame := await stream.receive()) is not None:
        await stream.send(frame)


async def sink(stream: Stream) -> None:
    """Takes everything, and says so when the sender sends one byte."""
    while (frame := await stream.receive()) is not None:
        if len(frame) == 1:
            await stream.send(b"all")


async def serve(engine: str) -> None:
    async with open_engine(engine, ("/ip4/127.0.0.1/tcp/0",)) as transport:
        transport.serve(ECHO, echo)
        transport.serve(SINK, sink)
        print(transport.peer_id, transport.addresses[0], flush=True)
        await trio.to_thread.run_sync(sys.stdin.read, abandon_on_cancel=True)


@asynccontextmanager
async def serving(engine: str) -> AsyncIterator[tuple[str, str]]:
    command = [sys.executable, "-m", "benchmarks.engines", "--serve", engine]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    process = await trio.lowlevel.open_process(command, cwd=ROOT, **pipes)
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        line = b""
        while not line.endswith(b"\n"):
            more = await process.stdout.receive_some()
            assert more, "the serving process ended"
            line += more
        peer, address = line.decode().split()
        yield peer, address
    finally:
        with trio.CancelScope(shield=True):
            await process.stdin.aclose()
            await process.wait()
            await process.stdout.aclose()


# ---- measuring


@dataclass
class Figures:
    """Of one pair, over all rounds; seconds and bytes per second."""

    rtts_s: dict[int, list[float]] = field(default_factory=lambda: {size: [] for size in SIZES})
    bulk: list[float] = field(default_factory=list)
    open_s: list[float] = field(default_factory=list)
    connect_s: list[float] = field(default_factory=list)
    mixed_s: list[float] = field(default_factory=list)
    mixed_bytes: float = 0.0
    errors: int = 0


async def round_trips(stream: Stream, size: int, count: int) -> list[float]:
    payload, times = bytes(size), []
    for _ in range(count):
        start = time.perf_counter()
        await stream.send(payload)
        await stream.receive()
        times.append(time.perf_counter() - start)
    return times


async def bulk(transport: Transport, peer: str, size: int = BULK_BYTES) -> float:
    stream, chunk = await transport.open(peer, SINK), bytes(CHUNK_BYTES)
    start = time.perf_counter()
    for _ in range(size // CHUNK_BYTES):
        await stream.send(chunk)
    await stream.send(b"?")
    await stream.receive()
    took_s = time.perf_counter() - start
    await stream.aclose()
    return size / took_s


async def mixed_load(transport: Transport, peer: str, figures: Figures, seconds: float) -> None:
    """What a hop does under load: three sessions of 2 KiB steps, one bulk transfer, and streams that come and go."""
    with trio.move_on_after(seconds):
        async with trio.open_nursery() as nursery:

            async def steps() -> None:
                stream, payload = await transport.open(peer, ECHO), bytes(2048)
                while True:
                    start = time.perf_counter()
                    await stream.send(payload)
                    await stream.receive()
                    figures.mixed_s.append(time.perf_counter() - start)
                    await trio.sleep(0.005)

            async def transfers() -> None:
                while True:
                    await bulk(transport, peer, 8 * CHUNK_BYTES)
                    figures.mixed_bytes += 8 * CHUNK_BYTES
                    await trio.sleep(0.05)

            async def visits() -> None:
                while True:
                    stream = await transport.open(peer, ECHO)
                    await stream.send(b"hello")
                    await stream.receive()
                    await stream.aclose()
                    await trio.sleep(0.02)

            async def counted(work: Any) -> None:
                while True:
                    try:
                        await work()
                    except PeerError as error:
                        figures.errors += 1
                        print(f"error: {error}", file=sys.stderr)

            for work in (steps, steps, steps, transfers, visits):
                nursery.start_soon(counted, work)


async def measure(client: str, server: str, figures: Figures, seconds: float) -> None:
    async with serving(server) as (peer, address), open_engine(client, ()) as transport:
        transport.learn(peer, [address])
        start = time.perf_counter()
        stream = await transport.open(peer, ECHO)
        await round_trips(stream, 64, 1)
        figures.connect_s.append(time.perf_counter() - start)
        await round_trips(stream, 2048, 200)
        for size in SIZES:
            figures.rtts_s[size] += await round_trips(stream, size, 1000)
        for _ in range(50):
            start = time.perf_counter()
            fresh = await transport.open(peer, ECHO)
            await round_trips(fresh, 64, 1)
            figures.open_s.append(time.perf_counter() - start)
            await fresh.aclose()
        figures.bulk.append(await bulk(transport, peer))
        await mixed_load(transport, peer, figures, seconds)


# ---- telling


def ms(values_s: list[float], share: float = 0.5) -> str:
    return f"{sorted(values_s)[min(len(values_s) - 1, int(share * len(values_s)))] * 1e3:.2f}"


def table(all_figures: dict[tuple[str, str], Figures], seconds: float) -> str:
    heads = ["client - server", *(f"{size} B" for size in SIZES), "open", "connect", "bulk MB/s"]
    heads += ["load p50", "p99", "p99.9", "p99/p50", "load MB/s", "errors"]
    rows = [heads, ["---"] * len(heads)]
    for (client, server), figures in all_figures.items():
        load = figures.mixed_s
        ratio = statistics.quantiles(load, n=100)[98] / statistics.median(load)
        rows.append(
            [
                f"{client} - {server}",
                *(ms(figures.rtts_s[size]) for size in SIZES),
                ms(figures.open_s),
                f"{min(figures.connect_s) * 1e3:.1f}",
                f"{max(figures.bulk) / 1e6:.0f}",
                ms(load),
                ms(load, 0.99),
                ms(load, 0.999),
                f"{ratio:.1f}",
                f"{figures.mixed_bytes / seconds / 1e6:.0f}",
                str(figures.errors),
            ]
        )
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


async def main(seconds: float, rounds: int) -> None:
    all_figures = {pair: Figures() for pair in PAIRS}
    for number in range(rounds):
        for pair, figures in all_figures.items():
            print(f"round {number + 1}: {pair[0]} - {pair[1]}", file=sys.stderr)
            await measure(*pair, figures, seconds / rounds)
    print("Milliseconds; medians but for connect and bulk, which are the best of the rounds.\n")
    print(table(all_figures, seconds))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seconds", type=float, default=30.0, help="of mixed load for each pair, in all")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        trio.run(serve, options.serve)
    elif engine_available():
        sys.exit(f"error: {engine_available()}")
    else:
        trio.run(main, options.seconds, options.rounds)
