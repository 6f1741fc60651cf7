"""A group, its faults and its liars, all drawn from a seed: first trouble, then peace, in which rounds must go on."""

from __future__ import annotations

import random
from dataclasses import replace

from tests.sim.round_liars import corrupt
from tests.sim.round_net import TERMS, Net

# After the last fault so much virtual time may pass until two more rounds are over.
PEACE_S = 400.0


class Scene:
    """`sizes` are the group sizes to draw from; `trouble_s` how long faults happen."""

    def __init__(self, seed: int, sizes: tuple[int, ...], trouble_s: float) -> None:
        self.rng = rng = random.Random(f"scene {seed}")
        n_peers = rng.choice(sizes)
        most_liars = (n_peers - 1) // 3
        n_liars = most_liars if rng.random() < 0.7 else rng.randrange(most_liars + 1)
        terms = replace(
            TERMS,
            rule=rng.choice(("mean", "krum")),
            aggregators=rng.choice((3, 3, 0) if n_liars else (1, 3, 0)),
            open=bool(n_liars) or rng.random() < 0.7,
            # A third of those who are there may lie; who is away must not be dropped, or they would be more.
            absences=1000,
        )
        self.net = net = Net(seed, n_peers, terms)
        net.scalars = rng.random() < 0.2
        net.longest_delay_s = rng.choice((0.02, 0.1, 0.5))
        self.habits = corrupt(net, rng, n_liars)
        for node in net.nodes.values():
            node.slow = rng.choice((1.0, 1.0, 1.0, 3.0))
        self._down: set[str] = set()
        self._trouble_s = trouble_s

    def run(self) -> bool:
        """Whether the group goes on once it is left in peace. What must never be broken is held inside."""
        net = self.net
        for peer in net.nodes:
            net.start(peer)
        time = self.rng.expovariate(1.5)
        while time < self._trouble_s:
            net.at(time, self._fault)
            time += self.rng.expovariate(1.5)
        net.run(lambda: False, self._trouble_s)
        net.heal()
        self._start_all()
        done = max(len(node.chain) for node in net.honest)
        return net.run(lambda: net.rounds_done(done + 2), PEACE_S)

    def _fault(self) -> None:
        net, rng = self.net, self.rng
        names = sorted(net.nodes)
        kind = rng.choice(("break", "break", "partition", "heal", "crash", "start"))
        if kind == "break" and len(names) > 1:
            one, other = rng.sample(names, 2)
            net.break_stream(one, other, rng.uniform(0.05, 3.0))
        elif kind == "partition" and len(names) > 1 and not net.cut:
            net.partition(set(rng.sample(names, rng.randrange(1, len(names)))))
        elif kind == "heal":
            net.heal()
        elif kind == "crash":
            peer = rng.choice(names)
            if net.nodes[peer].is_up:
                net.kill(peer)
                self._down.add(peer)
        elif kind == "start":
            self._start_all()

    def _start_all(self) -> None:
        for peer in sorted(self._down):
            self.net.start(peer)
        self._down.clear()
