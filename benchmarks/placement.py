"""How near the distributed placement comes to the optimum, in random swarms and while peers come and go.

    python -m benchmarks.placement [--swarms 200] [--peers 4:6] [--blocks 6:10] [--memory 1.5] [--seed 1]
    python -m benchmarks.placement --churn [--hours 32] [--lifetime 6] [--peers 6:6] [--blocks 10:10]

The optimum puts every span at once where the whole swarm does most: an integer program, solved by HiGHS (scipy). The
rule is that of mycel/swarm: peers come one by one and choose, then any of them moves until none does any more.
"""

from __future__ import annotations

import argparse
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from random import Random
from unittest import mock

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_array

from mycel.swarm import moves, rebalance
from mycel.swarm.placement import choose_span
from mycel.swarm.rebalance import Move, Rebalancer
from mycel.swarm.throughput import Supply, own_supply, swarm_flow
from mycel.swarm.view import PeerView, View

# With links measured in tokens a second, a token has one byte.
BYTES_PER_TOKEN = 1.0
FETCH_S = 60.0


@dataclass(frozen=True, slots=True)
class Machine:
    """What a peer brings: memory for blocks, seconds for a block, tokens a second of its link (0: no limit)."""

    name: str
    capacity: int
    block_time_s: float
    link: float

    def supply(self, n_blocks: int) -> Supply:
        return own_supply(min(self.capacity, n_blocks), self.block_time_s, 0.0, self.link, BYTES_PER_TOKEN)

    def announce(self, start: int, end: int, state: str = "serving") -> PeerView:
        return PeerView(
            peer=self.name,
            addresses=(),
            start=start,
            end=end,
            state=state,
            block_time_s=self.block_time_s,
            overhead_s=0.0,
            queue_s=0.0,
            kv_free_tokens=1,
            sessions=0,
            rtts=(),
            seq=1,
            expires_at=math.inf,
            link_bytes_per_s=self.link,
        )


