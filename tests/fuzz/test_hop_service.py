"""Any messages in any order on all protocols of a hop: only PeerErrors leave its handlers, no memory stays behind.

Several strangers talk to one hop of a simulated swarm: as clients, as its neighbours in the ring, as leavers and takers
of states; legal messages with fields that make sense, and others. Somebody else generates over it all the while.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from random import Random

import msgspec
import pytest
import torch
import trio

from mycel.protocols import ids
from mycel.protocols import messages as m
from mycel.protocols.codec import Codec, handover_codec, ring_codec, session_codec
from mycel.protocols.errors import PeerError
from mycel.protocols.ports import Stream
from mycel.protocols.tensors import to_wire
from mycel.protocols.wire import WireTensor
from tests.fuzz.mutations import mutated
from tests.sim.toy import HIDDEN
from tests.sim.toy_swarm import GREEDY, N_BLOCKS, SWARM, ToySwarm, expected_tokens
from tests.sim.world import World, run_world

N_WORLDS = 6
TALK_S = 12.0
STRANGERS = ("mallory", "trudy", "eve")
TARGETS = ("first", "last", "whole")
SPANS = {"first": (0, 4), "last": (4, 8), "whole": (0, 8)}
CODECS: dict[str, Codec] = {ids.SESSION: session_codec, ids.RING: ring_codec, ids.HANDOVER: handover_codec}
PROMPT = tuple(range(9))


@dataclass
class Talk:
    """What strangers may say. They know all names, and every session that was ever opened."""

    swarm: ToySwarm
    dice: Random
    sessions: list[bytes]

    def address(self, among: tuple[str, ...] = (*STRANGERS, *TARGETS)) -> m.PeerAddress:
        node = self.swarm.world.node(self.dice.choice(among))
        return m.PeerAddress(node.peer_id, node.addresses)

    def session(self) -> bytes:
        """One of the newest, as a rule."""
        return self.dice.choice(self.sessions[-4:] if self.dice.random() < 0.8 else self.sessions)

    def count(self) -> int:
        return self.dice.choice((0, 0, 1, 2, 3, 5, 8, 20, 64, 2**31 - 1))

    def tokens(self) -> tuple[int, ...]:
        return tuple(self.dice.choices((0, 1, 50, 96, 97, 2**31 - 1), k=self.dice.choice((0, 3, 9))))

    def opening(self, start: int, end: int) -> m.OpenHop:
        """One that may be admitted, with a flaw now and then."""
        dice = self.dice
        session = dice.randbytes(16) if dice.random() < 0.8 else self.session()
        self.sessions.append(session)
        among = STRANGERS if dice.random() < 0.8 else (*STRANGERS, *TARGETS)
        history = tuple(range(dice.choice((1, 3, 9))))
        opening = m.OpenHop(
            session,
            SWARM,
            start,
            end,
            64,
            self.address(among),
            self.address(among),
            history if start == 0 else (),
            m.Generation(m.SamplingParams(), history, dice.choice((12, 64))) if end == N_BLOCKS else None,
            dice.randint(0, 1),
            dice.randint(0, 1),
            self.address(STRANGERS).peer if dice.random() < 0.4 else "",
        )
        flaws: tuple[dict[str, object], ...] = (
            {"swarm": bytes(32)},
            {"start": 1, "end": 3},
            {"start": 5, "end": 5},
            {"end": 9},
            {"max_tokens": dice.choice((1, 2**24))},
            {"prompt": self.tokens()},
            {"generation": m.Generation(m.SamplingParams(), self.tokens(), dice.choice((0, 5, 2**31 - 1)))},
        )
        return msgspec.structs.replace(opening, **dice.choice(flaws)) if dice.random() < 0.2 else opening

    def tensors(self) -> list[WireTensor]:
        dice = self.dice
        kind = dice.choice((torch.float32, torch.float32, torch.float32, torch.float16, torch.int64))
        shape = dice.choice(
            ((1, HIDDEN), (3, HIDDEN), (8, HIDDEN), (1, HIDDEN + 1), (HIDDEN,), (0, HIDDEN), (2, 2, HIDDEN))
        )
        tensor = torch.ones(shape, dtype=kind)
        if kind.is_floating_point and dice.random() < 0.1:
            tensor = tensor * torch.nan
        return [to_wire(tensor)] * dice.choice((1, 1, 1, 2))

    def said(self, protocol: str) -> bytes:
        """Something that this protocol has a word for, as bytes."""
        dice, tensors = self.dice, list[WireTensor]()
        choices: dict[str, list[Callable[[], m.Message]]] = {
            ids.SESSION: [
                lambda: self.opening(0, 4),
                lambda: m.Relink(
                    self.address(STRANGERS), self.address(STRANGERS), dice.randint(0, 4), dice.randint(0, 4)
                ),
                lambda: m.Relink(self.address(), self.address(), 0, 0),
                lambda: m.Relink(
                    self.address(), self.address(), 1, dice.randint(0, 4), self.address(), dice.randint(0, 4)
                ),
                lambda: m.AskProgress(self.count()),
                m.AskProgress,
                lambda: m.HandOver(self.address()),
                lambda: m.HandOver(self.address(STRANGERS)),
                lambda: m.Sampled(self.count(), 1, ()),
                lambda: m.HandedOver(self.count(), "so"),
            ],
            ids.RING: [
                lambda: m.Attach(self.session(), dice.randint(0, 4)),
                lambda: m.Attached(self.count()),
                lambda: m.Step(self.count(), ()),
                lambda: m.Step(dice.randint(0, 9), ()),
                lambda: m.NextToken(self.count(), dice.choice((0, 96, 97))),
            ],
            ids.HANDOVER: [
                lambda: m.GiveState(
                    self.session(), dice.choice((0, 1, 3, 9, 64)), dice.choice((0, 64, 192, 640, 2**50))
                ),
                lambda: m.StatePart(dice.choice((-1, 0, 3, 4, 7, 4095)), dice.choice((0, 1, 3, 8, 2**31 - 1))),
                lambda: m.StateTaken(2**50, self.count()),
                lambda: m.StateRefused("no"),
            ],
        }
        message = dice.choice(choices[protocol])()
        if isinstance(message, m.Step | m.StatePart) or dice.random() < 0.02:
            tensors = self.tensors()
        frame = b"".join(CODECS[protocol].encode(message, tensors))
        return mutated(frame, [frame], dice) or b"\x00" if dice.random() < 0.1 else frame

    def first(self, protocol: str, target: str) -> bytes:
        """What a stream should begin with."""
        dice = self.dice
        message: m.Message = {
            ids.SESSION: lambda: self.opening(*SPANS[target]),
            ids.RING: lambda: m.Attach(self.session(), dice.randint(0, 2)),
            ids.HANDOVER: lambda: m.GiveState(self.session(), dice.choice((0, 3, 9)), dice.choice((0, 192, 640))),
        }[protocol]()
        return b"".join(CODECS[protocol].encode(message))

    async def converse(self, stranger: str) -> None:
        """One stream, from its opening to whichever end."""
        dice, protocol, name = self.dice, self.dice.choice(tuple(CODECS)), self.dice.choice(TARGETS)
        node, target = self.swarm.world.node(stranger), self.swarm.world.node(name)
        node.learn(target.peer_id, target.addresses)
        stream: Stream | None = None
        try:
            stream = await node.open(target.peer_id, protocol)
            if dice.random() < 0.9:
                await stream.send(self.first(protocol, name))
            for _ in range(dice.choice((0, 1, 3, 10, 30))):
                await trio.sleep(dice.choice((0.0, 0.0, 0.02, 0.1)))
                await stream.send(self.said(protocol))
            with trio.move_on_after(dice.choice((0.0, 0.1, 2.0))):
                while await stream.receive() is not None:
                    pass
        except PeerError:
            pass  # whatever we said, it was too much
        finally:
            if stream is not None:
                await (stream.aclose() if dice.random() < 0.5 else stream.reset())

    async def talk(self, stranger: str) -> None:
        while trio.current_time() < TALK_S:
            await self.converse(stranger)
            await trio.sleep(self.dice.random() * 0.05)

    async def listen(self, stream: Stream) -> None:
        """As a next hop or a taker: answer nonsense, or nothing, or hang up."""
        if self.dice.random() < 0.3:
            return
        try:
            while await stream.receive() is not None:
                if self.dice.random() < 0.5:
                    await stream.send(self.said(self.dice.choice((ids.RING, ids.HANDOVER))))
        except PeerError:
            return


async def scenario(world: World) -> None:
    swarm, dice = ToySwarm(world), Random(f"talk {world.seed}")
    for name, (start, end) in SPANS.items():
        swarm.serve(name, start, end, block_time_s=0.002, queue_s=9.0 if name == "whole" else 0.0)
    swarm.add_client("client")
    session, heard = swarm.session(PROMPT, 60)
    talk = Talk(swarm, dice, [session.session_id])
    for stranger in STRANGERS:
        node = world.add_node(stranger)
        for protocol in CODECS:
            node.serve(protocol, talk.listen)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(heard.collect)
        for stranger in STRANGERS:
            for _ in range(3):
                nursery.start_soon(talk.talk, stranger)
        await session.run()
    assert heard.tokens == expected_tokens(PROMPT, 60, GREEDY)
    assert heard.lost == []
    swarm.check_budgets()
    await trio.sleep(120.0)
    assert swarm.left_over() == []


@pytest.mark.parametrize("number", range(N_WORLDS))
def test_whatever_is_said_in_whatever_order(number: int) -> None:
    """`run_world` raises what left a handler and was no PeerError."""
    seed = int(os.environ.get("FUZZ_SEED") or Random().randrange(2**32)) + number
    try:
        run_world(seed, scenario, limit_s=1000.0)
    except BaseException as error:
        error.add_note(f"FUZZ_SEED={seed}")
        raise
