"""A codec for each tensor: "mixed:int8|topk:0.01+ef|float32", as the chooser in lgreco.py picks them.

    body: for each tensor the length of its body (4 bytes), then the body

Legend: P elements.

Ring: algorithms.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

import torch
from torch import Tensor

from mycel.protocols.errors import RemoteProtocolError
from mycel.swarm.codecs.bits import Reader
from mycel.swarm.codecs.codec import Codec, Encoder, Turn, check_vector
from mycel.swarm.codecs.layout import Layout

__all__ = ["MixedCodec"]


class MixedCodec:
    """As many codecs as the layout has tensors; equal ones in a row are written once: "int8*3"."""

    layered = True

    def __init__(self, codecs: Sequence[Codec]) -> None:
        self.codecs = tuple(codecs)
        self.repeatable = all(codec.repeatable for codec in self.codecs)
        runs = [(name, len(list(run))) for name, run in groupby(codec.name for codec in self.codecs)]
        self.name = "mixed:" + "|".join(name + (f"*{count}" if count > 1 else "") for name, count in runs)

    def cut(self, layout: Layout, n: int) -> tuple[MixedCodec, ...]:
        """The codec of each part that `layout.cut(n)` makes."""
        self._tensors(layout)
        return tuple(MixedCodec([self.codecs[index] for index, _ in part]) for part in layout.cut_pieces(n))

    def encoder(self, layout: Layout) -> Encoder:
        encoders = [codec.encoder(tensor) for codec, _, tensor in self._tensors(layout)]
        return _MixedEncoder(encoders, layout)

    def decode(self, body: bytes | memoryview, layout: Layout) -> Tensor:
        reader = Reader(body)
        x_P = torch.empty(layout.n_elements)
        for codec, where, tensor in self._tensors(layout):
            size_bytes = reader.number(4)
            if size_bytes > codec.max_bytes(tensor):
                raise RemoteProtocolError(f"a tensor of an update takes {size_bytes} bytes, too many for {codec.name}")
            x_P[where] = codec.decode(reader.take(size_bytes), tensor)
        reader.end()
        return x_P

    def max_bytes(self, layout: Layout) -> int:
        return sum(4 + codec.max_bytes(tensor) for codec, _, tensor in self._tensors(layout))

    def _tensors(self, layout: Layout) -> list[tuple[Codec, slice, Layout]]:
        if len(layout.shapes) != len(self.codecs):
            raise ValueError(f"{len(self.codecs)} codecs for {len(layout.shapes)} tensors")
        pieces = zip(self.codecs, layout.pieces(), strict=True)
        return [(codec, where, Layout((shape,))) for codec, (where, shape) in pieces]


class _MixedEncoder:
    def __init__(self, encoders: list[Encoder], layout: Layout) -> None:
        self._encoders = encoders
        self._layout = layout
        self._turn = Turn()

    def encode(self, x_P: Tensor, seed: bytes) -> bytes:
        self._turn.check_settled()
        x_P = check_vector(x_P, self._layout)
        parts = []
        for number, (encoder, (where, _)) in enumerate(zip(self._encoders, self._layout.pieces(), strict=True)):
            body = encoder.encode(x_P[where], seed + number.to_bytes(4, "little"))
            parts += [len(body).to_bytes(4, "little"), body]
        self._turn.encoded()
        return b"".join(parts)

    def settle(self, accepted: bool) -> None:
        self._turn.settled()
        for encoder in self._encoders:
            encoder.settle(accepted)
