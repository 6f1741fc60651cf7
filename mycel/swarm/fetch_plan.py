"""Which unit a joiner fetches next from which peer: the rarest first, one source for a unit at a time.

One source at a time because a unit has one digest: only who sent all of a unit can be told to have sent it wrong.
Knows nothing of bytes, streams or files.

Ring: pure.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

__all__ = ["FetchPlan"]


class FetchPlan:
    """The state of one download: every unit is pending, claimed by one source, or done."""

    def __init__(self, units: Sequence[str], holders: Mapping[str, Collection[str]]) -> None:
        """`holders`: for each unit, the peers that may have it."""
        self._order = {unit: position for position, unit in enumerate(units)}
        self._pending = set(units)
        self._claimed: dict[str, str] = {}
        self._holders = {unit: set(holders.get(unit, ())) for unit in units}

    @property
    def finished(self) -> bool:
        return not self._pending and not self._claimed

    @property
    def sources(self) -> tuple[str, ...]:
        """Every peer that may still be of use, sorted."""
        return tuple(sorted(set().union(*self._holders.values())))

    def claim(self, source: str) -> str | None:
        """The unit that `source` shall send now, or None: of those it may have the rarest, then the first."""
        offers = [unit for unit in self._pending if source in self._holders[unit]]
        if not offers:
            return None
        unit = min(offers, key=lambda unit: (len(self._holders[unit]), self._order[unit]))
        self._pending.remove(unit)
        self._claimed[unit] = source
        return unit

    def done(self, unit: str) -> None:
        """The unit is here, whole and verified."""
        del self._claimed[unit]
        del self._holders[unit]

    def give_back(self, unit: str) -> None:
        """The transfer broke; whoever may have the unit may claim it again."""
        del self._claimed[unit]
        self._pending.add(unit)

    def lacks(self, unit: str, source: str) -> None:
        """`source` does not have the unit (any more)."""
        self._holders[unit].discard(source)

    def drop(self, source: str) -> None:
        """Nothing more from this source."""
        for holders in self._holders.values():
            holders.discard(source)

    def useful(self, source: str) -> bool:
        """Whether `source` may have a unit that is not done, also one that another source is sending now."""
        return any(source in holders for holders in self._holders.values())

    def hopeless(self) -> tuple[str, ...]:
        """The units that nobody sends and nobody is left to send, in order."""
        return tuple(sorted((unit for unit in self._pending if not self._holders[unit]), key=self._order.__getitem__))
