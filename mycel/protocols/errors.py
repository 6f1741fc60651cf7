"""The error tree: every error names who must act.

    MycelError
    ├── ConfigError                the user: one line, no traceback
    │   └── AccessDenied           ... by changing who may read or write what
    ├── LocalProtocolError         us: a bug, crashes the task
    ├── PeerError(peer)            someone else
    │   ├── PeerUnreachable        no connection, or it broke
    │   ├── PeerTimeout            connected, but silent past its deadline
    │   ├── PeerRefused            said no for a stated reason; no penalty
    │   ├── RemoteProtocolError    broke the rules
    │   └── VerificationError      caught lying; keeps the evidence
    └── RouteUnavailable           nobody covers the blocks

Ring: pure.
"""

from __future__ import annotations

__all__ = [
    "AccessDenied",
    "ConfigError",
    "LocalProtocolError",
    "MycelError",
    "PeerError",
    "PeerRefused",
    "PeerTimeout",
    "PeerUnreachable",
    "RemoteProtocolError",
    "RouteUnavailable",
    "VerificationError",
    "one_line",
]


class MycelError(Exception):
    """Root of all errors that Mycel raises on purpose."""


class ConfigError(MycelError):
    """The user has to change something; the message is one line that says what."""


class AccessDenied(ConfigError):
    """A file may not be read or written, or could be read by too many."""


class LocalProtocolError(MycelError):
    """We asked for something that the protocol forbids: our bug."""


class PeerError(MycelError):
    """A peer failed us. `peer` is its id, or "" where bytes could not be attributed yet."""

    def __init__(self, peer: str, reason: str) -> None:
        reason = one_line(reason)
        super().__init__(peer, reason)
        self.peer = peer
        self.reason = reason

    def __str__(self) -> str:
        return f"{self.reason} (peer {one_line(self.peer[-8:])})" if self.peer else self.reason


class PeerUnreachable(PeerError):
    """No connection to the peer could be made, or the one that was there broke."""


class PeerTimeout(PeerError):
    """The peer is connected but did not answer within the caller's patience."""


class PeerRefused(PeerError):
    """The peer declined with a reason (full, leaving, not admitted); it is not to blame."""


class RemoteProtocolError(PeerError):
    """The peer sent bytes or messages that the protocol forbids."""

    def __init__(self, reason: str, peer: str = "") -> None:
        super().__init__(peer, reason)


class VerificationError(PeerError):
    """The peer signed something false; `evidence` lets a third party check it."""

    def __init__(self, peer: str, reason: str, evidence: bytes = b"") -> None:
        super().__init__(peer, reason)
        self.evidence = evidence


class RouteUnavailable(MycelError):
    """No chain of live peers covers the blocks `missing`, half-open ranges."""

    def __init__(self, missing: tuple[tuple[int, int], ...], reason: str = "") -> None:
        blocks = ", ".join(f"{start}:{end}" for start, end in missing)
        super().__init__(reason or f"no live peer serves blocks {blocks}")
        self.missing = missing


def one_line(text: str) -> str:
    """`text` as a terminal may show it: peers choose reasons, and must not choose escape sequences or more lines."""
    return text if text.isprintable() else "".join(c if c.isprintable() else " " for c in text)
