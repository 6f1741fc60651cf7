"""What is made worse on purpose, as values: the shape of every link, and a seeded schedule of faults.

A shape says what a frame suffers on its way and `Way` computes when it arrives; who lets it wait stands in
node/shaped_transport.py. A schedule says which node is killed, stopped or asked to leave, and when; the same rates,
spans and seed give the same schedule, for real processes as in the simulator.

Ring: pure.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Literal

from mycel.protocols.errors import ConfigError
from mycel.swarm.placement import Span

if TYPE_CHECKING:
    from random import Random

__all__ = ["Fault", "Rates", "Schedule", "Shape", "Uplink", "Way", "plan_faults"]

PACKET_BYTES = 1400
RETRANSMISSION_S = 0.2  # TCP's least time-out on Linux, on top of the round trip
_MOST_RETRANSMISSIONS = 8

# ---------------------------------------------------------------------------------------------------- what people write

_NUMBER = r"(\d{1,9}(?:\.\d{1,9})?)"
_TIMES = {"us": 1e-6, "ms": 1e-3, "s": 1.0, "m": 60.0, "min": 60.0, "h": 3600.0}
_BITS = {"bit": 1.0, "kbit": 1e3, "mbit": 1e6, "gbit": 1e9}


def duration_s(text: str) -> float:
    """Seconds of "80ms", "20s", "2m" or "1h". Raises ConfigError.

    >>> duration_s("80ms"), duration_s("2m")
    (0.08, 120.0)
    """
    match = re.fullmatch(_NUMBER + r"\s*([a-z]+)", text.strip().lower())
    if match is None or match[2] not in _TIMES:
        raise ConfigError(f"{text!r} is not a time: write 80ms, 20s, 2m or 1h")
    return float(match[1]) * _TIMES[match[2]]


def share(text: str) -> float:
    """A share of one, of "1%" or "0.01". Raises ConfigError.

    >>> share("1%"), share("0.25")
    (0.01, 0.25)
    """
    match = re.fullmatch(_NUMBER + r"\s*(%?)", text.strip())
    value = float(match[1]) / (100 if match[2] else 1) if match else 2.0
    if value > 1:
        raise ConfigError(f"{text!r} is not a share: write 1% or 0.01")
    return value


def bytes_per_s(text: str) -> float:
    """Bytes a second of "100mbit", "512kbit" or "1gbit". Raises ConfigError.

    >>> bytes_per_s("100mbit")
    12500000.0
    """
    match = re.fullmatch(_NUMBER + r"\s*([kmg]?bit)(?:/s)?", text.strip().lower())
    if match is None or float(match[1]) == 0:
        raise ConfigError(f"{text!r} is not a bandwidth: write 100mbit, 512kbit or 1gbit")
    return float(match[1]) * _BITS[match[2]] / 8


def rate_per_s(text: str) -> float:
    """Times a second of "1/20s", "3/m" or "0/s". Raises ConfigError.

    >>> rate_per_s("1/20s"), rate_per_s("3/m")
    (0.05, 0.05)
    """
    match = re.fullmatch(_NUMBER + r"\s*/\s*(.+)", text.strip().lower())
    try:
        every_s = duration_s(match[2] if match[2][0].isdigit() else f"1{match[2]}") if match else 0.0
    except ConfigError:
        every_s = 0.0
    if match is None or every_s == 0 or float(match[1]) / every_s > 10:
        raise ConfigError(f"{text!r} is not a rate of at most ten a second: write 1/20s or 3/m")
    return float(match[1]) / every_s


# --------------------------------------------------------------------------------------------------------------- shapes


@dataclass(frozen=True, slots=True)
class Shape:
    """What every link of a node is like: a round trip takes `rtt_s`, and up to `jitter_s` more.

    loss: the chance of a packet to be lost; streams are reliable, so that it shows as a delay. bytes_per_s: what the
    node sends to all peers together. seed: of the dice. Raises ConfigError for a link on which nothing could work.
    """

    rtt_s: float = 0.0
    jitter_s: float = 0.0
    loss: float = 0.0
    bytes_per_s: float = math.inf
    seed: int = 0

    def __post_init__(self) -> None:
        # Written so that not-a-number fails.
        if not (0 <= self.rtt_s <= 10 and 0 <= self.jitter_s <= 10):
            raise ConfigError(
                f"a round trip takes 0 to 10 s, and so does its jitter: not {self.rtt_s}, {self.jitter_s}"
            )
        if not 0 <= self.loss <= 0.5:
            raise ConfigError(f"a loss of {self.loss:.0%}: up to 50% can be borne")
        if not self.bytes_per_s >= 1000:
            raise ConfigError(f"{self.bytes_per_s} bytes a second: at least 8kbit are needed")

    @classmethod
    def parse(cls, text: str) -> Shape:
        """From `str(shape)`, such as "rtt_s=0.08,loss=0.01"; "" changes nothing. Raises ConfigError."""
        names = {field.name for field in fields(cls)}
        given: dict[str, float] = {}
        for part in filter(None, text.split(",")):
            name, _, value = part.partition("=")
            try:
                number = int(value) if name == "seed" else float(value)
            except ValueError:
                name = ""
            if name not in names or name in given:
                raise ConfigError(f"{part!r} is no part of a shape such as 'rtt_s=0.08,jitter_s=0.02,loss=0.01'")
            given[name] = number
        return cls(**given)  # type: ignore[arg-type]  # seed is an int

    def __str__(self) -> str:
        shown = [(field.name, getattr(self, field.name), field.default) for field in fields(self)]
        return ",".join(f"{name}={value!r}" for name, value, default in shown if value != default)

    @property
    def shown(self) -> str:
        """For people: "rtt 80 ms, jitter 20 ms, loss 1%, 100 mbit/s"."""
        parts = [f"rtt {self.rtt_s * 1e3:g} ms", f"jitter {self.jitter_s * 1e3:g} ms", f"loss {self.loss * 100:g}%"]
        return ", ".join(
            [*parts, "no limit" if math.isinf(self.bytes_per_s) else f"{self.bytes_per_s * 8e-6:g} mbit/s"]
        )

    @property
    def is_plain(self) -> bool:
        """Whether it changes nothing."""
        return not (self.rtt_s or self.jitter_s or self.loss) and math.isinf(self.bytes_per_s)

    @property
    def mean_rtt_s(self) -> float:
        """What it adds to a round trip on which nothing is lost, on average."""
        return self.rtt_s + self.jitter_s / 2

    @property
    def window_bytes(self) -> int:
        """What one stream may have on its way: twice what fits on the link, within reason."""
        on_the_way = 2 * self.bytes_per_s * (self.rtt_s + self.jitter_s)
        return int(min(max(on_the_way, 256 * 1024), 4 * 1024 * 1024)) if math.isfinite(on_the_way) else 4 * 1024 * 1024

    def retransmitting_s(self, size_bytes: int, chance: float) -> float:
        """What losses add to a frame's way, for a `chance` in [0, 1) drawn evenly.

        Each packet is lost with probability p and sent again after a time-out that doubles; the frame is there with its
        last packet. So n packets need at most r retransmissions with probability (1 - p^(r + 1))^n.
        """
        n_packets = max(1, math.ceil(size_bytes / PACKET_BYTES))
        n_again = 0
        while n_again < _MOST_RETRANSMISSIONS and chance >= (1 - self.loss ** (n_again + 1)) ** n_packets:
            n_again += 1
        return (RETRANSMISSION_S + self.rtt_s) * (2.0**n_again - 1)


@dataclass(eq=False, slots=True)
class Uplink:
    """What a node sends to all its peers, one frame after the other."""

    bytes_per_s: float = math.inf
    _free_at_s: float = -math.inf

    def departure_s(self, now: float, size_bytes: int) -> float:
        """When the last byte of a frame that is given at `now` has left."""
        self._free_at_s = max(now, self._free_at_s) + size_bytes / self.bytes_per_s
        return self._free_at_s


@dataclass(eq=False, slots=True)
class Way:
    """From a node to one peer: one connection, on which nothing overtakes, also what waits for a lost packet."""

    shape: Shape
    uplink: Uplink
    rng: Random
    _last_s: float = -math.inf

    def arrival_s(self, now: float, size_bytes: int) -> float:
        """When a frame that is given at `now` is there."""
        self._last_s = max(self._last_s, self.uplink.departure_s(now, size_bytes) + self.delay_s(size_bytes))
        return self._last_s

    def delay_s(self, size_bytes: int) -> float:
        """How long something travels that leaves now, alone."""
        jitter_s, chance = self.shape.jitter_s / 2 * self.rng.random(), self.rng.random()
        return self.shape.rtt_s / 2 + jitter_s + self.shape.retransmitting_s(size_bytes, chance)

    def round_trips_s(self, n: int) -> float:
        """How long `n` questions take, one after the other."""
        return sum(self.delay_s(0) for _ in range(2 * n))


# --------------------------------------------------------------------------------------------------------------- faults

Kind = Literal["kill", "stop", "leave"]
KINDS: tuple[Kind, ...] = ("kill", "stop", "leave")
# From the start of a process until it serves and others know: no fault hits the other holders of its blocks meanwhile.
RECOVERY_S = 10.0
# Until a killed node or one that left is started again, and how long a stopped one stands still: longer than the 5 s
# after which silence counts as death, or shorter.
_AWAY_S: dict[Kind, tuple[float, float]] = {"kill": (3.0, 8.0), "stop": (1.0, 10.0), "leave": (3.0, 8.0)}


@dataclass(frozen=True, slots=True)
class Rates:
    """How often each kind of fault happens, in all nodes together, per second."""

    kill: float = 0.0
    stop: float = 0.0
    leave: float = 0.0

    def of(self, kind: Kind) -> float:
        return {"kill": self.kill, "stop": self.stop, "leave": self.leave}[kind]

    @property
    def any(self) -> bool:
        return any(self.of(kind) for kind in KINDS)


@dataclass(frozen=True, slots=True)
class Fault:
    """At `at_s` node number `node` is hit; `away_s` later it is started again (kill, leave) or continued (stop)."""

    at_s: float
    kind: Kind
    node: int
    away_s: float


@dataclass(frozen=True, slots=True)
class Schedule:
    """Faults in order of time, and a sentence for each one that was left out."""

    faults: tuple[Fault, ...]
    left_out: tuple[str, ...] = ()


def plan_faults(
    rates: Rates, spans: Sequence[Span], *, until_s: float, rng: Random, spare_last: bool = True
) -> Schedule:
    """Which nodes, serving `spans`, are hit when: one fault of a kind in each 1 / rate seconds, somewhere in them.

    With `spare_last` no fault takes away the last holder of a block that is up; one that finds no other victim is left
    out. Raises ConfigError if that is so for all of them.
    """
    moments = sorted(
        ((number + rng.random()) / rates.of(kind), kind)
        for kind in KINDS
        for number in range(math.ceil(until_s * rates.of(kind)))
    )
    if moments and spare_last and not any(_may_go(node, spans, frozenset()) for node in range(len(spans))):
        raise ConfigError(
            "every node is the only holder of some block, so none can be spared: take more --replicas, or --last-too"
        )
    faults: list[Fault] = []
    left_out: list[str] = []
    back_at_s = [0.0] * len(spans)
    for at_s, kind in moments:
        away_s = rng.uniform(*_AWAY_S[kind])
        if at_s >= until_s:
            continue
        down = frozenset(node for node, until in enumerate(back_at_s) if until > at_s)
        able = [n for n in range(len(spans)) if n not in down and (not spare_last or _may_go(n, spans, down))]
        if not able:
            left_out.append(f"{kind} at {at_s:.1f} s: every node that is up is the last holder of some block")
            continue
        node = rng.choice(able)
        back_at_s[node] = at_s + away_s + RECOVERY_S
        faults.append(Fault(round(at_s, 3), kind, node, round(away_s, 3)))
    return Schedule(tuple(faults), tuple(left_out))


def _may_go(node: int, spans: Sequence[Span], down: frozenset[int]) -> bool:
    """Whether others that are up hold all blocks of `node`."""
    others = [span for index, span in enumerate(spans) if index != node and index not in down]
    start, end = spans[node]
    return all(any(a <= block < b for a, b in others) for block in range(start, end))
