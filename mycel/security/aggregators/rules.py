"""The names of aggregation rules: "nnm+geometric-median" is the rule geometric-median after the pre-step nnm.

Ring: pure.
"""

from __future__ import annotations

from dataclasses import dataclass

from mycel.protocols.errors import ConfigError

# Decided at each coordinate by itself; the others give every row one weight for all coordinates.
COORDINATE_RULES = ("median", "trimmed-mean", "meamed")
RULES = (
    "mean",
    *COORDINATE_RULES,
    "geometric-median",
    "krum",
    "multi-krum",
    "centered-clip",
    "caf",
    "mda",
    "smea",
    "flag",
)
PRE_STEPS = ("bucketing:SIZE", "nnm", "arc", "clip")
MAX_PRE_STEPS = 4
MAX_BUCKET = 64


@dataclass(frozen=True, slots=True)
class PreStep:
    """What is done to all rows before the rule: its name, and the rows in a bucket (0 for the other pre-steps)."""

    name: str
    size: int = 0

    def __str__(self) -> str:
        return f"{self.name}:{self.size}" if self.size else self.name


@dataclass(frozen=True, slots=True)
class Rule:
    """A rule and its pre-steps, the first first. `str(rule)` is its canonical spelling."""

    pre: tuple[PreStep, ...]
    base: str

    def __str__(self) -> str:
        return "+".join([*map(str, self.pre), self.base])

    @property
    def needs_gram(self) -> bool:
        """Whether deciding needs the distances between the rows; else their number is enough."""
        blind = self.base == "mean" or self.per_coordinate
        return not blind or any(step.name != "bucketing" for step in self.pre)

    @property
    def per_coordinate(self) -> bool:
        """Whether the rule is decided at each coordinate by itself, when the rows are combined."""
        return self.base in COORDINATE_RULES


def parse_rule(text: str) -> Rule:
    """The rule called `text`. Raises ConfigError, one line, for anything else.

    >>> str(parse_rule("arc+nnm+trimmed-mean"))
    'arc+nnm+trimmed-mean'
    """
    *steps, base = text.strip().split("+")
    if base not in RULES:
        raise ConfigError(f"{_shown(base)} is no aggregation rule; there are {', '.join(RULES)}")
    if len(steps) > MAX_PRE_STEPS:
        raise ConfigError(f"an aggregation rule has at most {MAX_PRE_STEPS} pre-steps, not {len(steps)}")
    return Rule(tuple(_pre_step(step) for step in steps), base)


def _pre_step(text: str) -> PreStep:
    name, colon, size = text.partition(":")
    if name == "bucketing":
        if not (size.isascii() and size.isdecimal() and len(size) <= 2 and 2 <= int(size) <= MAX_BUCKET):
            raise ConfigError(f"{_shown(text)}: write bucketing:SIZE with a size from 2 to {MAX_BUCKET}")
        return PreStep(name, int(size))
    if colon or name not in PRE_STEPS:
        raise ConfigError(f"{_shown(text)} is no pre-step of an aggregation rule; there are {', '.join(PRE_STEPS)}")
    return PreStep(name)


def _shown(text: str) -> str:
    return repr(text[:40])
