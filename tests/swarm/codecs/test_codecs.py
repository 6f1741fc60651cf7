"""Every codec: bounds on what is lost, exact sizes, and the same bytes for the same state, vector and seed."""

from __future__ import annotations

import hashlib
import zlib
from math import prod

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mycel.protocols.errors import LocalProtocolError, RemoteProtocolError
from mycel.swarm.codecs import Layout, dct, make_codec
from mycel.swarm.codecs.bits import pack
from mycel.swarm.codecs.dct import basis
from mycel.swarm.codecs.positions import pack_positions
from mycel.swarm.codecs.powersgd import PowerSgd
from mycel.swarm.codecs.scales import pack_half
from tests.swarm.codecs.vectors import LARGE, SMALL, SPECS, gaussian, heavy_tailed, relative_error


def encoded(spec: str, x_P: torch.Tensor, layout: Layout, seed: bytes = b"seed") -> bytes:
    return make_codec(spec).encoder(layout).encode(x_P, seed)


def through(spec: str, x_P: torch.Tensor, layout: Layout) -> torch.Tensor:
    return make_codec(spec).decode(encoded(spec, x_P, layout), layout)


@pytest.mark.parametrize("spec", SPECS)
def test_what_is_encoded_is_decoded(spec: str) -> None:
    """All magnitudes, all-zero vectors and those with outliers; `x` stays, and equal calls give equal bytes."""
    codec = make_codec(spec)
    for layout in (SMALL, LARGE, Layout(((1,),)), Layout(((4096,),)), Layout(((3, 4097),))):
        zeros_P = torch.zeros(layout.n_elements)
        for x_P in (
            gaussian(layout),
            heavy_tailed(layout),
            zeros_P,
            gaussian(layout, 1, 1e-30),
            gaussian(layout, 2, 1e30),
        ):
            before_P = x_P.clone()
            body = codec.encoder(layout).encode(x_P, b"seed")
            assert torch.equal(x_P, before_P)
            assert body == codec.encoder(layout).encode(x_P, b"seed")
            assert len(body) <= codec.max_bytes(layout)
            found_P = codec.decode(memoryview(body), layout)
            assert found_P.dtype == torch.float32
            assert found_P.shape == x_P.shape
            assert bool(torch.isfinite(found_P).all())
            if x_P is zeros_P:
                assert not found_P.any()
            elif layout is LARGE:
                # Never worse than to send nothing, but for stochastic rounding.
                assert relative_error(found_P, x_P) < (1.0 if "stochastic" not in spec else 1.3)


@pytest.mark.parametrize("spec", SPECS)
def test_other_sizes_are_refused(spec: str) -> None:
    codec = make_codec(spec)
    body = encoded(spec, gaussian(SMALL), SMALL)
    for other in (b"", body[:-1], body + b"\x00", body[1:], bytes(len(body) + 4)):
        with pytest.raises(RemoteProtocolError):
            codec.decode(other, SMALL)


@pytest.mark.parametrize("spec", SPECS)
def test_what_no_update_can_be_is_our_mistake(spec: str) -> None:
    encoder = make_codec(spec).encoder(SMALL)
    x_P = gaussian(SMALL)
    for bad_P in (x_P[:-1], x_P.double(), x_P.view(1, -1), x_P.clone().fill_(torch.nan), x_P / 0.0):
        with pytest.raises(ValueError, match="an update"):
            encoder.encode(bad_P, b"")
    with pytest.raises(LocalProtocolError, match="never encoded"):
        encoder.settle(True)
    # None of it left a trace.
    assert encoder.encode(x_P, b"") == make_codec(spec).encoder(SMALL).encode(x_P, b"")
    with pytest.raises(LocalProtocolError, match="before the last one was settled"):
        encoder.encode(x_P, b"")


@pytest.mark.parametrize(
    ("spec", "size_bytes"),
    [
        ("float32", 4 * 10_001),
        ("float16", 1 + 2 * 10_001),
        ("bfloat16", 2 * 10_001),
        ("int8", 1 + 2 * 79 + 10_001),
        ("int3", 1 + 2 * 79 + 3751),
        ("e3m0", 1 + 2 * 79 + 5001),
        ("int2", 1 + 2 * 79 + 2501),
    ],
)
def test_sizes_are_exact(spec: str, size_bytes: int) -> None:
    layout = Layout(((10_001,),))
    assert len(encoded(spec, gaussian(layout), layout)) == size_bytes == make_codec(spec).max_bytes(layout)


