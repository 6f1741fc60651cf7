"""Links that a test can cut: a TCP proxy that stops forwarding, and transports that dial it in place of a peer.

A cut link is silence: nothing is closed and nothing refused, as when a cable is pulled or a NAT forgets a mapping.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any
from unittest.mock import patch

import trio

from mycel.node import libp2p_transport


@contextmanager
def rerouted_transports(reroute: Mapping[str, str]) -> Iterator[None]:
    """Transports opened inside dial `reroute[address]` wherever a peer announced `address`; it may still grow."""
    opened_by = libp2p_transport.open_transport

    @asynccontextmanager
    async def open_transport(*arguments: Any, **options: Any) -> AsyncIterator[Any]:
        async with opened_by(*arguments, **options) as transport:
            learn = transport.learn

            def learn_rerouted(peer: str, addresses: Sequence[str]) -> None:
                learn(peer, [reroute.get(address, address) for address in addresses])

            transport.learn = learn_rerouted  # type: ignore[method-assign]
            yield transport

    with patch.object(libp2p_transport, "open_transport", open_transport):
        yield


@dataclass(eq=False)
class Link:
    """A proxy in front of one address, `address` its own; `cut()` makes it a black hole for good."""

    address: str
    n_connections: int = 0
    is_cut: bool = False
    _carrying: list[trio.CancelScope] = field(default_factory=list)

    def cut(self) -> None:
        self.is_cut = True
        for scope in self._carrying:
            scope.cancel()

    async def carry(self, near: trio.SocketStream, far: trio.SocketStream) -> None:
        """Until either end closes; for ever, in silence, once the link is cut."""
        self.n_connections += 1
        with trio.CancelScope() as scope:
            self._carrying.append(scope)
            if self.is_cut:
                scope.cancel()
            async with trio.open_nursery() as nursery:
                nursery.start_soon(_pump, near, far)
                nursery.start_soon(_pump, far, near)
        if scope.cancelled_caught:
            await trio.sleep_forever()


async def _pump(source: trio.SocketStream, sink: trio.SocketStream) -> None:
    with suppress(trio.BrokenResourceError, trio.ClosedResourceError):
        async for data in source:
            await sink.send_all(data)
        await sink.send_eof()


@asynccontextmanager
async def link_to(address: str) -> AsyncIterator[Link]:
    """A link to /ip4/127.0.0.1/tcp/<port>; everything of it is closed with the block."""
    port = int(address.split("/")[4])
    async with trio.open_nursery() as nursery:
        listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
        link = Link(f"/ip4/127.0.0.1/tcp/{listeners[0].socket.getsockname()[1]}")

        async def accept(near: trio.SocketStream) -> None:
            far = await trio.open_tcp_stream("127.0.0.1", port)
            async with near, far:
                await link.carry(near, far)

        nursery.start_soon(trio.serve_listeners, accept, listeners)
        try:
            yield link
        finally:
            nursery.cancel_scope.cancel()
