"""What comes of dialling one address of a peer, in terms that tell a person what to do.

Ring: shell.
"""

from __future__ import annotations

import errno
import socket

import trio

from mycel.node.diagnosis import Dial
from mycel.node.endpoints import Endpoint, parse_endpoint
from mycel.node.libp2p_transport import Libp2pTransport
from mycel.protocols.errors import PeerTimeout, PeerUnreachable, RemoteProtocolError


async def dial_address(transport: Libp2pTransport, peer: str, address: str, within_s: float) -> Dial:
    """What comes of dialling one address: its name, then a bare TCP connection, then a proof of who answers."""
    endpoint = parse_endpoint(address)
    if endpoint is None or endpoint.port == 0:
        return Dial(peer, address, "odd")
    failure = await _connect(endpoint, within_s)
    if failure is not None:
        return Dial(peer, address, *failure)
    try:
        await transport.probe(peer, address, within_s)
    except PeerTimeout:
        return Dial(peer, address, "mute")
    except PeerUnreachable as error:  # it answered a moment ago; libp2p looks up names in its own way
        return Dial(peer, address, "hidden" if endpoint.is_name else "silent", error.reason)
    except RemoteProtocolError as error:
        return Dial(peer, address, "another" if "another peer" in error.reason else "stranger", error.reason)
    return Dial(peer, address, "found")


async def _connect(endpoint: Endpoint, within_s: float) -> tuple[str, str] | None:
    """Why no TCP connection can be made (outcome, detail), or None if one can."""
    family = {"ip4": socket.AF_INET, "dns4": socket.AF_INET, "ip6": socket.AF_INET6, "dns6": socket.AF_INET6}
    kind = family.get(endpoint.kind, socket.AF_UNSPEC)
    try:
        with trio.fail_after(within_s):
            found = await trio.socket.getaddrinfo(endpoint.host, endpoint.port, kind, socket.SOCK_STREAM)
    except (socket.gaierror, UnicodeError) as error:
        return "nameless", str(error.strerror if isinstance(error, OSError) else error).lower()
    except trio.TooSlowError:
        return "nameless", f"no answer within {within_s:.0f} s"
    failure: tuple[str, str] = ("nameless", "it has no address")
    for family_found, kind_found, number, _, where in found[:2]:
        try:
            with trio.fail_after(within_s), trio.socket.socket(family_found, kind_found, number) as sock:
                await sock.connect(where)
                return None
        except trio.TooSlowError:
            failure = ("silent", f"within {within_s:.0f} s")
        except OSError as error:
            failure = _outcome_of(error)
    return failure


def _outcome_of(error: OSError) -> tuple[str, str]:
    detail = (error.strerror or str(error)).lower()
    if isinstance(error, ConnectionRefusedError):
        return "refused", detail
    if error.errno in (errno.EHOSTUNREACH, errno.ENETUNREACH, errno.ENETDOWN, errno.EHOSTDOWN, errno.EADDRNOTAVAIL):
        return "unreachable", detail
    return "silent", detail
