"""Which messages make a chain of hops, and which mend one: the rules of opening and replacing, without a network.

Ring: pure.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from msgspec.structs import replace

from mycel.protocols.errors import LocalProtocolError
from mycel.protocols.messages import Generation, OpenHop, PeerAddress, Relink
from mycel.swarm.routing import Hop


@dataclass(frozen=True, slots=True)
class Mend:
    """How to get from one chain to the next: open the hops `opened`, in any order, then relink the hops `relinked`.

    `hops` is the new chain, the others are indices into it; `links[i]` is the number of the link into hop i.
    """

    hops: tuple[Hop, ...]
    links: tuple[int, ...]
    opened: tuple[int, ...]
    relinked: tuple[int, ...]


def covers(hops: Sequence[Hop], start: int, end: int) -> bool:
    """Whether `hops` serve every block of [start, end) once, in order."""
    for hop in hops:
        if hop.start != start or hop.end <= hop.start:
            return False
        start = hop.end
    return start == end


def mend(hops: Sequence[Hop], links: Sequence[int], lost: range, replacement: Sequence[Hop], number: int) -> Mend:
    """Put `replacement` in the place of hops[lost]; with no hops yet (`lost` empty) the whole chain is new.

    `links` are those of `hops`; all new links get `number`, which no attempt before had. The neighbours of the stretch
    are relinked: the one before sends its history to the newcomers, the one after takes inputs from them. In a ring the
    hop before the first is the last.
    """
    if hops and not covers(replacement, hops[lost.start].start, hops[lost.stop - 1].end):
        raise LocalProtocolError("the replacement does not cover the blocks that were lost")
    new = (*hops[: lost.start], *replacement, *hops[lost.stop :])
    opened = tuple(range(lost.start, lost.start + len(replacement)))
    before, after = (lost.start - 1) % len(new), (lost.start + len(replacement)) % len(new)
    kept = [*links[: lost.start], *(number for _ in opened), *links[lost.stop :]]
    kept[after] = number
    return Mend(new, tuple(kept), opened, tuple(sorted({before, after} - set(opened))))


def neighbours(hops: Sequence[Hop], index: int) -> tuple[PeerAddress, PeerAddress]:
    """Who pushes to hop `index` and whom it pushes to; the ring is closed."""
    return hops[index - 1].peer, hops[(index + 1) % len(hops)].peer


def relaid(hops: Sequence[Hop], links: Sequence[int], receiver: int, number: int) -> Mend:
    """The same hops, with another link into hop `receiver`: both of its ends are relinked."""
    kept = [*links[:receiver], number, *links[receiver + 1 :]]
    return Mend(tuple(hops), tuple(kept), (), tuple(sorted({(receiver - 1) % len(hops), receiver})))


def opening(
    plan: Mend,
    index: int,
    session: bytes,
    swarm: bytes,
    max_tokens: int,
    generation: Generation,
    giver: str = "",
) -> OpenHop:
    """The message that opens hop `index`: the first hop is told every token so far, the last how to go on.

    `giver` is who may hand the session's state over to it.
    """
    hops = plan.hops
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
        inbound=plan.links[index],
        outbound=plan.links[(index + 1) % len(hops)],
        giver=giver,
    )


def relinking(hops: Sequence[Hop], links: Sequence[int], index: int) -> Relink:
    """The message that tells hop `index` its neighbours and links as they are now; a spare link is given up."""
    previous, following = neighbours(hops, index)
    return Relink(previous, following, links[index], links[(index + 1) % len(links)])


def filling(hops: Sequence[Hop], links: Sequence[int], plan: Mend) -> tuple[int, Relink] | None:
    """Which hop of the chain as it is (`hops`, `links`) is to fill the newcomers of `plan`, and the message for it.

    None if the newcomers are the whole chain: their first hop has every token, and nobody else is there.
    """
    if len(plan.opened) == len(plan.hops):
        return None
    first = plan.opened[0]
    index = (first - 1) % len(hops)
    said = relinking(hops, links, index)
    return index, replace(said, spare=plan.hops[first].peer, spare_link=plan.links[first])
