"""One hop's side of an inference session: which messages are legal now, and what is still to be computed or sent.

A hop keeps everything it put out (`OutputLog`), so that a replaced neighbour is refilled from here and not through the
client; whoever receives drops what it has already computed. The two together make every resend harmless: outputs depend
on the inputs alone, so a position means the same bytes whoever sends it and however often.

    previous hop --Step/NextToken--> accept() -> compute -> log.append() -> cursor.pending() --> next hop

Ring: pure.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Generic, TypeVar

from mycel.protocols.errors import LocalProtocolError, RemoteProtocolError
from mycel.protocols.messages import OpenHop, PeerAddress, Relink

T = TypeVar("T")

# In one step, at most: a longer prompt goes in several, so that the next hops work while this one goes on.
MAX_STEP_TOKENS = 256


@dataclass(frozen=True, slots=True)
class Output(Generic[T]):
    """What the hop put out for positions [position, position + count)."""

    position: int
    count: int
    value: T

    @property
    def end(self) -> int:
        return self.position + self.count


@dataclass(slots=True)
class OutputLog(Generic[T]):
    """All outputs of the session, in order and without gaps."""

    outputs: list[Output[T]] = field(default_factory=list)

    def append(self, position: int, count: int, value: T) -> None:
        if self.outputs and position != self.outputs[-1].end:
            raise LocalProtocolError(f"output for position {position} leaves a gap")
        self.outputs.append(Output(position, count, value))


@dataclass(slots=True)
class LogCursor(Generic[T]):
    """What one link has been given of the log: everything before `position`, or its peer has it already.

    An output of which the peer has a part is given whole; the peer skips what it has.
    """

    log: OutputLog[T]
    position: int = 0
    _index: int = 0

    def pending(self) -> Output[T] | None:
        """The next output to give, or None."""
        outputs = self.log.outputs
        while self._index < len(outputs) and outputs[self._index].end <= self.position:
            self._index += 1
        return outputs[self._index] if self._index < len(outputs) else None

    def has_history(self) -> bool:
        """Whether more than one output is to be given: worth asking what of it the peer lacks."""
        return self.pending() is not None and self._index + 1 < len(self.log.outputs)

    def given(self, output: Output[T]) -> None:
        """The link took `output`. (Whoever is unsure gives it again: the receiver skips what it has.)"""
        self.position = max(self.position, output.end)

    def skip_to(self, position: int) -> None:
        """The peer lacks nothing before `position`."""
        self.position = max(self.position, position)

    def rewind(self) -> None:
        """Nobody knows what arrived: everything has to be given again, unless the peer says what it lacks."""
        self.position = self._index = 0


@dataclass(slots=True)
class HopMachine:
    """The rules of one hop. `position` counts the inputs accepted so far."""

    opening: OpenHop
    n_blocks: int
    position: int = 0
    previous: PeerAddress = field(init=False)
    next: PeerAddress = field(init=False)
    inbound: int = field(init=False)
    outbound: int = field(init=False)

    def __post_init__(self) -> None:
        o = self.opening
        if not o.start < o.end <= self.n_blocks:
            raise RemoteProtocolError(f"blocks {o.start}:{o.end} of a model with {self.n_blocks}")
        if self.is_first != bool(o.prompt):
            raise RemoteProtocolError("a prompt belongs to the first hop, and to it alone")
        if self.is_last != (o.generation is not None):
            raise RemoteProtocolError("sampling belongs to the last hop, and to it alone")
        if o.generation is not None and not 0 < len(o.generation.tokens) < o.generation.max_position <= o.max_tokens:
            raise RemoteProtocolError("the generation does not fit the session's max_tokens")
        if o.generation is not None and self.is_first and o.generation.tokens != o.prompt:
            raise RemoteProtocolError("the prompt is not what the generation goes on from")
        if len(o.prompt) >= o.max_tokens:
            raise RemoteProtocolError(f"a prompt of {len(o.prompt)} tokens in a session of {o.max_tokens}")
        self.previous, self.next, self.inbound, self.outbound = o.previous, o.next, o.inbound, o.outbound

    @property
    def is_first(self) -> bool:
        return self.opening.start == 0

    @property
    def is_last(self) -> bool:
        return self.opening.end == self.n_blocks

    @property
    def is_alone(self) -> bool:
        """Whether the chain has no other hop: nothing is pushed to anybody."""
        return self.is_first and self.is_last

    def may_attach(self, peer: str, link: int) -> bool:
        """Whether `peer` may push inputs to this session over `link` now."""
        return peer == self.previous.peer and link == self.inbound

    def accept(self, position: int, count: int) -> int:
        """Take inputs for [position, position + count): how many of them to skip because they were computed before.

        Raises RemoteProtocolError for a gap or more than max_tokens; the state is then as before.
        """
        if count < 1:
            raise RemoteProtocolError("a step without tokens")
        if position > self.position:
            raise RemoteProtocolError(f"input for position {position}, expected {self.position}")
        if position + count > self.opening.max_tokens:
            raise RemoteProtocolError(f"position {position + count} in a session of {self.opening.max_tokens} tokens")
        skip = min(count, self.position - position)
        self.position += count - skip
        return skip

    def usable(self, position: int) -> int:
        """How much of a state of `position` tokens this hop can begin from.

        A last hop has to sample itself whatever follows the tokens that it knows.
        """
        generation = self.opening.generation
        return position if generation is None else min(position, len(generation.tokens) - 1)

    def take_over(self, position: int) -> None:
        """Begin at `position`: what the inputs before it led to was handed over. LocalProtocolError once begun."""
        if self.position or position != self.usable(position) or position >= self.opening.max_tokens:
            raise LocalProtocolError(f"a state of {position} tokens for a hop at position {self.position}")
        self.position = position

    def relink(self, message: Relink) -> tuple[bool, bool]:
        """Take the new neighbours; whether the link from the previous hop and the one to the next are new ones."""
        changed = message.inbound != self.inbound, message.outbound != self.outbound
        self.previous, self.next = message.previous, message.next
        self.inbound, self.outbound = message.inbound, message.outbound
        return changed
