"""Frames in a stream of bytes: `length (u32, big endian) | payload`; length 0 is the end that `aclose` sends.

The end is explicit because a killed process closes its sockets exactly as one that finished. Memory grows with the
bytes that arrive, never with the length that was announced.

Ring: pure.
"""

from __future__ import annotations

from collections import deque

from mycel.protocols.errors import RemoteProtocolError

PREFIX_BYTES = 4
END = bytes(PREFIX_BYTES)


def prefix(size_bytes: int) -> bytes:
    return size_bytes.to_bytes(PREFIX_BYTES, "big")


class FrameReader:
    """Cuts what arrives into frames. `ended` once the end mark was read; nothing may come after it."""

    __slots__ = ("_frame", "_max_frame_bytes", "_prefix", "_size_bytes", "ended")

    def __init__(self, max_frame_bytes: int) -> None:
        self._max_frame_bytes = max_frame_bytes
        self._prefix = bytearray()  # of a frame whose prefix is not complete
        self._size_bytes = 0  # of the frame whose prefix was read, or 0
        self._frame = bytearray()
        self.ended = False

    @property
    def partial_bytes(self) -> int:
        """Bytes that arrived of a frame that is not complete."""
        return len(self._prefix) + (PREFIX_BYTES + len(self._frame) if self._size_bytes else 0)

    def feed(self, data: memoryview) -> list[bytearray]:
        """The frames that `data` completes. Raises RemoteProtocolError for a frame over the limit or after the end."""
        frames: list[bytearray] = []
        at = 0
        while at < len(data):
            if self.ended:
                raise RemoteProtocolError("sent more after the end of the stream")
            if not self._size_bytes:
                at = self._read_prefix(data, at)
                continue
            stop = at + self._size_bytes - len(self._frame)
            self._frame += data[at:stop]
            at = min(stop, len(data))
            if len(self._frame) == self._size_bytes:
                frames.append(self._frame)
                self._frame, self._size_bytes = bytearray(), 0
        return frames

    def _read_prefix(self, data: memoryview, at: int) -> int:
        stop = at + PREFIX_BYTES - len(self._prefix)
        self._prefix += data[at:stop]
        if len(self._prefix) < PREFIX_BYTES:
            return len(data)
        size_bytes = int.from_bytes(self._prefix, "big")
        self._prefix.clear()
        if size_bytes > self._max_frame_bytes:
            raise RemoteProtocolError(f"announced a frame of {size_bytes} bytes, over {self._max_frame_bytes}")
        self._size_bytes = size_bytes
        self.ended = size_bytes == 0
        return stop


def take(parts: deque[memoryview], size_bytes: int) -> list[memoryview]:
    """Remove the first `size_bytes` of `parts`, or all of them, without copying."""
    run: list[memoryview] = []
    while parts and size_bytes:
        head = parts.popleft()
        if len(head) > size_bytes:
            parts.appendleft(head[size_bytes:])
            head = head[:size_bytes]
        if len(head):
            run.append(head)
            size_bytes -= len(head)
    return run
