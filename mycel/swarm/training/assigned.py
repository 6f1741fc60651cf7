"""Which samples a peer trains on in a round: they follow from the round's beacon, so nobody chooses them.

Batches drawn so are alike for all peers (IID), and whoever has the text can compute any contribution again.

Ring: pure.
"""

from __future__ import annotations

import hashlib

_DOMAIN = b"mycel assigned samples v1"
# Positions in the endless order of samples; far more than a run will ever draw.
_SPAN = 1 << 40


def assigned(beacon: bytes, peer: str, step: int, number: int) -> int:
    """The first sample of microbatch `number` of the peer's inner step `step` in the round of this beacon."""
    place = step.to_bytes(4, "little") + number.to_bytes(4, "little")
    return int.from_bytes(hashlib.sha256(_DOMAIN + beacon + place + peer.encode()).digest()[:8], "little") % _SPAN
