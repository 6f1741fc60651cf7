"""Whom the reach service dials back, where, and how often: never a third party, never much.

Ring: pure.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field

from mycel.node.endpoints import parse_endpoint, plain_host

# A failure that begins so says nothing about the address: it was not dialled.
NOT_TRIED = "not tried: "


@dataclass(frozen=True, slots=True)
class ReachLimits:
    """What the service spends on strangers. Asking without an address costs nothing and is always answered."""

    dial_s: float = 3.0
    dials_at_once: int = 2  # of one ask
    each_s: float = 10.0  # between two asks of one peer
    asks_per_each: int = 32  # of all peers together, within each_s
    asks_at_once: int = 8
    streams_per_peer: int = 2
    streams: int = 64
    message_s: float = 5.0  # until the question is there, and until the answer is taken


@dataclass(slots=True)
class Asks:
    """Which asks are worth a dial: one of each peer within `each_s`, and a bounded number of all."""

    limits: ReachLimits
    running: int = 0
    _at: OrderedDict[str, float] = field(default_factory=OrderedDict)  # peer -> when it asked last, oldest first

    def admit(self, peer: str, now: float) -> str:
        """Why this ask is not served, or "" if it is (and counts)."""
        while self._at and now - next(iter(self._at.values())) >= self.limits.each_s:
            self._at.popitem(last=False)
        if peer in self._at:
            return f"you asked just now, wait {self._at[peer] + self.limits.each_s - now:.0f} s"
        if len(self._at) >= self.limits.asks_per_each or self.running >= self.limits.asks_at_once:
            return "too many peers ask at once"
        self._at[peer] = now
        return ""


def refusal(address: str, seen: Sequence[str]) -> str:
    """Why an address is not dialled for a peer whose connections come from the addresses `seen`, or "" if it is.

    Loopback and private addresses need no rule of their own: they are dialled only for who comes from there.

    >>> refusal("/ip4/192.0.2.1/tcp/4001", ["/ip4/192.0.2.1/tcp/50123"])
    ''
    >>> refusal("/ip4/192.0.2.9/tcp/4001", ["/ip4/192.0.2.1/tcp/50123"])
    'you come from 192.0.2.1, and only that host is dialled'
    """
    endpoint = parse_endpoint(address)
    if endpoint is None or endpoint.is_name or endpoint.port == 0:
        return "only /ip4/<address>/tcp/<port> and the like are dialled"
    hosts = [plain_host(found.host) for each in seen if (found := parse_endpoint(each)) is not None]
    if not hosts:
        return "it cannot be seen where you come from"
    if plain_host(endpoint.host) not in hosts:
        return f"you come from {' and '.join(dict.fromkeys(hosts))}, and only that host is dialled"
    return ""
