"""Joining and leaving: who joins fetches its span and is used, finds the others itself, and is missed when it goes."""

from __future__ import annotations

from contextlib import AsyncExitStack
from pathlib import Path

import pytest
import trio

from mycel.node.client import Model
from mycel.node.discovery import meet_neighbours
from mycel.node.events import no_events
from mycel.node.model_info import inspect_model, span_tensors
from mycel.node.model_store import ModelStore
from mycel.node.network import Network, open_network
from mycel.security.identity import Identity
from tests.loopback.generating import PROMPT, bounded, generate, reference, until, with_model
from tests.loopback.node_process import NodeFailed, NodeProcess, Nodes
from tests.tiny_models import make_tiny_model, make_tiny_tokenizer

pytestmark = [pytest.mark.loopback, pytest.mark.slow]


def stored_units(node: NodeProcess) -> set[str]:
    """Names of the units in a node's cache, whose partial folder must be empty of parts."""
    directory = ModelStore(node.config.data_dir / "cache").directory(node.serving.invite.swarm)
    assert not list(directory.glob("partial/*/*.part"))
    return {path.stem for path in directory.glob("*.safetensors")}


def test_a_joiner_without_files_fetches_what_nobody_serves_and_is_used(llama: Path, tmp_path: Path) -> None:
    with Nodes(tmp_path, llama) as nodes:
        [founder] = nodes.start((0, 1))
        joiner = nodes.start_one(model=None, max_blocks=3)
        assert (joiner.serving.start, joiner.serving.end) == (1, 4)
        assert stored_units(joiner) == set(span_tensors(inspect_model(llama), 1, 4))
        run = with_model(founder.invite, lambda model: generate(model, PROMPT, 20))
        assert run.tokens == reference(llama, PROMPT, 20)
        assert run.peers == [founder.peer, joiner.peer]
        units = span_tensors(inspect_model(llama), 1, 4)
        said = [event["line"] for event in joiner.events("said")]
        assert any(line.startswith(f"verified {len(units)} units (SHA-256)") for line in said), said
        # What was fetched is handed on: the next one gets along without the founder.
        founder.kill()
        heir = nodes.start_one(model=None, blocks=(2, 3))
        assert stored_units(heir) == set(span_tensors(inspect_model(llama), 2, 3))


def test_a_joiner_with_another_model_is_told_so_in_one_line(llama: Path, tmp_path: Path) -> None:
    other = make_tiny_tokenizer(make_tiny_model("llama", tmp_path / "other", 4, seed=1))
    with Nodes(tmp_path, llama) as nodes:
        nodes.start((0, 4))
        with pytest.raises(NodeFailed) as caught:
            nodes.start_one(model=other)
    assert caught.value.kind == "ConfigError"
    assert caught.value.message == f"{other} is not the model of the swarm {llama.name}"


def test_two_that_know_one_address_find_each_other(llama: Path, tmp_path: Path) -> None:
    """Second and third know the first alone; when it is gone, a client of the third finds the second's blocks."""
    with Nodes(tmp_path, llama) as nodes:
        first, second, third = [nodes.start_one(blocks=span) for span in [(0, 1), (0, 3), (3, 4)]]
        assert third.config.invite is not None
        assert [address.peer for address in third.config.invite.bootstrap] == [first.peer]
        first.kill()
        run = with_model(third.invite, lambda model: generate(model, PROMPT, 20))
    assert run.tokens == reference(llama, PROMPT, 20)
    assert run.peers == [second.peer, third.peer]


def test_who_leaves_is_gone_at_once_and_who_dies_within_its_lifetime(llama: Path, tmp_path: Path) -> None:
    ttl_s = 3.0

    async def use(model: Model) -> None:
        _, leaver, dead = nodes.nodes
        view = await until(model, lambda view: len(view.peers) == 3)
        assert view.coverage() == (3, 3, 3, 3)
        leaver.ask_to_leave()
        view = await until(model, lambda view: leaver.peer not in view.peers or not view.peers[leaver.peer].serving)
        assert view.peers[leaver.peer].state == "leaving"
        assert view.coverage() == (2, 2, 2, 2)
        dead.kill()
        view = await model.view()
        assert view.peers[dead.peer].serving, "nobody can know yet"
        await until(model, lambda view: dead.peer not in view.peers, limit_s=ttl_s + 2.0)

    with Nodes(tmp_path, llama) as nodes:
        nodes.start((0, 4), (0, 4), (0, 4), ttl_s=ttl_s)
        with_model(nodes.invite, use)


def test_neighbours_meet_by_multicast_dns(tmp_path: Path) -> None:
    """Two networks of which neither knows an address of the other."""

    async def main() -> None:
        async with AsyncExitStack() as stack:
            both: list[Network] = []
            for _ in range(2):
                network = open_network(Identity.generate(), ("/ip4/127.0.0.1/tcp/0",), no_events)
                both.append(await stack.enter_async_context(network))
            met = trio.Event()

            def event(name: str, /, **fields: object) -> None:
                assert name == "mdns.met", fields
                met.set()

            async with trio.open_nursery() as nursery:
                for network in both:
                    nursery.start_soon(meet_neighbours, network, event, ["127.0.0.1"])
                await met.wait()
                nursery.cancel_scope.cancel()
            first, second = both
            assert first.identity.peer_id in second.transport.connected()
            assert await first.records.find_peer(second.identity.peer_id)

    bounded(main)
