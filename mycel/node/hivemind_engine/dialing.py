"""Having the daemon dial a peer, and what its words mean when it could not.

Ring: shell.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

import base58
import trio

from mycel.node.hivemind_engine import daemon_messages as said
from mycel.node.hivemind_engine.addresses import AddressBook, binary, dialable
from mycel.node.hivemind_engine.daemon import Daemon
from mycel.node.libp2p_transport.limits import TransportLimits
from mycel.protocols.errors import PeerError, PeerRefused, PeerTimeout, PeerUnreachable

_TOO_LATE = "deadline exceeded"


class Dialler:
    """Knows where peers can be dialled."""

    def __init__(self, daemon: Daemon, limits: TransportLimits) -> None:
        self._daemon = daemon
        self._timeout_s = limits.dial_timeout_s
        self._book = AddressBook(limits.max_known_peers, limits.max_addresses_per_peer)

    def learn(self, peer: str, addresses: Sequence[str]) -> None:
        self._book.learn(peer, addresses)

    async def dial(self, peer: str) -> None:
        """Have the daemon connect to the peer, unless it is connected. Raises PeerUnreachable or PeerTimeout."""
        name = base58.b58decode(peer)
        if name in (await self._daemon.ask(said.simple(said.Ask.LIST_PEERS))).peers:
            return
        addresses = self._book.addresses(peer)
        if not addresses:
            raise PeerUnreachable(peer, "no address of it is known")
        until = trio.current_time() + self._timeout_s
        good, reasons = await dialable(addresses, self._timeout_s)
        if not good:
            raise PeerUnreachable(peer, f"cannot be dialled: {reasons}")
        known = [found for found in map(binary, good) if found is not None]
        request = said.connect(name, known, math.ceil(self._timeout_s))
        error = _TOO_LATE
        with trio.move_on_at(until):
            connection, answer, _ = await self._daemon.open(request)
            connection.close()
            error = answer.error
        if _TOO_LATE in error:
            raise PeerTimeout(peer, f"accepts connections but stays silent: {' '.join(good)}")
        if error:
            raise PeerUnreachable(peer, f"cannot be dialled: {_why(error)}")


def refusal(peer: str, protocol: str, error: str) -> PeerError:
    """What the daemon's words mean when a stream could not be opened."""
    if "not supported" in error:
        return PeerRefused(peer, f"it does not speak {protocol}")
    if _TOO_LATE in error:
        return PeerTimeout(peer, f"no answer to opening {protocol}")
    if "failed to negotiate protocol: stream reset" in error:
        return PeerRefused(peer, "the peer reset the stream unanswered")
    return PeerUnreachable(peer, _why(error))


def _why(error: str) -> str:
    """The daemon's words in one line, without what the caller knows."""
    if "peer id mismatch" in error:
        return "another peer answers there"
    return re.sub(r"\s+", " ", error.removeprefix("failed to dial ")).strip()[:300]
