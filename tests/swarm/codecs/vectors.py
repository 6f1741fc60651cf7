"""Vectors, layouts and codecs that several tests share."""

from __future__ import annotations

import torch
from torch import Tensor

from mycel.swarm.codecs import Layout

# One of everything: what they are made of differs, and so does what can go wrong.
SPECS = (
    "float32",
    "float16",
    "bfloat16",
    *(f"int{bits}" for bits in range(2, 9)),
    "int4:stochastic",
    "e3m0",
    "e3m0:stochastic",
    "e3m0+zip",
    "topk:0.01",
    "topk:0.00025,values=sign",
    "topk:0.3,values=float32",
    "topk:0.02,values=int8+ef",
    "topk:0.02,values=int4+ef:0.95",
    "topk:0.015625,values=int2+zip+ef",
    "dgc:0.001",
    "dgc:0.01,momentum=0.5,values=int8,warmup=0",
    "powersgd:2+ef",
    "dct:32",
    "dct:8,sign+ef",
    "kmeans:15",
    "kmeans:3,keep=1.0",
    "kmeans:200,keep=0.01+ef",
)
SMALL = Layout(((3,), (70, 65), (), (5, 4, 7), (129,), (1, 300)))
LARGE = Layout(((200, 100), (333,), (64, 64), (130, 70)))


def gaussian(layout: Layout, seed: int = 0, scale: float = 1e-3) -> Tensor:
    return torch.randn(layout.n_elements, generator=torch.Generator().manual_seed(seed)) * scale


def heavy_tailed(layout: Layout, seed: int = 0) -> Tensor:
    """Normal numbers over normal numbers, cut at a thousand: a few are far larger than all others."""
    above, below = gaussian(layout, seed, 1.0), gaussian(layout, seed + 1, 1.0)
    return (above / below).clamp(-1000, 1000) * 1e-3


def relative_error(found: Tensor, wanted: Tensor) -> float:
    return float((found.double() - wanted).norm() / wanted.double().norm())
