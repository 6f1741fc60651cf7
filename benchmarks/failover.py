"""The pause after a hop is lost or leaves, against the length of the history: replayed after a kill, or handed over.

    python -m benchmarks.failover [--histories 64 256 1024 2048] [--rounds 1] [--wanlab PATH] [--json]

The model is a random Llama of 58M parameters (hidden 512, 8 blocks, vocabulary 32000, float32), served by two hops of
four blocks, two holders for each, over real libp2p. The second hop of the chain is killed or told to leave once some
tokens were heard; the pause is the longest time between two tokens from then on. A killed hop's successor gets the
history from the hop before; a leaving one hands its keys and values over, or has the history replayed if it measures
that this is quicker; its line says which. The tokens of all runs with one prompt must be equal.

With --wanlab (a program that makes network namespaces joined by emulated links; it needs root) everything is measured
again between hosts that are --rtt and --rate apart. Without it, only loopback is.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from itertools import count, pairwise
from pathlib import Path
from typing import Any

import trio

from benchmarks.random_llama import make_model

SPANS = ((0, 4), (4, 8))
HOLDERS = 2
ACT_AT = 12  # tokens heard before the hop is killed or told to leave
TOKENS_AFTER = 12  # heard after it was replaced
MOST_TOKENS = 1500
HISTORIES = (64, 256, 1024, 2048)


def prompt_of(n_tokens: int) -> list[int]:
    return [3 + i * 7919 % 31990 for i in range(n_tokens)]


# ---- children: a node, and the client -------------------------------------------------------------------------------


def serve(directory: str, data: str, start: int, end: int, listen: str, invite: str) -> None:
    """A node: prints who it is when ready; leaves as planned when its standard input says so or ends."""
    import time

    from mycel.node.config import NodeConfig
    from mycel.node.events import no_events
    from mycel.node.runtime import run_node
    from mycel.swarm.invite import parse_invite

    async def main() -> None:
        stop = trio.Event()
        config = NodeConfig(
            Path(data),
            (listen,),
            model=Path(directory),
            invite=parse_invite(invite, time.time()) if invite else None,
            blocks=(start, end),
            kv_tokens=8192,
        )
        async with trio.open_nursery() as nursery:
            serving = await nursery.start(run_node, config, no_events, lambda _line: None, stop)
            print(json.dumps({"peer": serving.peer, "invite": serving.invite.text}), flush=True)
            await trio.to_thread.run_sync(sys.stdin.readline, abandon_on_cancel=True)
            stop.set()

    trio.run(main)


def client(invite: str) -> None:
    """A client: for each length that it reads it generates, says when to act on whom, and then what came of it."""
    from mycel.node.client import connect

    async def main() -> None:
        async with connect(invite) as model:
            print(json.dumps({"connected": len(model.network.transport.connected())}), flush=True)
            while line := await trio.to_thread.run_sync(sys.stdin.readline, abandon_on_cancel=True):
                print(json.dumps(await one_run(model, int(line))), flush=True)

    trio.run(main)


async def one_run(model: Any, n_prompt: int) -> dict[str, Any]:
    """Generate until some tokens after the second hop was replaced."""
    from mycel.swarm.generation import NewToken, Request, SessionEvent
    from mycel.swarm.session import InferenceSession

    await model.view()  # who came and went since the last run
    send, receive = trio.open_memory_channel[SessionEvent](0)
    request = Request(tuple(prompt_of(n_prompt)), MOST_TOKENS)
    session = InferenceSession(model.network.transport, model.watch, model.watch.swarm, request, send)
    tokens: list[int] = []
    times_s: list[float] = []
    replaced: tuple[int, str] | None = None
    acted_s = 0.0
    async with trio.open_nursery() as nursery:
        nursery.start_soon(session.run)
        async for event in receive:
            if not isinstance(event, NewToken):
                for _peer, reason in (*event.lost, *event.moved):
                    replaced = (len(tokens), reason)
                continue
            tokens.append(event.token)
            times_s.append(event.at_s)
            if len(tokens) == ACT_AT:
                acted_s = trio.current_time()
                print(json.dumps({"act": session.hops[1].peer.peer}), flush=True)
            if replaced is not None and len(tokens) >= replaced[0] + TOKENS_AFTER:
                break
        nursery.cancel_scope.cancel()
    after = times_s[ACT_AT - 1 :]
    pauses_s = [later - sooner for sooner, later in pairwise(after)]
    done_s = next((at_s for at_s in times_s[replaced[0] :]), acted_s) - acted_s if replaced else 0.0
    return {
        "pause_s": max(pauses_s, default=0.0),
        "usual_s": sorted(pauses_s)[len(pauses_s) // 2] if pauses_s else 0.0,
        "replaced_after_s": done_s,
        "reason": replaced[1] if replaced else "",
        "tokens": tokens,
    }


# ---- the parent -----------------------------------------------------------------------------------------------------


class Child:
    """A process of this benchmark that speaks JSON lines."""

    def __init__(self, before: Sequence[str], arguments: Sequence[str], stack: ExitStack) -> None:
        threads = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "TOKENIZERS_PARALLELISM": "0"}
        self.process = subprocess.Popen(
            [*before, sys.executable, "-m", "benchmarks.failover", "--child", *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, **threads},
        )
        stack.callback(self.end)

    def tell(self, line: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()

    def hear(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"a process of the benchmark ended with {self.process.wait()}")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def end(self) -> None:
        self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None and not pipe.closed:
                pipe.close()


@dataclass
class Hosts:
    """Where processes run: all here, or each on a host of its own; host 1 is the client's."""

    wanlab: Path | None = None

    def before(self, host: int) -> list[str]:
        return [sys.executable, str(self.wanlab), "exec", str(host), "--"] if self.wanlab else []

    def listen(self, host: int) -> str:
        return f"/ip4/10.77.0.{host}/tcp/0" if self.wanlab else "/ip4/127.0.0.1/tcp/0"


