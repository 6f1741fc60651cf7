"""What `mycel up` is told to make worse: the shape of links, rates of faults, how long load is driven through it.

Ring: shell (click).
"""

from __future__ import annotations

import signal
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import click

from mycel.cli.common import F
from mycel.protocols.errors import ConfigError
from mycel.swarm.chaos import Rates, Shape, bytes_per_s, duration_s, rate_per_s, share

CLIENTS = 2


@dataclass(frozen=True, slots=True)
class Chaos:
    """What is made worse, and how long load is driven through it; `load` and `for_s` are as typed."""

    shape: Shape
    rates: Rates
    seed: int
    for_s: float | None
    load: int | None
    last_too: bool

    @property
    def is_driven(self) -> bool:
        """Whether this command drives load itself and ends with a verdict."""
        return self.for_s is not None or self.load is not None or self.rates.any


_OPTIONS = (
    click.option("--rtt", type=duration_s, metavar="TIME", help="Let a round trip take so long, such as 80ms."),
    click.option("--jitter", type=duration_s, metavar="TIME", help="... and up to so much longer, such as 20ms."),
    click.option("--loss", type=share, metavar="SHARE", help="Lose packets, such as 1%; streams send them again."),
    click.option("--bandwidth", type=bytes_per_s, metavar="RATE", help="What a node can send, such as 100mbit."),
    click.option("--kill", type=rate_per_s, metavar="RATE", help="Kill nodes (SIGKILL), such as 1/20s."),
    click.option("--stop", type=rate_per_s, metavar="RATE", help="Let nodes stand still for a while (SIGSTOP)."),
    click.option("--leave", type=rate_per_s, metavar="RATE", help="Ask nodes to leave, as Ctrl-C does."),
    click.option("--last-too", is_flag=True, help="Spare not even the last node that serves a block."),
    click.option(
        "--seed",
        type=click.IntRange(0, 2**63 - 1),
        default=0,
        show_default=True,
        metavar="N",
        help="The same seed: the same faults, requests and dice.",
    ),
    click.option("--for", "for_s", type=duration_s, metavar="TIME", help="Drive load for so long and give a verdict."),
    click.option(
        "--load",
        type=click.IntRange(1, 64),
        metavar="N",
        help=f"How many clients ask at once. [default: {CLIENTS} with --for or faults, else none]",
    ),
)


def chaos_options(command: F) -> F:
    """Add the options of chaos to a command."""
    for option in reversed(_OPTIONS):
        command = option(command)
    return command


def chaos_of(typed: Mapping[str, Any]) -> Chaos:
    """What was typed. Raises ConfigError for what cannot be."""
    unlimited = Shape().bytes_per_s
    shape = Shape(
        rtt_s=typed["rtt"] or 0.0,
        jitter_s=typed["jitter"] or 0.0,
        loss=typed["loss"] or 0.0,
        bytes_per_s=typed["bandwidth"] or unlimited,
        seed=typed["seed"],
    )
    rates = Rates(typed["kill"] or 0.0, typed["stop"] or 0.0, typed["leave"] or 0.0)
    if rates.stop and not hasattr(signal, "SIGSTOP"):
        raise ConfigError("--stop needs SIGSTOP, which this system does not have")
    if typed["for_s"] == 0:
        raise ConfigError("--for 0 is no time at all")
    return Chaos(shape, rates, typed["seed"], typed["for_s"], typed["load"], typed["last_too"])
