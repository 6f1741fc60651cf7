"""What peers of a training run say: how far each is, microbatches on their way, sums of gradients, a stage's state.

Four protocols. TRAIN: every peer tells every other its `StageStatus`, one way on a stream of its own. PIPE:
microbatches walk from stage to stage and back, and each stage reports to the trainer. REDUCE (sums of gradients) and
STATE (a stage's parameters): questions and answers, one at a time on a stream.

A version is the number of steps that the parameters have made. A number is a microbatch's place in its step, and its
work id names it for ever. Both stay as they are whoever computes it, and however often.

Ring: pure.
"""

from __future__ import annotations

from typing import Annotated, Literal

from msgspec import Meta, Struct

from mycel.protocols.messages import (
    MAX_FILE_CHUNK_BYTES,
    Count,
    Key,
    Message,
    Multiaddr,
    PeerAddress,
    PeerId,
    Reason,
    Seconds,
)

MAX_STAGES = 64
MAX_MICROBATCHES = 8192
MAX_STATE_CHUNKS = 1 << 18

Bitmap = Annotated[bytes, Meta(max_length=MAX_MICROBATCHES // 8)]
StageIndex = Annotated[int, Meta(ge=0, lt=MAX_STAGES)]
Number = Annotated[int, Meta(ge=0, lt=MAX_MICROBATCHES)]
Element = Annotated[int, Meta(ge=0, le=2**40)]
Digest = Annotated[bytes, Meta(max_length=32)]
StageState = Literal["joining", "observing", "training", "leaving"]

# ---- TRAIN: how far everybody is -------------------------------------------------------------------------------------


class Reduced(Struct, frozen=True, array_like=True):
    """A step's gradient as one peer of a stage has it: the SHA-256 of the float32 sum that it applies.

    `sum_sq` is the sum of its squares (a tied table counts for the first stage alone), `loss` the sum of the losses of
    all target tokens, of the last stage alone.
    """

    version: Count
    digest: Key
    sum_sq: Annotated[float, Meta(ge=0.0, le=1e38)] = 0.0
    loss: Annotated[float, Meta(ge=-1e12, le=1e12)] = 0.0


class StageStatus(Message, frozen=True):
    """How far one peer is; the highest `seq` counts. Said at every change that others wait for, and as a heartbeat.

    `state`: "joining" has no parameters yet; "observing" has them and makes the steps, but nobody counts on it before
    the next one; "training" computes; "leaving" ends after this step. `counted` are the numbers of step `version` whose
    gradients this peer holds. `reduced`: the sums of this step and of the one before, as far as it has them.
    `kept` is the newest version of its stage on its disk, `whole` the newest of which it has all stages (0: the
    weights that the run began with). `queue_s` is how long work that came now would wait, `sequences_per_s` what it
    computes, forward and backward. `trains` says that it has the data and drives microbatches. `sent_bytes` counts
    microbatches and sums sent, in all.
    """

    run: Key
    seq: Annotated[int, Meta(ge=0, le=2**62)]
    stage: StageIndex
    state: StageState
    version: Count
    params: Digest = b""
    counted: Bitmap = b""
    reduced: Annotated[tuple[Reduced, ...], Meta(max_length=2)] = ()
    trains: bool = False
    queue_s: Seconds = 0.0
    sequences_per_s: Annotated[float, Meta(ge=0.0, le=1e9)] = 0.0
    kept: Count = 0
    whole: Count = 0
    sent_bytes: Annotated[int, Meta(ge=0, le=2**60)] = 0
    moving_to: Annotated[int, Meta(ge=-1, lt=MAX_STAGES)] = -1
    addresses: Annotated[tuple[Multiaddr, ...], Meta(max_length=8)] = ()


# ---- PIPE: a microbatch's walk ---------------------------------------------------------------------------------------


class Way(Struct, frozen=True, array_like=True):
    """One stage of a walk: who computes it, and what it has of this microbatch already and need not be sent."""

    peer: PeerAddress
    has_input: bool = False
    has_gradient: bool = False


class Drive(Message, frozen=True):
    """Trainer -> peer, first on a stream: reports of my microbatches go here."""

    run: Key


class Forward(Message, frozen=True):
    """Trainer -> first stage -> ... -> last stage: compute your part and send it on along `ways`.

    Attached: the tokens [B, T + 1] and, beyond the first stage, the border tensors of the stage before; nothing if the
    receiver has both (`ways[stage].has_input`). The same microbatch comes again with a higher `turn` when the trainer
    replaced somebody: who has done its part answers from what it keeps, and a lower turn than one seen is ignored.
    """

    run: Key
    work: Key
    version: Count
    number: Number
    turn: Count
    stage: StageIndex
    trainer: PeerId
    ways: Annotated[tuple[Way, ...], Meta(min_length=1, max_length=MAX_STAGES)]


class Backward(Message, frozen=True):
    """A stage -> the one before it: the gradient of what that one sent (border tensors), or nothing if it has it."""

    run: Key
    work: Key
    turn: Count
    stage: StageIndex


class Passed(Message, frozen=True):
    """Peer -> trainer: stage `stage` of this turn is done, in one direction. Said again on every walk.

    `backward`: its gradient is counted, here or by another peer of the stage.
    """

    work: Key
    turn: Count
    stage: StageIndex
    backward: bool
    queue_us: Count = 0
    compute_us: Count = 0


class WorkFailed(Message, frozen=True):
    """Peer -> trainer: the walk ends here. `peer` is who is to blame: a neighbour, or the sender itself."""

    work: Key
    turn: Count
    stage: StageIndex
    peer: PeerId
    reason: Reason


# ---- REDUCE: sums of gradients ------------------------------------------------------------------


class GetPartial(Message, frozen=True):
    """The sum of the gradients of exactly `counted`, elements [start, start + count), as int64 on the lattice."""

    run: Key
    stage: StageIndex
    version: Count
    counted: Bitmap
    start: Element
    count: Annotated[int, Meta(ge=1, le=1 << 22)]


class GetSum(Message, frozen=True):
    """The sum over all microbatches of step `version`, as float32.

    `tied`: with the share of the other end of a tied table added, which is what a step applies.
    """

    run: Key
    stage: StageIndex
    version: Count
    start: Element
    count: Annotated[int, Meta(ge=1, le=1 << 22)]
    tied: bool


class Slice(Message, frozen=True):
    """The answer to both: one attached tensor [count]. `loss`: of exactly those microbatches, on the last stage.

    `scale`: what the sum was multiplied with, of a step that the answerer has made; 0 of one that it has not.
    """

    start: Element
    loss: Annotated[float, Meta(ge=-1e12, le=1e12)] = 0.0
    scale: Annotated[float, Meta(ge=0.0, le=1.0)] = 0.0


# ---- STATE: what a newcomer fetches ----------------------------------------------------------------------------------


class PinState(Message, frozen=True):
    """Keep the state (parameters and optimizer) after `version` steps for me, and say what it is.

    Answered at once for the present version or one that is still held, for a later one when it is reached.
    """

    run: Key
    stage: StageIndex
    version: Count


class StateOffer(Message, frozen=True):
    """`chunks` are the SHA-256 of each MiB of the state, `params` that of the parameters alone."""

    version: Count
    size_bytes: Annotated[int, Meta(ge=0, le=MAX_STATE_CHUNKS * MAX_FILE_CHUNK_BYTES)]
    params: Key
    chunks: Annotated[bytes, Meta(max_length=MAX_STATE_CHUNKS * 32)]


class GetStateChunk(Message, frozen=True):
    run: Key
    stage: StageIndex
    version: Count
    index: Annotated[int, Meta(ge=0, lt=MAX_STATE_CHUNKS)]


class StateChunk(Message, frozen=True):
    data: Annotated[bytes, Meta(max_length=MAX_FILE_CHUNK_BYTES)]


class NotNow(Message, frozen=True):
    reason: Reason


PipeMessage = Drive | Forward | Backward | Passed | WorkFailed
ReduceMessage = GetPartial | GetSum | Slice | NotNow
StateMessage = PinState | StateOffer | GetStateChunk | StateChunk | NotNow
TrainingMessage = StageStatus | PipeMessage | ReduceMessage | StateMessage
