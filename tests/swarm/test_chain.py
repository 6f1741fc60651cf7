"""Opening and mending chains: whatever is replaced, the ring is whole and as few hops as possible hear of it."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mycel.protocols.errors import LocalProtocolError
from mycel.protocols.hop import HopMachine
from mycel.protocols.messages import Generation, OpenHop, PeerAddress, Relink, SamplingParams
from mycel.swarm.chain import Mend, covers, filling, mend, neighbours, opening, relaid, relinking
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


def links_of(hops: tuple[Hop, ...]) -> tuple[int, ...]:
    """Numbers of links that came about one after the other."""
    return tuple(range(1, len(hops) + 1))


def ends(plan: Mend, index: int) -> tuple[tuple[str, int], tuple[str, int]]:
    """(neighbour, link) before hop `index` and after it."""
    following = (index + 1) % len(plan.hops)
    previous, next_ = neighbours(plan.hops, index)
    return (previous.peer, plan.links[index]), (next_.peer, plan.links[following])


@given(rows(0, N_BLOCKS, "p"))
def test_the_first_chain_is_opened_whole(hops: tuple[Hop, ...]) -> None:
    plan = mend((), (), range(0), hops, 7)
    assert plan.hops == hops
    assert plan.links == (7,) * len(hops)
    assert plan.opened == tuple(range(len(hops)))
    assert plan.relinked == ()


@given(repairs())
def test_a_mended_chain_covers_and_disturbs_its_neighbours_alone(repair) -> None:
    hops, lost, replacement = repair
    before = Mend(hops, links_of(hops), (), ())
    plan = mend(hops, before.links, lost, replacement, 99)
    assert covers(plan.hops, 0, N_BLOCKS)
    assert [plan.hops[i] for i in plan.opened] == list(replacement)
    assert len(plan.relinked) == len(set(plan.relinked)) <= 2
    assert not set(plan.relinked) & set(plan.opened)

    had = {hop.peer.peer: ends(before, i) for i, hop in enumerate(hops)}
    for index, hop in enumerate(plan.hops):
        has = ends(plan, index)
        if index in plan.opened:
            assert {link for _, link in has} == {99}, "all links of a newcomer are new"
            continue
        assert (had[hop.peer.peer] != has) == (index in plan.relinked), "who has new ends hears of it, nobody else"
        for was, is_now in zip(had[hop.peer.peer], has, strict=True):
            assert (was[0] == is_now[0]) == (was[1] == is_now[1]), "a link is new if its other end is"


@given(repairs())
def test_neighbours_agree_about_each_other_and_their_link(repair) -> None:
    hops, lost, replacement = repair
    plan = mend(hops, links_of(hops), lost, replacement, 99)
    messages: list[OpenHop | Relink] = []
    for index in range(len(plan.hops)):
        if index in plan.opened:
            message = opening(plan, index, bytes(16), bytes(32), 20, GENERATION)
            HopMachine(message, N_BLOCKS)  # a hop accepts it
            assert bool(message.prompt) == (index == 0)
            assert (message.generation is not None) == (index == len(plan.hops) - 1)
            messages.append(message)
        else:
            messages.append(relinking(plan.hops, plan.links, index))
    for index, message in enumerate(messages):
        following = messages[(index + 1) % len(messages)]
        assert message.next == plan.hops[(index + 1) % len(plan.hops)].peer
        assert following.previous == plan.hops[index].peer
        assert message.outbound == following.inbound


@given(repairs())
def test_newcomers_are_filled_beside_the_chain_and_taken_over_without_a_break(repair) -> None:
    """The hop before fills over the very link that is its link to the next once the newcomers are part of the chain."""
    hops, lost, replacement = repair
    links = links_of(hops)
    plan = mend(hops, links, lost, replacement, 99)
    found = filling(hops, links, plan)
    if len(lost) == len(hops):
        assert found is None, "there is nobody else"
        return
    assert found is not None
    index, beside = found
    assert index not in lost
    before = relinking(hops, links, index)
    assert (beside.previous, beside.next, beside.inbound, beside.outbound) == (
        before.previous,
        before.next,
        before.inbound,
        before.outbound,
    ), "the chain goes on as it is"
    after = relinking(plan.hops, plan.links, plan.hops.index(hops[index]))
    assert (beside.spare, beside.spare_link) == (after.next, after.outbound)
    assert beside.spare == replacement[0].peer
    assert (before.spare, after.spare) == (None, None)


@given(rows(0, N_BLOCKS, "p").filter(lambda hops: len(hops) > 1), st.data())
def test_a_link_is_laid_anew_at_both_of_its_ends_alone(hops: tuple[Hop, ...], data: st.DataObject) -> None:
    receiver = data.draw(st.integers(0, len(hops) - 1))
    links = links_of(hops)
    plan = relaid(hops, links, receiver, 99)
    assert (plan.hops, plan.opened) == (hops, ())
    assert [i for i in range(len(hops)) if plan.links[i] != links[i]] == [receiver]
    assert set(plan.relinked) == {receiver, (receiver - 1) % len(hops)}
    assert relinking(plan.hops, plan.links, receiver).inbound == 99
    assert relinking(plan.hops, plan.links, receiver - 1).outbound == 99


def test_who_may_give_a_state_is_said_at_the_opening() -> None:
    hops = (Hop(PeerAddress("p"), 0, N_BLOCKS),)
    plan = mend(hops, (1,), range(1), (Hop(PeerAddress("q"), 0, N_BLOCKS),), 2)
    assert opening(plan, 0, bytes(16), bytes(32), 20, GENERATION).giver == ""
    assert opening(plan, 0, bytes(16), bytes(32), 20, GENERATION, "p").giver == "p"


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
        mend(hops, links_of(hops), lost, wrong, 99)


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
    assert mend(hops, (1,), range(1), (Hop(PeerAddress("q"), 0, 4),), 2).relinked == ()


def test_of_two_the_one_that_stays_is_both_neighbours() -> None:
    hops = (Hop(PeerAddress("p"), 0, 4), Hop(PeerAddress("q"), 4, 8))
    plan = mend(hops, (1, 1), range(1), (Hop(PeerAddress("r"), 0, 4),), 2)
    assert (plan.relinked, plan.links) == ((1,), (2, 2))
    plan = mend(hops, (1, 1), range(1, 2), (Hop(PeerAddress("r"), 4, 8),), 2)
    assert (plan.relinked, plan.links) == ((0,), (2, 2))
