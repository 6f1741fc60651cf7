"""The fewest moves of peers that bring a swarm to more tokens a second, and in which order they can be made.

A search that goes from minimum cut to minimum cut: to do more, a swarm needs moves by which the limiting set of blocks
gets more, so only those are tried. Every cut that was ever found bounds all other arrangements, and rules most of them
out without computing a flow. With effort enough it finds a list of at most `depth` moves whenever there is one.

Ring: pure.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from mycel.swarm.throughput import Supply, covered_blocks, max_flow

# A list of moves is made one by one; meanwhile the swarm keeps this share of what it does, and every block.
KEPT_SHARE = 0.2
# Arrangements to look at; one whose flow has to be computed counts as many as that takes.
EFFORT = 20_000
_ROUNDING = 1e-9
# Where nothing flows while blocks are missing: shares of the ideal to hope for, and then any flow at all.
_HOPES = (0.5, 0.25, 0.125, 1e-6)


@dataclass(frozen=True, slots=True)
class Machine:
    """A peer at its place, or where it will be once it has fetched its blocks.

    `shape` is what it would give after a move, None if it stays whatever the swarm needs. `kept` are the blocks (as
    bits) that it serves already and goes on serving: what others may leave to it.
    """

    peer: str
    supply: Supply
    shape: Supply | None
    kept: int


@dataclass(frozen=True, slots=True)
class Relocation:
    """Peer moves to blocks [start, end)."""

    peer: str
    start: int
    end: int


@dataclass(frozen=True, slots=True)
class Plan:
    """Moves in an order in which they can be made, and the tokens a second after the last of them."""

    moves: tuple[Relocation, ...]
    tokens_per_s: float


# The moves of an arrangement: (index of the machine, where its span would start).
_Moves = tuple[tuple[int, int], ...]


def find_plan(
    machines: Sequence[Machine],
    n_blocks: int,
    *,
    share: float,
    depth: int,
    known_per_s: float = 0.0,
    effort: int = EFFORT,
) -> Plan | None:
    """The shortest list of up to `depth` moves that raises the throughput by `share`; of such the best that is found.

    If the swarm did `known_per_s` before, and has made room since to do more, what exceeds that by `share` goes first.
    While blocks are missing: the shortest that closes all holes. No move takes a block from the swarm, also while its
    peer is away. The same machines give the same plan, whoever asks.
    """
    search = _Search(machines, n_blocks, effort)
    now = search.tokens_per_s
    ideal = math.fsum(each.supply.work for each in machines) / n_blocks
    if ideal <= 0.0:
        return None
    aims = [[ideal * hope for hope in _HOPES]]
    if now > 0.0:
        aims = [[rate * (1.0 + share)] for rate in sorted({now, max(now, known_per_s)}, reverse=True)]
    for targets in aims:
        for moves in range(1, depth + 1):
            found = next((plan for target in targets if (plan := search.run(target, moves))), None)
            while found:
                better = search.run(found.tokens_per_s * (1.0 + share), moves)
                if better is None:
                    return found
                found = better
    return None


def find_patch(machines: Sequence[Machine], n_blocks: int) -> Relocation | None:
    """The one move that closes most of the missing blocks and opens no hole; of equal ones that of the first peer."""
    covered = covered_blocks(each.supply for each in machines)
    best: tuple[int, Relocation] | None = None
    for each in sorted(machines, key=lambda machine: machine.peer):
        if each.shape is None:
            continue
        length = each.shape.end - each.shape.start
        for start in range(n_blocks - length + 1):
            closed = (each.shape.at(start).mask & ~covered).bit_count()
            if closed > (best[0] if best else 0) and _can_leave(machines, each, each.shape.at(start)):
                best = closed, Relocation(each.peer, start, start + length)
    return best[1] if best else None


def _can_leave(machines: Sequence[Machine], leaver: Machine, target: Supply) -> bool:
    """Whether every block that `leaver` gives up is served by somebody else, too."""
    given_up = leaver.kept & ~target.mask
    for each in machines:
        if each.peer != leaver.peer:
            given_up &= ~each.kept
    return not given_up


class _Cut:
    """A set of blocks, and what it would get from each machine at each place, in blocks a second."""

    def __init__(self, machines: Sequence[Machine], n_blocks: int, blocks: int) -> None:
        self.blocks = blocks
        self.size = blocks.bit_count()
        self._machines = machines
        self._n_blocks = n_blocks
        now = [each.supply.gives(blocks) for each in machines]
        self._now, self._total = now, math.fsum(now)
        self._gains: list[list[float] | None] = [None] * len(machines)

    def gains(self, i: int) -> list[float]:
        """What more it gets when machine `i` moves, for each start of its span there."""
        found = self._gains[i]
        if found is None:
            shape, now = self._machines[i].shape, self._now[i]
            assert shape is not None
            starts = range(self._n_blocks - shape.end + shape.start + 1)
            found = self._gains[i] = [shape.at(start).gives(self.blocks) - now for start in starts]
        return found

    def allows(self, moves: _Moves) -> float:
        """The throughput that it allows after `moves`."""
        return (self._total + math.fsum(self.gains(i)[start] for i, start in moves)) / self.size


class _Search:
    """Arrangements that were tried and cuts that were met, for one swarm."""

    def __init__(self, machines: Sequence[Machine], n_blocks: int, effort: int) -> None:
        # In the order of ids, so that everybody who knows the same swarm comes to the same plan.
        self._machines = sorted(machines, key=lambda each: each.peer)
        self._n_blocks = n_blocks
        self._effort = effort
        found = max_flow([each.supply for each in self._machines], n_blocks)
        self.tokens_per_s = found.tokens_per_s
        self._ideal = math.fsum((each.shape or each.supply).work for each in machines) / n_blocks
        self._cuts = [_Cut(self._machines, n_blocks, found.bottleneck)]
        self._seen: set[frozenset[tuple[int, int]]] = set()

    def run(self, target: float, depth: int) -> Plan | None:
        """A plan of up to `depth` moves that reaches `target`."""
        if target > self._ideal * (1.0 + _ROUNDING):
            return None
        self._seen.clear()
        return self._try((), target, depth)

    def _try(self, moves: _Moves, target: float, depth: int) -> Plan | None:
        """The base with `moves` made, and up to `depth` more."""
        key = frozenset(moves)
        if key in self._seen or self._effort <= 0:
            return None
        self._seen.add(key)
        self._effort -= 1
        cut = self._lowest_cut(moves, target, last=depth == 0)
        if cut is None:
            self._effort -= len(self._machines) * self._n_blocks // 8
            found = max_flow(self._arranged(moves), self._n_blocks)
            if found.tokens_per_s >= target * (1.0 - _ROUNDING):
                order = next(self._orders(self._machines, moves), ())
                return Plan(order, found.tokens_per_s) if order else None
            cut = _Cut(self._machines, self._n_blocks, found.bottleneck)
            self._cuts.append(cut)
        if depth:
            for move in self._helpful(cut, moves, target, depth):
                plan = self._try((*moves, move), target, depth - 1)
                if plan is not None:
                    return plan
        return None

    def _arranged(self, moves: _Moves) -> list[Supply]:
        supplies = [each.supply for each in self._machines]
        for i, start in moves:
            shape = self._machines[i].shape
            assert shape is not None
            supplies[i] = shape.at(start)
        return supplies

    def _lowest_cut(self, moves: _Moves, target: float, *, last: bool) -> _Cut | None:
        """The known cut that allows least, if it forbids the target; any that does if this was the `last` move."""
        lowest, found = target * (1.0 - _ROUNDING), None
        for place, cut in enumerate(self._cuts):
            allowed = cut.allows(moves)
            if allowed < lowest:
                lowest, found = allowed, cut
                if last:
                    # What ruled out one arrangement will rule out the next ones.
                    self._cuts.insert(0, self._cuts.pop(place))
                    break
        return found

    def _helpful(self, cut: _Cut, moves: _Moves, target: float, depth: int) -> list[tuple[int, int]]:
        """The single moves that give the cut more, most first, as long as `depth` of them can be enough."""
        moved = {i for i, _ in moves}
        lacking = (target - cut.allows(moves)) * cut.size * (1.0 - _ROUNDING)
        free = [i for i, machine in enumerate(self._machines) if machine.shape is not None and i not in moved]
        most = sorted((max(cut.gains(i)) for i in free), reverse=True)
        least = max(lacking - math.fsum(most[: depth - 1]), _ROUNDING * target)
        options = [(-gain, i, start) for i in free for start, gain in enumerate(cut.gains(i)) if gain >= least]
        return [(i, start) for _, i, start in sorted(options)]

    def _orders(self, machines: list[Machine], moves: _Moves) -> Iterator[tuple[Relocation, ...]]:
        """The orders in which the moves can be made one by one."""
        for place, (i, start) in enumerate(moves):
            machine, rest = machines[i], moves[:place] + moves[place + 1 :]
            assert machine.shape is not None
            supply = machine.shape.at(start)
            if not _can_leave(machines, machine, supply):
                continue
            arranged = [*machines[:i], Machine(machine.peer, supply, None, supply.mask), *machines[i + 1 :]]
            move = Relocation(machine.peer, supply.start, supply.end)
            if not rest:
                yield (move,)
            elif self._keeps_enough(arranged):
                yield from ((move, *others) for others in self._orders(arranged, rest))

    def _keeps_enough(self, machines: Sequence[Machine]) -> bool:
        kept = max_flow([each.supply for each in machines], self._n_blocks).tokens_per_s
        return kept >= KEPT_SHARE * self.tokens_per_s
