"""Which messages make a chain of hops, and which mend one: the rules of opening and replacing, without a network.

Ring: pure.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from mycel.protocols.errors import LocalProtocolError
from mycel.protocols.messages import Generation, OpenHop, PeerAddress, Relink
from mycel.swarm.routing import Hop


@dataclass(frozen=True, slots=True)
class Mend:
    """How to get from one chain to the next: open the hops `opened`, in any order, then relink others.

    `hops` is the new chain; `opened` are indices into it; `relinked` are (index, resend) pairs.
    """

    hops: tuple[Hop, ...]
    opened: tuple[int, ...]
    relinked: tuple[tuple[int, bool], ...]


def covers(hops: Sequence[Hop], start: int, end: int) -> bool:
    """Whether `hops` serve every block of [start, end) once, in order."""
    for hop in hops:
        if hop.start != start or hop.end <= hop.start:
            return False
        start = hop.end
    return start == end


def mend(hops: Sequence[Hop], lost: range, replacement: Sequence[Hop]) -> Mend:
    """Put `replacement` in the place of hops[lost]; with no hops yet (`lost` empty) the whole chain is new.

    The neighbours of the stretch are relinked: the one before sends its history to the newcomers, the one after takes
    inputs from them. In a ring the hop before the first is the last.
    """
    if hops and not covers(replacement, hops[lost.start].start, hops[lost.stop - 1].end):
        raise LocalProtocolError("the replacement does not cover the blocks that were lost")
    new = (*hops[: lost.start], *replacement, *hops[lost.stop :])
    opened = tuple(range(lost.start, lost.start + len(replacement)))
    kept = [i for i in range(len(new)) if i not in opened]
    before, after = (lost.start - 1) % len(new), (lost.start + len(replacement)) % len(new)
    relinked = tuple((i, i == before) for i in kept if i in (before, after))
    return Mend(new, opened, relinked)


def neighbours(hops: Sequence[Hop], index: int) -> tuple[PeerAddress, PeerAddress]:
    """Who pushes to hop `index` and whom it pushes to; the ring is closed."""
    return hops[index - 1].peer, hops[(index + 1) % len(hops)].peer


def opening(
    hops: Sequence[Hop], index: int, session: bytes, swarm: bytes, max_tokens: int, generation: Generation
) -> OpenHop:
    """The message that opens hop `index`: the first hop is told every token so far, the last how to go on."""
    previous, following = neighbours(hops, index)
    return OpenHop(
        session=session,
        swarm=swarm,
        start=hops[index].start,
        end=hops[index].end,
        max_tokens=max_tokens,
        previous=previous,
        next=following,
        prompt=generation.tokens if index == 0 else (),
        generation=generation if index == len(hops) - 1 else None,
    )


def relinking(hops: Sequence[Hop], index: int, resend: bool) -> Relink:
    previous, following = neighbours(hops, index)
    return Relink(previous, following, resend)
