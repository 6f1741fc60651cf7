"""`mycel chat`: a conversation."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import trio

from mycel.cli.common import cache_dir, data_dir_option, find_invite, invite_option, say, timeout_option
from mycel.cli.sampling_options import sampling_options, sampling_params

if TYPE_CHECKING:
    from mycel.node.client import Model
    from mycel.swarm.invite import Invite

# Where a model without a chat template begins to write the other side's part.
_PLAIN_STOP = ("\nUser:",)
_MAX_LINE_BYTES = 1 << 20
_READ_BYTES = 65536


@dataclass(frozen=True, slots=True)
class Manner:
    """How to converse."""

    system: str | None
    max_tokens: int
    timeout: float
    show_route: bool
    sampling: dict[str, Any]


@click.command()
@click.option("--system", metavar="TEXT", help="What the model is told before the conversation.")
@click.option(
    "--max-tokens",
    type=click.IntRange(1, 2**20),
    default=256,
    show_default=True,
    metavar="N",
    help="End an answer after so many tokens.",
)
@sampling_options
@click.option("--show-route", is_flag=True, help="After each answer, show the nodes that gave it.")
@timeout_option
@invite_option
@data_dir_option
@click.pass_context
def chat(
    ctx: click.Context,
    /,
    *,
    system: str | None,
    max_tokens: int,
    show_route: bool,
    timeout: float,
    invite: str | None,
    data_dir: Path | None,
    **sampling: Any,
) -> None:
    """Talk with the model of a swarm, one line at a time.

    The conversation is written with the model's own chat template; a model without one gets plain "User:" and
    "Assistant:" lines. Ctrl-C stops an answer, or leaves when none is under way; so does Ctrl-D.
    """
    manner = Manner(system, max_tokens, timeout, show_route, sampling)
    ctx.exit(trio.run(_chat, manner, find_invite(invite), cache_dir(data_dir)))


async def _chat(manner: Manner, invite: Invite, cache: Path) -> int:
    from mycel.cli.exits import INTERRUPTED
    from mycel.node.client import connect
    from mycel.node.model_store import ModelStore

    async with connect(invite, cache_dir=cache) as model:
        sampling = sampling_params(manner.sampling, ModelStore(cache).directory(invite.swarm))
        conversation = Conversation(model, manner, {"sampling": sampling, "patience_s": manner.timeout})
        asking = sys.stdin.isatty()
        if asking:
            say(f"{model.manifest.name}: type a line; Ctrl-C stops an answer, Ctrl-D leaves")
        lines = Lines(0)
        with trio.open_signal_receiver(signal.SIGINT) as signals:
            while True:
                if asking:
                    click.echo("> ", err=True, nl=False)
                if await _interrupted(signals, lines.read):
                    say("")
                    return INTERRUPTED
                if lines.last is None:
                    if asking:
                        say("")
                    return 0
                question = lines.last.strip()
                if question and await _interrupted(signals, partial(conversation.answer, question)):
                    say(" (stopped)")


async def _interrupted(signals: Any, job: Callable[[], Awaitable[None]]) -> bool:
    """Do `job` until it is done or Ctrl-C stops it; whether Ctrl-C did."""
    from mycel.node.background import background

    stopped = False

    async def watch() -> None:
        nonlocal stopped
        await anext(signals)
        stopped = True
        scope.cancel()

    with trio.CancelScope() as scope:
        async with background() as tasks:
            tasks.start_soon(watch)
            await job()
    return stopped


@dataclass(eq=False, slots=True)
class Lines:
    """Lines of a file descriptor, one at a time; `last` is None once there is no more.

    Not sys.stdin: a thread that waits in it, when Ctrl-C ends the program, makes Python's own end fail.
    """

    descriptor: int
    last: str | None = None
    _buffer: bytes = b""
    _ended: bool = False

    async def read(self) -> None:
        """Wait for the next line; it is in `last` then. Cancelled, it leaves a thread behind that reads on."""
        while b"\n" not in self._buffer and not self._ended and len(self._buffer) < _MAX_LINE_BYTES:
            data = await trio.to_thread.run_sync(os.read, self.descriptor, _READ_BYTES, abandon_on_cancel=True)
            self._buffer += data
            self._ended = not data
        line, _, self._buffer = self._buffer.partition(b"\n")
        self.last = None if self._ended and not line and not self._buffer else line.decode("utf-8", "replace")


@dataclass(eq=False, slots=True)
class Conversation:
    """What was said so far, and how to go on. `options` are those of `Model.generate`."""

    model: Model
    manner: Manner
    options: dict[str, Any]
    messages: list[dict[str, str]] = field(default_factory=list)

    async def answer(self, question: str) -> None:
        """Show the answer to `question`; of one that was stopped, what was shown stays part of the conversation.

        Raises what `Model.generate` raises; the question is then forgotten.
        """
        from mycel.cli.answers import show_route, stream_text, summary

        self.messages.append({"role": "user", "content": question})
        stop = _PLAIN_STOP if self.model.codec.template is None else ()
        said = ""
        try:
            # A template runs in a process of its own, for as long as seconds; heartbeats must go on.
            tokens = await trio.to_thread.run_sync(self._prompt)
            async with self.model.generate(
                tokens, max_new_tokens=self.manner.max_tokens, stop=stop, **self.options
            ) as generation:
                try:
                    await stream_text(generation)
                finally:
                    said = generation.text.strip()
        finally:
            if said:
                self.messages.append({"role": "assistant", "content": said})
            else:
                self.messages.pop()
        if self.manner.show_route:
            show_route(generation.trace)
            say(summary(generation.trace))

    def _prompt(self) -> list[int]:
        """Token ids of the conversation; what does not fit into the model's context is forgotten, the oldest first."""
        system = [{"role": "system", "content": self.manner.system}] if self.manner.system else []
        forgotten = 0
        while True:
            tokens = self.model.codec.encode_chat([*system, *self.messages])
            too_long = len(tokens) + self.manner.max_tokens > self.model.manifest.max_positions
            if not too_long or len(self.messages) < 3:
                break
            del self.messages[:2]  # a question and its answer
            forgotten += 1
        if forgotten:
            say(f"(the context is full: the oldest {forgotten} of the earlier answers forgotten)")
        return tokens
