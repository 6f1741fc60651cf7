"""One open hop as its client holds it: the control stream, what it says, and how to let go of it.

Ring: shell.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import trio

from mycel.protocols.codec import session_codec
from mycel.protocols.errors import LocalProtocolError, PeerError, PeerUnreachable, RemoteProtocolError
from mycel.protocols.messages import (
    AskProgress,
    HandedOver,
    HandOver,
    HopFailed,
    Leaving,
    Progress,
    Relink,
    Sampled,
)
from mycel.protocols.ports import Stream
from mycel.swarm.routing import Hop

CLOSE_PATIENCE_S = 2.0
# A hop that takes nothing from its control stream for so long keeps the session waiting, whatever it says.
SPEAK_PATIENCE_S = 5.0

Said = Sampled | HopFailed | Progress | Leaving | HandedOver


@dataclass(eq=False, slots=True)
class Control:
    """An open hop. `lost`: why it is no longer good for anything; `leaving`: it said that it wants to be replaced.

    `gave`: it was asked to give its state, which is asked once. `step_s`: what one token should take it. `moved_in`: it
    took the place of a hop that still worked, so that tokens may have been heard that it has not seen yet; `received`
    is what it certainly has, by the last of its `n_answers`.
    """

    hop: Hop
    stream: Stream
    step_s: float = 0.0
    inbound: int = 0
    lost: str = ""
    let_go: bool = False
    leaving: bool = False
    gave: bool = False
    moved_in: bool = False
    received: int = 0
    n_answers: int = 0
    listening: trio.CancelScope = field(default_factory=trio.CancelScope)
    _speaking: trio.Lock = field(default_factory=trio.Lock)

    @property
    def peer(self) -> str:
        return self.hop.peer.peer

    async def tell(self, message: Relink | AskProgress | HandOver) -> None:
        """Say something to the hop; if it cannot be heard any more, it is lost, and its listener says so, too."""
        try:
            with trio.move_on_after(SPEAK_PATIENCE_S) as patience:
                async with self._speaking:
                    await self.stream.send(*session_codec.encode(message))
            if patience.cancelled_caught:
                self.lost = self.lost or f"took no message for {SPEAK_PATIENCE_S:.0f} s"
        except PeerError as error:
            self.lost = self.lost or error.reason
        except LocalProtocolError:
            if not self.let_go:
                raise
            # Let go of while we were waiting to speak: there is nothing more to say.

    async def listen(self, heard: trio.MemorySendChannel[Heard]) -> None:
        """Pass on what the hop says until it is lost, which is the last thing passed on, or let go of."""
        with self.listening:
            try:
                while True:
                    frame = await self.stream.receive()
                    if frame is None:
                        raise PeerUnreachable(self.peer, "ended the session")
                    message = session_codec.decode_only(frame)
                    if not isinstance(message, Said):
                        raise RemoteProtocolError(f"sent {type(message).__name__} in a running session", self.peer)
                    await heard.send(Heard(self, message))
            except LocalProtocolError:
                if not self.listening.cancel_called:
                    raise
                # Let go of between two frames: the stream says that it was reset before it looks for the cancellation.
            except PeerError as error:
                await heard.send(Heard(self, error))

    def answered(self, progress: Progress) -> None:
        """It said how far it is."""
        self.received, self.n_answers = max(self.received, progress.received), self.n_answers + 1

    def n_known(self, n_prompt: int) -> int:
        """How many tokens this first hop has for certain: those of the prompt it was opened with, before any answer."""
        return max(self.received + 1, n_prompt)

    async def abandon(self) -> None:
        """Let go of the hop at once; nobody may still be receiving from its stream then."""
        self.let_go = True
        self.listening.cancel()
        with trio.move_on_after(CLOSE_PATIENCE_S, shield=True):
            await self.stream.reset()

    async def dismiss(self) -> None:
        """Let go of the hop in peace: it hears that its work is done."""
        self.let_go = True
        self.listening.cancel()
        with trio.move_on_after(CLOSE_PATIENCE_S, shield=True):
            await self.stream.aclose()


@dataclass(frozen=True, slots=True)
class Heard:
    """What a hop said, or how it was lost; None: nothing, but something else happened that concerns it."""

    control: Control
    what: Said | PeerError | None


async def dismiss_all(controls: Iterable[Control]) -> None:
    """Let go of several hops in peace, side by side."""
    with trio.move_on_after(CLOSE_PATIENCE_S, shield=True):
        async with trio.open_nursery() as nursery:
            for control in controls:
                nursery.start_soon(control.dismiss)


async def abandon_all(controls: Iterable[Control]) -> None:
    """Let go of several hops at once, side by side."""
    with trio.move_on_after(CLOSE_PATIENCE_S, shield=True):
        async with trio.open_nursery() as nursery:
            for control in controls:
                nursery.start_soon(control.abandon)
