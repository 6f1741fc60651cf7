"""The py-libp2p adapter: the only place that imports libp2p, and the fence around its sharp edges.

From the socket up: `tcp` (bytes that cannot be cancelled half-way), `connection` (libp2p's secured connection with our
`yamux` in it, and its heartbeat), `opening` (which protocol a stream speaks), `stream` (frames), `dialing`, `swarm`
(libp2p's own part), `transport`.
docs/decisions/0002-libp2p-adapter.md says why so little of libp2p is left in the path of the bytes.

Ring: shell.
"""

from mycel.node.libp2p_transport.limits import TransportLimits
from mycel.node.libp2p_transport.transport import Libp2pTransport, open_transport

__all__ = ["Libp2pTransport", "TransportLimits", "open_transport"]
