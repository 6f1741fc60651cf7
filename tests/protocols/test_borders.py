"""Border tensors: small, exact to half a step, equal bytes every time; what a peer sends is a tensor or refused."""

from __future__ import annotations

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from mycel.protocols.borders import BLOCK, border_bytes, decode_border, encode_border
from mycel.protocols.codec import pipe_codec
from mycel.protocols.errors import RemoteProtocolError
from mycel.protocols.training import Backward
from mycel.protocols.wire import ITEM_BYTES, TensorHeader, WireTensor

CODECS = ("float32", "bfloat16", "int8")
LARGEST = torch.finfo(torch.float32).max

codecs = st.sampled_from(CODECS)
shapes = st.tuples(st.integers(1, 3), st.integers(1, 3), st.integers(2, 300))


@st.composite
def border_tensors(draw):
    """Blocks of very different sizes, from denormal numbers to 1e37, and zeros."""
    shape, seed = draw(shapes), draw(st.integers(0, 10**6))
    generator = torch.Generator().manual_seed(seed)
    tensor = torch.randn(shape, generator=generator)
    exponents = torch.randint(-44, 37, (*shape[:2], -(-shape[2] // BLOCK)), generator=generator)
    sizes = (10.0 ** exponents.double()).float().repeat_interleave(BLOCK, dim=-1)[..., : shape[2]]
    zeros = torch.rand(shape, generator=generator) < draw(st.sampled_from([0.0, 0.3, 1.0]))
    return (tensor * sizes).masked_fill(zeros, 0.0)


def wire_bytes(wires):
    return [(wire.header, bytes(wire.data)) for wire in wires]


def sent(tensor, codec):
    """As it arrives after a walk through a frame."""
    frame = bytearray().join(pipe_codec.encode(Backward(bytes(32), bytes(32), 1, 0), encode_border(tensor, codec)))
    return decode_border(pipe_codec.decode(frame)[1], tuple(tensor.shape), codec)


@given(border_tensors())
def test_int8_is_exact_to_half_a_step(tensor) -> None:
    _, scales = encode_border(tensor, "int8")
    scale_BTG = torch.frombuffer(scales.data, dtype=torch.float32).view(scales.header.shape)
    assert scale_BTG.min() >= 0
    bound = scale_BTG.repeat_interleave(BLOCK, dim=-1)[..., : tensor.shape[-1]].double() / 2
    arrived = sent(tensor, "int8")
    assert arrived.dtype == torch.float32
    # The last bits are float32's own rounding, of 127 steps at most.
    assert bool(((arrived.double() - tensor.double()).abs() <= bound * (1 + 2e-5)).all())
    assert bool((arrived[tensor == 0] == 0).all())


@given(border_tensors())
def test_float32_arrives_as_it_is_and_bfloat16_rounded_once(tensor) -> None:
    assert torch.equal(sent(tensor, "float32"), tensor)
    assert torch.equal(sent(tensor, "bfloat16"), tensor.to(torch.bfloat16).to(torch.float32))


@given(border_tensors(), codecs)
def test_equal_tensors_give_equal_bytes_and_decoding_again_changes_nothing(tensor, codec) -> None:
    encoded = encode_border(tensor, codec)
    assert wire_bytes(encoded) == wire_bytes(encode_border(tensor.clone(), codec))
    apart = tensor.new_zeros((*tensor.shape[:2], 2 * tensor.shape[2]))
    apart[..., ::2] = tensor
    assert wire_bytes(encode_border(apart[..., ::2], codec)) == wire_bytes(encoded)
    assert sum(len(wire.data) for wire in encoded) == border_bytes(tuple(tensor.shape), codec)


def test_a_block_of_zeros_stays_one_beside_others() -> None:
    tensor = torch.zeros(1, 2, 3 * BLOCK)
    tensor[0, 0, BLOCK:] = torch.linspace(-3.0, 5.0, 2 * BLOCK)
    arrived = sent(tensor, "int8")
    assert torch.equal(arrived[0, 0, :BLOCK], torch.zeros(BLOCK))
    assert torch.equal(arrived[0, 1], torch.zeros(3 * BLOCK))
    assert float((arrived - tensor).abs().max()) <= 5.0 / 127 / 2 + 1e-6


def test_eight_bits_save_three_quarters_and_more_at_a_width_of_512() -> None:
    tensor = torch.randn(2, 16, 512)
    sizes = {codec: sum(len(wire.data) for wire in encode_border(tensor, codec)) for codec in CODECS}
    assert sizes["float32"] / sizes["int8"] >= 3.8
    assert sizes["float32"] == 2 * sizes["bfloat16"]


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_is_not_sent(codec, bad) -> None:
    tensor = torch.ones(1, 2, 200)
    tensor[0, 1, 150] = bad
    with pytest.raises(ValueError, match="not finite"):
        encode_border(tensor, codec)


def test_the_largest_numbers_are_sent_or_refused() -> None:
    limit = LARGEST * 127 / 128
    tensor = torch.full((1, 1, 4), 0.999 * limit)
    assert torch.allclose(sent(tensor, "int8"), tensor, rtol=0.005)
    for codec in ("int8", "bfloat16"):
        with pytest.raises(ValueError, match="not finite"):
            encode_border(torch.full((1, 1, 4), LARGEST), codec)


@pytest.mark.parametrize("tensor", [torch.ones(2, 3), torch.ones(1, 1, 1, dtype=torch.float64), torch.ones(1, 0, 4)])
def test_what_is_no_border_tensor_is_not_sent(tensor) -> None:
    with pytest.raises(ValueError, match="a border takes"):
        encode_border(tensor, "int8")


def wire(dtype, shape, data=None, codec="raw"):
    header = TensorHeader(dtype, shape, codec)
    size_bytes = ITEM_BYTES.get(dtype, 1)
    for dimension in shape:
        size_bytes *= dimension
    return WireTensor(header, memoryview(bytearray(size_bytes if data is None else data)))


def floats(*values):
    return torch.tensor(values, dtype=torch.float32).numpy().tobytes()


VALUES = wire("int8", (1, 1, 4), b"\x80\x7f\x00\x01")


@pytest.mark.parametrize(
    ("wires", "codec", "reason"),
    [
        ((), "float32", "0 tensors"),
        ((VALUES,), "int8", "1 tensors"),
        ((wire("float32", (1, 1, 4)),) * 2, "float32", "2 tensors"),
        ((wire("bfloat16", (1, 1, 4)),), "float32", "not float32"),
        ((wire("float32", (1, 4, 1)),), "float32", r"not float32 \[1, 1, 4\]"),
        ((wire("float32", (4,)),), "float32", r"not float32 \[1, 1, 4\]"),
        ((wire("float32", (1, 1, 4), b"123"),), "float32", "do not make"),
        ((wire("float32", (1, 1, 4), codec="zip"),), "float32", "unknown tensor codec"),
        ((wire("float32", (1, 1, 4), floats(1, 2, float("nan"), 4)),), "float32", "not finite"),
        ((wire("bfloat16", (1, 1, 4), b"\x80\x7f" * 4),), "bfloat16", "not finite"),
        ((wire("float32", (1, 1, 1)), VALUES), "int8", "not int8"),
        ((VALUES, wire("float32", (1, 1, 2))), "int8", r"not float32 \[1, 1, 1\]"),
        ((VALUES, wire("float32", (1, 1, 1), floats(-1.0))), "int8", "scale"),
        ((VALUES, wire("float32", (1, 1, 1), floats(float("nan")))), "int8", "scale"),
        ((VALUES, wire("float32", (1, 1, 1), floats(float("inf")))), "int8", "scale"),
        ((VALUES, wire("float32", (1, 1, 1), floats(LARGEST))), "int8", "scale"),
    ],
)
def test_what_does_not_fit_is_refused_in_words(wires, codec, reason) -> None:
    with pytest.raises(RemoteProtocolError, match=reason):
        decode_border(wires, (1, 1, 4), codec)


def test_the_largest_scale_overflows_for_no_value() -> None:
    scales = wire("float32", (1, 1, 1), floats(LARGEST / 128))
    assert decode_border((VALUES, scales), (1, 1, 4), "int8")[0, 0, 0] == -LARGEST


@given(
    codec=codecs,
    shape=st.sampled_from([(1, 1, 4), (1, 2, 130)]),
    wires=st.lists(
        st.builds(
            lambda dtype, shape, codec, data: (dtype, shape, codec, data),
            st.sampled_from(["float32", "bfloat16", "int8", "int64", "float99"]),
            st.sampled_from([(1, 1, 4), (1, 1, 1), (1, 2, 130), (1, 2, 2), (4,), ()]),
            st.sampled_from(["raw", "raw", "raw", "zip"]),
            st.none() | st.binary(max_size=24) | st.binary(min_size=520, max_size=520),
        ),
        max_size=3,
    ),
)
@example("int8", (1, 1, 4), [("int8", (1, 1, 4), "raw", None), ("float32", (1, 1, 1), "raw", None)])
def test_any_wires_make_a_finite_tensor_or_a_remote_protocol_error(codec, shape, wires) -> None:
    received = [wire(dtype, dims, data, coded) for dtype, dims, coded, data in wires]
    try:
        tensor = decode_border(received, shape, codec)
    except RemoteProtocolError:
        return
    assert tensor.dtype == torch.float32
    assert tensor.shape == shape
    assert bool(torch.isfinite(tensor).all())


@given(codec=codecs, seed=st.integers(0, 10**6))
def test_any_bytes_of_the_right_size_make_a_finite_tensor_or_a_remote_protocol_error(codec, seed) -> None:
    generator = torch.Generator().manual_seed(seed)
    shape = (1, 2, 130)
    received = []
    for encoded in encode_border(torch.ones(shape), codec):
        raw = torch.randint(0, 256, (len(encoded.data),), dtype=torch.uint8, generator=generator)
        received.append(wire(encoded.header.dtype, encoded.header.shape, raw.numpy().tobytes()))
    try:
        tensor = decode_border(received, shape, codec)
    except RemoteProtocolError:
        return
    assert bool(torch.isfinite(tensor).all())
