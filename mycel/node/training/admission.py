"""Who may say what to a stage, and how large it may be: whatever gets past here is worth a cell.

A border's own tensors are checked when they are decoded, on the compute thread.

Ring: algorithms.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from mycel.node.training.cells import Wires
from mycel.node.training.stage_port import TrainingStage
from mycel.protocols.borders import BorderCodec, border_bytes
from mycel.protocols.errors import RemoteProtocolError
from mycel.protocols.tensors import from_wire
from mycel.protocols.training import Backward, Forward
from mycel.protocols.wire import WireTensor
from mycel.swarm.training.plan import RunPlan

# A frame beyond its tensors: the fields, and each stage's peer with its addresses.
_MESSAGE_BYTES = 4096
_WAY_BYTES = 2304


@dataclass(frozen=True, slots=True)
class Admission:
    """For the stage that `me` hosts; `vocab_size` bounds the tokens, the others are bytes of the borders' tensors."""

    me: str
    plan: RunPlan
    stage: int
    vocab_size: int
    input_bytes: int
    output_bytes: int

    @property
    def cell_bytes(self) -> int:
        """What is kept of one microbatch at most: what came, each way, in whole frames, and what was made of it."""
        own_bytes = self.input_bytes + self.output_bytes
        return self._token_bytes + self.input_bytes + self.output_bytes + own_bytes + 2 * self._frame_bytes

    @property
    def _token_bytes(self) -> int:
        return self.plan.n_sequences * (self.plan.n_tokens + 1) * 4

    @property
    def _frame_bytes(self) -> int:
        return _MESSAGE_BYTES + _WAY_BYTES * self.plan.n_stages

    def check_attached(self, message: Forward, wires: Wires, sender: str, n_bytes: int) -> None:
        """What came with a microbatch for this stage, in a frame of `n_bytes`. Raises RemoteProtocolError."""
        promised = message.ways[self.stage].has_input
        expected = 0 if promised else self._token_bytes + self.input_bytes
        if n_bytes > expected + self._frame_bytes:
            raise RemoteProtocolError(f"a microbatch in {n_bytes} bytes", sender)
        if promised != (not wires) or (wires and (len(wires) > 1) != (self.stage > 0)):
            raise RemoteProtocolError(f"a microbatch with {len(wires)} tensors at stage {self.stage}", sender)
        if wires:
            self._check_tokens(wires[0], sender)

    def _check_tokens(self, wire: WireTensor, sender: str) -> None:
        shape = (self.plan.n_sequences, self.plan.n_tokens + 1)
        if (wire.header.dtype, wire.header.shape) != ("int32", shape):
            raise RemoteProtocolError(f"tokens of {list(wire.header.shape)} {wire.header.dtype}", sender)
        lowest, highest = torch.aminmax(from_wire(wire))
        if int(lowest) < 0 or int(highest) >= self.vocab_size:
            raise RemoteProtocolError(f"tokens {int(lowest)} to {int(highest)} of {self.vocab_size}", sender)

    def check_backward(self, message: Backward, sender: str, n_bytes: int) -> None:
        """Raises RemoteProtocolError."""
        if message.run != self.plan.run or n_bytes > self.output_bytes + _MESSAGE_BYTES:
            raise RemoteProtocolError(f"a gradient of another run, or in {n_bytes} bytes", sender)

    def check_forward(self, message: Forward, sender: str, *, drives: bool) -> None:
        """Whether `sender` may say this here. `drives`: it came from a trainer. Raises RemoteProtocolError."""
        plan, ways, stage = self.plan, message.ways, message.stage
        peers = [way.peer.peer for way in ways]
        if message.run != plan.run or message.number >= plan.n_microbatches or message.version >= plan.n_steps:
            raise RemoteProtocolError("a microbatch of another run", sender)
        if message.work != plan.work(message.version, message.number).id:
            raise RemoteProtocolError("a microbatch under a wrong id", sender)
        if len(peers) != plan.n_stages or len(set(peers)) != len(peers):
            raise RemoteProtocolError(f"a way of {len(set(peers))} peers for {plan.n_stages} stages", sender)
        if stage >= plan.n_stages or peers[stage] != self.me:
            raise RemoteProtocolError(f"a microbatch whose way does not come here at stage {stage}", sender)
        if drives != (stage == 0) or sender != (message.trainer if stage == 0 else peers[stage - 1]):
            raise RemoteProtocolError(f"a microbatch for stage {stage} that is not the sender's to send", sender)


def admission(me: str, plan: RunPlan, stage: TrainingStage, codec: BorderCodec, vocab_size: int) -> Admission:
    """That of a stage as it is."""
    input_bytes, output_bytes = (
        0 if shape is None else border_bytes(shape, codec) for shape in (stage.input_shape, stage.output_shape)
    )
    return Admission(me, plan, stage.index, vocab_size, input_bytes, output_bytes)
