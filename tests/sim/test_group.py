"""Groups of peers in virtual time: rounds end with what the rule gives, whoever dies, is late, lies or is cut off."""

from __future__ import annotations

import contextlib
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
import trio

from mycel.node.rounds.blobs import BlobStore
from mycel.node.rounds.group import Committed, Contribution
from mycel.protocols.codec import round_codec
from mycel.protocols.errors import PeerError
from mycel.protocols.ids import ROUND
from mycel.protocols.rounds import Claim, Joining
from mycel.security.aggregators import aggregate, parse_rule
from mycel.swarm.codecs import Layout
from mycel.swarm.rounds.reducer import VectorReducer
from tests.sim.group_rig import (
    N_ELEMENTS,
    RUN,
    GroupSwarm,
    Member,
    ToyReducer,
    contribute_and_apply,
    group_terms,
    group_world,
    mean_of,
    vector_of,
)


def members_of(swarm: GroupSwarm, member: Member) -> set[str]:
    return {swarm.name_of(peer) for peer in member.group.members}


async def all_in(swarm: GroupSwarm, *names: str) -> None:
    """Until these are the members, in everybody's view."""
    await swarm.when(lambda: all(members_of(swarm, m) == set(names) for m in swarm.living()))


@pytest.mark.parametrize("aggregators", [0, 1, 3])
@pytest.mark.parametrize("n_peers", [1, 4])
def test_rounds_end_with_the_mean_of_what_is_in_them(tmp_path: Path, n_peers: int, aggregators: int) -> None:
    names = "abcdefgh"[:n_peers]

    async def body(swarm: GroupSwarm) -> None:
        for name in names:
            swarm.start(name)
        await all_in(swarm, *names)
        number = max(member.after for member in swarm.living())
        await swarm.until(number + 4)

    swarm = group_world(tmp_path, body, group_terms(aggregators=aggregators))
    for member in swarm.members.values():
        assert member.fetched_states == 0
        full = [done for done in member.seen if len(done.offers) == n_peers]
        assert len(full) >= 3
        assert all(done.accepted for done in full)
    assert not swarm.events("peer.named")
    assert not swarm.events("body.missing")


@pytest.mark.slow
def test_bytes_are_those_of_the_bodies_and_little_more(tmp_path: Path) -> None:
    """One aggregator a shard: each vector goes out once, and comes back once."""
    names = "abcd"

    async def body(swarm: GroupSwarm) -> None:
        for name in names:
            swarm.start(name)
        await all_in(swarm, *names)
        members = list(swarm.members.values())
        start = max(member.after for member in members) + 1
        await swarm.until(start)
        before = Counter({m.name: m.group.given_bytes for m in members})
        said = Counter({m.name: m.group.said_bytes for m in members})
        await swarm.until(start + 4)
        given = sum(m.group.given_bytes - before[m.name] for m in members) / 4
        told = sum(m.group.said_bytes - said[m.name] for m in members) / 4
        # The last round may have begun for some.
        whole = 4 * N_ELEMENTS * 3 / 4 * 2 * len(names)
        assert whole * 0.95 <= given <= whole * 1.4, (given, whole)
        assert told < 40_000, told

    group_world(tmp_path, body, group_terms(aggregators=1, open=False))


@pytest.mark.slow
def test_a_robust_rule_measures_from_the_round_before(tmp_path: Path) -> None:
    """Also for who was restarted, and has to fetch what that was."""
    terms = group_terms(rule="nnm+geometric-median", liars=0.25)
    layout = Layout(((N_ELEMENTS,),))
    reducer = VectorReducer(layout, terms)
    checked: set[int] = set()

    class Swarm(GroupSwarm):
        def check(self, member: Member, done: Committed) -> None:
            outcome = done.certificate.outcome
            rows = [torch.from_numpy(vector_of(self.name_of(o.peer), outcome.round)) for o in done.offers]
            results = reducer.decode(done.results) if done.results else None
            before = self.kept_results.get(outcome.round - 1)
            assert outcome.round - 1 in self.kept_results or outcome.round == 1
            self.kept_results[outcome.round] = results
            if results is not None:
                whole = aggregate(rows, parse_rule(terms.rule), terms.n_liars(len(rows)), center=before)
                assert torch.allclose(results, whole.vector, atol=1e-2)
                checked.add(outcome.round)

    async def body(swarm: GroupSwarm) -> None:
        assert isinstance(swarm, Swarm)
        swarm.kept_results = {}
        for name in "abcd":
            swarm.start(name)
        await all_in(swarm, *"abcd")
        number = swarm.members["a"].after
        await swarm.until(number + 2)
        swarm.crash("b")
        swarm.start("b")
        await swarm.until(number + 5)

    group_world(tmp_path, body, terms, reducer=reducer, kind=Swarm)
    assert len(checked) >= 5
    assert not [one for one in checked if one == 0]