@contextmanager
def wide_area(wanlab: Path, rtt: str, rate: str) -> Iterator[Hosts]:
    """The emulated network, for as long as the block runs."""
    command = [
        sys.executable,
        str(wanlab),
        "up",
        "--hosts",
        str(1 + HOLDERS * len(SPANS)),
        "--rtt",
        rtt,
        "--rate",
        rate,
    ]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            if not any(line.strip() == "ready" for line in iter(process.stdout.readline, "")):
                raise SystemExit(f"{wanlab} did not start; it needs root, /dev/net/tun and iproute2")
            yield Hosts(wanlab)
        finally:
            process.terminate()
            process.wait()


@dataclass
class Ring:
    """The nodes of one network by peer id, each with its host and span."""

    directory: Path
    root: Path
    hosts: Hosts
    stack: ExitStack
    invite: str = ""
    nodes: dict[str, tuple[Child, int, tuple[int, int]]] = field(default_factory=dict)
    _numbers: Iterator[int] = field(default_factory=count)

    def start(self, host: int, span: tuple[int, int]) -> None:
        data = str(self.root / f"node-{next(self._numbers)}")
        where = [str(self.directory), data, str(span[0]), str(span[1]), self.hosts.listen(host)]
        node = Child(self.hosts.before(host), ["serve", *where, self.invite], self.stack)
        ready = node.hear()
        self.invite = self.invite or ready["invite"]
        self.nodes[ready["peer"]] = (node, host, span)

    def lose(self, peer: str, how: str) -> None:
        """Kill the node, or tell it to leave."""
        node, _, _ = self.nodes[peer]
        if how == "kill":
            node.process.kill()
        else:
            node.tell("leave")

    def replace(self, peer: str) -> None:
        node, host, span = self.nodes.pop(peer)
        node.end()
        self.start(host, span)


def measure(
    hosts: Hosts, directory: Path, histories: Sequence[int], rounds: int, expected: dict[int, list[int]]
) -> Any:
    """All lengths and both ways to go, `rounds` times each: a list of what each run gave."""
    runs: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="mycel-failover-") as temporary, ExitStack() as stack:
        ring = Ring(directory, Path(temporary), hosts, stack)
        for number, span in enumerate(SPANS * HOLDERS):
            ring.start(2 + number, span)
        asker = Child(hosts.before(1), ["client", ring.invite], stack)
        asker.hear()
        for _ in range(rounds):
            for history in histories:
                for how in ("kill", "leave"):
                    asker.tell(str(history))
                    victim = asker.hear()["act"]
                    ring.lose(victim, how)
                    run = asker.hear()
                    check_tokens(expected, history, run.pop("tokens"))
                    runs.append({"history": history, "how": how, **run})
                    print(show(runs[-1]), file=sys.stderr, flush=True)
                    ring.replace(victim)
    return runs


def check_tokens(expected: dict[int, list[int]], history: int, tokens: list[int]) -> None:
    """Equal to the other runs with this prompt, as far as both go."""
    known = expected.setdefault(history, tokens)
    n_common = min(len(known), len(tokens))
    if known[:n_common] != tokens[:n_common]:
        raise SystemExit(f"a run over {history} tokens of history gave other tokens than the one before")


def show(run: dict[str, Any]) -> str:
    return (
        f"{run['history']:>8} {run['how']:<6} {run['pause_s'] * 1e3:>9.0f} {run['usual_s'] * 1e3:>9.1f} "
        f"{run['replaced_after_s'] * 1e3:>9.0f}  {run['reason']}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--histories", type=int, nargs="+", default=list(HISTORIES))
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--wanlab", type=Path, help="the program that emulates a wide-area network")
    parser.add_argument("--rtt", default="50ms")
    parser.add_argument("--rate", default="100mbit")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--child", nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        role, *rest = options.child
        if role == "make":
            make_model(Path(rest[0]), 4096)
        elif role == "client":
            client(rest[0])
        else:
            serve(rest[0], rest[1], int(rest[2]), int(rest[3]), rest[4], rest[5] if len(rest) > 5 else "")
        return
    if options.wanlab is not None and not options.wanlab.is_file():
        raise SystemExit(f"there is no {options.wanlab}: without it only loopback can be measured")
    if options.wanlab is not None and os.geteuid() != 0:
        raise SystemExit("network namespaces need root: without --wanlab only loopback is measured")
    results: dict[str, Any] = {}
    expected: dict[int, list[int]] = {}
    with tempfile.TemporaryDirectory(prefix="mycel-failover-") as temporary:
        directory = Path(temporary) / "model"
        subprocess.run([sys.executable, "-m", "benchmarks.failover", "--child", "make", str(directory)], check=True)
        results["loopback"] = measure(Hosts(), directory, options.histories, options.rounds, expected)
        if options.wanlab is not None:
            with wide_area(options.wanlab.resolve(), options.rtt, options.rate) as hosts:
                name = f"{options.rtt}, {options.rate}"
                results[name] = measure(hosts, directory, options.histories, options.rounds, expected)
    if options.json:
        print(json.dumps(results, indent=2))
        return
    for name, runs in results.items():
        print(f"\n{name}\n{'history':>8} {'':<6} {'pause ms':>9} {'usual ms':>9} {'after ms':>9}  why")
        for run in sorted(runs, key=lambda run: (run["history"], run["how"])):
            print(show(run))


if __name__ == "__main__":
    main()
