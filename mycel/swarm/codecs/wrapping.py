"""What goes around any codec: error feedback, and entropy coding of the packed body.

    +ef:beta   total = beta residual + x;  body = encode(total);  residual = total - decode(body), or total if refused
    +zip       one byte, then the body, or its raw deflate stream if that is shorter

Error feedback compares with what everyone decodes, not with what the encoder meant, so nothing is lost to rounding.
beta below 1 forgets: SparseLoCo takes 0.95 (arXiv 2508.15706), DeMo 0.999. Source: Seide et al. 2014; Karimireddy et
al., arXiv 1901.09847.

Legend: P elements.

Ring: algorithms.
"""

from __future__ import annotations

import zlib

import torch
from torch import Tensor

from mycel.protocols.errors import RemoteProtocolError
from mycel.swarm.codecs.codec import Codec, Encoder, Turn, check_vector
from mycel.swarm.codecs.layout import Layout

__all__ = ["Feedback", "Zipped", "deflated", "inflated"]


class Feedback:
    """`inner`, whose encoders carry on what was not sent, times `decay`. Bodies are those of `inner`."""

    def __init__(self, inner: Codec, decay: float = 1.0, name: str = "") -> None:
        self.name = name or f"{inner.name}+ef" + (f":{decay}" if decay != 1.0 else "")
        self.layered = inner.layered
        self.repeatable = False  # it remembers
        self._inner = inner
        self._decay = decay

    def encoder(self, layout: Layout) -> Encoder:
        return FeedbackEncoder(self._inner, layout, self._decay)

    def decode(self, body: bytes | memoryview, layout: Layout) -> Tensor:
        return self._inner.decode(body, layout)

    def max_bytes(self, layout: Layout) -> int:
        return self._inner.max_bytes(layout)


class FeedbackEncoder:
    """Its `residual_P` is what the swarm did not get yet."""

    def __init__(self, inner: Codec, layout: Layout, decay: float) -> None:
        self.residual_P = torch.zeros(layout.n_elements)
        self._inner = inner
        self._encoder = inner.encoder(layout)
        self._layout = layout
        self._decay = decay
        self._body = b""
        self._turn = Turn()

    def encode(self, x_P: Tensor, seed: bytes) -> bytes:
        self._turn.check_settled()
        total_P = torch.add(check_vector(x_P, self._layout), self.residual_P, alpha=self._decay)
        self._body = self._encoder.encode(total_P, seed)
        self.residual_P = total_P
        self._turn.encoded()
        return self._body

    def settle(self, accepted: bool) -> None:
        self._turn.settled()
        self._encoder.settle(accepted)
        if accepted:
            self.residual_P -= self._inner.decode(self._body, self._layout)
        self._body = b""


class Zipped:
    """`inner`, with bodies made shorter where their bits are not all equally likely."""

    def __init__(self, inner: Codec) -> None:
        self.name = f"{inner.name}+zip"
        self.layered = inner.layered
        self.repeatable = False  # deflate streams differ with the library
        self._inner = inner

    def encoder(self, layout: Layout) -> Encoder:
        return _ZipEncoder(self._inner.encoder(layout))

    def decode(self, body: bytes | memoryview, layout: Layout) -> Tensor:
        return self._inner.decode(inflated(body, self._inner.max_bytes(layout)), layout)

    def max_bytes(self, layout: Layout) -> int:
        return 1 + self._inner.max_bytes(layout)


class _ZipEncoder:
    def __init__(self, inner: Encoder) -> None:
        self._inner = inner

    def encode(self, x_P: Tensor, seed: bytes) -> bytes:
        return deflated(self._inner.encode(x_P, seed))

    def settle(self, accepted: bool) -> None:
        self._inner.settle(accepted)


def deflated(data: bytes) -> bytes:
    """`data` behind a byte that says how: 0 as it is, 1 deflated.

    Huffman codes alone: repetitions are rare in packed numbers, and looking for them takes ten times as long.
    """
    packer = zlib.compressobj(wbits=-zlib.MAX_WBITS, memLevel=9, strategy=zlib.Z_HUFFMAN_ONLY)
    stream = packer.compress(data) + packer.flush()
    return b"\x01" + stream if len(stream) < len(data) else b"\x00" + data


def inflated(body: bytes | memoryview, max_bytes: int) -> memoryview:
    """What `deflated` was given. Raises RemoteProtocolError beyond `max_bytes`, and never makes more than that."""
    data = memoryview(body).cast("B")
    if not len(data) or data[0] > 1:
        raise RemoteProtocolError("an update is packed in an unknown way")
    if not data[0]:
        return data[1:]
    unpacker = zlib.decompressobj(wbits=-zlib.MAX_WBITS)
    try:
        # One more, as the end of a stream of just that size would not be seen.
        plain = unpacker.decompress(data[1:], max_bytes + 1)
    except zlib.error as error:
        raise RemoteProtocolError("an update is not a deflate stream") from error
    if len(plain) > max_bytes or not unpacker.eof or unpacker.unused_data:
        raise RemoteProtocolError("an update is no deflate stream of the size it may have")
    return memoryview(plain)
