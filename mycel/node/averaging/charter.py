"""What a group averages, and how: its charter, which all members have, and tensors that fit it.

Ring: shell (chance).
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Annotated, Literal

import msgspec
import torch
from msgspec import Meta, Struct
from torch import Tensor

from mycel.protocols.errors import ConfigError
from mycel.protocols.messages import PeerId
from mycel.swarm.codecs import Layout
from mycel.swarm.rounds.reducer import VectorReducer
from mycel.swarm.rounds.terms import GroupTerms

__all__ = [
    "AverageOptions",
    "Charter",
    "charter_of",
    "check_tensors",
    "encode_charter",
    "flat",
    "read_charter",
    "unflat",
]

# Results of these are as compact as the contributions; those of sparse and low-rank codecs would lose what they add up.
_DENSE = ("float32", "float16", "bfloat16", "int", "e3m0")
_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16, "float64": torch.float64}

Text = Annotated[str, Meta(max_length=200)]
Size = Annotated[int, Meta(ge=1, le=2**34)]


@dataclass(frozen=True, slots=True)
class AverageOptions:
    """What a group's founder chooses. `codec` and `rule` as everywhere: "int8", "topk:0.01+ef"; "mean", "median".

    With `aggregators` 1 and not `open` the members trust each other, as in hivemind; with 3 and `open` fewer than a
    third of them may lie. `quorum` is the share of the members that a round waits for before its grace begins,
    `patience_s` how long it waits for them at most. The vector is cut into `shards`: more
    than a group has members let each reduce several, fewer leave some with nothing to do; each costs some messages.
    """

    codec: str = "float32"
    rule: str = "mean"
    liars: float = 0.0
    aggregators: int = 1
    open: bool = False
    min_members: int = 2
    quorum: float = 2 / 3
    patience_s: float = 60.0
    longest_grace_s: float = 30.0
    shards: int = 8


class Charter(Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """What is averaged, and how. Tensors in the order of their names."""

    kind: Literal["mycel average 1"]
    nonce: Annotated[bytes, Meta(min_length=16, max_length=16)]
    founder: PeerId
    names: Annotated[tuple[Text, ...], Meta(min_length=1, max_length=100_000)]
    shapes: Annotated[tuple[Annotated[tuple[Size, ...], Meta(max_length=16)], ...], Meta(max_length=100_000)]
    dtypes: Annotated[tuple[Text, ...], Meta(max_length=100_000)]
    codec: Text
    rule: Text
    liars: Annotated[float, Meta(ge=0, lt=0.5)]
    aggregators: Annotated[int, Meta(ge=0, le=31)]
    open: bool
    min_members: Annotated[int, Meta(ge=1, le=256)]
    quorum: Annotated[float, Meta(gt=0, le=1)]
    patience_s: Annotated[float, Meta(gt=0, le=86400)]
    longest_grace_s: Annotated[float, Meta(ge=0, le=86400)]
    shards: Annotated[int, Meta(ge=1, le=256)]

    def layout(self) -> Layout:
        return Layout(self.shapes)

    def terms(self) -> GroupTerms:
        is_dense = self.codec.startswith(_DENSE)
        return GroupTerms(
            n_elements=self.layout().n_elements,
            rule=self.rule,
            codec=self.codec,
            result_codec=self.codec.partition("+")[0] if is_dense else "float32",
            liars=self.liars,
            aggregators=self.aggregators,
            open=self.open,
            min_members=self.min_members,
            contributors=self.quorum,
            audits=1 if self.open else 0,
            patience_s=self.patience_s,
            longest_grace_s=self.longest_grace_s,
            shards=self.shards,
        )


_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(Charter)


def charter_of(tensors: Mapping[str, Tensor], options: AverageOptions, founder: str) -> Charter:
    names = sorted(tensors)
    return Charter(
        "mycel average 1",
        os.urandom(16),
        founder,
        tuple(names),
        tuple(tuple(tensors[name].shape) for name in names),
        tuple(dtype_of(tensors[name]) for name in names),
        options.codec,
        options.rule,
        options.liars,
        options.aggregators,
        options.open,
        options.min_members,
        options.quorum,
        options.patience_s,
        options.longest_grace_s,
        options.shards,
    )


def encode_charter(charter: Charter) -> bytes:
    return _encoder.encode(charter)


def read_charter(data: bytes) -> Charter:
    """Raises ConfigError for bytes that describe no group."""
    try:
        charter = _decoder.decode(data)
        if not len(charter.names) == len(charter.shapes) == len(charter.dtypes) or not set(charter.dtypes) <= set(
            _DTYPES
        ):
            raise ValueError("names, shapes and dtypes do not fit each other")
        if sum(map(prod, charter.shapes)) >= 2**34:
            raise ValueError("more than 2^34 elements")
        if not all(map(math.isfinite, (charter.liars, charter.quorum, charter.patience_s, charter.longest_grace_s))):
            raise ValueError("numbers that are not finite")
        VectorReducer(charter.layout(), charter.terms())
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError, ValueError) as error:
        raise ConfigError(f"this is no group that averages: {str(error)[:200]}") from None
    return charter


def check_tensors(charter: Charter, tensors: Mapping[str, Tensor]) -> None:
    """Raises ConfigError that names the first difference."""
    for name, shape, dtype in zip(charter.names, charter.shapes, charter.dtypes, strict=True):
        if name not in tensors:
            raise ConfigError(f"the group averages a tensor {name!r}, which is missing here")
        mine = tensors[name]
        if tuple(mine.shape) != shape or dtype_of(mine) != dtype:
            here = f"{dtype_of(mine)} {list(mine.shape)}"
            raise ConfigError(f"the tensor {name!r} is {dtype} {list(shape)} in the group, and {here} here")
    extra = sorted(set(tensors) - set(charter.names))
    if extra:
        raise ConfigError(f"the group does not average a tensor {extra[0]!r}, which is here")


def dtype_of(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def flat(charter: Charter, tensors: Mapping[str, Tensor], room_P: Tensor | None) -> Tensor:
    """All of them one after the other, in `room_P` if it is needed; a single one that is so already, as it is."""
    parts = [tensors[name].detach().reshape(-1).to("cpu", torch.float32) for name in charter.names]
    if len(parts) == 1:
        return parts[0]
    with torch.no_grad():
        # Memory that was used before: the system clears new memory, which takes as long as the copy.
        return torch.cat(parts, out=torch.empty(charter.layout().n_elements) if room_P is None else room_P)


def unflat(charter: Charter, mean_P: Tensor) -> dict[str, Tensor]:
    parts = torch.split(mean_P, [prod(shape) for shape in charter.shapes])
    described = zip(charter.names, charter.shapes, charter.dtypes, parts, strict=True)
    return {name: part.reshape(shape).to(_DTYPES[dtype]) for name, shape, dtype, part in described}