def test_powersgd_sends_its_factors_and_small_tensors_as_they_are() -> None:
    layout = Layout(((200, 100), (333,), (8, 4)))
    x_P = gaussian(layout)
    body = encoded("powersgd:2", x_P, layout)
    assert len(body) == 2 + 2 * 2 * 300 + 4 * 333 + 4 * 32
    found_P = make_codec("powersgd:2").decode(body, layout)
    assert torch.equal(found_P[20_000:], x_P[20_000:])


@given(st.integers(2, 8), st.integers(1, 400), st.integers(-100, 100), st.integers(0, 2**32))
def test_integers_are_within_half_a_step(bits, n, exponent, seed):
    layout = Layout(((n,),))
    x_P = gaussian(layout, seed, 2.0**exponent)
    lost_P = (through(f"int{bits}", x_P, layout) - x_P).abs()
    for start in range(0, n, 128):
        step = float(x_P[start : start + 128].abs().max()) / (2 ** (bits - 1) - 1)
        assert float(lost_P[start : start + 128].max()) <= step * (0.5 + 2**-5)


@given(st.integers(0, 2**32))
def test_e3m0_takes_the_nearest_of_its_fifteen_numbers(seed):
    layout = Layout(((128,),))
    # The largest is a power of two, so that its scale is exact.
    x_P = (gaussian(layout, seed, 0.2) * torch.rand(128, generator=torch.Generator().manual_seed(seed)) ** 4).clamp(
        -1, 1
    )
    x_P[5] = -1.0
    magnitudes = torch.tensor([0.0, *(2.0**-i for i in range(7))])
    grid = torch.cat([-magnitudes, magnitudes])
    nearest_P = (grid - x_P.unsqueeze(1)).abs().min(dim=1).values
    assert torch.equal((through("e3m0", x_P, layout) - x_P).abs(), nearest_P)


@pytest.mark.parametrize("spec", ["int4:stochastic", "int2:stochastic", "e3m0:stochastic"])
def test_stochastic_rounding_is_right_on_average(spec: str) -> None:
    n = 4000
    block_E = gaussian(Layout(((128,),)))
    block_E[3] = 4e-3  # at the scale itself no number may be rounded up
    x_P, layout = block_E.repeat(n), Layout(((n, 128),))

    def bias(spec: str) -> float:
        return float((through(spec, x_P, layout).view(n, 128).double().mean(dim=0) - block_E).abs().max())

    # A number's spread is at most half of the widest step, 4e-3; six deviations of the mean.
    assert bias(spec) < 6 * 2e-3 / n**0.5 < bias(spec.partition(":")[0])
    codec = make_codec(spec)
    assert encoded(spec, x_P, layout, b"1") != encoded(spec, x_P, layout, b"2")
    assert codec.name == spec


@pytest.mark.parametrize(("kind", "error"), [("float32", 0.0), ("float16", 5e-4), ("int8", 0.01), ("int4", 0.2)])
def test_topk_keeps_the_largest_of_each_block(kind: str, error: float) -> None:
    layout = Layout(((3, 4096), (100,)))
    x_P = gaussian(layout)
    found_P = through(f"topk:0.01,values={kind}", x_P, layout)
    wanted_P = torch.zeros_like(x_P)
    for start, kept in ((0, 41), (4096, 41), (8192, 41), (12288, 1)):
        at = x_P[start : start + 4096].abs().topk(kept).indices + start
        wanted_P[at] = x_P[at]
    assert torch.equal(found_P != 0, wanted_P != 0)
    assert relative_error(found_P, wanted_P) <= error


def test_two_bits_tell_large_from_larger() -> None:
    """SparseLoCo's setting, 64 of 4096: less than 10 bits a kept number, 215 times shorter than float32."""
    layout = Layout(((256, 4096),))
    x_P = gaussian(layout)
    body = encoded("topk:0.015625,values=int2", x_P, layout)
    assert 4 * layout.n_elements / len(body) > 210
    two = relative_error(through("topk:0.015625,values=int2", x_P, layout), x_P)
    assert two < relative_error(through("topk:0.015625,values=sign", x_P, layout), x_P)
    assert two < relative_error(through("topk:0.015625", x_P, layout), x_P) + 0.002


