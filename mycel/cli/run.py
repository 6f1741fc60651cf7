"""`mycel run`: the answer to a prompt, or to several."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import trio

from mycel.cli.common import cache_dir, data_dir_option, find_invite, invite_option, say, timeout_option, write
from mycel.cli.sampling_options import sampling_options, sampling_params

if TYPE_CHECKING:
    from mycel.node.client import Model
    from mycel.swarm.invite import Invite


@dataclass(frozen=True, slots=True)
class Wish:
    """What to generate and how to show it."""

    prompts: tuple[str, ...]
    max_tokens: int
    stop: tuple[str, ...]
    timeout: float
    show_route: bool
    as_json: bool
    sampling: dict[str, Any]


@click.command()
@click.argument("prompts", nargs=-1, required=True, metavar="PROMPT...")
@click.option(
    "--max-tokens",
    type=click.IntRange(1, 2**20),
    default=128,
    show_default=True,
    metavar="N",
    help="Stop after so many new tokens.",
)
@sampling_options
@click.option("--stop", multiple=True, metavar="TEXT", help="Stop before this text; may be repeated.")
@click.option("--show-route", is_flag=True, help="Show the nodes that answered, and where the time went.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object for each prompt, at the end.")
@timeout_option
@invite_option
@data_dir_option
def run(  # noqa: PLR0913  one parameter for each option
    *,
    prompts: tuple[str, ...],
    max_tokens: int,
    stop: tuple[str, ...],
    show_route: bool,
    as_json: bool,
    timeout: float,
    invite: str | None,
    data_dir: Path | None,
    **sampling: Any,
) -> None:
    """Let the swarm continue PROMPT; the text streams to stdout.

    PROMPT - is read from stdin. Several prompts are answered side by side. Unless told otherwise, tokens are chosen as
    the model's own generation_config.json recommends, and greedily if it says nothing.

    With --show-route: for each hop the milliseconds that a token spent in computing and waiting there, and the average
    of the network links between them.
    """
    texts = tuple(_from_stdin() if prompt == "-" else prompt for prompt in prompts)
    if not all(texts):
        raise click.UsageError("the prompt is empty")
    wish = Wish(texts, max_tokens, stop, timeout, show_route, as_json, sampling)
    trio.run(_run, wish, find_invite(invite), cache_dir(data_dir))


def _from_stdin() -> str:
    return sys.stdin.read().removesuffix("\n")


async def _run(wish: Wish, invite: Invite, cache: Path) -> None:
    from mycel.node.client import connect
    from mycel.node.model_store import ModelStore

    async with connect(invite, cache_dir=cache) as model:
        sampling = sampling_params(wish.sampling, ModelStore(cache).directory(invite.swarm))
        options: dict[str, Any] = {
            "max_new_tokens": wish.max_tokens,
            "sampling": sampling,
            "stop": wish.stop,
            "patience_s": wish.timeout,
        }
        if len(wish.prompts) == 1 and not wish.as_json:
            await _stream(model, wish, options)
        else:
            await _batch(model, wish, options)


async def _stream(model: Model, wish: Wish, options: dict[str, Any]) -> None:
    """One answer, shown as it comes."""
    from mycel.cli.answers import explain_silence, show_route, stream_text, summary
    from mycel.node.background import background

    async with background() as tasks, model.generate(wish.prompts[0], **options) as generation:
        silence = trio.CancelScope()

        async def explain() -> None:
            with silence:
                await explain_silence(model, wish.timeout)

        tasks.start_soon(explain)
        await stream_text(generation, lambda _: silence.cancel())
    if wish.show_route:
        show_route(generation.trace)
    say(summary(generation.trace))


async def _batch(model: Model, wish: Wish, options: dict[str, Any]) -> None:
    """All answers side by side, shown in the order of the prompts once all are there."""
    from mycel.cli.answers import as_json, show_route, summary
    from mycel.node.background import cause_of
    from mycel.node.client import Generation

    answers: dict[int, Generation] = {}

    async def one(index: int) -> None:
        async with model.generate(wish.prompts[index], **options) as generation:
            async for _ in generation:
                pass
        answers[index] = generation

    try:
        async with trio.open_nursery() as nursery:
            for index in range(len(wish.prompts)):
                nursery.start_soon(one, index)
    except BaseExceptionGroup as group:
        raise cause_of(group) from None
    for index, prompt in enumerate(wish.prompts):
        answer = answers[index]
        if wish.as_json:
            write(json.dumps(as_json(prompt, answer), ensure_ascii=False) + "\n")
            continue
        say(f"[{index + 1}/{len(wish.prompts)}] {prompt}")
        write(answer.text + "\n")
        if wish.show_route:
            show_route(answer.trace)
        say(summary(answer.trace))
