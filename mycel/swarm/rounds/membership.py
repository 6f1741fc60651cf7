"""Who is a member of the next round: a function of the last outcome and of what the certificate shows.

Ring: pure.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from mycel.protocols.rounds import MAX_GROUP, Outcome, Request
from mycel.swarm.rounds.terms import GroupTerms


class Membership(NamedTuple):
    """The part of an outcome that says who makes the next round."""

    members: tuple[str, ...]
    missed: tuple[int, ...]
    convicted: tuple[str, ...]
    standing: tuple[int, ...]
    begun: bool


def gathering(outcome: Outcome, terms: GroupTerms) -> bool:
    """Whether the round after `outcome` only admits members, since there are too few to contribute."""
    return not outcome.begun and len(outcome.members) < terms.min_members


def next_members(
    previous: Outcome,
    contributors: Sequence[str],
    requests: Iterable[Request],
    convicted: Iterable[str],
    terms: GroupTerms,
    scores: Mapping[str, int],
) -> Membership:
    """The members after the round that follows `previous`.

    `convicted` are those newly proved to lie, `scores` is the standing of those who contributed. A round to which
    nobody contributed counts as nobody's absence. If everybody would be gone, those stay who were not convicted: a
    group without members could never have any again.
    """
    out = (*previous.convicted, *sorted(set(convicted) - set(previous.convicted)))
    wishes = {request.peer: request.wants for request in sorted(requests, key=_wish)}
    missed = {}
    for peer, before in zip(previous.members, previous.missed, strict=True):
        gone = bool(contributors) and peer not in contributors
        missed[peer] = before + 1 if gone else (0 if contributors else before)
    honest = [peer for peer in previous.members if peer not in out]
    staying = [peer for peer in honest if wishes.get(peer) != "leave" and missed[peer] < terms.absences]
    here = staying or honest or list(previous.members)
    newcomers = [peer for peer, wish in sorted(wishes.items()) if wish == "member" and peer not in previous.members]
    here += [peer for peer in newcomers if peer not in out][: MAX_GROUP - len(here)]
    members = tuple(sorted(here))
    known = {**standing_in(previous), **scores}
    standing = tuple(known.get(peer, 0) for peer in members)
    missing = tuple(missed.get(peer, 0) for peer in members)
    begun = previous.begun or len(members) >= terms.min_members
    return Membership(members, missing, out[-MAX_GROUP:], standing if any(standing) else (), begun)


def standing_in(outcome: Outcome) -> dict[str, int]:
    """The standing of the members of the next round, as far as they have one."""
    return dict(zip(outcome.members, outcome.standing, strict=False))


def _wish(request: Request) -> tuple[str, bool]:
    """Sorts so that of two wishes of one peer the one to leave comes last, and counts."""
    return request.peer, request.wants == "leave"
