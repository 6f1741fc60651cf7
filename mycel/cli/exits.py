"""How a command ends: what an error means to the shell (sysexits.h where it has a number), and the line that tells it.

Ring: pure.
"""

from __future__ import annotations

from mycel.protocols.errors import (
    AccessDenied,
    ConfigError,
    MycelError,
    PeerError,
    PeerRefused,
    PeerTimeout,
    PeerUnreachable,
    RemoteProtocolError,
    RouteUnavailable,
    VerificationError,
)

FAILURE = 1
USAGE = 2
NO_ROUTE = 69
INTERNAL = 70
TIMEOUT = 75
PROTOCOL = 76
PERMISSION = 77
CONFIG = 78
INTERRUPTED = 130
BROKEN_PIPE = 141
TERMINATED = 143

# The first that fits counts, so children stand before their parents.
_CODES: tuple[tuple[type[BaseException], int], ...] = (
    (AccessDenied, PERMISSION),
    (ConfigError, CONFIG),
    (PeerTimeout, TIMEOUT),
    (PeerRefused, PERMISSION),
    (PeerUnreachable, NO_ROUTE),
    (VerificationError, PROTOCOL),
    (RemoteProtocolError, PROTOCOL),
    (PeerError, NO_ROUTE),
    (RouteUnavailable, NO_ROUTE),
    (KeyboardInterrupt, INTERRUPTED),
    (BrokenPipeError, BROKEN_PIPE),
)


class NodeFailedError(MycelError):
    """A node process that this command started ended by itself; `code` is what this command should end with."""

    def __init__(self, message: str, code: int) -> None:
        super().__init__(message)
        self.code = code


class CommandFailedError(MycelError):
    """The command could be carried out, and what it found is a failure; one line says which."""


def exit_code(error: BaseException) -> int | None:
    """What the shell is told about `error`, or None for an error that nobody foresaw."""
    if isinstance(error, NodeFailedError):
        return error.code
    if isinstance(error, CommandFailedError):
        return FAILURE
    return next((code for kind, code in _CODES if isinstance(error, kind)), None)


def one_line(text: str) -> str:
    """`text` on one line, with nothing that a terminal would obey: parts of it may come from peers."""
    return printable(" ".join(text.split()))


def printable(text: str) -> str:
    """`text` with "?" for every control character but line ends and tabs."""
    return "".join(sign if sign.isprintable() or sign in "\n\t" else "?" for sign in text)
