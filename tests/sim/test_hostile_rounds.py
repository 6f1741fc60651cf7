"""What liars in a group and strangers at its door try, in virtual time: rounds go on, nothing false, the liar named."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

import msgspec
import pytest
import trio

from mycel.node.rounds.round_streams import RoundStreams
from mycel.protocols.codec import round_codec
from mycel.protocols.errors import PeerError
from mycel.protocols.ids import ROUND
from mycel.protocols.rounds import NOTHING, Joining, Plan, Proposal, Request, RoundMessage, Vote
from mycel.security.identity import Identity
from mycel.swarm.codecs import Layout
from mycel.swarm.rounds.reducer import ShardWork, VectorReducer
from mycel.swarm.rounds.statements import UNSIGNED, sign
from tests.sim.group_rig import (
    N_ELEMENTS,
    RUN,
    GroupSwarm,
    Member,
    ToyReducer,
    contribute_and_apply,
    group_terms,
    group_world,
)
from tests.sim.round_net import TERMS, HashSigner, Net, hashed_signatures
from tests.sim.transport import SimTransport


@pytest.fixture
def _signatures() -> Iterator[None]:
    with hashed_signatures():
        yield


# ---- machines alone: what one message too many does


@dataclass
class Flooder:
    """Says what a correct machine says, and what `flood` makes up at the beginning of each round, to each listener."""

    net: Net
    peer: str
    flood: Callable[[Flooder, Joining], list[RoundMessage]]
    told: set[tuple[str, int]] = field(default_factory=set)

    def __call__(self, target: str, message: RoundMessage) -> list[RoundMessage]:
        if not isinstance(message, Joining) or (target, message.round) in self.told:
            return [message]
        self.told.add((target, message.round))
        return [message, *self.flood(self, message)]


def planning_ahead(flooder: Flooder, joining: Joining) -> list[RoundMessage]:
    """Plans what nobody offers, for every turn that it will ever have."""
    machine = flooder.net.nodes[flooder.peer].machine
    assert machine is not None
    first = machine._round.proposers.index(flooder.peer)
    attempts = [first + turn * len(machine.members) for turn in range(1, 17)]
    made_up = [tuple(hashlib.sha256(f"{a} {n}".encode()).digest() for n in range(8)) for a in attempts]
    place = (joining.run, joining.scope, joining.round)
    return [
        sign(HashSigner(flooder.peer), Plan(*place, attempt, flooder.peer, offers, UNSIGNED))
        for attempt, offers in zip(attempts, made_up, strict=True)
    ]


def started(net: Net) -> Net:
    for peer in net.nodes:
        net.start(peer)
    return net


def goes_on(net: Net, rounds: int, deadline_s: float) -> None:
    done = max(len(node.chain) for node in net.honest)
    assert net.run(lambda: net.rounds_done(done + rounds), deadline_s), net.describe()


@pytest.mark.usefixtures("_signatures")
def test_plans_for_turns_to_come_crowd_out_nobodys_and_close_no_round() -> None:
    net = Net(1, 4, replace(TERMS, absences=1000))
    net.nodes["p002"].liar = Flooder(net, "p002", planning_ahead)
    started(net)
    goes_on(net, 6, 200.0)
    assert all(len(outcome.offers) >= 3 for outcome in net.outcomes.values())
    assert all(certificate.attempt <= 1 for node in net.honest for certificate in node.chain)


@pytest.mark.usefixtures("_signatures")
def test_more_peers_want_in_than_a_proposal_holds() -> None:
    """An honest proposer must not say what everybody would refuse to read."""
    net = started(Net(3, 4))
    for number in range(300):
        stranger = f"x{number:03}"
        for node in net.honest:
            machine = node.machine
            assert machine is not None
            machine.present(machine._peers | {stranger}, net.now)
            request = Request(net.genesis.run, net.genesis.scope, machine.round, stranger, "member", UNSIGNED)
            node.hear(stranger, sign(HashSigner(stranger), request))
    net.run(lambda: False, 5.0)
    said = [p for node in net.honest for p in node.machine._ledger._first.get(node.peer, {}).values()]  # type: ignore[union-attr]
    assert max((len(p.requests) for p in said if isinstance(p, Proposal)), default=0) <= 256
    for statement in said:
        round_codec.decode(b"".join(round_codec.encode(statement)))
    assert net.members != net.genesis.members


@pytest.mark.usefixtures("_signatures")
def test_the_turn_of_a_proposer_who_is_gone_costs_little() -> None:
    took: list[float] = []
    for seed in range(6):
        net = started(Net(seed, 4, replace(TERMS, absences=1000, longest_grace_s=0.5)))
        machine = net.nodes["p000"].machine
        assert machine is not None
        net.kill(machine._round.proposers[0])
        assert net.run(lambda net=net: bool(net.outcomes), 60.0), net.describe()  # type: ignore[misc]
        took.append(net.now)
    assert max(took) < TERMS.attempt_s, took


# ---- whole groups: liars among the members. The rig holds all honest peers to one outcome, and to a true mean.


async def all_in(swarm: GroupSwarm, names: str) -> None:
    """Until these are the members, in the view of all of them."""
    wanted = set(names)
    await swarm.when(lambda: all({swarm.name_of(p) for p in swarm.members[n].group.members} == wanted for n in names))


async def out_of(swarm: GroupSwarm, honest: str) -> None:
    """Until the honest are alone, and have made two rounds since."""
    await all_in(swarm, honest)
    await swarm.until(max(swarm.members[name].after for name in honest) + 2, *honest)


def convicted(swarm: GroupSwarm) -> set[str]:
    return {swarm.name_of(peer) for peer in swarm.outcomes[max(swarm.outcomes)].convicted}


class WrongSum(ToyReducer):
    """Nobody contributed this."""

    def reduce(self, work: ShardWork, decision: bytes) -> bytes:
        return bytes(len(super().reduce(work, decision)))


@pytest.mark.parametrize(("honest", "liars"), [("abc", "d"), pytest.param("abcde", "fg", marks=pytest.mark.slow)])
def test_aggregators_that_claim_a_wrong_sum_are_named_and_out(tmp_path: Path, honest: str, liars: str) -> None:
    """Also two of three who lie alike: they outvote the third, but a claim is judged by whoever votes on it."""

    async def body(swarm: GroupSwarm) -> None:
        for name in honest + liars:
            swarm.start(name, reducer=WrongSum() if name in liars else None)
        swarm.checks_state = lambda member: member.name in honest
        await out_of(swarm, honest)

    swarm = group_world(tmp_path, body, group_terms(absences=1000))
    assert convicted(swarm) == set(liars)
    assert {swarm.name_of(str(f["peer"])) for who, f in swarm.events("peer.named") if who in honest} == set(liars)


@pytest.mark.slow
def test_an_aggregator_that_claims_a_wrong_gram_matrix_is_named_before_anything_is_decided(tmp_path: Path) -> None:
    terms = group_terms(rule="krum", liars=0.25, absences=1000)

    class WrongGram(VectorReducer):
        def gram(self, work: ShardWork) -> bytes:
            return bytes(len(super().gram(work)))

    class Swarm(GroupSwarm):
        def check(self, member: Member, done: object) -> None:
            """Everybody's state is checked; what krum gives is another test's affair."""

    async def body(swarm: GroupSwarm) -> None:
        for name in "abcd":
            swarm.start(name, reducer=WrongGram(Layout(((N_ELEMENTS,),)), terms) if name == "d" else None)
        swarm.checks_state = lambda member: member.name != "d"
        await all_in(swarm, "abc")
        swarm.outcomes[0] = swarm.members["a"].group._driver.machine.outcome
        await swarm.until(swarm.members["a"].after + 2, *"abc")

    swarm = group_world(tmp_path, body, terms, reducer=VectorReducer(Layout(((N_ELEMENTS,),)), terms), kind=Swarm)
    assert convicted(swarm) == {"d"}


# ---- equivocation


Twist = Callable[[Identity, RoundMessage], RoundMessage]


def tells_two_things(twist: Twist, swarm: GroupSwarm, member: Member, others: str) -> None:
    """To `others`, what `twist` makes of everything that this member says."""
    streams: RoundStreams = member.group._driver.streams
    signer = swarm.world.node(member.name).identity
    deceived = {swarm.world.node(name).peer_id for name in others}

    def say(message: RoundMessage) -> None:
        for peer, line in streams._lines.items():
            told = twist(signer, message) if peer in deceived else message
            if line.is_open:
                line.put("", b"".join(round_codec.encode(told)))

    streams.say = say  # type: ignore[method-assign]


def other_vote(signer: Identity, message: RoundMessage) -> RoundMessage:
    if not isinstance(message, Vote) or message.peer != signer.peer_id:
        return message
    value = hashlib.sha256(message.value).digest() if message.value == NOTHING else NOTHING
    return sign(signer, msgspec.structs.replace(message, value=value))


def other_proposal(signer: Identity, message: RoundMessage) -> RoundMessage:
    if not isinstance(message, Proposal) or message.peer != signer.peer_id:
        return message
    decision = hashlib.sha256(message.outcome.decision).digest()
    outcome = msgspec.structs.replace(message.outcome, decision=decision)
    return sign(signer, msgspec.structs.replace(message, outcome=outcome))


@pytest.mark.slow
@pytest.mark.parametrize("twist", [other_vote, other_proposal], ids=["voter", "proposer"])
def test_who_says_two_things_is_convicted_by_what_it_signed(tmp_path: Path, twist: Twist) -> None:
    async def lies(swarm: GroupSwarm, member: Member) -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(contribute_and_apply, swarm, member)
            await all_in(swarm, "abcd")
            tells_two_things(twist, swarm, member, "ab")

    async def body(swarm: GroupSwarm) -> None:
        for name in "abcd":
            swarm.start(name, program=lies if name == "d" else None)
        swarm.checks_state = lambda member: member.name != "d"
        await out_of(swarm, "abc")

    swarm = group_world(tmp_path, body, group_terms(absences=1000))
    assert convicted(swarm) == {"d"}
    reasons = [str(f["reason"]) for who, f in swarm.events("peer.named") if who in "abc"]
    assert all("signed two things" in reason or "convicted" in reason for reason in reasons)


# ---- partitions


@pytest.mark.slow
@pytest.mark.parametrize("sides", [("abcdef", "gh"), ("abcd", "efgh"), ("abcde", "fgh"), ("abc", "def", "gh")])
@pytest.mark.parametrize("open_", [True, False], ids=["open", "trusted"])
def test_of_a_partition_one_side_goes_on_at_most_and_all_do_when_it_is_over(
    tmp_path: Path, sides: tuple[str, ...], open_: bool
) -> None:
    terms = group_terms(open=open_, absences=1000, patience_s=10.0)
    able = [side for side in sides if len(side) >= terms.quorum(8)]
    assert len(able) == {("abcdef", "gh"): 1, ("abcde", "fgh"): int(not open_)}.get(sides, 0)

    async def body(swarm: GroupSwarm) -> None:
        for name in "abcdefgh":
            swarm.start(name)
        await all_in(swarm, "abcdefgh")
        swarm.world.partition(*sides)
        await trio.sleep(8.0)  # what was said before has arrived or not, and may still end a round
        cut = {member.name: member.after for member in swarm.living()}
        await trio.sleep(40.0)
        for member in swarm.living():
            if able and member.name in able[0]:
                assert member.after >= cut[member.name] + 2
            else:
                assert member.after <= cut[member.name] + 1
        swarm.world.heal()
        newest = max(member.after for member in swarm.living())
        await swarm.until(newest + 2)
        assert all(member.group.is_member for member in swarm.living())

    swarm = group_world(tmp_path, body, terms, work_s=4.0)
    assert not swarm.events("peer.named")


# ---- strangers at the door


def stranger(swarm: GroupSwarm, name: str, main: Callable[[SimTransport], object]) -> None:
    """A peer that runs no group, and knows all others."""
    transport = swarm.world.add_node(name)
    for node in swarm.world.nodes():
        transport.learn(node.peer_id, node.addresses)
    swarm.world.start(name, main)  # type: ignore[arg-type]


async def say(transport: SimTransport, peer: str, messages: Sequence[RoundMessage], stay_s: float) -> None:
    stream = await transport.open(peer, ROUND)
    with suppress(PeerError):
        for message in messages:
            await stream.send(*round_codec.encode(message))
        await trio.sleep(stay_s)
    await stream.aclose()


@pytest.mark.parametrize(
    ("ahead", "stay_s"),
    [
        (2**31 - 1, 0.0),
        pytest.param(2**31 - 1, 1000.0, marks=pytest.mark.slow),
        pytest.param(2, 1000.0, marks=pytest.mark.slow),
    ],
)
def test_who_says_to_be_far_ahead_holds_nobody_up(tmp_path: Path, stay_s: float, ahead: int) -> None:
    async def body(swarm: GroupSwarm) -> None:
        for name in "abc":
            swarm.start(name)
        await all_in(swarm, "abc")
        number = swarm.members["a"].after

        async def boasts(transport: SimTransport) -> None:
            async with trio.open_nursery() as nursery:
                for name in "abc":
                    round_ = min(number + ahead, 2**31 - 1)
                    joining = Joining(RUN, "average", round_, bytes([1]) * 32, bytes([2]) * 32, "observer")
                    nursery.start_soon(say, transport, swarm.world.node(name).peer_id, [joining], stay_s)

        stranger(swarm, "x", boasts)
        with trio.fail_after(60.0):
            await swarm.until(number + 8, *"abc")
        assert all(swarm.members[name].fetched_states == 0 for name in "abc")

    group_world(tmp_path, body)