def test_powersgd_finds_a_matrix_of_low_rank_and_follows_one_of_more() -> None:
    layout = Layout(((80, 60),))
    generator = torch.Generator().manual_seed(3)
    low = torch.randn(80, 2, generator=generator) @ torch.randn(2, 60, generator=generator)
    assert relative_error(through("powersgd:2", low.reshape(-1), layout), low.reshape(-1)) < 2e-3
    # The warm start is a power iteration over calls: it comes close to the best of rank 2.
    strengths = torch.tensor([1.0, 0.8, *[0.2] * 58])
    left, _ = torch.linalg.qr(torch.randn(80, 60, generator=generator))
    right, _ = torch.linalg.qr(torch.randn(60, 60, generator=generator))
    matrix_P = (left * strengths @ right).reshape(-1)
    best = float((strengths[2:] ** 2).sum() / (strengths**2).sum()) ** 0.5
    codec = make_codec("powersgd:2")
    encoder = codec.encoder(layout)
    errors = []
    for _ in range(8):
        errors.append(relative_error(codec.decode(encoder.encode(matrix_P, b""), layout), matrix_P))
        encoder.settle(True)
    assert errors[-1] < min(best * 1.001, errors[0])


def test_powersgd_is_ready_again_after_zeros() -> None:
    layout = Layout(((80, 60),))
    codec = make_codec("powersgd:1")
    encoder = codec.encoder(layout)
    encoder.encode(torch.zeros(4800), b"")
    encoder.settle(True)
    matrix_P = torch.outer(torch.arange(80.0), torch.arange(60.0)).reshape(-1)
    assert relative_error(codec.decode(encoder.encode(matrix_P, b""), layout), matrix_P) < 2e-3


def test_dct_finds_waves() -> None:
    """A smooth matrix is a few coefficients, whatever its edges; noise is not."""
    layout = Layout(((130, 70), (100,)))
    rows, columns = torch.arange(130).unsqueeze(1), torch.arange(70)
    waves = torch.cos(rows * 0.05) * torch.sin(columns * 0.07)
    x_P = torch.cat([waves.reshape(-1), torch.cos(torch.arange(100) * 0.1)])
    assert relative_error(through("dct:64", x_P, layout), x_P) < 0.1
    assert relative_error(through("dct:64", gaussian(layout), layout), gaussian(layout)) > 0.8


@pytest.mark.parametrize("size", range(1, 65))
def test_the_integer_basis_is_exact_everywhere(size: int) -> None:
    """Orthonormal up to its rounding, none of its numbers near a tie, and all sums below 2^53."""
    exact = basis(size)
    assert float((exact @ exact.T / 2**38 - torch.eye(size)).abs().max()) < 2e-5
    u, x = np.arange(size)[:, None], np.arange(size)
    real = 2**19 * np.sqrt(np.where(u == 0, 1.0, 2.0) / size) * np.cos(np.pi * (2 * x + 1) * u / (2 * size))
    nearest = np.abs(np.abs(real % 1.0 - 0.5)).min()
    assert nearest > 1e-6  # libraries' cosines differ by 1e-10 of these units
    assert 127 * float(exact.abs().sum(dim=0).max()) ** 2 < 2**53


def test_dct_decodes_the_same_in_any_order_of_sums() -> None:
    """Integers in float64: a matrix product over reversed axes gives the same bits, as any library's would."""
    levels = torch.randint(-127, 128, (64, 64), generator=torch.Generator().manual_seed(0)).double()
    forward = basis(64).T @ levels @ basis(64)
    backward = (basis(64).flip(0).T @ levels.flip(0).flip(1)) @ basis(64).flip(0)
    assert torch.equal(forward, backward)
    exact = basis(64).to(torch.int64).T @ levels.to(torch.int64) @ basis(64).to(torch.int64)
    assert torch.equal(forward.to(torch.int64), exact)


def test_centroids_are_close_to_the_best_and_symbols_to_their_entropy() -> None:
    layout = Layout(((400, 500),))
    x_P = gaussian(layout)
    # The best 16 levels for a normal distribution leave 0.0095 of its variance (Max, 1960).
    assert relative_error(through("kmeans:16,keep=1", x_P, layout), x_P) ** 2 < 0.0095 * 1.1
    body = encoded("kmeans:3,keep=0.02", x_P, layout)
    assert len(body) * 8 / layout.n_elements < 0.02 * (7.2 + 1.8)  # a gap and a symbol


