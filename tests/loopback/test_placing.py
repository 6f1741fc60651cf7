"""Nodes that choose their blocks: side by side without choosing the same, and again when others have gone."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import trio

from mycel.node.client import Model
from tests.loopback.generating import PROMPT, Run, generate, in_thread, reference, with_model
from tests.loopback.node_process import Nodes

pytestmark = [pytest.mark.loopback, pytest.mark.slow]

N_NEW = 400


def test_who_joins_at_the_same_moment_does_not_choose_the_same(llama: Path, tmp_path: Path) -> None:
    """The founder holds one of four blocks; three newcomers, started side by side, take the other three."""
    with Nodes(tmp_path, llama) as nodes:
        founder = nodes.start_one(max_blocks=1)
        others = [nodes._begin(max_blocks=1) for _ in range(3)]
        for node in others:
            node.wait_until_ready()
        spans = sorted((node.serving.start, node.serving.end) for node in nodes.living)
        assert spans == [(0, 1), (1, 2), (2, 3), (3, 4)]
        run = with_model(founder.invite, lambda model: generate(model, PROMPT, 20))
        assert run.tokens == reference(llama, PROMPT, 20)


@pytest.mark.parametrize("has_files", [True, False])
def test_survivors_take_over_blocks_that_nobody_serves_any_more(has_files: bool, llama: Path, tmp_path: Path) -> None:
    """Nodes of two blocks each, at 0:2, 2:4 and 1:3. The only holder of block 3 is killed: 1:3 moves."""
    with Nodes(tmp_path, llama) as nodes:
        options = {"max_blocks": 2, "rebalance_s": 4.0, "ttl_s": 4.0}
        founder = nodes.start_one(**options)
        sole, helper = (nodes.start_one(**options, **({} if has_files else {"model": None})) for _ in range(2))
        spans = [(node.serving.start, node.serving.end) for node in (founder, sole, helper)]
        assert spans == [(0, 2), (2, 4), (1, 3)]

        async def use(model: Model) -> Run:
            return await generate(model, PROMPT, N_NEW, {60: lambda _: sole.kill()}, n_losses=1)

        run = with_model(founder.invite, use)
        assert run.tokens == reference(llama, PROMPT, N_NEW)[: len(run.tokens)]
        assert run.lost[0] == sole.peer
        assert set(run.lost) <= {sole.peer, helper.peer}, "who moved has let go of the session"
        assert run.peers == [founder.peer, helper.peer]
        assert not founder.events("node.moving")
        [moving] = helper.events("node.moving")
        assert moving["blocks"] == "2:4"
        assert "nobody serves 3:4" in moving["reason"]


def test_a_node_that_is_told_its_blocks_stays_there(llama: Path, tmp_path: Path) -> None:
    with Nodes(tmp_path, llama) as nodes:
        _, told, sole = nodes.start((0, 2), (0, 2), (2, 4), rebalance_s=1.0, ttl_s=2.0)

        async def use(model: Model) -> None:
            await in_thread(partial(sole.kill))
            with trio.move_on_after(8.0):
                await generate(model, PROMPT, 20)
                raise AssertionError("somebody moved")

        with_model(told.invite, use)
        assert not any(node.events("node.moving") for node in nodes.living)
