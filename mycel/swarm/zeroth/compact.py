"""Shorter than the log: the state itself, or a sum for each direction of a pool, and where in the log they stand.

A checkpoint is all that a reader of a log must know to read on: the rule, the close of a round, and what its link
covers beside the lines. Whoever trusts the link (it is what the next certificate is about) need not trust who sent the
rest:
the link must follow from the checkpoint, and the state's hash in it from the snapshot or the sums.

    checkpoint  rule 103 | close without its kind 104 | history 32 | epoch beacon 32 | peers u16
                | for each peer: key 32, last 32, joined u32, banned u8
    snapshot    width u8 | parameters u64 | each parameter in so many bytes, two's complement
    sums        first round u32 | last round u32 | epoch beacon 32 | K u32 | K numbers, as below

A number is written in groups of seven bits, the lowest first and 0x80 set in all but the last; n stands for n/2 if it
is even and for -(n + 1)/2 if it is odd. All are little endian.

Ring: pure.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mycel.protocols.errors import LocalProtocolError, RemoteProtocolError, VerificationError
from mycel.swarm.zeroth.chain import NO_HASH, Member, link_of, roster_of
from mycel.swarm.zeroth.lattice import MAX_STEP, Lattice, RunPieces
from mycel.swarm.zeroth.lines import Close, parse
from mycel.swarm.zeroth.log import Log
from mycel.swarm.zeroth.replay import State
from mycel.swarm.zeroth.rule import HEAD_BYTES, Rule
from mycel.swarm.zeroth.seeds import pool_seed

__all__ = [
    "Sums",
    "apply_sums",
    "compact",
    "open_checkpoint",
    "pack_checkpoint",
    "pack_state",
    "sums_of_epochs",
    "unpack_state",
]

_CLOSE_BYTES = 4 + 4 + 32 + 32 + 32
_MEMBER = struct.Struct("<32s32sIB")
_FIXED = HEAD_BYTES + _CLOSE_BYTES + 32 + 32 + 2
_STATE = struct.Struct("<BQ")
_SUMS = struct.Struct("<II32sI")
_MAX_NUMBER_BYTES = 9  # 63 bits: a sum is no larger than the lattice


# ---------------------------------------------------------------------------------------------------------- checkpoints


def pack_checkpoint(log: Log) -> bytes:
    """Where the log stands. Raises LocalProtocolError before its first close, and after the first line of a round."""
    if not log.between_rounds or log.last_close is None:
        raise LocalProtocolError("a checkpoint is taken between two rounds")
    members = [_MEMBER.pack(m.key, m.last, m.joined, m.banned) for m in log.members]
    head = log.rule.pack() + log.last_close.pack()[1:] + log.history + log.epoch_beacon
    return head + len(members).to_bytes(2, "little") + b"".join(members)


def open_checkpoint(data: bytes, link: bytes | None = None, source: str = "") -> Log:
    """A log that goes on where the checkpoint stands; `link` is the one that the round is known to have closed with.

    Raises RemoteProtocolError for what is no checkpoint, VerificationError for one of another link.
    """
    try:
        rule = Rule.unpack(data[:HEAD_BYTES])
    except ValueError as error:
        raise RemoteProtocolError(f"a checkpoint is refused: {error}", source) from None
    rest = data[HEAD_BYTES:]
    n_members = int.from_bytes(data[_FIXED - 2 : _FIXED], "little")
    if len(data) != _FIXED + n_members * _MEMBER.size:
        raise RemoteProtocolError(f"a checkpoint of {n_members} peers in {len(data)} bytes", source)
    close, _ = parse(memoryview(bytes([Close.KIND]) + rest[:_CLOSE_BYTES]))
    assert isinstance(close, Close)
    history, epoch_beacon = rest[_CLOSE_BYTES : _CLOSE_BYTES + 32], rest[_CLOSE_BYTES + 32 : _CLOSE_BYTES + 64]
    members = []
    for key, last, joined, banned in _MEMBER.iter_unpack(data[_FIXED:]):
        members.append(Member(key, last, joined, bool(banned)))
    roster = roster_of(epoch_beacon, members, {number for number, member in enumerate(members) if member.banned})
    if link_of(rule.run, history, roster, close) != close.link or link not in (None, close.link):
        raise VerificationError(source, "the checkpoint is not that of its link", data)
    log = Log(rule, source)
    log.resume(members, close, history, epoch_beacon)
    return log


# ------------------------------------------------------------------------------------------------------------ snapshots


def pack_state(theta_P: Lattice) -> bytes:
    """In as few bytes a parameter as the largest needs: 4 for all within +-2."""
    width = max(1, (max(int(theta_P.max(initial=0)), ~int(theta_P.min(initial=0))).bit_length() + 8) // 8)
    raw = np.ascontiguousarray(theta_P, "<i8").view(np.uint8).reshape(-1, 8)
    return _STATE.pack(width, theta_P.size) + raw[:, :width].tobytes()


def unpack_state(data: bytes, rule: Rule, state: bytes, source: str = "") -> State:
    """The parameters whose hash is `state`. Raises RemoteProtocolError or VerificationError."""
    if len(data) < _STATE.size:
        raise RemoteProtocolError(f"a snapshot of {len(data)} bytes", source)
    width, n_elements = _STATE.unpack_from(data)
    if n_elements != rule.n_elements or not 1 <= width <= 8 or len(data) != _STATE.size + width * n_elements:
        raise RemoteProtocolError(f"a snapshot of {n_elements} parameters in {len(data)} bytes", source)
    raw = np.empty((n_elements, 8), np.uint8)
    raw[:, :width] = np.frombuffer(data, np.uint8, offset=_STATE.size).reshape(n_elements, width)
    raw[:, width:] = np.where(raw[:, width - 1 : width] & 0x80, 0xFF, 0)  # the sign
    found = State(raw.view("<i8").reshape(n_elements))
    if found.hash() != state:
        raise VerificationError(source, "the snapshot is not the state of its hash")
    return found


# ----------------------------------------------------------------------------------------------------------------- sums


@dataclass(frozen=True, slots=True)
class Sums:
    """What the rounds [first, last], all of one epoch, add up to along each direction of the epoch's pool."""

    first: int
    last: int
    epoch_beacon: bytes
    steps: tuple[int, ...]

    def pack(self) -> bytes:
        head = _SUMS.pack(self.first, self.last, self.epoch_beacon, len(self.steps))
        return head + b"".join(_number(step) for step in self.steps)

    @classmethod
    def unpack(cls, data: bytes, rule: Rule, source: str = "") -> Sums:
        """Raises RemoteProtocolError for all that is no such thing for this rule."""
        if len(data) < _SUMS.size:
            raise RemoteProtocolError(f"sums in {len(data)} bytes", source)
        first, last, beacon, count = _SUMS.unpack_from(data)
        if not rule.pool or count != rule.pool or first > last or first // rule.epoch != last // rule.epoch:
            raise RemoteProtocolError(f"{count} sums of the rounds {first} to {last} are not those of an epoch", source)
        return cls(first, last, beacon, _numbers(data[_SUMS.size :], count, source))


