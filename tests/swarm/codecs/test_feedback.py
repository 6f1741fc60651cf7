"""Error feedback: what is not sent now is sent later, whatever was refused in between."""

from __future__ import annotations

import pytest
import torch

from mycel.swarm.codecs import Layout, MixedCodec, make_codec
from mycel.swarm.codecs.dgc import DgcEncoder
from mycel.swarm.codecs.wrapping import FeedbackEncoder
from tests.swarm.codecs.vectors import LARGE, gaussian, heavy_tailed

WITH_FEEDBACK = ("int4+ef", "e3m0+zip+ef", "topk:0.01,values=int2+ef", "powersgd:2+ef", "dct:32+ef", "kmeans:15+ef")


def feedback_encoder(spec: str, layout: Layout) -> FeedbackEncoder:
    encoder = make_codec(spec).encoder(layout)
    assert isinstance(encoder, FeedbackEncoder)
    return encoder


@pytest.mark.parametrize("spec", WITH_FEEDBACK)
def test_what_was_decoded_and_the_residual_are_what_went_in(spec: str) -> None:
    """Ten rounds, four of them refused."""
    codec, encoder = make_codec(spec), feedback_encoder(spec, LARGE)
    arrived_P = torch.zeros(LARGE.n_elements, dtype=torch.float64)
    went_in_P = torch.zeros_like(arrived_P)
    for number in range(10):
        x_P = heavy_tailed(LARGE, number)
        body = encoder.encode(x_P, bytes([number]))
        accepted = number not in (0, 3, 4, 9)
        encoder.settle(accepted)
        went_in_P += x_P
        if accepted:
            arrived_P += codec.decode(body, LARGE)
    lost_P = arrived_P + encoder.residual_P - went_in_P
    assert float(lost_P.norm() / went_in_P.norm()) < 1e-6
    assert float(encoder.residual_P.norm()) > 0


@pytest.mark.parametrize("spec", ["topk:0.01", "int2", "e3m0", "kmeans:3"])
def test_without_feedback_a_refused_update_is_gone(spec: str) -> None:
    encoder, fresh = make_codec(spec).encoder(LARGE), make_codec(spec).encoder(LARGE)
    encoder.encode(gaussian(LARGE, 1), b"")
    encoder.settle(False)
    assert encoder.encode(gaussian(LARGE, 2), b"") == fresh.encode(gaussian(LARGE, 2), b"")


def test_a_decay_forgets() -> None:
    encoder = feedback_encoder("topk:0.01,values=float32+ef:0.5", LARGE)
    x_P = gaussian(LARGE)
    encoder.encode(x_P, b"")
    encoder.settle(False)
    encoder.encode(torch.zeros_like(x_P), b"")
    encoder.settle(False)
    assert torch.equal(encoder.residual_P, x_P / 2)


def test_dct_is_demo_with_its_momentum() -> None:
    """m <- 0.999 m + x, minus what was sent: the codec's own feedback, unless another decay is asked for."""
    codec, encoder = make_codec("dct:32"), feedback_encoder("dct:32", LARGE)
    momentum_P = torch.zeros(LARGE.n_elements)
    for number in range(4):
        x_P = gaussian(LARGE, number)
        momentum_P = momentum_P * 0.999 + x_P
        sent_P = codec.decode(encoder.encode(x_P, b""), LARGE)
        encoder.settle(True)
        momentum_P -= sent_P
        assert torch.allclose(encoder.residual_P, momentum_P, rtol=1e-4, atol=1e-8)


def test_what_comes_out_on_average_is_what_goes_in() -> None:
    """A constant update through 1 % top-k: after 300 rounds no element is behind by more than a share of the whole."""
    x_P = gaussian(LARGE)
    arrived = {}
    for spec in ("topk:0.01", "topk:0.01+ef"):
        codec = make_codec(spec)
        encoder = codec.encoder(LARGE)
        arrived[spec] = torch.zeros_like(x_P)
        for _ in range(300):
            arrived[spec] += codec.decode(encoder.encode(x_P, b""), LARGE) / 300
            encoder.settle(True)
    lost = {spec: float((found_P - x_P).norm() / x_P.norm()) for spec, found_P in arrived.items()}
    assert lost["topk:0.01"] > 0.9
    assert lost["topk:0.01+ef"] < 0.3


