"""How deep a msgpack message is nested, found without recursion: hivemind's own reader crashes on deep ones.

Its extension types hold messages in turn, so those are looked into as well.

Ring: pure.
"""

from __future__ import annotations

MAX_DEPTH = 8
_SIZED = {0xC4: 1, 0xC5: 2, 0xC6: 4, 0xD9: 1, 0xDA: 2, 0xDB: 4}  # bin and str: bytes of the length
_FIXED = {0xC0: 0, 0xC2: 0, 0xC3: 0, 0xCA: 4, 0xCB: 8, 0xCC: 1, 0xCD: 2, 0xCE: 4, 0xCF: 8} | {
    0xD0: 1,
    0xD1: 2,
    0xD2: 4,
    0xD3: 8,
}
_EXT = {0xC7: 1, 0xC8: 2, 0xC9: 4}
_FIXEXT = {0xD4: 1, 0xD5: 2, 0xD6: 4, 0xD7: 8, 0xD8: 16}
_ARRAYS = {0xDC: 2, 0xDD: 4}
_MAPS = {0xDE: 2, 0xDF: 4}


def is_shallow(data: bytes, max_depth: int = MAX_DEPTH) -> bool:
    """Whether reading `data` recurses at most `max_depth` deep. False also for what is cut short or no msgpack.

    >>> is_shallow(b"\\x91\\x91\\x01"), is_shallow(b"\\x91" * 1000 + b"\\x01")
    (True, False)
    """
    todo = [(0, len(data), 0)]  # stretches to read, each with the depth at which it stands
    while todo:
        at, end, base = todo.pop()
        left: list[int] = []  # items still to come at each open level
        while at < end:
            if base + len(left) > max_depth:
                return False
            step = _item(data, at, end)
            if step is None:
                return False
            at, n_items, inner = step
            if inner is not None:
                todo.append((*inner, base + len(left) + 1))
            if left:
                left[-1] -= 1
            if n_items:
                left.append(n_items)
            while left and not left[-1]:
                left.pop()
        if left:
            return False
    return True


def _item(data: bytes, at: int, end: int) -> tuple[int, int, tuple[int, int] | None] | None:
    """Where an item ends (its bytes, not its items), how many items it holds, and where an extension's bytes are."""
    kind, at = data[at], at + 1

    def number(size: int) -> int:
        return int.from_bytes(data[at : at + size], "big")

    n_items, n_bytes, ext = 0, 0, False
    if kind <= 0x7F or kind >= 0xE0:
        pass
    elif kind <= 0x8F:
        n_items = 2 * (kind & 0x0F)
    elif kind <= 0x9F:
        n_items = kind & 0x0F
    elif kind <= 0xBF:
        n_bytes = kind & 0x1F
    elif (size := _SIZED.get(kind)) is not None:
        n_bytes = size + number(size)
    elif (size := _FIXED.get(kind)) is not None:
        n_bytes = size
    elif (size := _FIXEXT.get(kind)) is not None:
        n_bytes, ext = 1 + size, True
    elif (size := _EXT.get(kind)) is not None:
        n_bytes, ext = size + 1 + number(size), True
    elif (size := _ARRAYS.get(kind) or _MAPS.get(kind)) is not None:
        n_bytes, n_items = size, number(size) * (2 if kind in _MAPS else 1)
    else:
        return None
    if at + n_bytes > end:
        return None
    start = at + (1 if kind in _FIXEXT else _EXT.get(kind, 0) + 1)
    return at + n_bytes, n_items, (start, at + n_bytes) if ext else None