def draw_machine(rng: Random, name: str, n_blocks: int) -> Machine:
    """Compute log-uniform over a factor of 10; every other link can carry 1/12 to 3/2 of what one block alone could."""
    block_time_s = 0.0005 * 10.0 ** rng.random()
    link = math.exp(rng.uniform(math.log(1 / 12), math.log(3 / 2))) / block_time_s if rng.random() < 0.5 else 0.0
    return Machine(name, rng.randint(max(1, n_blocks // 8), max(2, 2 * n_blocks // 3)), block_time_s, link)


def draw_swarm(rng: Random, n_peers: int, n_blocks: int, memory: float) -> list[Machine]:
    """Machines that together hold the model `memory` times at least."""
    while True:
        machines = [draw_machine(rng, f"p{i:02}", n_blocks) for i in range(n_peers)]
        if sum(machine.capacity for machine in machines) >= memory * n_blocks:
            return machines


# ---- the optimum ----------------------------------------------------------------------------------------------------


def optimum(machines: Sequence[Machine], n_blocks: int, *, gap: float = 0.01) -> float:
    """No arrangement does more tokens a second; the true optimum is at most `gap` below.

    Choose y_is = 1 for the one start s of each peer's span, and x_ib steps a second, to maximize F:
    sum_b x_ib <= work_i, x_ib <= link_i * sum of y_is over the spans with b in them, sum_i x_ib >= F.
    """
    supplies = [machine.supply(n_blocks) for machine in machines]
    scale = math.fsum(each.work for each in supplies) / n_blocks or 1.0
    rows: list[tuple[int, int, float]] = []
    low: list[float] = []
    high: list[float] = []
    upper, integral = [1.0], [0]

    def constrain(terms: list[tuple[int, float]], least: float, most: float) -> None:
        rows.extend((len(low), column, factor) for column, factor in terms)
        low.append(least)
        high.append(most)

    blocks: list[list[tuple[int, float]]] = [[(0, -1.0)] for _ in range(n_blocks)]
    for each in supplies:
        work, length = each.work / scale, each.end - each.start
        link = min(each.link / scale, work)
        y = len(upper)
        starts = n_blocks - length + 1
        x = y + starts
        upper += [1.0] * starts + [link] * n_blocks
        integral += [1] * starts + [0] * n_blocks
        constrain([(y + start, 1.0) for start in range(starts)], 1.0, 1.0)
        constrain([(x + block, 1.0) for block in range(n_blocks)], -math.inf, work)
        for block in range(n_blocks):
            spans = range(max(0, block - length + 1), min(block, starts - 1) + 1)
            constrain([(x + block, 1.0), *((y + start, -link) for start in spans)], -math.inf, 0.0)
            blocks[block].append((x + block, 1.0))
    for terms in blocks:
        constrain(terms, 0.0, math.inf)
    row, column, factor = zip(*rows, strict=True)
    matrix = csr_array((factor, (row, column)), shape=(len(low), len(upper)))
    objective = np.zeros(len(upper))
    objective[0] = -1.0
    problem = {
        "constraints": LinearConstraint(matrix, low, high),
        "integrality": integral,
        "bounds": Bounds(0.0, upper),
    }
    solved = milp(objective, **problem, options={"mip_rel_gap": gap})
    if solved.x is None:
        # HiGHS gives up on one in a thousand after its presolve.
        solved = milp(objective, **problem, options={"mip_rel_gap": gap, "presolve": False})
    if solved.x is None:
        raise RuntimeError(f"no optimum: {solved.message}")
    return float(-solved.mip_dual_bound) * scale


# ---- the rule, in a swarm where nobody leaves -----------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Settled:
    """Tokens a second when all had come and when nobody moved any more, the moves, and the view in the end."""

    arrived: float
    settled: float
    n_moves: int
    view: View


def settle(machines: Sequence[Machine], n_blocks: int, rng: Random) -> Settled:
    """Machines come in random order, then look in random order until nobody has moved for four rounds."""
    view = View(n_blocks)
    for machine in rng.sample(machines, len(machines)):
        view = arrive(view, machine)
    arrived = throughput(view)
    nodes = {m.name: Rebalancer(m.name, m.capacity, -math.inf, BYTES_PER_TOKEN) for m in machines}
    now, quiet, n_moves = 0.0, 0, 0
    with one_search_for_all():
        while quiet < 4:
            now += 2.0 * rebalance.COOL_DOWN_S
            quiet += 1
            for name in rng.sample(sorted(nodes), len(nodes)):
                decision = nodes[name].decide(view, now, download_s=FETCH_S)
                if isinstance(decision, Move):
                    moved = replace(view.peers[name], start=decision.start, end=decision.end)
                    view = replace(view, peers={**view.peers, name: moved})
                    n_moves += 1
                    quiet = 0
    return Settled(arrived, throughput(view), n_moves, view)


def arrive(view: View, machine: Machine) -> View:
    start, end, _ = choose_span(
        view,
        machine.capacity,
        block_time_s=machine.block_time_s,
        link_bytes_per_s=machine.link,
        bytes_per_token=BYTES_PER_TOKEN,
    )
    return replace(view, peers={**view.peers, machine.name: machine.announce(start, end)})


def throughput(view: View) -> float:
    return swarm_flow(view, bytes_per_token=BYTES_PER_TOKEN).tokens_per_s


def one_search_for_all() -> mock._patch:
    """Nodes with the same view come to the same plan: look for it once."""

    @cache
    def found(machines: tuple[moves.Machine, ...], n_blocks: int, known_per_s: float) -> moves.Plan | None:
        share, depth = rebalance.MIN_SHARE, rebalance.MAX_MOVES
        return moves.find_plan(machines, n_blocks, share=share, depth=depth, known_per_s=known_per_s)

    def find(machines: list[moves.Machine], n_blocks: int, *, known_per_s: float, **_: float) -> moves.Plan | None:
        return found(tuple(machines), n_blocks, known_per_s)

    return mock.patch.object(rebalance, "find_plan", find)


def compare(n_swarms: int, peers: range, blocks: range, *, memory: float, seed: int) -> tuple[list[float], list[float]]:
    """(when all had come, settled): for each swarm the throughput over the optimum, ascending."""
    rng = Random(seed)
    arrived, settled = [], []
    for _ in range(n_swarms):
        n_blocks = rng.choice(blocks)
        machines = draw_swarm(rng, rng.choice(peers), n_blocks, memory)
        result, best = settle(machines, n_blocks, rng), optimum(machines, n_blocks)
        arrived.append(result.arrived / best)
        settled.append(result.settled / best)
    return sorted(arrived), sorted(settled)


def summary(shares: Sequence[float]) -> str:
    fifth = shares[len(shares) // 20]
    return f"least {shares[0]:.3f}, 5th percentile {fifth:.3f}, mean {statistics.fmean(shares):.3f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--swarms", type=int, default=200)
    parser.add_argument("--peers", default="4:6", help="least:most")
    parser.add_argument("--blocks", default="6:10", help="least:most")
    parser.add_argument(
        "--memory", type=float, default=1.5, help="how many times all together hold the model, at least"
    )
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--churn", action="store_true", help="simulate peers that come and go")
    parser.add_argument("--hours", type=float, default=32.0)
    parser.add_argument("--lifetime", type=float, default=6.0, help="mean hours that a peer stays")
    options = parser.parse_args()
    peers, blocks = (_range(text) for text in (options.peers, options.blocks))
    if options.churn:
        from benchmarks.churn import churn

        found = churn(peers[-1], blocks[-1], hours=options.hours, lifetime_h=options.lifetime, seed=options.seed)
        print(found.summary())
        return
    arrived, settled = compare(options.swarms, peers, blocks, memory=options.memory, seed=options.seed)
    print(f"{options.swarms} swarms of {options.peers} peers and {options.blocks} blocks, of the optimum:")
    print(f"  when all have come: {summary(arrived)}")
    print(f"  when nobody moves:  {summary(settled)}; {sum(s < 0.9 for s in settled)} below 0.9")


def _range(text: str) -> range:
    least, _, most = text.partition(":")
    return range(int(least), int(most or least) + 1)


if __name__ == "__main__":
    main()
