"""Which blocks a node should serve: how many it can hold, where it helps most, and even shares for a new swarm.

Ring: pure.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from mycel.protocols.errors import ConfigError
from mycel.swarm.view import View, ranges, show_ranges, steps_per_s

Span = tuple[int, int]


def choose_span(view: View, capacity_blocks: int, *, block_time_s: float) -> tuple[int, int, str]:
    """(start, end, reason): the `capacity_blocks` blocks in a row where a newcomer helps the swarm most.

    For each window, take every block's decode steps a second as they would be with the newcomer in it, sorted upwards;
    the lexicographically greatest list wins: it leaves the fewest blocks uncovered, then lifts the slowest most. Of
    equal windows the one that leaves the uncovered blocks in the fewest ranges wins, then the first.

    The newcomer itself must not be in the view. Source: Petals (Borzunov et al. 2023), section 3.2, which compares the
    windows' own blocks and does not count what the newcomer adds. Raises ConfigError if it can hold no block.
    """
    if capacity_blocks < 1:
        raise ConfigError("this machine cannot hold a single block of the model")
    n_blocks = view.n_blocks
    if capacity_blocks >= n_blocks:
        return 0, n_blocks, f"blocks 0:{n_blocks}: this machine holds the whole model"
    coverage = view.coverage()
    rates = [math.fsum(peer.steps_per_s for peer in view.holders(block)) for block in range(n_blocks)]
    own_rate = steps_per_s(capacity_blocks, block_time_s)

    def worth(start: int) -> tuple[list[float], int, int]:
        end = start + capacity_blocks
        after = sorted(rate + own_rate * (start <= block < end) for block, rate in enumerate(rates))
        left = [block for block in range(n_blocks) if not coverage[block] and not start <= block < end]
        return after, -len(ranges(left)), -start

    start = max(range(n_blocks - capacity_blocks + 1), key=worth)
    end = start + capacity_blocks
    return start, end, _placement_reason(start, end, coverage, rates)


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


def _placement_reason(start: int, end: int, coverage: Sequence[int], rates: Sequence[float]) -> str:
    uncovered = [block for block, replicas in enumerate(coverage) if replicas == 0]
    where = f"blocks {start}:{end} of {len(coverage)}"
    closed = ranges(block for block in uncovered if start <= block < end)
    if closed:
        left = ranges(block for block in uncovered if not start <= block < end)
        rest = f", {show_ranges(left)} still nobody's" if left else ", and the model is whole"
        return f"{where}: nobody served {show_ranges(closed)}{rest}"
    weakest = min(range(start, end), key=lambda block: (rates[block], block))
    replicas = coverage[weakest]
    count = "1 replica" if replicas == 1 else f"{replicas} replicas"
    return f"{where}: the weakest stretch, block {weakest} had {count} and {rates[weakest]:.3g} steps a second"
