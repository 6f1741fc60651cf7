"""Which chunk a joiner fetches next from which source: the rarest unit first, and its chunks from everybody who has it.

Every chunk has a hash of its own, so one unit may come from many sources at once, and each answers for what it sent.
Knows nothing of bytes, streams or files.

Ring: pure.
"""

from __future__ import annotations

import heapq
from collections.abc import Collection, Mapping
from typing import NamedTuple

__all__ = ["PATIENCE_S", "FetchPlan", "Piece"]

# A chunk asked of one source for longer than this may be asked of a second one, which would have nothing else to do.
PATIENCE_S = 5.0
MAX_CLAIMS = 2


class Piece(NamedTuple):
    """One chunk of a unit."""

    unit: str
    chunk: int


class FetchPlan:
    """The state of one download: every chunk is pending, claimed by a source or two, or done.

    >>> plan = FetchPlan({"embed": [0, 1]}, {"embed": ["a", "b"]})
    >>> plan.claim("a", 0.0), plan.claim("b", 0.0), plan.claim("b", 0.0)
    (Piece(unit='embed', chunk=0), Piece(unit='embed', chunk=1), None)
    """

    def __init__(self, missing: Mapping[str, Collection[int]], holders: Mapping[str, Collection[str]]) -> None:
        """`missing`: for each unit, in order, the chunks that are not here. `holders`: the sources that may have it."""
        self._order = {unit: position for position, unit in enumerate(missing)}
        self._pending = {unit: sorted(chunks) for unit, chunks in missing.items() if chunks}
        self._left = {unit: set(chunks) for unit, chunks in missing.items() if chunks}
        self._holders = {unit: set(holders.get(unit, ())) for unit in self._left}
        # who is asked for a piece since when; sooner claims stand before later ones
        self._claims: dict[Piece, dict[str, float]] = {}

    @property
    def finished(self) -> bool:
        return not self._left

    @property
    def sources(self) -> tuple[str, ...]:
        """Every source that may still be of use, sorted."""
        return tuple(sorted(set().union(*self._holders.values())))

    def claim(self, source: str, now: float) -> Piece | None:
        """What `source` shall send now: of the units that it may have the rarest, of those the first, in order.

        With nothing else left to ask it for, a chunk for which another source has needed too long. None: nothing now.
        """
        units = [unit for unit, chunks in self._pending.items() if chunks and source in self._holders[unit]]
        if units:
            unit = min(units, key=lambda unit: (len(self._holders[unit]), self._order[unit]))
            piece = Piece(unit, heapq.heappop(self._pending[unit]))
        else:
            late = self._late(source, now)
            if late is None:
                return None
            piece = late
        self._claims.setdefault(piece, {})[source] = now
        return piece

    def _late(self, source: str, now: float) -> Piece | None:
        for piece, claims in self._claims.items():
            asked_at = min(claims.values())
            late = len(claims) < MAX_CLAIMS and source not in claims and now - asked_at >= PATIENCE_S
            if late and source in self._holders[piece.unit]:
                return piece
        return None

    def wanted(self, piece: Piece) -> bool:
        """Whether the chunk is not here yet."""
        return piece.chunk in self._left.get(piece.unit, ())

    def done(self, piece: Piece) -> bool:
        """The chunk is here and verified; True if that makes its unit whole."""
        self._claims.pop(piece, None)
        left = self._left.get(piece.unit)
        if left is None:
            return False
        left.discard(piece.chunk)
        if left:
            return False
        del self._left[piece.unit], self._pending[piece.unit], self._holders[piece.unit]
        return True

    def give_back(self, piece: Piece, source: str) -> None:
        """`source` will not send it; if nobody else was asked, whoever may have it may claim it again."""
        claims = self._claims.get(piece)
        if claims is None or claims.pop(source, None) is None or claims:
            return
        del self._claims[piece]
        heapq.heappush(self._pending[piece.unit], piece.chunk)

    def lacks(self, unit: str, source: str) -> bool:
        """`source` does not have the unit (any more); True if that is new."""
        holders = self._holders.get(unit, set())
        known = source in holders
        holders.discard(source)
        return known

    def offer(self, unit: str, source: str) -> None:
        """`source` may have the unit, too."""
        self._holders[unit].add(source)

    def drop(self, source: str) -> None:
        """Nothing more from this source."""
        for holders in self._holders.values():
            holders.discard(source)

    def useful(self, source: str) -> bool:
        """Whether `source` may have a chunk that is not here, also one that another source is sending now."""
        return any(source in holders for holders in self._holders.values())

    def hopeless(self) -> tuple[str, ...]:
        """The units that lack chunks which nobody sends and nobody is left to send, in order."""
        lost = (unit for unit, chunks in self._pending.items() if chunks and not self._holders[unit])
        return tuple(sorted(lost, key=self._order.__getitem__))