def test_who_crashes_and_comes_again_goes_on_with_what_it_missed(tmp_path: Path) -> None:
    async def body(swarm: GroupSwarm) -> None:
        for name in "abcd":
            swarm.start(name)
        await all_in(swarm, *"abcd")
        number = swarm.members["a"].after
        await swarm.until(number + 2)
        swarm.crash("c")
        await swarm.until(number + 4)
        again = swarm.start("c")
        await swarm.until(number + 7)
        assert again.fetched_states == 0
        assert [done.round for done in again.seen] == [*range(again.seen[0].round, again.after + 1)]
        assert again.seen[0].round <= number + 4

    swarm = group_world(tmp_path, body, work_s=2.0)
    assert not swarm.events("peer.named")


@pytest.mark.slow
@pytest.mark.parametrize("save_every", [1, 4])
def test_all_are_killed_at_once_and_start_again(tmp_path: Path, save_every: int) -> None:
    """Also from states that are older than the last round: nobody but disks has what those rounds brought."""

    async def body(swarm: GroupSwarm) -> None:
        swarm.save_every = save_every
        for name in "abc":
            swarm.start(name)
        await all_in(swarm, *"abc")
        number = swarm.members["a"].after
        await swarm.until(number + 2)
        # In the midst of a round: some have signed something, others not yet.
        await swarm.when(lambda: swarm.members["a"].after % 4 == 2)
        await swarm.when(
            lambda: any(m.group.phase != "collecting" and m.group.times.get("offered") for m in swarm.living())
        )
        for name in "abc":
            swarm.crash(name)
        await trio.sleep(5.0)
        newest = max(member.after for member in swarm.members.values())
        assert save_every == 1 or all(after < newest for after, _ in swarm.kept.values())
        for name in "abc":
            swarm.start(name)
        await swarm.until(number + 9)
        # Where nothing but the newest state is on disk, who died before it had applied a round needs another's.
        assert save_every == 1 or all(m.fetched_states == 0 for m in swarm.members.values())

    swarm = group_world(tmp_path, body)
    assert not swarm.events("peer.named")


@pytest.mark.slow
def test_who_comes_after_many_rounds_needs_the_state(tmp_path: Path) -> None:
    async def body(swarm: GroupSwarm) -> None:
        for name in "abc":
            swarm.start(name)
        await swarm.until(14)
        late = swarm.start("d")
        await all_in(swarm, *"abcd")
        await swarm.until(late.after + 3)
        assert late.fetched_states == 1
        assert any(done.accepted for done in late.seen)

    group_world(tmp_path, body)


@pytest.mark.slow
def test_who_comes_after_few_rounds_makes_them_up(tmp_path: Path) -> None:
    async def body(swarm: GroupSwarm) -> None:
        for name in "abc":
            swarm.start(name)
        await swarm.until(4)
        late = swarm.start("d")
        await all_in(swarm, *"abcd")
        await swarm.until(late.after + 2)
        assert late.fetched_states == 0
        assert late.seen[0].round == 1

    group_world(tmp_path, body, work_s=2.0)


