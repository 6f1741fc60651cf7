"""What one process says to a prompt (transformers' own generate), and what a swarm says and what happens meanwhile."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any, TypeVar

import torch
import trio
from transformers import AutoModelForCausalLM

from mycel.node.client import Model, connect
from mycel.swarm.trace import RouteTrace
from mycel.swarm.view import View

T = TypeVar("T")
# More than a generation's own patience.
LIMIT_S = 90.0
TOKENS_AFTER = 20
PROMPT = tuple(b"A swarm is a number of small machines")
LONG_PROMPT = tuple(i * 7919 % 256 for i in range(3000))


@cache
def _whole(directory: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()


@cache
def reference(directory: Path, prompt: tuple[int, ...], n_new: int) -> list[int]:
    """The greedy tokens after `prompt`."""
    model = _whole(directory)
    ids = torch.tensor([prompt])
    with torch.inference_mode():
        out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=n_new, do_sample=False)
    return out[0, len(prompt) :].tolist()


@dataclass
class Run:
    """A generation that is over. Gaps are between one token and the next, in seconds."""

    tokens: list[int]
    text: str
    finish: str
    trace: RouteTrace
    longest_gap_s: float

    @property
    def spans(self) -> list[tuple[int, int]]:
        return [(hop.start, hop.end) for hop in self.trace.hops]

    @property
    def peers(self) -> list[str]:
        return [hop.peer.peer for hop in self.trace.hops]

    @property
    def lost(self) -> list[str]:
        return [replaced.peer for replaced in self.trace.replaced]

    @property
    def moved(self) -> list[str]:
        return [moved.peer for moved in self.trace.moved]


Action = Callable[[RouteTrace], object]


async def generate(
    model: Model,
    prompt: Sequence[int] | str,
    n_new: int,
    at: Mapping[int, Action] | None = None,
    *,
    n_losses: int | None = None,
    **options: Any,
) -> Run:
    """Generate to the end, or until some tokens after `n_losses` hops failed or left; at[n] is called at n tokens."""
    longest_s, last_s = 0.0, None
    mended_at: int | None = None
    async with model.generate(prompt, max_new_tokens=n_new, **options) as generation:
        async for _ in generation:
            now, n_tokens = trio.current_time(), len(generation.tokens)
            longest_s = max(longest_s, now - last_s if last_s is not None else 0.0)
            last_s = now
            act = (at or {}).get(n_tokens)
            if act is not None:
                act(generation.trace)
            if mended_at is None and len(generation.trace.replaced + generation.trace.moved) == n_losses:
                mended_at = n_tokens
            if mended_at is not None and n_tokens == mended_at + TOKENS_AFTER:
                break
    return Run(generation.tokens, generation.text, generation.finish, generation.trace, longest_s)


def bounded(main: Callable[[], Awaitable[T]], limit_s: float = LIMIT_S) -> T:
    """Run it, but not for ever."""

    async def run() -> T:
        with trio.fail_after(limit_s):
            return await main()

    return trio.run(run)


def with_model(invite: str, use: Callable[[Model], Awaitable[T]]) -> T:
    """Connect as a client and `use` the model."""

    async def main() -> T:
        async with connect(invite) as model:
            return await use(model)

    return bounded(main)


async def in_thread(call: Callable[..., T], *arguments: Any, **options: Any) -> T:
    """What blocks, such as starting a node, beside what runs in trio."""
    return await trio.to_thread.run_sync(partial(call, *arguments, **options))


async def until(model: Model, condition: Callable[[View], bool], limit_s: float = 20.0) -> View:
    """Wait until the directory says so; it can only be asked again."""
    with trio.fail_after(limit_s):
        while not condition(view := await model.view()):  # noqa: ASYNC110 - the directory announces no change
            await trio.sleep(0.05)
    return view
