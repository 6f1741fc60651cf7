"""Who of several peers that chose their blocks at the same time chooses again.

A peer that has chosen announces its place before it serves there: a newcomer says "joining", one that moves serves its
old blocks meanwhile and names the new ones. Whoever chooses later counts on that; who chose at the same time did not
know, and learns it while it fetches. Of two such peers the one with the lesser id is first. So with one picture of the
swarm the first of all goes where it chose, and no two wait for each other.

Ring: pure.
"""

from __future__ import annotations

from collections.abc import Iterable

from mycel.swarm.placement import best_window
from mycel.swarm.throughput import covered_blocks, kept_blocks, max_flow, measured, supplies, supply
from mycel.swarm.view import PeerView, View, ranges, short_id, show_ranges

# Another place has to raise the swarm's throughput by this share over the present one, or it is not worth a move.
MIN_SHARE = 0.05
# From announcing a place to serving there pass at least so many seconds, three times what it takes until everybody's
# view shows an announcement: so that all see who chose at the same time, and who of them went back.
SETTLE_S = 30.0


def must_yield(view: View, me: str, before: View, *, bytes_per_token: float = 0.0) -> str | None:
    """Why `me`, on its way in `view`, has to choose again (a newcomer) or go back (a mover); None if it need not.

    `before` is the view in which it chose; a mover served there, a newcomer did not. Ask at every fresh view until it
    serves, and once more when SETTLE_S have passed since it announced its choice, before anything old is given up.
    """
    home = before.peers.get(me)
    if me not in view.peers:  # cut off, or asleep for too long: nobody knows where it is going
        moves = home is not None and home.serving
        return f"{'goes back' if moves else 'chooses again'}: its announcement has ended"
    if home is not None and home.serving:
        return _mover_must_yield(view, me, before, (home.start, home.end))
    return _newcomer_must_yield(view, me, before, bytes_per_token)


def _mover_must_yield(view: View, me: str, before: View, home: tuple[int, int]) -> str | None:
    """A mover goes back when any other peer moved, unless that one will go back: it is on its way and comes later.

    So of several moves that were chosen in ignorance of each other one is made, as if it had been the only one.
    """
    back = f"goes back to {show_ranges([home])}"
    moved = [name for name in _new(view, before, me) if name in before.peers]
    first = _first(view, moved, me)
    if first:
        return f"{back}: {short_id(first[0])} moved at the same time and comes first"
    # Who will go back keeps all it has.
    kept = [kept_blocks(view, name) if name not in moved else _home_mask(view, name) for name in view.peers]
    target = view.staying().peers[me]
    others = [blocks for name, blocks in zip(view.peers, kept, strict=True) if name != me]
    given_up = [b for b in range(*home) if not target.start <= b < target.end]
    lost = ranges(b for b in given_up if not any(blocks >> b & 1 for blocks in others))
    return f"{back}: nobody else serves {show_ranges(lost)} any more" if lost else None


def _newcomer_must_yield(view: View, me: str, before: View, bytes_per_token: float) -> str | None:
    """A newcomer chooses again when another place is better by MIN_SHARE, now that it knows who came first."""
    new = _new(view, before, me)
    first = _first(view, new, me)
    if not first:
        return None
    others = supplies(view.without({me, *new} - set(first)), bytes_per_token)
    own = supply(measured(view).peers[me], bytes_per_token)
    now = max_flow([*others, own], view.n_blocks).tokens_per_s
    start, best = best_window(others, own, view.n_blocks)
    covered = covered_blocks([*others, own]).bit_count()
    if covered_blocks([*others, own.at(start)]).bit_count() <= covered and best <= now * (1.0 + MIN_SHARE):
        return None
    return f"chooses again: {short_id(first[0])} came first, and other blocks than {own.start}:{own.end} help more"


def _new(view: View, before: View, me: str) -> list[str]:
    """The others that stay at another place now than they had in `before`, by id."""
    now, then = view.staying().peers, before.staying().peers
    return [
        name for name in sorted(now) if name != me and (name not in then or _place(now[name]) != _place(then[name]))
    ]


def _first(view: View, new: Iterable[str], me: str) -> list[str]:
    """Those of `new` that come before `me`: by their ids, or since they have arrived where they wanted to go."""
    settled = view.staying().peers
    return [
        name
        for name in new
        if name < me or (view.peers[name].serving and _place(view.peers[name]) == _place(settled[name]))
    ]


def _home_mask(view: View, name: str) -> int:
    peer = view.peers[name]
    return (1 << peer.end) - (1 << peer.start) if peer.serving else 0


def _place(peer: PeerView) -> tuple[int, int]:
    return peer.start, peer.end
