"""Opening and mending chains: whatever is replaced, the ring is whole and as few hops as possible hear of it."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mycel.protocols.errors import LocalProtocolError
from mycel.protocols.hop import HopMachine
from mycel.protocols.messages import Generation, OpenHop, PeerAddress, Relink, SamplingParams
from mycel.swarm.chain import covers, mend, neighbours, opening, relinking
from mycel.swarm.routing import Hop

N_BLOCKS = 12
GENERATION = Generation(SamplingParams(), (1, 2, 3), 9)


@st.composite
def rows(draw: st.DrawFn, start: int, end: int, prefix: str) -> tuple[Hop, ...]:
    """Hops that cover [start, end)."""
    cuts = draw(st.sets(st.integers(start + 1, end - 1), max_size=5)) if end - start > 1 else set()
    edges = [start, *sorted(cuts), end]
    return tuple(Hop(PeerAddress(f"{prefix}{i}"), left, right) for i, (left, right) in enumerate(pairwise(edges)))


@st.composite
def repairs(draw: st.DrawFn) -> tuple[tuple[Hop, ...], range, tuple[Hop, ...]]:
    """A chain, a stretch of it, and what takes its place."""
    hops = draw(rows(0, N_BLOCKS, "old"))
    first = draw(st.integers(0, len(hops) - 1))
    last = draw(st.integers(first, len(hops) - 1))
    return hops, range(first, last + 1), draw(rows(hops[first].start, hops[last].end, "new"))


@given(rows(0, N_BLOCKS, "p"))
def test_the_first_chain_is_opened_whole(hops: tuple[Hop, ...]) -> None:
    plan = mend((), range(0), hops)
    assert plan.hops == hops
    assert plan.opened == tuple(range(len(hops)))
    assert plan.relinked == ()


@given(repairs())
def test_a_mended_chain_covers_and_disturbs_its_neighbours_alone(repair) -> None:
    hops, lost, replacement = repair
    plan = mend(hops, lost, replacement)
    assert covers(plan.hops, 0, N_BLOCKS)
    assert [plan.hops[i] for i in plan.opened] == list(replacement)
    relinked = [i for i, _ in plan.relinked]
    assert len(relinked) == len(set(relinked)) <= 2
    assert not set(relinked) & set(plan.opened)

    before = {hop.peer.peer: neighbours(hops, i) for i, hop in enumerate(hops)}
    for index, hop in enumerate(plan.hops):
        previous, following = neighbours(plan.hops, index)
        assert previous == plan.hops[index - 1].peer
        assert following == plan.hops[(index + 1) % len(plan.hops)].peer
        if index in plan.opened:
            continue
        changed = before[hop.peer.peer] != (previous, following)
        assert changed == (index in relinked), "who has new neighbours hears of it, and nobody else"
        resend = dict(plan.relinked).get(index, False)
        assert resend == (before[hop.peer.peer][1] != following), "who has a new next hop sends all again"


@given(repairs())
def test_neighbours_agree_about_each_other(repair) -> None:
    hops, lost, replacement = repair
    plan = mend(hops, lost, replacement)
    messages: list[OpenHop | Relink] = []
    kept = dict(plan.relinked)
    for index in range(len(plan.hops)):
        if index in plan.opened:
            message = opening(plan.hops, index, bytes(16), bytes(32), 20, GENERATION)
            HopMachine(message, N_BLOCKS)  # a hop accepts it
            assert bool(message.prompt) == (index == 0)
            assert (message.generation is not None) == (index == len(plan.hops) - 1)
            messages.append(message)
        else:
            messages.append(relinking(plan.hops, index, kept.get(index, False)))
    for index, message in enumerate(messages):
        assert message.next == plan.hops[(index + 1) % len(plan.hops)].peer
        assert messages[(index + 1) % len(messages)].previous == plan.hops[index].peer


@given(repairs(), st.sampled_from(["short", "gap", "none"]))
def test_a_replacement_that_does_not_fit_is_our_bug(repair, flaw: str) -> None:
    hops, lost, replacement = repair
    first = replacement[0]
    wrong = {
        "short": replacement[:-1],
        "gap": (Hop(first.peer, first.start + 1, first.end + 1), *replacement[1:]),
        "none": (),
    }[flaw]
    with pytest.raises(LocalProtocolError):
        mend(hops, lost, wrong)


@given(rows(2, 9, "p"))
def test_covering_is_exact(hops: tuple[Hop, ...]) -> None:
    assert covers(hops, 2, 9)
    assert not covers(hops, 2, 10)
    assert not covers(hops, 1, 9)
    assert not covers((*hops, hops[-1]), 2, 9)
    assert not covers(hops[1:], 2, 9)
    assert covers((), 3, 3)
    assert not covers((Hop(PeerAddress("p"), 3, 3),), 3, 3), "an empty hop is none"


def test_a_hop_alone_is_its_own_neighbour() -> None:
    (hop,) = hops = (Hop(PeerAddress("p"), 0, 4),)
    assert neighbours(hops, 0) == (hop.peer, hop.peer)
    assert mend(hops, range(1), (Hop(PeerAddress("q"), 0, 4),)).relinked == ()


def test_of_two_the_one_that_stays_is_both_neighbours() -> None:
    hops = (Hop(PeerAddress("p"), 0, 4), Hop(PeerAddress("q"), 4, 8))
    assert mend(hops, range(1), (Hop(PeerAddress("r"), 0, 4),)).relinked == ((1, True),)
    assert mend(hops, range(1, 2), (Hop(PeerAddress("r"), 4, 8),)).relinked == ((0, True),)
