"""Valid samples changed a little: what gets past the first checks, where random bytes would not."""

from __future__ import annotations

from random import Random

# What lengths, numbers and markers of msgpack, base64 and JSON look like at their edges.
TELLING = (
    b"\x00",
    b"\x7f",
    b"\x80",
    b"\xff",
    b"\x90",
    b"\x91" * 64,
    b"\x81\xa1k" * 64,
    b"\xc0",
    b"\xc1",
    b"\xc6\xff\xff\xff\xff",
    b"\xca\x7f\xc0\x00\x00",
    b"\xcb\x7f\xf0\x00\x00\x00\x00\x00\x00",
    b"\xcb\x7f\xf8\x00\x00\x00\x00\x00\x00",
    b"\xcf\xff\xff\xff\xff\xff\xff\xff\xff",
    b"\xd3\x80\x00\x00\x00\x00\x00\x00\x00",
    b"\xdb\xff\xff\xff\xff",
    b"\xdd\xff\xff\xff\xff",
    b"\xdf\xff\xff\xff\xff",
    b"\xed\xa0\x80",
    b"\xff\xff\xff\xff",
    b"=",
    b"-",
    b"_",
    "\u00e9".encode(),
    "\u2028".encode(),
)


def mutated(sample: bytes, others: list[bytes], rng: Random) -> bytes:
    """`sample` after one to eight small changes; `others` lend parts."""
    data = bytearray(sample)
    for _ in range(min(8, 1 + int(rng.expovariate(0.6)))):
        _change(data, others, rng)
    return bytes(data)


def _change(data: bytearray, others: list[bytes], rng: Random) -> None:
    at = rng.randint(0, len(data))
    match rng.randrange(9):
        case 0 if data:
            data[at % len(data)] ^= 1 << rng.randrange(8)
        case 1 if data:
            data[at % len(data)] = rng.randrange(256)
        case 2 if data:
            data[at % len(data)] = (data[at % len(data)] + rng.choice((-1, 1))) % 256
        case 3:
            data[at:at] = rng.choice(TELLING)
        case 4:
            telling = rng.choice(TELLING)
            data[at : at + len(telling)] = telling
        case 5:
            del data[at : at + rng.randint(1, 16)]
        case 6:
            del data[at:]
        case 7:
            part = data[at : at + rng.randint(1, 64)]
            data[at:at] = part * rng.randint(1, 8)
        case _:
            other = rng.choice(others)
            start = rng.randint(0, len(other))
            data[at : at + rng.randint(0, 32)] = other[start : start + rng.randint(1, 64)]
