"""The tensor wire format: raw little-endian bytes behind a checked header (dtype, shape, codec).

`codec` names how the bytes encode the values; "raw" is the values themselves in row-major order. Converting from and
to torch lives in `tensors.py`; this file knows sizes and names alone, so that a client needs no torch.

Ring: pure.
"""

from __future__ import annotations

from math import prod
from typing import Annotated

from msgspec import Meta, Struct

from mycel.protocols.errors import RemoteProtocolError

ALIGNMENT_BYTES = 16
MAX_DIMENSIONS = 4
MAX_ELEMENTS = 1 << 30
ITEM_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "int64": 8, "int32": 4, "int8": 1, "uint8": 1}
CODECS = frozenset({"raw"})


def padded(size_bytes: int) -> int:
    """`size_bytes` rounded up to ALIGNMENT_BYTES."""
    return -(-size_bytes // ALIGNMENT_BYTES) * ALIGNMENT_BYTES


class TensorHeader(Struct, frozen=True, array_like=True):
    """What the bytes of a tensor mean."""

    dtype: Annotated[str, Meta(max_length=16)]
    shape: Annotated[tuple[Annotated[int, Meta(ge=0, le=MAX_ELEMENTS)], ...], Meta(max_length=MAX_DIMENSIONS)]
    codec: Annotated[str, Meta(max_length=16)] = "raw"

    def check(self) -> int:
        """The payload's size in bytes. Raises RemoteProtocolError for an unknown dtype or codec or for too many."""
        if self.dtype not in ITEM_BYTES:
            raise RemoteProtocolError(f"unknown dtype {self.dtype!r}")
        if self.codec not in CODECS:
            raise RemoteProtocolError(f"unknown tensor codec {self.codec!r}")
        n_elements = prod(self.shape)
        if n_elements > MAX_ELEMENTS:
            raise RemoteProtocolError(f"a tensor of {n_elements} elements is over the limit")
        return n_elements * ITEM_BYTES[self.dtype]


class WireTensor(Struct, frozen=True):
    """A tensor as it travels: header and a view of its bytes."""

    header: TensorHeader
    data: memoryview
