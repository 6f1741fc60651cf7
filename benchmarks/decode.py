"""Single-stream decoding: rings of 1, 2 and 4 node processes on loopback beside transformers' own generate.

    python -m benchmarks.decode [--rounds 5] [--tokens 64] [--json]

The model is a random Llama of 58M parameters (hidden 512, 8 blocks, vocabulary 32000, float32). Everything runs in
processes of its own over real libp2p, and the cases alternate within each round, so that a busy machine slows them all.
generate runs at one and at two torch threads and the better of the two is its figure; ring nodes have one thread each.
On AMD processors Mycel calls another float32 kernel than torch does by itself (node/fast_linear.py); "generate, our
kernels" is generate with the same, so that what the ring costs can be told from what the kernel gains.
Rates are tokens after the first over the time since the first, prefill excluded, for both. The tokens must be equal.
Bounds (issue 2): one hop at least 0.95 of generate, two hops at least 0.85.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import trio

from benchmarks.random_llama import N_BLOCKS, make_model

PROMPT = tuple(range(3, 19))
RINGS = (1, 2, 4)
BOUNDS = {"ring 1": 0.95, "ring 2": 0.85}
WARM_UP_TOKENS = 8
GENERATE_1, GENERATE_2 = "generate, 1 thread", "generate, 2 threads"
BASELINES = {GENERATE_1: "own 1", GENERATE_2: "own 2", "generate, our kernels": "ours 1"}


# ---- children: a node, and the baseline -----------------------------------------------------------------------------


def serve(directory: Path, data: Path, start: int, end: int, invite: str) -> None:
    """A node process: prints its invite when ready, ends when its standard input does."""
    from mycel.node.config import NodeConfig
    from mycel.node.events import no_events
    from mycel.node.runtime import run_node
    from mycel.swarm.invite import parse_invite

    async def main() -> None:
        stop = trio.Event()
        config = NodeConfig(
            data,
            ("/ip4/127.0.0.1/tcp/0",),
            model=directory,
            invite=parse_invite(invite, time.time()) if invite else None,
            blocks=(start, end),
            kv_tokens=4096,
        )
        async with trio.open_nursery() as nursery:
            serving = await nursery.start(run_node, config, no_events, lambda _line: None, stop)
            print(serving.invite.text, flush=True)
            await trio.to_thread.run_sync(sys.stdin.read, abandon_on_cancel=True)
            stop.set()

    trio.run(main)


def baseline(directory: Path) -> None:
    """transformers' generate: reads `kernels threads tokens` lines, answers with a JSON line each."""
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.generation.streamers import BaseStreamer

    from mycel.node.fast_linear import use_fast_linear

    class Times(BaseStreamer):  # type: ignore[misc]
        """Notes when each token comes; the first call brings the prompt."""

        def __init__(self) -> None:
            self.at_s: list[float] = []

        def put(self, value: Any) -> None:
            self.at_s.append(time.perf_counter())

        def end(self) -> None:
            pass

    models = {k: AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval() for k in ("own", "ours")}
    use_fast_linear(models["ours"])
    prompt = torch.tensor([PROMPT])
    print("ready", flush=True)
    for line in sys.stdin:
        kernels, threads, n_tokens = line.split()
        torch.set_num_threads(int(threads))
        times = Times()
        with torch.inference_mode():
            out = models[kernels].generate(
                prompt,
                attention_mask=torch.ones_like(prompt),
                max_new_tokens=int(n_tokens),
                min_new_tokens=int(n_tokens),
                do_sample=False,
                streamer=times,
                pad_token_id=0,
            )
        made = times.at_s[1:]
        rate = (len(made) - 1) / (made[-1] - made[0])
        print(json.dumps({"rate": rate, "tokens": out[0, len(PROMPT) :].tolist()}), flush=True)


# ---- the parent -----------------------------------------------------------------------------------------------------


