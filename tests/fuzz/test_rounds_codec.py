"""What is said in rounds against changed bytes, and the machine that hears it: our error or nothing, in little memory.

A failure prints the seed and the case; `FUZZ_SEED` runs the same search again.
"""

from __future__ import annotations

import hashlib
import os
import time
import tracemalloc
from dataclasses import replace
from itertools import count
from random import Random

import pytest

from mycel.protocols.codec import Codec, blob_codec, round_codec
from mycel.protocols.errors import RemoteProtocolError
from mycel.protocols.rounds import (
    NOTHING,
    Blob,
    Certificate,
    Certificates,
    Claim,
    GetBlob,
    GetCertificates,
    GetOffers,
    Held,
    Joining,
    NotHere,
    Offer,
    Offers,
    Outcome,
    Plan,
    Proposal,
    Request,
    RoundMessage,
    Vote,
    offer_digest,
    outcome_digest,
    vote_part,
)
from mycel.protocols.wire import TensorHeader, WireTensor
from mycel.security.identity import Identity
from mycel.swarm.rounds.actions import Action, Collect, Commit, Decide, Reduce
from mycel.swarm.rounds.machine import RoundMachine, make_offer
from mycel.swarm.rounds.statements import UNSIGNED, Signed, sign
from mycel.swarm.rounds.terms import GroupTerms
from tests.fuzz.mutations import mutated

MIN_CASES = 1500
SLOWEST_S = 0.25  # of processor time
BASE_BYTES, BYTES_PER_BYTE = 200_000, 64
MEASURED_SHARE = 20
# All that a machine may keep of three liars who say whatever they like in one round.
MOST_KEPT_BYTES = 8 << 20

RUN, STATE = bytes(range(32)), b"s" * 32
TERMS = GroupTerms(1 << 15, patience_s=20.0, attempt_s=2.0, longest_grace_s=4.0)
PEERS = sorted((Identity.from_seed(bytes([number]) * 32) for number in range(5)), key=lambda peer: peer.peer_id)
STRANGER = PEERS.pop()
NAMES = tuple(peer.peer_id for peer in PEERS)
SIGNERS = {peer.peer_id: peer for peer in (*PEERS, STRANGER)}
FIRST = Outcome(RUN, "run", 0, NOTHING, (), (), (), (), NOTHING, NAMES, (0, 0, 0, 0))
PLACE = (RUN, "run", 1)


def _offer(peer: Identity) -> Offer:
    bodies = [hashlib.sha256(f"{peer.peer_id}{shard}".encode()).digest() for shard in range(2)]
    return make_offer(peer, FIRST, STATE, bodies=bodies, sizes=[10, 10], scalars=b"scalars")


def _statements() -> list[RoundMessage]:
    outcome = Outcome(*PLACE, outcome_digest(FIRST), (), (), (), (), NOTHING, NAMES, (0, 0, 0, 0))
    digest = outcome_digest(outcome)
    covered = vote_part(outcome, 0, "precommit", digest)
    signatures = tuple(peer.sign(covered) for peer in PEERS)
    said: list[RoundMessage] = [
        *(
            Joining(RUN, "run", number, outcome_digest(FIRST), STATE, "member", ("/ip4/1.2.3.4/tcp/1",))
            for number in (1, 2, 9)
        ),
        *(Certificate(outcome, 0, NAMES[:n], signatures[:n]) for n in (2, 3)),
        sign(STRANGER, Request(*PLACE, STRANGER.peer_id, "member", UNSIGNED)),
    ]
    for peer in PEERS[1:]:
        me, offers = peer.peer_id, tuple(offer_digest(_offer(other)) for other in PEERS)
        request = sign(peer, Request(*PLACE, me, "leave", UNSIGNED))
        gram = bytes(4)
        said += [_offer(peer), Held(1, 0, offers), Held(1, 1, offers[:2]), Held(2, 0, offers), request]
        for attempt in range(4):
            said.append(sign(peer, Plan(*PLACE, attempt, me, offers, UNSIGNED)))
            said.append(sign(peer, Proposal(attempt, me, outcome, attempt - 1, (request,), UNSIGNED)))
        for value in (NOTHING, digest):
            said += [sign(peer, Vote(*PLACE, 0, kind, me, value, UNSIGNED)) for kind in ("prevote", "precommit")]
        said.append(sign(peer, Claim(*PLACE, STATE, "gram", 0, me, hashlib.sha256(gram).digest(), 4, gram, UNSIGNED)))
        said.append(sign(peer, Claim(*PLACE, STATE, "sum", 1, me, digest, 40, b"", UNSIGNED)))
    return said


STATEMENTS = _statements()


def _frames(codec: Codec[object], *messages: object) -> list[bytes]:
    return [b"".join(codec.encode(message)) for message in messages]  # type: ignore[arg-type]


def _blob_samples() -> list[bytes]:
    certificates = tuple(said for said in STATEMENTS if isinstance(said, Certificate))
    messages = [
        GetBlob(RUN, "run", STATE, 0, 1 << 20),
        GetCertificates(RUN, "run", 1),
        Certificates(9, certificates),
        GetOffers(RUN, "run", (STATE, NOTHING)),
        Offers(tuple(_offer(peer) for peer in PEERS)),
        NotHere("this group is not here"),
    ]
    attached = WireTensor(TensorHeader("uint8", (100,)), memoryview(bytes(100)))
    return [*_frames(blob_codec, *messages), b"".join(blob_codec.encode(Blob(0), [attached]))]  # type: ignore[arg-type]


