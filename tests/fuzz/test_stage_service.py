"""Any frames in any order to the stages of a run: nothing crashes, nothing is counted twice, what is kept is bounded.

Strangers who know all names and all works talk to every stage: as trainers, as neighbours before and behind, with what
makes sense and what does not. Meanwhile peers make steps, take gradients back and hear how far the others are. When the
strangers have fallen silent an honest trainer must get every microbatch through.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from random import Random

import msgspec
import pytest
import torch
import trio

from mycel.node.training.inlets import MAX_STREAMS_PER_PEER
from mycel.node.training.ledger import Ledger
from mycel.node.training.pipes import MAX_PIPES
from mycel.node.training.stage_service import MAX_HELD
from mycel.protocols import ids
from mycel.protocols.codec import pipe_codec
from mycel.protocols.errors import PeerError
from mycel.protocols.messages import PeerAddress
from mycel.protocols.ports import Stream
from mycel.protocols.tensors import to_wire
from mycel.protocols.training import Backward, Drive, Forward, Passed, PipeMessage, Way, WorkFailed
from mycel.protocols.wire import WireTensor
from mycel.swarm.training import numbers
from mycel.swarm.training.lattice import GradientSum
from tests.fuzz.mutations import mutated
from tests.node.pipe_rig import Peer, Rig
from tests.sim.toy_stage import VOCAB, toy_plan
from tests.sim.world import World, run_world

N_WORLDS = 3
N_MORE_WORLDS = 12
TALK_S = 5.0
STRANGERS = ("mallory", "trudy", "eve")
STAGES = ("a", "b", "c")
ROOM = 4  # cells of each peer while strangers talk, of six microbatches a step


@dataclass
class Talk:
    """What strangers may say."""

    rig: Rig
    dice: Random

    def version(self) -> int:
        """The present one, as a rule."""
        now = next(iter(self.rig.peers.values())).ledger.version
        return max(0, now + self.dice.choice((0, 0, 0, 0, 1, 1, -1, 2, 7)))

    def names(self, target: str) -> list[str]:
        """A way through the target, often over strangers."""
        stage = STAGES.index(target[0])
        strangers = self.dice.sample(STRANGERS, 3)
        names = [
            self.dice.choice((strangers[at], f"{STAGES[at]}0", f"{STAGES[at]}1")) if at != stage else target
            for at in range(3)
        ]
        return names if self.dice.random() < 0.95 else self.dice.choices((*STRANGERS, *self.rig.peers), k=3)

    def forward(self, target: str, stranger: str, stage: int) -> Forward:
        dice, rig, version = self.dice, self.rig, self.version()
        number = dice.randrange(rig.plan.n_microbatches)
        names = self.names(target)
        if stage > 0 and dice.random() < 0.9:
            names[stage - 1] = stranger
        trainer = stranger if stage == 0 else dice.choice((stranger, "trainer", "a0"))
        message = rig.message(number, dice.choice((0, 1, 2, 3, 9, 2**31 - 1)), " ".join(names), version=version)
        ways = tuple(
            Way(
                way.peer if dice.random() < 0.98 else PeerAddress(f"nobody {dice.randrange(500)}", ("/memory/999",)),
                dice.random() < 0.2,
                dice.random() < 0.2,
            )
            for way in message.ways
        )
        return msgspec.structs.replace(message, ways=ways, stage=stage, trainer=rig.peer_id(trainer))

    def flawed(self, message: Forward) -> Forward:
        dice = self.dice
        flaws: tuple[dict[str, object], ...] = (
            {"run": bytes(32)},
            {"work": dice.randbytes(32)},
            {"number": dice.choice((0, 5, 6, 8191))},
            {"version": dice.choice((0, 1, 2**31 - 1))},
            {"stage": dice.choice((0, 1, 2, 3, 63))},
            {"trainer": "nobody"},
            {"ways": message.ways[:2]},
            {"ways": message.ways * 2},
            {"ways": message.ways[::-1]},
        )
        return msgspec.structs.replace(message, **dice.choice(flaws))

    def tokens(self) -> WireTensor:
        dice = self.dice
        if dice.random() < 0.9:
            return to_wire(torch.full((2, 4), dice.randrange(VOCAB), dtype=torch.int32))
        shape, dtype = dice.choice(((2, 4), (2, 5), (8,), (0, 4))), dice.choice((torch.int32, torch.int64))
        return to_wire(torch.full(shape, dice.choice((-1, 3, VOCAB, 2**31 - 1)), dtype=dtype))

    def border(self) -> WireTensor:
        dice = self.dice
        value = dice.choice((0.0, 0.5, -3.0, 1e9, 3e38, float("nan"), float("inf")))
        if dice.random() < 0.9:
            return to_wire(torch.full((2, 3, 4), value if dice.random() < 0.3 else 0.25))
        shape = dice.choice(((2, 3, 4), (2, 3, 5), (24,), (2, 0, 4), (64, 64, 64)))
        return to_wire(torch.ones(shape, dtype=dice.choice((torch.float32, torch.int8, torch.bfloat16))))

    def said(self, target: str, stranger: str, *, drives: bool) -> bytes:
        dice, rig = self.dice, self.rig
        stage = STAGES.index(target[0]) if dice.random() < 0.98 else dice.randrange(4)
        message: PipeMessage
        wires: list[WireTensor] = []
        kind = dice.random()
        if kind < (0.97 if drives else 0.5):
            message = self.forward(target, stranger, stage)
            if dice.random() < 0.1:
                message = self.flawed(message)
            promised = message.ways[min(stage, len(message.ways) - 1)].has_input
            if promised == (dice.random() < 0.03):
                wires = [self.tokens(), *([self.border()] if stage else [])]
        elif kind < 0.97:
            work = rig.plan.work(self.version(), dice.randrange(rig.plan.n_microbatches))
            message = Backward(rig.plan.run, work.id, dice.choice((0, 1, 2, 3, 9, 2**31 - 1)), stage)
            wires = [self.border()] * dice.choice((0, 1, 1, 1, 1, 2))
        else:
            message = dice.choice(
                (
                    Drive(dice.choice((rig.plan.run, bytes(32)))),
                    Passed(bytes(32), 1, stage, True),
                    WorkFailed(bytes(32), 1, stage, rig.peer_id(target), "so"),
                )
            )
        frame = b"".join(pipe_codec.encode(message, wires))
        return mutated(frame, [frame], dice) or b"\x00" if dice.random() < 0.03 else frame

    async def converse(self, stranger: str) -> None:
        """One stream, from its opening to whichever end."""
        dice, name = self.dice, self.dice.choice(tuple(self.rig.peers))
        node, target = self.rig.world.node(stranger), self.rig.world.node(name)
        node.learn(target.peer_id, target.addresses)
        drives = name.startswith("a") == (dice.random() < 0.9)
        stream: Stream | None = None
        try:
            stream = await node.open(target.peer_id, ids.PIPE)
            if drives:
                await stream.send(*pipe_codec.encode(Drive(self.rig.plan.run)))
            for _ in range(dice.choice((0, 1, 3, 10, 30))):
                await trio.sleep(dice.choice((0.0, 0.0, 0.01, 0.05)))
                await stream.send(self.said(name, stranger, drives=drives))
            with trio.move_on_after(dice.choice((0.0, 0.1, 1.0))):
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
            await trio.sleep(self.dice.random() * 0.02)

    async def listen(self, stream: Stream) -> None:
        """As a neighbour: take it in, or hang up."""
        if self.dice.random() < 0.3:
            return
        try:
            while await stream.receive() is not None:
                if self.dice.random() < 0.1:
                    await stream.send(b"nonsense")
        except PeerError:
            return


class StrictLedger(Ledger):
    """Notes what goes in and out again, and demands that the sum is that of what is counted."""

    def __init__(self, n_elements: int) -> None:
        super().__init__(n_elements)
        self.inside: dict[int, torch.Tensor] = {}
        self.n_taken_back = 0

    def count(self, version: int, number: int, grad_P: torch.Tensor, loss: float) -> bool:
        done = super().count(version, number, grad_P, loss)
        assert done == (number not in self.inside and version == self.version)
        if done:
            self.inside[number] = grad_P.clone()
        return done

    def uncount(self, version: int, number: int, grad_P: torch.Tensor) -> bool:
        done = super().uncount(version, number, grad_P)
        if done:
            assert torch.equal(self.inside.pop(number), grad_P), "another gradient than went in"
            self.n_taken_back += 1
        return done

    def advance(self, version: int) -> None:
        super().advance(version)
        self.inside.clear()

    def check(self) -> None:
        assert self.counted == numbers.of(self.inside)
        wanted = GradientSum(self.n_elements)
        for grad_P in self.inside.values():
            wanted.add(grad_P)
        assert torch.equal(wanted.sum_P, self.sum.sum_P)


def check(peer: Peer) -> None:
    assert isinstance(peer.ledger, StrictLedger)
    peer.ledger.check()
    service = peer.service
    cells = service._cells._cells.values()
    assert len(cells) <= service._cells.max_cells
    for cell in cells:
        frames: dict[int, int] = {}
        for wire in (*(cell.inputs or ()), *(cell.output or ()), *(cell.output_grad or ()), *cell.input_grad):
            frames[id(wire.data.obj)] = len(memoryview(wire.data.obj).cast("B"))
        # A cell that sends its output holds it once; what it was brought holds the whole frame.
        assert sum(frames.values()) <= service.cell_bytes
    assert len(service._held) <= MAX_HELD
    assert len(service._inlets._inlets) <= MAX_STREAMS_PER_PEER * (len(STRANGERS) + 7)
    assert len(service._pipes._pipes) <= MAX_PIPES
    assert sum(service._agenda.waiting()) <= 2 * service._cells.max_cells
    assert len(peer.stage.kept) <= service._cells.max_cells + len(service._forgotten)


async def steps(rig: Rig, dice: Random) -> None:
    """What goes on beside the microbatches; all bounds hold at all times."""
    while trio.current_time() < TALK_S:
        await trio.sleep(dice.random() * 0.1)
        what = dice.random()
        if what < 0.05 and max(peer.ledger.version for peer in rig.peers.values()) < rig.plan.n_steps - 3:
            rig.advance(*dice.sample(sorted(rig.peers), 6))
        elif what < 0.3:
            rig.share()
        elif what < 0.6:
            peer = rig.peers[dice.choice(sorted(rig.peers))]
            await peer.service.uncount(dice.getrandbits(6))
        for peer in rig.peers.values():
            check(peer)


async def scenario(world: World) -> None:
    rig = Rig(world, plan=toy_plan(n_steps=1000), new_ledger=StrictLedger)
    dice = Random(f"talk {world.seed}")
    for stage, letter in enumerate(STAGES):
        for index in range(2):
            peer = rig.add(f"{letter}{index}", stage)
            peer.service._cells.max_cells = ROOM
    talk = Talk(rig, dice)
    for stranger in STRANGERS:
        world.add_node(stranger).serve(ids.PIPE, talk.listen)
    await rig.drive_all()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(steps, rig, dice)
        for stranger in STRANGERS:
            for _ in range(3):
                nursery.start_soon(talk.talk, stranger)
    computed = sum(sum(peer.stage.calls.values()) for peer in rig.peers.values())
    assert computed > 20, "the strangers did not get far"
    await trio.sleep(70)
    await heal(rig)
    for peer in rig.peers.values():
        check(peer)


async def heal(rig: Rig) -> None:
    """Nothing that strangers left, kept or held, outlives its step: an honest trainer gets every microbatch through."""
    version = max(peer.ledger.version for peer in rig.peers.values()) + 2
    for peer in rig.peers.values():
        peer.service._cells.max_cells = 100
        peer.state._version = version
        peer.ledger.advance(version)
        peer.service.advance(version)
    await rig.hang_up()
    await trio.sleep(1)
    await rig.drive_all()
    for number in range(rig.plan.n_microbatches):
        await rig.forward(rig.message(number, 1, "a0 b0 c0", version=version))
    for number in range(rig.plan.n_microbatches):
        await rig.walked(number, 1, "a0 b0 c0", version)
    assert all(rig.peers[name].ledger.counted == rig.plan.everything for name in ("a0", "b0", "c0"))


@pytest.mark.parametrize("number", range(N_WORLDS))
def test_whatever_is_said_in_whatever_order(number: int) -> None:
    """`run_world` raises what left a handler and was no PeerError, and what ended a service."""
    talk(number)


@pytest.mark.slow
@pytest.mark.parametrize("number", range(N_WORLDS, N_WORLDS + N_MORE_WORLDS))
def test_more_of_it(number: int) -> None:
    talk(number)


def talk(number: int) -> None:
    seed = int(os.environ.get("FUZZ_SEED") or Random().randrange(2**32)) + number
    try:
        run_world(seed, scenario, limit_s=1000.0)
    except BaseException as error:
        error.add_note(f"FUZZ_SEED={seed}")
        raise