class Child:
    """A process of this benchmark, which ends when its standard input is closed."""

    def __init__(self, arguments: Sequence[str], stack: ExitStack) -> None:
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "OMP_WAIT_POLICY": "PASSIVE",
            "TOKENIZERS_PARALLELISM": "0",
        }
        if arguments[0] == "baseline":
            environment = {**os.environ}  # its best: threads set by hand, spinning as torch comes
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.decode", "--child", *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )
        stack.callback(self.close)

    def ask(self, line: str = "") -> str:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        if line:
            self._process.stdin.write(line + "\n")
            self._process.stdin.flush()
        answer = self._process.stdout.readline()
        if not answer:
            raise SystemExit(f"a process of the benchmark ended with {self._process.wait()}")
        return answer.strip()

    def close(self) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        try:
            self._process.wait(20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()


def start_ring(n_hops: int, directory: Path, root: Path, stack: ExitStack) -> str:
    """Node processes with equal spans; the first one's invite."""
    invite = ""
    each = N_BLOCKS // n_hops
    for hop in range(n_hops):
        data = str(root / f"ring{n_hops}-{hop}")
        node = Child(["serve", str(directory), data, str(hop * each), str((hop + 1) * each), invite], stack)
        text = node.ask()
        invite = invite or text
    return invite


async def ring_rate(invite: str, n_tokens: int) -> tuple[float, list[int], list[dict[str, float]]]:
    """Tokens/s of one generation, its tokens, and for each hop where the milliseconds of a token went."""
    from mycel.node.client import connect

    async with connect(invite) as model:
        async with model.generate(PROMPT, max_new_tokens=WARM_UP_TOKENS) as generation:
            async for _ in generation:
                pass
        async with model.generate(PROMPT, max_new_tokens=n_tokens) as generation:
            async for _ in generation:
                pass
    rate = generation.trace.tokens_per_s
    assert rate is not None
    hops = [
        {"compute_ms": hop.compute_ms, "queue_ms": hop.queue_ms, "network_ms": hop.network_ms}
        for hop in generation.trace.report()
    ]
    return rate, generation.tokens, hops


def measure(rounds: int, n_tokens: int) -> dict[str, Any]:
    """Alternate all cases for `rounds` rounds."""
    rates: dict[str, list[float]] = {}
    hops: dict[str, list[dict[str, float]]] = {}
    with tempfile.TemporaryDirectory(prefix="mycel-decode-") as temporary, ExitStack() as stack:
        root = Path(temporary)
        directory = root / "model"
        subprocess.run([sys.executable, "-m", "benchmarks.decode", "--child", "make", str(directory)], check=True)
        generate = Child(["baseline", str(directory)], stack)
        generate.ask()
        invites = {n: start_ring(n, directory, root, stack) for n in RINGS}
        for kernels in ("own", "ours"):
            generate.ask(f"{kernels} 1 {WARM_UP_TOKENS}")
        for number in range(rounds):
            expected = None
            for name, case in BASELINES.items():
                answer = json.loads(generate.ask(f"{case} {n_tokens}"))
                rates.setdefault(name, []).append(answer["rate"])
                expected = expected or answer["tokens"]
            for n in RINGS:
                rate, tokens, spent = trio.run(ring_rate, invites[n], n_tokens)
                if tokens != expected:
                    raise SystemExit(f"round {number}: the ring of {n} gave other tokens than generate")
                rates.setdefault(f"ring {n}", []).append(rate)
                hops[f"ring {n}"] = spent
            print(
                f"round {number + 1}/{rounds}: " + ", ".join(f"{k} {v[-1]:.1f}" for k, v in rates.items()),
                file=sys.stderr,
            )
    return {"rates": rates, "ratios": ratios(rates), "hops": hops}


def ratios(rates: dict[str, list[float]]) -> dict[str, dict[str, float]]:
    """Each ring against generate at its better thread count, round by round."""
    best = max((GENERATE_1, GENERATE_2), key=lambda name: statistics.median(rates[name]))
    result = {}
    for name, ring in rates.items():
        if name.startswith("ring"):
            pairs = [with_network / base for with_network, base in zip(ring, rates[best], strict=True)]
            result[name] = {"min": min(pairs), "median": statistics.median(pairs), "max": max(pairs)}
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--child", nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        role, *rest = options.child
        if role == "make":
            make_model(Path(rest[0]), 1024)
        elif role == "baseline":
            baseline(Path(rest[0]))
        else:
            serve(Path(rest[0]), Path(rest[1]), int(rest[2]), int(rest[3]), rest[4] if len(rest) > 4 else "")
        return
    result = measure(options.rounds, options.tokens)
    if options.json:
        print(json.dumps(result, indent=2))
        return
    print(f"{'case':<22} {'min':>7} {'median':>7} {'max':>7}  tokens/s")
    for name, values in result["rates"].items():
        print(f"{name:<22} {min(values):7.1f} {statistics.median(values):7.1f} {max(values):7.1f}")
    print(f"\n{'against generate':<22} {'min':>7} {'median':>7} {'max':>7}  bound on the median")
    for name, ratio in result["ratios"].items():
        bound = f"{BOUNDS[name]:.2f}" if name in BOUNDS else ""
        print(f"{name:<22} {ratio['min']:7.2f} {ratio['median']:7.2f} {ratio['max']:7.2f}  {bound}")
    for name, spent in result["hops"].items():
        for index, hop in enumerate(spent):
            shown = ", ".join(f"{key.removesuffix('_ms')} {value:.2f} ms" for key, value in hop.items())
            print(f"{name} hop {index}: {shown}")


if __name__ == "__main__":
    main()
