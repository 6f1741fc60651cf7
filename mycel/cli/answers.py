"""Showing an answer while it comes: text to stdout, the route and where the time went to stderr.

Ring: shell.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import trio

from mycel.cli.common import say, write
from mycel.protocols.errors import PeerError
from mycel.swarm.view import short_id, show_ranges

if TYPE_CHECKING:
    from mycel.node.client import Generation, Model
    from mycel.swarm.trace import Replaced, RouteTrace

# Silence is explained after this.
_WAITING_S = 3.0


async def stream_text(generation: Generation, after_token: Callable[[int], None] | None = None) -> None:
    """Write an answer's text as it becomes certain; `after_token` is told how many tokens there are."""
    async for piece in generation:
        if piece.text:
            write(piece.text)
        if after_token is not None:
            after_token(len(generation.tokens))
    if generation.text and not generation.text.endswith("\n"):
        write("\n")


async def explain_silence(model: Model, patience_s: float) -> None:
    """Say what a first token is waited for, once it has been waited for long; to be cancelled when it comes."""
    await trio.sleep(_WAITING_S)
    try:
        missing = (await model.view()).missing()
    except PeerError:
        missing = ()
    if missing:
        say(f"nobody serves blocks {show_ranges(missing)} yet; waiting up to {patience_s:.0f} s")
    else:
        say(f"waiting for the first token, up to {patience_s:.0f} s")


def show_route(trace: RouteTrace) -> None:
    """The hops of an answer, and for each decoded token the milliseconds spent there."""
    rows = [("hop", "peer", "blocks", "compute ms", "queue ms", "network ms")]
    rows += [
        (
            str(number),
            short_id(hop.peer),
            f"{hop.start}:{hop.end}",
            f"{hop.compute_ms:.2f}",
            f"{hop.queue_ms:.2f}",
            f"{hop.network_ms:.2f}",
        )
        for number, hop in enumerate(trace.report(), 1)
    ]
    for line in columns(rows):
        say(line)
    for replaced in trace.replaced:
        say(show_replaced(replaced))
    for moved in trace.moved:
        say(f"handed over by {short_id(moved.peer)} at position {moved.position}: {moved.reason}")


def show_replaced(replaced: Replaced) -> str:
    return f"replaced {short_id(replaced.peer)} at position {replaced.position}: {replaced.reason}"


def summary(trace: RouteTrace) -> str:
    """The last line: "41 tokens, 6.9 tokens/s, first token after 0.8 s, 0 hops replaced"."""
    parts = [counted(trace.n_tokens, "token")]
    if trace.tokens_per_s is not None:
        parts.append(f"{trace.tokens_per_s:.1f} tokens/s")
    if trace.first_token_s is not None:
        parts.append(f"first token after {trace.first_token_s:.2g} s")
    parts.append(f"{counted(len(trace.replaced), 'hop')} replaced")
    if trace.moved:
        parts.append(f"{counted(len(trace.moved), 'hop')} handed over")
    return ", ".join(parts)


def as_json(prompt: str, generation: Generation) -> dict[str, Any]:
    """An answer with everything that is known of it."""
    trace = generation.trace
    return {
        "prompt": prompt,
        "text": generation.text,
        "tokens": generation.tokens,
        "finish": generation.finish,
        "route": [
            {
                "peer": hop.peer,
                "blocks": [hop.start, hop.end],
                "compute_ms": round(hop.compute_ms, 3),
                "queue_ms": round(hop.queue_ms, 3),
                "network_ms": round(hop.network_ms, 3),
            }
            for hop in trace.report()
        ],
        "timings": {"first_token_s": _rounded(trace.first_token_s), "tokens_per_s": _rounded(trace.tokens_per_s)},
        "replaced": [{"peer": lost.peer, "position": lost.position, "reason": lost.reason} for lost in trace.replaced],
        "moved": [{"peer": left.peer, "position": left.position, "reason": left.reason} for left in trace.moved],
    }


def columns(rows: Sequence[tuple[str, ...]]) -> list[str]:
    """Rows as lines, each column as wide as its widest cell; the last is not padded."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def counted(count: int, what: str) -> str:
    return f"{count} {what}" if count == 1 else f"{count} {what}s"


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 4)