SAMPLES = {"round": (round_codec, _frames(round_codec, *STATEMENTS)), "blobs": (blob_codec, _blob_samples())}


def _seed() -> int:
    return int(os.environ.get("FUZZ_SEED") or Random().randrange(2**32))


def _case(samples: list[bytes], pool: list[bytes], number: int, rng: Random) -> bytes:
    sample = rng.choice(samples)
    if number % 8 == 0:
        return rng.randbytes(rng.randrange(2 * len(sample)))
    if number % 8 == 1:
        kept = rng.randrange(min(len(sample), 64))
        return sample[:kept] + rng.randbytes(len(sample) - kept)
    return mutated(sample, pool, rng)


@pytest.mark.parametrize("name", sorted(SAMPLES))
def test_any_bytes_are_a_message_or_our_error(name: str, fuzz_seconds: float) -> None:
    codec, samples = SAMPLES[name]
    seed = _seed()
    rng = Random(f"{name} {seed}")
    pool = [sample for _, of_one in SAMPLES.values() for sample in of_one]
    ends = time.monotonic() + fuzz_seconds / 4
    for sample in samples:
        codec.decode(sample)
    for number in count():
        if number >= MIN_CASES and time.monotonic() >= ends:
            break
        case = _case(samples, pool, number, rng)
        where = f"FUZZ_SEED={seed}, {name}, case {number}: {case.hex()}"
        is_measured = number % MEASURED_SHARE == 0
        if is_measured:
            tracemalloc.start()
        refusal, began = "", time.thread_time()
        try:
            message, _ = codec.decode(case)
            again, _ = codec.decode(b"".join(codec.encode(message)))  # type: ignore[arg-type]
            assert again == message, where
        except RemoteProtocolError as error:
            refusal = str(error)
        finally:
            took_s = time.thread_time() - began
            peak_bytes = tracemalloc.get_traced_memory()[1] if is_measured else 0
            tracemalloc.stop()
        assert len(refusal) < 300, where
        assert took_s < SLOWEST_S, f"{took_s:.2f} s: {where}"
        assert peak_bytes < BASE_BYTES + BYTES_PER_BYTE * len(case), f"{peak_bytes} bytes: {where}"


def _made_up(pool: list[bytes], rng: Random) -> RoundMessage | None:
    """A statement that differs a little from a good one, signed by its author more often than not."""
    try:
        message = round_codec.decode_only(mutated(rng.choice(pool), pool, rng))
    except RemoteProtocolError:
        return None
    if isinstance(message, Signed) and message.peer in SIGNERS and message.peer != NAMES[0] and rng.random() < 0.8:
        return sign(SIGNERS[message.peer], message)  # type: ignore[type-var]
    return message


def _answer(machine: RoundMachine, actions: list[Action], now: float, rng: Random) -> None:
    """What a node does, sooner or later or not at all."""
    for action in actions:
        if isinstance(action, Collect):
            for offer in action.offers:
                _answer(machine, machine.held(action.shard, offer_digest(offer), now), now, rng)
        elif isinstance(action, Reduce):
            data = bytes(4 * len(action.offers) * (len(action.offers) + 1) // 2) if action.kind == "gram" else b""
            value = hashlib.sha256(data).digest()
            done = machine.computed(action.kind, action.plan, action.shard, value, data, len(data), now)
            _answer(machine, done, now, rng)
        elif isinstance(action, Decide):
            _answer(machine, machine.decided(action.plan, b"decided" * 8, now), now, rng)
        elif isinstance(action, Commit) and rng.random() < 0.5:
            _answer(machine, machine.advance(action.certificate, STATE, now), now, rng)


@pytest.mark.parametrize("rule", ["mean", "krum"])
def test_a_machine_hears_anything_from_anybody_at_any_time(rule: str, fuzz_seconds: float) -> None:
    seed = _seed()
    rng = Random(f"machine {rule} {seed}")
    pool = SAMPLES["round"][1]
    ends = time.monotonic() + fuzz_seconds / 4
    heard, refused = 0, 0
    tracemalloc.start()
    try:
        for life in count():
            if life >= 6 and time.monotonic() >= ends:
                break
            machine, now = RoundMachine(PEERS[0], replace(TERMS, rule=rule), FIRST, STATE), 0.0
            before_bytes = tracemalloc.get_traced_memory()[0]
            _answer(machine, machine.start(now), now, rng)
            for number in range(400):
                where = f"FUZZ_SEED={seed}, {rule}, life {life}, message {number}"
                now += rng.choice((0.0, 0.0, 0.1, 3.0))
                try:
                    if rng.random() < 0.1:
                        there = frozenset(rng.sample([*NAMES, STRANGER.peer_id], rng.randrange(6)))
                        _answer(machine, machine.present(there, now), now, rng)
                    if now >= machine.wake_at():
                        _answer(machine, machine.expired(now), now, rng)
                    message = rng.choice(STATEMENTS) if rng.random() < 0.3 else _made_up(pool, rng)
                    if message is not None:
                        heard += 1
                        sender = rng.choice([*NAMES[1:], STRANGER.peer_id])
                        _answer(machine, machine.receive(sender, message, now), now, rng)
                except RemoteProtocolError:
                    refused += 1
                except Exception as error:
                    raise AssertionError(f"{type(error).__name__} left the machine: {where}") from error
                assert machine.repeat(), where
            kept_bytes = tracemalloc.get_traced_memory()[0] - before_bytes
            assert kept_bytes < MOST_KEPT_BYTES, f"{kept_bytes} bytes kept: FUZZ_SEED={seed}, life {life}"
    finally:
        tracemalloc.stop()
    assert 0 < refused < heard
