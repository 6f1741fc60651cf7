"""Rounds on disk until the state after them is: what no peer may have any more if all of them die at once.

Ring: shell (files).
"""

from __future__ import annotations

import hashlib
import os
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mycel.protocols.codec import round_codec
from mycel.protocols.errors import ConfigError, RemoteProtocolError
from mycel.protocols.rounds import MAX_GROUP, Offer, Outcome, offer_digest

_NUMBER = struct.Struct("<I")


@dataclass(frozen=True, slots=True)
class Shelf:
    """A file of each round in `folder`: its offers and coded results. Blocking calls."""

    folder: Path

    def put(self, outcome: Outcome, offers: Sequence[Offer], results: Sequence[memoryview]) -> None:
        """There for good when this returns. Raises ConfigError if the disk refuses it."""
        path = self._path(outcome.round)
        fresh = path.with_suffix(".new")
        encoded = [b"".join(round_codec.encode(offer)) for offer in offers]
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with fresh.open("wb") as file:
                file.write(_NUMBER.pack(len(encoded)))
                for offer in encoded:
                    file.write(_NUMBER.pack(len(offer)) + offer)
                for result in results:
                    file.write(result)
                file.flush()
                os.fsync(file.fileno())
            fresh.replace(path)
        except OSError as error:
            raise ConfigError(f"cannot write the round {path}: {error.strerror}") from None

    def take(self, outcome: Outcome) -> tuple[tuple[Offer, ...], tuple[memoryview, ...]] | None:
        """Offers and results of a round, if they are here and whole: both are believed by their hashes."""
        try:
            data = memoryview(self._path(outcome.round).read_bytes())
        except OSError:
            return None
        try:
            offers, at = _offers(data)
        except (struct.error, RemoteProtocolError):
            return None
        results = []
        for size_bytes in outcome.sizes:
            results.append(data[at : at + size_bytes])
            at += size_bytes
        is_whole = at == len(data) and tuple(map(offer_digest, offers)) == outcome.offers
        if not is_whole or tuple(hashlib.sha256(result).digest() for result in results) != outcome.results:
            return None
        return offers, tuple(results)

    def put_result(self, number: int, digest: bytes, result: bytes | memoryview) -> None:
        """What this peer computed, before it says so: a vote for it may outlive everybody who has it in memory.

        It outlives the process. Not synced, it does not outlive power failures on all machines at once.
        """
        path = self._result_path(number, digest)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            fresh = path.with_suffix(".new")
            fresh.write_bytes(result)
            fresh.replace(path)
        except OSError as error:
            raise ConfigError(f"cannot write the result {path}: {error.strerror}") from None

    def result(self, number: int, digest: bytes) -> bytes | None:
        """What `put_result` wrote, if it is here and whole."""
        try:
            data = self._result_path(number, digest).read_bytes()
        except OSError:
            return None
        return data if hashlib.sha256(data).digest() == digest else None

    def drop(self, number: int) -> None:
        """Rounds up to this one are not needed any more."""
        for path in (*self.folder.glob("*.round"), *self.folder.glob("*.result")):
            of_round = path.stem.partition("-")[0]
            if of_round.isdecimal() and int(of_round) <= number:
                path.unlink(missing_ok=True)

    def _path(self, number: int) -> Path:
        return self.folder / f"{number:09d}.round"

    def _result_path(self, number: int, digest: bytes) -> Path:
        return self.folder / f"{number:09d}-{digest.hex()}.result"


def _offers(data: memoryview) -> tuple[tuple[Offer, ...], int]:
    (count,), at, offers = _NUMBER.unpack_from(data), _NUMBER.size, []
    if count > MAX_GROUP:
        raise RemoteProtocolError("more offers than a round has")
    for _ in range(count):
        (size_bytes,) = _NUMBER.unpack_from(data, at)
        at += _NUMBER.size
        offer = round_codec.decode_only(data[at : at + size_bytes])
        if not isinstance(offer, Offer):
            raise RemoteProtocolError("something else than an offer")
        offers.append(offer)
        at += size_bytes
    return tuple(offers), at
