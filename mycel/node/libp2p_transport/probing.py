"""One look at one address: does a given peer answer there? A connection of its own, authenticated and closed again.

Nobody but the caller hears of it: no muxer is made, and the transport's own connections to that peer stay as they are.

Ring: shell.
"""

from __future__ import annotations

from collections.abc import Iterator

import trio
from libp2p.peer.id import ID
from libp2p.security.noise.exceptions import InvalidSignature, PeerIDMismatchesPubkey
from libp2p.transport.upgrader import TransportUpgrader
from multiaddr import Multiaddr

from mycel.node.libp2p_transport.dialing import plain_address
from mycel.node.libp2p_transport.tcp import SteadyTcp
from mycel.protocols.errors import PeerTimeout, PeerUnreachable, RemoteProtocolError


async def probe(tcp: SteadyTcp, upgrader: TransportUpgrader, peer: str, address: str, within_s: float) -> None:
    """Dial `address` and let the other end prove that it is `peer`.

    Raises PeerUnreachable (nothing accepts a connection), PeerTimeout (something does, and stays silent) or
    RemoteProtocolError (something answers that is not this peer, or no peer at all).
    """
    plain = plain_address(address, peer)
    if plain is None:
        raise PeerUnreachable(peer, "this is not an address that can be dialled over TCP")
    accepted = False
    with trio.move_on_after(within_s):
        try:
            raw = await tcp.dial(Multiaddr(plain))
        except Exception as error:  # noqa: BLE001 - libp2p raises several kinds; the reason is what remains
            raise PeerUnreachable(peer, _why_not(error)) from None
        accepted = True
        try:
            await upgrader.upgrade_security(raw, True, ID.from_string(peer))
        except Exception as error:  # noqa: BLE001 - as above
            raise RemoteProtocolError(_who_answers(error), peer) from None
        finally:
            with trio.CancelScope(shield=True):
                await raw.close()  # at once: nothing is flushed
        return
    if accepted:
        raise PeerTimeout(peer, f"accepts connections but stays silent for {within_s:.0f} s")
    raise PeerUnreachable(peer, f"no answer within {within_s:.0f} s")


def _why_not(error: BaseException) -> str:
    """What the operating system said, in a few words."""
    causes = list(_causes(error))
    said = next((cause.strerror for cause in causes if isinstance(cause, OSError) and cause.strerror), None)
    return said.lower() if said else str(causes[-1])[:200] or type(causes[-1]).__name__


def _who_answers(error: BaseException) -> str:
    is_other = any(isinstance(cause, PeerIDMismatchesPubkey | InvalidSignature) for cause in _causes(error))
    return "another peer answers there" if is_other else "what answers there is no peer"


def _causes(error: BaseException) -> Iterator[BaseException]:
    """The error and what it came from, the origin last."""
    while True:
        yield error
        if isinstance(error, BaseExceptionGroup):
            yield from _causes(error.exceptions[0])
        cause = error.__cause__ or error.__context__
        if cause is None:
            return
        error = cause
