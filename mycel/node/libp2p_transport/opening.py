"""The first bytes of a stream, on either side: which protocol it speaks, before frames begin.

Ring: shell.
"""

from __future__ import annotations

from collections.abc import Callable, Container

import trio

from mycel.node.libp2p_transport.connection import Connection
from mycel.node.libp2p_transport.negotiation import Choice, Proposal
from mycel.node.libp2p_transport.stream import FrameStream
from mycel.node.libp2p_transport.yamux import MuxStream
from mycel.protocols.errors import PeerError, PeerRefused, PeerUnreachable, RemoteProtocolError


class Opening:
    """A stream that we open: `done` when there is a `stream` or a `failure`."""

    def __init__(
        self, connection: Connection, protocol: str, make_stream: Callable[[Connection, MuxStream], FrameStream]
    ) -> None:
        self.done = trio.Event()
        self.stream: FrameStream | None = None
        self.failure: PeerError | None = None
        self._connection = connection
        self._protocol = protocol
        self._make_stream = make_stream
        self._proposal = Proposal(protocol)
        self._mux = connection.open(self, self._proposal.opening)

    def on_data(self, data: memoryview) -> None:
        try:
            rest = self._proposal.feed(data)
        except RemoteProtocolError as error:
            self._fail(RemoteProtocolError(error.reason, self._connection.peer))
            return
        if self._proposal.accepted:
            # At once: what arrives before the opener's task runs is the stream's already.
            self.stream = self._make_stream(self._connection, self._mux)
            if len(rest):
                self.stream.on_data(rest)
            self.done.set()
        elif self._proposal.accepted is False:
            self._fail(PeerRefused(self._connection.peer, f"it does not speak {self._protocol}"))

    def on_window(self) -> None:
        """Nothing waits yet."""

    def on_down(self, reason: str) -> None:
        peer, lost = self._connection.peer, self._connection.down_reason
        self._fail(PeerRefused(peer, f"{reason} unanswered") if lost is None else PeerUnreachable(peer, lost))

    def _fail(self, failure: PeerError) -> None:
        self._mux.reset()
        self.failure = failure
        self.done.set()

    def abandon(self) -> None:
        """Nobody waits any more."""
        if self.stream is not None:
            self.stream.abandon()
        else:
            self._mux.reset()


class Answering:
    """A stream that the peer opens, until it has chosen one of the protocols in `offered`."""

    def __init__(
        self,
        mux: MuxStream,
        offered: Container[str],
        start: Callable[[MuxStream, str], FrameStream | None],
    ) -> None:
        self._mux = mux
        self._choice = Choice(offered)
        self._start = start

    def on_data(self, data: memoryview) -> None:
        try:
            answer, rest = self._choice.feed(data)
        except RemoteProtocolError:
            self._mux.reset()
            return
        if answer:
            self._mux.write([answer], len(answer))
        if self._choice.protocol is not None:
            stream = self._start(self._mux, self._choice.protocol)
            if stream is None:
                self._mux.reset()
            elif len(rest):
                stream.on_data(rest)

    def on_window(self) -> None:
        """Nothing waits yet."""

    def on_down(self, reason: str) -> None:
        """Nobody was told of this stream yet."""
