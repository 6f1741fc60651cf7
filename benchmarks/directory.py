"""How fast the directory finds who serves a swarm: 32 nodes over real libp2p on loopback, also just after 10 died.

    python -m benchmarks.directory [--death crash|silent] [--json]

Four processes hold 10 + 8 + 7 + 7 nodes, each announcing a span. After rounds of finds by every node the process of
ten is killed (crash: SIGKILL, its connections break) or stopped (silent: SIGSTOP, its kernel still accepts), and every
survivor finds again at once. Then one of them looks until none of the dead is listed any more.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import trio

from mycel.dht.directory import Directory
from mycel.dht.kademlia import Kademlia
from mycel.dht.records import Announcement
from mycel.protocols.messages import PeerAddress
from mycel.security.identity import Identity

BOUND_MS = 100.0
SHARES = (10, 8, 7, 7)  # nodes of each process; the first process dies
SWARM = b"\x05" * 32


# ---- a process of nodes ---------------------------------------------------------------------------------------------


class Nodes:
    """The nodes of one process, driven by lines of JSON."""

    def __init__(self, ttl_s: float) -> None:
        self.ttl_s = ttl_s
        self.members: list[tuple[Kademlia, Directory, PeerAddress]] = []

    async def live(self, task_status: trio.TaskStatus[None]) -> None:
        """One node, until cancelled."""
        from mycel.node.libp2p_transport import open_transport

        identity = Identity.generate()
        async with open_transport(identity, listen=("/ip4/127.0.0.1/tcp/0",)) as transport:
            store = Kademlia(transport, identity, time.time)
            async with trio.open_nursery() as nursery:
                await nursery.start(store.run)
                directory = Directory(store, identity, time.time)
                self.members.append((store, directory, PeerAddress(transport.peer_id, transport.addresses)))
                task_status.started()
                await trio.sleep_forever()

    async def announce(self, directory: Directory, task_status: trio.TaskStatus[None]) -> None:
        while True:
            await directory.announce(Announcement(SWARM, 0, 8, block_time_s=0.001), self.ttl_s)
            task_status.started()
            task_status = trio.TASK_STATUS_IGNORED
            await trio.sleep(self.ttl_s / 3)

    async def obey(self, order: dict[str, Any], nursery: trio.Nursery) -> object:
        """Carry out an order of the parent; what to answer."""
        if "join" in order:
            bootstrap = [PeerAddress(peer, tuple(addresses)) for peer, addresses in order["join"]]
            for store, _, _ in self.members:
                await store.join(bootstrap)
            return len(self.members)
        if "announce" in order:
            for _, directory, _ in self.members:
                await nursery.start(self.announce, directory)
            return len(self.members)
        _, directory, _ = self.members[order["find"]]
        began = time.perf_counter()
        located = await directory.find(SWARM)
        return [time.perf_counter() - began, [each.peer for each in located]]


async def serve_parent(n_nodes: int, ttl_s: float) -> None:
    nodes = Nodes(ttl_s)
    async with trio.open_nursery() as nursery:
        for _ in range(n_nodes):
            await nursery.start(nodes.live)
        answer: object = [[address.peer, address.addresses] for _, _, address in nodes.members]
        while True:
            print(json.dumps(answer), flush=True)
            line = await trio.to_thread.run_sync(sys.stdin.readline)
            if not line:
                break
            answer = await nodes.obey(json.loads(line), nursery)
        nursery.cancel_scope.cancel()


# ---- the parent -----------------------------------------------------------------------------------------------------


class Process:
    """A child with its nodes."""

    def __init__(self, n_nodes: int, ttl_s: float) -> None:
        command = [sys.executable, "-m", "benchmarks.directory", "--nodes", str(n_nodes), "--ttl", str(ttl_s)]
        self._child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.n_nodes = n_nodes
        self.peers: list[tuple[str, list[str]]] = []

    def read(self) -> Any:
        assert self._child.stdout is not None
        line = self._child.stdout.readline()
        if not line:
            raise SystemExit(f"a process of the benchmark ended with {self._child.wait()}")
        return json.loads(line)

    def order(self, **order: object) -> Any:
        assert self._child.stdin is not None
        self._child.stdin.write(json.dumps(order) + "\n")
        self._child.stdin.flush()
        return self.read()

    def send_signal(self, number: int) -> None:
        self._child.send_signal(number)

    def end(self) -> None:
        self._child.kill()
        self._child.communicate()


@contextmanager
def processes(ttl_s: float, limit_s: int) -> Iterator[list[Process]]:
    """All children, ready; ended whatever happens, after `limit_s` at the latest."""

    def too_slow(_number: int, _frame: FrameType | None) -> None:
        raise SystemExit(f"not finished after {limit_s} s")

    signal.signal(signal.SIGALRM, too_slow)
    signal.alarm(limit_s)
    children: list[Process] = []
    try:
        for share in SHARES:
            children.append(Process(share, ttl_s))  # noqa: PERF401 - one by one: if a later one fails, this one is ended
        for child in children:
            child.peers = child.read()
        yield children
    finally:
        signal.alarm(0)
        for child in children:
            child.end()


def find_round(children: list[Process]) -> tuple[list[float], list[set[str]]]:
    """Every node finds once, one after the other: milliseconds, and who was found."""
    answers = [child.order(find=i) for child in children for i in range(child.n_nodes)]
    return [took_s * 1e3 for took_s, _ in answers], [set(found) for _, found in answers]


def summary(took_ms: list[float]) -> dict[str, float]:
    deciles = statistics.quantiles(took_ms, n=10)
    return {
        "median_ms": round(statistics.median(took_ms), 1),
        "p90_ms": round(deciles[-1], 1),
        "max_ms": round(max(took_ms), 1),
        "finds": len(took_ms),
    }


def measure(death: str, ttl_s: float) -> dict[str, Any]:
    with processes(ttl_s, limit_s=240) as children:
        doomed, survivors = children[0], children[1:]
        everybody = {peer for child in children for peer, _ in child.peers}
        dead = {peer for peer, _ in doomed.peers}
        began = time.perf_counter()
        for child in children:
            child.order(join=survivors[0].peers[:1])
        joined_s = time.perf_counter() - began
        for child in children:
            child.order(announce=True)
        healthy_ms: list[float] = []
        for _ in range(3):
            took_ms, found = find_round(children)
            healthy_ms += took_ms
        complete_healthy = sum(each == everybody for each in found) / len(found)
        doomed.send_signal(signal.SIGKILL if death == "crash" else signal.SIGSTOP)
        died_at = time.perf_counter()
        after_ms, found = find_round(survivors)
        complete_after = sum(each >= everybody - dead for each in found) / len(found)
        while set(survivors[0].order(find=1)[1]) & dead:
            time.sleep(0.1)
        forgotten_s = time.perf_counter() - died_at
        return {
            "death": death,
            "nodes": len(everybody),
            "died": len(dead),
            "bound_ms": BOUND_MS,
            "joined_s": round(joined_s, 1),
            "healthy": summary(healthy_ms),
            "after_deaths": summary(after_ms),
            "complete_healthy": complete_healthy,
            "complete_after": complete_after,
            "ttl_s": ttl_s,
            "forgotten_s": round(forgotten_s, 1),
        }


def show(result: dict[str, Any]) -> str:
    lines = [f"{result['nodes']} nodes on loopback, joined in {result['joined_s']} s; {os.cpu_count()} cores"]
    for name, title in (
        ("healthy", "healthy"),
        ("after_deaths", f"just after {result['died']} died ({result['death']})"),
    ):
        part = result[name]
        lines.append(
            f"find, {title}: median {part['median_ms']} ms, p90 {part['p90_ms']} ms, max {part['max_ms']} ms "
            f"of {part['finds']} (bound: median under {result['bound_ms']:g} ms)"
        )
    lines.append(f"complete answers: {result['complete_healthy']:.0%} healthy, {result['complete_after']:.0%} after")
    lines.append(
        f"the dead were forgotten after {result['forgotten_s']} s (bound: time to live, {result['ttl_s']:g} s)"
    )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description="Latency of the directory on 32 nodes.")
    parser.add_argument("--death", choices=("crash", "silent"), default="crash")
    parser.add_argument("--ttl", type=float, default=30.0, help="seconds that an announcement lives")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--nodes", type=int, default=0, help=argparse.SUPPRESS)  # run as a child
    options = parser.parse_args()
    if options.nodes:
        trio.run(serve_parent, options.nodes, options.ttl)
        return
    result = measure(options.death, options.ttl)
    print(json.dumps(result) if options.json else show(result))


if __name__ == "__main__":
    main()
