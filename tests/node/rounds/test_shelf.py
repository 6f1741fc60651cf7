"""Rounds on disk: what comes back is what was put, or nothing."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from mycel.node.rounds.shelf import Shelf
from mycel.protocols.errors import ConfigError
from mycel.protocols.rounds import NOTHING, Offer, Outcome, offer_digest

RUN = bytes(range(32))
OFFERS = tuple(
    Offer(RUN, "run", 7, peer, NOTHING, NOTHING, 1, 0, (NOTHING,), (4,), scalars, bytes(64))
    for peer, scalars in (("a", b""), ("b", b"scalars"))
)
RESULTS = (memoryview(b"first shard"), memoryview(b""), memoryview(b"third"))


def outcome(number: int = 7) -> Outcome:
    digests = tuple(hashlib.sha256(result).digest() for result in RESULTS)
    offers = tuple(map(offer_digest, OFFERS))
    sizes = tuple(map(len, RESULTS))
    return Outcome(RUN, "run", number, NOTHING, offers, ("a", "b"), digests, sizes, NOTHING, ("a", "b"), (0, 0))


def test_a_round_comes_back_until_it_is_dropped(tmp_path: Path) -> None:
    shelf = Shelf(tmp_path / "rounds")
    assert shelf.take(outcome()) is None
    shelf.put(outcome(), OFFERS, RESULTS)
    shelf.put(outcome(8), OFFERS, RESULTS)
    assert shelf.take(outcome()) == (OFFERS, RESULTS)
    shelf.drop(7)
    assert shelf.take(outcome()) is None
    assert shelf.take(outcome(8)) == (OFFERS, RESULTS)


def test_a_damaged_round_is_as_good_as_none(tmp_path: Path) -> None:
    shelf = Shelf(tmp_path)
    shelf.put(outcome(), OFFERS, RESULTS)
    [path] = tmp_path.iterdir()
    data = path.read_bytes()
    for place in range(0, len(data), 9):
        path.write_bytes(data[:place])
        assert shelf.take(outcome()) is None
        path.write_bytes(data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])
        found = shelf.take(outcome())
        # A signature is no part of what names an offer.
        assert found is None or (tuple(map(offer_digest, found[0])), found[1]) == (outcome().offers, RESULTS)
    path.write_bytes(data + b"x")
    assert shelf.take(outcome()) is None


def test_a_disk_that_refuses_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "rounds").write_bytes(b"a file")
    with pytest.raises(ConfigError, match="cannot write the round"):
        Shelf(tmp_path / "rounds").put(outcome(), OFFERS, RESULTS)
