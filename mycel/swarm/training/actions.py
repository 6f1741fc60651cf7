"""What a peer may do for a step: what `step` decides, and `mycel/node/training` does.

Ring: pure.
"""

from __future__ import annotations

from dataclasses import dataclass

__all__ = [
    "Action",
    "AddTied",
    "Begin",
    "Commit",
    "Contribute",
    "Decision",
    "Finished",
    "Range",
    "Reduce",
    "Restore",
    "Resync",
    "Seal",
    "TakeResult",
    "TakeShards",
    "TakeSum",
    "Uncount",
    "Wait",
]

Range = tuple[int, int]  # elements [start, end)


@dataclass(frozen=True, slots=True)
class Wait:
    """For a change."""


@dataclass(frozen=True, slots=True)
class Begin:
    """An observer computes from now on, in the middle of a step."""


@dataclass(frozen=True, slots=True)
class Uncount:
    """Take back the gradients of these numbers (a set): a peer with a smaller id keeps them."""

    numbers: int


@dataclass(frozen=True, slots=True)
class Reduce:
    """Sum up `ranges` from the partial sums of `sources`: peers, this one among them, and the sets they counted."""

    ranges: tuple[Range, ...]
    sources: tuple[tuple[str, int], ...]


@dataclass(frozen=True, slots=True)
class TakeShards:
    """Take these ranges of the stage's own sum from the peers that sum them up."""

    shares: tuple[tuple[str, tuple[Range, ...]], ...]


@dataclass(frozen=True, slots=True)
class Contribute:
    """Offer the gradients of the numbers that this peer has counted to round `number`; `sources` as in Reduce."""

    number: int
    sources: tuple[tuple[str, int], ...]


@dataclass(frozen=True, slots=True)
class TakeResult:
    """The stage's own sum is what a round has brought."""


@dataclass(frozen=True, slots=True)
class AddTied:
    """Take the other end's share of the tied table from one of `peers` and add it: that is the sum to apply."""

    peers: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Seal:
    """The stage's own sum is the sum to apply."""


@dataclass(frozen=True, slots=True)
class TakeSum:
    """Take the sum to apply, with this digest, from one of `peers`."""

    version: int
    digest: bytes
    peers: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Commit:
    """Make the step with the sum times `scale`; `norm` is that of the whole model's gradient (0: not known)."""

    scale: float
    norm: float


@dataclass(frozen=True, slots=True)
class Resync:
    """Fetch the newest state from the stage's peers."""


@dataclass(frozen=True, slots=True)
class Restore:
    """Go back to the state after `version` steps: from one's own disk, or from peers that are there."""

    version: int


@dataclass(frozen=True, slots=True)
class Finished:
    """All steps are made."""


Action = (
    Wait
    | Begin
    | Uncount
    | Reduce
    | TakeShards
    | Contribute
    | TakeResult
    | AddTied
    | Seal
    | TakeSum
    | Commit
    | Resync
    | Restore
    | Finished
)


@dataclass(frozen=True, slots=True)
class Decision:
    action: Action
    reason: str