def compact(log: Log, first: int, last: int) -> Sums:
    """The sums of the closed rounds [first, last]. Raises LocalProtocolError unless one epoch of the log has them."""
    size, start = log.rule.pool, log.rounds[0].number if log.rounds else 0
    if not size or not start <= first <= last < log.round or first // log.rule.epoch != last // log.rule.epoch:
        raise LocalProtocolError(f"the rounds {first} to {last} have no sums")
    chosen = log.rounds[first - start : last + 1 - start]
    totals: dict[bytes, int] = {}
    for closed in chosen:
        for seed, step in log.updates(closed):
            totals[seed] = totals.get(seed, 0) + step
    beacon = chosen[0].epoch_beacon
    return Sums(first, last, beacon, tuple(totals.get(pool_seed(log.run, beacon, k), 0) for k in range(size)))


def apply_sums(
    state: State, rule: Rule, sums: Sums, after: bytes, source: str = "", run_pieces: RunPieces = map
) -> None:
    """From the state before the first of these rounds to the one after the last, whose hash is `after`.

    Raises VerificationError where they lead elsewhere; the state is then what it was.
    """
    updates = [(pool_seed(rule.run, sums.epoch_beacon, k), step) for k, step in enumerate(sums.steps)]
    try:
        state.apply(updates, run_pieces)
    except OverflowError as error:
        raise VerificationError(source, str(error)) from None
    if after == NO_HASH or state.hash() != after:
        state.take_back(updates, run_pieces)
        raise VerificationError(source, f"the sums of the rounds {sums.first} to {sums.last} lead to another state")


def _number(n: int) -> bytes:
    rest = 2 * n if n >= 0 else -2 * n - 1
    out = bytearray()
    while rest >= 0x80:
        out.append(rest & 0x7F | 0x80)
        rest >>= 7
    return bytes([*out, rest])


def _numbers(data: bytes, count: int, source: str) -> tuple[int, ...]:
    found: list[int] = []
    at = 0
    for _ in range(count):
        end = next((i + 1 for i in range(at, min(at + _MAX_NUMBER_BYTES, len(data))) if data[i] < 0x80), 0)
        raw = sum((byte & 0x7F) << 7 * i for i, byte in enumerate(data[at:end]))
        if not end or (end - at > 1 and data[end - 1] == 0) or raw > 2 * MAX_STEP:  # one form for each number
            raise RemoteProtocolError("a sum is no number", source)
        found.append(raw >> 1 if raw % 2 == 0 else -(raw + 1 >> 1))
        at = end
    if at != len(data):
        raise RemoteProtocolError(f"{len(data) - at} bytes too many after the sums", source)
    return tuple(found)


def sums_of_epochs(log: Log) -> Sequence[Sums]:
    """The sums of all closed rounds that the log holds, an epoch each."""
    found: list[Sums] = []
    rounds = [closed.number for closed in log.rounds]
    while rounds:
        last = min(rounds[0] - rounds[0] % log.rule.epoch + log.rule.epoch - 1, rounds[-1])
        found.append(compact(log, rounds[0], last))
        rounds = rounds[last + 1 - rounds[0] :]
    return found
