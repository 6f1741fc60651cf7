"""The books of a group: what was written is read again after a crash at any byte, and damage is never passed over."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from mycel.node.rounds.record_log import RecordLog
from mycel.node.rounds.vote_book import CertificateBook, VoteBook
from mycel.protocols.codec import round_codec
from mycel.protocols.errors import ConfigError, LocalProtocolError
from mycel.protocols.rounds import NOTHING, Certificate, Offer, Outcome, Plan, Vote, outcome_digest
from mycel.swarm.rounds.terms import genesis

RUN = bytes(range(32))
WHOSE = b"this group"
SIGNATURE = bytes(range(64))


def log_at(path: Path, whose: bytes = WHOSE) -> RecordLog:
    return RecordLog(path, "vote book", whose)


def written(path: Path, *records: bytes) -> list[int]:
    """The file's size after each record, the first one for none."""
    log = log_at(path)
    log.open()
    sizes = [path.stat().st_size]
    for record in records:
        log.add(record)
        sizes.append(path.stat().st_size)
    log.close()
    return sizes


def read(path: Path, whose: bytes = WHOSE) -> list[bytes]:
    log = log_at(path, whose)
    log.open()
    try:
        return list(log.records())
    finally:
        log.close()


def test_a_crash_at_any_byte_leaves_all_records_before_it(tmp_path: Path) -> None:
    records = [bytes([number]) * (20 + number) for number in range(1, 4)]
    sizes = written(tmp_path / "whole", *records)
    whole = (tmp_path / "whole").read_bytes()
    for n_bytes in range(len(whole) + 1):
        path = tmp_path / "cut"
        path.write_bytes(whole[:n_bytes])
        n_whole = sum(size <= n_bytes for size in sizes[1:])
        assert read(path) == records[:n_whole], n_bytes
        log = log_at(path)
        log.open()
        log.add(b"after the crash")
        log.close()
        assert read(path) == [*records[:n_whole], b"after the crash"]


def test_a_record_whose_bytes_never_came_is_as_if_it_had_not_been_written(tmp_path: Path) -> None:
    path = tmp_path / "log"
    sizes = written(path, b"one" * 30, b"two" * 30)
    data = bytearray(path.read_bytes())
    data[sizes[1] + 20 :] = bytes(len(data) - sizes[1] - 20)
    path.write_bytes(data)
    assert read(path) == [b"one" * 30]
    path.write_bytes(bytes(data[: sizes[1]]) + bytes(4096))
    assert read(path) == [b"one" * 30]


def test_any_flipped_bit_is_an_error_and_never_a_shorter_book(tmp_path: Path) -> None:
    path = tmp_path / "log"
    written(path, b"first record" * 3, b"second record" * 3)
    data = path.read_bytes()
    for place in range(len(data)):
        path.write_bytes(data[:place] + bytes([data[place] ^ 0x10]) + data[place + 1 :])
        with pytest.raises(ConfigError, match=r"is damaged at byte|is of another group"):
            read(path)


def test_a_book_of_another_group_or_in_use_is_refused_in_one_line(tmp_path: Path) -> None:
    path = tmp_path / "log"
    written(path, b"record")
    with pytest.raises(ConfigError, match="is of another group: use another folder"):
        read(path, b"another group")
    log = log_at(path)
    log.open()
    with pytest.raises(ConfigError, match="is in use by another process"):
        read(path)
    log.close()
    assert read(path) == [b"record"]
    with pytest.raises(ConfigError, match="cannot open the vote book"):
        read(tmp_path / "log" / "below")


def test_replacing_leaves_one_book_or_the_other(tmp_path: Path) -> None:
    path = tmp_path / "log"
    log = log_at(path)
    log.open()
    for number in range(5):
        log.add(bytes([number]) * 40)
    log.replace([b"kept"])
    log.add(b"new")
    assert list(log.records()) == [b"kept", b"new"]
    with pytest.raises(ConfigError, match="in use"):
        read(path)
    log.close()
    assert read(path) == [b"kept", b"new"]


