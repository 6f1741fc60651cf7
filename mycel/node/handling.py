"""The root of a handler's task, whatever the engine: an error in it is told and recorded, and nobody else notices.

Ring: shell.
"""

from __future__ import annotations

import traceback
from typing import Protocol

from mycel.node.events import EventSink
from mycel.protocols.errors import PeerError
from mycel.protocols.ports import Handler, Stream


class OwnStream(Stream, Protocol):
    """A stream as its transport has it."""

    def abandon(self) -> None:
        """Reset it unless it has ended, without waiting."""
        ...


async def run_handler(handler: Handler, stream: OwnStream, protocol: str, event: EventSink) -> None:
    """Run `handler` on an inbound stream and end the stream; what it raises ends here, but for a cancellation."""

    def crashed(error: BaseException) -> None:
        shown = "".join(traceback.format_exception(error))
        event("handler.crashed", peer=stream.peer, protocol=protocol, reason=repr(error), traceback=shown)

    try:
        await handler(stream)
        await stream.aclose()
    except PeerError as error:
        event("handler.failed", peer=stream.peer, protocol=protocol, reason=str(error))
    except Exception as error:  # noqa: BLE001 - the root of a task; recorded
        crashed(error)
    except BaseExceptionGroup as group:
        # Cancelled and bugs together: the bugs are recorded, the rest goes on.
        bugs, rest = group.split(Exception)
        if bugs is not None:
            crashed(bugs)
        if rest is not None:
            raise rest from None
    finally:
        stream.abandon()
