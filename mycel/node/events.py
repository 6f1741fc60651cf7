"""Events, not prose: one line for each decision, with its reason, to a file or to standard error.

Ring: shell (writes, reads the clock).
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Protocol, TextIO

# Where a person is told something, a line at a time.
Say = Callable[[str], None]


class EventSink(Protocol):
    """Where a decision is told: its name, such as "hop.failed", and its facts."""

    def __call__(self, name: str, /, **fields: object) -> None: ...


@dataclass(frozen=True, slots=True)
class EventWriter:
    """Writes events as lines: JSON for programs, or `time name key=value` for people."""

    stream: TextIO
    as_json: bool = False

    def __call__(self, name: str, /, **fields: object) -> None:
        at = datetime.now(UTC).isoformat(timespec="milliseconds")
        if self.as_json:
            line = json.dumps({"at": at, "event": name, **fields}, default=str)
        else:
            line = " ".join([at, name, *(f"{key}={_shown(value)}" for key, value in fields.items())])
        print(line, file=self.stream, flush=True)


def _shown(value: object) -> str:
    text = str(value)
    return json.dumps(text) if any(c.isspace() or c == '"' for c in text) or not text.isprintable() else text


def no_events(name: str, /, **fields: object) -> None:
    """For who does not listen."""


def stderr_events() -> EventWriter:
    return EventWriter(sys.stderr)