@pytest.mark.slow
def test_a_state_of_its_own_is_replaced_and_the_others_are_not_troubled(tmp_path: Path) -> None:
    async def body(swarm: GroupSwarm) -> None:
        for name in "abcd":
            swarm.start(name)
        await all_in(swarm, *"abcd")
        number = swarm.members["a"].after
        await swarm.until(number + 1)
        swarm.crash("b")
        after, total = swarm.kept["b"]
        swarm.kept["b"] = (after, total + np.float32(1))  # a bit flips on its disk
        swarm.checks_state = lambda member: member.name != "b" or member.fetched_states > 0
        wrong = swarm.start("b")
        await swarm.when(lambda: wrong.fetched_states > 0)
        await swarm.until(number + 5)
        assert [m.fetched_states for m in swarm.living() if m.name != "b"] == [0, 0, 0]

    group_world(tmp_path, body)


@pytest.mark.slow
def test_a_silent_member_is_dropped_and_one_that_leaves_is_gone_at_once(tmp_path: Path) -> None:
    async def body(swarm: GroupSwarm) -> None:
        for name in "abcde":
            swarm.start(name)
        await all_in(swarm, *"abcde")
        swarm.members["d"].is_silent = True
        await swarm.when(lambda: "d" not in members_of(swarm, swarm.members["a"]))
        await swarm.members["e"].group.leave()
        swarm.crash("e")
        await swarm.when(lambda: members_of(swarm, swarm.members["a"]) <= set("abcd"))

    group_world(tmp_path, body, work_s=2.0)


@pytest.mark.slow
def test_streams_that_break_lose_nothing(tmp_path: Path) -> None:
    """All connections of one peer are cut for a while, again and again."""

    async def body(swarm: GroupSwarm) -> None:
        for name in "abcd":
            swarm.start(name)
        await all_in(swarm, *"abcd")
        number = swarm.members["a"].after
        for turn in range(4):
            await trio.sleep(1.3 + 0.7 * turn)
            swarm.world.partition(["abcd"[turn]])
            await trio.sleep(7.0)
            swarm.world.heal()
        await swarm.until(number + 8)
        assert all(m.fetched_states == 0 for m in swarm.members.values())

    swarm = group_world(tmp_path, body, work_s=2.0)
    assert not swarm.events("peer.named")


@pytest.mark.slow
def test_without_a_quorum_nothing_is_decided(tmp_path: Path) -> None:
    async def body(swarm: GroupSwarm) -> None:
        for name in "abcd":
            swarm.start(name)
        await all_in(swarm, *"abcd")
        swarm.world.partition("ab", "cd")
        await trio.sleep(6.0)  # what was under way has arrived or not
        reached = max(m.after for m in swarm.living())
        await trio.sleep(120.0)
        assert max(m.after for m in swarm.living()) <= reached + 1
        assert len({m.after for m in swarm.living()}) <= 2
        swarm.world.heal()
        await swarm.until(reached + 3)

    group_world(tmp_path, body, work_s=2.0)


# ---- liars


@pytest.mark.slow
@pytest.mark.parametrize("gives_none", [False, True])
def test_wrong_bytes_and_no_bytes_end_in_a_round_without_them(tmp_path: Path, gives_none: bool) -> None:
    async def gives_other_bytes(swarm: GroupSwarm, member: Member) -> None:
        store = member.group._store
        store.put = _puts_other_bytes(store, gives_none)  # type: ignore[method-assign]
        await contribute_and_apply(swarm, member)

    async def body(swarm: GroupSwarm) -> None:
        for name in "abc":
            swarm.start(name)
        liar = swarm.start("d", program=gives_other_bytes)
        swarm.checks_state = lambda member: member.name != "d"
        await all_in(swarm, *"abcd")
        await swarm.until(liar.after + 2, "a", "b", "c")
        assert all("d" not in {swarm.name_of(o.peer) for o in done.offers} for done in swarm.members["a"].seen)

    swarm = group_world(tmp_path, body, group_terms(absences=100))
    assert any(swarm.name_of(str(fields["peer"])) == "d" for _, fields in swarm.events("blob.failed"))


def _puts_other_bytes(store: BlobStore, gives_none: bool):
    put = store.put

    async def lie(data: bytes, last_round: int) -> bytes:
        digest = await put(data, last_round)
        if gives_none:
            store._kept.pop(digest, None)
        else:
            store._kept[digest].data = memoryview(bytes(len(data)))
        return digest

    return lie


