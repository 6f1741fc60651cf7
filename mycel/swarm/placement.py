"""Which blocks a node should serve: how many it can hold, where it helps most, and even shares for a new swarm.

Ring: pure.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from mycel.protocols.errors import ConfigError
from mycel.swarm.throughput import Supply, covered_blocks, cut_flow, max_flow, own_supply, supplies
from mycel.swarm.view import View, ranges, show_ranges

Span = tuple[int, int]
# A machine that takes this many times longer than the median peer is told so.
SLOW = 2.0
# Less than this share more is nothing for a person to hear about.
_WORTH_SAYING = 0.01
_ROUNDING = 1e-9


def choose_span(
    view: View,
    capacity_blocks: int,
    *,
    block_time_s: float,
    overhead_s: float = 0.0,
    link_bytes_per_s: float = 0.0,
    bytes_per_token: float = 0.0,
) -> tuple[int, int, str]:
    """(start, end, reason): the `capacity_blocks` blocks in a row where a newcomer helps the swarm most.

    That is the window with the highest throughput of the swarm (mycel/swarm/throughput.py) with the newcomer in it; who
    is "joining" counts as if it served, who leaves is gone. Of equal windows the most even one: take every block's
    steps a second when each peer gives all its blocks the same, sorted upwards; the lexicographically greatest list
    wins, so that while blocks are missing the one that leaves the fewest does. Then the one that leaves them in the
    fewest ranges, then the first. All the memory is used: what overlaps with neighbours takes over without loading.

    The newcomer itself must not be in the view. Petals (Borzunov et al. 2023, section 3.2) compares the windows' own
    blocks instead, and does not count what the newcomer adds. Raises ConfigError if it can hold no block.
    """
    if capacity_blocks < 1:
        raise ConfigError("this machine cannot hold a single block of the model")
    n_blocks = view.n_blocks
    length = min(capacity_blocks, n_blocks)
    others = supplies(view, bytes_per_token)
    newcomer = own_supply(length, block_time_s, overhead_s, link_bytes_per_s, bytes_per_token)
    start, after = best_window(others, newcomer, n_blocks)
    before = max_flow(others, n_blocks).tokens_per_s
    where = f"blocks {start}:{start + length} of {n_blocks}"
    if length == n_blocks:
        where = f"blocks 0:{n_blocks}, the whole model"
    missing = view.staying().missing()
    if missing:
        return start, start + length, f"{where}: {_closes(start, start + length, missing, after)}"
    return start, start + length, f"{where}: {_lifts(before, after)}"


@dataclass(frozen=True, slots=True)
class Judgement:
    """What a machine is to a swarm in which all others stay: `adds` says whether its tokens a second rise by it.

    `times_slower` is its time for a block over that of the median peer, 1 if nobody else has measured itself.
    """

    adds: bool
    before_per_s: float
    after_per_s: float
    times_slower: float
    reason: str


def judge(
    view: View,
    start: int,
    end: int,
    *,
    block_time_s: float,
    overhead_s: float = 0.0,
    link_bytes_per_s: float = 0.0,
    bytes_per_token: float = 0.0,
) -> Judgement:
    """What a newcomer (not in the view) with blocks [start, end) adds; `reason` is what to tell whoever joins."""
    others = supplies(view, bytes_per_token)
    newcomer = own_supply(end - start, block_time_s, overhead_s, link_bytes_per_s, bytes_per_token).at(start)
    before = max_flow(others, view.n_blocks).tokens_per_s
    after = max_flow([*others, newcomer], view.n_blocks).tokens_per_s
    known = sorted(peer.block_time_s for peer in view.peers.values() if peer.staying and peer.block_time_s > 0.0)
    slower = block_time_s / known[len(known) // 2] if known and block_time_s > 0.0 else 1.0
    closes = any(start < last and first < end for first, last in view.staying().missing())
    adds = closes or after > before * (1.0 + _WORTH_SAYING)
    if adds:
        pace = f"; it is {slower:.0f} times slower than the median peer" if slower >= SLOW and not closes else ""
        what = "closes a hole" if closes else f"raises the swarm from {before:.3g} to {after:.3g} tokens a second"
        return Judgement(adds, before, after, slower, f"this machine {what}{pace}")
    if slower >= SLOW:
        return Judgement(
            adds,
            before,
            after,
            slower,
            (
                f"this machine is {slower:.0f} times slower than the median peer; "
                "the swarm will route around it unless others leave"
            ),
        )
    return Judgement(
        adds,
        before,
        after,
        slower,
        (
            f"this machine adds nothing to the {before:.3g} tokens a second of the swarm, which other blocks limit; "
            f"it is a reserve for {start}:{end}"
        ),
    )


def best_window(others: Sequence[Supply], newcomer: Supply, n_blocks: int) -> tuple[int, float]:
    """(start, tokens a second): where a newcomer of that length helps most, by the rule of `choose_span`."""
    length = newcomer.end - newcomer.start
    covered, cuts = covered_blocks(others), [(1 << n_blocks) - 1]
    rates = [math.fsum(peer.even_rate for peer in others if peer.mask >> block & 1) for block in range(n_blocks)]
    best: tuple[float, tuple[list[float], int], int] | None = None
    for start in range(n_blocks - length + 1):
        supplied = [*others, newcomer.at(start)]
        if best and any(cut_flow(supplied, blocks) < best[0] * (1.0 - _ROUNDING) for blocks in cuts):
            continue
        found = max_flow(supplied, n_blocks)
        cuts.append(found.bottleneck)
        after = sorted(
            rate + newcomer.even_rate * (start <= block < start + length) for block, rate in enumerate(rates)
        )
        mask = newcomer.at(start).mask
        holes = len(ranges(block for block in range(n_blocks) if not (covered | mask) >> block & 1))
        flow, evenness = found.tokens_per_s, (after, -holes)
        equal = best is not None and abs(flow - best[0]) <= best[0] * _ROUNDING
        if best is None or (evenness > best[1] if equal else flow > best[0]):
            best = flow, evenness, start
    assert best is not None
    return best[2], best[0]


def capacity_blocks(
    memory_bytes: int,
    *,
    block_bytes: Sequence[int],
    embed_bytes: int,
    head_bytes: int,
    kv_bytes_per_token: Sequence[int],
    kv_tokens: int,
    shared_bytes: int = 0,
) -> tuple[int, str]:
    """(blocks, reason): how many blocks of a model, wherever they lie, fit into `memory_bytes`.

    `block_bytes` are the weights of each block and `kv_bytes_per_token` its keys and values, kept for `kv_tokens`.
    `embed_bytes` are held with the first block and `head_bytes` with the last, so that a part of the model has one of
    them at most; `shared_bytes` (the token table of tied embeddings) count in both, and once for the whole model.
    """
    n_blocks = len(block_bytes)
    with_cache = [size + kv_tokens * kv for size, kv in zip(block_bytes, kv_bytes_per_token, strict=True)]
    free = f"{show_bytes(memory_bytes)} free"
    whole_bytes = sum(with_cache) + embed_bytes + head_bytes - shared_bytes
    if whole_bytes <= memory_bytes:
        return n_blocks, f"can host all {n_blocks} blocks: {free}, {show_bytes(whole_bytes)} with the KV cache"
    largest_bytes = max(with_cache)
    ends_bytes = max(embed_bytes, head_bytes)
    # The last block is missing in any case: the whole model does not fit, even where its blocks alone would.
    blocks = max(0, min((memory_bytes - ends_bytes) // largest_bytes, n_blocks - 1))
    kept = f", {show_bytes(ends_bytes)} kept for the embedding or the head" if ends_bytes else ""
    return blocks, (
        f"can host {blocks or 'none'} of {n_blocks} blocks: {free}, "
        f"{show_bytes(largest_bytes)} a block with its KV cache{kept}"
    )


def even_spans(
    block_bytes: Sequence[int], n_nodes: int, *, embed_bytes: int = 0, head_bytes: int = 0, replicas: int = 1
) -> tuple[Span, ...]:
    """A span for each of `n_nodes` nodes, so that every block is served `replicas` times and the largest is smallest.

    The first span carries the embedding, the last the head. Nodes i and i + n_nodes // replicas serve the same blocks;
    what does not divide serves the first spans once more. Raises ConfigError if a span would be empty.
    """
    if n_nodes < 1 or replicas < 1:
        raise ConfigError(f"a swarm needs at least one node and one replica, not {n_nodes} and {replicas}")
    n_spans = n_nodes // replicas
    if n_spans == 0:
        raise ConfigError(f"{replicas} replicas of every block need at least {replicas} nodes, not {n_nodes}")
    if n_spans > len(block_bytes):
        n_blocks, each = len(block_bytes), f"with {replicas} replicas of each " if replicas > 1 else ""
        raise ConfigError(
            f"{n_nodes} nodes {each}would cut {n_blocks} blocks into {n_spans} spans: take fewer nodes or more replicas"
        )
    weights = list(block_bytes)
    weights[0] += embed_bytes
    weights[-1] += head_bytes
    spans = _partition(weights, n_spans)
    return tuple(spans[node % n_spans] for node in range(n_nodes))


def show_bytes(size_bytes: int) -> str:
    """A size for a sentence, in decimal units: "620 MB", "4.1 GB"."""
    for unit, scale in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if abs(size_bytes) >= scale:
            value = size_bytes / scale
            return f"{value:.1f} {unit}" if abs(value) < 10 else f"{value:.0f} {unit}"
    return f"{size_bytes} bytes"


def _partition(weights: Sequence[int], n_spans: int) -> tuple[Span, ...]:
    """Cut `weights` into spans of at least one so that the heaviest is lightest, and the rest as even as may be.

    best[k][end]: (heaviest, sum of squares) of the best k spans over [0, end), and where the last of them starts.
    """
    sums = [0]
    for weight in weights:
        sums.append(sums[-1] + weight)
    n = len(weights)
    best: list[dict[int, tuple[int, int, int]]] = [{0: (0, 0, 0)}]
    for k in range(1, n_spans + 1):
        row: dict[int, tuple[int, int, int]] = {}
        for end in range(k, n - (n_spans - k) + 1):
            options = (
                (max(heaviest, sums[end] - sums[start]), squares + (sums[end] - sums[start]) ** 2, -start)
                for start, (heaviest, squares, _) in best[k - 1].items()
                if start < end
            )
            heaviest, squares, negative_start = min(options)
            row[end] = (heaviest, squares, -negative_start)
        best.append(row)
    spans: list[Span] = []
    end = n
    for k in range(n_spans, 0, -1):
        start = best[k][end][2]
        spans.append((start, end))
        end = start
    return tuple(reversed(spans))


def _closes(start: int, end: int, missing: Sequence[Span], after: float) -> str:
    closed = _overlap(missing, start, end)
    left = _overlap(missing, 0, start) + _overlap(missing, end, missing[-1][1])
    if left:
        return f"nobody served {show_ranges(closed)}, {show_ranges(left)} still nobody's"
    return f"nobody served {show_ranges(closed)}, and the model is whole: {after:.3g} tokens a second"


def _overlap(spans: Sequence[Span], start: int, end: int) -> tuple[Span, ...]:
    """The parts of `spans` in [start, end)."""
    parts = ((max(first, start), min(last, end)) for first, last in spans)
    return tuple((first, last) for first, last in parts if first < last)


def _lifts(before: float, after: float) -> str:
    if after > before * (1.0 + _ROUNDING):
        return f"the weakest stretch, raises the swarm from {before:.3g} to {after:.3g} tokens a second"
    return f"a reserve: the swarm does {before:.3g} tokens a second with or without it"
