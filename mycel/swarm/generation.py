"""What a generation is asked for, and what happens in it, as values.

Ring: pure.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from mycel.protocols.messages import HopTiming, SamplingParams
from mycel.swarm.routing import Hop


@dataclass(frozen=True, slots=True)
class Request:
    """What to generate: token ids in, at most `max_new_tokens` out, for at most `patience_s` without progress."""

    prompt: tuple[int, ...]
    max_new_tokens: int
    sampling: SamplingParams = field(default_factory=SamplingParams)
    eos_token_ids: tuple[int, ...] = ()
    patience_s: float = 60.0
    vocab_size: int = 2**31

    @property
    def max_tokens(self) -> int:
        return len(self.prompt) + self.max_new_tokens


@dataclass(frozen=True, slots=True)
class NewToken:
    """A token of the generation. `finish` is "" or "stop" (end of text) or "length"; `at_s` is the local clock."""

    position: int
    token: int
    finish: str
    timings: tuple[HopTiming, ...]
    at_s: float


@dataclass(frozen=True, slots=True)
class RouteChosen:
    """The chain is set up or changed; `reason` says why this one.

    `lost`: who failed and why, with `position` as far as the session had got by then; `moved`: whose work another took
    over while it went on, and how.
    """

    hops: tuple[Hop, ...]
    reason: str
    lost: tuple[tuple[str, str], ...] = ()
    moved: tuple[tuple[str, str], ...] = ()
    position: int = 0


SessionEvent = NewToken | RouteChosen