@pytest.mark.slow
def test_a_false_claim_is_refuted_and_its_author_is_out(tmp_path: Path) -> None:
    class False_(ToyReducer):  # noqa: N801
        def reduce(self, work, decision):
            return bytes(len(super().reduce(work, decision)))

    async def body(swarm: GroupSwarm) -> None:
        for name in "abcd":
            swarm.start(name, reducer=False_() if name == "d" else None)
        await all_in(swarm, *"abcd")
        await all_in_view_of(swarm, "abc", *"abc")
        await swarm.until(swarm.members["a"].after + 2, "a", "b", "c")

    swarm = group_world(tmp_path, body)
    named = {(name, swarm.name_of(str(fields["peer"]))) for name, fields in swarm.events("peer.named") if name != "d"}
    assert named == {("a", "d"), ("b", "d"), ("c", "d")}


async def all_in_view_of(swarm: GroupSwarm, whose: str, *names: str) -> None:
    await swarm.when(lambda: all(members_of(swarm, swarm.members[w]) == set(names) for w in whose))


@pytest.mark.slow
def test_a_peer_that_breaks_the_rules_loses_its_stream_and_rests(tmp_path: Path) -> None:
    async def forges(swarm: GroupSwarm, member: Member) -> None:
        """A member's claim, with a signature that is not its own."""
        group = member.group
        target = swarm.members["a"]
        while True:
            await trio.sleep(0.3)
            stream = await swarm.world.node("d").open(swarm.world.node("a").peer_id, ROUND)
            joining = Joining(RUN, "average", group.round, bytes(32), bytes(32), "observer")
            claim = Claim(
                *(RUN, "average", target.group.round, bytes(32), "sum", 0, swarm.world.node("b").peer_id),
                *(bytes(32), 4, b"", bytes(64)),
            )
            for message in (joining, claim):
                await stream.send(*round_codec.encode(message))
            while (await stream.receive()) is not None:
                pass

    async def body(swarm: GroupSwarm) -> None:
        for name in "abc":
            swarm.start(name)
        await all_in(swarm, *"abc")

        async def attack(swarm: GroupSwarm, member: Member) -> None:
            while True:
                with trio.move_on_after(5.0):
                    with contextlib.suppress(PeerError):  # its streams are refused
                        await forges(swarm, member)

        swarm.start("d", program=attack)
        number = swarm.members["a"].after
        await trio.sleep(70.0)
        await swarm.until(number + 3, "a", "b", "c")

    swarm = group_world(tmp_path, body, work_s=2.0)
    broke = [fields for name, fields in swarm.events("peer.broke_rules") if name == "a"]
    assert 1 <= len(broke) <= 2
    assert all(swarm.name_of(str(fields["peer"])) == "d" for fields in broke)


# ---- one byte updates


def test_scalars_travel_in_offers_and_beside_vectors(tmp_path: Path) -> None:
    """A mixed round: strong peers bring vectors, weak ones scalars, on the same state."""

    async def weak(swarm: GroupSwarm, member: Member) -> None:
        async def bring(number: int) -> None:
            await member.group.contribute(Contribution(scalars=bytes([number % 256]) * 256), number)

        await contribute_and_apply(swarm, member, bring=bring)

    async def body(swarm: GroupSwarm) -> None:
        swarm.start("a")
        swarm.start("b")
        for name in "cd":
            swarm.start(name, program=weak)
        await all_in(swarm, *"abcd")
        number = swarm.members["a"].after
        await swarm.until(number + 3)
        for member in swarm.living():
            done = member.seen[-1]
            scalars = {swarm.name_of(offer.peer): offer.scalars for offer in done.offers}
            assert scalars == {
                "a": b"",
                "b": b"",
                "c": bytes([done.round % 256]) * 256,
                "d": bytes([done.round % 256]) * 256,
            }
            assert b"".join(done.results) == mean_of([vector_of(n, done.round) for n in "ab"]).tobytes()

    group_world(tmp_path, body)
