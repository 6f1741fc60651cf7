"""Messages to frames and back, with hard limits: any bytes decode to a message or raise RemoteProtocolError.

A frame is `header length (u32, little endian) | header | padding to 16 | payload`. The header is msgpack of
[message, tensor headers]; the payload is the tensors' raw bytes, in order, each padded to 16 bytes. The payload is
never copied: a received tensor is a view of the frame. Nothing is allocated that is larger than the frame that arrived,
and nesting is bounded by the types, so no depth or length bomb gets further than its own bytes.

Ring: pure.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Generic, TypeVar

import msgspec

from mycel.protocols.errors import LocalProtocolError, RemoteProtocolError
from mycel.protocols.messages import (
    FileMessage,
    HandoverMessage,
    Message,
    ReachMessage,
    RecordMessage,
    RingMessage,
    SessionMessage,
)
from mycel.protocols.rounds import BlobMessage, RoundMessage, StreamMessage
from mycel.protocols.training import PipeMessage, ReduceMessage, StageStatus, StateMessage
from mycel.protocols.wire import TensorHeader, WireTensor, padded

MAX_HEADER_BYTES = 12 * 1024 * 1024
MAX_TENSORS = 8

M = TypeVar("M")

_encoder = msgspec.msgpack.Encoder()


class Codec(Generic[M]):
    """Encoder and decoder of one protocol's messages."""

    def __init__(self, messages: Any, name: str) -> None:
        self.name = name
        header = tuple[messages, Annotated[tuple[TensorHeader, ...], msgspec.Meta(max_length=MAX_TENSORS)]]
        self._decoder = msgspec.msgpack.Decoder(header)

    def encode(self, message: Message, tensors: Sequence[WireTensor] = ()) -> list[bytes | memoryview]:
        """The parts of one frame, in order; large tensors are passed through, not copied."""
        header = _encoder.encode((message, tuple(tensor.header for tensor in tensors)))
        if len(header) > MAX_HEADER_BYTES or len(tensors) > MAX_TENSORS:
            raise LocalProtocolError(f"{type(message).__name__} of {len(header)} header bytes is over the limit")
        lead = 4 + len(header)
        start = padded(lead)
        parts: list[bytes | memoryview] = [len(header).to_bytes(4, "little") + header + bytes(start - lead)]
        for tensor in tensors:
            parts.append(tensor.data)
            parts.append(bytes(padded(len(tensor.data)) - len(tensor.data)))
        if not tensors:
            parts[0] = parts[0][:lead]
        return [part for part in parts if len(part)]

    def decode(self, frame: bytes | memoryview) -> tuple[M, tuple[WireTensor, ...]]:
        """The message and its tensors, which share the frame's memory. Raises RemoteProtocolError for anything else."""
        view = memoryview(frame)
        if len(view) < 4:
            raise RemoteProtocolError(f"{self.name} frame of {len(view)} bytes has no header")
        header_bytes = int.from_bytes(view[:4], "little")
        if header_bytes > MAX_HEADER_BYTES or 4 + header_bytes > len(view):
            raise RemoteProtocolError(f"{self.name} header of {header_bytes} bytes in a frame of {len(view)}")
        try:
            message, headers = self._decoder.decode(view[4 : 4 + header_bytes])
        except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError) as error:
            raise RemoteProtocolError(f"{self.name} message refused: {str(error)[:200]}") from None
        offset = padded(4 + header_bytes) if headers else 4 + header_bytes
        tensors = []
        for header in headers:
            size_bytes = header.check()
            if offset + padded(size_bytes) > len(view):
                raise RemoteProtocolError(f"{self.name} tensor of {size_bytes} bytes in a frame of {len(view)}")
            tensors.append(WireTensor(header, view[offset : offset + size_bytes]))
            offset += padded(size_bytes)
        if offset != len(view):
            raise RemoteProtocolError(f"{self.name} frame has {len(view) - offset} bytes too many")
        return message, tuple(tensors)

    def decode_only(self, frame: bytes | memoryview) -> M:
        """As `decode`, for a protocol that attaches no tensors."""
        message, tensors = self.decode(frame)
        if tensors:
            raise RemoteProtocolError(f"{self.name} message {type(message).__name__} carries no tensors")
        return message


record_codec: Codec[RecordMessage] = Codec(RecordMessage, "records")
session_codec: Codec[SessionMessage] = Codec(SessionMessage, "session")
ring_codec: Codec[RingMessage] = Codec(RingMessage, "ring")
handover_codec: Codec[HandoverMessage] = Codec(HandoverMessage, "handover")
reach_codec: Codec[ReachMessage] = Codec(ReachMessage, "reach")
file_codec: Codec[FileMessage] = Codec(FileMessage, "files")
train_codec: Codec[StageStatus] = Codec(StageStatus, "train")
pipe_codec: Codec[PipeMessage] = Codec(PipeMessage, "pipe")
reduce_codec: Codec[ReduceMessage] = Codec(ReduceMessage, "reduce")
state_codec: Codec[StateMessage] = Codec(StateMessage, "state")
round_codec: Codec[RoundMessage] = Codec(RoundMessage, "round")
stream_codec: Codec[StreamMessage] = Codec(StreamMessage, "round")
blob_codec: Codec[BlobMessage] = Codec(BlobMessage, "blobs")
