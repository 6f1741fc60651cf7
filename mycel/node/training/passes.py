"""The passes of a stage as jobs for the compute thread: from coded borders to coded borders.

Legend: B sequences, T target tokens of each, W width at a border, P the stage's parameters.

Ring: algorithms.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from mycel.node.training.ledger import Ledger
from mycel.node.training.stage_port import TrainingStage
from mycel.protocols.borders import BorderCodec, decode_border, encode_border
from mycel.protocols.errors import RemoteProtocolError
from mycel.protocols.tensors import from_wire
from mycel.protocols.wire import WireTensor
from mycel.swarm.training.plan import Work

Wires = tuple[WireTensor, ...]
Fault = Literal["", "over", "input", "gradient", "own"]

# Of one microbatch: a whole step's losses must still fit into what is said of them.
_MAX_LOSS = 1e8


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a pass gave, or whose fault it is that it gave nothing. "over": its version is not the present one."""

    wires: Wires = ()
    fault: Fault = ""
    reason: str = ""


@dataclass(frozen=True, slots=True)
class Passes:
    """The arguments are what the caller holds at that moment: a job runs later, on another thread."""

    stage: TrainingStage
    ledger: Ledger
    codec: BorderCodec

    def forward(self, work: Work, inputs: Wires) -> Callable[[], Outcome]:
        """inputs: tokens and, beyond the first stage, the border of the stage before."""

        def job() -> Outcome:
            if self.ledger.version != work.version:
                return Outcome(fault="over")
            try:
                tokens_BT1, input_BTW = self._inputs(inputs)
            except RemoteProtocolError as error:
                return Outcome(fault="input", reason=error.reason)
            return self._coded(self.stage.forward(work.id, tokens_BT1, input_BTW), "an activation")

        return job

    def backward(self, work: Work, inputs: Wires, grad: Wires | None, *, count: bool) -> Callable[[], Outcome]:
        """`grad` is None on the last stage. With `count` the gradient goes into the ledger, if it is not there."""

        def job() -> Outcome:
            if self.ledger.version != work.version:
                return Outcome(fault="over")
            try:
                tokens_BT1, input_BTW = self._inputs(inputs)
            except RemoteProtocolError as error:
                return Outcome(fault="input", reason=error.reason)
            try:
                grad_BTW = self._border(grad, self.stage.output_shape) if grad is not None else None
            except RemoteProtocolError as error:
                return Outcome(fault="gradient", reason=error.reason)
            backpass = self.stage.backward(work.id, tokens_BT1, input_BTW, grad_BTW)
            # What cannot be sent is not counted either: the walk would count it once more elsewhere.
            outcome = self._coded(backpass.grad_BTW, "a gradient") if backpass.grad_BTW is not None else Outcome()
            if not abs(backpass.loss) <= _MAX_LOSS:  # also for NaN
                return Outcome(fault="own", reason=f"the loss is {backpass.loss:g}")
            if count and not outcome.fault:
                try:
                    self.ledger.count(work.version, work.number, backpass.grad_P, backpass.loss)
                except ValueError as error:
                    return Outcome(fault="own", reason=str(error))
            return outcome

        return job

    def uncount(self, work: Work, inputs: Wires, grad: Wires | None) -> Callable[[], None]:
        """Compute a gradient that is in the ledger again, and take it out."""

        def job() -> None:
            if self.ledger.version != work.version or not self.ledger.counted >> work.number & 1:
                return
            tokens_BT1, input_BTW = self._inputs(inputs)
            grad_BTW = self._border(grad, self.stage.output_shape) if grad is not None else None
            backpass = self.stage.backward(work.id, tokens_BT1, input_BTW, grad_BTW)
            self.ledger.uncount(work.version, work.number, backpass.grad_P)

        return job

    def _inputs(self, inputs: Wires) -> tuple[Tensor, Tensor | None]:
        shape = self.stage.input_shape
        return from_wire(inputs[0]).to(torch.int64), self._border(inputs[1:], shape) if shape is not None else None

    def _border(self, wires: Wires, shape: tuple[int, int, int] | None) -> Tensor:
        assert shape is not None, "the last stage has no output, and gets no gradient of it"
        return decode_border(wires, shape, self.codec)

    def _coded(self, border_BTW: Tensor, what: str) -> Outcome:
        try:
            return Outcome(encode_border(border_BTW, self.codec))
        except ValueError as error:
            return Outcome(fault="own", reason=f"{what} cannot be sent: {error}")
