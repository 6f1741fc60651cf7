"""Codecs by their names: "int8", "e3m0+zip", "topk:0.01,values=int2+ef:0.95".

    spec     base[:argument[,option]...][+zip][+ef[:decay]]       or mixed:spec|spec*2|...
    base     float32 float16 bfloat16 int2 ... int8 e3m0 topk dgc powersgd dct kmeans

Ring: algorithms.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field

from mycel.protocols.errors import ConfigError, one_line
from mycel.swarm.codecs.blocks import BlockCodec, E3M0Grid, IntGrid
from mycel.swarm.codecs.codec import Codec
from mycel.swarm.codecs.dct import Dct
from mycel.swarm.codecs.dgc import Dgc
from mycel.swarm.codecs.floats import BFloat16, Float16, Float32
from mycel.swarm.codecs.kmeans import KMeans
from mycel.swarm.codecs.mixed import MixedCodec
from mycel.swarm.codecs.powersgd import PowerSgd
from mycel.swarm.codecs.topk import TOPK_BLOCK, TopK
from mycel.swarm.codecs.values import VALUE_KINDS
from mycel.swarm.codecs.wrapping import Feedback, Zipped

__all__ = ["POSSIBLE", "make_codec"]

POSSIBLE = (
    "float32, float16, bfloat16, int2 to int8, e3m0 (these two also with :stochastic), topk:DENSITY[,values=KIND], "
    "dgc:DENSITY[,momentum=M][,values=KIND][,warmup=N], powersgd:RANK, dct:K[,sign], kmeans:K[,keep=SHARE], "
    "each with +zip and +ef[:DECAY], or mixed:SPEC|SPEC*2|..."
)
_DCT_DECAY = 0.999  # DeMo's momentum
_LONGEST = 1 << 16
_MOST_TENSORS = 1 << 16
_NUMBER = re.compile(r"[0-9]+(\.[0-9]*)?(e-?[0-9]+)?|\.[0-9]+(e-?[0-9]+)?")


def make_codec(spec: str) -> Codec:
    """The codec of a spec; its `name` is the shortest spec of the same. Raises ConfigError, one line, for any other."""
    if len(spec) > _LONGEST:
        raise ConfigError(f"a codec of {len(spec)} characters: at most {_LONGEST} are read")
    try:
        return _mixed(spec[len("mixed:") :]) if spec.startswith("mixed:") else _single(spec)
    except _BadSpecError as bad:
        raise ConfigError(f"codec {_shown(spec)}: {bad}; possible are {POSSIBLE}") from None


class _BadSpecError(Exception):
    """What is wrong, in a few words."""


def _shown(text: str) -> str:
    return repr(one_line(text if len(text) < 60 else text[:57] + "..."))


def _mixed(text: str) -> Codec:
    codecs: list[Codec] = []
    for member in text.split("|"):
        spec, _, count = member.partition("*")
        times = _integer(count, 1, _MOST_TENSORS) if count or "*" in member else 1
        if len(codecs) + times > _MOST_TENSORS:
            raise _BadSpecError(f"more than {_MOST_TENSORS} tensors")
        codecs += [_single(spec)] * times
    return MixedCodec(codecs)


def _single(text: str) -> Codec:
    base, *suffixes = text.split("+")
    plain = codec = _base(base)
    zipped = "zip" in suffixes
    feedback = [suffix for suffix in suffixes if suffix.partition(":")[0] == "ef"]
    if len(feedback) + zipped != len(suffixes) or len(feedback) > 1:
        raise _BadSpecError("behind + stands zip or ef[:DECAY], each at most once")
    if feedback and isinstance(plain, Dgc):
        raise _BadSpecError("dgc feeds its errors back already")
    if zipped:
        codec = Zipped(codec)
    usual = _DCT_DECAY if isinstance(plain, Dct) else 0.0  # no feedback unless asked for
    decay = usual
    if feedback:
        _, colon, number = feedback[0].partition(":")
        decay = _number(number, 0.0, 1.0) if colon else 1.0
    if not decay:
        return codec
    return Feedback(codec, decay, name=codec.name if decay == usual else "")


@dataclass
class _Arguments:
    """What stands behind the colon: numbers first, then options; each has to be taken."""

    positional: list[str] = field(default_factory=list)
    options: dict[str, str] = field(default_factory=dict)

    def first(self) -> str:
        return self.positional.pop(0) if self.positional else ""

    def option(self, name: str, default: str) -> str:
        return self.options.pop(name, default)

    def flag(self, name: str) -> bool:
        found = name in self.positional
        if found:
            self.positional.remove(name)
        return found


def _base(text: str) -> Codec:
    head, colon, rest = text.partition(":")
    make = _BASES.get(head)
    if make is None:
        raise _BadSpecError(f"there is no {_shown(head)}")
    arguments = _Arguments()
    for one in rest.split(",") if colon else []:
        key, equals, value = one.partition("=")
        if equals and key not in arguments.options:
            arguments.options[key] = value
        else:
            arguments.positional.append(one)
    codec = make(arguments)
    left = [*arguments.positional, *arguments.options]
    if left:
        raise _BadSpecError(f"{head} does not take {_shown(left[0])}")
    return codec


def _number(text: str, least: float, most: float) -> float:
    value = float(text) if len(text) < 20 and _NUMBER.fullmatch(text) else -1.0
    if not least <= value <= most:
        raise _BadSpecError(f"a number from {least:g} to {most:g} is needed, not {_shown(text)}")
    return value


def _integer(text: str, least: int, most: int) -> int:
    if not (text.isascii() and text.isdigit() and len(text) < 10 and least <= int(text) <= most):
        raise _BadSpecError(f"a whole number from {least} to {most} is needed, not {_shown(text)}")
    return int(text)


def _density(arguments: _Arguments) -> float:
    # One of each block is the least.
    return _number(arguments.first(), 1 / TOPK_BLOCK, 0.5)


def _values(arguments: _Arguments) -> str:
    kind = arguments.option("values", "float16")
    if kind not in VALUE_KINDS:
        raise _BadSpecError(f"values are one of {' '.join(VALUE_KINDS)}, not {_shown(kind)}")
    return kind


def _dgc(arguments: _Arguments) -> Codec:
    momentum = _number(arguments.option("momentum", "0.9"), 0.0, 0.9999)
    warmup = _integer(arguments.option("warmup", "1"), 0, 1_000_000)
    return Dgc(_density(arguments), momentum, warmup, _values(arguments))


def _kmeans(arguments: _Arguments) -> Codec:
    return KMeans(_integer(arguments.first(), 1, 255), _number(arguments.option("keep", "0.1"), 1e-5, 1.0))


def _block_int(bits: int) -> Callable[[_Arguments], Codec]:
    return lambda arguments: BlockCodec(IntGrid(bits), stochastic=arguments.flag("stochastic"))


_BASES: dict[str, Callable[[_Arguments], Codec]] = {
    "float32": lambda _: Float32(),
    "float16": lambda _: Float16(),
    "bfloat16": lambda _: BFloat16(),
    **{f"int{bits}": _block_int(bits) for bits in range(2, 9)},
    "e3m0": lambda arguments: BlockCodec(E3M0Grid(), stochastic=arguments.flag("stochastic")),
    "topk": lambda arguments: TopK(_density(arguments), _values(arguments)),
    "dgc": _dgc,
    "powersgd": lambda arguments: PowerSgd(_integer(arguments.first(), 1, 64)),
    "dct": lambda arguments: Dct(_integer(arguments.first(), 1, 2048), sign=arguments.flag("sign")),
    "kmeans": _kmeans,
}
