"""Hostile peers on the streams of a group, over real connections: its rounds go on, in little memory."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack, suppress
from dataclasses import dataclass

import msgspec
import psutil
import pytest
import torch
import trio

from mycel.node.averaging import AverageOptions, Averager
from mycel.node.libp2p_transport import Libp2pTransport, open_transport
from mycel.node.libp2p_transport.stream import FrameStream
from mycel.protocols import ids
from mycel.protocols import rounds as r
from mycel.protocols.codec import blob_codec, round_codec
from mycel.protocols.errors import PeerError
from mycel.security.identity import Identity
from mycel.swarm.rounds.statements import UNSIGNED, sign
from tests.loopback.hostile import FRAME_OF_4_GB, MIB, ended, frame_of

pytestmark = [pytest.mark.loopback, pytest.mark.slow]

HERE = ("/ip4/127.0.0.1/tcp/0",)
ROOM_BYTES = 128 * MIB
LIMIT_S = 60.0
N_ELEMENTS = 1 << 16
GARBAGE = (b"\x00", b"\xff" * 64, b"\xff\xff\xff\x7f" + bytes(6), b"\x40\x00\x00\x00" + b"\x91" * 64)


@dataclass
class Siege:
    """A stranger, and three honest peers who average all the while. `events` are theirs."""

    averagers: list[Averager]
    transport: Libp2pTransport
    identity: Identity
    events: list[tuple[str, dict[str, object]]]
    rounds: int = 0

    @property
    def victim(self) -> str:
        return self.averagers[0]._network.identity.peer_id

    @property
    def place(self) -> tuple[bytes, str]:
        return self.averagers[0]._group.place.key

    @property
    def number(self) -> int:
        return self.averagers[0]._group.round

    def joining(self, wants: str = "observer", number: int | None = None) -> r.Joining:
        outcome = self.averagers[0]._group._driver.machine.outcome
        state = self.averagers[0]._group.state
        return r.Joining(*self.place, number or self.number, r.outcome_digest(outcome), state, wants)  # type: ignore[arg-type]

    async def until(self, is_so: Callable[[], bool]) -> None:
        """Wait for something that the victim's group rings for."""
        bell = self.averagers[0]._group.bell
        while not is_so():
            await bell.after(bell.count)

    async def open(self, protocol: str) -> FrameStream:
        return await self.transport.open(self.victim, protocol)

    async def say(self, *messages: r.RoundMessage) -> FrameStream:
        """On a stream of the group, after a word of greeting."""
        stream = await self.open(ids.ROUND)
        with suppress(PeerError):
            for message in (self.joining(), *messages):
                await stream.send(frame_of(round_codec, message))
        return stream

    async def refused(self, *messages: r.RoundMessage) -> None:
        """The stream with these is lost."""
        assert await ended(await self.say(*messages)) == []


def besiege(attack: Callable[[Siege], Awaitable[None]]) -> Siege:
    """Attack one of three peers: all of them average as before meanwhile, and three times more when it is over."""
    watched = psutil.Process()
    sieges: list[Siege] = []

    async def main() -> None:
        like = {"vector": torch.zeros(N_ELEMENTS)}
        events: list[tuple[str, dict[str, object]]] = []
        options = AverageOptions(min_members=3, open=True, aggregators=3, patience_s=5.0, longest_grace_s=1.0)
        identity = Identity.generate()

        def note(what: str, /, **fields: object) -> None:
            events.append((what, fields))

        async with AsyncExitStack() as stack:
            first = await stack.enter_async_context(Averager.create(like, options=options, listen=HERE, event=note))
            averagers = [first]
            for _ in range(2):
                joining = Averager.join(first.invite, like, listen=HERE)
                averagers += [await stack.enter_async_context(joining)]
            for averager in averagers:
                await averager.joined(3)
            transport = await stack.enter_async_context(open_transport(identity, listen=HERE))
            transport.learn(first._network.identity.peer_id, first._network.transport.addresses)
            siege = Siege(averagers, transport, identity, events)
            sieges.append(siege)
            over = False

            async def average(number: int) -> None:
                """Each brings its number: a mean of them is between one and three."""
                after = 0
                while not over or after < 3:
                    done = await averagers[number].average({"vector": torch.full((N_ELEMENTS,), float(number + 1))})
                    assert 1.0 <= done.tensors["vector"].min() <= done.tensors["vector"].max() <= 3.0
                    siege.rounds += number == 0
                    after += over

            async with trio.open_nursery() as nursery:
                for number in range(3):
                    nursery.start_soon(average, number)
                await siege.until(lambda: siege.rounds >= 2)
                before_bytes = watched.memory_info().rss
                await attack(siege)
                grown_bytes = watched.memory_info().rss - before_bytes
                over = True
            assert grown_bytes < ROOM_BYTES, f"grew by {grown_bytes / MIB:.0f} MiB"

    async def bounded() -> None:
        with trio.fail_after(LIMIT_S):
            await main()

    trio.run(bounded)
    [siege] = sieges
    assert [fields for what, fields in siege.events if what == "handler.crashed"] == []
    return siege


