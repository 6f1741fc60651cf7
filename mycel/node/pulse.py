"""Heartbeats on a stream, for peers whose network lives in a process beside their own.

A daemon that holds a node's connections goes on answering for it while the node itself hangs or is stopped, so such a
node beats on a stream of its own: who answers the beats also hears when they cease.

Ring: shell (awaits a stream).
"""

from __future__ import annotations

import trio

from mycel.protocols.errors import RemoteProtocolError
from mycel.protocols.ports import Stream

_MAX_PING_BYTES = 32


async def answer_pings(stream: Stream, interval_s: float, silence_s: float) -> bool:
    """Echo each frame until the peer ends the stream; True if it fell silent instead. Raises PeerErrors."""
    last = trio.current_time()
    while True:
        due = trio.current_time() + interval_s
        frame: memoryview | None = None
        with trio.move_on_after(interval_s) as patience:
            frame = await stream.receive()
            if frame is None:
                return False
            if len(frame) > _MAX_PING_BYTES:
                raise RemoteProtocolError(f"sent a ping of {len(frame)} bytes", stream.peer)
        now = trio.current_time()
        if frame is not None:
            last = now
            with trio.move_on_after(silence_s) as patience:
                await stream.send(frame)
            if patience.cancelled_caught:
                return True
        elif patience.cancelled_caught:
            if now - due > interval_s:  # we slept ourselves: what it sent meanwhile is still to be read
                last = max(last, now - interval_s)
            if now - last > silence_s - interval_s / 2:
                return True
