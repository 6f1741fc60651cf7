"""Averaging one vector among processes: reduce-scatter and all-gather, beside hivemind's averager in one run.

    python -m benchmarks.averaging [--peers 4 8] [--elements 10000000] [--rounds 5] [--engines blobs hivemind]

Each peer is a process of its own, and all engines take turns, so that a busy machine slows all of them alike. A round's
time is from the word of the parent until the last peer has the average. hivemind's matchmaking is over before the word
is given; ours has none, for a group's members are known. What the engines are:

    blobs           one aggregator a shard, float32, over bulk lanes; `:int8` at 8 bits, `:plain` without lanes
    group           as a library's caller has it: the same with offers, plans, votes and the certificate
    group:open      with three aggregators a shard, an audit, and more than two thirds of the signatures
    group:int8      at 8 bits
    hivemind        float32 (the 8-bit codecs of 1.1.12 run with no current numpy, or need bitsandbytes)
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import trio

from benchmarks import averaging_peers

ROOT = Path(__file__).resolve().parent.parent
ENGINES = ("blobs", "blobs:int8", "group", "group:int8", "group:open", "hivemind")


@dataclass
class Peer:
    """A process of the benchmark, and the lines that it says."""

    process: trio.Process
    _lines: list[str] = field(default_factory=list)
    _partial: str = ""

    async def tell(self, what: object) -> None:
        assert self.process.stdin is not None
        await self.process.stdin.send_all(json.dumps(what).encode() + b"\n")

    async def hear(self) -> Any:
        assert self.process.stdout is not None
        while not self._lines:
            more = await self.process.stdout.receive_some()
            assert more, "a peer ended"
            *whole, self._partial = (self._partial + more.decode()).split("\n")
            self._lines += whole
        return json.loads(self._lines.pop(0))


@asynccontextmanager
async def peer_process(engine: str, number: int, n_elements: int, n_peers: int) -> AsyncIterator[Peer]:
    command = [
        sys.executable,
        "-m",
        "benchmarks.averaging",
        "--peer",
        engine,
        str(number),
        str(n_elements),
        str(n_peers),
    ]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    process = await trio.lowlevel.open_process(command, cwd=ROOT, **pipes)
    try:
        yield Peer(process)
    finally:
        with trio.CancelScope(shield=True):
            assert process.stdin is not None
            await process.stdin.aclose()
            with trio.move_on_after(20):
                await process.wait()
            if process.returncode is None:
                process.kill()
                await process.wait()
            if process.stdout is not None:
                await process.stdout.aclose()


@asynccontextmanager
async def group_of(engine: str, n_peers: int, n_elements: int) -> AsyncIterator[list[Peer]]:
    """Processes of one engine that know each other."""
    async with trio.open_nursery() as nursery:
        peers: list[Peer] = []
        over = trio.Event()

        async def keep(number: int, *, task_status: trio.TaskStatus[Peer]) -> None:
            async with peer_process(engine, number, n_elements, n_peers) as peer:
                task_status.started(peer)
                await over.wait()

        peers += [await nursery.start(keep, number) for number in range(n_peers)]
        try:
            contacts: list[Any] = []
            for peer in peers:
                await peer.tell([address for addresses in contacts[:1] for address in addresses])
                contacts.append(await peer.hear())
            for peer in peers:
                await peer.tell(contacts)
            for peer in peers:
                assert await peer.hear() == "ready"
            yield peers
        finally:
            over.set()


def cpu_seconds(peers: list[Peer]) -> float:
    """What the peers have computed so far, their children included."""
    roots = [psutil.Process(peer.process.pid) for peer in peers]
    living = [process for root in roots for process in (root, *root.children(recursive=True))]
    return sum(sum(process.cpu_times()[:2]) for process in living)


async def one_round(peers: list[Peer], options: dict[str, Any]) -> tuple[float, float, list[Any]]:
    """Seconds until the last peer is done, the CPU seconds of all, and what each says of it."""
    for peer in peers:
        await peer.tell(options)
    for peer in peers:
        assert await peer.hear() == "set"
    answers: list[Any] = [None] * len(peers)
    cpu_s = cpu_seconds(peers)
    started = time.perf_counter()

    async def go(index: int) -> None:
        await peers[index].tell("go")
        answers[index] = await peers[index].hear()

    async with trio.open_nursery() as nursery:
        for index in range(len(peers)):
            nursery.start_soon(go, index)
    took_s = time.perf_counter() - started
    return took_s, cpu_seconds(peers) - cpu_s, answers


async def compare(n_peers: int, arguments: argparse.Namespace) -> None:
    kinds = list(dict.fromkeys(engine.partition(":")[0] for engine in arguments.engines))
    times: dict[str, list[float]] = {engine: [] for engine in arguments.engines}
    cpus: dict[str, list[float]] = {engine: [] for engine in arguments.engines}
    said: dict[str, Any] = {}
    async with trio.open_nursery() as nursery:
        groups: dict[str, list[Peer]] = {}
        over = trio.Event()

        async def keep(engine: str, *, task_status: trio.TaskStatus[list[Peer]]) -> None:
            async with group_of(engine, n_peers, arguments.elements) as peers:
                task_status.started(peers)
                await over.wait()

        for kind in kinds:
            variants = [e for e in arguments.engines if e.partition(":")[0] == kind]
            for engine in variants if kind != "blobs" else ["blobs"]:
                groups[engine] = await nursery.start(keep, engine)
        for number in range(arguments.rounds + 1):
            for engine in arguments.engines:
                kind, _, variant = engine.partition(":")
                peers = groups["blobs" if kind == "blobs" else engine]
                took_s, cpu_s, answers = await one_round(peers, {"variant": variant, "round": number})
                if number:  # the first one opens connections
                    times[engine].append(took_s)
                    cpus[engine].append(cpu_s)
                else:
                    said[engine] = answers[0]
        over.set()
    for engine, rounds_s in times.items():
        wall = f"median {statistics.median(rounds_s):6.3f} s  least {min(rounds_s):6.3f} s"
        cpu = f"CPU of all {statistics.median(cpus[engine]):5.2f} s"
        print(f"{n_peers} peers  {engine:16} {wall}  {cpu}  {said[engine]}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers", type=int, nargs="+", default=[4, 8])
    parser.add_argument("--elements", type=int, default=10_000_000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--engines", nargs="+", default=list(ENGINES))
    parser.add_argument("--peer", nargs=4, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.peer:
        engine, number, n_elements, _ = arguments.peer
        averaging_peers.run(engine, int(number), int(n_elements))
        return
    for n_peers in arguments.peers:
        trio.run(partial(compare, n_peers, arguments))


if __name__ == "__main__":
    main()
