"""Specs: canonical names, and one line for any other text."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mycel.protocols.errors import ConfigError
from mycel.swarm.codecs import make_codec
from mycel.swarm.codecs.spec import POSSIBLE
from tests.swarm.codecs.vectors import SPECS


@pytest.mark.parametrize("spec", SPECS)
def test_names_make_the_same_codec(spec: str) -> None:
    assert make_codec(spec).name == spec


@pytest.mark.parametrize(
    ("spec", "name"),
    [
        ("topk:1e-2,values=float16+ef:1", "topk:0.01+ef"),
        ("topk:.0123456789", "topk:0.0123456789"),
        ("e3m0+ef:0.5+zip", "e3m0+zip+ef:0.5"),
        ("int8+ef:0", "int8"),
        ("dgc:0.001,warmup=1,momentum=0.90", "dgc:0.001"),
        ("dct:32+ef:0.999", "dct:32"),
        ("dct:32,sign+zip", "dct:32,sign+zip"),
        ("dct:32+ef", "dct:32+ef"),
        ("dct:32+ef:0.95", "dct:32+ef:0.95"),
        ("kmeans:15,keep=0.1", "kmeans:15"),
        ("mixed:int8|int8|topk:0.01,values=int2+ef|int8*2", "mixed:int8*2|topk:0.01,values=int2+ef|int8*2"),
    ],
)
def test_equal_codecs_have_one_name(spec: str, name: str) -> None:
    assert make_codec(spec).name == name == make_codec(name).name


def test_a_dct_without_memory_can_be_asked_for() -> None:
    assert make_codec(make_codec("dct:32+ef:0").name).name == make_codec("dct:32+ef:0").name


BAD = (
    "",
    "int1",
    "int9",
    "int8:fast",
    "int8:stochastic,stochastic",
    "float16:2",
    "topk",
    "topk:0",
    "topk:0.6",
    "topk:nan",
    "topk:1e400",
    "topk:0.01,0.02",
    "topk:0.01,values=int3",
    "topk:0.01,values=int2,values=int8",
    "dgc:0.01+ef",
    "dgc:0.01,momentum=1",
    "dgc:0.01,warmup=-1",
    "powersgd:0",
    "powersgd:2.5",
    "powersgd:\u0662",
    "dct:32,signs",
    "kmeans:256",
    "kmeans:3,keep=0",
    "int8+",
    "int8+ef:",
    "int8+ef+ef",
    "int8+zip+zip",
    "int8+gzip",
    "mixed:",
    "mixed:int8|",
    "mixed:int8*0",
    "mixed:int8*",
    "mixed:int8*999999",
    "mixed:int8|mixed:int8",
    "INT8",
    "int8\n",
    "x" * 10_000,
    "x" * 100_000,
)


@pytest.mark.parametrize("spec", BAD)
def test_a_bad_spec_says_what_is_possible_in_one_line(spec: str) -> None:
    with pytest.raises(ConfigError) as raised:
        make_codec(spec)
    text = str(raised.value)
    assert text.isprintable()
    assert len(text) < 600
    assert len(spec) > 70_000 or POSSIBLE in text


@given(st.text(st.sampled_from("intfloatkmeansdcgpowersgd0123456789:,=+|*.-ef zip"), max_size=30))
def test_any_text_is_a_codec_or_a_config_error(text):
    try:
        codec = make_codec(text)
    except ConfigError:
        return
    assert make_codec(codec.name).name == codec.name
