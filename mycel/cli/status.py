"""`mycel status`: who serves what, and what the swarm can do."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import trio

from mycel.cli.common import Number, cache_dir, data_dir_option, find_invite, invite_option, write

if TYPE_CHECKING:
    from mycel.node.client import Model
    from mycel.swarm.estimate import Estimate
    from mycel.swarm.invite import Invite
    from mycel.swarm.view import View

_BAR_WIDTH = 32


@dataclass(frozen=True, slots=True)
class Status:
    """A swarm at one moment; `rtts_s` are this client's round trips by peer."""

    model: str
    swarm: str
    view: View
    estimate: Estimate
    rtts_s: Mapping[str, float]


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@click.option(
    "--timeout",
    type=Number(0.1, 3600),
    default=30.0,
    show_default=True,
    metavar="SECONDS",
    help="How long to wait for the swarm.",
)
@invite_option
@data_dir_option
def status(as_json: bool, timeout: float, invite: str | None, data_dir: Path | None) -> None:
    """Show who serves what, and what the swarm can do.

    The bar shows every block of the model: how many nodes serve it (1 to 9, + for more), or a dot where nobody does.
    The weakest block is the one that the fewest nodes serve. Expected tokens per second are for one answer at a time.
    """
    found = trio.run(_read, find_invite(invite), cache_dir(data_dir), timeout)
    write(json.dumps(status_json(found)) + "\n" if as_json else "".join(f"{line}\n" for line in status_lines(found)))


async def _read(invite: Invite, cache: Path, timeout_s: float) -> Status:
    from mycel.node.client import connect
    from mycel.protocols.errors import PeerTimeout

    with trio.move_on_after(timeout_s):
        async with connect(invite, cache_dir=cache) as model:
            return await read_status(model)
    raise PeerTimeout("", f"the swarm did not answer within {timeout_s:.0f} s")


async def read_status(model: Model) -> Status:
    """The swarm as the directory knows it now."""
    view, estimate = await model.view(), await model.estimate()
    transport = model.network.transport
    rtts = {peer: rtt for peer in view.peers if (rtt := transport.rtt_s(peer)) is not None}
    return Status(model.manifest.name, model.watch.swarm.hex(), view, estimate, rtts)


def status_lines(found: Status) -> list[str]:
    """For people."""
    from mycel.cli.answers import columns, counted
    from mycel.swarm.estimate import coverage_bar, span_bar
    from mycel.swarm.view import short_id

    view, estimate = found.view, found.estimate
    rows = [("node", "blocks", "", "state", "ms/block", "sessions", "KV tokens free", "round trip")]
    for peer in sorted(view.peers.values(), key=lambda peer: (peer.start, peer.end, peer.peer)):
        rtt_s = found.rtts_s.get(peer.peer)
        rows.append(
            (
                short_id(peer.peer),
                f"{peer.start}:{peer.end}",
                span_bar(peer, view.n_blocks, _BAR_WIDTH),
                peer.state,
                f"{peer.block_time_s * 1e3:.2f}",
                str(peer.sessions),
                str(peer.kv_free_tokens),
                "-" if rtt_s is None else f"{rtt_s * 1e3:.1f} ms",
            )
        )
    nodes = counted(len(view.peers), "node")
    lines = [f"{found.model}: {counted(view.n_blocks, 'block')}, {nodes}, swarm {found.swarm[:8]}", *columns(rows)]
    lines.append(f"coverage      {coverage_bar(estimate.coverage, _BAR_WIDTH)}")
    lines.append(
        f"weakest block {estimate.weakest_block} ({counted(estimate.coverage[estimate.weakest_block], 'node')})"
    )
    lines.append(
        f"expected      {estimate.stream_tokens_per_s:.1f} tokens/s for one answer, "
        f"{estimate.total_tokens_per_s:.1f} tokens/s for many"
    )
    lines.append(estimate.reason)
    return lines


def status_json(found: Status) -> dict[str, Any]:
    """For programs."""
    view, estimate = found.view, found.estimate
    return {
        "model": found.model,
        "swarm": found.swarm,
        "n_blocks": view.n_blocks,
        "coverage": list(estimate.coverage),
        "complete": estimate.complete,
        "missing": [list(span) for span in estimate.missing],
        "weakest_block": estimate.weakest_block,
        "indispensable": list(estimate.indispensable),
        "survives_any_loss": estimate.survives_any_loss,
        "stream_tokens_per_s": round(estimate.stream_tokens_per_s, 3),
        "total_tokens_per_s": round(estimate.total_tokens_per_s, 3),
        "reason": estimate.reason,
        "peers": [
            {
                "peer": peer.peer,
                "addresses": list(peer.addresses),
                "blocks": [peer.start, peer.end],
                "state": peer.state,
                "block_ms": round(peer.block_time_s * 1e3, 4),
                "overhead_ms": round(peer.overhead_s * 1e3, 4),
                "queue_ms": round(peer.queue_s * 1e3, 4),
                "kv_free_tokens": peer.kv_free_tokens,
                "sessions": peer.sessions,
                "rtt_ms": None if (rtt_s := found.rtts_s.get(peer.peer)) is None else round(rtt_s * 1e3, 3),
                "expires_in_s": round(peer.expires_at - time.time(), 1),
            }
            for peer in sorted(view.peers.values(), key=lambda peer: (peer.start, peer.end, peer.peer))
        ],
    }
