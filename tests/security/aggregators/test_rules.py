"""Names of rules."""

from __future__ import annotations

import pytest

from mycel.protocols.errors import ConfigError
from mycel.security.aggregators import parse_rule
from mycel.security.aggregators.rules import RULES


@pytest.mark.parametrize(
    "text", [*RULES, "nnm+geometric-median", "arc+nnm+trimmed-mean", "bucketing:2+caf", "clip+mean"]
)
def test_a_rule_is_spelled_as_it_was_read(text):
    rule = parse_rule(f" {text}\n")
    assert str(rule) == text
    assert parse_rule(str(rule)) == rule
    assert hash(parse_rule(text)) == hash(rule)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "average",
        "nnm",
        "nnm+",
        "+mean",
        "mean+nnm",
        "krum+mean",
        "nnm:2+mean",
        "bucketing+mean",
        "bucketing:1+mean",
        "bucketing:65+mean",
        "bucketing:-2+mean",
        "bucketing:²+mean",
        "bucketing:999999999999999999999+mean",
        "bucketing:SIZE+mean",
        "nnm+nnm+nnm+nnm+nnm+mean",
        "mean\nmean" * 1000,
    ],
)
def test_anything_else_is_refused_in_one_short_line(text):
    with pytest.raises(ConfigError) as refused:
        parse_rule(text)
    assert "\n" not in str(refused.value)
    assert len(str(refused.value)) < 300


@pytest.mark.parametrize(
    ("text", "needs"),
    [
        ("mean", False),
        ("median", False),
        ("bucketing:2+meamed", False),
        ("bucketing:2+mean", False),
        ("clip+mean", True),
        ("nnm+median", True),
        ("bucketing:2+krum", True),
        ("flag", True),
    ],
)
def test_which_rules_need_the_distances(text, needs):
    assert parse_rule(text).needs_gram is needs