def dgc_reference(xs: list[torch.Tensor], density: float, momentum: float) -> list[torch.Tensor]:
    """Algorithm 4 of the paper on one block, without warm-up."""
    u_P, v_P, sent = torch.zeros_like(xs[0]), torch.zeros_like(xs[0]), []
    for x_P in xs:
        u_P = momentum * u_P + x_P
        v_P = v_P + u_P
        mask_P = torch.zeros_like(v_P, dtype=torch.bool)
        mask_P[v_P.abs().topk(max(1, round(density * len(v_P)))).indices] = True
        sent.append(torch.where(mask_P, v_P, 0.0))
        u_P, v_P = torch.where(mask_P, 0.0, u_P), torch.where(mask_P, 0.0, v_P)
    return sent


def test_dgc_is_the_algorithm_of_the_paper() -> None:
    layout = Layout(((2000,),))
    xs = [gaussian(layout, number) for number in range(12)]
    codec = make_codec("dgc:0.01,momentum=0.7,values=float32,warmup=0")
    encoder = codec.encoder(layout)
    for x_P, expected_P in zip(xs, dgc_reference(xs, 0.01, 0.7), strict=True):
        assert torch.allclose(codec.decode(encoder.encode(x_P, b""), layout), expected_P, rtol=1e-5, atol=1e-9)
        encoder.settle(True)


def test_dgc_warms_up_by_accepted_updates_and_loses_nothing_refused() -> None:
    layout = Layout(((8192,),))
    codec = make_codec("dgc:0.001,warmup=2")
    encoder = codec.encoder(layout)
    assert isinstance(encoder, DgcEncoder)
    kept = []
    for number in range(14):
        body = encoder.encode(gaussian(layout, number), b"")
        kept.append(int(codec.decode(body, layout).count_nonzero()))
        before_u, before_v = encoder.u_P.clone(), encoder.v_P.clone()
        encoder.settle(number not in (1, 2))
        if number in (1, 2):
            assert torch.equal(encoder.u_P, before_u)
            assert torch.equal(encoder.v_P, before_v)
    expected = [2048, 2048, 2048, 2048, 512, 512, 128, 128, 32, 32, 8, 8, 8, 8]
    assert kept == expected


def test_each_tensor_has_its_own_codec_and_state() -> None:
    layout = Layout(((64, 64), (100,), (30, 30)))
    codec = make_codec("mixed:topk:0.01,values=float32+ef|float32|int8:stochastic")
    assert isinstance(codec, MixedCodec)
    encoder, x_P = codec.encoder(layout), gaussian(layout)
    total_P = torch.zeros_like(x_P)
    for number in range(3):
        body = encoder.encode(x_P, bytes([number]))
        assert len(body) <= codec.max_bytes(layout)
        found_P = codec.decode(body, layout)
        encoder.settle(number != 1)
        if number != 1:
            total_P += found_P
        assert torch.equal(found_P[4096:4196], x_P[4096:4196])
    # 41 of 4096 each time, and what was refused came again.
    largest = x_P[:4096].abs().topk(30).indices
    assert torch.allclose(total_P[largest], x_P[largest] * 3, rtol=1e-5) or int((total_P[:4096] != 0).sum()) > 41
    parts = codec.cut(layout, 3)
    cut_layouts = layout.cut(3)
    for part, cut_layout in zip(parts, cut_layouts, strict=True):
        piece_P = gaussian(cut_layout)
        assert part.decode(part.encoder(cut_layout).encode(piece_P, b""), cut_layout).shape == piece_P.shape
    assert "float32" in "".join(part.name for part in parts)
    with pytest.raises(ValueError, match="3 codecs for 2 tensors"):
        codec.encoder(Layout(((3,), (4,))))
