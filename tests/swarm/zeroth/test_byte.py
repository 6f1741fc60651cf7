"""The one-byte code: nearest in the logarithm, by a table that is checked here against exact arithmetic."""

from __future__ import annotations

import json
import math
from decimal import Decimal, localcontext
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from mycel.swarm.zeroth.byte import _EDGES, LARGEST, VOID, decode, encode, ladder, magnitude, value

VECTORS = json.loads((Path(__file__).parent / "vectors.json").read_text())
LEAST, MOST = 2.0 ** (-63 / 8), 2.0 ** (63 / 8)


def test_magnitudes_and_edges_are_those_of_the_specification():
    with localcontext() as context:
        context.prec = 60
        for m in range(1, LARGEST + 1):
            octave = 1 << m // 8
            assert magnitude(m) == int((Decimal(2) ** (Decimal(m % 8) / 8) * 2**30).to_integral_value()) * octave
            if m < LARGEST:
                middle = Decimal(2) ** ((Decimal(m % 8) + Decimal("0.5")) / 8) * 2**30
                assert _EDGES[m] == int(middle.to_integral_value()) * octave
    assert list(_EDGES) == sorted(set(_EDGES))


def test_vectors_hold():
    assert {entry["code"]: value(entry["code"]) for entry in VECTORS["codes"]} == {
        entry["code"]: entry["value"] for entry in VECTORS["codes"]
    }


def test_every_code_is_its_own_and_the_ladder_is_in_order():
    codes = [code for code in range(256) if code != VOID]
    assert [encode(decode(code)) for code in codes] == codes
    assert [ladder(code) for code in sorted(codes, key=value)] == list(range(-127, 128))


@given(st.floats(LEAST, MOST), st.booleans())
@example(LEAST, False)
@example(MOST, True)
def test_a_code_is_within_half_a_step(size, negative):
    g = -size if negative else size
    found = decode(encode(g))
    assert math.copysign(1.0, found) == math.copysign(1.0, g)
    assert abs(math.log2(found / g)) <= 0.5 / 8 + 1e-9


@given(st.floats(allow_nan=False), st.floats(allow_nan=False))
def test_codes_keep_the_order(a, b):
    low, high = sorted((a, b))
    if math.isfinite(low) and math.isfinite(high):
        assert ladder(encode(low)) <= ladder(encode(high))
        assert ladder(encode(-low)) == -ladder(encode(low))


@pytest.mark.parametrize("g", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_void_and_changes_nothing(g):
    assert encode(g) == VOID
    assert decode(VOID) == 0.0


def test_the_ends_of_the_range():
    assert encode(0.0) == encode(-0.0) == encode(5e-324) == encode(LEAST / 2.01) == 0
    assert encode(LEAST / 1.99) == 1
    assert encode(1.7e308) == LARGEST
    assert encode(-1.7e308) == 0x80 | LARGEST