# ---- votes


def vote(number: int, attempt: int = 0, value: bytes = NOTHING) -> Vote:
    return Vote(RUN, "run", number, attempt, "prevote", "peer", value, SIGNATURE)


def plan(number: int, offers: tuple[bytes, ...] = ()) -> Plan:
    return Plan(RUN, "run", number, 0, "peer", offers, SIGNATURE)


def offer(number: int, scalars: bytes = b"") -> Offer:
    return Offer(RUN, "run", number, "peer", NOTHING, NOTHING, 1, 0, (), (), scalars, SIGNATURE)


def book_at(path: Path) -> VoteBook:
    book = VoteBook(log_at(path))
    book.open()
    return book


def test_what_was_said_is_known_after_a_restart_and_cannot_be_contradicted(tmp_path: Path) -> None:
    book = book_at(tmp_path / "votes")
    said = [offer(3), plan(3), vote(3), vote(3, 1)]
    for entry in said:
        book.add(entry)
    book.add(vote(3))  # once more the same: nothing new
    book.close()
    book = book_at(tmp_path / "votes")
    assert book.of_round(3) == tuple(said)
    assert book.of_round(4) == ()
    for other in (offer(3, b"x"), plan(3, (NOTHING,)), vote(3, value=b"v" * 32)):
        with pytest.raises(LocalProtocolError, match="a second"):
            book.add(other)
    assert book.said(vote(3, value=b"v" * 32)) == vote(3)
    book.close()


def test_the_book_stays_small(tmp_path: Path) -> None:
    book = book_at(tmp_path / "votes")
    for number in range(1, 40):
        book.add(offer(number, bytes(8192)))
        book.enter(number)
    assert book.log.size_bytes < 400_000
    book.close()
    book = book_at(tmp_path / "votes")
    assert book.of_round(39) == (offer(39, bytes(8192)),)
    book.close()


def test_a_record_that_is_no_statement_is_an_error(tmp_path: Path) -> None:
    written(tmp_path / "votes", b"nonsense")
    with pytest.raises(ConfigError, match="cannot be read"):
        book_at(tmp_path / "votes")


# ---- certificates


def chain(n_rounds: int) -> list[Certificate]:
    last, certificates = genesis(RUN, "run", "peer"), []
    for number in range(1, n_rounds + 1):
        result = hashlib.sha256(bytes([number])).digest()
        last = Outcome(RUN, "run", number, outcome_digest(last), (), (), (result,), (1,), NOTHING, ("peer",), (0,))
        certificates.append(Certificate(last, 0, ("peer",), (SIGNATURE,)))
    return certificates


def certificates_at(path: Path) -> CertificateBook:
    book = CertificateBook(log_at(path), genesis(RUN, "run", "peer"))
    book.open()
    return book


def test_certificates_are_kept_in_order_without_a_gap(tmp_path: Path) -> None:
    made = chain(5)
    book = certificates_at(tmp_path / "certificates")
    assert (book.newest, book.read(1, 10), book.outcome(0)) == (0, (), genesis(RUN, "run", "peer"))
    book.add(made[:2])
    book.add(made[:3])  # two of them are here already
    book.add(made[4:])  # not the next one
    assert book.newest == 3
    book.close()
    book = certificates_at(tmp_path / "certificates")
    assert book.read(1, 10) == tuple(made[:3])
    assert book.read(2, 1) == (made[1],)
    assert book.read(0, 5) == ()
    assert book.outcome(3) == made[2].outcome
    book.close()


def test_a_chain_that_does_not_hold_is_an_error(tmp_path: Path) -> None:
    made, path = chain(3), tmp_path / "certificates"
    book = certificates_at(path)
    book.add(made[:1])
    book.log.add(b"".join(round_codec.encode(made[2])))
    book.close()
    with pytest.raises(ConfigError, match="has no certificate of round 2"):
        certificates_at(path)