def test_garbage_half_frames_and_streams_without_a_word() -> None:
    async def attack(siege: Siege) -> None:
        silent = [await siege.open(ids.ROUND) for _ in range(40)]
        for protocol in (ids.ROUND, ids.BLOBS):
            for frame in GARBAGE:
                stream = await siege.open(protocol)
                with suppress(PeerError):
                    await stream.send(frame)
                assert await ended(stream) == []
            for data in (FRAME_OF_4_GB + b"x", b"\x00\x10\x00\x00half a frame"):
                stream = await siege.open(protocol)
                stream._mux.write([data], len(data))
                silent.append(stream)
        await trio.sleep(1)
        for stream in silent:
            stream.abandon()

    besiege(attack)


def test_what_no_group_has_costs_the_stream() -> None:
    async def attack(siege: Siege) -> None:
        place, me = (*siege.place, siege.number), siege.transport.peer_id
        other = (bytes(32), siege.place[1], siege.number)
        await siege.refused(sign(siege.identity, r.Request(*other, me, "member", UNSIGNED)))
        rest = [fields for what, fields in siege.events if what == "peer.broke_rules"]
        assert [fields["peer"] for fields in rest] == [me]
        # From now on nothing is heard of this peer for a minute, whatever it says.
        await siege.refused(sign(siege.identity, r.Request(*place, me, "member", UNSIGNED)))
        await trio.sleep(1)
        assert siege.averagers[0].members == 3

    besiege(attack)


@pytest.mark.parametrize("what", ["bodies", "forgery", "certificate"])
def test_a_member_that_breaks_the_rules_is_a_member_no_more(what: str) -> None:
    """It is let in as anybody is; then it offers a thousand gigabytes, or speaks for others."""

    async def attack(siege: Siege) -> None:
        me, group = siege.transport.peer_id, siege.averagers[0]._group
        number = siege.number
        request = sign(siege.identity, r.Request(*siege.place, number, me, "member", UNSIGNED))
        stream = await siege.say(siege.joining("member"), request)
        while siege.averagers[0].members < 4:
            if siege.number != number:
                number = siege.number
                request = sign(siege.identity, r.Request(*siege.place, number, me, "member", UNSIGNED))
                await stream.send(frame_of(round_codec, request))
            await group.bell.after(group.bell.count)
        outcome = group._driver.machine.outcome
        place = (*siege.place, outcome.round + 1)
        last = r.outcome_digest(outcome)
        if what == "bodies":
            bodies = tuple(bytes([n]) * 32 for n in range(256))
            wrong: r.RoundMessage = sign(
                siege.identity,
                r.Offer(*place, me, last, group.state, 1, 0, bodies, (r.MAX_BODY_BYTES,) * 256, b"", UNSIGNED),
            )
        elif what == "forgery":
            wrong = r.Vote(*place, 0, "precommit", siege.victim, bytes(32), UNSIGNED)
            wrong = msgspec.structs.replace(wrong, peer=siege.averagers[1]._network.identity.peer_id)
        else:
            signers = outcome.members[:3]
            forged = msgspec.structs.replace(outcome, round=outcome.round + 1, last=last, members=(me,), missed=(0,))
            wrong = r.Certificate(forged, 0, signers, (bytes(64),) * 3)
        with suppress(PeerError):
            await stream.send(frame_of(round_codec, wrong))
        assert await ended(stream) == []
        with trio.fail_after(30):
            await siege.until(lambda: siege.averagers[0].members == 3)

    siege = besiege(attack)
    assert any(what == "peer.broke_rules" for what, _ in siege.events)


def test_floods_and_questions_whose_answers_nobody_reads() -> None:
    async def attack(siege: Siege) -> None:
        questions = [
            frame_of(blob_codec, r.GetCertificates(*siege.place, 1)),
            frame_of(blob_codec, r.GetOffers(*siege.place, (bytes(32),) * 256)),
            frame_of(blob_codec, r.GetBlob(*siege.place, bytes(32), 0, 1)),
            *(
                frame_of(blob_codec, r.GetBlob(*siege.place, digest, 0, 1 << 24))
                for digest in siege.averagers[0]._group._driver.machine.outcome.results
            ),
        ]
        before = siege.rounds

        async def ask() -> None:
            with suppress(PeerError):
                stream = await siege.open(ids.BLOBS)
                while True:
                    for question in questions:
                        await stream.send(question)

        async def speak(number: int) -> None:
            with suppress(PeerError):
                stream = await siege.say()
                while True:
                    number += 1
                    await stream.send(frame_of(round_codec, siege.joining(number=number)))
                    await stream.send(
                        frame_of(round_codec, r.Held(siege.number, 0, (number.to_bytes(32, "big"),) * 256))
                    )

        with trio.move_on_after(6):
            async with trio.open_nursery() as nursery:
                for _ in range(8):
                    nursery.start_soon(ask)
                for _ in range(4):
                    nursery.start_soon(speak, siege.number + 100)
        assert siege.rounds > before  # the attacker's own work is done by the same process

    besiege(attack)
