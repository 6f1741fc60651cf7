"""The log of a run: who joined, what each measured in which round, and the link that every round closes with.

Each entry is signed over the link of the round before and over its writer's own previous entry; each link covers the
one before, all lines of its round in canonical order (joins, entries and bans, each by the peer's number), the list of
peers, the state's hash and the round's certificate (chain.py). So every line can be checked when it is read, with what
stands above it: whatever bit is turned, the reader stops at that line. Who signs the certificate, and that there is one
a round, is the rounds' business; 32 zero bytes stand where a log has none.

A `Log` is that of a writer and of a reader alike. It knows no parameters: replay.py makes the states.

Ring: pure.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from mycel.protocols.errors import LocalProtocolError, RemoteProtocolError
from mycel.security.signatures import Signer, peer_id_of, public_key_of, verify
from mycel.swarm.zeroth.byte import ladder
from mycel.swarm.zeroth.chain import NO_HASH, BadLine, ForgedLine, Member, Part, Round, history_of, link_of, roster_of
from mycel.swarm.zeroth.lattice import Update
from mycel.swarm.zeroth.lines import (
    MAX_CODES,
    MAX_PEERS,
    TAG_BYTES,
    Ban,
    Close,
    Entry,
    Head,
    Join,
    Line,
    ban_text,
    entry_text,
    join_text,
    parse,
    text_hash,
)
from mycel.swarm.zeroth.rule import Rule
from mycel.swarm.zeroth.seeds import beacon_of, pool_index, pool_seed, seed_of

__all__ = ["Log", "all_updates"]


@dataclass(slots=True)
class _Open:
    """The round that goes on: its lines by (kind, peer), how many samples each peer has sent, who is banned with it."""

    lines: list[tuple[int, int, bytes]] = field(default_factory=list)
    parts: list[Part] = field(default_factory=list)
    n_samples: dict[int, int] = field(default_factory=dict)
    bans: set[int] = field(default_factory=set)

    def in_order(self) -> list[bytes]:
        return [line for _, _, line in sorted(self.lines, key=lambda line: line[:2])]  # stable: a peer's own order

    def parts_in_order(self) -> tuple[Part, ...]:
        return tuple(sorted(self.parts, key=lambda part: part.peer))


class Log:
    """See the module. `source` is the peer whom errors blame: who sent the lines, "" for a file."""

    def __init__(self, rule: Rule, source: str = "") -> None:
        self.rule = rule
        self.run = rule.run
        self.source = source
        self.members: list[Member] = []
        self.rounds: list[Round] = []
        self.round = 0
        self.link = self.run
        self.history = NO_HASH
        self.last_close: Close | None = None
        self.epoch_beacon = NO_HASH
        self._lines: list[bytes] = [Head(rule).pack()]
        self._numbers: dict[bytes, int] = {}
        self._open = _Open()
        self.beacon = NO_HASH
        self._begin_round()

    # ------------------------------------------------------------------------------------------------ reading

    @classmethod
    def read(cls, data: bytes, run: bytes | None = None, source: str = "") -> Log:
        """A whole log. Raises BadLine or ForgedLine, which name the line; `run` is the id it is expected to have."""
        view = memoryview(data)
        head, size = _parsed(view, 1, source)
        if not isinstance(head, Head):
            raise BadLine("a log begins with its head", 1, source)
        if run is not None and head.rule.run != run:
            raise ForgedLine(f"this is run {head.rule.run.hex()[:16]}, not {run.hex()[:16]}", 1, source)
        log = cls(head.rule, source)
        log.extend(view[size:])
        return log

    def extend(self, data: bytes | memoryview) -> None:
        """More lines. Raises as `read`; the lines before the one it names are right, and are kept."""
        view = memoryview(data)
        while view:
            line, size = _parsed(view, self.n_lines + 1, self.source)
            self.append(line)
            view = view[size:]

    def pack(self, first_line: int = 1) -> bytes:
        """The lines from this one on, those of the round that goes on included."""
        return b"".join([*self._lines, *self._open.in_order()][first_line - 1 :])

    @property
    def between_rounds(self) -> bool:
        """Whether the round has no line yet."""
        return not self._open.lines

    @property
    def n_lines(self) -> int:
        return len(self._lines) + len(self._open.lines)

    # ------------------------------------------------------------------------------------------------ one line more

    def append(self, line: Line) -> None:
        """Checks a line against all before it. Raises BadLine or ForgedLine, and then nothing has changed."""
        match line:
            case Join():
                self._append_join(line)
            case Entry():
                self._append_entry(line)
            case Ban():
                self._append_ban(line)
            case Close():
                self._append_close(line)
            case Head():
                raise self._bad("a second head")

    def _append_join(self, line: Join) -> None:
        if line.peer != len(self.members) or line.peer > MAX_PEERS:
            raise self._bad(f"peer {line.peer} joins as number {len(self.members)}")
        if line.key in self._numbers:
            raise self._bad(f"peer {line.peer} is in the list already")
        text = join_text(self.run, self.round, line.peer, line.key)
        self._check(line.key, line.signature, text, line)
        self._numbers[line.key] = line.peer
        self.members.append(Member(line.key, text_hash(text), self.round))
        self._open.lines.append((line.KIND, line.peer, line.pack()))

    def _append_entry(self, line: Entry) -> None:
        member = self._member(line.peer)
        first = self._open.n_samples.get(line.peer, 0)
        if line.round != self.round:
            raise self._bad(f"an entry of round {line.round} in round {self.round}")
        if member.joined >= self.round or member.banned:
            raise self._bad(f"peer {line.peer} {'is banned' if member.banned else 'takes part from the next round on'}")
        if first + len(line.codes) > self.rule.samples:
            raise self._bad(f"peer {line.peer} sends more than {self.rule.samples} updates in a round")
        if line.base_tag != self.link[:TAG_BYTES]:
            raise self._bad(f"peer {line.peer} builds on another state")
        if line.previous_tag != member.last[:TAG_BYTES]:
            raise self._bad(f"this does not follow on what peer {line.peer} sent before")
        text = entry_text(self.run, member.key, self.link, member.last, first, line)
        self._check(member.key, line.signature, text, line)
        member.last = text_hash(text)
        self._open.n_samples[line.peer] = first + len(line.codes)
        self._open.parts.append(Part(line.peer, first, line.codes))
        self._open.lines.append((line.KIND, line.peer, line.pack()))

    def _append_ban(self, line: Ban) -> None:
        member, auditor = self._member(line.peer), self._member(line.auditor)
        if member.banned or auditor.banned or line.peer in self._open.bans:
            raise self._bad("one of the two is banned already")
        said = self.code_of(line.peer, line.round, line.sample)
        if said is None:
            raise self._bad(f"peer {line.peer} sent no sample {line.sample} in round {line.round}")
        if abs(ladder(said) - ladder(line.code)) <= 1:
            raise self._bad("two codes as near as this are no lie")
        self._check(auditor.key, line.signature, ban_text(self.run, auditor.key, member.key, line), line)
        self._open.bans.add(line.peer)
        self._open.lines.append((line.KIND, line.peer, line.pack()))

    def _append_close(self, line: Close) -> None:
        if line.round != self.round:
            raise self._bad(f"round {line.round} closes in round {self.round}")
        stated = line.state != NO_HASH
        if stated != (line.round % self.rule.hash_every == 0):
            raise self._bad("a state's hash where the rule has none" if stated else "the state's hash is missing")
        history, expected = self._close(line.state, line.certificate)
        if line != expected:
            raise self._forged("the link is not that of the lines before it", line)
        self._accept(line, history)

    # ------------------------------------------------------------------------------------------------ our own lines

    def make_join(self, signer: Signer) -> Join:
        key = _key_of(signer)
        peer = len(self.members)
        return Join(peer, key, signer.sign(join_text(self.run, self.round, peer, key)))

    def make_entry(self, signer: Signer, codes: Sequence[int]) -> Entry:
        """Our next updates of this round, 1 to 256 of them. Raises LocalProtocolError if we are not in the list."""
        peer = self.number_of(signer)
        if not 1 <= len(codes) <= MAX_CODES:
            raise LocalProtocolError(f"an entry has 1 to {MAX_CODES} updates, not {len(codes)}")
        member = self.members[peer]
        first = self._open.n_samples.get(peer, 0)
        base, previous = self.link[:TAG_BYTES], member.last[:TAG_BYTES]
        entry = Entry(peer, self.round, base, previous, bytes(codes), bytes(64))
        signature = signer.sign(entry_text(self.run, member.key, self.link, member.last, first, entry))
        return Entry(peer, self.round, base, previous, bytes(codes), signature)

    def make_ban(self, signer: Signer, peer: int, round_: int, sample: int, code: int) -> Ban:
        auditor = self.number_of(signer)
        ban = Ban(peer, auditor, round_, sample, code, bytes(64))
        text = ban_text(self.run, self.members[auditor].key, self.members[peer].key, ban)
        return Ban(peer, auditor, round_, sample, code, signer.sign(text))

    def close_round(self, state: bytes, certificate: bytes = NO_HASH) -> Close:
        """Closes the round; `state` is the parameters' hash after `updates()`, left out where the rule says so."""
        if len(state) != 32 or len(certificate) != 32 or state == NO_HASH:
            raise LocalProtocolError("a state's hash and a certificate have 32 bytes each")
        history, line = self._close(NO_HASH if self.round % self.rule.hash_every else state, certificate)
        self._accept(line, history)
        return line

    # ------------------------------------------------------------------------------------------------ what it means

    def updates(self, closed: Round | None = None) -> list[Update]:
        """The seeds and steps of a closed round, or of the one that goes on, if it closed now."""
        parts = closed.parts if closed else self._open.parts_in_order()
        seeds: list[bytes] = []
        for part in parts:
            samples = range(part.first_sample, part.first_sample + len(part.codes))
            seeds += self.seeds(part.peer, samples, closed)
        steps = self.rule.steps(b"".join(part.codes for part in parts))
        return list(zip(self.directions(seeds, closed), steps, strict=True))

    def seeds(self, peer: int, samples: range, closed: Round | None = None) -> list[bytes]:
        """The seeds of a peer's samples: of the direction, and `batch_of` takes them for the data."""
        beacon = closed.beacon if closed else self.beacon
        key = self._member(peer).key
        return [seed_of(self.run, beacon, key, sample) for sample in samples]

    def directions(self, seeds: Sequence[bytes], closed: Round | None = None) -> list[bytes]:
        """What stands for each seed in the generator: itself, or one of the epoch's pool."""
        size = self.rule.pool
        if not size:
            return list(seeds)
        beacon = closed.epoch_beacon if closed else self.epoch_beacon
        return [pool_seed(self.run, beacon, pool_index(seed, size)) for seed in seeds]

    def code_of(self, peer: int, round_: int, sample: int) -> int | None:
        """What a peer said of a sample in a closed round that this log holds."""
        first = self.rounds[0].number if self.rounds else self.round
        if not first <= round_ < self.round:
            return None
        parts = self.rounds[round_ - first].parts
        mine = (p for p in parts if p.peer == peer and p.first_sample <= sample < p.first_sample + len(p.codes))
        return next((part.codes[sample - part.first_sample] for part in mine), None)

    def number_of(self, signer: Signer) -> int:
        """A peer's number in the list. Raises LocalProtocolError for one that has not joined."""
        peer = self._numbers.get(_key_of(signer))
        if peer is None:
            raise LocalProtocolError("this peer is not in the log's list")
        return peer

    # ------------------------------------------------------------------------------------------------ inside

    def _close(self, state: bytes, certificate: bytes) -> tuple[bytes, Close]:
        """The history and the line with which the round closes now."""
        history = history_of(self.link, self._open.in_order())
        banned = {number for number, member in enumerate(self.members) if member.banned} | self._open.bans
        roster = roster_of(self.epoch_beacon, self.members, banned)
        n_updates = sum(self._open.n_samples.values())
        close = Close(self.round, n_updates, state, certificate, NO_HASH)
        link = link_of(self.run, history, roster, close)
        return history, Close(self.round, n_updates, state, certificate, link)

    def _accept(self, line: Close, history: bytes) -> None:
        for peer in self._open.bans:
            self.members[peer].banned = True
        self._lines += [*self._open.in_order(), line.pack()]
        parts = self._open.parts_in_order()
        self.rounds.append(Round(self.round, self.beacon, self.epoch_beacon, parts, line, len(self._lines)))
        self.link, self.history, self.last_close = line.link, history, line
        self.round += 1
        self._begin_round()

    def _begin_round(self) -> None:
        self._open = _Open()
        self.beacon = beacon_of(self.run, self.link)
        if self.rule.pool and self.round % self.rule.epoch == 0:
            self.epoch_beacon = self.beacon

    def resume(self, members: list[Member], close: Close, history: bytes, epoch_beacon: bytes) -> None:
        """Stands at the close of a round instead of at the beginning; compact.py has checked the link."""
        self.members, self.link, self.history, self.round = members, close.link, history, close.round + 1
        self.last_close = close
        self._numbers = {member.key: number for number, member in enumerate(members)}
        self.epoch_beacon = epoch_beacon
        self._begin_round()

    def _member(self, peer: int) -> Member:
        if peer >= len(self.members):
            raise self._bad(f"there is no peer {peer}")
        return self.members[peer]

    def _check(self, key: bytes, signature: bytes, text: bytes, line: Line) -> None:
        if not verify(peer_id_of(key), signature, text):
            raise self._forged("the signature is not the peer's", line)

    def _bad(self, reason: str) -> BadLine:
        return BadLine(reason, self.n_lines + 1, self.source)

    def _forged(self, reason: str, line: Line) -> ForgedLine:
        return ForgedLine(reason, self.n_lines + 1, self.source, line.pack())


def _parsed(view: memoryview, line: int, source: str) -> tuple[Line, int]:
    try:
        return parse(view)
    except RemoteProtocolError as error:
        raise BadLine(error.reason, line, source) from None


def _key_of(signer: Signer) -> bytes:
    key = public_key_of(signer.peer_id)
    if key is None:
        raise LocalProtocolError("only Ed25519 peers write a log")
    return key


def all_updates(log: Log) -> Iterator[Update]:
    """Every update of the closed rounds."""
    for closed in log.rounds:
        yield from log.updates(closed)
