"""A stage from weights and checkpoints on a disk: what is made, taken up, given to others, and gone back to."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TypeVar

import pytest
import torch
import trio

from mycel.node.events import no_events
from mycel.node.training.checkpoint_files import CheckpointPlace
from mycel.node.training.stage import TorchStage
from mycel.node.training.workshop import TorchWorkshop, stage_bytes
from mycel.node.training.workshop_port import Holding
from mycel.protocols.errors import ConfigError
from mycel.protocols.ports import Done
from mycel.swarm.training.plan import RunPlan
from mycel.swarm.training.recipe import CheckpointPart, Recipe
from tests.tiny_models import make_tiny_model, make_tiny_tokenizer

RUN = bytes(range(32))
PLAN = RunPlan(RUN, ((0, 2), (2, 4)), n_steps=20, n_microbatches=2, n_sequences=1, n_tokens=4)
RECIPE = Recipe(name="tiny", stages=2, checkpoint=CheckpointPart(every=5))
T = TypeVar("T")


class Here:
    """A compute thread that is none."""

    async def run(self, job: Callable[[], T], *, cost_s: float = 0.0) -> Done[T]:
        await trio.lowlevel.checkpoint()
        return Done(job(), 0.0, 0.0)


@dataclass
class Desk:
    """What a workshop finds in its node, and what it was asked for."""

    model: Path
    checkpoints: Path
    memory_bytes: int = 1 << 30
    spans: list[tuple[int, int]] = field(default_factory=list)
    fetched: list[tuple[int, int]] = field(default_factory=list)
    opened: list[Any] = field(default_factory=list)

    def workshop(self) -> TorchWorkshop:
        async def nothing(*_: object) -> None:
            await trio.lowlevel.checkpoint()

        async def opened(span: object) -> None:
            self.opened.append(span)

        async def fetch(start: int, end: int) -> None:
            self.fetched.append((start, end))

        station: Any = SimpleNamespace(
            model=SimpleNamespace(directory=self.model),
            compute=Here(),
            config=SimpleNamespace(leave_s=1.0),
            claim=lambda *span: self.spans.append(span),
            open=opened,
            close=nothing,
        )
        place = CheckpointPlace(self.checkpoints, self.model, RUN, sha256(b"recipe").digest(), keep=2)
        announcer: Any = SimpleNamespace(say=nothing)
        return TorchWorkshop(station, announcer, PLAN, RECIPE, place, self.memory_bytes, fetch, no_events)

    @asynccontextmanager
    async def holding(self, index: int) -> AsyncIterator[tuple[TorchWorkshop, Holding]]:
        """A stage that was made and opened, with whatever writes checkpoints at work."""
        workshop = self.workshop()
        async with trio.open_nursery() as nursery:
            workshop.tasks = nursery
            holding = await workshop.make(index)
            await workshop.open(holding)
            yield workshop, holding
            nursery.cancel_scope.cancel()


@pytest.fixture(scope="module", params=["llama", "llama-tied"])
def model(request, tmp_path_factory) -> Path:
    directory = make_tiny_tokenizer(make_tiny_model(request.param, tmp_path_factory.mktemp("model"), 4))
    (directory / "recipe.toml").write_text('name = "tiny"\n')
    return directory


@pytest.fixture
def desk(model: Path, tmp_path: Path) -> Desk:
    return Desk(model, tmp_path / "checkpoints")


async def train(workshop: TorchWorkshop, holding: Holding, steps: int) -> dict[int, bytes]:
    """Make steps with made-up gradients, as a stepper does; the state after each, by version."""
    states: dict[int, bytes] = {}
    for _ in range(steps):
        generator = torch.Generator().manual_seed(holding.state.version)
        holding.state.apply(torch.randn(holding.stage.n_elements, generator=generator), 1.0)
        version = holding.state.version
        states[version] = bytes(holding.state.snapshot())
        await workshop.after_step(holding, version)
        await workshop.settled()
    return states


def run(main: Callable[[], Awaitable[None]]) -> None:
    trio.run(main)


def test_a_stage_is_made_of_the_first_weights(desk: Desk) -> None:
    async def main() -> None:
        async with desk.holding(1) as (workshop, holding):
            assert (holding.stage.index, holding.state.version) == (1, 0)
            assert desk.spans == desk.fetched == [(2, 4)]
            assert [(span.start, span.end) for span in desk.opened] == [(2, 4)]
            assert (workshop.kept, workshop.whole) == (0, 0)
            await workshop.restore(holding, None)
            assert holding.state.version == 0
            wanted = TorchStage.load(desk.model, PLAN, 1, RECIPE).params_P
            assert isinstance(holding.stage, TorchStage)
            assert torch.equal(holding.stage.params_P, wanted)
            tied = holding.stage.tied
            assert (holding.tied_end is None) == (tied is None)
            if tied is not None:
                assert holding.tied_end is not None
                assert holding.tied_end.stage == 0

    run(main)


def test_a_stage_that_does_not_fit_is_refused(desk: Desk) -> None:
    desk.memory_bytes = stage_bytes(desk.workshop().layout(0)) - 1

    async def main() -> None:
        with pytest.raises(ConfigError, match=r"stage 0 takes .* to train, .* may be used"):
            await desk.workshop().make(0)

    run(main)


def test_what_is_on_disk_is_taken_up_by_the_next_process(desk: Desk) -> None:
    """Its own part alone: nothing is whole, and it is the newest there is."""

    async def main() -> None:
        async with desk.holding(0) as (workshop, holding):
            states = await train(workshop, holding, 12)
            assert (workshop.kept, workshop.whole) == (10, 0)
        async with desk.holding(0) as (workshop, holding):
            assert workshop.kept == 10, "known before anything is restored"
            assert holding.state.version == 0
            await workshop.restore(holding, None)
            assert (holding.state.version, bytes(holding.state.snapshot())) == (10, states[10])
            await workshop.restore(holding, 9)
            assert (holding.state.version, bytes(holding.state.snapshot())) == (5, states[5])
            assert workshop.kept == 5
            await workshop.restore(holding, 4)
            assert (holding.state.version, workshop.kept) == (0, 0)
            assert isinstance(holding.stage, TorchStage)
            assert torch.equal(holding.stage.params_P, TorchStage.load(desk.model, PLAN, 0, RECIPE).params_P)
            assert await train(workshop, holding, 10) == {v: states[v] for v in range(1, 11)}

    run(main)


def test_stages_that_share_a_directory_make_it_whole(desk: Desk) -> None:
    async def main() -> None:
        async with desk.holding(0) as (first, a), desk.holding(1) as (last, b):
            states = [await train(first, a, 5), await train(last, b, 5)]
            assert last.whole == 5
            await train(first, a, 1)  # it looks when it has made a step
            with trio.fail_after(5):
                while first.whole != 5:  # noqa: ASYNC110 - found by a task of its own
                    await trio.sleep(0.01)
        # Another machine's process may hold any stage of it, and gives what it does not hold.
        for index in range(2):
            async with desk.holding(1 - index) as (workshop, holding):
                assert workshop.kept == 5
                given = await workshop.archived(index, 5)
                assert given is not None
                assert bytes(given[0]) == states[index][5]
                n_bytes = 4 * workshop.layout(index).n_elements
                assert given[1] == sha256(states[index][5][:n_bytes]).digest()
                assert await workshop.archived(index, 4) is None
                await workshop.restore(holding, None)
                assert bytes(holding.state.snapshot()) == states[1 - index][5]
                assert (
                    holding.state.params_digest()
                    == sha256(states[1 - index][5][: 4 * holding.stage.n_elements]).digest()
                )

    run(main)


def test_a_state_from_elsewhere_is_written_down(desk: Desk, tmp_path: Path) -> None:
    async def main() -> None:
        async with desk.holding(0) as (workshop, holding):
            states = await train(workshop, holding, 5)
        other = Desk(desk.model, tmp_path / "elsewhere")
        async with other.holding(0) as (workshop, holding):
            await workshop.store(holding, 5, memoryview(states[5]))
            assert workshop.kept == 5
            await workshop.restore(holding, None)
            assert bytes(holding.state.snapshot()) == states[5]

    run(main)


def test_a_damaged_part_is_passed_over(desk: Desk) -> None:
    async def main() -> None:
        async with desk.holding(0) as (workshop, holding):
            await train(workshop, holding, 5)
        [file] = desk.checkpoints.glob("*/training/stage-0.safetensors")
        data = bytearray(file.read_bytes())
        data[-1] ^= 1
        file.write_bytes(data)
        async with desk.holding(0) as (workshop, holding):
            await workshop.restore(holding, None)
            assert (holding.state.version, workshop.kept) == (0, 0)

    run(main)
