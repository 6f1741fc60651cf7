"""Session memory: who is full is passed over, an answer says so where all are, and it comes back when a client dies."""

from __future__ import annotations

import multiprocessing
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
import trio

from mycel.node.client import Model, connect
from mycel.protocols.errors import RouteUnavailable
from mycel.swarm.view import View
from tests.loopback.generating import PROMPT, generate, reference, until, with_model
from tests.loopback.node_process import Nodes

pytestmark = [pytest.mark.loopback, pytest.mark.slow]

ROOM = 256
TTL_S = 3.0


def free_tokens(view: View) -> list[int]:
    return [peer.kv_free_tokens for _, peer in sorted(view.peers.items())]


def test_a_full_peer_is_passed_over_and_when_all_are_the_answer_says_so(llama: Path, tmp_path: Path) -> None:
    async def use(model: Model) -> None:
        fills = ROOM - len(PROMPT)
        async with model.generate(PROMPT, max_new_tokens=fills) as first:
            await anext(first)
            second = await generate(model, PROMPT, fills)
            assert second.tokens == reference(llama, PROMPT, fills)
            assert second.peers != [hop.peer.peer for hop in first.trace.hops]
            assert second.trace.replaced == [], "a peer that is full has not failed"
            async with model.generate(PROMPT, max_new_tokens=fills) as third:
                await anext(third)
                with pytest.raises(RouteUnavailable) as caught:
                    await generate(model, PROMPT, 10, patience_s=0.5)
                assert str(caught.value).count("KV memory is full: ") == 2

    with Nodes(tmp_path, llama) as nodes:
        nodes.start((0, 4), (0, 4), kv_tokens=ROOM)
        with_model(nodes.invite, use)


def test_memory_comes_back_when_a_client_is_killed(llama: Path, tmp_path: Path) -> None:
    """The directory shows what is reserved while the client lives, and that it is free again once it is dead."""
    context = multiprocessing.get_context("forkserver")
    with Nodes(tmp_path, llama) as nodes:
        nodes.start((0, 2), (2, 4), kv_tokens=1000, ttl_s=TTL_S)
        ours, theirs = context.Pipe()
        client = context.Process(target=_hold_a_session, args=(theirs, nodes.invite), daemon=True)

        async def use(model: Model) -> None:
            await until(model, lambda view: free_tokens(view) == [1000, 1000])
            client.start()
            held = await until(model, lambda view: max(free_tokens(view)) < 1000)
            assert free_tokens(held) == [1000 - 600] * 2
            assert ours.poll(0), "the session had not even begun"
            client.kill()
            await until(model, lambda view: free_tokens(view) == [1000, 1000])

        try:
            with_model(nodes.invite, use)
        finally:
            client.kill()
            client.join()
        for node in nodes.nodes:
            [closed] = node.events("session.closed")
            assert "connection was lost" in closed["reason"]


def _hold_a_session(pipe: Connection, invite: str) -> None:
    async def main() -> None:
        async with connect(invite) as model, model.generate(PROMPT, max_new_tokens=600 - len(PROMPT)) as generation:
            await anext(generation)
            pipe.send("holding")
            await trio.sleep_forever()

    trio.run(main)