def test_entropy_coding_pays_and_bombs_do_not() -> None:
    layout = Layout(((300, 500),))
    plain, short = (len(encoded(spec, gaussian(layout), layout)) for spec in ("e3m0", "e3m0+zip"))
    assert plain * 8 / layout.n_elements > 4.1
    assert short * 8 / layout.n_elements < 3.7
    for n in (plain - 1, plain + 1, 10**8):
        packer = zlib.compressobj(wbits=-15)
        bomb = b"\x01" + packer.compress(bytes(n)) + packer.flush()
        with pytest.raises(RemoteProtocolError):
            make_codec("e3m0+zip").decode(bomb, layout)


def counted_numbers(n: int) -> np.ndarray:
    """Numbers of both signs in [-1, 1], without chance or rounding."""
    return (((np.arange(n) * 2654435761) % 4093 - 2046) / 2048).astype(np.float32)


ENCODED = {
    "float16": "88eb151de9be1e88",
    "bfloat16": "0418b20148551968",
    "int8": "cf9a6beeced2176e",
    "int4": "7d6f83d4c3e765d1",
    "e3m0": "443e1c8663b98e67",
}


def counted_body(spec: str) -> bytes:
    """A body for SMALL: encoded where encoders are elementwise too, else put together from its parts."""
    if spec == "dct:32":
        tensors = dct._tensors(SMALL, 32)
        blocks = dct._blocks(tensors)
        positions = [start + np.arange(n) for start, n in zip(blocks.starts, blocks.counts, strict=True)]
        n_groups, n = sum(one.n_groups for one in tensors), blocks.n_positions
        scales, codes = pack_half(np.abs(counted_numbers(n_groups)))[0], pack(np.arange(n, dtype=np.uint8) % 251, 8)
        return pack_positions(np.concatenate(positions), blocks) + scales + codes
    if spec == "powersgd:3":
        codec = PowerSgd(3)
        parts = []
        for shape in SMALL.shapes:
            if codec.factors(shape):
                parts += [pack_half(counted_numbers(3 * n))[0] for n in (shape[0], prod(shape[1:]))]
            else:
                parts.append(counted_numbers(prod(shape)).tobytes())
        return b"".join(parts)
    return encoded(spec, torch.from_numpy(counted_numbers(SMALL.n_elements)), SMALL)


@pytest.mark.parametrize(
    ("spec", "sha256"),
    [
        ("float16", "0d220f7baa2e751c"),
        ("int5", "6bd6c6c33e07dce4"),
        ("e3m0", "d71f929514ffc885"),
        ("topk:0.02,values=int8", "987ea3e0cc2e4ecf"),
        ("topk:0.02,values=int2+zip", "e70a7ed250ff0d34"),
        ("powersgd:3", "346dd2e081a471c3"),
        ("dct:32", "7f1fcd193729109d"),
    ],
)
def test_bodies_are_read_as_ever(spec: str, sha256: str) -> None:
    """What any machine and any later release must make of the same bytes, to the bit."""
    found_P = make_codec(spec).decode(counted_body(spec), SMALL)
    assert hashlib.sha256(found_P.numpy().tobytes()).hexdigest()[:16] == sha256


def test_what_aggregators_sign_is_made_of_elementwise_steps() -> None:
    repeatable = {spec for spec in SPECS if make_codec(spec).repeatable}
    assert repeatable == {"float32", "float16", "bfloat16", "e3m0", *(f"int{bits}" for bits in range(2, 9))}
    assert make_codec("mixed:int8|float16").repeatable
    assert not make_codec("mixed:int8|float16+ef").repeatable


@pytest.mark.parametrize("spec", ["float16", "bfloat16", "int8", "int4", "e3m0"])
def test_repeatable_encoders_make_the_bytes_that_are_on_record(spec: str) -> None:
    x_P = torch.from_numpy(counted_numbers(SMALL.n_elements))
    assert hashlib.sha256(encoded(spec, x_P, SMALL)).hexdigest()[:16] == ENCODED[spec]


def test_the_number_of_threads_makes_no_difference() -> None:
    before = torch.get_num_threads()
    x_P = gaussian(LARGE)
    bodies = {spec: encoded(spec, x_P, LARGE) for spec in SPECS}
    found = []
    try:
        for n in (1, 3):
            torch.set_num_threads(n)
            found.append([make_codec(spec).decode(body, LARGE) for spec, body in bodies.items()])
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))
    assert prod(LARGE.shapes[0]) == 20_000
