"""torch <-> wire tensors, without copying on receipt.

Ring: algorithms.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mycel.protocols.errors import RemoteProtocolError
from mycel.protocols.wire import TensorHeader, WireTensor

_DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "int64": torch.int64,
    "int32": torch.int32,
    "int8": torch.int8,
    "uint8": torch.uint8,
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


def to_wire(tensor: Tensor) -> WireTensor:
    """A contiguous CPU view of `tensor` as raw bytes; copies only if it is not contiguous or not on the CPU."""
    flat = tensor.detach().to("cpu").contiguous()
    header = TensorHeader(_NAMES[flat.dtype], tuple(flat.shape))
    # Of one element, any stride counts as contiguous.
    row = flat.as_strided((flat.numel(),), (1,))
    return WireTensor(header, row.view(torch.uint8).numpy().data)


def from_wire(wire: WireTensor) -> Tensor:
    """A tensor over the received bytes themselves, which live as long as the tensor does.

    A stream's frames are writable memory (torch warns once about memory that is not).

    Raises RemoteProtocolError for a codec that has to be decoded elsewhere or a size that does not fit its header.
    """
    if len(wire.data) != wire.header.check():
        raise RemoteProtocolError(f"{len(wire.data)} bytes do not make a {wire.header.dtype} of {wire.header.shape}")
    dtype = _DTYPES[wire.header.dtype]
    if not len(wire.data):
        return torch.empty(wire.header.shape, dtype=dtype)
    return torch.frombuffer(wire.data, dtype=dtype).view(wire.header.shape)
