"""Numbers of 1 to 24 bits packed without gaps, lowest bit first, and a reader for bodies that peers sent.

    packed(values, width):  bit i of the stream is bit i mod width of value i div width

Ring: algorithms.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from mycel.protocols.errors import RemoteProtocolError

__all__ = ["Array", "Reader", "pack", "packed_bytes", "unpack"]

Array = NDArray[Any]


def packed_bytes(n: int, width: int) -> int:
    """What `n` values of `width` bits take, the last byte filled up."""
    return (n * width + 7) // 8


def pack(values: Array, width: int) -> bytes:
    """The stream of unsigned `values` below 2^width."""
    if width == 8:
        return values.astype(np.uint8, copy=False).tobytes()
    if width == 1:
        return np.packbits(values.astype(np.uint8, copy=False), bitorder="little").tobytes()
    if width > 8:
        bits = (values[:, None] >> np.arange(width, dtype=values.dtype)) & 1
        return np.packbits(bits.astype(np.uint8), bitorder="little").tobytes()
    n = len(values)
    lanes = 2 if width == 4 else 8
    whole = values.astype(np.uint8, copy=False)
    if n % lanes:
        whole = np.concatenate([whole, np.zeros(-n % lanes, np.uint8)])
    lane = whole.reshape(-1, lanes)
    if width == 4:
        return (lane[:, 0] | lane[:, 1] << 4).tobytes()
    # Eight values make `width` whole bytes: one 64-bit word for each eight.
    words = lane[:, 0].astype("<u8")
    for i in range(1, 8):
        words |= lane[:, i].astype("<u8") << np.uint64(i * width)
    stream = np.ascontiguousarray(words.view(np.uint8).reshape(-1, 8)[:, :width])
    return stream.reshape(-1)[: packed_bytes(n, width)].tobytes()


def unpack(data: memoryview, n: int, width: int) -> Array:
    """The `n` values of a stream: uint8, or uint32 for more than 8 bits.

    Raises RemoteProtocolError for another length, and for bits behind the last value.
    """
    if len(data) != packed_bytes(n, width):
        raise RemoteProtocolError(f"{len(data)} bytes do not hold {n} numbers of {width} bits")
    stream = np.frombuffer(data, np.uint8)
    if n * width % 8 and stream[-1] >> (n * width % 8):
        raise RemoteProtocolError("there are bits behind the last packed number")
    if width == 8:
        return stream
    if width == 1:
        return np.unpackbits(stream, count=n, bitorder="little")
    if width > 8:
        bits = np.unpackbits(stream, count=n * width, bitorder="little").reshape(n, width)
        # A value's bits as four bytes.
        as_bytes = np.packbits(np.pad(bits, ((0, 0), (0, 32 - width))), axis=-1, bitorder="little")
        return np.ascontiguousarray(as_bytes).view("<u4").reshape(n)
    if width == 4:
        values = np.empty((len(stream), 2), np.uint8)
        np.bitwise_and(stream, 15, out=values[:, 0])
        np.right_shift(stream, 4, out=values[:, 1])
        return values.reshape(-1)[:n]
    groups = -(-n // 8)
    grown = np.zeros((groups, 8), np.uint8)
    if len(stream) < groups * width:
        stream = np.concatenate([stream, np.zeros(groups * width - len(stream), np.uint8)])
    grown[:, :width] = stream.reshape(groups, width)
    words = grown.view("<u8").reshape(groups)
    values = np.empty((groups, 8), np.uint8)
    for i in range(8):
        values[:, i] = (words >> np.uint64(i * width)).astype(np.uint8) & ((1 << width) - 1)
    return values.reshape(-1)[:n]


class Reader:
    """A cursor over a body. Every method raises RemoteProtocolError where the body is too short."""

    def __init__(self, body: bytes | memoryview) -> None:
        self._data = memoryview(body).cast("B")

    def take(self, size: int) -> memoryview:
        if size > len(self._data):
            raise RemoteProtocolError(f"an update ends {size - len(self._data)} bytes too early")
        part, self._data = self._data[:size], self._data[size:]
        return part

    def rest(self) -> memoryview:
        return self.take(len(self._data))

    def number(self, size: int) -> int:
        """An unsigned number of `size` bytes."""
        return int.from_bytes(self.take(size), "little")

    def array(self, n: int, dtype: str) -> Array:
        """`n` numbers of a dtype as numpy names it; not to be written to."""
        kind = np.dtype(dtype)
        return np.frombuffer(self.take(n * kind.itemsize), kind)

    def packed(self, n: int, width: int) -> Array:
        return unpack(self.take(packed_bytes(n, width)), n, width)

    def end(self) -> None:
        if len(self._data):
            raise RemoteProtocolError(f"an update has {len(self._data)} bytes too many")
