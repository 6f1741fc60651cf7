"""torch <-> wire: the same values and the same memory, for every dtype and shape."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mycel.protocols.codec import ring_codec
from mycel.protocols.errors import RemoteProtocolError
from mycel.protocols.messages import Step
from mycel.protocols.tensors import from_wire, to_wire
from mycel.protocols.wire import ITEM_BYTES, TensorHeader, WireTensor, padded

DTYPES = {name: getattr(torch, name) for name in ITEM_BYTES}


def sent(tensor: torch.Tensor) -> tuple[bytearray, torch.Tensor]:
    """The frame that carries `tensor`, and the tensor that is read from it."""
    frame = bytearray().join(ring_codec.encode(Step(0, ()), [to_wire(tensor)]))
    (wire,) = ring_codec.decode(frame)[1]
    return frame, from_wire(wire)


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal to the bit, NaN and the sign of zero too."""
    flat_a, flat_b = (t.contiguous().view(-1).view(torch.uint8) for t in (a, b))
    return a.shape == b.shape and a.dtype == b.dtype and bool((flat_a == flat_b).all())


@pytest.mark.parametrize("name", sorted(DTYPES))
@given(shape=st.lists(st.integers(0, 5), max_size=4), seed=st.integers(0, 1000))
def test_a_tensor_arrives_as_it_was(name: str, shape: list[int], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    size_bytes = TensorHeader(name, tuple(shape)).check()
    raw = torch.randint(0, 256, (size_bytes,), dtype=torch.uint8, generator=generator)
    tensor = raw.view(DTYPES[name]).view(shape) if size_bytes else torch.empty(shape, dtype=DTYPES[name])
    assert same(sent(tensor)[1], tensor)


@pytest.mark.parametrize("name", sorted(DTYPES))
def test_the_item_size_is_torch_s(name: str) -> None:
    assert torch.empty(0, dtype=DTYPES[name]).itemsize == ITEM_BYTES[name]


@pytest.mark.parametrize(
    "tensor",
    [
        torch.arange(24).view(4, 6).T,
        torch.arange(24).view(4, 6)[:, ::2],
        torch.arange(24)[5:7],
        torch.arange(3).expand(4, 3),
        torch.zeros(3, requires_grad=True),
        torch.arange(120, dtype=torch.int32).view(2, 3, 4, 5).permute(3, 1, 0, 2),
    ],
)
def test_a_view_of_any_kind_arrives_as_what_it_shows(tensor: torch.Tensor) -> None:
    assert same(sent(tensor)[1], tensor.detach())


def test_a_tensor_that_arrives_is_the_frame_itself() -> None:
    frame, tensor = sent(torch.tensor([1, 2, 3], dtype=torch.uint8))
    at = bytes(frame).index(b"\x01\x02\x03")
    frame[at] = 9
    assert tensor.tolist() == [9, 2, 3]
    tensor[1] = 8
    assert frame[at + 1] == 8


def test_a_tensor_that_is_sent_is_not_copied() -> None:
    tensor = torch.zeros(4, dtype=torch.uint8)
    wire = to_wire(tensor)
    tensor[2] = 7
    assert bytes(wire.data) == b"\0\0\x07\0"


@pytest.mark.parametrize("size_bytes", [0, 7, 9, 16])
def test_bytes_that_do_not_fit_their_header_are_refused(size_bytes: int) -> None:
    wire = WireTensor(TensorHeader("float32", (2,)), memoryview(bytearray(size_bytes)))
    with pytest.raises(RemoteProtocolError, match="do not make"):
        from_wire(wire)


def test_a_shape_of_nothing_is_kept() -> None:
    assert sent(torch.empty(3, 0, 2, dtype=torch.bfloat16))[1].shape == (3, 0, 2)


@given(st.integers(0, 10**6))
def test_padding_is_the_next_multiple(size_bytes: int) -> None:
    assert size_bytes <= padded(size_bytes) < size_bytes + 16
    assert padded(size_bytes) % 16 == 0
