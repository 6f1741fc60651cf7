"""What a swarm can be expected to do: its speed for one stream and for many, and what it would survive.

Ring: pure.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from mycel.protocols.errors import RouteUnavailable
from mycel.swarm.routing import choose_chain
from mycel.swarm.throughput import swarm_flow
from mycel.swarm.view import PeerView, View, short_id, show_ranges


@dataclass(frozen=True, slots=True)
class Estimate:
    """A swarm in numbers. Rates are tokens a second, 0 while blocks are missing; `reason` is a sentence for people.

    `coverage` is the number of replicas of each block, `indispensable` are the peers that alone serve some block.
    """

    stream_tokens_per_s: float
    total_tokens_per_s: float
    coverage: tuple[int, ...]
    weakest_block: int
    missing: tuple[tuple[int, int], ...]
    indispensable: tuple[str, ...]
    reason: str

    @property
    def complete(self) -> bool:
        """Whether every block is served."""
        return not self.missing

    @property
    def survives_any_loss(self) -> bool:
        """Whether every block would still be served after the loss of any one peer."""
        return self.complete and not self.indispensable


def estimate(
    view: View, *, rtts: Mapping[str, float] | None = None, max_tokens: int = 0, bytes_per_token: float = 0.0
) -> Estimate:
    """What the swarm of `view` can do, for a client with round trips `rtts` and sessions of `max_tokens` tokens.

    One stream: the cheapest chain. In total: the maximum flow over blocks (mycel/swarm/throughput.py), each peer doing
    one step at a time, with links that carry `bytes_per_token` for a token (0: not counted).
    """
    coverage = view.coverage()
    missing = view.missing()
    stream = _stream_tokens_per_s(view, rtts or {}, max_tokens)
    total = swarm_flow(view, bytes_per_token=bytes_per_token).tokens_per_s
    indispensable = tuple(
        peer.peer for peer in view.serving() if any(coverage[block] == 1 for block in range(peer.start, peer.end))
    )
    weakest, replicas = view.weakest()
    reason = _reason(view.n_blocks, missing, (weakest, replicas), stream, indispensable)
    return Estimate(stream, total, coverage, weakest, missing, indispensable, reason)


def coverage_bar(coverage: Sequence[int], width: int | None = None) -> str:
    """One sign for each block, or for the weakest of several in a row at `width`: "." nobody, 1 to 9, "+" for more.

    >>> coverage_bar((0, 1, 2, 12))
    '.12+'
    """
    return "".join(_sign(min(coverage[start:end])) for start, end in _buckets(len(coverage), width))


def span_bar(peer: PeerView, n_blocks: int, width: int | None = None) -> str:
    """Where a peer's span lies among all blocks: "#" where it serves, "." elsewhere."""
    return "".join("#" if peer.start < end and start < peer.end else "." for start, end in _buckets(n_blocks, width))


def _buckets(n_blocks: int, width: int | None) -> list[tuple[int, int]]:
    count = n_blocks if width is None else max(1, min(width, n_blocks))
    return [(i * n_blocks // count, (i + 1) * n_blocks // count) for i in range(count)]


def _sign(replicas: int) -> str:
    return "." if replicas == 0 else str(replicas) if replicas < 10 else "+"


def _stream_tokens_per_s(view: View, rtts: Mapping[str, float], max_tokens: int) -> float:
    try:
        chain = choose_chain(view, rtts=rtts, max_tokens=max_tokens)
    except RouteUnavailable:
        return 0.0
    # A swarm of peers that have not measured themselves yet promises no time at all, which is no promise.
    return 1.0 / chain.expected_s_per_token if chain.expected_s_per_token > 0.0 else 0.0


def _reason(
    n_blocks: int,
    missing: tuple[tuple[int, int], ...],
    weakest: tuple[int, int],
    stream_tokens_per_s: float,
    indispensable: tuple[str, ...],
) -> str:
    covered = n_blocks - sum(end - start for start, end in missing)
    if missing:
        return f"{covered}/{n_blocks} blocks covered, nobody serves {show_ranges(missing)}"
    block, replicas = weakest
    loss = (
        f"loses blocks with any of {', '.join(short_id(peer) for peer in indispensable)}"
        if indispensable
        else "survives the loss of any one node"
    )
    return (
        f"{covered}/{n_blocks} blocks covered, weakest block {block} {replicas}x, "
        f"{stream_tokens_per_s:.1f} tokens a second expected, {loss}"
    )
