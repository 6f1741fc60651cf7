"""What a rule decided about the rows, as integers: the same bytes wherever it was decided, to be signed and rechecked.

Ring: pure.
"""

from __future__ import annotations

from dataclasses import dataclass

import msgspec

from mycel.protocols.errors import RemoteProtocolError

# A weight of 1. A float32 times such an integer is exact in a float64 (24 + 29 bits at most), so that a machine which
# fuses the multiplication with the addition gets the same bits as one that does not.
UNIT = 1 << 20
# The flag aggregator may give a short row a weight over 1, and a negative one.
MAX_WEIGHT = 1 << 28
MAX_ROWS = 256
MAX_REASON_CHARS = 200
# The mixing matrix of 256 rows, five bytes an entry, and the rest.
MAX_DECISION_BYTES = 340_000


@dataclass(frozen=True, slots=True)
class Decision:
    """How the rows are combined; what their weights leave over of UNIT goes to the centre.

    `weights`, one for each row, or else a coordinate rule is used: on the rows themselves, or, where there is `mixing`,
    on its rows' weighted sums of them. `outliers` are rows that got (next to) no weight: a hint, no proof of a lie.
    """

    n_rows: int
    weights: tuple[int, ...] = ()
    mixing: tuple[tuple[int, ...], ...] = ()
    outliers: tuple[int, ...] = ()
    reason: str = ""

    def to_bytes(self) -> bytes:
        """The one encoding of this decision."""
        return _encoder.encode((self.n_rows, self.weights, self.mixing, self.outliers, self.reason))

    @staticmethod
    def from_bytes(data: bytes | memoryview) -> Decision:
        """A peer's decision, checked. Raises RemoteProtocolError for anything that `to_bytes` does not make."""
        if len(data) > MAX_DECISION_BYTES:
            raise RemoteProtocolError(f"a decision of {len(data)} bytes is over the limit of {MAX_DECISION_BYTES}")
        try:
            decision = Decision(*_decoder.decode(data))
        except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError) as error:
            raise RemoteProtocolError(f"decision refused: {str(error)[:200]}") from None
        wrong = decision.check()
        # One encoding for each decision: its digest is compared.
        if wrong is None and decision.to_bytes() != bytes(data):
            wrong = "it is not in its shortest form"
        if wrong is not None:
            raise RemoteProtocolError(f"decision refused: {wrong}")
        return decision

    def check(self) -> str | None:
        """What is wrong with it, or None."""
        if not 0 <= self.n_rows <= MAX_ROWS:
            return f"{self.n_rows} rows"
        if self.weights and self.mixing:
            return "it has both weights and a mixing matrix"
        if len(self.mixing) > self.n_rows:
            return f"{len(self.mixing)} mixed rows of {self.n_rows}"
        for weights in (*([self.weights] if self.weights else []), *self.mixing):
            if len(weights) != self.n_rows:
                return f"{len(weights)} weights for {self.n_rows} rows"
            if not all(-MAX_WEIGHT <= weight <= MAX_WEIGHT for weight in weights):
                return "a weight is out of range"
        if list(self.outliers) != sorted(set(self.outliers)) or not all(0 <= i < self.n_rows for i in self.outliers):
            return "its outliers are not distinct rows in order"
        if len(self.reason) > MAX_REASON_CHARS or not self.reason.isprintable():
            return "its reason is not one short line"
        return None


_Wire = tuple[int, tuple[int, ...], tuple[tuple[int, ...], ...], tuple[int, ...], str]
_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(_Wire)
