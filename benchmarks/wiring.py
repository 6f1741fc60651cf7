"""How near a trainer's routing comes to the sum of its peers' speeds, and what faults cost it.

    python -m benchmarks.wiring [--seeds 10] [--microbatches 3000] [--in-flight 8] [--jitter 0.2]

Peers of one stage, each with a queue, in a closed loop: what is done is replaced at once, so that the same number is
always on its way. The choices are those of mycel/swarm/training/wiring.py; "uniform" draws a peer at random.
"""

from __future__ import annotations

import argparse
import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from heapq import heappop, heappush
from itertools import count
from random import Random

from mycel.swarm.training.wiring import Wiring

SPEEDS = (1.0, 2.0, 4.0, 8.0)
NOTICE_S = 0.05  # until a broken stream is noticed
NEVER_S = 1e12


@dataclass
class Machine:
    """A peer that does `speed` microbatches a second, one at a time, from `joins_s` to `dies_s`."""

    name: str
    speed: float
    silent: bool = False
    joins_s: float = 0.0
    dies_s: float = NEVER_S
    free_at_s: float = 0.0


@dataclass
class Outcome:
    """What came of one run: microbatches done by each, the seconds it took, how many had to be done again."""

    done: Counter[str] = field(default_factory=Counter)
    again: int = 0
    seconds: float = 0.0

    def share(self, name: str) -> float:
        return self.done[name] / self.done.total()


class Loop:
    """One closed loop, from event to event."""

    def __init__(self, machines: Sequence[Machine], seed: int, *, uniform: bool, jitter: float, warm: int = 0) -> None:
        self.machines = {machine.name: machine for machine in machines}
        self.rng, self.uniform, self.jitter = Random(f"loop {seed}"), uniform, jitter
        self.wiring = Wiring(1, Random(f"wiring {seed}"))
        self.now, self.outcome, self.warm = 0.0, Outcome(), warm
        self._events: list[tuple[float, int, str, str, float]] = []
        self._numbers = count()

    def run(self, n_microbatches: int, in_flight: int) -> Outcome:
        """Until so many are done; the first `warm` of them are not counted."""
        self._meet()
        for machine in self.machines.values():
            for at_s in (machine.joins_s, machine.dies_s):
                if 0.0 < at_s < NEVER_S:
                    self._plan(at_s, "meet", machine.name, at_s)
        for _ in range(in_flight):
            self._give()
        n_done, began_s = 0, 0.0
        while n_done < n_microbatches + self.warm:
            self.now, _, kind, name, sent_s = heappop(self._events)
            if kind == "meet":
                self._meet()
                continue
            if kind == "done":
                self.wiring.passed(0, name, 1, self.now - sent_s)
                n_done += 1
                if n_done > self.warm:
                    self.outcome.done[name] += 1
                else:
                    began_s = self.now
            else:
                self.outcome.again += 1
                if kind == "late":
                    self.wiring.timed_out(0, name, 1, self.now - sent_s, self.now)
                else:
                    self.wiring.failed(0, name, self.now)
            self._give()
        self.outcome.seconds = self.now - began_s
        return self.outcome

    def _meet(self) -> None:
        """Who is there now, and what each says of itself."""
        there = {m.name: m.speed for m in self.machines.values() if m.joins_s <= self.now < m.dies_s}
        self.wiring.set_peers(0, there, self.now)

    def _give(self) -> None:
        """One more microbatch to whom the wiring chooses; banned ones of the uniform draw are not spared."""
        if self.uniform:
            name = self.rng.choice(self.wiring.peers(0))
        else:
            choice = self.wiring.choose(0, 1, self.now)
            assert choice is not None
            name = choice.peer
        machine = self.machines[name]
        deadline_s = self.now + self.wiring.deadline_s(0, name, 1)
        if machine.silent:
            self._plan(deadline_s, "late", name, self.now)
            return
        takes_s = self.rng.uniform(1.0 - self.jitter, 1.0 + self.jitter) / machine.speed
        machine.free_at_s = max(machine.free_at_s, self.now) + takes_s
        if machine.free_at_s >= machine.dies_s:
            self._plan(max(machine.dies_s, self.now) + NOTICE_S, "lost", name, self.now)
        else:
            self._plan(machine.free_at_s, "done", name, self.now)

    def _plan(self, at_s: float, kind: str, name: str, sent_s: float) -> None:
        heappush(self._events, (at_s, next(self._numbers), kind, name, sent_s))


def four(**changes: Machine) -> list[Machine]:
    """Peers of speeds 1:2:4:8, by name; `changes` replace some or add others."""
    machines = {f"x{speed:g}": Machine(f"x{speed:g}", speed) for speed in SPEEDS}
    return list((machines | changes).values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--microbatches", type=int, default=3000)
    parser.add_argument("--in-flight", type=int, default=8)
    parser.add_argument("--jitter", type=float, default=0.2)
    options = parser.parse_args()
    print(f"speeds 1:2:4:8, {options.in_flight} in flight, {options.microbatches} microbatches, {options.seeds} seeds")
    print(f"{'case':32} {'of the sum of speeds':>24} {'done again':>11}   shares")
    cases = (
        ("wiring", four, False),
        ("uniform", four, True),
        ("wiring, one always times out", lambda: four(mute=Machine("mute", 4.0, silent=True)), False),
        ("wiring, x4 dies half-way", lambda: four(x4=Machine("x4", 4.0, dies_s=options.microbatches / 30.0)), False),
        ("wiring, x8 joins half-way", lambda: four(x8=Machine("x8", 8.0, joins_s=options.microbatches / 14.0)), False),
    )
    for title, machines, uniform in cases:
        rates, again, shares = [], [], Counter[str]()
        for seed in range(options.seeds):
            present = machines()
            outcome = Loop(present, seed, uniform=uniform, jitter=options.jitter).run(
                options.microbatches, options.in_flight
            )
            rates.append(outcome.done.total() / offered(present, outcome.seconds))
            again.append(outcome.again)
            shares.update(outcome.done)
        spread = f"{statistics.mean(rates):.3f} ({min(rates):.3f} .. {max(rates):.3f})"
        told = " ".join(f"{name} {done / shares.total():.3f}" for name, done in sorted(shares.items()))
        print(f"{title:32} {spread:>24} {statistics.mean(again):>11.1f}   {told}")


def offered(machines: Sequence[Machine], seconds: float) -> float:
    """What all of them could have done in that time together, had none ever waited."""
    able = [machine for machine in machines if not machine.silent]
    return sum(m.speed * max(0.0, min(m.dies_s, seconds) - min(m.joins_s, seconds)) for m in able)


if __name__ == "__main__":
    main()
