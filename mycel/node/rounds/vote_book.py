"""What a member has signed and must not contradict, and the certificates of all rounds: on disk before it is relied on.

Ring: shell (files).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import trio

from mycel.node.rounds.record_log import RecordLog
from mycel.protocols.codec import round_codec
from mycel.protocols.errors import ConfigError, LocalProtocolError, RemoteProtocolError
from mycel.protocols.ports import Compute
from mycel.protocols.rounds import (
    Certificate,
    Offer,
    Outcome,
    Plan,
    Proposal,
    RoundMessage,
    Vote,
    outcome_digest,
)

# Past rounds' votes are dropped when the book has grown so large.
_COMPACT_BYTES = 256 * 1024

Signed = Vote | Offer | Plan | Proposal


@dataclass(eq=False, slots=True)
class VoteBook:
    """One group's: its votes, and what it may say once of a round or an attempt. Blocking calls, but for `said`."""

    log: RecordLog
    _entries: dict[tuple[object, ...], Signed] = field(default_factory=dict, init=False)

    def open(self) -> None:
        """Raises ConfigError for a book that cannot be read: going on with an empty one could break a promise."""
        self.log.open()
        try:
            self._read()
        except ConfigError:
            self.close()
            raise

    def _read(self) -> None:
        for record in self.log.records():
            message = _decoded(self.log, record)
            if not isinstance(message, Signed):
                raise ConfigError(f"the {self.log.what} {self.log.path} holds a {type(message).__name__}")
            self._entries.setdefault(_slot(message), message)

    def close(self) -> None:
        self.log.close()

    def add(self, entry: Signed) -> None:
        """On disk when this returns. Raises LocalProtocolError for what contradicts an entry: a lie of ours."""
        if (said := self.said(entry)) is not None:
            if said != entry:
                raise LocalProtocolError(f"a second {type(entry).__name__} of round {round_of(entry)} was to be signed")
            return
        self.log.add(_encoded(entry))
        self._entries[_slot(entry)] = entry

    def said(self, statement: Signed) -> Signed | None:
        """What stands already where `statement` would: of an offer's round, of a plan's, proposal's, vote's attempt."""
        return self._entries.get(_slot(statement))

    def enter(self, number: int) -> None:
        """Rounds before this one are decided, and need not be remembered."""
        self._entries = {slot: entry for slot, entry in self._entries.items() if round_of(entry) >= number}
        if self.log.size_bytes > _COMPACT_BYTES:
            self.log.replace([_encoded(entry) for entry in self._entries.values()])

    def of_round(self, number: int) -> tuple[Signed, ...]:
        """In the order in which they were made."""
        return tuple(entry for entry in self._entries.values() if round_of(entry) == number)


@dataclass(eq=False, slots=True)
class CertificateBook:
    """The certificates of rounds 1, 2, ... without a gap. Blocking calls."""

    log: RecordLog
    genesis: Outcome

    def open(self) -> None:
        """Raises ConfigError if the book is damaged or its rounds do not follow each other."""
        self.log.open()
        try:
            self._read()
        except ConfigError:
            self.close()
            raise

    def _read(self) -> None:
        last = self.genesis
        for record in self.log.records():
            certificate = self._certificate(record)
            if certificate.outcome.round != last.round + 1 or certificate.outcome.last != outcome_digest(last):
                raise ConfigError(f"the {self.log.what} {self.log.path} has no certificate of round {last.round + 1}")
            last = certificate.outcome

    def close(self) -> None:
        self.log.close()

    @property
    def newest(self) -> int:
        """The last round that has a certificate here; 0 if none has."""
        return len(self.log)

    def add(self, certificates: Sequence[Certificate]) -> None:
        """Those that are here already are passed over."""
        for certificate in certificates:
            if certificate.outcome.round == self.newest + 1:
                self.log.add(_encoded(certificate))

    def read(self, start: int, count: int) -> tuple[Certificate, ...]:
        """Of `count` rounds from `start` on, as far as there are any."""
        if start < 1:
            return ()
        return tuple(self._certificate(record) for record in self.log.records(start - 1, start - 1 + count))

    def outcome(self, number: int) -> Outcome:
        """Of a round that is here; round 0 is the genesis."""
        return self.genesis if number == 0 else self.read(number, 1)[0].outcome

    def _certificate(self, record: bytes) -> Certificate:
        message = _decoded(self.log, record)
        if not isinstance(message, Certificate):
            raise ConfigError(f"the {self.log.what} {self.log.path} holds a {type(message).__name__}")
        return message


@dataclass(eq=False, slots=True)
class Books:
    """Both books of a group; `disk` is where the blocking calls run."""

    votes: VoteBook
    certificates: CertificateBook
    disk: Compute
    _turn: trio.Lock = field(default_factory=trio.Lock, init=False)

    @classmethod
    def of(cls, folder: Path, genesis: Outcome, disk: Compute) -> Books:
        """In `folder`, not opened yet."""
        whose = b"mycel/rounds/1\0" + outcome_digest(genesis)
        votes = RecordLog(folder / "votes", "vote book", whose)
        certificates = RecordLog(folder / "certificates", "certificate book", whose)
        return cls(VoteBook(votes), CertificateBook(certificates, genesis), disk)

    async def write(self, job: Callable[[], None]) -> None:
        """One thing after the other."""
        async with self._turn:
            await self.disk.run(job)

    async def open(self) -> None:
        """Raises ConfigError if one of them cannot be used."""
        try:
            await self.write(self.votes.open)
            await self.write(self.certificates.open)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        self.votes.close()
        self.certificates.close()


def round_of(statement: Signed) -> int:
    return statement.outcome.round if isinstance(statement, Proposal) else statement.round


def _slot(statement: Signed) -> tuple[object, ...]:
    attempt = -1 if isinstance(statement, Offer) else statement.attempt
    kind = statement.kind if isinstance(statement, Vote) else ""
    return type(statement), round_of(statement), attempt, kind


def _encoded(message: RoundMessage) -> bytes:
    return b"".join(round_codec.encode(message))


def _decoded(log: RecordLog, record: bytes) -> RoundMessage:
    try:
        return round_codec.decode_only(record)
    except RemoteProtocolError as error:
        raise ConfigError(f"the {log.what} {log.path} cannot be read: {error.reason}") from None
