"""A span's cache on its way to another node: pieces of keys and values, and the checks of whoever takes them.

Giving goes on while steps are computed: tokens are only ever appended, so those before `count` stay as they are.

Legend: H key-value heads, T tokens, D head dimension.

Ring: algorithms.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mycel.node.span_cache import BlockCache, SpanCache
from mycel.node.span_port import StatePiece
from mycel.protocols.errors import PeerRefused, RemoteProtocolError

# Small enough that other frames need not wait long behind one, and that acknowledgements soon tell the rate.
PIECE_BYTES = 128 * 1024


def state_bytes(cache: SpanCache, count: int) -> int:
    """The size of all pieces for the first `count` tokens."""
    return sum((given.end - given.first) * given.row_bytes for given in _given(cache, count))


def state_pieces(cache: SpanCache, count: int) -> Iterator[StatePiece]:
    """Block, first token, (keys_HTD, values_HTD), block by block. Call it between two steps; read it at any time.

    A block with a sliding window gives what its next tokens see, and the margin for rolling back.
    """
    return (piece for given in list(_given(cache, count)) for piece in given.pieces())


@dataclass(frozen=True, slots=True)
class _Given:
    """Tokens [first, end) of one block.

    A window moves on and drops tokens, so what it holds now is held on to (`held`). The rest is read from the buffer of
    the day: there tokens keep their places, and a buffer that was outgrown need not stay.
    """

    block: int
    first: int
    end: int
    cache: BlockCache
    held: tuple[Tensor, Tensor] | None

    def rows(self) -> tuple[Tensor, Tensor]:
        return self.held or self.cache.rows(self.end)

    @property
    def row_bytes(self) -> int:
        return sum(rows_HTD.shape[0] * rows_HTD.shape[2] * rows_HTD.itemsize for rows_HTD in self.rows())

    def pieces(self) -> Iterator[StatePiece]:
        at, n_max = self.first, max(PIECE_BYTES // self.row_bytes, 1)
        while at < self.end:
            n = min(n_max, self.end - at)
            keys_HTD, values_HTD = (rows_HTD.narrow(1, at - self.first, n) for rows_HTD in self.rows())
            yield self.block, at, (keys_HTD, values_HTD)
            at += n


def _given(cache: SpanCache, count: int) -> Iterator[_Given]:
    for block, layer in cache.by_block.items():
        first = max(layer.needed_from(count), layer.first)
        held = None
        if layer.is_sliding:
            keys_HTD, values_HTD = layer.rows(count)
            held = keys_HTD[:, first - layer.first :], values_HTD[:, first - layer.first :]
        yield _Given(block, first, count, layer, held)


class SpanIntake:
    """A cache of `count` tokens that is filled with pieces from elsewhere; `like` is a cache that this span made.

    The cache that comes of it has `usable` tokens. Raises PeerRefused if a sliding window could not be rolled back to
    so few.
    """

    def __init__(self, empty: SpanCache, like: SpanCache, count: int, usable: int) -> None:
        self._cache, self._count, self._usable = empty, count, usable
        for block, layer in empty.by_block.items():
            if layer.needed_from(count) > layer.visible_from(usable):
                raise PeerRefused("", f"a sliding window of {count} tokens cannot be rolled back to {usable}")
            layer.begin(layer.needed_from(count), count, like.by_block[block])

    def take(self, block: int, position: int, tensors: Sequence[Tensor]) -> None:
        """Add a piece. Raises RemoteProtocolError for whatever `state_pieces` of the same span would not have given."""
        layer = self._cache.by_block.get(block)
        if layer is None or len(tensors) != 2:
            raise RemoteProtocolError(f"{len(tensors)} tensors for block {block}")
        if layer.is_sliding and layer.first == layer.length < position <= layer.visible_from(self._count):
            layer.skip_to(position)  # the giver has less of a margin itself
        if position != layer.length:
            raise RemoteProtocolError(f"block {block} from token {position}, expected {layer.length}")
        n_tokens = tensors[0].shape[1] if tensors[0].ndim == 3 else 0
        for given_HTD, room_HTD in zip(tensors, layer.rows(layer.length), strict=True):
            if not 0 < n_tokens <= self._count - position or given_HTD.shape != (
                room_HTD.shape[0],
                n_tokens,
                room_HTD.shape[2],
            ):
                raise RemoteProtocolError(f"block {block} with a tensor of shape {tuple(given_HTD.shape)}")
            if given_HTD.dtype != room_HTD.dtype:
                raise RemoteProtocolError(f"block {block} in {given_HTD.dtype} instead of {room_HTD.dtype}")
            if not bool(torch.isfinite(given_HTD).all()):
                raise RemoteProtocolError(f"block {block} with numbers that are not finite")
        layer.put(*tensors)

    def finish(self) -> SpanCache:
        """The cache. Raises RemoteProtocolError if tokens are missing, PeerRefused if it cannot be rolled back."""
        for block, layer in self._cache.by_block.items():
            if layer.length != self._count:
                raise RemoteProtocolError(f"block {block} ends at token {layer.length} instead of {self._count}")
        try:
            self._cache.crop(self._usable)
        except ValueError as error:
            raise PeerRefused("", str(error)) from None
        return self._cache
