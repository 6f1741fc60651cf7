"""A peer of the second engine in a process of its own, to be killed or stopped: see echo_peer.

    python -m tests.conformance.p2pd_echo_peer [silence_s]

Its daemon is a process below it, which a signal to this one does not reach.
"""

from __future__ import annotations

import sys

import trio

from mycel.node.hivemind_engine.p2pd_transport import open_p2pd_transport
from mycel.node.libp2p_transport import TransportLimits
from mycel.security.identity import Identity
from tests.conformance.transport_suite import serve_suite


async def main(silence_s: float) -> None:
    limits = TransportLimits(heartbeat_interval_s=silence_s / 5, silence_s=silence_s)
    async with open_p2pd_transport(Identity.generate(), limits=limits) as transport:
        serve_suite(transport)
        sys.stdout.write(f"{transport.peer_id} {transport.addresses[0]}\n")
        sys.stdout.flush()
        await trio.to_thread.run_sync(sys.stdin.read, abandon_on_cancel=True)


if __name__ == "__main__":
    trio.run(main, float(sys.argv[1]) if len(sys.argv) > 1 else 5.0)
