"""Every update codec against random and changed bytes: a finite vector or our error, quickly and in little memory."""

from __future__ import annotations

import os
import time
import tracemalloc
import zlib
from itertools import count
from random import Random

import pytest
import torch

from mycel.protocols.errors import RemoteProtocolError
from mycel.swarm.codecs import make_codec
from mycel.swarm.codecs.codec import Codec
from tests.fuzz.mutations import mutated
from tests.swarm.codecs.vectors import SMALL, SPECS, gaussian, heavy_tailed

MIXED = "mixed:float32|topk:0.01+zip+ef|float16|int4|kmeans:3|e3m0"
MIN_CASES = 150
SLOWEST_S = 0.25  # of processor time: a hundred times what the largest of these vectors takes
MEASURED_SHARE = 10
BASE_BYTES, BYTES_PER_BYTE = 400_000, 64  # the vectors are 5,300 numbers


def samples(codec: Codec) -> list[bytes]:
    encoder = codec.encoder(SMALL)
    found = []
    for x_P in (gaussian(SMALL), heavy_tailed(SMALL), gaussian(SMALL, 2, 1e35), torch.zeros(SMALL.n_elements)):
        found.append(encoder.encode(x_P, b"seed"))
        encoder.settle(True)
    return found


def bombs(body: bytes, max_bytes: int) -> list[bytes]:
    """Deflate streams of far more than a body may be, and of just too much."""
    found = []
    for size in (max_bytes - len(body), max_bytes + 2, 10**7):
        packer = zlib.compressobj(wbits=-zlib.MAX_WBITS)
        found.append(b"\x01" + packer.compress(body + bytes(max(size, 0))) + packer.flush())
    return found


def run_case(codec: Codec, case: bytes, where: str, *, measured: bool) -> bool:
    """Whether it was accepted. Fails for anything but a finite vector or our error, and for what is slow or large."""
    if measured:
        tracemalloc.start()
    began = time.thread_time()
    found_P, refusal = None, ""
    try:
        found_P = codec.decode(case, SMALL)
    except RemoteProtocolError as error:
        refusal = str(error)
    except Exception as error:
        raise AssertionError(f"{type(error).__name__} left the decoder: {where}") from error
    finally:
        took_s = time.thread_time() - began
        peak_bytes = tracemalloc.get_traced_memory()[1] if measured else 0
        tracemalloc.stop()
    assert took_s < SLOWEST_S, f"{took_s:.2f} s: {where}"
    assert peak_bytes < BASE_BYTES + BYTES_PER_BYTE * len(case), f"{peak_bytes} bytes: {where}"
    assert len(refusal) < 300, where
    assert refusal.isprintable(), where
    if found_P is not None:
        assert found_P.dtype == torch.float32, where
        assert found_P.shape == (SMALL.n_elements,), where
        assert bool(torch.isfinite(found_P).all()), where
    return found_P is not None


@pytest.mark.parametrize("spec", [*SPECS, MIXED])
def test_any_bytes_are_a_finite_vector_or_our_error(spec: str, fuzz_seconds: float) -> None:
    codec = make_codec(spec)
    seed = int(os.environ.get("FUZZ_SEED") or Random().randrange(2**32))
    rng = Random(f"{spec} {seed}")
    pool = samples(codec)
    torch.zeros(1)
    for body in pool:
        assert run_case(codec, body, spec, measured=False)
    ends = time.monotonic() + fuzz_seconds / (len(SPECS) + 1)
    for number in count():
        if number >= MIN_CASES and time.monotonic() >= ends:
            break
        sample = rng.choice(pool)
        match number % 8:
            case 0:
                case = rng.randbytes(len(sample))
            case 1:
                case = rng.randbytes(rng.randrange(2 * len(sample)))
            case 2:
                # Random from some point on: the first checks pass.
                kept = rng.randrange(min(len(sample), 64))
                case = sample[:kept] + rng.randbytes(len(sample) - kept)
            case 3:
                flipped = bytearray(sample)
                flipped[rng.randrange(len(sample))] ^= 1 << rng.randrange(8)
                case = bytes(flipped)
            case _:
                case = mutated(sample, pool, rng)
        where = f"FUZZ_SEED={seed}, codec {spec!r}, case {number}: {case[:2000].hex()}"
        run_case(codec, case, where, measured=number % MEASURED_SHARE == 0)
    for bomb in bombs(pool[0], codec.max_bytes(SMALL)):
        run_case(codec, bomb, f"{spec} and a bomb", measured=True)


@pytest.mark.parametrize("spec", ["int8", "float32", "topk:0.01,values=int8", "powersgd:2+ef", "kmeans:15"])
def test_numbers_beyond_float32_are_refused(spec: str) -> None:
    """All exponents at their highest: scales whose products overflow, infinities, NaN."""
    codec = make_codec(spec)
    body = bytearray(samples(codec)[0])
    for value in (0x7B, 0x7F, 0xFF):
        changed = bytearray(body)
        if spec in ("int8", "kmeans:15", "powersgd:2+ef"):
            changed[0] = 239  # the highest shared exponent
        changed[1:60] = bytes([value]) * 59
        run_case(codec, bytes(changed), spec, measured=False)
    with pytest.raises(RemoteProtocolError):
        codec.decode(b"\xff" * len(body), SMALL)
